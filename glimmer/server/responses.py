"""OpenAI's Responses: answers as items, streaming and not, that later requests may go on from. It translates only.

A stream is response.created and response.in_progress, then items of reasoning, message and calls in the order in which
they come, each added, told piece by piece and done, and at last response.completed, response.incomplete (the limit of
tokens was reached) or response.failed. The whole response is the one that the last event carries.
Thoughts come as reasoning_text; where reasoning.summary asks for a summary, as its text, unshortened, in place of that.
Not here: what a request may hold (responses_types.py), what is kept (responses_store.py), the answers (service.py).
"""

import json
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimmer.errors import RequestError, shown
from glimmer.server.answer import Delta, Finished
from glimmer.server.exchange import EventStream, begun, convert, json_response, named_events, read_request, until_gone
from glimmer.server.failures import Failure, Refusal
from glimmer.server.responses_store import ResponseStore, Stored
from glimmer.server.responses_types import (
    Called,
    ResponsesBody,
    Tools,
    chat_request,
    items_of,
    refuse_unsupported,
    tools_of,
)
from glimmer.server.service import ChatRequest, Done, Events, Service, Usage
from glimmer.server.turns import Json, events_in, seal, told_in
from glimmer.text import parse

router = APIRouter()
MAX_ITEMS = 100  # that are listed at once


@dataclass
class Asked:
    """A request that has been read. items: its whole input, with that of the responses before it."""

    body: ResponsesBody
    items: list[Json]
    tools: Tools
    chat: ChatRequest


