"""Logits -> tokens: greedy or drawn, after penalties, biases and limits; and the log-probabilities asked for.

A row's draw is a function of its request's seed and of how many tokens the answer has, not of what runs beside it: one
uniform number, hashed from those two, is looked up in the row's cumulative distribution. Log-probabilities are those of
the raw logits, over the whole vocabulary. Rows of the vocabulary beyond the tokenizer's last id are never chosen.
Not here: when an answer ends (sequence.py), and stop strings (upstairs).
"""

from hashlib import blake2b

import torch
from torch import Tensor

from glimmer.engine.sequence import Chunk, Logprob, SamplerOutput, Sequence, Step

CANDIDATES = 1024  # top-k and top-p look at that many likeliest first, and sort everything only if these are too few


class Sampler:
    """sampling_vocab_size: ids below it may be sampled; the model's vocabulary may be padded beyond them."""

    def __init__(self, sampling_vocab_size: int):
        self.sampling_vocab_size = sampling_vocab_size

    def sample(self, logits: Tensor | None, step: Step) -> list[SamplerOutput]:
        """One SamplerOutput a chunk. logits: (R, V) float32, the wanted rows of all chunks in order; None if R is 0."""
        if logits is None:
            return [SamplerOutput() for _ in step.chunks]
        finite = _finite(logits)
        outputs, drawing, row = [], [], 0
        for chunk in step.chunks:
            rows = range(row, row + chunk.rows)
            row = rows.stop
            if not all(finite[r] for r in rows):
                outputs.append(SamplerOutput(problem="the model's logits hold NaN or infinity"))
                continue
            if chunk.samples:
                drawing.append((len(outputs), rows[-1]))
            outputs.append(SamplerOutput(prompt_logprobs=_prompt_logprobs(logits, rows, chunk)))
        if drawing:
            sequences = [step.chunks[i].sequence for i, _ in drawing]
            raw = logits if len(drawing) == len(logits) else logits[[r for _, r in drawing]]
            for (i, r), sequence, token in zip(drawing, sequences, self._tokens(raw, sequences)):
                asked = sequence.request.params.logprobs
                logprobs = None if asked is None else _logprobs(logits[r], token, asked)
                outputs[i] = SamplerOutput(token, None, logprobs, outputs[i].prompt_logprobs)
        return outputs

    def _tokens(self, raw: Tensor, sequences: list[Sequence]) -> list[int]:
        """A token for each row of raw (N, V)."""
        logits = raw[:, : self.sampling_vocab_size]
        if any(_adjusts(s) for s in sequences):
            logits = logits.clone()
            for row, sequence in zip(logits, sequences):
                _adjust_(row, sequence)
        tokens = _likeliest(logits)
        drawn = [i for i, s in enumerate(sequences) if s.request.params.temperature > 0]
        # Apart, because they number their tokens differently: no row may notice which kind its neighbours are.
        for draw in (_draw, _draw_limited):
            rows = [i for i in drawn if _limits(sequences[i]) == (draw is _draw_limited)]
            if rows:
                for i, token in zip(rows, draw(logits[rows], [sequences[i] for i in rows])):
                    tokens[i] = token
        return tokens


def _likeliest(logits: Tensor) -> list[int]:
    """The first of the largest in each row (N, V). In the host's memory by numpy, which takes a quarter of the time."""
    return (logits.numpy().argmax(-1) if logits.is_cpu else logits.argmax(-1)).tolist()


def _finite(logits: Tensor) -> list[bool]:
    """Whether each row (R, V) is free of NaN and infinity. A sum tells in one pass, unless it overflows."""
    if logits.sum(-1).isfinite().all():
        return [True] * len(logits)
    return logits.isfinite().all(-1).tolist()


def _adjusts(sequence: Sequence) -> bool:
    p = sequence.request.params
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or bool(p.logit_bias)
        or sequence.num_output_tokens < p.min_tokens
    )


