"""AnswerConstraint: which tokens may come next, so that an answer has the form that was asked for.

An answer passes through phases, and some tokens lead from one to the next:

    Free       any text, such as reasoning: all tokens but a few
    Fixed      one of a few tokens, such as the tags of a call
    FixedText  one of a few texts: the name of a tool, a key
    Text       what a grammar of the library (llguidance) describes: the content, a value

All added tokens are special for the library, so that no grammar produces a tag by chance, and a tag always ends what
stands before it. A tag can also be spelt out of ordinary tokens, and whoever reads the text could not tell it from the
token: tokens that would complete one (Spelling) are left out where the tag has a meaning.

The library computes a mask in some thirty microseconds, and releases the interpreter meanwhile. It begins as soon as
the token before is known, in a thread of its own, while the model computes; `mask` takes the result. Which token comes
does not depend on that. Not here: which phases there are (grammar.py), and what the grammars say (forms.py, tools.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from llguidance import LLMatcher

from glimmer.errors import EngineError, RequestError

MASK_SECONDS = 2.0  # that an answer may wait for one mask; the library's own limits end it about then
WRONG_TOKEN = "doesn't satisfy the grammar"  # said by the library of a token that the mask forbids; all else are limits
_threads = ThreadPoolExecutor(2, "glimmer-masks")

Next = Callable[[], "Phase"]


class TooComplex(EngineError):
    """A grammar that the library cannot follow within its limits: no failure of the engine's, but of what was asked."""


class Phase(Protocol):
    """A part of an answer."""

    def mask(self) -> bytes | bytearray | None:
        """Which tokens may come next, as engine/sequence.py:Constraint says it."""

    def accept(self, token: int) -> "Phase":
        """The phase after this token; this very object if the token belongs to it."""

    def undo(self) -> None:
        """Forget the last token that belongs to this phase."""


class AnswerConstraint:
    """The constraint of one answer, from its first phase on. field: the parameter that asks for it, for errors."""

    def __init__(self, phase: Phase, field: str):
        self._phase, self._field = phase, field
        self._before: list[Phase] = []  # the phase before each token of the answer
        self._problem: Exception | None = None

    def mask(self) -> bytes | bytearray | None:
        """As engine/sequence.py:Constraint. Raises EngineError, also for what went wrong in accept.

        RequestError if a grammar turns out to be beyond the library's limits, which only following it may show.
        """
        try:
            if self._problem is not None:
                raise self._problem
            return self._phase.mask()
        except TooComplex as error:
            raise RequestError(self._field, error.found, error.expected, error.todo) from error

    def accept(self, token: int) -> None:
        """The answer has one more token."""
        phase = self._phase
        try:
            self._phase = phase.accept(token)
        except Exception as problem:
            self._problem = problem
        self._before.append(phase)

    def rollback(self, count: int) -> None:
        """Undo the last `count` calls of accept."""
        for _ in range(count):
            phase = self._before.pop()
            if self._problem is None and phase is self._phase:
                phase.undo()
            self._phase, self._problem = phase, None


class Following(NamedTuple):
    """What may follow a text of a grammar: tokens (of the end-of-sequence ids, any), and its end if it is complete."""

    bits: bytes
    complete: bool


class Beginning(NamedTuple):
    """A grammar before its first token. The matcher must be copied."""

    matcher: LLMatcher
    first: Following


def compute(matcher: LLMatcher) -> Following:
    """What may follow; EngineError if the library cannot tell."""
    with contained():
        following = Following(matcher.compute_bitmask(), matcher.is_accepting())
        if matcher.is_error():
            raise _problem(matcher)
        return following


