"""OpenAI's API: chat completions, completions, models, and the tokens of a text. It translates, and does nothing else.

A stream begins with a chunk that has the role, goes on with pieces of reasoning (under both names that clients look
for), of text and of tool calls, and ends for each answer with an empty delta that has the finish_reason. Not here: what
the fields may be (openai_types.py), the answers themselves (service.py).
"""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence, Sized
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimmer.config import SamplingParams, StructuredOutputs
from glimmer.errors import RequestError, shown
from glimmer.server.answer import Delta, Finished, Place
from glimmer.server.exchange import EventStream, begun, chunks_of, convert, json_response, read_request, until_gone
from glimmer.server.openai_types import (
    CHAT_REFUSED,
    ChatBody,
    Sampling,
    refuse_unsupported,
)
from glimmer.server.service import ChatRequest, Done, Event, Events, Service, Started, Usage
from glimmer.text import parse
from glimmer.text.chat import template_kwargs

router = APIRouter()
Chunk = dict[str, Any]

NO_EFFORT = ("none", "minimal")  # of reasoning_effort: the model answers without thinking
IGNORED_FORMS = {"_backend", "backend", "disable_fallback"}  # vLLM's choice among its libraries
LOWEST = -9999.0  # in place of minus infinity, which JSON has not


# ---------------------------------------------------------------------- chat completions


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service

    def read(raw: Chunk) -> tuple[ChatBody, ChatRequest]:
        refuse_unsupported(raw, "/v1/chat/completions", CHAT_REFUSED)
        body = convert(raw, ChatBody)
        return body, chat_request(body, service)

    body, asked = await read_request(request, service, read)
    events = service.chat(asked)
    head = Head("chatcmpl", "chat.completion", service)
    if body.stream:
        return EventStream(chunks_of(_chat_chunks(await begun(events), head, body)), service)
    return json_response(await until_gone(request, _chat_answer(events, head, body)))


def chat_request(body: ChatBody, service: Service) -> ChatRequest:
    """What a body asks for. RequestError names the field at fault."""
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = _chat_logprobs(body, service)
    thinking = None if body.thinking is None else msgspec.structs.asdict(body.thinking)
    kwargs = template_kwargs(body.chat_template_kwargs, thinking)
    if body.reasoning_effort is not None:
        kwargs.setdefault("enable_thinking", body.reasoning_effort not in NO_EFFORT)
    given = body.continue_final_message or False
    prompt = body.add_generation_prompt if body.add_generation_prompt is not None else not given
    return ChatRequest(
        messages=body.messages,
        params=sampling_params(body, service, max_tokens=limit, logprobs=logprobs),
        tools=body.tools or None,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        chat_template_kwargs=kwargs,
        add_generation_prompt=prompt,
        continue_final_message=given,
        special_tokens_in_content=body.special_tokens_in_content or "control",
        thinking_token_budget=body.thinking_token_budget,
        cache_salt=body.cache_salt or "",
        form_field=structured_outputs(body)[1],
    )


def _chat_logprobs(body: ChatBody, service: Service) -> int | None:
    if body.top_logprobs and not body.logprobs:
        found = f"top_logprobs={body.top_logprobs} without logprobs"
        raise RequestError("top_logprobs", found, "top_logprobs with logprobs: true", "add logprobs: true")
    if not body.logprobs:
        return None
    return _at_most(service.config.max_logprobs, "top_logprobs", body.top_logprobs or 0)


