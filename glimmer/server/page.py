"""The web page at the server's root: the files of `web/`, with headers that let nothing run or load but these files.

Does not know the API that the page talks to. The page's files need no API key; what it asks of the server does.
"""

from pathlib import Path, PurePosixPath

from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import Scope

WEB = Path(__file__).parent / "web"

# No script, style, font, image or request but the server's own; no text becomes elements (trusted types) unless
# DOMPurify has passed it. KaTeX sets lengths through the object model, which needs no 'unsafe-inline'.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)

HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, answered by 304 while the file is the same
}

# Not left to the machine's own table of types: with nosniff, a script of another type does not run.
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}


class _PageFiles(StaticFiles):
    """The files of a directory, with HEADERS and the types of MEDIA_TYPES."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        if media_type := MEDIA_TYPES.get(PurePosixPath(path).suffix):
            response.headers["content-type"] = media_type
        return response


def is_page(path: str) -> bool:
    """Whether a request's path is one of the page's files, which are served without an API key."""
    return path == "/" or path.startswith("/web/")


def mount(app: FastAPI) -> None:
    """Serves the page at `/` and its files below `/web/`."""
    files = _PageFiles(directory=WEB)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    # Not app.mount: behind a proxy that takes a prefix off, a mounted application would look for its files below it.
    @app.api_route("/web/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        return await files.get_response(name, request.scope)
