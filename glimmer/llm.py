"""LLM: text in, text out, in this process; under torchrun the same program on every rank.

It joins what the lower floors keep apart: tokenizer and chat template in front of the engine, detokenizer and stop
strings behind it. Any number of prompts run at once; `generate` waits for all of them, `stream` and `astream` hand on
each piece as it comes. Not here: HTTP, argument parsing, tool calls (the text is returned as the model wrote it).
"""

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glimmer import device as devices
from glimmer import parallel
from glimmer.config import EngineConfig, ModelConfig, SamplingParams, generation_defaults
from glimmer.engine.engine import Engine
from glimmer.engine.profile import Profile
from glimmer.engine.runner import Runner
from glimmer.engine.sequence import FinishReason, Logprob, Output, Request
from glimmer.errors import CheckpointError, ConfigError, EngineError, GlimmerError, RequestError
from glimmer.parallel import Group
from glimmer.text.chat import ChatTemplate
from glimmer.text.incremental import IncrementalText
from glimmer.text.tokenizer import Tokenizer

log = logging.getLogger("glimmer")
Prompt = str | Mapping[str, Any]
OnLoad = Callable[[int, int], None]


@dataclass
class CompletionOutput:
    """One answer. finish_reason: "stop", "length", "abort" or "error"; stop_reason: the stop string or id, or None."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """A prompt and its answers. error: why there are none, or why one stopped early; else None.

    prompt_logprobs[0] is None (nothing predicts the first token), as in vLLM.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: GlimmerError | None = None


