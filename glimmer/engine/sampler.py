"""Logits -> tokens: greedy or drawn, after penalties, biases and limits; and the log-probabilities asked for.

The token at a place of an answer is a function of its logits, its request's seed and how many tokens the answer has
before it, not of what runs beside it: one uniform number, hashed from seed and place, is looked up in the row's
cumulative distribution. It is the same whether the tokens before it are known or drafts. So a draft is accepted if it
is the token that its place gets anyway, and answers do not depend on drafts.
Log-probabilities are those of the raw logits, over the whole vocabulary. Rows of the vocabulary beyond the tokenizer's
last id are never chosen. Not here: when an answer ends (sequence.py), and stop strings (llm.py).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glimmer.config import SamplingParams
from glimmer.engine.sequence import Chunk, Constraint, Logprob, SamplerOutput, Sequence, Step, problem_of
from glimmer.errors import EngineError, RequestError

log = logging.getLogger("glimmer")

LARGEST = 1e20  # of a logit after biases and penalties: divided by any temperature it is still finite
CANDIDATES = 1024  # top-k and top-p look at that many likeliest first, and sort everything only if these are too few


@dataclass(frozen=True)
class Place:
    """A place of an answer that gets a token from row `row` of the logits: the one after `drafts`.

    allowed: what the request's constraint allows there, a bit for each id, as Constraint.mask has them in bytes; None:
    everything. It may be longer than the vocabulary.
    """

    row: int
    sequence: Sequence
    drafts: tuple[int, ...]
    allowed: NDArray[np.uint8] | None

    @property
    def params(self) -> SamplingParams:
        return self.sequence.request.params

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer before this place."""
        return self.sequence.num_output_tokens + len(self.drafts)

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer before this place."""
        return [*self.sequence.tokens, *self.drafts] if self.drafts else self.sequence.tokens

    @property
    def answer(self) -> list[int]:
        """The answer before this place."""
        return self.tokens[self.sequence.prompt_length :]

    def allows(self, token: int) -> bool:
        """Whether the constraint allows this token."""
        if self.allowed is None:
            return True
        return 0 <= token < 8 * len(self.allowed) and bool(self.allowed[token >> 3] >> (token & 7) & 1)


class Sampler:
    """sampling_vocab_size: ids below it may be sampled; the model's vocabulary may be padded beyond them.

    forbid(logits, allowed) makes tokens impossible: see StepRunner.
    """

    def __init__(self, sampling_vocab_size: int, forbid: Callable[[Tensor, Tensor], None]):
        self.sampling_vocab_size, self._forbid = sampling_vocab_size, forbid

    def sample(self, logits: Tensor | None, step: Step) -> list[SamplerOutput]:
        """One SamplerOutput a chunk. logits: (R, V) float32, the wanted rows of all chunks in order; None if R is 0.
        Afterwards what constraints do not allow may be impossible in them.

        What cannot be computed for one request is the `problem` of its own output.
        """
        if logits is None:
            return [SamplerOutput() for _ in step.chunks]
        finite = _finite(logits)
        if all(finite) and all(_is_plain(chunk.sequence) for chunk in step.chunks):
            return self._sample_plain(logits, step)
        rows = list(accumulate((chunk.rows for chunk in step.chunks), initial=0))
        outputs: list[SamplerOutput] = []
        places: list[list[Place]] = []
        for chunk, first in zip(step.chunks, rows):
            try:
                outputs.append(SamplerOutput(prompt_logprobs=_prompt_logprobs(logits, first, finite, chunk)))
                places.append(_places(chunk, first, finite))
            except Exception as error:
                outputs[len(places) :] = [SamplerOutput(problem=problem_of("sampling", error))]
                places.append([])
        try:
            drawn = iter(self._tokens([place for own in places for place in own], logits))
        except Exception:  # because of one request: each is drawn for alone
            drawn = None
        for i, (chunk, own) in enumerate(zip(step.chunks, places)):
            if not own:
                continue
            try:
                tokens = list(islice(drawn, len(own))) if drawn is not None else self._tokens_alone(own, logits)
                tokens = tokens[: 1 + _accepted(tokens, chunk.drafts)]
                asked = chunk.sequence.request.params.logprobs
                logprobs = (
                    ()
                    if asked is None
                    else tuple(_logprobs(logits[place.row], token, asked) for place, token in zip(own, tokens))
                )
                outputs[i] = SamplerOutput(tuple(tokens), None, logprobs, outputs[i].prompt_logprobs)
            except Exception as error:
                outputs[i] = SamplerOutput(problem=problem_of("sampling", error))
        return outputs

    def _sample_plain(self, logits: Tensor, step: Step) -> list[SamplerOutput]:
        """The same where all sequences are plain and all logits finite, without an object for each place."""
        tokens, end = likeliest(logits[:, : self.sampling_vocab_size]), 0
        outputs: list[SamplerOutput] = []
        for chunk in step.chunks:
            begin, end = end, end + chunk.rows
            own = tokens[begin:end]
            outputs.append(SamplerOutput(tuple(own[: 1 + _accepted(own, chunk.drafts)])))
        return outputs

    def _tokens(self, places: list[Place], raw: Tensor) -> list[int]:
        """A token for each place, from its row of raw (R, V)."""
        if not places:
            return []
        logits = raw if len(places) == len(raw) else raw[[place.row for place in places]]
        logits = logits[:, : self.sampling_vocab_size]
        if any(_shifts(place) or (place.allowed is not None and _is_read(place)) for place in places):
            logits = logits.clone()
        self._adjust_(logits, places)
        tokens = likeliest(logits)
        drawn = [i for i, place in enumerate(places) if place.params.temperature > 0]
        # Apart, because they number their tokens differently: no row may notice which kind its neighbours are.
        for draw in (_draw, _draw_limited):
            rows = [i for i in drawn if _limits(places[i]) == (draw is _draw_limited)]
            if rows:
                for i, token in zip(rows, draw(logits[rows], [places[i] for i in rows])):
                    tokens[i] = token
        return tokens

    def _adjust_(self, logits: Tensor, places: list[Place]) -> None:
        """Biases, then penalties, then what must not come here, as in vLLM; logits (N, V) are changed in place.

        RequestError if nothing may come at one of the places.
        """
        shifted = [(row, place) for row, place in zip(logits, places) if _shifts(place)]
        for row, place in shifted:
            _shift_(row, place)
        masks = {i: place.allowed for i, place in enumerate(places) if place.allowed is not None}
        if masks:
            allowed = np.full((len(places), -(-logits.shape[-1] // 8)), 0xFF, np.uint8)
            for i, mask in masks.items():
                allowed[i] = mask[: allowed.shape[-1]]
            self._forbid(logits, torch.from_numpy(allowed))
        for row, place in shifted:
            if row.amax() < -LARGEST:  # all of them are -inf
                raise RequestError(
                    "allowed_token_ids",
                    f"no token may come after {place.num_output_tokens} tokens of the answer",
                    "allowed_token_ids that bad_words, min_tokens and a constraint leave some of",
                    "allow more tokens",
                )

    def _tokens_alone(self, places: list[Place], raw: Tensor) -> list[int]:
        """The same for places of one sequence, up to one that fails after a draft. Raises what the first one does."""
        tokens: list[int] = []
        for place in places:
            try:
                tokens += self._tokens([place], raw)
            except Exception as error:
                if not tokens:
                    raise
                log.debug("a draft was given up", exc_info=error)
                break
        return tokens


def _places(chunk: Chunk, first: int, finite: list[bool]) -> list[Place]:
    """The places that get a token: the next one, and those after drafts that may be accepted. `first`: the first row.

    Nothing that comes of a draft may matter unless it is accepted: where the row after one is not finite, or the
    constraint fails there, the places end.
    """
    if not chunk.samples:
        return []
    sequence, constraint = chunk.sequence, chunk.sequence.constraint
    first += chunk.rows - 1 - len(chunk.drafts)
    if constraint is None:
        count = next((i for i in range(1, 1 + len(chunk.drafts)) if not finite[first + i]), 1 + len(chunk.drafts))
        return [Place(first + i, sequence, chunk.drafts[:i], None) for i in range(count)]
    places = [Place(first, sequence, (), _allowed(sequence, constraint, 0))]
    accepted = 0
    try:
        for i, draft in enumerate(chunk.drafts, 1):
            if not finite[first + i] or not places[-1].allows(draft) or draft in sequence.request.stop_ids:
                break
            constraint.accept(draft)
            accepted = i
            places.append(Place(first + i, sequence, chunk.drafts[:i], _allowed(sequence, constraint, i)))
    except Exception as error:
        log.debug("a draft was given up", exc_info=error)
    finally:
        if accepted:
            constraint.rollback(accepted)
    return places


def _allowed(sequence: Sequence, constraint: Constraint, drafts: int) -> NDArray[np.uint8] | None:
    """What the constraint allows after that many drafts, as in Place. RequestError if it is nothing."""
    bits = constraint.mask()
    if bits is None:
        return None
    allowed = np.frombuffer(bits, np.uint8)
    if sequence.num_output_tokens + drafts < sequence.request.params.min_tokens:
        allowed = allowed.copy()
        for id in sequence.request.stop_ids:
            if id < 8 * len(allowed):
                allowed[id >> 3] &= 0xFF ^ (1 << (id & 7))
    if not allowed.any():
        raise RequestError(
            "min_tokens",
            f"an answer that is complete after {sequence.num_output_tokens + drafts} tokens: the constraint allows "
            "no other",
            "min_tokens that the constraint leaves room for",
            "lower min_tokens, or allow longer answers",
        )
    return allowed


def _accepted(tokens: list[int], drafts: tuple[int, ...]) -> int:
    """How many drafts are the tokens that their places got, from the first on. The place after them has a token too."""
    count = 0
    for token, draft in zip(tokens[:-1], drafts):
        if token != draft:
            break
        count += 1
    return count


def likeliest(logits: Tensor) -> list[int]:
    """The first of the largest in each row (N, V). In the host's memory by numpy, which takes a quarter of the time."""
    return (logits.numpy().argmax(-1) if logits.is_cpu else logits.argmax(-1)).tolist()


