"""Who may ask: holders of a key, and web pages that are the server's own or that the operator has named.

A browser lets any page send requests to a server on the same machine, and a page whose name is made to point there even
read the answers (DNS rebinding). It says which page asks, in the header Origin; programs that are no browser do not.
Without keys, a page is the server's own if it was loaded from an address or from localhost. Not here: CORS (app.py),
limits of requests (exchange.py, protocol.py).
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from glimmer.server import page
from glimmer.server.failures import Failure, shape_for
from glimmer.server.settings import Keys, ServerConfig

OPEN = ("/health",)  # paths that need no key


class AccessCheck:
    """Lets in who may ask. A key comes as `Authorization: Bearer KEY`, or as `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: Keys):
        self._app, self._keys = app, keys
        self._origins = {origin.rstrip("/").lower() for origin in config.allowed_origins or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        failure = self._refusal(scope) if scope["type"] == "http" else None
        if failure is None:
            return await self._app(scope, receive, send)
        content = shape_for(scope["path"])(failure)
        await JSONResponse(content, failure.status, failure.headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Failure | None:
        if self._is_open(scope):
            return None
        if not self._welcomes(_header(scope, b"origin"), _header(scope, b"host")):
            message = (
                f"web pages of {_header(scope, b'origin')[:200]} may not ask this server; --allowed-origins names some"
            )
            return Failure(403, message, "permission_error", code="origin_not_allowed")
        if self._keys and not self._keys.open_with(_key(scope)):
            return Failure(401, "no key, or a wrong one", "authentication_error", code="invalid_api_key")
        return None

    def _is_open(self, scope: Scope) -> bool:
        """The state of health; and the page, which is the same for everybody, and asks for a key itself."""
        path = scope["path"]
        if path in OPEN or scope["method"] == "OPTIONS":
            return True
        return scope["method"] in ("GET", "HEAD") and page.is_page(path)

    def _welcomes(self, origin: str, host: str) -> bool:
        """Whether a page with this origin may ask; other programs may."""
        if not origin.startswith(("http://", "https://")) or "*" in self._origins or origin.lower() in self._origins:
            return True
        try:
            own = urlsplit(origin).netloc.lower() == host.lower()
            return own and (bool(self._keys) or _is_address(urlsplit(origin).hostname or ""))
        except ValueError:  # no URL
            return False


def _is_address(host: str) -> bool:
    """Whether a host is an address, or localhost: a name that nobody else can point elsewhere."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _key(scope: Scope) -> str:
    kind, _, key = _header(scope, b"authorization").partition(" ")
    return key.strip() if kind.lower() == "bearer" else _header(scope, b"x-api-key")


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode(errors="surrogateescape") for key, value in scope["headers"] if key == name), "")
