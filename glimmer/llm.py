"""LLM: text in, text out, in this process; under torchrun the same program on every rank.

It joins what the packages below keep apart: tokenizer and chat template in front of the engine, detokenizer and stop
strings behind it. Any number of prompts run at once; `generate` waits for all of them, `stream` and `astream` hand on
each piece as it comes. Any number of threads and coroutines may call at the same time: each of them is a client of the
engine's loop (engine/loop.py) and gets the answers that it would get alone.
Not here: HTTP, argument parsing, tool calls (the text is returned as the model wrote it).
"""

import asyncio
import itertools
import logging
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from glimmer import device as devices
from glimmer import parallel, vllm_names
from glimmer.config import EngineConfig, SamplingParams, StructuredOutputs, generation_defaults
from glimmer.engine.disk_cache import DiskStats
from glimmer.engine.engine import Engine
from glimmer.engine.loop import Loop
from glimmer.engine.profile import Profile
from glimmer.engine.ranks import Call, Client, ParentRequest
from glimmer.engine.runner import Runner
from glimmer.engine.sequence import Constraint
from glimmer.engine.speculation import make_speculation
from glimmer.engine.stats import Stats
from glimmer.engine_load import EngineLoad
from glimmer.errors import CheckpointError, ConfigError, EngineError, RequestError, shown
from glimmer.group import Group
from glimmer.hub import model_directory
from glimmer.model.experts import PagingStats
from glimmer.model_config import ModelConfig
from glimmer.outputs import Delta, Event, Reader, RequestMetrics, RequestOutput
from glimmer.text import rendering
from glimmer.text.answers import answer_format
from glimmer.text.chat import ChatTemplate
from glimmer.text.constraint import AnswerConstraint
from glimmer.text.grammar import Calls, ConstraintSpec, Grammars, prompt_constraint
from glimmer.text.hf_tokenizer import HFTokenizer
from glimmer.text.tokenizer import Tokenizer

log = logging.getLogger("glimmer")
Prompt = str | Sequence[int] | Mapping[str, Any]
OnLoad = Callable[[int, int], None]

MAX_LOGPROBS = 1 << 23  # log-probabilities of one request; each takes some 200 bytes
PROMPT_KEYS = ("prompt", "prompt_token_ids", "calls", "cache_salt")
RENDERING = (*rendering.OPTIONS, "tool_choice", "parallel_tool_calls")


class Wanted(NamedTuple):
    """What is wanted of a prompt besides its parameters. spec: what its answers must look like; cache_salt: as in
    ParentRequest."""

    spec: ConstraintSpec | None
    cache_salt: str