def sampling_params(
    body: Sampling,
    service: Service,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The sampling parameters of a body, with the model's own in place of what it does not say."""
    names = (
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
        "allowed_token_ids", "bad_words", "skip_special_tokens", "truncate_prompt_tokens",
    )  # fmt: skip
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    given["structured_outputs"] = structured_outputs(body)[0]
    _at_most(service.config.max_answers, "n", body.n or 1)
    for name in ("logit_bias", "allowed_token_ids"):
        _no_longer_than(service.vocab_size, name, getattr(body, name) or ())
    given["logit_bias"] = {_token_id(id): bias for id, bias in (body.logit_bias or {}).items()}
    given |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    return SamplingParams(**service.defaults | given)


def structured_outputs(body: Sampling) -> tuple[StructuredOutputs | None, str]:
    """The form that the answer shall have, and the field that asks for it. RequestError if several do, or none can."""
    forms: dict[str, dict[str, Any]] = {}
    wanted = body.response_format or {}
    kind = wanted.get("type")
    if kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema", described.get("schema_")) if isinstance(described, dict) else None
        if not isinstance(schema, dict | bool):
            found = f"response_format.json_schema={shown(described)}"
            raise RequestError("response_format", found, '{"name": ..., "schema": {...}}', "add the schema")
        forms["response_format"] = {"json": schema}
    elif kind == "json_object":
        forms["response_format"] = {"json_object": True}
    elif body.response_format is not None and kind != "text":
        found = f"response_format.type={shown(kind)}"
        raise RequestError("response_format", found, "text, json_object or json_schema", "choose one of these")
    if body.structured_outputs is not None:
        given = {name: value for name, value in body.structured_outputs.items() if value not in (None, False)}
        if unknown := sorted(given.keys() - {field.name for field in fields(StructuredOutputs)} - IGNORED_FORMS):
            accepted = ", ".join(field.name for field in fields(StructuredOutputs))
            raise RequestError("structured_outputs", f"structured_outputs.{unknown[0]}", accepted, "correct the name")
        forms["structured_outputs"] = {name: value for name, value in given.items() if name not in IGNORED_FORMS}
    for name in ("json", "regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{name}")) is not None:
            forms[f"guided_{name}"] = {name: value}
    if len(forms) > 1:
        raise RequestError([*forms][1], f"{' and '.join(forms)}", "one of them", "leave the others out")
    for name, form in forms.items():
        try:
            return StructuredOutputs(**form), name
        except RequestError as error:
            raise RequestError(name, error.found, error.expected, error.todo) from None
    return None, "structured_outputs"


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError("logit_bias", f"logit_bias for {shown(text)}", "token ids as keys", "correct logit_bias")
    return int(text)


def _no_longer_than(most: int, name: str, value: Sized) -> None:
    if len(value) > most:
        found, accepted = f"{name} of {len(value)} tokens", f"{most} at most, as many as the vocabulary has"
        raise RequestError(name, found, accepted, f"shorten {name}")


def _at_most(most: int, name: str, value: int) -> int:
    if not 0 <= value <= most:
        raise RequestError(name, f"{name}={shown(value)}", f"at most {most}", f"lower {name}, or start the server anew")
    return value


class UsageSoFar:
    """`usage` of each chunk of a stream: None, the tokens so far (continuous_usage_stats), or no such field at all."""

    def __init__(self, body: Sampling):
        asked = body.stream_options
        self._chunks = usage_wanted(body)
        self._continuous = self._chunks and asked is not None and bool(asked.continuous_usage_stats)
        self._prompts: dict[int, Started] = {}
        self._answers: dict[int, Delta] = {}

    def after(self, event: Event) -> Chunk:
        """The field, after an event."""
        if isinstance(event, Started):
            self._prompts[event.index] = event
        elif isinstance(event, Delta):
            self._answers[event.index] = event
        if not self._continuous:
            return {"usage": None} if self._chunks else {}
        usage = Usage(
            sum(len(one.prompt_token_ids) for one in self._prompts.values()),
            sum(one.cached_tokens for one in self._prompts.values()),
            sum(one.num_tokens for one in self._answers.values()),
            sum(one.num_reasoning_tokens for one in self._answers.values()),
        )
        return {"usage": usage_of(usage)}


def usage_wanted(body: Sampling) -> bool:
    """Whether a stream ends with the numbers of tokens."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


@dataclass
class Head:
    """What all chunks of a response begin with."""

    prefix: str
    object: str
    service: Service
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __call__(self, choices: list[Chunk], chunk: bool = False, **others: Any) -> Chunk:
        """A response, or a chunk of one."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.object + (".chunk" if chunk and self.prefix == "chatcmpl" else ""),
            "created": self.created,
            "model": self.service.names[0],
            "choices": choices,
            **others,
        }


