"""The FastAPI application: what there is to ask, and the shape of every refusal.

Each API has a file with its routes; this one joins them, and adds what all servers have: health, version, the page.
Not here: sockets and processes (http_process.py), who may ask (access.py).
"""

import logging

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from glimmer import __version__
from glimmer.errors import GlimmerError
from glimmer.server import anthropic, completions, openai, page, responses
from glimmer.server.access import AccessCheck
from glimmer.server.exchange import json_response
from glimmer.server.failures import Failure, Refusal, failure_of, shape_for
from glimmer.server.responses_store import ResponseStore
from glimmer.server.schema import describe
from glimmer.server.service import Service
from glimmer.server.settings import Keys

log = logging.getLogger("glimmer.server")


def make_app(service: Service) -> FastAPI:
    """The application. Raises ConfigError if a file of keys cannot be read."""
    config = service.config
    keys = Keys(config.api_key or ())
    app = FastAPI(
        title="glimmer",
        version=__version__,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.state.service = service
    app.include_router(openai.router)
    app.include_router(completions.router)
    app.include_router(anthropic.router)
    app.include_router(responses.router)
    app.state.responses = ResponseStore(config.max_stored_bytes)
    _add_general(app, service)
    page.mount(app)
    for kind in (GlimmerError, Refusal, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_middleware(AccessCheck, config=config, keys=keys)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    if config.prefix:
        app.add_middleware(WithoutPrefix, prefix=config.prefix)
    return app


class WithoutPrefix:
    """Takes the prefix off a request's path where the proxy has left it there: all else knows paths without it."""

    def __init__(self, app: ASGIApp, prefix: str):
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it. The prefix alone leads to the page, whose files are named relatively to the slash."""
        path = scope.get("path", "")
        if path == self._prefix:
            return await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
        if path.startswith(f"{self._prefix}/"):
            path = path.removeprefix(self._prefix)
        await self._app({**scope, "path": path, "root_path": self._prefix}, receive, send)


def _add_general(app: FastAPI, service: Service) -> None:
    """What says how the server is."""

    @app.get("/health")
    async def health() -> Response:
        """200 where requests are answered; 503 while the model is being loaded, and when there is no engine."""
        state = service.client.state
        if state == "ready":
            return json_response({"status": "ok"})
        return json_response({"status": state, "error": service.client.absent().found}, 503, {"Retry-After": "5"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 where new requests are welcome; 503 also while the server is shutting down, or too much is waiting."""
        if service.draining or service.num_waiting >= service.config.max_queue_requests:
            return json_response({"status": "draining" if service.draining else "full"}, 503)
        return await health()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        content, media_type = service.metrics.text()
        return Response(content, media_type=media_type)

    for path, answer in (("/health", health), ("/ready", ready)):
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    @app.get("/version")
    async def version() -> Response:
        """The version of glimmer."""
        return json_response({"version": __version__})


async def _failed(request: Request, error: Exception) -> Response:
    """The response to a request that is refused, or that has failed."""
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        failure = Failure(error.status_code, f"{request.method} {request.url.path}: {error.detail}"[:300], code=code)
        headers = dict(error.headers or {})
    else:
        failure, headers = failure_of(error), {}
        if failure.status == 500:
            cause = None if isinstance(error, GlimmerError) else error
            log.error("%s %s failed: %s", request.method, request.url.path, error, exc_info=cause)
    service: Service = request.app.state.service
    service.metrics.refused(failure.status)
    content = shape_for(request.url.path)(failure)
    return json_response(content, failure.status, headers | failure.headers)


async def _left(request: Request, error: Exception) -> Response:
    """The client has left: nobody reads this."""
    return Response(status_code=499)
