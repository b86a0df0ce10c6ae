"""What rank 0 tells the other ranks about requests, and how their own callers find the answers that they ask for.

Rank 0's requests are everybody's. A script that runs on every rank makes the same calls everywhere, but not at the same
moment, and not always in the same order: sets have no order, and coroutines and threads arrive as they like. So a call
of another rank is matched by what it asks: it gets the answers to the call of rank 0 that has the same prompts with the
same parameters. Of equal calls, and of equal prompts in one call, the first gets the first.

    rank 0's call arrives first   its outputs are held until a caller of this rank asks for the same (CallMatcher.claim)
    this rank's caller is first   it waits until rank 0's call arrives (CallMatcher.arrive)

A call that rank 0 does not make is refused: at once where both ranks make all such calls from one thread, so that calls
can be counted and compared; otherwise when rank 0 has asked for something else for some time, or for nothing for a
longer time (Timeouts of group.py). Not here: how the message travels (parallel.py), and when (loop.py).
"""

import json
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol

from glimmer.config import SamplingParams
from glimmer.engine.sequence import Constraint, Output, Request
from glimmer.errors import RequestError

log = logging.getLogger("glimmer")

MAX_HELD = 1 << 19  # outputs that a rank holds for callers that have not asked yet


class Client(Protocol):
    """Whoever asked. The engine's thread calls these methods: they must be short. What they raise ends their call."""

    def put(self, prompt: int, answer: int, output: Output) -> bool:
        """What a step brought to an answer of the prompt with that number. True if no more of it is wanted."""

    def after_step(self, new: int) -> None:
        """The step that brought `new` tokens to this client is over: wake whoever waits."""

    def end(self, error: BaseException) -> None:
        """Nothing more will come, for this reason: wake whoever waits."""


@dataclass(frozen=True)
class ParentRequest:
    """One prompt with params.n answers, a Request each.

    bad_words: as in Request, on rank 0. constraints: one for each answer, on rank 0; or none.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: str
    eos_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...] = ()
    constraints: tuple[Constraint, ...] = ()
    cache_salt: str = ""

    def child(self, answer: int) -> Request:
        """The request for one answer; only the first reports the prompt's log-probabilities."""
        params = self._further if answer > 0 else self.params
        id, seed = f"{self.id}.{answer}", f"{self.seed}.{answer}"
        return Request(id, self.prompt_token_ids, params, seed, self.eos_token_ids, self.bad_words, self.cache_salt)

    @cached_property
    def _further(self) -> SamplingParams:
        """Parameters of all answers but the first."""
        return self.params if self.params.prompt_logprobs is None else replace(self.params, prompt_logprobs=None)

    @cached_property
    def content(self) -> str:
        """Digest of what is asked: prompt and parameters."""
        return _digest([self.prompt_token_ids, _params_to_json(self.params)])


class Call:
    """Requests that one caller makes together, and the client that their answers go to.

    ordered  the caller makes such calls one after another: calls of two ranks can be compared by their numbers
    watches  the client wants after_step of every step, also of those that bring it nothing
    ended    nothing more will come, and the engine holds nothing of it
    opened   the engine's thread knows of it
    """

    def __init__(self, requests: Sequence[ParentRequest], client: Client, ordered: bool = False, watches: bool = False):
        self.requests, self.client, self.ordered, self.watches = list(requests), client, ordered, watches
        self.open = len(self.requests)  # requests that have not ended; changed by the engine's thread
        self.ended, self.opened = threading.Event(), False
        self.ordinal: int | None = None  # among the ordered calls of this rank, where these can be counted
        self.since = time.monotonic()

    @cached_property
    def digest(self) -> str:
        """Digest of what is asked, in whatever order."""
        return _digest(sorted(parent.content for parent in self.requests))

    def finish(self) -> None:
        """Nothing more will come."""
        self.ended.set()


@dataclass(frozen=True)
class Arrival:
    """A request of rank 0 begins.

    number, size, digest, ordinal: of its call; position: its number in the call; call: the call itself, on rank 0.
    """

    number: int
    size: int
    digest: str
    ordinal: int | None
    position: int
    parent: ParentRequest
    call: Call | None = None


@dataclass(frozen=True)
class Abort:
    """A request of rank 0, or one answer of it (REQUEST.ANSWER), ends for everybody."""

    id: str


@dataclass(frozen=True)
class Stop:
    """Rank 0 closes."""


Record = Arrival | Abort | Stop


def to_json(record: Record) -> list[Any]:
    """The record as JSON's types."""
    if isinstance(record, Abort):
        return ["abort", record.id]
    if isinstance(record, Stop):
        return ["stop"]
    q = record.parent
    parent = [q.id, q.prompt_token_ids, _params_to_json(q.params), q.seed, q.eos_token_ids, q.cache_salt]
    return ["arrival", record.number, record.size, record.digest, record.ordinal, record.position, parent]