class LLM:
    """A model, ready to answer.

    model: a Hugging Face directory. The other parameters are EngineConfig's fields (config.py). on_load(done, total)
    is called with bytes while weights are read. group: what `join` gave, where somebody has called it. Further
    parameters of vLLM are accepted where they change nothing, which is said once, and refused otherwise
    (vllm_names.py); dtype may be torch's.

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
        kv_cache_dir: str | None = None,
        kv_cache_size_bytes: int = 16 << 30,
        enable_prefix_caching: bool = True,
        skip_tokenizer_init: bool = False,
        threads: int | None = None,
        quantization: str | None = None,
        group_size: int | None = None,
        speculative_config: Mapping[str, Any] | str | None = None,
        prepare: bool = False,
        on_load: OnLoad | None = None,
        group: Group | None = None,
        **unknown: Any,
    ):
        if not isinstance(model, (str, Path)):
            raise ConfigError(f"model={shown(model)}", "a path", "pass the path of a Hugging Face directory")
        ignored = _check_engine(model, unknown)
        given: dict[str, Any] = dict(
            model=str(model_directory(model)),
            dtype=_dtype_name(dtype),
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
            kv_cache_dir=str(kv_cache_dir) if isinstance(kv_cache_dir, Path) else kv_cache_dir,
            kv_cache_size_bytes=kv_cache_size_bytes,
            enable_prefix_caching=enable_prefix_caching,
            skip_tokenizer_init=skip_tokenizer_init,
            threads=threads,
            quantization=quantization,
            group_size=group_size,
            speculative_config=speculative_config,
            prepare=prepare,
        )
        # vLLM's own defaults are None here and there: whoever passes them on means the default.
        self.config = EngineConfig(**{name: value for name, value in given.items() if value is not None})
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
        self._grammars = (
            None if self.tokenizer is None else Grammars(self.tokenizer, sampling_vocab_size, self.eos_token_ids)
        )
        self._runner = Runner(self.config, self.model_config, self.group, self.group.device, on_load)
        self._speculation = make_speculation(self._runner, self.config.speculation, sampling_vocab_size)
        self._engine = Engine(self.config, self._runner, self.group, vocab_size, sampling_vocab_size, self._speculation)
        self._loop = Loop(self._engine)
        self._numbers = itertools.count()
        if ignored and self.rank == 0:
            log.warning("these parameters change nothing here: %s; a checkpoint's own code is never run", ignored)
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

    def get_tokenizer(self) -> HFTokenizer:
        """The checkpoint's tokenizer with the methods that scripts know from transformers (text/hf_tokenizer.py).

        LLM.tokenizer is the one that glimmer itself uses (text/tokenizer.py). ConfigError with skip_tokenizer_init.
        """
        if self.tokenizer is None:
            raise ConfigError("skip_tokenizer_init", "an LLM with a tokenizer", "leave skip_tokenizer_init out")
        return HFTokenizer(self.tokenizer, self.chat_template, self.max_model_len, self.config.model)

    def get_default_sampling_params(self) -> SamplingParams:
        """The same as default_sampling_params, under vLLM's name."""
        return self.default_sampling_params()

    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams as the checkpoint's generation_config.json recommends them."""
        return SamplingParams(**self._defaults)

    def peak_memory(self) -> int:
        """The most bytes that this process has held on its device."""
        return devices.peak_memory(self._runner.device)

    @property
    def grammars(self) -> Grammars:
        """Makes the constraints of answers. ConfigError with skip_tokenizer_init."""
        if self._grammars is None:
            raise ConfigError("skip_tokenizer_init", "an LLM with a tokenizer", "leave skip_tokenizer_init out")
        return self._grammars

    def limits(self) -> dict[str, float] | None:
        """What this machine can do at best, measured now: see Backend.limits."""
        return self._runner.backend.limits()

    @property
    def load(self) -> EngineLoad:
        """How much there is to do at this moment, and how much has been done; other threads change it all the while."""
        scheduler, stats, disk = self._engine.scheduler, self._engine.stats, self.disk or DiskStats()
        return EngineLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self._loop.num_waiting,
            free_blocks=scheduler.blocks.free,
            num_blocks=scheduler.blocks.count,
            preemptions=scheduler.preemptions,
            drafts=stats.num_drafts,
            draft_tokens=stats.num_draft_tokens,
            accepted_tokens=stats.num_accepted_tokens,
            accepted_by_place=tuple(stats.num_accepted_tokens_per_pos),
            tokens_per_step=stats.num_tokens / max(stats.num_steps, 1),
            draft_gain=1.0 if self._speculation is None else self._speculation.gain,
            disk_hit_tokens=disk.hit_tokens,
            disk_read_bytes=disk.read_bytes,
            disk_written_bytes=disk.written_bytes,
            disk_stored_bytes=disk.stored_bytes,
            disk_damaged_files=disk.damaged_files,
            disk_dropped_pages=disk.dropped_pages,
        )

    @property
    def ended(self) -> EngineError | None:
        """Why nothing will be answered any more, if the engine has failed or is closed."""
        return self._loop.ended

    @property
    def paging(self) -> PagingStats | None:
        """What has been read of experts that do not fit into memory; None: all are in memory."""
        return self._runner.paging

    @property
    def kernels(self) -> str | None:
        """The instruction set of the CPU kernels, or None: see Backend.kernels."""
        return self._runner.backend.kernels

    def profile(self) -> Profile:
        """`with llm.profile() as profile:` where the time of the steps in between goes: see engine/profile.py."""
        return _Profile(self._engine, self._loop)

    @property
    def stats(self) -> Stats:
        """What the engine has counted so far, on rank 0: steps, tokens, drafts (engine/stats.py)."""
        return self._engine.stats

    @property
    def disk(self) -> DiskStats | None:
        """What has come of kv_cache_dir so far, on this rank; None where there is none."""
        return None if self._engine.disk is None else self._engine.disk.stats

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafted (speculative_config), as far as it pays."""
        return self._speculation is not None

    @contextmanager
    def without_drafts(self) -> Iterator[None]:
        """`with llm.without_drafts():` nothing is drafted meanwhile, for comparisons. On rank 0."""
        if self._speculation is None:
            yield
            return
        self._loop.run(partial(setattr, self._speculation, "paused", True))
        try:
            yield
        finally:
            self._loop.run(partial(setattr, self._speculation, "paused", False))

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

    def shutdown(self) -> None:
        """The same as close."""
        self.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The error of an attribute that is not there; in three parts if vLLM's LLM has it."""
            raise vllm_names.missing_member(name) or AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
            )

    # ------------------------------------------------------------------ all at once

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        *,
        errors: str = "raise",
        on_finish: Callable[[int, RequestOutput], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Answer every prompt (text, its token ids, or {"prompt_token_ids": [...]}); the outputs are in their order.
        With a "cache_salt" a prompt shares what is cached of its beginning with others of the same salt only.

        sampling_params: None is generation_config.json's, with the 16 tokens of SamplingParams.
        use_tqdm: show a bar on rank 0's stderr; or what makes one, such as tqdm.
        errors: "raise" refuses all if one prompt cannot be served, before anything is computed; "return" answers the
        others and reports it in its own output. An answer that fails on the way ends with finish_reason "error" in
        either case. on_finish(index, output) is called as each prompt is done, on_step(new tokens) after each step, by
        the engine's thread: until it returns, nothing is computed for anybody. What they raise is raised here.
        unknown: parameters of vLLM's generate, which are accepted where they change nothing.
        """
        _check_call("generate", unknown, ("prompts", "sampling_params", "use_tqdm", "errors", "on_finish", "on_step"))
        asked = [prompts] if isinstance(prompts, (str, Mapping)) or _are_ids(prompts) else _listed(prompts)
        params = self._params(sampling_params, len(asked), "prompt")
        return self._all("prompt", asked, lambda prompt: prompt, params, use_tqdm, errors, on_finish, on_step)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        special_tokens_in_content: str = "control",
        errors: str = "raise",
        on_finish: Callable[[int, RequestOutput], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the checkpoint's chat template; the rest as `generate`.

        sampling_params: None is generation_config.json's, and an answer may be as long as the context allows.
        What becomes of messages and tools is said at `render`.
        """
        own = ("messages", "sampling_params", "use_tqdm", *RENDERING, "errors", "on_finish", "on_step")
        _check_call("chat", unknown, own)
        several = isinstance(messages, (list, tuple)) and len(messages) > 0 and isinstance(messages[0], (list, tuple))
        conversations = list(messages) if several else [messages]
        render = lambda conversation: self.render(
            conversation,
            tools,
            chat_template_kwargs,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens_in_content=special_tokens_in_content,
        )
        params = self._params(self._chat_params(sampling_params), len(conversations), "conversation")
        return self._all("conversation", conversations, render, params, use_tqdm, errors, on_finish, on_step)

    def _all(
        self,
        word: str,
        asked: list[Any],
        prompt_of: Callable[[Any], Prompt],
        params: list[SamplingParams],
        use_tqdm: bool | Callable[..., Any],
        errors: str,
        on_finish: Callable[[int, RequestOutput], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> list[RequestOutput]:
        """`generate` for whatever prompt_of makes a prompt of; `word` is what an error calls it."""
        for name, callback in (("on_finish", on_finish), ("on_step", on_step)):
            if callback is not None and not callable(callback):
                raise ConfigError(
                    f"{name}={shown(callback)}", "a function", f"pass a function as {name}, or leave it out"
                )
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors={shown(errors)}", "'raise' or 'return'", "choose one of these")
        outputs: list[RequestOutput] = []
        wanted: dict[int, Wanted] = {}
        for i, one in enumerate(asked):
            try:
                output, wanted[i] = self._checked(prompt_of(one), params[i])
                outputs.append(output)
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
        reader = Reader([(outputs[i], params[i]) for i in started], self.tokenizer, events.put, on_step=on_step)
        requests = [self._parent_request(outputs[i], params[i], wanted[i]) for i in started]
        call = Call(requests, reader, ordered=True, watches=on_step is not None)
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        bar = make_bar(total=len(requests), desc=f"{word}s") if use_tqdm and self.rank == 0 else None
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
                if bar is not None:
                    bar.update(1)
                if on_finish is not None:
                    on_finish(started[event], outputs[started[event]])
        finally:
            if requests:
                self._loop.cancel(call)
            if bar is not None:
                bar.close()
        return outputs

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        special_tokens_in_content: str = "control",
    ) -> dict[str, Any]:
        """A conversation as the prompt that `generate` and `stream` take: "prompt", "prompt_token_ids" and, with tools,
        "calls".

        tools, tool_choice, parallel_tool_calls: what may be called, in OpenAI's form. Where the template writes calls
            as this family does, the answer's calls are those of the tools, with arguments of their schemas. Tools of
            another template are its own affair, unless one of the other two is given.
        chat_template: a Jinja template in place of the checkpoint's.
        continue_final_message: the last message is the beginning of the answer (with add_generation_prompt=False).
        special_tokens_in_content: what names of control tokens in the messages of users and tools are, such as
            <|assistant|> or /nothink: "control" tokens, as in transformers and vLLM; or "text", the letters that they
            are, where these messages are not to be trusted.
        """
        template = self.chat_template
        if chat_template is not None:
            template = ChatTemplate(_text("chat_template", chat_template), "chat_template")
        text, mark = rendering.render(
            template,
            self.tokenizer,
            messages,
            tools,
            chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens_in_content=special_tokens_in_content,
        )
        calls = self._calls(template, tools, tool_choice, parallel_tool_calls)
        if not mark or self.tokenizer is None:
            return {"prompt": text, "prompt_token_ids": self._encode(text, add_special_tokens=False)} | calls
        ids = rendering.encode(self.tokenizer, text, mark, self.max_model_len)
        return {"prompt": text.replace(mark, ""), "prompt_token_ids": ids} | calls

    def _calls(
        self,
        template: ChatTemplate,
        tools: Sequence[dict[str, Any]] | None,
        tool_choice: str | Mapping[str, Any] | None,
        parallel_tool_calls: bool | None,
    ) -> dict[str, Calls]:
        """What may be called in the answer to a conversation, as a part of its prompt."""
        chosen = tool_choice is not None or parallel_tool_calls is not None
        if self.tokenizer is None or not (tools or chosen):
            return {}
        format = answer_format(template.source, self.tokenizer.added_names)
        if not chosen and (format is None or format.call is None):
            return {}
        return {"calls": Calls(tools, tool_choice, parallel_tool_calls, format)}

    # ------------------------------------------------------------------ piece by piece

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Pieces of the answer (or of the n answers) as they come. Closing the iterator aborts what is left.

        The request is queued when the first piece is asked for; the engine does not wait for whoever reads. Raises
        RequestError at once, and whatever stopped an answer after its last piece.
        """
        params = self._params(sampling_params, 1)[0]
        return self._stream(*self._checked(prompt, params), params)

    def stream_chat(
        self, messages: Sequence[dict[str, Any]], sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Delta]:
        """`stream` for a conversation. options: those of `render`."""
        return self.stream(self._rendered("stream_chat", messages, options), self._chat_params(sampling_params))

    def astream_chat(
        self, messages: Sequence[dict[str, Any]], sampling_params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """`astream` for a conversation. options: those of `render`."""
        return self.astream(self._rendered("astream_chat", messages, options), self._chat_params(sampling_params))

    def _rendered(self, method: str, messages: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """`render` for a method that takes its options, and those of vLLM's chat that change nothing."""
        _check_call(method, {name: options[name] for name in options if name not in RENDERING}, RENDERING)
        return self.render(messages, **{name: options[name] for name in options if name in RENDERING})

    def _stream(self, output: RequestOutput, wanted: Wanted, params: SamplingParams) -> Iterator[Delta]:
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        call = self._streaming(output, wanted, params, events.put)
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
        """`stream` for asyncio. Cancelling a coroutine aborts its request.

        On several ranks a request is rank 0's: cancelled there, it ends on every rank, and whoever has asked
        for the same on another rank gets what was there. Cancelled on another rank, only this caller gets no more.
        """
        params = self._params(sampling_params, 1)[0]
        output, wanted = self._checked(prompt, params)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[list[Event]]()
        deliver = lambda new: loop.call_soon_threadsafe(events.put_nowait, new)
        call = self._streaming(output, wanted, params, deliver)
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
        self,
        output: RequestOutput,
        wanted: Wanted,
        params: SamplingParams,
        deliver: Callable[["list[Event]"], object],
    ) -> Call:
        """A call whose pieces are delivered as they come."""
        reader = Reader([(output, params)], self.tokenizer, deliver, piecewise=True)
        return Call([self._parent_request(output, params, wanted)], reader)

    # ------------------------------------------------------------------ token ids, for a client of one's own

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        client: Client,
        constraints: Sequence[Constraint] = (),
        cache_salt: str = "",
    ) -> Call:
        """Have the engine's thread hand what it makes of a prompt to `client` (engine/ranks.py), as token ids.

        For programs that make text themselves, such as a server. constraints: none, or one for each answer.
        cache_salt: as in ParentRequest. Raises RequestError if the prompt cannot be served, EngineError if the engine
        has ended.
        """
        output, wanted = self._checked({"prompt_token_ids": prompt_token_ids, "cache_salt": cache_salt}, params)
        parent = replace(self._parent_request(output, params, wanted), constraints=tuple(constraints))
        call = Call([parent], client)
        self._loop.submit(call)
        return call

    def cancel(self, call: Call) -> None:
        """End what is left of a call that `submit` returned. Does not wait; its client hears of what was left."""
        self._loop.cancel(call, wait=False)

    # ------------------------------------------------------------------ the way of one request

    def _chat_params(self, given: Any) -> Any:
        """What is given; by default, answers of a conversation are as long as the context allows."""
        return replace(self.default_sampling_params(), max_tokens=None) if given is None else given

    def _params(self, given: Any, count: int, word: str = "prompt") -> list[SamplingParams]:
        """One SamplingParams for each prompt, copies of what is given. RequestError if they are anything else, not as
        many, or were assigned what cannot be served."""
        if given is None:
            given = self.default_sampling_params()
        params = [given] * count if isinstance(given, SamplingParams) else given
        if not isinstance(params, (list, tuple)) or not all(isinstance(one, SamplingParams) for one in params):
            raise RequestError(
                "sampling_params",
                f"sampling_params={shown(given)}",
                "a SamplingParams, or a list of them",
                "write e.g. SamplingParams(temperature=0, max_tokens=64)",
            )
        if len(params) != count:
            raise RequestError(
                "sampling_params",
                f"{len(params)} sampling_params for {count} {word}s",
                "one for all, or one for each",
                f"pass a single SamplingParams, or a list with one for each {word}",
            )
        copies = {key: replace(one) for key, one in {id(one): one for one in params}.items()}
        return [copies[id(one)] for one in params]

    def _checked(self, prompt: Any, params: SamplingParams) -> tuple[RequestOutput, Wanted]:
        """The prompt as token ids, in an output still empty; and what else was asked for. RequestError if it cannot be
        served."""
        if isinstance(prompt, (list, tuple)):
            prompt = {"prompt_token_ids": prompt}
        given = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        text, ids, calls, salt = (given.get(key) for key in PROMPT_KEYS)
        others = [k for k in prompt if k not in PROMPT_KEYS] if isinstance(prompt, Mapping) else []
        if others and any(prompt[k] is not None for k in others):
            raise RequestError(
                "prompt", f"a prompt with {shown(others)}", f"{PROMPT_KEYS} only", "leave the others out"
            )
        if not isinstance(text, str) and (ids is None or text is not None):
            raise RequestError(
                "prompt",
                f"a prompt of type {type(text if isinstance(prompt, Mapping) else prompt).__name__}",
                'text, its token ids, {"prompt": text} or {"prompt_token_ids": [ids]}',
                "pass one of these",
            )
        keep = params.truncate_prompt_tokens
        if ids is None:
            ids = self._encode(text, add_special_tokens=True, whole=keep is None) if text else []
        elif not isinstance(ids, (list, tuple)):
            found = f"prompt_token_ids of type {type(ids).__name__}"
            raise RequestError("prompt_token_ids", found, "a list of token ids", "pass a list of ints")
        if keep is not None:
            ids = ids[-(self.max_model_len - 1 if keep == -1 else keep) :]
        if len(ids) <= self.max_model_len:  # the engine refuses more of them, whatever they are
            if any(isinstance(i, bool) or not isinstance(i, Integral) for i in ids):
                raise RequestError(
                    "prompt_token_ids", "ids that are not whole numbers", "a list of token ids", "pass ints"
                )
            ids = list(map(int, ids))
        if calls is not None and not isinstance(calls, Calls):
            found = f"calls of type {type(calls).__name__} in a prompt"
            raise RequestError("prompt", found, "what LLM.render has made", "render the conversation with its tools")
        if not isinstance(salt, str | None):
            found = f"cache_salt of type {type(salt).__name__} in a prompt"
            raise RequestError("cache_salt", found, "a text that only those know who may share a cache", "pass a str")
        named = {name: getattr(params, name) for name in ("stop", "bad_words", "structured_outputs")} | {"tools": calls}
        if self.tokenizer is None and any(named.values()):
            name = next(name for name, asked in named.items() if asked)
            raise RequestError(
                name,
                f"{name} with skip_tokenizer_init",
                "texts where there is a tokenizer",
                "use stop_token_ids or logit_bias, or leave skip_tokenizer_init out",
            )
        output = RequestOutput(text, list(ids))
        self._engine.check(ParentRequest("", tuple(ids), params, "", tuple(self.eos_token_ids)).child(0))
        self._check_logprobs(len(ids), params)
        if self._grammars is None or self.tokenizer is None:
            return output, Wanted(None, salt or "")
        asked = params.structured_outputs
        assert asked is None or isinstance(asked, StructuredOutputs), "SamplingParams has made it one"
        spec = prompt_constraint(output.prompt_token_ids, self.tokenizer, asked, calls)
        if spec is not None:
            self._grammars.check(spec)
        return output, Wanted(spec, salt or "")

    def _check_logprobs(self, length: int, params: SamplingParams) -> None:
        """RequestError if a request could bring more log-probabilities than memory holds."""
        vocabulary = self.model_config.vocab_size
        wide: Callable[[int | None], int] = lambda asked: vocabulary if asked == -1 else min(asked or 0, vocabulary)
        answer = self.max_model_len - length
        if params.max_tokens is not None:
            answer = min(answer, params.max_tokens)
        most = params.n * answer * wide(params.logprobs) + length * wide(params.prompt_logprobs)
        if most > MAX_LOGPROBS:
            raise RequestError(
                "logprobs" if params.logprobs else "prompt_logprobs",
                f"up to {most} log-probabilities: logprobs={params.logprobs} of {params.n} answers of up to {answer} "
                f"tokens, prompt_logprobs={params.prompt_logprobs} of {length} tokens",
                f"at most {MAX_LOGPROBS} in one request",
                "lower logprobs, prompt_logprobs, n or max_tokens",
            )

    def _encode(self, text: str, add_special_tokens: bool, whole: bool = True) -> list[int]:
        """Token ids of a text. whole: it is needed as it is, and may be refused before all of it is looked at."""
        if self.tokenizer is None:
            raise RequestError(
                "prompt",
                "a prompt of text with skip_tokenizer_init",
                '{"prompt_token_ids": [ids]}',
                "pass ids, or leave skip_tokenizer_init out",
            )
        return self.tokenizer.encode(text, add_special_tokens, self.max_model_len if whole else None)

    def _parent_request(self, output: RequestOutput, params: SamplingParams, wanted: Wanted) -> ParentRequest:
        """The n answers to a checked prompt, still empty; and what the engine is asked for."""
        number = next(self._numbers)
        output.request_id, output.metrics = str(number), RequestMetrics(time.time())
        seed = f"request {self.config.seed}.{number}" if params.seed is None else str(params.seed)
        bad_words = () if self.tokenizer is None else self.tokenizer.spellings(params.bad_words or ())
        constraints: tuple[AnswerConstraint, ...] = ()
        if self.rank == 0 and self._grammars is not None and wanted.spec is not None:
            constraints = tuple(self._grammars.constraint(wanted.spec) for _ in range(params.n))
        return ParentRequest(
            str(number), tuple(output.prompt_token_ids), params, seed, tuple(self.eos_token_ids), bad_words,
            constraints, wanted.cache_salt,
        )  # fmt: skip


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


