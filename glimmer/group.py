"""Group: processes that compute together, and the collectives between them, as the model and the engine see them.

A group of one process returns what it is given. Not here: how processes find and lose each other, and the library that
moves the bytes (parallel.py, which connects the groups).
"""

import json
import math
import socket
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from glimmer.errors import ConfigError

FIRST_MESSAGE = 1016  # bytes of a broadcast object that travel together with its length


@dataclass(frozen=True)
class Timeouts:
    """How many seconds this process waits for other ranks.

    collective   in the middle of a step, and for the next message of rank 0
    heartbeat    for a sign of life of each other, while there is nothing to compute
    request      for the others to ask what this one asks, while rank 0 asks for nothing
    mismatch     the same, while rank 0 asks for something else
    """

    collective: float = math.inf
    heartbeat: float = math.inf
    request: float = math.inf
    mismatch: float = math.inf


class Transport(Protocol):
    """What a group needs of the connection to other processes: parallel.World. Members are ranks in the whole job.

    Each call returns when the collective is done, and raises EngineError, which names the lost rank, if it fails.
    """

    timeouts: Timeouts

    def all_reduce(
        self, x: Tensor, members: Sequence[int], minimum: bool = False, timeout: float | None = None
    ) -> None:
        """Replace x by the sum (or the minimum) over the members. timeout: in place of timeouts.collective."""

    def all_gather(self, parts: list[Tensor], x: Tensor, members: Sequence[int]) -> None:
        """Fill parts with the members' x, in order."""

    def broadcast(self, x: Tensor, members: Sequence[int], source: int, timeout: float | None = None) -> None:
        """Replace x by that of the member at place `source`. timeout: as in all_reduce."""

    def wait_for_all(self, members: Sequence[int], what: str, timeout: float) -> bool:
        """Whether every member has made this call, or the first has left; EngineError after `timeout` seconds."""

    def close(self) -> None:
        """Destroy the process groups."""


@dataclass(frozen=True)
class Group:
    """`size` processes, of which this one is number `rank`.

    local_size  processes of the whole job that run on this machine
    device      where the tensors of collectives live
    ranks       ranks in the whole job of the members, in order; empty: 0, 1, ..., size - 1
    transport   the connection to the others; None in a group of one
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device | None = None
    ranks: tuple[int, ...] = ()
    transport: Transport | None = field(default=None, repr=False)

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks in the whole job of this group's processes, in order."""
        return self.ranks or tuple(range(self.size))

    @property
    def timeouts(self) -> Timeouts:
        """How long this process waits for the others."""
        return Timeouts() if self.transport is None else self.transport.timeouts

    @property
    def connected(self) -> Transport:
        """The connection to the other processes of a group of several."""
        assert self.transport is not None, f"a group of {self.size} processes that parallel.Mesh did not connect"
        return self.transport

    def split(self, n: int) -> tuple[int, int]:
        """This rank's share start:stop of n things; shares differ by at most one, so n needs not be divisible."""
        return share(n, self.size, self.rank)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in x's dtype; sums of bfloat16 are formed in float32."""
        if self.size == 1:
            return x
        total = x.float() if x.dtype == torch.bfloat16 else x.clone()
        self.connected.all_reduce(total, self.members)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        """(T, this rank's split of n) -> (T, n): the columns of all ranks, in order."""
        if self.size == 1:
            return x
        widest = -(-n // self.size)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self.connected.all_gather(parts, padded, self.members)
        widths = [stop - start for start, stop in (share(n, self.size, r) for r in range(self.size))]
        return torch.cat([part[:, :width] for part, width in zip(parts, widths)], 1)

    def broadcast(self, value: Any, source: int = 0, timeout: float | None = None) -> Any:
        """The value of rank `source` (anything that JSON can hold) on every rank.

        timeout: seconds until it begins to come, in place of timeouts.collective.
        """
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        head = len(data).to_bytes(8, "little") + data[:FIRST_MESSAGE]
        first = torch.frombuffer(bytearray(head.ljust(8 + FIRST_MESSAGE, b"\0")), dtype=torch.uint8).to(self.device)
        self.connected.broadcast(first, self.members, source, timeout)
        received = first.cpu().numpy().tobytes()
        length, received = int.from_bytes(received[:8], "little"), received[8:]
        if length > FIRST_MESSAGE:
            rest = bytearray(data[FIRST_MESSAGE:] or length - FIRST_MESSAGE)
            second = torch.frombuffer(rest, dtype=torch.uint8).to(self.device)
            self.connected.broadcast(second, self.members, source)
            received += second.cpu().numpy().tobytes()
        return json.loads(received[:length])

    def all_reduce_min(self, n: int) -> int:
        """The smallest of the ranks' numbers."""
        if self.size == 1:
            return n
        value = torch.tensor([n], dtype=torch.int64, device=self.device)
        self.connected.all_reduce(value, self.members, minimum=True)
        return int(value)

    def heartbeat(self) -> None:
        """Return when every rank has made this call, for ranks that have nothing to compute.

        EngineError names the ranks that have not within timeouts.heartbeat: they are stopped, or gone.
        """
        if self.size > 1:
            sign = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.connected.all_reduce(sign, self.members, minimum=True, timeout=self.timeouts.heartbeat)

    def check_equal(self, values: Mapping[str, str]) -> None:
        """ConfigError, the same on every rank, unless all ranks have the same values under the same names.

        The first name whose values differ is told, with the first rank that differs from rank 0, and both values. For
        settings, and for digests of files.
        """
        if self.size == 1:
            return
        found = [self.broadcast([dict(values), socket.gethostname()], source) for source in range(self.size)]
        (first, host), *others = found
        for what in dict.fromkeys(name for mine, _ in found for name in mine):
            for rank, (other, where) in enumerate(others, 1):
                if other.get(what) != first.get(what):
                    theirs, ours = (textwrap.shorten(mine.get(what, "missing"), 200) for mine in (other, first))
                    raise ConfigError(
                        f"{what} of rank {self.members[rank]} on {where} is {theirs},"
                        f" of rank {self.members[0]} on {host} {ours}",
                        f"the same {what} on all {self.size} ranks",
                        "start every rank with the same arguments on the same files;"
                        f" look at rank {self.members[rank]}",
                    )

    def wait_for_all(self, what: str, timeout: float) -> bool:
        """True when every rank has called this with the same `what`, which may take `timeout` seconds; False if rank 0
        has closed its groups instead.

        For work whose length differs from rank to rank by more than a collective may take, such as loading.
        EngineError names the ranks that did not come in time.
        """
        return self.size == 1 or self.connected.wait_for_all(self.members, what, timeout)

    def close(self) -> None:
        """Destroy the process groups of this process: all of them, whichever group is asked. May be called again."""
        if self.transport is not None:
            self.transport.close()


def share(n: int, size: int, rank: int) -> tuple[int, int]:
    """start:stop of rank's share of n things among size ranks; the first n % size ranks have one more."""
    small, more = divmod(n, size)
    start = rank * small + min(rank, more)
    return start, start + small + (rank < more)