def from_json(record: list[Any]) -> Record:
    """What to_json was given, without constraints."""
    kind, *fields = record
    if kind == "abort":
        return Abort(*fields)
    if kind == "stop":
        return Stop()
    number, size, digest, ordinal, position, (id, tokens, params, seed, eos, salt) = fields
    parent = ParentRequest(id, tuple(tokens), _params_from_json(params), seed, tuple(eos), cache_salt=salt)
    return Arrival(number, size, digest, ordinal, position, parent)


def _params_to_json(params: SamplingParams) -> dict[str, Any]:
    return asdict(params) | {"logit_bias": sorted((params.logit_bias or {}).items())}  # JSON has no such keys


def _params_from_json(params: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**params | {"logit_bias": dict(params["logit_bias"])})


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


class CallMatcher:
    """Calls of rank 0 as another rank sees them, and that rank's own calls. The engine's thread alone uses it.

    timeout: seconds that a call waits while rank 0 asks for nothing; mismatch: while it asks for something else.
    hold: whether outputs that nobody has asked for are kept; not where this rank has no callers of its own.
    """

    def __init__(self, rank: int, timeout: float = 1800.0, mismatch: float = 30.0):
        self.rank, self.timeout, self.mismatch, self.hold = rank, timeout, mismatch, True
        self.num_held = 0
        self._arriving: dict[int, RemoteCall] = {}  # by number: calls of which more requests may come
        self._unclaimed: list[RemoteCall] = []
        self._waiting: list[Call] = []

    @property
    def awaited(self) -> bool:
        """Whether anybody here waits for answers, or follows rank 0."""
        return bool(self._waiting) or (not self.hold and self.rank != 0)

    def arrive(self, arrival: Arrival) -> "RemoteCall":
        """The call that gets the outputs of this request of rank 0."""
        remote = self._arriving.get(arrival.number)
        if remote is None:
            remote = self._arriving[arrival.number] = RemoteCall(arrival, self)
            self._unclaimed.append(remote)
            call = next((call for call in self._waiting if call.digest == remote.digest), None)
            if call is not None:
                self._waiting.remove(call)
                self._bind(remote, call)
        remote.add(arrival)
        if len(remote.requests) == arrival.size:
            del self._arriving[arrival.number]
        for call in [call for call in self._waiting if call.ordinal == remote.ordinal is not None]:
            self._compare(call, remote)
        return remote

    def holds(self, call: Call) -> bool:
        """Whether rank 0 has made the same call, and nobody here has yet.

        Answers are held after rank 0 has closed, too, for a rank that is slower.
        """
        return any(told.digest == call.digest for told in self._unclaimed)

    def claim(self, call: Call) -> None:
        """A caller of this rank asks: it gets the answers that rank 0 has asked for, or waits for them."""
        for remote in self._unclaimed:
            if remote.digest == call.digest:
                return self._bind(remote, call)
        self._waiting.append(call)
        for remote in [remote for remote in self._unclaimed if call.ordinal == remote.ordinal is not None]:
            self._compare(call, remote)

    def withdraw(self, call: Call) -> None:
        """The caller does not want its answers any more. They are computed all the same, while rank 0 wants them."""
        if call in self._waiting:
            self._waiting.remove(call)
        call.client = Discard()
        call.ended.set()

    def refuse_overdue(self) -> None:
        """Refuse the calls that rank 0 does not seem to make."""
        now = time.monotonic()
        for call in list(self._waiting):
            others = [remote for remote in self._unclaimed if now - max(call.since, remote.since) > self.mismatch]
            if others:
                self._refuse(call, f"rank 0 asks for something else: {_shown(others[0].requests[0])}")
            elif now - call.since > self.timeout:
                self._refuse(call, f"rank 0 has not asked for it for {self.timeout:g} s")

    def end(self, error: BaseException) -> None:
        """No call that waits will be answered."""
        for call in self._waiting:
            notify_end(call.client, error)
            call.ended.set()
        self._waiting.clear()

    def release(self) -> None:
        """This rank has no callers: hold nothing for them."""
        self.hold = False
        while self._unclaimed:
            self.forget_oldest()

    def forget_oldest(self) -> None:
        """Let go of the outputs that have been held for longest."""
        self._unclaimed.pop(0).drop()

    def _bind(self, remote: "RemoteCall", call: Call) -> None:
        if remote in self._unclaimed:
            self._unclaimed.remove(remote)
        remote.bind(call)

    def _compare(self, call: Call, remote: "RemoteCall") -> None:
        """Refuse a call whose number among the ordered calls is `remote`'s, if they are known to differ."""
        if len(call.requests) != remote.size:
            return self._refuse(call, f"it has {len(call.requests)} prompts here, {remote.size} on rank 0")
        mine = Counter(parent.content for parent in call.requests)
        for position, parent in enumerate(remote.requests):
            if not mine[parent.content]:
                return self._refuse(call, f"prompt {position} of rank 0 is {_difference(parent, call.requests)}")
            mine[parent.content] -= 1

    def _refuse(self, call: Call, difference: str) -> None:
        self._waiting.remove(call)
        which = "a call" if call.ordinal is None else f"call {call.ordinal} of generate and chat"
        error = RequestError(
            "prompt",
            f"{which} on rank {self.rank} that rank 0 does not make: {difference}",
            "the same prompts with the same parameters on every rank, in whatever order",
            "make the same calls on every rank, or ask on rank 0 only and call follow() on the others",
        )
        notify_end(call.client, error)
        call.ended.set()


