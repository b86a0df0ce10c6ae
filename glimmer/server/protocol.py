"""HTTP as uvicorn speaks it, with limits on the head of a request: its bytes, and the time that it takes to come.

Not here: limits on bodies (exchange.py).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of a request before its body
HEAD_SECONDS = 30.0  # within which the first request of a connection must have its head complete
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Protocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: Any) -> None:
        """As asyncio.Protocol."""
        super().connection_made(transport)
        self._head, self._in_head = 0, True
        self._slow = asyncio.get_running_loop().call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio.Protocol."""
        self._slow.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As asyncio.Protocol."""
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.transport.write(TOO_LONG)
                self.transport.close()

    def on_message_begin(self) -> None:
        """As httptools."""
        self._head, self._in_head = 0, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """As httptools."""
        self._in_head = False
        self._slow.cancel()
        super().on_headers_complete()
