"""Train the MTP layer of finished weights further, on chains of its own drafts. All other weights stay as they are.

    python tools/demo_model/train_drafts.py --data build/demo_model --weights glimmer/demo --out build/demo_model/drafts

train.py teaches the layer the token after the next one, from the model's hidden states. An engine that drafts several
tokens feeds the layer its own hidden states, which it has never met there, so that the second guess is often wrong and
the third mostly. Here every row of an answer begins a chain of --places drafts, as the engine computes them: the keys
of earlier rows come from the model's hidden states, those of the chain from its own. A draft counts only if those
before it were right; so its inputs are the true tokens. It is to guess as the whole model would, whose probabilities
are the target. Prints by place the share of drafts that the model's likeliest token agrees with, where those before
them did. Not here: the model itself, which answers as before to the last bit.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from export import export, load
from model import DemoModel
from torch import Tensor
from train import ADAM_RATE, BIAS_SPEED, MUON_RATE, Batch, Examples, optimizers, rate

FIRST = 12200  # the micro-batch to begin with: from there on all tasks are mixed as in the end of the model's training


def chains(model: DemoModel, hidden: Tensor, batch: Batch, rows: Tensor, places: int) -> list[Tensor]:
    """For each place, the MTP hidden states (R, H) of chains that begin at `rows` (R,) of hidden (T, H)."""
    tokens, positions, mtp = batch.tokens, batch.layout.positions, model.model.layers[-1]
    following = [tokens[(rows + place).clamp(max=len(tokens) - 1)] for place in range(places + 1)]

    def combined(next_tokens: Tensor, states: Tensor) -> Tensor:
        return mtp.eh_proj(torch.cat([mtp.enorm(model.model.embed_tokens(next_tokens)), mtp.hnorm(states)], dim=-1))

    x = combined(tokens.roll(-1), hidden)
    normed = mtp.input_layernorm(x)
    _, keys, values = mtp.self_attn.project(normed, model.rope(positions))  # (T, h, D) each
    x, normed, drafted, own = x[rows], normed[rows], [], []
    for place in range(1, places + 1):
        q, k, v = mtp.self_attn.project(normed, model.rope(positions[rows] + place - 1))  # (R, h, D) each
        own += [(k, v)] if place > 1 else []  # the first one's own key is among `keys`
        x = x + mtp.self_attn.o_proj(attend(q, keys, values, own, batch, rows))
        x = x + mtp.mlp(mtp.post_attention_layernorm(x), torch.ones_like(rows, dtype=torch.bool))
        drafted.append(mtp.shared_head["norm"](x))
        if place < places:
            x = combined(following[place + 1], drafted[-1])
            normed = mtp.input_layernorm(x)
    return drafted


def attend(
    q: Tensor, keys: Tensor, values: Tensor, own: list[tuple[Tensor, Tensor]], batch: Batch, rows: Tensor
) -> Tensor:
    """(R, h D): each of R rows sees the keys (T, h, D) of its sequence up to its own, and those (R, h, D) of its chain.

    own: keys and values of the chain, place by place.
    """
    lengths = torch.tensor([length for count, length in batch.layout.segments for _ in range(count)])
    ends = lengths.cumsum(0)
    bounds = torch.searchsorted(rows, torch.cat([ends.new_zeros(1), ends])).tolist()  # among the rows, by sequence
    q, out = q * q.shape[-1] ** -0.5, []
    for length, end, first, last in zip(lengths.tolist(), ends.tolist(), bounds, bounds[1:]):
        if first == last:
            continue
        mine, theirs = slice(first, last), slice(end - length, end)
        unseen = batch.layout.positions[rows[mine], None] < torch.arange(length)  # (R', L)
        scores = torch.einsum("rhd,lhd->hrl", q[mine], keys[theirs]).masked_fill(unseen, float("-inf"))
        chain = [torch.einsum("rhd,rhd->hr", q[mine], k[mine])[..., None] for k, _ in own]
        weights = torch.cat([scores, *chain], dim=-1).softmax(-1)
        mixed = torch.einsum("hrl,lhd->rhd", weights[..., :length], values[theirs])
        for i, (_, v) in enumerate(own):
            mixed = mixed + weights[..., length + i].T[..., None] * v[mine]
        out.append(mixed.flatten(1))
    return torch.cat(out)


def losses(model: DemoModel, batch: Batch, places: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """The mean loss, and by place how many drafts had only right ones before them and how many of those were right."""
    tokens, wanted, positions = batch.tokens, batch.wanted, batch.layout.positions
    with torch.no_grad():
        hidden = model.trunk(tokens, batch.layout)
        rows = (wanted[2:] & (positions[2:] >= 2)).nonzero().squeeze(1)
        target = model.lm_head(hidden[rows + 1]).softmax(-1)  # of the token two places after the row
        at = torch.full_like(tokens, -1)
        at[rows] = torch.arange(len(rows))
    total, right, counts = torch.zeros(()), torch.ones(len(rows), dtype=torch.bool), []
    for place, drafted in enumerate(chains(model, hidden, batch, rows, places)):
        ends = (rows + place).clamp(max=len(tokens) - 1)
        aims = at[ends]  # where the target of that draft is, if the answer goes on as far
        there = (aims >= 0) & (positions[ends] == positions[rows] + place)
        logits, aim = model.lm_head(drafted[there]), target[aims[there]]
        total = total - (aim * logits.log_softmax(-1)).sum() / len(rows)
        agree = torch.zeros_like(right)
        agree[there] = logits.detach().argmax(-1) == aim.argmax(-1)
        counts.append((int((right & there).sum()), int((right & there & agree).sum())))
        right &= there & agree
    return total, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--weights", type=Path, default=Path("glimmer/demo"), help="the checkpoint to begin with")
    parser.add_argument("--out", type=Path, default=Path("build/demo_model/drafts"))
    parser.add_argument("--places", type=int, default=4, help="drafts of a chain")
    parser.add_argument("--steps", type=int, default=560, help="micro-batches to learn from")
    parser.add_argument("--rate", type=float, default=1.0, help="the highest learning rate: a share of the usual")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", type=int, default=20, help="steps between two lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    examples, model = Examples(args.data / "train.npz"), load(args.weights)
    layer = model.model.layers[-1]
    model.requires_grad_(False)
    layer.requires_grad_(True)
    learners = optimizers(layer)
    counts, since, sums = torch.zeros(args.places, 2), time.monotonic(), 0.0
    for step in range(args.steps):
        share = args.rate * rate(step, args.steps)
        for learner, full in zip(learners, (MUON_RATE, ADAM_RATE)):
            for group in learner.param_groups:
                group["lr"] = full * share
        batch = examples.batch(range(FIRST + step, FIRST + step + 1), torch.device("cpu"))
        loss, seen = losses(model, batch, args.places)
        loss.backward()
        for learner in learners:
            learner.step()
            learner.zero_grad(set_to_none=True)
        for router in model.routers().values():
            router.balance(BIAS_SPEED * share) if router is layer.mlp.gate else router.counted.clear()
        counts, sums = counts + torch.tensor(seen), sums + loss.item()
        if (step + 1) % args.log == 0:
            accepted = " ".join(f"{100 * right / tried:.1f}" for tried, right in counts.tolist())
            passed = time.monotonic() - since
            print(f"{step + 1} loss {sums / args.log:.3f} accepted % {accepted} {passed:.0f} s", flush=True)
            counts, sums = torch.zeros(args.places, 2), 0.0
    export(model, args.data, args.out)
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
