"""What goes between the HTTP process and the engine process: messages, and frames of bounded length on a unix socket.

    HTTP process   Submit, Cancel, Close         -->
                   <-- Loading, Ready, Tokens, Ended, Alive, Failed       engine process (rank 0)

A frame is four bytes of length and one message as MessagePack. Every message is a type of its own, and what does not
have the form of one is refused: no object is made but these, and nothing is executed. The socket lies in a directory
that only its owner may enter. Not here: who reads and writes (client.py, engine_process.py).
"""

import struct
from dataclasses import fields
from typing import Any

import msgspec

from glimmer.config import SamplingParams
from glimmer.engine_load import EngineLoad
from glimmer.errors import CheckpointError, ConfigError, EngineError, GlimmerError, NotEnoughMemory, RequestError
from glimmer.text.grammar import ConstraintSpec

MAX_FRAME = 1 << 27  # bytes of a message: the longest prompt has 1 MB, the log-probabilities of a step a few
LENGTH = struct.Struct("!I")
HEARTBEAT = 0.5  # seconds between two signs of life of the engine process
ERRORS: dict[str, type[GlimmerError]] = {
    kind.__name__: kind for kind in (CheckpointError, ConfigError, EngineError, NotEnoughMemory)
}


class Message(msgspec.Struct, frozen=True, array_like=True):
    """A message; its type goes with it."""


class Problem(msgspec.Struct, frozen=True, array_like=True):
    """A GlimmerError: the name of its class, the field of a RequestError, and its three parts."""

    kind: str
    field: str
    found: str
    expected: str
    todo: str

    @classmethod
    def of(cls, error: BaseException) -> "Problem":
        """What an exception says."""
        if not isinstance(error, GlimmerError):
            found = f"{type(error).__name__}: {error}"[:500]
            return cls("EngineError", "", found, "an engine without faults", "report this as a bug")
        field = error.field if isinstance(error, RequestError) else ""
        kinds: dict[str, type[GlimmerError]] = {**ERRORS, "RequestError": RequestError}
        kind = next((name for name, one in kinds.items() if isinstance(error, one)), "EngineError")
        return cls(kind, field, error.found, error.expected, error.todo)

    def error(self) -> GlimmerError:
        """The exception again."""
        if self.kind == "RequestError":
            return RequestError(self.field, self.found, self.expected, self.todo)
        return ERRORS.get(self.kind, EngineError)(self.found, self.expected, self.todo)


# ---------------------------------------------------------------------- to the engine


class Submit(Message, frozen=True, tag="submit"):
    """A request begins. params: fields of SamplingParams that differ from the default.

    thinking_budget: most tokens of reasoning; thinking: the prompt has opened it.
    """

    id: int
    prompt_token_ids: list[int]
    params: dict[str, Any]
    cache_salt: str = ""
    constraint: ConstraintSpec | None = None
    thinking_budget: int | None = None
    thinking: bool = False


class Cancel(Message, frozen=True, tag="cancel"):
    """Nobody waits any more for a request, or for one answer of it."""

    id: int
    answer: int | None = None


class Close(Message, frozen=True, tag="close"):
    """The engine process shall end."""


# ---------------------------------------------------------------------- from the engine


class Loading(Message, frozen=True, tag="loading"):
    """Bytes of weights that have been read, of so many."""

    done: int
    total: int


class Ready(Message, frozen=True, tag="ready"):
    """The model answers. The numbers are those of Stats' and requests' limits."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    ranks: int
    device: str


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """A token with its log-probability and its rank among all tokens."""

    token_id: int
    logprob: float
    rank: int


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """What a step brought to an answer of a request. logprobs: for each token, its own first."""

    id: int
    answer: int
    token_ids: list[int]
    finish_reason: str | None = None
    cached_tokens: int | None = None
    logprobs: list[list[Logprob]] = []
    prompt_logprobs: list[list[Logprob]] = []
    problem: Problem | None = None


class Tokens(Message, frozen=True, tag="tokens"):
    """What one step or several brought."""

    deltas: list[TokenDelta]


class Ended(Message, frozen=True, tag="ended"):
    """Nothing more comes of a request, for this reason: a RequestError if it has not even begun."""

    id: int
    problem: Problem


class Alive(Message, frozen=True, tag="alive"):
    """A sign of life, with what LLM.load says."""

    load: EngineLoad


class Failed(Message, frozen=True, tag="failed"):
    """There is no engine, or none any more. exit_code: what a command ends with."""

    problem: Problem
    exit_code: int


ToEngine = Submit | Cancel | Close
FromEngine = Loading | Ready | Tokens | Ended | Alive | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class FrameError(Exception):
    """The other side does not speak this language."""


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message with its length in front. FrameError if it is longer than the other side reads."""
    content = _encoder.encode(message)
    if len(content) > MAX_FRAME:
        raise FrameError(f"a message of {len(content)} bytes, where {MAX_FRAME} are read")
    return LENGTH.pack(len(content)) + content


def length_of(head: bytes) -> int:
    """The length of the message that follows. FrameError if it is longer than anything that is sent."""
    length: int = LENGTH.unpack(head)[0]
    if length > MAX_FRAME:
        raise FrameError(f"a message of {length} bytes, where at most {MAX_FRAME} are read")
    return length


def to_engine(content: bytes) -> ToEngine:
    """The message of a frame, as the engine process reads it. FrameError if it is none."""
    try:
        return _to_engine.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameError(str(error)) from None


def from_engine(content: bytes) -> FromEngine:
    """The message of a frame, as the HTTP process reads it. FrameError if it is none."""
    try:
        return _from_engine.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameError(str(error)) from None


_DEFAULTS = SamplingParams()
_TRAVELLING = tuple(
    one.name for one in fields(SamplingParams) if one.name not in ("stop", "structured_outputs", "detokenize")
)


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """What the engine has to know of sampling parameters. Text is made, and searched, on this side of the socket."""
    given = {name: getattr(params, name) for name in _TRAVELLING}
    told = {name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)}
    return told if params.seed is None else told | {"seed": str(params.seed)}  # MessagePack has no such integers


def params_from_wire(told: dict[str, Any]) -> SamplingParams:
    """What params_to_wire was given, as far as the engine has to know it. RequestError for what cannot be."""
    return SamplingParams(**told | ({"seed": int(told["seed"])} if "seed" in told else {}))