def _finite(logits: Tensor) -> list[bool]:
    """Whether each row (R, V) is free of NaN and infinity. A sum tells in one pass, unless it overflows."""
    finite = [math.isfinite(total) for total in logits.sum(-1).tolist()]
    if all(finite):
        return finite
    return logits.isfinite().all(-1).tolist()


def _is_read(place: Place) -> bool:
    """Whether the raw logits of this place are read after it has its token."""
    return place.params.logprobs is not None


def _is_plain(sequence: Sequence) -> bool:
    """Whether a sequence gets the likeliest token of its logits, as they are, at every place."""
    return sequence.constraint is None and sequence.request.plain


def _shifts(place: Place) -> bool:
    """Whether anything but its constraint adjusts the logits of this place."""
    return place.sequence.request.adjusts or place.num_output_tokens < place.params.min_tokens


def _shift_(logits: Tensor, place: Place) -> None:
    """What adjusts the logits (V,) of this place, but for its constraint; in place."""
    p, request = place.params, place.sequence.request
    if p.logit_bias:
        ids, biases = request.biases
        logits.index_add_(0, ids.to(logits.device), biases.to(logits.device))
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(place.tokens)), device=logits.device)
        seen = seen[seen < len(logits)]
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty != 0 or p.frequency_penalty != 0:
        answer = torch.tensor(place.answer, dtype=torch.int64, device=logits.device)
        counts = torch.bincount(answer, minlength=len(logits))
        logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    logits.clamp_(-LARGEST, LARGEST)
    if p.allowed_token_ids is not None:
        allowed = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        allowed[request.allowed.to(logits.device)] = True
        logits[~allowed] = float("-inf")
    if request.bad_words and (forbidden := request.forbidden_after(place.answer)):
        logits[forbidden] = float("-inf")
    if place.num_output_tokens < p.min_tokens:
        logits[[i for i in request.stop_ids if i < len(logits)]] = float("-inf")