@dataclass(frozen=True)
class Delta:
    """What one step added to answer `index` of a stream; the last one carries the finish_reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class LLM:
    """A model, ready to answer.

    model: a Hugging Face directory. The other parameters are EngineConfig's fields (config.py). on_load(done, total)
    is called with bytes while weights are read. group: what `join` gave, where somebody has called it. Under torchrun,
    tensor_parallel_size must be the number of processes, every rank makes the same calls in the same order, and every
    rank gets the same answers.

    Raises ConfigError, CheckpointError or NotEnoughMemory before weights are read; EngineError if a rank never joins.
    """

    def __init__(self, model: str, *, on_load: OnLoad | None = None, group: Group | None = None, **settings: Any):
        self.config = EngineConfig(model=str(model), **settings)
        self.model_config = ModelConfig.load(self.config.model)
        self.tokenizer = None if self.config.skip_tokenizer_init else Tokenizer.load(self.config.model)
        self.chat_template = ChatTemplate.load(self.config.model)
        self._defaults, eos = generation_defaults(self.config.model)
        self.eos_token_ids = eos or self.model_config.eos_token_id
        vocab_size = self.model_config.vocab_size
        sampling_vocab_size = self.tokenizer.size if self.tokenizer else vocab_size
        if sampling_vocab_size > vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids up to {sampling_vocab_size - 1}, the model's vocab_size is {vocab_size}",
                "a tokenizer whose ids the model knows",
                "use the tokenizer.json and config.json of one checkpoint",
            )
        self.group = group or join(self.config)
        device = self.group.device
        self._runner = Runner(self.config, self.model_config, self.group, device, on_load)
        self._engine = Engine(self.config, self._runner, self.group, vocab_size, sampling_vocab_size)
        self._open: dict[str, _Answer] = {}
        self._numbers = itertools.count()
        self._inbox: deque[Callable[[], None]] = deque()  # what coroutines ask of the engine's thread
        self._pump: threading.Thread | None = None
        self._guard = threading.Lock()
        log.info(
            "%s on %s x %d: context %d tokens, cache %d blocks of %d",
            self.config.model,
            device,
            self.group.size,
            self.max_model_len,
            self._runner.kv_cache_config.num_blocks,
            self.config.block_size,
        )

    @property
    def rank(self) -> int:
        """This process's number in the group; 0 when alone."""
        return self.group.rank

    @property
    def size(self) -> int:
        """Processes that share the model."""
        return self.group.size

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_model_len

    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams as the checkpoint's generation_config.json recommends them."""
        return SamplingParams(**self._defaults)

    def peak_memory(self) -> int:
        """The most bytes that this process has held on its device."""
        return devices.peak_memory(self._runner.device)

    def limits(self) -> dict[str, float] | None:
        """What this machine can do at best, measured now: see Ops.limits."""
        return self._runner.ops.limits()

    @property
    def kernels(self) -> str | None:
        """The instruction set of the CPU kernels, or None: see Ops.kernels."""
        return self._runner.ops.kernels

    def profile(self) -> Profile:
        """`with llm.profile() as profile:` where the time of the steps in between goes: see engine/profile.py."""
        return Profile(self._engine)

    def close(self) -> None:
        """Leave the group of processes in good order."""
        self.group.close()

    # ------------------------------------------------------------------ all at once

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: str = "raise",
        on_finish: Callable[[int, RequestOutput], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt (text, or {"prompt_token_ids": [...]}); the outputs are in the prompts' order.

        errors: "raise" refuses all if one prompt cannot be served, before anything is computed; "return" answers the
        others and reports it in its own output. An answer that fails on the way ends with finish_reason "error" in
        either case. on_finish(index, output) as each prompt is done, on_step(new tokens) after each step.
        """
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        return self._all("prompt", prompts, lambda prompt: prompt, sampling_params, errors, on_finish, on_step)

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        errors: str = "raise",
        on_finish: Callable[[int, RequestOutput], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the checkpoint's chat template; the rest as `generate`."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = list(messages) if several else [messages]
        render = lambda conversation: self.render(conversation, tools, chat_template_kwargs)
        return self._all("conversation", conversations, render, sampling_params, errors, on_finish, on_step)

    def _all(
        self,
        word: str,
        asked: list[Any],
        prompt_of: Callable[[Any], Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        errors: str,
        on_finish: Callable[[int, RequestOutput], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> list[RequestOutput]:
        """`generate` for whatever prompt_of makes a prompt of; `word` is what an error calls it."""
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors={errors!r}", "'raise' or 'return'", "choose one of these")
        params = self._params(sampling_params, len(asked), word)
        outputs: list[RequestOutput] = []
        for i, one in enumerate(asked):
            try:
                outputs.append(self._checked(prompt_of(one), params[i]))
            except RequestError as error:
                if errors == "raise":
                    raise RequestError(
                        error.field,
                        f"{word} {i}: {error.found}" if len(asked) > 1 else error.found,
                        error.expected,
                        error.todo,
                    ) from None
                outputs.append(RequestOutput(one if isinstance(one, str) else None, [], error=error))
        pending: dict[int, list[_Answer]] = {}
        try:
            for i, output in enumerate(outputs):
                if output.error is None:
                    pending[i] = self._start(output, params[i])
                elif on_finish is not None:
                    on_finish(i, output)
            while pending:
                new = self._advance()
                if on_step is not None:
                    on_step(new)
                for i in [i for i, answers in pending.items() if all(a.done for a in answers)]:
                    del pending[i]
                    if on_finish is not None:
                        on_finish(i, outputs[i])
        finally:
            for answer in itertools.chain.from_iterable(pending.values()):
                self._abort(answer)
        return outputs

    def render(
        self, messages: Sequence[dict], tools: Sequence[dict] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A conversation as the prompt {"prompt", "prompt_token_ids"} that `generate` and `stream` take."""
        kwargs = dict(kwargs or {})
        if own := sorted({"messages", "tools"} & set(kwargs)):
            raise RequestError(
                "chat_template_kwargs",
                f"{own} among chat_template_kwargs",
                "variables of the template's own, such as enable_thinking",
                "pass messages and tools as arguments",
            )
        text = self.chat_template.render(messages, tools=tools, **kwargs)
        return {"prompt": text, "prompt_token_ids": self._encode(text, add_special_tokens=False)}

    # ------------------------------------------------------------------ piece by piece

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Pieces of the answer (or of the n answers) as they come. Closing the iterator aborts what is left.

        The request is queued when the first piece is asked for. Several streams may be read in turn; each step advances
        all of them. Raises RequestError at once, and whatever stopped an answer after its last piece.
        """
        params = self._params(sampling_params, 1)[0]
        output = self._checked(prompt, params)
        return self._stream(output, params)

    def _stream(self, output: RequestOutput, params: SamplingParams) -> Iterator[Delta]:
        answers = self._start(output, params)  # here: an iterator that nobody ever reads has nothing to abort
        try:
            while not all(a.done and not a.pieces for a in answers):
                for answer in answers:
                    while answer.pieces:
                        yield answer.pieces.popleft()
                if not all(a.done for a in answers):
                    self._advance()
            if output.error is not None:
                raise output.error
        finally:
            for answer in answers:
                self._abort(answer)

    async def astream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncIterator[Delta]:
        """`stream` for asyncio: any number of coroutines, computed together by one thread beside the event loop.

        Cancelling a coroutine aborts its request. `generate` and `stream` wait until every coroutine has its answer.
        """
        if self.size > 1:
            raise ConfigError(
                f"astream in a group of {self.size} processes",
                "one process: coroutines arrive at different times on different ranks",
                "use generate or stream, which every rank calls alike",
            )
        params = self._params(sampling_params, 1)[0]
        output = self._checked(prompt, params)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(item: Delta | Exception) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, item)
            except RuntimeError:
                log.debug("an event loop was closed while an answer was on its way")

        answers: list[_Answer] = []
        self._ask(lambda: answers.extend(self._start(output, params, deliver)))
        try:
            left = params.n
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                left -= item.finish_reason is not None
                yield item
            if output.error is not None:
                raise output.error
        finally:
            self._ask(lambda: [self._abort(answer) for answer in answers])

    def _ask(self, what: Callable[[], None]) -> None:
        """Have the engine's thread do something before its next step; start the thread if none is running."""
        with self._guard:
            self._inbox.append(what)
            if self._pump is None:
                self._pump = threading.Thread(target=self._run, name="glimmer-engine", daemon=True)
                self._pump.start()

    def _run(self) -> None:
        """The engine's thread: ends when no coroutine waits for anything."""
        while True:
            with self._guard:
                if not self._inbox and not any(answer.awaited for answer in self._open.values()):
                    self._pump = None
                    return
            try:
                while self._inbox:
                    self._inbox.popleft()()
                if self._open:
                    self._advance()
            except Exception as error:  # whatever it is, the coroutines must hear of it: nobody else will
                for answer in [answer for answer in self._open.values() if answer.awaited]:
                    self._abort(answer)
                    answer.deliver(error)

    def _alone(self) -> None:
        """Only one thread at a time may use the engine: let the one that serves the coroutines come to its end."""
        with self._guard:
            pump = self._pump
        if pump not in (None, threading.current_thread()):
            pump.join()

    # ------------------------------------------------------------------ the way of one request

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int, word: str = "prompt"
    ) -> list[SamplingParams]:
        if given is None:
            given = self.default_sampling_params()
        params = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(params) != count:
            raise RequestError(
                "sampling_params",
                f"{len(params)} sampling_params for {count} {word}s",
                "one for all, or one for each",
                f"pass a single SamplingParams, or a list with one for each {word}",
            )
        return params

    def _checked(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        """The prompt as token ids, in an output still empty. RequestError if it cannot be served."""
        text, ids = prompt, None
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is None and not isinstance(text, str):
            raise RequestError(
                "prompt",
                f"a prompt of type {type(prompt).__name__}",
                'text, {"prompt": text} or {"prompt_token_ids": [ids]}',
                "pass one of these",
            )
        if ids is None:
            ids = self._encode(text, add_special_tokens=True) if text else []
        elif not isinstance(ids, (list, tuple)) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise RequestError("prompt_token_ids", "ids that are not whole numbers", "a list of token ids", "pass ints")
        output = RequestOutput(text, list(ids))
        self._engine.check(self._request(output, params, "", ""))
        return output

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise RequestError(
                "prompt",
                "a prompt of text with skip_tokenizer_init",
                '{"prompt_token_ids": [ids]}',
                "pass ids, or leave skip_tokenizer_init out",
            )
        return self.tokenizer.encode(text, add_special_tokens)

    def _request(self, output: RequestOutput, params: SamplingParams, id: str, seed: str) -> Request:
        return Request(id, tuple(output.prompt_token_ids), params, seed, tuple(self.eos_token_ids))

    def _start(
        self, output: RequestOutput, params: SamplingParams, deliver: Callable[[Any], None] | None = None
    ) -> "list[_Answer]":
        """Queue the n answers to a checked prompt."""
        self._alone()
        number = next(self._numbers)
        seed = f"request {self.config.seed}.{number}" if params.seed is None else str(params.seed)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        for index in range(params.n):
            output.outputs.append(CompletionOutput(index, logprobs=None if params.logprobs is None else []))
        answers = []
        for completion in output.outputs:
            own = params if completion.index == 0 else replace(params, prompt_logprobs=None)
            id = f"{number}.{completion.index}"
            self._engine.add(self._request(output, own, id, f"{seed}.{completion.index}"))
            answers.append(_Answer(id, output, completion, own, self.tokenizer, deliver))
            self._open[id] = answers[-1]
        return answers

    def _advance(self) -> int:
        """One step of the engine; its outputs become text. Returns the number of new tokens."""
        self._alone()
        assert self._engine.busy or not self._open, "an answer that the engine knows nothing of"
        outputs = self._engine.step()
        for output in outputs:
            answer = self._open[output.request_id]
            answer.take(output)
            if answer.done:
                del self._open[answer.id]
                if output.finish_reason is None:  # a stop string, which the engine knows nothing of
                    self._engine.abort(answer.id)
        return sum(len(output.token_ids) for output in outputs)

    def _abort(self, answer: "_Answer") -> None:
        if answer.done:
            return
        self._alone()
        if self._open.pop(answer.id, None) is not None:
            self._engine.abort(answer.id)
            answer.completion.finish_reason = FinishReason.ABORT.value


def join(config: EngineConfig) -> Group:
    """Meet the other processes; for those who have a word to say to them before they load. Errors: parallel.connect."""
    device = devices.resolve(config.device, parallel.local_rank())
    return parallel.connect(config.tensor_parallel_size, device, devices.COLLECTIVES[device.type])


class _Answer:
    """One answer on its way from token ids to text."""

    def __init__(
        self,
        id: str,
        output: RequestOutput,
        completion: CompletionOutput,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        deliver: Callable[[Any], None] | None,
    ):
        self.id, self.output, self.completion, self.params, self.tokenizer = id, output, completion, params, tokenizer
        self.pieces: deque[Delta] = deque()
        self.awaited = deliver is not None  # by a coroutine
        self.deliver = deliver or self.pieces.append
        self.reply = _NoText()
        if tokenizer is not None:
            self.reply = IncrementalText(
                tokenizer, params.stop, params.include_stop_str_in_output, params.skip_special_tokens
            )

    @property
    def done(self) -> bool:
        return self.completion.finish_reason is not None

    def take(self, output: Output) -> None:
        """Add what a step brought; after a stop string the rest is not taken."""
        completion, finish = self.completion, output.finish_reason
        completion.token_ids += output.token_ids
        if completion.logprobs is not None:
            completion.logprobs += [self._decoded(position) for position in output.logprobs]
        if self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs += [self._decoded(position) for position in output.prompt_logprobs]
        shown = output.token_ids
        if finish is FinishReason.STOP:
            if shown[-1] in self.params.stop_token_ids:
                completion.stop_reason = shown[-1]
            if not self.params.include_stop_str_in_output:
                shown = shown[:-1]  # the id that ends an answer is counted, but not shown
        text = self.reply.push(shown)
        if finish is not None and self.reply.stopped is None:
            text += self.reply.finish()
        if self.reply.stopped is not None:
            finish, completion.stop_reason = FinishReason.STOP, self.reply.stopped
        completion.text = self.reply.text
        completion.finish_reason = None if finish is None else finish.value
        if output.problem is not None:
            self.output.error = EngineError(
                f"answer {completion.index} stopped after {len(completion.token_ids)} tokens: {output.problem}",
                "finite logits from finite weights",
                "check the checkpoint's files (a broken download or quantisation); try --dtype float32",
            )
        if output.token_ids or finish is not None:
            piece = Delta(completion.index, text, output.token_ids, completion.finish_reason, completion.stop_reason)
            self.deliver(piece)

    def _decoded(self, position: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None:
            return position
        known = [id for id in position if id < self.tokenizer.size]  # the vocabulary may be padded beyond
        text = {id: self.tokenizer.decode([id], skip_special_tokens=False) for id in known}
        return {id: replace(found, decoded_token=text.get(id, "")) for id, found in position.items()}


class _NoText:
    """In place of a IncrementalText where there is no tokenizer: an answer of ids only."""

    text, stopped = "", None

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""
