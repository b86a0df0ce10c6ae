"""Answer: one answer on its way from the engine's tokens to what a client is told: text, thoughts, calls, logprobs.

Text is made, and stop strings are found, as tokens come; what they mean is read when somebody asks for the news, so
that a client that does not read costs nothing. Not here: who asks (service.py), and how the pieces look in an API.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from glimmer.config import SamplingParams
from glimmer.server import wire
from glimmer.text import parse
from glimmer.text.incremental import IncrementalText
from glimmer.text.tokenizer import Tokenizer

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Logprob:
    """A token with the log-probability that it had, its rank, and its bytes."""

    token_id: int
    bytes: bytes
    logprob: float
    rank: int

    @property
    def text(self) -> str:
        """The token's bytes as text."""
        return self.bytes.decode(errors="replace")


Place = Sequence[Logprob]  # the token that came, and then the likeliest ones that could have come in its place


@dataclass(frozen=True)
class Delta:
    """What is new of answer `index`: its text as the model wrote it, and what it means.

    events: of a conversation; of a raw prompt there are none. num_tokens, num_reasoning_tokens: of the answer so far.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    events: Sequence[parse.Event] = ()
    logprobs: Sequence[Place] = ()
    prompt_logprobs: Sequence[Place] = ()  # of each token of the prompt but the first, in their order
    num_tokens: int = 0
    num_reasoning_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """Answer `index` has ended. stop_reason: the stop string or id of the request that ended it, if one did."""

    index: int
    reason: Reason
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Thoughts:
    """How the tokens of thoughts are told from others: they are between these two."""

    open: int | None
    close: int | None


class Answer:
    """One answer. done: nothing more of the engine is wanted. stopped: a stop string ended it.

    parser: reads what the text means; none for a raw prompt. thinking: the prompt has opened the thoughts.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        parser: parse.AnswerParser | None = None,
        thoughts: Thoughts | None = None,
        thinking: bool = False,
    ):
        self._index, self._params, self._tokenizer = index, params, tokenizer
        self._parser, self._thoughts, self._thinking = parser, thoughts, thinking
        self._text = IncrementalText(
            tokenizer,
            tuple(params.stop or ()),
            params.include_stop_str_in_output,
            params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        self.done = self.stopped = False
        self.num_tokens = self.num_reasoning_tokens = 0
        self.last = 0.0  # when the last token came, as whoever hands them over counts
        self.finished: Finished | None = None
        self._finish: Finished | None = None  # it is told after the last news
        self._calls = False
        self._new_text: list[str] = []
        self._new_ids: list[int] = []
        self._new_logprobs: list[list[wire.Logprob]] = []
        self._prompt, self._prompt_at = prompt_token_ids, 1  # the token whose log-probability comes next
        self._new_prompt_logprobs: list[list[wire.Logprob]] = []

    def take(self, delta: wire.TokenDelta) -> bool:
        """Add what a step brought; whether it was the end. What follows a stop string is not taken."""
        self._new_prompt_logprobs += delta.prompt_logprobs
        token_ids, finish = delta.token_ids, delta.finish_reason
        shown, reason = token_ids, None
        if finish == "stop" and token_ids:
            if token_ids[-1] in (self._params.stop_token_ids or ()):
                reason = token_ids[-1]
            if not self._params.include_stop_str_in_output:
                shown = shown[:-1]  # the id that ends an answer is counted, but not shown
        before = self._text.used
        self._new_text.append(self._text.push(shown))
        if finish is not None and self._text.stopped is None:
            self._new_text.append(self._text.finish())
        if self._text.stopped is not None:
            self.stopped = finish is None
            self._end("stop", self._text.stopped)
            token_ids = token_ids[: self._text.used - before] if self._text.used - before < len(shown) else token_ids
        elif finish is not None:
            self._end("length" if finish == "length" else "stop", reason)
        self.num_tokens += len(token_ids)
        self._count_thoughts(token_ids)
        self._new_ids += token_ids
        self._new_logprobs += delta.logprobs[: len(token_ids)]
        return self.done

    def _end(self, reason: Reason, stop_reason: str | int | None) -> None:
        self.done = True
        self._finish = Finished(self._index, reason, stop_reason)

    def _count_thoughts(self, token_ids: Sequence[int]) -> None:
        if self._thoughts is None:
            return
        for id in token_ids:
            if id == self._thoughts.close:
                self._thinking = False
            elif id == self._thoughts.open:
                self._thinking = True
            elif self._thinking:
                self.num_reasoning_tokens += 1

    @property
    def reason(self) -> str:
        """Why it has ended, as far as the tokens tell."""
        return self._finish.reason if self._finish is not None else ""

    def news(self) -> Delta | None:
        """What has come since the last call, if anything has. After the last news, `finished` says how it has ended."""
        text, ids = "".join(self._new_text), self._new_ids
        places = [self._place(place) for place in self._new_logprobs]
        self._new_text, self._new_ids, self._new_logprobs = [], [], []
        events: list[parse.Event] = []
        if self._parser is not None and self.finished is None:
            events += self._parser.push(text)
            if self._finish is not None:
                by_itself = self._finish.reason == "stop" and not isinstance(self._finish.stop_reason, str)
                events += self._parser.finish(stopped=by_itself)
            self._calls |= any(isinstance(event, parse.ToolCallEnd) for event in events)
        if self._finish is not None:
            calls = self._calls and self._finish.reason == "stop"
            self.finished = replace(self._finish, reason="tool_calls") if calls else self._finish
        prompt = self._take_prompt()
        if not (text or ids or events or prompt):
            return None
        return Delta(self._index, text, ids, events, places, prompt, self.num_tokens, self.num_reasoning_tokens)

    def _take_prompt(self) -> list[Place]:
        """The log-probabilities of the prompt that are new."""
        places = []
        for place in self._new_prompt_logprobs:
            own = self._prompt[self._prompt_at]
            places.append(self._place(sorted(place, key=lambda one: one.token_id != own)))
            self._prompt_at += 1
        self._new_prompt_logprobs = []
        return places

    def _place(self, place: list[wire.Logprob]) -> Place:
        known = [one for one in place if one.token_id < self._tokenizer.size]  # the vocabulary may be padded beyond
        return [
            Logprob(one.token_id, self._tokenizer.token_bytes(one.token_id), one.logprob, one.rank) for one in known
        ]
