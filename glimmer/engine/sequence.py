"""Request and Sequence: what was asked, and how far it has come. Token ids only; text is made upstairs.

    tokens     |<------- prompt ------->|<--- answer so far --->|
    computed   |<- keys and values are in the cache ->|
                                                      |<- to do ->|   a step computes some of these

A sequence that lost its blocks has num_computed_tokens = 0 and computes its tokens, answer included, again.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from glimmer.config import SamplingParams


class FinishReason(StrEnum):
    """Why an answer ended. STOP: an end-of-sequence or stop id (stop strings are found upstairs)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class Request:
    """One prompt and one answer to it. `seed` makes its randomness; eos_token_ids end the answer unless ignored."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: str
    eos_token_ids: tuple[int, ...] = ()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end the answer."""
        return frozenset(self.params.stop_token_ids) | (
            frozenset() if self.params.ignore_eos else frozenset(self.eos_token_ids)
        )


@dataclass(frozen=True)
class Logprob:
    """Natural log-probability of a token under the raw logits, and its rank among all tokens (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class Sequence:
    """A request in flight. The scheduler changes `num_computed_tokens` and `blocks`; update appends to `tokens`."""

    request: Request
    max_total_tokens: int  # prompt and answer
    tokens: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, made when they are needed
    num_prompt_logprobs_sent: int = 0  # rows of the prompt whose log-probabilities have gone out

    def __post_init__(self):
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    def finish_reason(self) -> FinishReason | None:
        """Whether the token just appended was the last one."""
        if self.tokens[-1] in self.request.stop_ids:  # the sampler never chooses one before min_tokens
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_total_tokens else None


@dataclass(frozen=True)
class Chunk:
    """Tokens start:start+n of a sequence, computed in one step; logits for the last `rows` of them."""

    sequence: Sequence
    start: int
    n: int
    rows: int

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the end of what is known, so that a new token follows."""
        return self.start + self.n == len(self.sequence.tokens)


@dataclass(frozen=True)
class Step:
    """The chunks of one step, in the order of their rows."""

    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class SamplerOutput:
    """What the sampler made of one chunk.

    token            the new token, or None: the chunk does not reach the end, or `problem` says why there is none
    logprobs         {id: Logprob} of the new token, if asked for
    prompt_logprobs  for each row wanted, the same about the prompt token that follows it, if asked for
    """

    token: int | None = None
    problem: str | None = None
    logprobs: dict[int, Logprob] | None = None
    prompt_logprobs: tuple[dict[int, Logprob], ...] = ()


@dataclass(frozen=True)
class Output:
    """What became known about one request in one step. After one with a finish_reason nothing more comes."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    prompt_logprobs: tuple[dict[int, Logprob], ...] = ()
    finish_reason: FinishReason | None = None
    problem: str | None = None
