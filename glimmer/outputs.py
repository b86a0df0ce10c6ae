"""What a call returns, and how it is made of what the engine brings: Reader, the client of one call (engine/loop.py).

Text, stop strings, log-probabilities with their texts. Not here: prompts, and who waits for what (llm.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from glimmer.config import SamplingParams
from glimmer.engine.sequence import FinishReason, Logprob, Output
from glimmer.errors import EngineError, GlimmerError
from glimmer.text.incremental import IncrementalText
from glimmer.text.tokenizer import Tokenizer


@dataclass
class CompletionOutput:
    """One answer. finish_reason: "stop", "length", "abort" or "error"; stop_reason: the stop string or id, or None.

    cumulative_logprob: the sum of the tokens' log-probabilities, where logprobs were asked for.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None

    def finished(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When a request came, when its first token did, and when its last answer ended: seconds since the epoch."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """A prompt and its answers. error: why there are none, or why one stopped early; else None.

    prompt_logprobs[0] is None (nothing predicts the first token), as in vLLM. num_cached_tokens: how many tokens of the
    prompt were found in the cache, when its first answer began.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: GlimmerError | None = None
    request_id: str = ""
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more is added to it."""
        return all(output.finished() for output in self.outputs)


@dataclass(frozen=True)
class Delta:
    """What one step added to answer `index` of a stream; the last one carries the finish_reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


Event = int | Delta | BaseException  # a prompt is done; a piece of an answer; nothing more comes


class Reader:
    """The client of one call: makes answers and pieces of what the engine's thread brings, and wakes whoever waits.

    deliver: gets the events of a step. piecewise: pieces are events; otherwise a prompt, by its number, when all of its
    answers are done.
    """

    def __init__(
        self,
        asked: list[tuple[RequestOutput, SamplingParams]],
        tokenizer: Tokenizer | None,
        deliver: Callable[[list[Event]], object],
        piecewise: bool = False,
        on_step: Callable[[int], None] | None = None,
    ):
        self._deliver, self._piecewise, self._on_step = deliver, piecewise, on_step
        self._answers = [
            [Answer(output, index, params, tokenizer, piecewise) for index in range(params.n)]
            for output, params in asked
        ]
        self._left = [len(answers) for answers in self._answers]
        self._new: list[Event] = []

    def put(self, prompt: int, answer: int, output: Output) -> bool:
        """As Client.put."""
        one = self._answers[prompt][answer]
        if one.done():
            return True
        piece = one.take(output)
        if self._piecewise and piece is not None:
            self._new.append(piece)
        if one.done():
            self._left[prompt] -= 1
            if self._left[prompt] == 0 and not self._piecewise:
                self._new.append(prompt)
        return one.done()

    def after_step(self, new: int) -> None:
        """As Client.after_step."""
        if self._on_step is not None:
            self._on_step(new)
        if self._new:
            events, self._new = self._new, []
            self._deliver(events)

    def end(self, error: BaseException) -> None:
        """As Client.end."""
        self._deliver([error])

    def complete(self, prompt: int) -> None:
        """Make what is still missing of a prompt's output. Called by whoever waited for it: it may take a while."""
        for answer in self._answers[prompt]:
            answer.complete()


class Answer:
    """One answer on its way from token ids to text.

    Text is made at once where it is needed at once: for pieces, and to find stop strings. Otherwise at the end.
    """

    def __init__(
        self,
        output: RequestOutput,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        piecewise: bool,
    ):
        self.output, self.params, self.tokenizer = output, params, tokenizer
        self.completion = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
        output.outputs.append(self.completion)
        if index == 0 and params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        self._at_once = piecewise or bool(params.stop)
        self._unread: list[int] = []  # ids that are not in the text yet
        self._text: IncrementalText | NoText | None = None

    def done(self) -> bool:
        """Nothing more is added to it."""
        return self.completion.finish_reason is not None

    def take(self, output: Output) -> Delta | None:
        """Add what a step brought; the piece that it makes, if any. What follows a stop string is not taken."""
        completion, finish, token_ids = self.completion, output.finish_reason, output.token_ids
        if self.output.num_cached_tokens is None and completion.index == 0:
            self.output.num_cached_tokens = output.num_cached_tokens
        if self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs += output.prompt_logprobs
        shown = token_ids
        if finish is FinishReason.STOP:
            if shown[-1] in (self.params.stop_token_ids or ()):
                completion.stop_reason = shown[-1]
            if not self.params.include_stop_str_in_output:
                shown = shown[:-1]  # the id that ends an answer is counted, but not shown
        self._unread += shown
        text = ""
        if self._at_once:
            before = self.text.used
            text = self._read(final=finish is not None)
            if self.text.stopped is not None:
                finish, completion.stop_reason = FinishReason.STOP, self.text.stopped
                if self.text.used - before < len(shown):
                    token_ids = token_ids[: self.text.used - before]
        completion.token_ids += token_ids
        if completion.logprobs is not None:
            completion.logprobs += output.logprobs[: len(token_ids)]
        if output.problem is not None:
            self.output.error = EngineError(
                f"answer {completion.index} stopped after {len(completion.token_ids)} tokens: {output.problem.found}",
                output.problem.expected,
                output.problem.todo,
            )
        completion.finish_reason = None if finish is None else finish.value
        if (metrics := self.output.metrics) is not None:
            if token_ids and metrics.first_token_time is None:
                metrics.first_token_time = time.time()
            if finish is not None:
                metrics.finished_time = time.time()
        if not token_ids and finish is None:
            return None
        return Delta(completion.index, text, token_ids, completion.finish_reason, completion.stop_reason)

    def complete(self) -> None:
        """Text and log-probabilities of an answer that is done."""
        completion = self.completion
        if not self._at_once:
            self._read(final=True)
        completion.text = self.text.text
        if completion.logprobs is not None:
            chosen = zip(completion.token_ids, completion.logprobs)
            completion.cumulative_logprob = sum(place[id].logprob for id, place in chosen)
            completion.logprobs = [self._decoded(place) for place in completion.logprobs]
        if completion.index == 0 and self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs = [place and self._decoded(place) for place in self.output.prompt_logprobs]

    @property
    def text(self) -> "IncrementalText | NoText":
        """The text so far. Made when it is first needed: of many answers most have not begun."""
        if self._text is None:
            self._text = (
                NoText()
                if self.tokenizer is None or not self.params.detokenize
                else IncrementalText(
                    self.tokenizer,
                    tuple(self.params.stop or ()),
                    self.params.include_stop_str_in_output,
                    self.params.skip_special_tokens,
                    min_tokens=self.params.min_tokens,
                )
            )
        return self._text

    def _read(self, final: bool) -> str:
        """Make text of the ids that are not in it yet."""
        unread, self._unread = self._unread, []
        text = self.text.push(unread)
        if final and self.text.stopped is None:
            text += self.text.finish()
        return text

    def _decoded(self, place: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None or not self.params.detokenize:
            return place
        known = [id for id in place if id < self.tokenizer.size]  # the vocabulary may be padded beyond
        text = {id: self.tokenizer.decode([id], skip_special_tokens=False) for id in known}
        return {id: replace(found, decoded_token=text.get(id, "")) for id, found in place.items()}


class NoText:
    """In place of an IncrementalText where no text is wanted, or there is no tokenizer: an answer of ids only."""

    text, stopped, used = "", None, 0

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""
