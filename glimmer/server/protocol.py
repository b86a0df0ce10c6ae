"""HTTP as uvicorn speaks it, with limits on the head of a request: its bytes, and the time that it takes to come.

Not here: limits on bodies (exchange.py).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of a request before its body
HEAD_SECONDS = 30.0  # within which a head must be complete, the first one from when there is a connection
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Protocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: Any) -> None:
        """As asyncio.Protocol."""
        super().connection_made(transport)
        self._slow: asyncio.TimerHandle | None = None
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio.Protocol."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As asyncio.Protocol."""
        self._began = False
        super().data_received(data)
        if self._in_head and not self._began and not self.transport.is_closing():
            self._raw += len(data)
            if self._raw > MAX_HEAD:
                self._refuse()

    def on_message_begin(self) -> None:
        """As httptools."""
        self._begin_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """As httptools."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """As httptools."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """As httptools."""
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says about a request that it cannot read, also because `_count` did not let it."""
        if self._parsed > MAX_HEAD:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        """There is nothing to upgrade to, and nothing to install: the request is answered as it is."""

    def _begin_head(self) -> None:
        # Bytes of the lines that have been read; bytes that have come since the head began, without those that came
        # together with its beginning, which may belong to an earlier request.
        self._parsed = self._raw = 0
        self._began = self._in_head = True
        if self._slow is None:
            self._slow = asyncio.get_running_loop().call_later(HEAD_SECONDS, self.transport.close)

    def _end_head(self) -> None:
        self._in_head = False
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _count(self, nbytes: int) -> None:
        self._parsed += nbytes
        if self._parsed > MAX_HEAD:
            raise ValueError("a head of too many bytes")

    def _refuse(self) -> None:
        self.transport.write(TOO_LONG)
        self.transport.close()
