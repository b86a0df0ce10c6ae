"""What every API does with HTTP: read a body within limits, answer with JSON, or stream until the client is gone.

Bodies are read up to a limit; large ones are parsed beside the event loop. Streams get a comment where nothing else is
to be said for a while. A client that leaves, or that reads nothing for long, is noticed at once, and its request ends.
Not here: what bodies and events hold (openai.py, ...).
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glimmer.errors import GlimmerError, RequestError
from glimmer.foreign import parse_json
from glimmer.server.failures import Failure, Refusal, failure_of, openai_shape
from glimmer.server.service import HUGE, Event, Events, Service

T = TypeVar("T")
log = logging.getLogger("glimmer.server")

LARGE = 1 << 14  # bytes of a body that is parsed beside the event loop
BODY_SECONDS = 60.0  # within which a body must have come
FIRST = 1.0  # seconds for which a stream waits with its headers, so that a refusal has a status of its own
COMMENT = b": keep-alive\n\n"


async def read_object(request: Request, service: Service) -> dict[str, Any]:
    """The JSON object in a request's body. Refusal (413) if it is too long, RequestError if it is none."""
    return await read_request(request, service, lambda value: value)


async def read_request(request: Request, service: Service, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of the JSON object in a request's body: beside the event loop, unless the body is small."""
    content = await read_body(request, service.config.max_body_bytes)
    if len(content) < LARGE:
        return make(_object(content))
    return await service.in_thread(lambda: make(_object(content)), len(content) > HUGE)


async def read_body(request: Request, limit: int) -> bytes:
    """The bytes of a request's body. Refusal (413) if there are more than `limit`."""
    too_long = Refusal(Failure(413, f"the body has more than {limit} bytes", code="request_too_large"))
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and int(said[:20]) > limit:
        raise too_long
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise too_long
                pieces.append(piece)
    except TimeoutError:
        raise Refusal(Failure(408, f"the body took more than {BODY_SECONDS:g} s", code="request_timeout")) from None
    return b"".join(pieces)


def _object(content: bytes) -> dict[str, Any]:
    value = _parse(content)
    if not isinstance(value, dict):
        raise RequestError("body", f"a body that is a JSON {type(value).__name__}", "a JSON object", "send an object")
    return value


def _parse(content: bytes) -> Any:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise RequestError("body", f"a body that is not JSON: {error}"[:300], "a JSON object", "correct it") from None
    if b"N" in content or b"I" in content or b"e" in content or b"E" in content:
        _check_finite(value)
    return value


def _check_finite(value: Any) -> None:
    """RequestError for NaN and infinity, which Python reads and JSON has not."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            rest += one.values()
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, float) and not math.isfinite(one):
            raise RequestError("body", f"{one} in the body", "numbers that JSON and a float can hold", "correct it")


def convert(value: Any, form: type[T]) -> T:
    """A JSON value as a msgspec type. RequestError names the field that does not have the form."""
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".") or "body"
        found, _, got = said.partition(", got ")
        if found.startswith("Object missing required field"):
            field = found.split("`")[1]
            raise RequestError(field, f"{field} is absent", f"a request with {field}", f"send {field}") from None
        raise RequestError(
            field.partition("[")[0].partition(".")[0] if field.startswith(("messages", "tools")) else field,
            f"{field} is {got.strip('`') or 'not accepted'}",
            found.removeprefix("Expected ").replace("`", "").replace("null", "null") or "another value",
            f"correct {field}",
        ) from None


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, as msgspec writes it."""
    return Response(msgspec.json.encode(content), status, dict(headers or {}), "application/json")


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def begun(events: Events) -> AsyncGenerator[Event, None]:
    """The same events. Whatever stops the first one within FIRST seconds is raised here, before there is a response."""
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=FIRST)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await events.aclose()
        raise

    async def all_of_them() -> AsyncGenerator[Event, None]:
        async with aclosing(events):
            try:
                yield await first
            finally:
                first.cancel()
            async for event in events:
                yield event

    return all_of_them()


class EventStream(Response):
    """Server-sent events. chunks: bytes of one event or several; they are closed when the client is gone.

    pulse: what stands in for silence.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], service: Service, pulse: bytes = COMMENT):
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._keep_alive, self._silence = chunks, service.config.keep_alive, pulse
        self._stalled = service.config.stalled_client
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        self._send = send
        pump = asyncio.ensure_future(self._pump())
        others = [asyncio.ensure_future(self._pulse()), asyncio.ensure_future(_gone(receive))]
        try:
            await asyncio.wait({pump, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (pump, *others):
                one.cancel()
            with suppress(asyncio.CancelledError, TimeoutError, OSError):
                await pump
            await self._chunks.aclose()

    async def _pump(self) -> None:
        first = asyncio.ensure_future(anext(self._chunks, b""))
        try:
            await asyncio.sleep(0)  # an iterator that has not begun could not be closed
            await self._say({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._say({"type": "http.response.body", "body": await first, "more_body": True})
        finally:
            first.cancel()
            await asyncio.wait({first})
        async for chunk in self._chunks:
            await self._say({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._say({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pulse(self) -> None:
        """A comment now and then, so that neither the client nor a proxy takes the connection for dead."""
        while True:
            await asyncio.sleep(max(self._last + self._keep_alive - time.monotonic(), 0.01))
            if time.monotonic() - self._last >= self._keep_alive:
                await self._say({"type": "http.response.body", "body": self._silence, "more_body": True})

    async def _say(self, message: dict[str, Any]) -> None:
        """Send a part of the response. TimeoutError if the client reads nothing for too long."""
        async with asyncio.timeout(self._stalled):
            await self._send(message)
        self._last = time.monotonic()


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def chunks_of(parts: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    """Values as events without a name, as OpenAI's chat completions have them, with [DONE] at the end.

    An error is the last event, in OpenAI's shape.
    """
    async with aclosing(parts):
        try:
            async for part in parts:
                yield b"data: " + msgspec.json.encode(part) + b"\n\n"
        except Exception as error:
            yield b"data: " + msgspec.json.encode(openai_shape(told(error))) + b"\n\n"
            return
    yield b"data: [DONE]\n\n"


async def named_events(
    parts: AsyncGenerator[dict[str, Any], None], failed: Callable[[Failure], Iterable[dict[str, Any]]]
) -> AsyncGenerator[bytes, None]:
    """Values as events that have the name of their type. After an error come those that `failed` makes of it."""
    async with aclosing(parts):
        try:
            async for part in parts:
                yield _named(part)
        except Exception as error:
            for part in failed(told(error)):
                yield _named(part)


def _named(part: dict[str, Any]) -> bytes:
    name: str = part["type"]
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(part) + b"\n\n"


def told(error: Exception) -> Failure:
    """The failure to be told within a stream. What nobody has foreseen goes to the log."""
    failure = failure_of(error)
    if failure.status == 500:
        log.error("a stream has failed: %s", error, exc_info=None if isinstance(error, GlimmerError) else error)
    return failure
