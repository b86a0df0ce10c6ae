"""Service: the neutral core of the HTTP process. A request goes in, events come out; every API only translates.

    ChatRequest or CompletionRequest --> Service.chat, Service.complete --> Started, Delta..., Finished..., Done

The events are an asynchronous iterator. It raises RequestError for a request that cannot be served, Overloaded where
too much is waiting already, Unavailable where there is no engine, and EngineError when the answer cannot go on. Closing
it, at whatever moment, ends the request: its blocks are free after the step that is being computed. Whoever does not
read stops nobody: what comes meanwhile is put together, and is one event when it is asked for. Templates, tokens and
grammars are made by a few threads beside the event loop.
Not here: HTTP, the forms of any API (openai.py, ...), an answer token by token (answer.py).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
from uuid import uuid4

from glimmer.config import SamplingParams, StructuredOutputs, generation_defaults
from glimmer.errors import GlimmerError, RequestError, shown
from glimmer.server import wire
from glimmer.server.answer import Answer, Delta, Finished, Thoughts
from glimmer.server.client import EngineClient, Unavailable
from glimmer.server.metrics import Metrics
from glimmer.server.settings import ServerConfig
from glimmer.text import grammar, parse, rendering
from glimmer.text.chat import ChatTemplate
from glimmer.text.tokenizer import Tokenizer

T = TypeVar("T")
TEXT_THREADS = 4
HUGE = 1 << 20  # characters or bytes of a request that may take seconds: it must not keep the others waiting


class Overloaded(Unavailable):
    """More is waiting than the server is willing to hold."""


class ContextError(RequestError):
    """The prompt is longer than the context allows."""


# ---------------------------------------------------------------------- what goes in


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to be answered.

    messages, tools, tool_choice  in the form of OpenAI's chat completions
    params                        as for LLM.generate; structured_outputs among them
    chat_template_kwargs          further variables of the template, such as enable_thinking
    thinking_token_budget         most tokens of thought
    form_field                    what an error about params.structured_outputs calls it
    cache_salt                    prompts share their cached beginnings only with others of the same salt
    """

    messages: Sequence[dict[str, Any]]
    params: SamplingParams
    tools: Sequence[dict[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    special_tokens_in_content: str = "control"
    thinking_token_budget: int | None = None
    cache_salt: str = ""
    form_field: str = "structured_outputs"


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A text, or token ids, to be continued. form_field: as in ChatRequest."""

    prompt: str | Sequence[int]
    params: SamplingParams
    add_special_tokens: bool = True
    cache_salt: str = ""
    form_field: str = "structured_outputs"


# ---------------------------------------------------------------------- what comes out


@dataclass(frozen=True)
class Started:
    """Something has been computed. index: of the first of the request's answers."""

    request_id: str
    prompt: str
    prompt_token_ids: Sequence[int]
    cached_tokens: int
    index: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens: of the prompt, those of it that were found in the cache, of all answers, and of their thoughts."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class Done:
    """All answers have ended."""

    usage: Usage


Event = Started | Delta | Finished | Done
Events = AsyncGenerator[Event, None]


@dataclass(frozen=True)
class _Prompt:
    """A request that is ready for the engine."""

    text: str
    token_ids: list[int]
    params: SamplingParams
    cache_salt: str
    parser: Callable[[], parse.AnswerParser] | None = None  # makes what reads an answer
    thinking: bool = False  # the prompt has opened the thoughts
    constraint: grammar.ConstraintSpec | None = None
    thinking_budget: int | None = None


class Service:
    """What all APIs share."""

    def __init__(self, config: ServerConfig, model: str, client: EngineClient):
        """Raises CheckpointError if the model's tokenizer cannot be read."""
        self.config, self.model, self.client = config, model, client
        self.tokenizer = Tokenizer.load(model)
        self.template = ChatTemplate.load(model)
        self.format = parse.answer_format(self.template.source, self.tokenizer.added_names) or parse.AnswerFormat(
            None, None
        )
        open_and_close = [self.tokenizer.token_to_id(tag) for tag in self.format.think or ()]
        self.thoughts = Thoughts(*open_and_close) if open_and_close else None
        self.defaults, _ = generation_defaults(model)
        self.created = int(time.time())
        self.metrics = Metrics(self.names[0], lambda: client.alive, lambda: client.deaths, lambda: self.num_waiting)
        self._pool = ThreadPoolExecutor(TEXT_THREADS, "glimmer-text")
        self._huge = ThreadPoolExecutor(1, "glimmer-huge-text")
        self.draining = False  # the server is shutting down
        self._preparing = 0
        self._waiting: dict[object, int] = {}  # requests whose first token has not come: tokens of their prompts

    @property
    def names(self) -> Sequence[str]:
        """The names that clients may call the model by; the first is the one that answers carry."""
        return self.config.served_model_name or (self.model,)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together. Unavailable before the model is loaded."""
        return self._ready.max_model_len

    @property
    def vocab_size(self) -> int:
        """How many token ids there are. Unavailable before the model is loaded."""
        return self._ready.vocab_size

    @property
    def _ready(self) -> wire.Ready:
        ready = self.client.ready
        if ready is None:
            raise self.client.absent()
        return ready

    @property
    def num_waiting(self) -> int:
        """Requests whose first token has not come."""
        return self._preparing + len(self._waiting)

    async def in_thread(self, work: Callable[[], T], huge: bool = False) -> T:
        """Do what takes time beside the event loop. huge: what may take seconds, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._huge if huge else self._pool, work)

    def close(self) -> None:
        """Let go of the threads."""
        for pool in (self._pool, self._huge):
            pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ requests

    def chat(self, request: ChatRequest) -> Events:
        """Answer a conversation: see the top."""
        return self._events(lambda: self._chat_prompt(request), _characters(request.messages) > HUGE)

    def complete(self, request: CompletionRequest) -> Events:
        """Continue a prompt: see the top."""
        return self._events(lambda: self._raw_prompt(request), len(request.prompt) > HUGE)

    async def render(self, request: ChatRequest) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and as token ids."""
        prompt = await self.in_thread(lambda: self._chat_prompt(request), _characters(request.messages) > HUGE)
        return prompt.text, prompt.token_ids

    async def _events(self, prepare: Callable[[], _Prompt], huge: bool) -> Events:
        if self.client.state != "ready":
            raise self.client.absent()
        self._admit()
        self._preparing += 1
        try:
            prompt = await self.in_thread(prepare, huge)
        finally:
            self._preparing -= 1
        self._check_room(len(prompt.token_ids))
        stream = _Stream(self, prompt)
        try:
            stream.begin()
            async for event in stream.events():
                yield event
        finally:
            stream.close()

    def _admit(self) -> None:
        """Overloaded if too many requests wait."""
        most = self.config.max_queue_requests
        if self.num_waiting >= most:
            raise Overloaded(
                f"{self.num_waiting} requests are waiting", f"fewer than {most}", "ask again in a few seconds"
            )

    def _check_room(self, tokens: int) -> None:
        """Overloaded if prompts of too many tokens wait. One alone may be of any length."""
        waiting, most = sum(self._waiting.values()), self.config.max_queue_tokens
        if waiting and waiting + tokens > most:
            raise Overloaded(
                f"prompts of {waiting} tokens are waiting", f"{most} at most", "ask again in a few seconds"
            )

    # ------------------------------------------------------------------ prompts, in a thread

    def _chat_prompt(self, request: ChatRequest) -> _Prompt:
        if len(request.messages) > self.max_model_len:  # the template would take long to find that out
            raise ContextError(
                "messages",
                f"{len(request.messages)} messages",
                f"a conversation of at most {self.max_model_len} tokens, of which each message takes some",
                "shorten the conversation, or start the server with a larger --max-model-len",
            )
        text, mark = rendering.render(
            self.template,
            self.tokenizer,
            request.messages,
            request.tools,
            request.chat_template_kwargs,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            special_tokens_in_content=request.special_tokens_in_content,
        )
        ids = self._fitting(
            lambda: rendering.encode(self.tokenizer, text, mark, self.max_model_len), "messages", request.params
        )
        prompt = text.replace(mark, "") if mark else text
        thinking = parse.thinking_open(prompt, self.format)
        tools = None if request.tool_choice == "none" else request.tools

        def parser() -> parse.AnswerParser:
            return parse.AnswerParser(self.format, tools, thinking, continues=request.continue_final_message)

        parser()  # RequestError for tools that are none
        calls = grammar.Calls(request.tools, request.tool_choice, request.parallel_tool_calls, self.format)
        return _Prompt(
            prompt,
            ids,
            request.params,
            request.cache_salt,
            parser,
            thinking,
            self._constraint(request.params, request.form_field, ids, calls),
            self._budget(request.thinking_token_budget),
        )

    def _constraint(
        self, params: SamplingParams, field: str, ids: list[int], calls: grammar.Calls | None = None
    ) -> grammar.ConstraintSpec | None:
        """What answers must look like. RequestError that names the field, and what cannot be enforced."""
        asked = params.structured_outputs
        assert asked is None or isinstance(asked, StructuredOutputs), "SamplingParams has made it one"
        try:
            spec = grammar.prompt_constraint(ids, self.tokenizer, asked, calls)
            if spec is None:
                return None
            self._grammars.check(spec)
        except RequestError as error:
            if error.field.startswith("structured_outputs") and field != "structured_outputs":
                raise RequestError(field, error.found, error.expected, error.todo) from None
            raise
        return spec if field == "structured_outputs" else replace(spec, field=field)

    def prepare_grammars(self) -> None:
        """Make what the first form or call needs, for as long as that takes. Once the engine is ready."""
        self._grammars.prepare()

    @cached_property
    def _grammars(self) -> grammar.Grammars:
        return grammar.Grammars(self.tokenizer, self.tokenizer.size, self._ready.eos_token_ids)

    def _budget(self, tokens: int | None) -> int | None:
        """A budget of thoughts. RequestError if it is none, or the model has no thoughts."""
        if tokens is None:
            return None
        if not 0 <= tokens < 2**31 or self.thoughts is None:
            found = f"thinking_token_budget={shown(tokens)}"
            accepted = "a whole number from 0 on" if self.thoughts else "no budget: this model has no <think>"
            raise RequestError("thinking_token_budget", found, accepted, "correct it, or leave it out")
        return tokens

    def _raw_prompt(self, request: CompletionRequest) -> _Prompt:
        prompt, params = request.prompt, request.params
        if isinstance(prompt, str):
            whole = params.truncate_prompt_tokens is None
            encode = lambda: self.tokenizer.encode(
                prompt, request.add_special_tokens, self.max_model_len if whole else None
            )
            ids = self._fitting(encode, "prompt", params)
            text = prompt
        else:
            ids = self._fitting(lambda: list(prompt), "prompt", params)
            most = self._ready.vocab_size - 1
            if not 0 <= min(ids, default=0) <= max(ids, default=0) <= most:
                found = f"token id {shown(min(ids) if min(ids) < 0 else max(ids))} in prompt"
                raise RequestError("prompt", found, f"ids from 0 to {most}", "remove that id")
            text = self.tokenizer.decode([id for id in ids if id < self.tokenizer.size], False)
        constraint = self._constraint(params, request.form_field, ids)
        return _Prompt(text, ids, params, request.cache_salt, constraint=constraint)

    def _fitting(self, encode: Callable[[], list[int]], field: str, params: SamplingParams) -> list[int]:
        """The ids of a prompt, cut as the request says. ContextError if they are too many."""
        most = self.max_model_len - 1
        try:
            ids = encode()
        except RequestError as error:
            if error.field == "prompt":  # so long that nobody has counted
                raise ContextError(field, error.found, error.expected, error.todo) from None
            raise
        keep = params.truncate_prompt_tokens
        if keep is not None:
            ids = ids[-(most if keep == -1 else keep) :]
        if len(ids) > most:
            raise ContextError(
                field,
                f"a prompt of {len(ids)} tokens",
                f"at most {most}: the context of {most + 1} tokens holds prompt and answer",
                "shorten the prompt, or start the server with a larger --max-model-len",
            )
        return ids


def _characters(messages: Sequence[dict[str, Any]]) -> int:
    """About how long a conversation is."""
    texts = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part.get("text") for text in texts if isinstance(text, list) for part in text if isinstance(part, dict)]
    return sum(len(text) for text in texts + parts if isinstance(text, str))


class _Stream:
    """One request in the engine: it takes what the engine brings (client.Receiver), and makes events of it."""

    def __init__(self, service: Service, prompt: _Prompt):
        self._service, self._prompt = service, prompt
        self._answers = [
            Answer(
                index,
                prompt.params,
                service.tokenizer,
                prompt.token_ids,
                prompt.parser() if prompt.parser is not None else None,
                service.thoughts,
                prompt.thinking,
            )
            for index in range(prompt.params.n)
        ]
        self._wake = asyncio.Event()
        self._error: GlimmerError | None = None
        self._id: int | None = None
        self._cached: int | None = None
        self._since = time.monotonic()

    def begin(self) -> None:
        """Ask the engine. Unavailable if there is none."""
        prompt = self._prompt
        self._service._waiting[self] = len(prompt.token_ids)
        self._id = self._service.client.submit(
            lambda id: wire.Submit(
                id,
                prompt.token_ids,
                wire.params_to_wire(replace(prompt.params, truncate_prompt_tokens=None)),
                prompt.cache_salt,
                prompt.constraint,
                prompt.thinking_budget,
                prompt.thinking,
            ),
            self,
        )

    def close(self) -> None:
        """Nobody wants more of it."""
        self._service._waiting.pop(self, None)
        if self._id is not None:
            for answer in self._answers:
                if not answer.done:
                    self._service.metrics.ended("abort")
        if self._id is not None:
            self._service.client.cancel(self._id)

    def put(self, delta: wire.TokenDelta) -> None:
        """As Receiver.put."""
        metrics, now = self._service.metrics, time.monotonic()
        if self._cached is None:
            self._service._waiting.pop(self, None)
            self._cached = delta.cached_tokens or 0
            metrics.prompt_tokens.inc(len(self._prompt.token_ids))
            metrics.prompt_length.observe(len(self._prompt.token_ids))
            metrics.cache_queries.inc(len(self._prompt.token_ids))
            metrics.cache_hits.inc(self._cached)
        answer = self._answers[delta.answer]
        if answer.done:
            return
        if delta.token_ids:
            metrics.generation_tokens.inc(len(delta.token_ids))
            if answer.num_tokens == 0:
                metrics.first_token.observe(now - self._since)
            else:
                metrics.between_tokens.observe((now - answer.last) / len(delta.token_ids))
            answer.last = now
        if delta.problem is not None:
            self._error = delta.problem.error()
        ended = answer.take(delta)
        if answer.stopped and self._id is not None:  # a stop string: the engine does not know
            self._service.client.cancel(self._id, delta.answer)
        if ended:
            metrics.answer_length.observe(answer.num_tokens)
            metrics.whole_request.observe(now - self._since)
            metrics.ended("error" if delta.problem is not None else answer.reason)
        if all(one.done for one in self._answers) and self._id is not None:
            self._service.client.cancel(self._id)
        self._wake.set()

    def end(self, error: GlimmerError) -> None:
        """As Receiver.end."""
        self._error = self._error or error
        self._wake.set()

    async def events(self) -> Events:
        """What there is to say, until there is nothing more."""
        started, left = False, set(range(len(self._answers)))
        while left:
            await self._wake.wait()
            self._wake.clear()
            error = self._error
            if self._cached is not None and not started:
                started = True
                yield Started(uuid4().hex, self._prompt.text, self._prompt.token_ids, self._cached)
            for index in sorted(left):
                answer = self._answers[index]
                delta = answer.news()
                if delta is not None:
                    yield delta
                if answer.finished is not None and error is None:
                    left.discard(index)
                    yield answer.finished
            if error is not None:
                raise error
        yield Done(
            Usage(
                len(self._prompt.token_ids),
                self._cached or 0,
                sum(answer.num_tokens for answer in self._answers),
                sum(answer.num_reasoning_tokens for answer in self._answers),
            )
        )
