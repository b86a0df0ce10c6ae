"""Train the demo model on what generate.py wrote. Stops and resumes anywhere; uses a GPU where there is one.

    python tools/demo_model/train.py --data build/demo_model

One micro-batch is some examples of every task in fixed proportions, 3,000 to 6,000 tokens; a step has --micro-batches.
Matrices learn by Muon (momentum, orthogonalised), everything else by AdamW; the rate rises, stays, and falls to nothing
over the last part of the run.
The routers' correction biases follow the experts' load and no gradient. The MTP layer joins half-way.
A later call with other --steps stretches or shortens what is left. Writes state.pt, loss.csv and, at the end, the
finished checkpoint (export.py). Not here: evaluation (evaluate.py), the picture of the loss (plot.py).
"""

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from export import export, load
from generate import EXAMPLES
from model import DemoModel, Layout, Shape, layout_of
from torch import Tensor, nn

TASKS = tuple(EXAMPLES)
MICRO_BATCHES = (  # from which micro-batch on, how many examples of each task
    (0, (2, 0, 0, 8, 10, 2, 2, 8, 14, 1, 0, 0)),  # short ones first: they teach copying
    (600, (5, 1, 1, 9, 10, 2, 2, 6, 5, 1, 1, 0)),
    (2400, (7, 2, 2, 8, 8, 2, 1, 4, 4, 1, 1, 1)),
    (12200, (8, 2, 3, 4, 3, 1, 1, 2, 6, 1, 1, 2)),
)
DECAY_SHARE, WARM_UP, MTP_FROM, MTP_WEIGHT = 0.4, 60, 0.5, 0.3
MUON_RATE, ADAM_RATE, BIAS_SPEED = 0.02, 4e-3, 0.02


class Batch(NamedTuple):
    """Flat tokens (T,), which are to be predicted (T,), the task of each (T,), and their layout."""

    tokens: Tensor
    wanted: Tensor
    tasks: Tensor
    layout: Layout


