"""ResponseStore: the responses that previous_response_id may name, in the memory of the HTTP process.

What has not been asked for the longest is forgotten where there are too many, where they are too large, and after a
while. Nothing is written to disk, and nothing outlives the server. Not here: what a response looks like (responses.py).
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock

MAX_RESPONSES = 4096
SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Stored:
    """A response and the items of its whole input, as JSON."""

    response: bytes
    items: bytes
    used: float  # when it was last asked for

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.response) + len(self.items)


class ResponseStore:
    """Responses by their ids. Any thread may use it."""

    def __init__(
        self,
        most_bytes: int,
        most: int = MAX_RESPONSES,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """most_bytes: 0 keeps nothing."""
        self._most_bytes, self._most, self._seconds, self._clock = most_bytes, most, seconds, clock
        self._stored: OrderedDict[str, Stored] = OrderedDict()  # the one that was used last is at the end
        self._size, self._guard = 0, Lock()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._stored)

    def keep(self, id: str, response: bytes, items: bytes) -> None:
        """Keep a response, unless it alone is too large."""
        stored = Stored(response, items, self._clock())
        with self._guard:
            if stored.size <= self._most_bytes:
                self._stored[id] = stored
                self._size += stored.size
            self._forget()

    def get(self, id: str) -> Stored | None:
        """A response, if it is still kept."""
        with self._guard:
            self._forget()
            stored = self._stored.pop(id, None)
            if stored is not None:
                self._stored[id] = replace(stored, used=self._clock())
            return stored

    def drop(self, id: str) -> bool:
        """Forget a response. Whether it was there."""
        with self._guard:
            self._forget()
            stored = self._stored.pop(id, None)
            self._size -= 0 if stored is None else stored.size
            return stored is not None

    def _forget(self) -> None:
        """Forget what is too old or too much."""
        oldest = self._clock() - self._seconds
        while self._stored:
            first = next(iter(self._stored.values()))
            if first.used >= oldest and len(self._stored) <= self._most and self._size <= self._most_bytes:
                return
            self._stored.popitem(last=False)
            self._size -= first.size
