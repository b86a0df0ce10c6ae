"""Request and Sequence: what was asked, and how far its answer has come. Token ids only; text is made in llm.py.

    tokens     |<------- prompt ------->|<--- answer so far --->|
    drafts                                                      |<- guesses ->|
    computed   |<- keys and values are in the cache ->|
                                                      |<- to do ----------->|   a step computes some of these

A sequence that lost its blocks has num_computed_tokens = 0 and computes its tokens, answer included, again. Keys and
values of rejected drafts are overwritten by the tokens that take their place: only num_computed_tokens has to go back.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from glimmer.config import SamplingParams
from glimmer.errors import EngineError, GlimmerError, RequestError

Bits = bytes | bytearray  # a set of token ids


class FinishReason(StrEnum):
    """Why an answer ended. STOP: an end-of-sequence or stop id (stop strings are found by whoever makes the text)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Constraint(Protocol):
    """Which tokens may come next, such as those that a grammar allows. Its state is the answer so far.

    It is asked on rank 0 only. An exception of its methods ends its own request with finish_reason "error"; on several
    ranks `accept` must not raise, for the other ranks would not hear of it: what goes wrong there, `mask` raises.
    """

    def mask(self) -> Bits | None:
        """Which tokens may come next: token i if bit i % 8 of byte i // 8 is set. None: all of them."""

    def accept(self, token: int) -> None:
        """The answer has one more token, which `mask` allowed."""

    def rollback(self, count: int) -> None:
        """Undo the last `count` calls of accept."""


@dataclass(frozen=True)
class Request:
    """One prompt and one answer to it. `seed` makes its randomness; eos_token_ids end the answer unless ignored.

    bad_words: params.bad_words as token ids, which must not follow one another in the answer; on rank 0.
    cache_salt: blocks of the cache are shared among requests of the same salt only.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: str
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    cache_salt: str = ""

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end the answer."""
        return frozenset(self.params.stop_token_ids or ()) | (
            frozenset() if self.params.ignore_eos else frozenset(self.eos_token_ids)
        )

    @cached_property
    def adjusts(self) -> bool:
        """Whether logits are adjusted at every place of the answer, other than by a constraint."""
        p = self.params
        return (
            p.repetition_penalty != 1
            or p.presence_penalty != 0
            or p.frequency_penalty != 0
            or bool(p.logit_bias)
            or p.allowed_token_ids is not None
            or bool(self.bad_words)
        )

    @cached_property
    def plain(self) -> bool:
        """Whether every token is the likeliest one, and nothing else is asked, other than by a constraint."""
        p = self.params
        asks = p.min_tokens > 0 or p.logprobs is not None or p.prompt_logprobs is not None
        return p.temperature == 0 and not self.adjusts and not asks

    @cached_property
    def biases(self) -> tuple[Tensor, Tensor]:
        """params.logit_bias as token ids and what is added to their logits; on the host."""
        table = self.params.logit_bias or {}
        return torch.tensor(list(table)), torch.tensor(list(table.values()), dtype=torch.float32)

    @cached_property
    def allowed(self) -> Tensor:
        """params.allowed_token_ids, on the host."""
        return torch.tensor(self.params.allowed_token_ids)

    def forbidden_after(self, answer: list[int]) -> list[int]:
        """Tokens that would complete one of the bad words after this answer."""
        return [
            last
            for *first, last in self.bad_words
            if len(first) <= len(answer) and answer[len(answer) - len(first) :] == first
        ]


@dataclass(frozen=True)
class Logprob:
    """Natural log-probability of a token under the raw logits, and its rank among all tokens (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(eq=False)
class Sequence:
    """A request that is being answered. The scheduler changes `num_computed_tokens`, `blocks` and `tokens`.

    drafts: guesses of the tokens that follow `tokens`. Whoever proposes them may set any number after each step; the
    next step that reaches the end of `tokens` computes as many of them as fit, and then they are gone.
    """

    request: Request
    max_total_tokens: int  # prompt and answer
    constraint: Constraint | None = None
    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, made when they are needed
    num_cached_tokens: int | None = None  # of the prompt: found in the cache when the sequence began
    looked_up: bool = False  # on disk, since it began to wait (disk_cache.py)
    num_prompt_logprobs_sent: int = 0  # rows of the prompt whose log-probabilities have been in an Output

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> FinishReason | None:
        """Add a token to the answer; the reason if it was the last one."""
        self.tokens.append(token)
        if token in self.request.stop_ids:  # the sampler never chooses one before min_tokens
            return FinishReason.STOP
        if len(self.tokens) >= self.max_total_tokens:
            return FinishReason.LENGTH
        if self.constraint is not None:
            self.constraint.accept(token)
        return None


@dataclass(frozen=True)
class Chunk:
    """Tokens start:start+n of a sequence, computed in one step; logits for the last `rows` of them.

    drafts: the last of these n tokens, where they are guesses. A chunk that reaches the end of the known tokens has
    1 + len(drafts) rows to sample: one after the last known token, and one after each draft.
    """

    sequence: Sequence
    start: int
    n: int
    rows: int
    drafts: tuple[int, ...] = ()

    @property
    def num_known(self) -> int:
        """How many of the n tokens are no drafts."""
        return self.n - len(self.drafts)

    @property
    def token_ids(self) -> list[int]:
        """The n tokens."""
        return [*self.sequence.tokens[self.start : self.start + self.num_known], *self.drafts]

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the end of what is known, so that a new token follows."""
        return self.start + self.num_known == len(self.sequence.tokens)


@dataclass(frozen=True)
class Step:
    """The chunks of one step, in the order of their rows."""

    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class SamplerOutput:
    """What the sampler made of one chunk.

    tokens           the new tokens: the drafts that were accepted, and one more. Empty if the chunk does not reach the
                     end of what is known, or if `problem` says why there are none
    logprobs         for each new token {id: Logprob}, if asked for
    prompt_logprobs  for each row wanted, the same about the prompt token that follows it, if asked for
    """

    tokens: tuple[int, ...] = ()
    problem: EngineError | RequestError | None = None
    logprobs: tuple[dict[int, Logprob], ...] = ()
    prompt_logprobs: tuple[dict[int, Logprob], ...] = ()


@dataclass(frozen=True)
class Output:
    """What became known about one request in one step. After one with a finish_reason nothing more comes."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    prompt_logprobs: tuple[dict[int, Logprob], ...] = ()
    finish_reason: FinishReason | None = None
    problem: EngineError | RequestError | None = None
    num_cached_tokens: int | None = None  # of the prompt: they were found in the cache


def problem_of(what: str, error: BaseException) -> EngineError | RequestError:
    """Why one answer ends: what cannot be done for this request stays a RequestError, all else is a `failure`."""
    return error if isinstance(error, RequestError) else failure(what, error)


def failure(what: str, error: BaseException) -> EngineError:
    """An exception as the reason why an answer ends: `what` has failed."""
    if isinstance(error, GlimmerError):
        return EngineError(error.found, error.expected, error.todo)
    return EngineError(
        f"{what} failed: {type(error).__name__}: {error}"[:500],
        "a computation that succeeds",
        "if memory is short, lower max_num_batched_tokens or max_num_seqs; otherwise report this as a bug",
    )