class Examples:
    """The training set, task by task, each in a shuffled order of its own that begins anew when it is used up."""

    def __init__(self, path: Path):
        arrays = np.load(path)
        self.ids, self.wanted, self.starts = arrays["ids"].astype(np.int64), arrays["wanted"], arrays["starts"]
        self.of_task = [np.flatnonzero(arrays["tasks"] == i) for i in range(len(TASKS))]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def micro_batch(self, number: int) -> list[tuple[int, int]]:
        """The (example, task) pairs of one micro-batch: the same for the same number, whatever was drawn before."""
        chosen = []
        for task, mine in enumerate(self.of_task):
            used, share = 0, 0
            for (begin, shares), (end, _) in pairwise((*MICRO_BATCHES, (number + 1, ()))):
                if begin <= number:
                    share = shares[task]
                    used += (min(end, number) - begin) * share
            for i in range(used, used + share):
                epoch, at = divmod(i, len(mine))
                chosen.append((int(self._order(task, epoch)[at]), task))
        return chosen

    def _order(self, task: int, epoch: int) -> np.ndarray:
        """A task's examples in the order of one epoch; the latest is kept."""
        if self._orders.get(task, (None,))[0] != epoch:
            order = np.random.default_rng((task, epoch)).permutation(self.of_task[task])
            self._orders[task] = epoch, order
        return self._orders[task][1]

    def batch(self, micro_batches: range, device: torch.device, part: int = 0, parts: int = 1) -> Batch:
        """One of the `parts` about equal parts of a step's micro-batches."""
        drawn = [pair for number in micro_batches for pair in self.micro_batch(number)]
        chosen = sorted(drawn, key=lambda pair: self.length(pair[0]))[part::parts]
        segments, tokens, wanted, tasks, real = [], [], [], [], []
        for group in self._alike(chosen, 2.0 if device.type == "cuda" else 1.25):
            longest = self.length(group[-1][0])
            segments.append((len(group), longest))
            for example, task in group:
                part, pad = slice(self.starts[example], self.starts[example + 1]), longest - self.length(example)
                tokens.append(np.pad(self.ids[part], (0, pad)))
                wanted.append(np.pad(self.wanted[part], (0, pad)))
                real.append(np.arange(longest) < longest - pad)
                tasks.append(np.full(longest, task))
        flat = [torch.from_numpy(np.concatenate(parts)).to(device) for parts in (tokens, wanted, tasks, real)]
        return Batch(flat[0], flat[1], flat[2], layout_of(segments, flat[3]))

    def length(self, example: int) -> int:
        return int(self.starts[example + 1] - self.starts[example])

    def _alike(self, chosen: list[tuple[int, int]], most: float) -> Iterator[list[tuple[int, int]]]:
        """Runs of examples, sorted by length, of which none is `most` times as long as another.

        A CPU pays for padding, a GPU for the number of runs.
        """
        group: list[tuple[int, int]] = []
        for pair in chosen:
            if group and self.length(pair[0]) > most * self.length(group[0][0]):
                yield group
                group = []
            group.append(pair)
        yield group


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one; those of the same shape, all at once.

    Stacked matrices are treated one by one; a group's `halves` says how many lie on top of each other in one matrix.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "halves": 1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for parameters in alike.values():
                updates = []
                for p in parameters:
                    speed = self.state[p].setdefault("speed", torch.zeros_like(p))
                    speed.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(speed, group["momentum"]))
                update = torch.stack(updates).unflatten(-2, (group["halves"], -1))
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                for p, turn in zip(parameters, orthogonal(update)):
                    p.add_(turn.view_as(p), alpha=-group["lr"] * scale)


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """(…, R, C) with all singular values moved close to 1, by Newton and Schulz's iteration."""
    turned = x.shape[-2] > x.shape[-1]
    x = x.mT if turned else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if turned else x


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, stacked, others = [], [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim > 1 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.weight"))
        (others if not hidden else stacked if "gate_up_proj" in name else matrices).append(parameter)
    muon = Muon([{"params": matrices}, {"params": stacked, "halves": 2}], lr=MUON_RATE)
    return [muon, torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def rate(step: int, steps: int, first: int = 0) -> float:
    """The share of the full learning rate from step `first` to step `steps`: up, level, down."""
    done, all_steps = step - first, steps - first
    return min((done + 1) / WARM_UP, 1.0, max(all_steps - done, 0) / (DECAY_SHARE * all_steps))


def losses(
    model: DemoModel, batch: tuple[Tensor, Tensor, Tensor, Layout], draft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Per predicted token: the loss (R,), its task (R,), and the MTP layer's loss (R',), empty without `draft`."""
    tokens, wanted, tasks, layout = batch
    hidden = model.trunk(tokens, layout)
    rows = wanted[1:].nonzero().squeeze(1)  # padding is never wanted, so no row reaches into the next sequence
    loss = F.cross_entropy(model.lm_head(hidden[rows]), tokens[rows + 1], reduction="none")
    if not draft:
        return loss, tasks[rows], loss.new_zeros(0)
    guess = model.draft(hidden, tokens.roll(-1), layout)
    far = (wanted[2:] & (layout.positions[2:] >= 2)).nonzero().squeeze(1)
    return loss, tasks[rows], F.cross_entropy(model.lm_head(guess[far]), tokens[far + 2], reduction="none")


def learn(model: DemoModel, batches: list[Batch], draft: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Set the gradients of the mean loss over all batches, one thread for each; returns `losses` of all of them.

    Each thread computes with one core: at this size, cores that share every operation mostly wait for each other.
    """
    parameters = list(model.parameters())
    count = sum(int(b.wanted.sum()) for b in batches)

    def work(batch: Batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        loss, tasks, mtp = losses(model, batch, draft)
        total = (loss.sum() + MTP_WEIGHT * mtp.sum()) / count
        return torch.autograd.grad(total, parameters, allow_unused=True), (loss.detach(), tasks, mtp.detach())

    with ThreadPoolExecutor(len(batches)) as pool:
        gradients, parts = zip(*pool.map(work, batches), strict=True)
    for parameter, *shares in zip(parameters, *gradients, strict=True):
        parameter.grad = None if shares[0] is None else sum(shares[1:], start=shares[0])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--steps", type=int, default=13600)
    parser.add_argument("--weights", type=Path, help="a checkpoint to begin with")
    parser.add_argument("--first", type=int, default=0, help="the step to begin at, where weights have learnt already")
    parser.add_argument("--rate", type=float, default=1.0, help="the highest learning rate: a share of the usual")
    parser.add_argument("--micro-batches", type=int, default=1, help="in one step: a GPU is hardly busy with one")
    parser.add_argument("--threads", type=int, default=2, help="cores to use; a GPU is fed by one")
    parser.add_argument("--log", type=int, default=20, help="steps between two lines of loss.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = args.threads
    if device.type == "cuda":
        parts = 1
        torch.set_float32_matmul_precision("high")  # TF32

    examples, shape = Examples(args.data / "train.npz"), Shape()
    model = (load(args.weights) if args.weights else DemoModel(shape)).to(device)
    learners = optimizers(model)
    start, state = args.first, args.data / "state.pt"
    if state.exists():
        saved = torch.load(state, map_location=device)
        model.load_state_dict(saved["model"])
        for learner, old in zip(learners, saved["learners"]):
            learner.load_state_dict(old)
        start = saved["step"]
    log = args.data / "loss.csv"
    head = "step,about tokens,loss,mtp,rate,least load,most load,tokens/s," + ",".join(TASKS)
    past = log.read_text().splitlines()[1:] if state.exists() else []
    log.write_text("\n".join([head, *(row for row in past if int(row.split(",")[0]) <= start)]) + "\n")
    seen, since = 0, time.monotonic()
    sums, counts, drafts = torch.zeros(len(TASKS)), torch.zeros(len(TASKS)), []

    for step in range(start, args.steps):
        drafting = step >= args.first + MTP_FROM * (args.steps - args.first)
        share = args.rate * rate(step, args.steps, args.first)
        for learner, full in zip(learners, (MUON_RATE, ADAM_RATE)):
            for group in learner.param_groups:
                group["lr"] = full * share
        micro_batches = range(step * args.micro_batches, (step + 1) * args.micro_batches)
        batches = [examples.batch(micro_batches, device, part, parts) for part in range(parts)]
        loss, tasks, mtp = learn(model, batches, drafting)
        for learner in learners:
            learner.step()
            learner.zero_grad(set_to_none=True)

        loads = [router.load() for router in model.routers().values() if router.counted]
        for router in model.routers().values():
            if router.counted:
                router.balance(BIAS_SPEED * (share if step - args.first >= WARM_UP else 1.0))
        seen += sum(len(batch.tokens) for batch in batches)
        sums.index_add_(0, tasks.cpu(), loss.cpu())
        counts += torch.bincount(tasks.cpu(), minlength=len(TASKS))
        drafts += [mtp.mean().item()] if drafting else []
        if (step + 1) % args.log == 0:
            speed = seen / (time.monotonic() - since)
            row = [step + 1, (step + 1) * seen // args.log, sums.sum() / counts.sum(),
                   np.mean(drafts) if drafts else 0.0, share,
                   min(x.min() for x in loads), max(x.max() for x in loads), speed, *(sums / counts)]  # fmt: skip
            with open(log, "a", newline="") as file:
                csv.writer(file).writerow([f"{float(x):.4g}" if not isinstance(x, int) else x for x in row])
            print(" ".join(f"{float(x):.3g}" for x in row), flush=True)
            seen, since = 0, time.monotonic()
            sums, counts, drafts = torch.zeros(len(TASKS)), torch.zeros(len(TASKS)), []
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            kept = {"model": model.state_dict(), "learners": [x.state_dict() for x in learners], "step": step + 1}
            torch.save(kept, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
    export(model, args.data, args.data / "checkpoint")
    print(f"wrote {args.data / 'checkpoint'}", file=sys.stderr)


if __name__ == "__main__":
    main()
