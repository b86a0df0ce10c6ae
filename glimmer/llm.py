"""LLM: text in, text out, in this process; under torchrun the same program on every rank.

It joins what the packages below keep apart: tokenizer and chat template in front of the engine, detokenizer and stop
strings behind it. Any number of prompts run at once; `generate` waits for all of them, `stream` and `astream` hand on
each piece as it comes. Any number of threads and coroutines may call at the same time: each of them is a client of the
engine's loop (engine/loop.py) and gets the answers that it would get alone.
Not here: HTTP, argument parsing, tool calls (the text is returned as the model wrote it).
"""

import asyncio
import difflib
import itertools
import logging
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import Any

from glimmer import device as devices
from glimmer import parallel
from glimmer.config import EngineConfig, ModelConfig, SamplingParams, generation_defaults
from glimmer.engine.engine import Engine
from glimmer.engine.loop import Loop
from glimmer.engine.profile import Profile
from glimmer.engine.ranks import Call, ParentRequest
from glimmer.engine.runner import Runner
from glimmer.engine.sequence import FinishReason, Logprob, Output
from glimmer.errors import CheckpointError, ConfigError, EngineError, GlimmerError, RequestError
from glimmer.group import Group
from glimmer.text.chat import ChatTemplate
from glimmer.text.incremental import IncrementalText
from glimmer.text.tokenizer import Tokenizer

log = logging.getLogger("glimmer")
Prompt = str | Mapping[str, Any]
OnLoad = Callable[[int, int], None]

