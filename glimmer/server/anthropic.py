"""Anthropic's API: Messages, streaming and not, and the tokens of a conversation. It translates, and does nothing else.

A stream is message_start, then blocks of thinking, text and tool_use in the order in which they come, each with start,
deltas and stop, then message_delta with the reason and the usage, and message_stop. A ping stands in for silence. The
whole answer is the same events put together. A call that was cut off has no complete input: a stream has its beginning,
a whole answer holds that text under INVALID_JSON, which is Anthropic's own convention.
Not here: what a request may hold (anthropic_types.py), the answers themselves (service.py).
"""

import hashlib
import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimmer.server.answer import Delta, Finished
from glimmer.server.anthropic_types import (
    WORDS,
    CountBody,
    MessagesBody,
    chat_request,
    refuse_unsupported,
)
from glimmer.server.exchange import EventStream, begun, convert, json_response, named_events, read_request, until_gone
from glimmer.server.failures import SHAPES, Failure
from glimmer.server.service import ChatRequest, Done, Events, Service, Started, Usage
from glimmer.server.turns import events_in, seal, told_in
from glimmer.text import parse

router = APIRouter()
Json = dict[str, Any]

PING = b'event: ping\ndata: {"type": "ping"}\n\n'
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


@router.post("/v1/messages")
async def messages(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service

    def read(raw: Json) -> tuple[MessagesBody, ChatRequest]:
        refuse_unsupported(raw)
        body = convert(raw, MessagesBody)
        with told_in(WORDS):
            return body, chat_request(body, service)

    body, asked = await read_request(request, service, read)
    writer = _Writer(service, omit=body.thinking is not None and body.thinking.display == "omitted")
    events = events_in(WORDS, service.chat(asked))
    if body.stream:
        parts = writer.parts(await begun(events))
        return EventStream(named_events(parts, lambda failure: [anthropic_shape(failure)]), service, PING)
    return json_response(await until_gone(request, _whole(writer.parts(events))))


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has as a prompt."""
    service: Service = request.app.state.service

    def read(raw: Json) -> ChatRequest:
        refuse_unsupported(raw)
        asked = {name: value for name, value in raw.items() if name in CountBody.__struct_fields__}
        with told_in(WORDS):
            return chat_request(convert(asked | {"max_tokens": 1}, MessagesBody), service)

    asked = await read_request(request, service, read)
    with told_in(WORDS):
        _, token_ids = await service.render(asked)
    return json_response({"input_tokens": len(token_ids)})


def anthropic_shape(failure: Failure) -> Json:
    """{"type": "error", "error": {"type", "message"}, "request_id"}"""
    kind = KINDS.get(failure.status, "api_error" if failure.status >= 500 else "invalid_request_error")
    message = failure.message
    if failure.code == "context_length_exceeded":
        # Claude Code makes room for more when it reads these words, and the numbers where they are known.
        sizes = re.search(r"(\d+) tokens\. Expected: at most (\d+)", message)
        known = f"{sizes[1]} tokens > {sizes[2]} maximum. " if sizes else ""
        message = f"prompt is too long: {known}{message}"
    elif failure.param is not None:
        message = f"{failure.param}: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": f"req_{uuid4().hex}"}


SHAPES["/v1/messages"] = anthropic_shape


# ---------------------------------------------------------------------- the answer


class _Writer:
    """Makes the events of a stream. omit: thoughts are not shown, and the signature holds them."""

    def __init__(self, service: Service, omit: bool):
        self._service, self._omit = service, omit
        self._index = -1  # of the block that has come last
        self._open: str | None = None  # its kind, while more of it may come
        self._thoughts: list[str] = []

    async def parts(self, events: Events) -> AsyncGenerator[Json, None]:
        """The events of Anthropic's stream."""
        finished: Finished | None = None
        async with aclosing(events):
            async for event in events:
                match event:
                    case Started():
                        yield {"type": "message_start", "message": self._message(event)}
                    case Delta():
                        for one in event.events:
                            for part in self._parts(one):
                                yield part
                    case Finished():
                        finished = event
                        for part in self._close():
                            yield part
                    case Done(usage):
                        assert finished is not None, "an answer ends before the request does"
                        yield self._end(finished, usage)
                        yield {"type": "message_stop"}

    def _message(self, started: Started) -> Json:
        """The message before it has content."""
        usage = Usage(len(started.prompt_token_ids), started.cached_tokens, 0, 0)
        return {
            "id": f"msg_{started.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._service.names[0],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _end(self, finished: Finished, usage: Usage) -> Json:
        """Why the answer has ended, and its tokens."""
        by = finished.stop_reason if isinstance(finished.stop_reason, str) else None
        reason = REASONS[finished.reason] if by is None else "stop_sequence"
        return {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": by},
            "usage": _usage(usage),
        }

    def _parts(self, event: parse.Event) -> Iterator[Json]:
        """What an event of the parser adds."""
        match event:
            case parse.ReasoningDelta(text):
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                self._thoughts.append(text)
                if not self._omit:
                    yield self._delta({"type": "thinking_delta", "thinking": text})
            case parse.TextDelta(text):
                yield from self._begin({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case parse.ToolCallStart(_, id, name):
                yield from self._close()
                yield from self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
            case parse.ToolCallDelta(_, arguments):
                yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            case parse.ToolCallEnd():
                yield from self._close()

    def _begin(self, block: Json) -> Iterator[Json]:
        """Open a block, unless it is open already."""
        if self._open != block["type"]:
            yield from self._close()
            self._index, self._open = self._index + 1, block["type"]
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close(self) -> Iterator[Json]:
        """End the block that is open."""
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": self._signature()})
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _signature(self) -> str:
        """Of the block of thoughts that ends: its text if it was not shown, else a digest."""
        text, self._thoughts = "".join(self._thoughts), []
        return seal(text) if self._omit else hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _usage(usage: Usage) -> Json:
    """Usage in Anthropic's words: what came from the cache is not among input_tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


async def _whole(parts: AsyncGenerator[Json, None]) -> Json:
    """The whole message, put together from its events."""
    message: Json = {}
    pieces: dict[str, list[str]] = {}
    async with aclosing(parts):
        async for part in parts:
            match part["type"]:
                case "message_start":
                    message = part["message"]
                case "content_block_start":
                    message["content"].append(part["content_block"])
                    pieces = {}
                case "content_block_delta":
                    [(name, text)] = [item for item in part["delta"].items() if item[0] != "type"]
                    pieces.setdefault(name, []).append(text)
                case "content_block_stop":
                    texts = {name: "".join(some) for name, some in pieces.items()}
                    if (arguments := texts.pop("partial_json", None)) is not None:
                        message["content"][-1]["input"] = _input(arguments)
                    message["content"][-1] |= texts
                case "message_delta":
                    message |= part["delta"] | {"usage": part["usage"]}
    return message


def _input(arguments: str) -> Json | msgspec.Raw:
    """The input of a call, as the model wrote it; the text that has come of it where it was cut off."""
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return {"INVALID_JSON": arguments}
    return msgspec.Raw(arguments.encode())