def usage_of(usage: Usage) -> Chunk:
    """Usage in OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


async def _chat_chunks(events: Events, head: Head, body: ChatBody) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stream."""
    so_far = UsageSoFar(body)
    n = body.n or 1
    async with aclosing(events):
        async for event in events:
            others = so_far.after(event)
            if isinstance(event, Delta):
                deltas = [delta for one in event.events for delta in _delta(one)]
                logprobs = {"content": chat_logprobs(event.logprobs, body)} if body.logprobs else None
                for number, delta in enumerate(deltas or ([{}] if logprobs else [])):
                    choice = _choice(event.index, delta, logprobs if number == 0 else None)
                    yield head([choice], chunk=True, **others)
            elif isinstance(event, Finished):
                choice = _choice(event.index, {}, None, event)
                yield head([choice], chunk=True, **others)
            elif isinstance(event, Done):
                if usage_wanted(body):
                    yield head([], chunk=True, usage=usage_of(event.usage))
            else:
                for index in range(n):
                    yield head([_choice(index, {"role": "assistant", "content": ""}, None)], chunk=True, **others)


def _choice(index: int, delta: Chunk, logprobs: Chunk | None, finished: Finished | None = None) -> Chunk:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finished and finished.reason}
    return choice | ({"stop_reason": finished.stop_reason} if finished else {})


def _delta(event: parse.Event) -> Iterator[Chunk]:
    """An event of the parser as OpenAI's delta."""
    if isinstance(event, parse.ReasoningDelta):
        yield {"reasoning_content": event.text, "reasoning": event.text}
    elif isinstance(event, parse.TextDelta):
        yield {"content": event.text}
    elif isinstance(event, parse.ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        yield {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
    elif isinstance(event, parse.ToolCallDelta):
        yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}


def chat_logprobs(places: Sequence[Place], body: ChatBody) -> list[Chunk]:
    """Log-probabilities in the form of chat completions."""
    most = body.top_logprobs or 0
    rows = []
    for place in places:
        top = sorted((one for one in place if one.rank <= most), key=lambda one: one.rank)
        rows.append(_logprob(place[0]) | {"top_logprobs": [_logprob(one) for one in top]})
    return rows


def _logprob(one: Any) -> Chunk:
    return {"token": one.text, "logprob": max(one.logprob, LOWEST), "bytes": list(one.bytes)}


async def _chat_answer(events: Events, head: Head, body: ChatBody) -> Chunk:
    """The whole response."""
    parts: dict[int, list[parse.Event]] = {index: [] for index in range(body.n or 1)}
    logprobs: dict[int, list[Chunk]] = {index: [] for index in parts}
    finished: dict[int, Finished] = {}
    usage: Chunk = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                parts[event.index] += event.events
                if body.logprobs:
                    logprobs[event.index] += chat_logprobs(event.logprobs, body)
            elif isinstance(event, Finished):
                finished[event.index] = event
            elif isinstance(event, Done):
                usage = usage_of(event.usage)
    choices = [
        {
            "index": index,
            "message": message_of(parse.collect(parts[index])),
            "logprobs": {"content": logprobs[index]} if body.logprobs else None,
            "finish_reason": finished[index].reason,
            "stop_reason": finished[index].stop_reason,
        }
        for index in parts
    ]
    return head(choices, usage=usage)


def message_of(answer: parse.ParsedAnswer) -> Chunk:
    """An answer as a message of the assistant."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.tool_calls
    ]
    message: Chunk = {"role": "assistant", "content": answer.content or (None if calls else "")}
    reasoning = answer.reasoning or None
    message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return message | ({"tool_calls": calls} if calls else {})


# ---------------------------------------------------------------------- models


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The model, under each of its names."""
    service: Service = request.app.state.service
    return json_response({"object": "list", "data": [_model(name, service) for name in service.names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """The model, under any name."""
    return json_response(_model(name, request.app.state.service))


def _model(name: str, service: Service) -> Chunk:
    ready = service.client.ready
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "glimmer",
        "root": service.model,
        "parent": None,
        "max_model_len": None if ready is None else ready.max_model_len,
    }