class Vocabulary:
    """The tokens as sets of ids, and by the bytes that they stand for. No two ordinary tokens stand for the same.

    tokens: the bytes of each id below `size`; none for ids that are no ordinary text (added tokens, gaps).
    """

    def __init__(self, size: int, tokens: Iterable[bytes], eos_token_ids: Iterable[int]):
        self.size, self.tokens = size, list(tokens)
        self.eos_token_ids = tuple(id for id in eos_token_ids if id < size)
        self.num_bytes = (size + 7) // 8
        beyond = range(size, 8 * self.num_bytes)
        self.not_of_grammars = (*self.eos_token_ids, *beyond)  # the library's bits for them say nothing
        self._all = bytearray(b"\xff" * self.num_bytes)
        _clear(self._all, beyond)
        self.ids = {token: id for id, token in enumerate(self.tokens) if token}

    def all_but(self, ids: Iterable[int]) -> bytearray:
        """The set of all tokens without these."""
        bits = bytearray(self._all)
        _clear(bits, ids)
        return bits

    def only(self, ids: Iterable[int]) -> bytearray:
        """The set of these tokens."""
        bits = bytearray(self.num_bytes)
        _set(bits, ids)
        return bits

    def beginning(self, text: bytes) -> list[int]:
        """The tokens that begin with this text."""
        return [id for token, id in self.ids.items() if token.startswith(text)]

    def containing(self, text: bytes) -> list[int]:
        """The tokens that hold this text."""
        return [id for token, id in self.ids.items() if text in token]


class Spelling:
    """Tags that must not be spelt out of ordinary tokens. Each begins with its only "<"."""

    def __init__(self, vocabulary: Vocabulary, tags: Iterable[str]):
        self._vocabulary, self._tags = vocabulary, [tag.encode() for tag in tags]
        self._whole = [id for tag in self._tags for id in vocabulary.containing(tag)]
        self._known: dict[bytes, list[int]] = {}

    def begun(self, before: bytes, token: int) -> bytes:
        """The beginning of a tag at the end of a text; `before`: the same before this token."""
        text = before + self._vocabulary.tokens[token]
        start = text.rfind(b"<")
        return text[start:] if start >= 0 and any(tag.startswith(text[start:]) for tag in self._tags) else b""

    def completing(self, begun: bytes) -> list[int]:
        """The tokens that complete a tag after this beginning."""
        if begun not in self._known:
            rests = {tag[len(begun) :] for tag in self._tags if begun and tag.startswith(begun)}
            self._known[begun] = self._whole + [id for rest in rests for id in self._vocabulary.beginning(rest)]
        return self._known[begun]