def _limits(place: Place) -> bool:
    p = place.params
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _probabilities(logits: Tensor, places: list[Place]) -> Tensor:
    return (logits / _column(logits, [place.params.temperature for place in places])).softmax(-1)


def _draw(logits: Tensor, places: list[Place]) -> list[int]:
    """Draw a token for each row of logits (N, V) after temperature."""
    tokens: list[int] = _look_up(_probabilities(logits, places), places).squeeze(-1).tolist()
    return tokens


def _draw_limited(logits: Tensor, places: list[Place]) -> list[int]:
    """The same after top_k, top_p and min_p; candidates are numbered by rank, the likeliest first."""
    params, vocabulary = [place.params for place in places], logits.shape[-1]
    probs = _probabilities(logits, places)
    top_k = _column(logits, [min(p.top_k, vocabulary) if p.top_k > 0 else vocabulary for p in params])
    top_p, min_p = _column(logits, [p.top_p for p in params]), _column(logits, [p.min_p for p in params])
    for candidates in (min(CANDIDATES, vocabulary), vocabulary):
        kept, ids = probs.topk(candidates, -1)
        kept = kept * (torch.arange(candidates, device=probs.device) < top_k)
        if candidates == vocabulary or _suffices(kept, top_k, top_p, min_p):
            break
    # With top_k, the probability that top_p is a share of is that of the k tokens; without, it is the whole.
    whole = torch.where(top_k < vocabulary, kept.sum(-1, keepdim=True), 1.0)
    before = kept.cumsum(-1) - kept
    kept = kept * (before < top_p * whole) * (kept >= min_p * kept[:, :1])
    tokens: list[int] = ids.gather(-1, _look_up(kept, places)).squeeze(-1).tolist()
    return tokens