@router.post("/v1/responses")
async def create(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    asked = await _read(request)
    writer = _Writer(service, asked, _store(request))
    events = events_in(asked.tools.words, service.chat(asked.chat))
    if asked.body.stream:
        return EventStream(named_events(writer.parts(await begun(events)), writer.failed), service)
    return json_response(await until_gone(request, _whole(writer.parts(events))))


@router.post("/v1/responses/input_tokens")
async def input_tokens(request: Request) -> Response:
    """How many tokens a conversation has as a prompt."""
    service: Service = request.app.state.service
    asked = await _read(request)
    with told_in(asked.tools.words):
        _, token_ids = await service.render(asked.chat)
    return json_response({"object": "response.input_tokens", "input_tokens": len(token_ids)})


@router.get("/v1/responses/{id}")
async def retrieve(request: Request, id: str, stream: str = "false") -> Response:
    """A response that has been kept."""
    if stream.lower() not in ("false", "0", ""):
        raise RequestError("stream", f"stream={shown(stream)}", "false: the response is complete", "leave it out")
    return Response(_stored(request, id, "id").response, media_type="application/json")


@router.get("/v1/responses/{id}/input_items")
async def input_items(request: Request, id: str, limit: str = "20", order: str = "desc", after: str = "") -> Response:
    """The items that a response has answered, the last ones first unless `order` is asc."""
    service: Service = request.app.state.service
    most = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 4 else 0
    if not 1 <= most <= MAX_ITEMS:
        raise RequestError("limit", f"limit={shown(limit)}", f"a number from 1 to {MAX_ITEMS}", "correct limit")
    if order not in ("asc", "desc"):
        raise RequestError("order", f"order={shown(order)}", "asc or desc", "choose one of these")
    stored = _stored(request, id, "id")
    items: list[Json] = await service.in_thread(lambda: json.loads(stored.items))
    items = items if order == "asc" else items[::-1]
    ids = [str(item["id"]) for item in items]
    if after and after not in ids:
        raise RequestError("after", f"after={shown(after)}", "the id of an item of this response", "correct after")
    start = ids.index(after) + 1 if after else 0
    page = slice(start, start + most)
    return json_response(
        {
            "object": "list",
            "data": items[page],
            "first_id": next(iter(ids[page]), None),
            "last_id": next(iter(ids[page][::-1]), None),
            "has_more": start + most < len(items),
        }
    )


@router.delete("/v1/responses/{id}")
async def delete(request: Request, id: str) -> Response:
    """Forget a response."""
    if not _store(request).drop(id):
        raise _absent(id, "id")
    return json_response({"id": id, "object": "response", "deleted": True})


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _stored(request: Request, id: str, field: str) -> Stored:
    """A response that has been kept. Refusal (404) if there is none."""
    stored = _store(request).get(id)
    if stored is None:
        raise _absent(id, field)
    return stored


def _absent(id: str, field: str) -> Refusal:
    code = "previous_response_not_found" if field == "previous_response_id" else "not_found"
    message = f"no response {shown(id)}: it was not stored, has been deleted, or has not been asked for in a while"
    return Refusal(Failure(404, message, param=field, code=code))


async def _read(request: Request) -> Asked:
    """What a request asks for. RequestError, or Refusal (404) for a response before it that is not known."""
    service: Service = request.app.state.service

    def read(raw: Json) -> ResponsesBody:
        refuse_unsupported(raw)
        return convert(raw, ResponsesBody)

    body = await read_request(request, service, read)

    def asked() -> Asked:
        earlier, own = _earlier(request, body.previous_response_id), items_of(body)
        tools = tools_of(body, own)
        with told_in(tools.words):
            return Asked(body, [*earlier, *own], tools, chat_request(body, earlier, own, tools, service))

    return await service.in_thread(asked)


def _earlier(request: Request, id: str | None) -> list[Json]:
    """The input and the output of a response."""
    if id is None:
        return []
    stored = _stored(request, id, "previous_response_id")
    return [*json.loads(stored.items), *json.loads(stored.response)["output"]]


async def _whole(parts: AsyncGenerator[Json, None]) -> Json:
    """The whole response: what the last event carries."""
    response: Json = {}
    async with aclosing(parts):
        async for part in parts:
            response = part.get("response", response)
    return response


# ---------------------------------------------------------------------- the answer


class _Writer:
    """Makes the events of a stream, and keeps the response that they tell."""

    def __init__(self, service: Service, asked: Asked, store: ResponseStore):
        self._service, self._asked, self._store = service, asked, store
        body = asked.body
        self._sealed = "reasoning.encrypted_content" in (body.include or ())
        self._summary = bool(body.reasoning and (body.reasoning.summary or body.reasoning.generate_summary))
        self._number = 0  # of the next event
        self._item: Json | None = None  # the item that is being told
        self._texts: list[str] = []  # what has come of it
        self._response = self._beginning()

    def _beginning(self) -> Json:
        """The response before there is an answer."""
        body, chat = self._asked.body, self._asked.chat
        text, reasoning = body.text, body.reasoning
        return {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self._service.names[0],
            "output": [],
            "parallel_tool_calls": chat.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {
                "effort": reasoning and reasoning.effort,
                "summary": reasoning and (reasoning.summary or reasoning.generate_summary),
            },
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": chat.params.temperature,
            "text": {
                "format": (text and text.format) or {"type": "text"},
                "verbosity": (text and text.verbosity) or "medium",
            },
            "tool_choice": body.tool_choice or "auto",
            "tools": self._asked.tools.offered,
            "top_logprobs": 0,
            "top_p": chat.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }

    async def parts(self, events: Events) -> AsyncGenerator[Json, None]:
        """The events of the stream."""
        finished: Finished | None = None
        async with aclosing(events):
            yield self._told("response.created")
            yield self._told("response.in_progress")
            async for event in events:
                match event:
                    case Delta():
                        for one in event.events:
                            for part in self._parts(one):
                                yield part
                    case Finished():
                        finished = event
                        for part in self._close(complete=event.reason != "length"):
                            yield part
                    case Done(usage):
                        assert finished is not None, "an answer ends before the request does"
                        yield await self._end(finished, usage)

    def failed(self, failure: Failure) -> Iterable[Json]:
        """The event for an answer that cannot go on."""
        code = "server_error"  # OpenAI's words for it: after this one, clients ask again
        if failure.status == 400:
            code = failure.code if failure.code == "context_length_exceeded" else "invalid_prompt"
        self._response |= {"status": "failed", "error": {"code": code, "message": failure.message}}
        return [self._told("response.failed")]

    async def _end(self, finished: Finished, usage: Usage) -> Json:
        """The last event. The response is kept before it is told."""
        cut = finished.reason == "length"
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": _usage(usage),
        }
        if self._response["store"]:
            await self._service.in_thread(self._keep)
        return self._told("response.incomplete" if cut else "response.completed")

    def _keep(self) -> None:
        items = [{"id": _new_id("msg"), **item} for item in self._asked.items]
        self._store.keep(self._response["id"], msgspec.json.encode(self._response), msgspec.json.encode(items))

    # ------------------------------------------------------------------ items

    def _parts(self, event: parse.Event) -> Iterator[Json]:
        """What an event of the parser adds."""
        match event:
            case parse.ReasoningDelta(text):
                yield from self._open("reasoning")
                yield self._piece(text)
            case parse.TextDelta(text):
                yield from self._open("message")
                yield self._piece(text)
            case parse.ToolCallStart(_, id, name):
                yield from self._close()
                called = self._asked.tools.called.get(name, Called(name))
                item = {"call_id": id, "name": called.name}
                if called.namespace is not None:
                    item["namespace"] = called.namespace
                yield from self._open("custom_tool_call" if called.custom else "function_call", **item)
            case parse.ToolCallDelta(_, arguments):
                assert self._item is not None, "a call begins before its arguments do"
                if self._item["type"] == "function_call":
                    yield self._piece(arguments)
                else:
                    self._texts.append(arguments)  # JSON, of which a custom tool's input is a part
            case parse.ToolCallEnd():
                yield from self._close()

    def _open(self, kind: str, **fields: Any) -> Iterator[Json]:
        """Begin an item, unless it has begun."""
        if self._item is not None and self._item["type"] == kind:
            return
        yield from self._close()
        item: Json = {"id": _new_id(_PREFIXES[kind]), "type": kind, "status": "in_progress"}
        match kind:
            case "reasoning":
                item |= {"summary": [], "encrypted_content": None} | ({} if self._summary else {"content": []})
            case "message":
                item |= {"role": "assistant", "content": []}
            case "function_call":
                item |= fields | {"arguments": ""}
            case _:
                item |= fields | {"input": ""}
        self._item, self._texts = item, []
        self._response["output"].append(item)
        yield self._of_item("response.output_item.added", item=item)
        if added := self._part_events("added", ""):
            yield added

    def _piece(self, text: str) -> Json:
        """More of the item."""
        assert self._item is not None, "an item begins before its text does"
        self._texts.append(text)
        return self._of_item(f"{self._name}.delta", delta=text, **self._place)

    def _close(self, complete: bool = True) -> Iterator[Json]:
        """End the item that is being told, if there is one. A call ends with its own event, else it is cut off."""
        item, text = self._item, "".join(self._texts)
        if item is None:
            return
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                yield self._of_item(f"{self._name}.done", arguments=text, name=item["name"])
            case "custom_tool_call":
                item["input"] = text = _input(text)
                yield self._of_item(f"{self._name}.delta", delta=text)
                yield self._of_item(f"{self._name}.done", input=text)
            case kind:
                yield self._of_item(f"{self._name}.done", text=text, **self._place)
                if done := self._part_events("done", text):
                    yield done
                item["summary" if kind == "reasoning" and self._summary else "content"] = [self._part(text)]
                if kind == "reasoning" and self._sealed:
                    item["encrypted_content"] = seal(text)
        item["status"] = "completed" if complete else "incomplete"
        yield self._of_item("response.output_item.done", item=item)
        self._item = None

    @property
    def _name(self) -> str:
        """What the events of the item's text are called."""
        assert self._item is not None, "an item is being told"
        return {
            "reasoning": "response.reasoning_summary_text" if self._summary else "response.reasoning_text",
            "message": "response.output_text",
            "function_call": "response.function_call_arguments",
            "custom_tool_call": "response.custom_tool_call_input",
        }[self._item["type"]]

    @property
    def _place(self) -> Json:
        """Where the text stands in its item."""
        assert self._item is not None, "an item is being told"
        match self._item["type"]:
            case "reasoning":
                return {"summary_index": 0} if self._summary else {"content_index": 0}
            case "message":
                return {"content_index": 0, "logprobs": []}
        return {}

    def _part(self, text: str) -> Json:
        """The part of an item that holds its text."""
        assert self._item is not None, "an item is being told"
        if self._item["type"] == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "summary_text" if self._summary else "reasoning_text", "text": text}

    def _part_events(self, what: str, text: str) -> Json | None:
        """The event that begins or ends the part of an item; calls have no parts."""
        place = {name: value for name, value in self._place.items() if name != "logprobs"}
        if not place:
            return None
        kind = "response.reasoning_summary_part" if "summary_index" in place else "response.content_part"
        return self._of_item(f"{kind}.{what}", part=self._part(text), **place)

    # ------------------------------------------------------------------ events

    def _of_item(self, type: str, **fields: Any) -> Json:
        """An event about the item."""
        assert self._item is not None, "an item is being told"
        ids = {} if "item" in fields else {"item_id": self._item["id"]}
        return self._event(type, output_index=len(self._response["output"]) - 1, **ids, **fields)

    def _told(self, type: str) -> Json:
        """An event about the response."""
        return self._event(type, response=self._response)

    def _event(self, type: str, **fields: Any) -> Json:
        self._number += 1
        return {"type": type, "sequence_number": self._number - 1, **fields}


_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"


def _input(arguments: str) -> str:
    """The input of a custom tool; the text that has come of the call where it was cut off."""
    try:
        return str(json.loads(arguments)["input"])
    except (ValueError, KeyError):
        return arguments


def _usage(usage: Usage) -> Json:
    """Usage in the words of Responses."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