MAX_ANSWERS = 4096  # the largest n of one request
MAX_SEED = 2**128  # the largest seed, in magnitude


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
    is called with bytes while weights are read. group: what `join` gave, where somebody has called it.

    Under torchrun, tensor_parallel_size must be the number of processes. Rank 0's requests are everybody's: either the
    same calls are made on every rank, in whatever order, and every rank gets the same answers; or only rank 0 asks, and
    the others call `follow`.

    Raises ConfigError, CheckpointError or NotEnoughMemory before weights are read; EngineError if a rank never joins.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        backend: str = "auto",
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        seed: int = 0,
        block_size: int = 16,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        gpu_memory_utilization: float = 0.9,
        max_memory_bytes: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        skip_tokenizer_init: bool = False,
        threads: int | None = None,
        quantization: str | None = None,
        group_size: int | None = None,
        on_load: OnLoad | None = None,
        group: Group | None = None,
        **unknown: Any,
    ):
        if unknown:
            raise _unknown(next(iter(unknown)))
        self.config = EngineConfig(
            model=str(model),
            dtype=dtype,
            device=device,
            backend=backend,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_model_len,
            seed=seed,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            max_memory_bytes=max_memory_bytes,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            skip_tokenizer_init=skip_tokenizer_init,
            threads=threads,
            quantization=quantization,
            group_size=group_size,
        )
        self.model_config = ModelConfig.load(self.config.model)
        self.tokenizer = None if self.config.skip_tokenizer_init else Tokenizer.load(self.config.model)
        self.chat_template = ChatTemplate.load(self.config.model)
        self._defaults, eos = generation_defaults(self.config.model)
        vocab_size = self.model_config.vocab_size
        sampling_vocab_size = self.tokenizer.size if self.tokenizer else vocab_size
        if sampling_vocab_size > vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids up to {sampling_vocab_size - 1}, the model's vocab_size is {vocab_size}",
                "a tokenizer whose ids the model knows",
                "use the tokenizer.json and config.json of one checkpoint",
            )
        self.eos_token_ids = end_of_sequence(self.model_config, eos, self.tokenizer)
        self.group = group or join(self.config)
        assert self.group.device is not None, "join gives every rank a device"
        self._runner = Runner(self.config, self.model_config, self.group, self.group.device, on_load)
        self._engine = Engine(self.config, self._runner, self.group, vocab_size, sampling_vocab_size)
        self._loop = Loop(self._engine)
        self._numbers = itertools.count()
        log.info(
            "%s on %s x %d: context %d tokens, cache %d blocks of %d",
            self.config.model,
            self.group.device,
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
        """What this machine can do at best, measured now: see Backend.limits."""
        return self._runner.backend.limits()

    @property
    def kernels(self) -> str | None:
        """The instruction set of the CPU kernels, or None: see Backend.kernels."""
        return self._runner.backend.kernels

    def profile(self) -> Profile:
        """`with llm.profile() as profile:` where the time of the steps in between goes: see engine/profile.py."""
        return _Profile(self._engine, self._loop)

    def follow(self) -> None:
        """On a rank other than 0: take part in what rank 0 computes, until it closes, without asking for anything.

        For programs where only rank 0 has requests, such as a server. On rank 0 it returns at once, and the others are
        told that rank 0 is there while it has no requests. Raises EngineError if the job fails.
        """
        self._loop.follow()

    def close(self) -> None:
        """End what is being answered, and leave the group of processes in good order. May be called again."""
        self._loop.close()
        self.group.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
        either case. on_finish(index, output) is called as each prompt is done, on_step(new tokens) after each step, by
        the engine's thread: until it returns, nothing is computed for anybody. What they raise is raised here.
        """
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        return self._all("prompt", prompts, lambda prompt: prompt, sampling_params, errors, on_finish, on_step)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
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
        started = [i for i, output in enumerate(outputs) if output.error is None]
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        reader = _Reader([(outputs[i], params[i]) for i in started], self.tokenizer, events.put, on_step=on_step)
        requests = [self._parent_request(outputs[i], params[i]) for i in started]
        call = Call(requests, reader, ordered=True, watches=on_step is not None)
        if on_finish is not None:
            for i, output in enumerate(outputs):
                if output.error is not None:
                    on_finish(i, output)
        try:
            if requests:
                self._loop.submit(call)
            for event in _first(len(requests), events):
                if isinstance(event, BaseException):
                    raise event
                assert isinstance(event, int)
                reader.complete(event)
                if on_finish is not None:
                    on_finish(started[event], outputs[started[event]])
        finally:
            if requests:
                self._loop.cancel(call)
        return outputs

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
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

        The request is queued when the first piece is asked for; the engine does not wait for whoever reads. Raises
        RequestError at once, and whatever stopped an answer after its last piece.
        """
        params = self._params(sampling_params, 1)[0]
        output = self._checked(prompt, params)
        return self._stream(output, params)

    def _stream(self, output: RequestOutput, params: SamplingParams) -> Iterator[Delta]:
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        call = self._streaming(output, params, events.put)
        left = params.n
        try:
            self._loop.submit(call)
            while left:
                for event in events.get():
                    piece = _piece(event)
                    left -= piece.finish_reason is not None
                    yield piece
            if output.error is not None:
                raise output.error
        finally:
            self._loop.cancel(call)

    async def astream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncIterator[Delta]:
        """`stream` for asyncio. Cancelling a coroutine aborts its request."""
        params = self._params(sampling_params, 1)[0]
        output = self._checked(prompt, params)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[list[Event]]()
        deliver = lambda new: loop.call_soon_threadsafe(events.put_nowait, new)
        call = self._streaming(output, params, deliver)
        left = params.n
        try:
            self._loop.submit(call)
            while left:
                for event in await events.get():
                    piece = _piece(event)
                    left -= piece.finish_reason is not None
                    yield piece
            if output.error is not None:
                raise output.error
        finally:
            self._loop.cancel(call, wait=False)

    def _streaming(
        self, output: RequestOutput, params: SamplingParams, deliver: Callable[["list[Event]"], object]
    ) -> Call:
        """A call whose pieces are delivered as they come."""
        reader = _Reader([(output, params)], self.tokenizer, deliver, piecewise=True)
        return Call([self._parent_request(output, params)], reader)

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
        text: Any = prompt
        ids: Any = None
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
        for name, value, limit in (("n", params.n, MAX_ANSWERS), ("seed", params.seed or 0, MAX_SEED)):
            if abs(value) > limit:
                found = f"{name}={value}" if value.bit_length() < 1000 else f"{name} of {value.bit_length()} bits"
                raise RequestError(name, found, f"at most {limit}", f"choose a smaller {name}")
        output = RequestOutput(text, list(ids))
        self._engine.check(ParentRequest("", tuple(ids), params, "", tuple(self.eos_token_ids)).child(0))
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

    def _parent_request(self, output: RequestOutput, params: SamplingParams) -> ParentRequest:
        """The n answers to a checked prompt, still empty; and what the engine is asked for."""
        number = next(self._numbers)
        seed = f"request {self.config.seed}.{number}" if params.seed is None else str(params.seed)
        return ParentRequest(str(number), tuple(output.prompt_token_ids), params, seed, tuple(self.eos_token_ids))


def join(config: EngineConfig) -> Group:
    """Meet the other processes; for those who have a word to say to them before they load. Errors: parallel.connect."""
    device = devices.resolve(config.device, parallel.local_rank())
    return parallel.connect(config.tensor_parallel_size, device, devices.COLLECTIVES[device.type])


def end_of_sequence(config: ModelConfig, generation: tuple[int, ...], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, config.json and the tokenizer, all together.

    Raises CheckpointError for an id that the model cannot produce.
    """
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    ids = tuple(dict.fromkeys((*generation, *config.eos_token_id, *own)))
    if beyond := [id for id in ids if id >= config.vocab_size]:
        raise CheckpointError(
            f"eos_token_id {beyond[0]}, where vocab_size is {config.vocab_size}",
            f"ids below {config.vocab_size} in config.json and generation_config.json",
            "use the files of one checkpoint",
        )
    return ids


def _unknown(name: str) -> ConfigError:
    """The error for a parameter that LLM does not have."""
    names = [field.name for field in fields(EngineConfig)] + ["on_load", "group"]
    near = difflib.get_close_matches(name, names, 1)
    return ConfigError(
        f"LLM has no parameter {name!r}",
        "one of " + ", ".join(names),
        f"did you mean {near[0]!r}?" if near else f"leave {name} out",
    )


class _Profile(Profile):
    """A profile that begins and ends between two steps, whoever else is being answered."""

    def __init__(self, engine: Engine, loop: Loop):
        super().__init__(engine)
        self._loop = loop

    def __enter__(self) -> Profile:
        return self._loop.run(super().__enter__)

    def __exit__(self, *exception: object) -> None:
        self._loop.run(lambda: super(_Profile, self).__exit__(*exception))


Event = int | Delta | BaseException  # a prompt is done; a piece of an answer; nothing more comes


def _first(count: int, events: "queue.SimpleQueue[list[Event]]") -> Iterator[Event]:
    """The next `count` events, as they come."""
    while count > 0:
        new = events.get()
        count -= len(new)
        yield from new


def _piece(event: Event) -> Delta:
    """The event as a piece of an answer; raises what ended the stream instead."""
    if isinstance(event, BaseException):
        raise event
    assert isinstance(event, Delta)
    return event


class _Reader:
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
            [_Answer(output, index, params, tokenizer, piecewise) for index in range(params.n)]
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


class _Answer:
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
        self._text: IncrementalText | _NoText | None = None

    def done(self) -> bool:
        """Nothing more is added to it."""
        return self.completion.finish_reason is not None

    def take(self, output: Output) -> Delta | None:
        """Add what a step brought; the piece that it makes, if any. What follows a stop string is not taken."""
        completion, finish, token_ids = self.completion, output.finish_reason, output.token_ids
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
            completion.logprobs = [self._decoded(place) for place in completion.logprobs]
        if completion.index == 0 and self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs = [place and self._decoded(place) for place in self.output.prompt_logprobs]

    @property
    def text(self) -> "IncrementalText | _NoText":
        """The text so far. Made when it is first needed: of many answers most have not begun."""
        if self._text is None:
            self._text = (
                _NoText()
                if self.tokenizer is None
                else IncrementalText(
                    self.tokenizer,
                    tuple(self.params.stop or ()),
                    self.params.include_stop_str_in_output,
                    self.params.skip_special_tokens,
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
        if self.tokenizer is None:
            return place
        known = [id for id in place if id < self.tokenizer.size]  # the vocabulary may be padded beyond
        text = {id: self.tokenizer.decode([id], skip_special_tokens=False) for id in known}
        return {id: replace(found, decoded_token=text.get(id, "")) for id, found in place.items()}


class _NoText:
    """In place of an IncrementalText where there is no tokenizer: an answer of ids only."""

    text, stopped, used = "", None, 0

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""