def _look_up(weights: Tensor, places: list[Place]) -> Tensor:
    """(N, 1): for each row, the index that its uniform number hits in the cumulative weights (N, C)."""
    cumulative = weights.double().cumsum(-1)
    uniform = torch.tensor([[_uniform(place)] for place in places], dtype=torch.float64, device=weights.device)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = (weights > 0).long().mul(torch.arange(weights.shape[-1], device=weights.device)).amax(-1, keepdim=True)
    return torch.minimum(index, last)  # rounding may push the product to the very end


def _suffices(kept: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> bool:
    """Whether no row could keep a token beyond these candidates."""
    by_count = top_k <= kept.shape[-1]
    by_mass = (top_p < 1) & (kept.sum(-1, keepdim=True) >= top_p)
    by_share = kept[:, -1:] < min_p * kept[:, :1]
    return bool((by_count | by_mass | by_share).all())


def _uniform(place: Place) -> float:
    """A number in [0, 1) that depends on the request's seed and the number of the place in its answer only."""
    digest = blake2b(f"{place.sequence.request.seed}:{place.num_output_tokens}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _logprobs(logits: Tensor, token: int, count: int) -> dict[int, Logprob]:
    """The chosen (or given) token's and the `count` likeliest tokens' log-probabilities (-1: all); logits (V,)."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(len(logprobs) if count < 0 else min(count, len(logprobs)))
    own = logprobs[token]
    found = {token: Logprob(float(own), int((logprobs > own).sum()) + 1)}
    found.update(
        (i, Logprob(value, rank)) for rank, (i, value) in enumerate(zip(ids.tolist(), values.tolist()), 1) if i != token
    )
    return found


def _prompt_logprobs(logits: Tensor, first: int, finite: list[bool], chunk: Chunk) -> tuple[dict[int, Logprob], ...]:
    """For each row of the chunk that a prompt token follows, that token's log-probabilities. `first`: the first row.

    EngineError if a row of known tokens is not finite; those of drafts do not count.
    """
    if not all(finite[first : first + chunk.rows - len(chunk.drafts)]):
        raise EngineError(
            "the model's logits hold NaN or infinity",
            "finite logits from finite weights",
            "check the checkpoint's files (a broken download or quantisation); try --dtype float32",
        )
    sequence = chunk.sequence
    asked = sequence.request.params.prompt_logprobs
    if asked is None:
        return ()
    positions = range(chunk.start, min(chunk.start + chunk.n, sequence.prompt_length - 1))
    return tuple(_logprobs(logits[row], sequence.tokens[p + 1], asked) for row, p in enumerate(positions, first))