class RemoteCall(Call):
    """A call of rank 0 on another rank. Its client is a Buffer until a call of this rank is bound to it."""

    def __init__(self, arrival: Arrival, matcher: CallMatcher):
        super().__init__([], Buffer(matcher) if matcher.hold else Discard())
        self.size, self.open, self.ordinal = arrival.size, arrival.size, arrival.ordinal
        self.__dict__["digest"] = arrival.digest  # of all requests, which are still to come
        self._matcher = matcher
        self._bound: Call | None = None
        self._free: dict[str, deque[int]] = defaultdict(deque)  # by content: positions in the bound call, not yet taken
        self.positions: dict[int, int] = {}  # by rank 0's position: the position in the bound call

    def add(self, arrival: Arrival) -> None:
        """One more request; they arrive in rank 0's order."""
        self.requests.append(arrival.parent)
        if self._bound is not None:
            self.positions[arrival.position] = self._free[arrival.parent.content].popleft()

    def bind(self, call: Call) -> None:
        """Whoever made `call` gets the outputs: those that were held now, later ones as they come."""
        self._bound = call
        for position, parent in enumerate(call.requests):
            self._free[parent.content].append(position)
        for position, parent in enumerate(self.requests):
            self.positions[position] = self._free[parent.content].popleft()
        held, self.client, self.watches = self.client, Renumbered(self, call), call.watches
        if isinstance(held, Buffer):
            self._matcher.num_held -= len(held.outputs)
            try:
                held.replay(self.client)
            except BaseException as error:  # a callback's: its caller shall raise it
                client, call.client = call.client, Discard()
                notify_end(client, error)
        if self.ended.is_set():
            call.ended.set()

    def drop(self) -> None:
        """Nobody will ask for it."""
        if isinstance(self.client, Buffer):
            self._matcher.num_held -= len(self.client.outputs)
        self.client = Discard()

    def finish(self) -> None:
        """Nothing more will come."""
        self.ended.set()
        if self._bound is not None:
            self._bound.ended.set()


class Renumbered:
    """Client of a call of rank 0 that a call of this rank is bound to."""

    def __init__(self, remote: RemoteCall, call: Call):
        self._remote, self._call = remote, call

    def put(self, prompt: int, answer: int, output: Output) -> bool:
        return self._call.client.put(self._remote.positions[prompt], answer, output)

    def after_step(self, new: int) -> None:
        self._call.client.after_step(new)

    def end(self, error: BaseException) -> None:
        self._call.client.end(error)


class Buffer:
    """Client in place of one that has not asked yet."""

    def __init__(self, matcher: CallMatcher):
        self._matcher = matcher
        self.outputs: list[tuple[int, int, Output]] = []
        self.error: BaseException | None = None

    def put(self, prompt: int, answer: int, output: Output) -> bool:
        self.outputs.append((prompt, answer, output))
        self._matcher.num_held += 1
        if self._matcher.num_held > MAX_HELD:
            self._matcher.forget_oldest()
        return False

    def after_step(self, new: int) -> None:
        pass

    def end(self, error: BaseException) -> None:
        self.error = error

    def replay(self, client: Client) -> None:
        """Hand on what was held, as if one step had brought it."""
        for prompt, answer, output in self.outputs:
            client.put(prompt, answer, output)
        if self.error is not None:
            client.end(self.error)
        elif self.outputs:
            client.after_step(sum(len(output.token_ids) for _, _, output in self.outputs))


class Discard:
    """Client of a call whose answers nobody wants on this rank."""

    def put(self, prompt: int, answer: int, output: Output) -> bool:
        return True

    def after_step(self, new: int) -> None:
        pass

    def end(self, error: BaseException) -> None:
        pass


def notify_end(client: Client, error: BaseException) -> None:
    """Let a client know why nothing more will come, though the client itself may have failed."""
    try:
        client.end(error)
    except Exception as again:
        log.debug("a client cannot be told of the end", exc_info=again)


def _shown(parent: ParentRequest) -> str:
    """A prompt, in few words."""
    ids = ", ".join(map(str, parent.prompt_token_ids[:8])) + (", ..." if len(parent.prompt_token_ids) > 8 else "")
    return f"a prompt of {len(parent.prompt_token_ids)} tokens ({ids})"


def _difference(parent: ParentRequest, others: Sequence[ParentRequest]) -> str:
    """How rank 0's request differs from all of this rank's."""
    for other in others:
        if other.prompt_token_ids == parent.prompt_token_ids:
            theirs, ours = asdict(parent.params), asdict(other.params)
            name = next((name for name in ours if ours[name] != theirs[name]), "n")
            return f"asked with {name}={theirs[name]!r}, here with {name}={ours[name]!r}"
    return f"{_shown(parent)}, which is not among those here"