def _check_engine(model: str, given: Mapping[str, Any]) -> str:
    """The names of vLLM's parameters that change nothing here; ConfigError for any other."""
    names = [field.name for field in fields(EngineConfig)] + ["on_load", "group"]
    given = dict(given)
    tokenizer = given.pop("tokenizer", None)
    if tokenizer is not None and Path(str(tokenizer)).resolve() != Path(str(model)).resolve():
        raise ConfigError(
            f"tokenizer={shown(tokenizer)} beside model={shown(model)}",
            "the model's own tokenizer",
            "leave tokenizer out; to use another one, put its tokenizer.json into a copy of the model's directory",
        )

    def error(name: str, found: str, expected: str, todo: str) -> ConfigError:
        return ConfigError(found, expected, todo)

    return ", ".join(vllm_names.check("LLM", given, vllm_names.ENGINE, names, error))


def _check_call(method: str, given: Mapping[str, Any], own: Sequence[str]) -> None:
    """RequestError for a parameter that is neither the method's own nor without effect."""
    vllm_names.check(method, given, vllm_names.CALL, own, RequestError)


def _dtype_name(dtype: Any) -> str:
    """torch.bfloat16, "half" and the like under the names that EngineConfig checks; what is no dtype, as it is."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    return {"half": "float16", "float": "float32"}.get(name, name) if isinstance(name, str) else name


def _are_ids(prompts: Any) -> bool:
    """Whether this is one prompt, given as its token ids."""
    return isinstance(prompts, (list, tuple)) and bool(prompts) and all(isinstance(id, int) for id in prompts)


def _listed(prompts: Any) -> list[Any]:
    """The prompts as a list. RequestError if they are neither a text nor several prompts."""
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise RequestError(
            "prompt",
            f"prompts of type {type(prompts).__name__}",
            'text, {"prompt_token_ids": [ids]}, or a list of these',
            "pass one of these",
        )
    return list(prompts)


def _text(name: str, given: Any) -> str:
    """The text that a parameter is. RequestError if it is anything else."""
    if not isinstance(given, str):
        raise RequestError(name, f"{name}={shown(given)}", "a text", "pass a text, or leave it out")
    return given


class _Profile(Profile):
    """A profile that begins and ends between two steps, whoever else is being answered."""

    def __init__(self, engine: Engine, loop: Loop):
        super().__init__(engine)
        self._loop = loop

    def __enter__(self) -> Profile:
        return self._loop.run(super().__enter__)

    def __exit__(self, *exception: object) -> None:
        self._loop.run(lambda: super(_Profile, self).__exit__(*exception))


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