class Free:
    """Any text.

    exits      tokens that end it; opening: those that do so before anything but white space has come
    forbidden  tokens, and spelling: tags, that must not come
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        exits: Mapping[int, Next],
        forbidden: Iterable[int],
        spelling: Spelling,
        opening: Mapping[int, Next] | None = None,
    ):
        self._vocabulary, self._exits, self._spelling = vocabulary, exits, spelling
        self._forbidden = tuple(forbidden)
        self._bits = vocabulary.all_but(self._forbidden) if self._forbidden else None
        self._begun = [b""]  # the beginning of a tag, after each token
        self._opening = opening or {}
        self._white = 0  # how many tokens of white space it begins with

    def mask(self) -> bytearray | None:
        completing = self._spelling.completing(self._begun[-1])
        return self._vocabulary.all_but((*self._forbidden, *completing)) if completing else self._bits

    def accept(self, token: int) -> Phase:
        fresh = self._white == len(self._begun) - 1
        exits = {**self._exits, **self._opening} if fresh else self._exits
        if token in exits:
            return exits[token]()
        self._white += fresh and self._vocabulary.tokens[token].isspace()
        self._begun.append(self._spelling.begun(self._begun[-1], token))
        return self

    def undo(self) -> None:
        self._begun.pop()
        self._white = min(self._white, len(self._begun) - 1)


class Fixed:
    """One of a few tokens."""

    def __init__(self, vocabulary: Vocabulary, exits: Mapping[int, Next]):
        self._bits, self._exits = vocabulary.only(exits), exits

    def mask(self) -> bytearray:
        return self._bits

    def accept(self, token: int) -> Phase:
        return self._exits[token]()

    def undo(self) -> None:
        raise AssertionError("no token belongs to this phase")


class FixedText:
    """One of a few texts; `exits`: for each, the tokens that may follow it."""

    def __init__(self, vocabulary: Vocabulary, exits: Mapping[bytes, Mapping[int, Next]]):
        self._vocabulary, self._exits = vocabulary, exits
        self._begun = [b""]  # what has come, after each token

    def mask(self) -> bytearray:
        begun, ids = self._begun[-1], self._vocabulary.ids
        allowed = self._vocabulary.only(self._exits.get(begun, ()))
        for text in self._exits:
            if text.startswith(begun):
                ends = range(len(begun) + 1, len(text) + 1)
                _set(allowed, [ids[text[len(begun) : end]] for end in ends if text[len(begun) : end] in ids])
        return allowed

    def accept(self, token: int) -> Phase:
        exits = self._exits.get(self._begun[-1], {})
        if token in exits:
            return exits[token]()
        self._begun.append(self._begun[-1] + self._vocabulary.tokens[token])
        return self

    def undo(self) -> None:
        self._begun.pop()


class Text:
    """What a grammar describes.

    beginning  of that grammar
    exits    tokens that may follow where the grammar's text is complete, given what reads the text
    opening  tokens that lead elsewhere before the text has begun
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        beginning: Beginning,
        exits: Callable[[Callable[[], bytes]], Mapping[int, Next]],
        spelling: Spelling | None = None,
        opening: Mapping[int, Next] | None = None,
    ):
        self._vocabulary, self._exits, self._spelling = vocabulary, exits, spelling
        self._matcher, self._first = beginning.matcher.deep_copy(), beginning.first
        self._opening = opening or {}
        self._tokens: list[int] = []
        self._begun = [b""]
        self._result: Future[Following] | None = None  # while it is computed, nobody else may use the matcher

    def mask(self) -> bytearray:
        following = self._take() if self._tokens else self._first
        allowed = bytearray(following.bits[: self._vocabulary.num_bytes])
        _clear(allowed, self._vocabulary.not_of_grammars)
        if self._spelling is not None:
            _clear(allowed, self._spelling.completing(self._begun[-1]))
        if following.complete:
            _set(allowed, self._exits(self._text))
        if not self._tokens:
            _set(allowed, self._opening)
        return allowed

    def accept(self, token: int) -> Phase:
        self._wait()
        if not self._tokens and token in self._opening:
            return self._opening[token]()
        exits = self._exits(self._text)
        if token in exits:
            return exits[token]()
        with contained():
            if not self._matcher.consume_token(token):
                raise _problem(self._matcher)
        self._tokens.append(token)
        if self._spelling is not None:
            self._begun.append(self._spelling.begun(self._begun[-1], token))
        self._result = _threads.submit(compute, self._matcher)
        return self

    def undo(self) -> None:
        self._wait()
        with contained():
            self._matcher.rollback(1)
        self._tokens.pop()
        if self._spelling is not None:
            self._begun.pop()

    def _text(self) -> bytes:
        return b"".join(self._vocabulary.tokens[token] for token in self._tokens)

    def _wait(self) -> None:
        """Wait until nobody uses the matcher."""
        if self._result is not None and not self._result.cancel():
            self._result.exception(MASK_SECONDS)
        self._result = None

    def _take(self) -> Following:
        if self._result is None or self._result.cancel():  # it has not begun: other answers' masks take long
            self._result = None
            return compute(self._matcher)
        try:
            return self._result.result(MASK_SECONDS)
        except TimeoutError:
            raise TooComplex(
                f"a grammar's next tokens were not known after {MASK_SECONDS:g} s",
                "a grammar that is simple enough",
                "ask for a simpler schema, expression or grammar",
            ) from None


@contextmanager
def contained() -> Iterator[None]:
    """A panic of the library's Rust code, which is no Exception, becomes a TooComplex."""
    try:
        yield
    except Exception:
        raise
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise TooComplex(
            f"the library of grammars failed: {problem}"[:300],
            "a grammar that it can follow",
            "ask for a simpler schema, expression or grammar",
        ) from problem


def _problem(matcher: LLMatcher) -> EngineError:
    reason = matcher.get_error().partition("\n")[0][:300]
    kind = EngineError if WRONG_TOKEN in reason else TooComplex
    return kind(
        f"a grammar could not be followed: {reason}",
        "a grammar within the limits of its library",
        "ask for a simpler schema, expression or grammar",
    )


def _set(bits: bytearray, ids: Iterable[int]) -> None:
    for id in ids:
        bits[id >> 3] |= 1 << (id & 7)


def _clear(bits: bytearray, ids: Iterable[int]) -> None:
    for id in ids:
        bits[id >> 3] &= ~(1 << (id & 7)) & 0xFF