def _adjust_(logits: Tensor, sequence: Sequence) -> None:
    """Penalties, then biases, then the ids that must not come yet; logits (V,) are changed in place."""
    p = sequence.request.params
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        seen = seen[seen < len(logits)]
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty != 0 or p.frequency_penalty != 0:
        answer = torch.tensor(sequence.tokens[sequence.prompt_length :], dtype=torch.int64, device=logits.device)
        counts = torch.bincount(answer, minlength=len(logits))
        logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    for token, bias in p.logit_bias.items():
        logits[token] += bias
    if sequence.num_output_tokens < p.min_tokens:
        logits[[i for i in sequence.request.stop_ids if i < len(logits)]] = float("-inf")


def _limits(sequence: Sequence) -> bool:
    p = sequence.request.params
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _probabilities(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    return (logits / _column(logits, [s.request.params.temperature for s in sequences])).softmax(-1)


def _draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """Draw a token for each row of logits (N, V) after temperature."""
    return _look_up(_probabilities(logits, sequences), sequences).squeeze(-1).tolist()


def _draw_limited(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """The same after top_k, top_p and min_p; candidates are numbered by rank, the likeliest first."""
    params, vocabulary = [s.request.params for s in sequences], logits.shape[-1]
    probs = _probabilities(logits, sequences)
    top_k = _column(logits, [p.top_k if p.top_k > 0 else vocabulary for p in params])
    top_p, min_p = _column(logits, [p.top_p for p in params]), _column(logits, [p.min_p for p in params])
    for candidates in (min(CANDIDATES, vocabulary), vocabulary):
        kept, ids = probs.topk(candidates, -1)
        kept = kept * (torch.arange(candidates, device=probs.device) < top_k)
        if candidates == vocabulary or _suffices(kept, top_k, top_p, min_p):
            break
    # With top_k, the mass that top_p speaks of is that of the k tokens; without, it is the whole.
    whole = torch.where(top_k < vocabulary, kept.sum(-1, keepdim=True), 1.0)
    before = kept.cumsum(-1) - kept
    kept = kept * (before < top_p * whole) * (kept >= min_p * kept[:, :1])
    return ids.gather(-1, _look_up(kept, sequences)).squeeze(-1).tolist()


def _look_up(weights: Tensor, sequences: list[Sequence]) -> Tensor:
    """(N, 1): for each row, the index that its uniform number hits in the cumulative weights (N, C)."""
    cumulative = weights.double().cumsum(-1)
    uniform = torch.tensor([[_uniform(s)] for s in sequences], dtype=torch.float64, device=weights.device)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = (weights > 0).long().mul(torch.arange(weights.shape[-1], device=weights.device)).amax(-1, keepdim=True)
    return torch.minimum(index, last)  # rounding may push the product to the very end


def _suffices(kept: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> bool:
    """Whether no row could keep a token beyond these candidates."""
    by_count = top_k <= kept.shape[-1]
    by_mass = (top_p < 1) & (kept.sum(-1, keepdim=True) >= top_p)
    by_share = kept[:, -1:] < min_p * kept[:, :1]
    return bool((by_count | by_mass | by_share).all())


def _uniform(sequence: Sequence) -> float:
    """A number in [0, 1) that depends on the request's seed and the length of its answer only."""
    digest = blake2b(f"{sequence.request.seed}:{sequence.num_output_tokens}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _logprobs(logits: Tensor, token: int, count: int) -> dict[int, Logprob]:
    """The chosen (or given) token's and the `count` likeliest tokens' log-probabilities; logits (V,)."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    own = logprobs[token]
    found = {token: Logprob(float(own), int((logprobs > own).sum()) + 1)}
    found.update(
        (i, Logprob(value, rank)) for rank, (i, value) in enumerate(zip(ids.tolist(), values.tolist()), 1) if i != token
    )
    return found


def _prompt_logprobs(logits: Tensor, rows: range, chunk: Chunk) -> tuple[dict[int, Logprob], ...]:
    """For each row of the chunk that a prompt token follows, that token's log-probabilities."""
    sequence = chunk.sequence
    asked = sequence.request.params.prompt_logprobs
    if asked is None:
        return ()
    positions = range(chunk.start, min(chunk.start + chunk.n, sequence.prompt_length - 1))
    return tuple(_logprobs(logits[row], sequence.tokens[p + 1], asked) for row, p in zip(rows, positions))
