"""Group: the processes that share one model, and the few things they say to each other.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) starts the processes; every one of them runs
the same program. `connect` finds the others and names whoever did not come; a group of one does nothing at all. When a
peer is lost, `lost_peer` says which. This is the only file that knows torch.distributed or reads torchrun's variables.
Objects travel as JSON, never as pickles. Not here: what is cut how (model/names.py).
"""

import json
import math
import os
import re
import socket
import textwrap
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glimmer.errors import ConfigError, EngineError

GRACE = 3.0  # seconds that survivors wait for each other's word after a collective has failed


@dataclass(frozen=True)
class Group:
    """`size` processes, of which this is number `rank`; `local_size` of them run on this machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device | None = None
    store: Any = field(default=None, repr=False)

    def split(self, n: int) -> tuple[int, int]:
        """This rank's share start:stop of n things; shares differ by at most one, so nothing needs to divide."""
        return share(n, self.size, self.rank)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in x's dtype; sums of bfloat16 are formed in float32."""
        if self.size == 1:
            return x
        total = x.float() if x.dtype == torch.bfloat16 else x.clone()
        self._guard(dist.all_reduce, total)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        """(T, this rank's split of n) -> (T, n): the columns of all ranks, in order."""
        if self.size == 1:
            return x
        widest = -(-n // self.size)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._guard(dist.all_gather, parts, padded)
        widths = [stop - start for start, stop in (share(n, self.size, r) for r in range(self.size))]
        return torch.cat([part[:, :width] for part, width in zip(parts, widths)], 1)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (anything that JSON can hold) on every rank."""
        if self.size == 1:
            return value
        data = torch.tensor(list(json.dumps(value).encode()) if self.rank == 0 else [], dtype=torch.uint8)
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self._guard(dist.broadcast, length, 0)
        if self.rank != 0:
            data = torch.empty(int(length), dtype=torch.uint8)
        data = data.to(self.device)
        self._guard(dist.broadcast, data, 0)
        return json.loads(bytes(data.tolist()))

    def all_reduce_min(self, n: int) -> int:
        """The smallest of the ranks' numbers."""
        if self.size == 1:
            return n
        value = torch.tensor([n], dtype=torch.int64, device=self.device)
        self._guard(dist.all_reduce, value, dist.ReduceOp.MIN)
        return int(value)

    def close(self) -> None:
        """Leave in good order."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _guard(self, collective, *args) -> None:
        """Run a collective; if it fails, say which peer is gone rather than what the transport felt."""
        try:
            collective(*args)
        except RuntimeError as error:
            raise self.lost_peer(str(error)) from None

    def lost_peer(self, symptom: str) -> EngineError:
        """Ask through the store who is still there; the ranks that give no sign within GRACE are the culprits."""
        try:
            self.store.set(f"alive/{self.rank}", "1")
            deadline = time.monotonic() + GRACE
            missing = set(range(self.size))
            while missing and time.monotonic() < deadline:
                missing = {r for r in missing if not self.store.check([f"alive/{r}"])}
                time.sleep(0.05)
            where = {r: self.store.get(f"host/{r}").decode() for r in sorted(missing)}
        except RuntimeError as error:
            return _lost_meeting(self.rank, error)
        culprits = ", ".join(f"rank {r} on {host}" for r, host in where.items()) or "a rank that has failed by itself"
        return EngineError(
            f"rank {self.rank} on {socket.gethostname()} lost {culprits} ({_first_line(symptom)})",
            f"all {self.size} ranks to compute each step together",
            "read the log of the rank named above: it holds the first error; then start the job again",
        )


def share(n: int, size: int, rank: int) -> tuple[int, int]:
    """start:stop of rank's share of n things among size ranks; the first n % size ranks have one more."""
    small, more = divmod(n, size)
    start = rank * small + min(rank, more)
    return start, start + small + (rank < more)


def world() -> tuple[int, int]:
    """(rank, size) as torchrun set them; (0, 1) when nothing did. ConfigError if they make no sense."""
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if not 0 <= rank < size:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"RANK={os.environ.get('RANK')!r}, WORLD_SIZE={os.environ.get('WORLD_SIZE')!r} in the environment",
            "whole numbers with 0 <= RANK < WORLD_SIZE",
            "start the processes with torchrun, or unset both",
        ) from None
    return rank, size


def connect(tensor_parallel_size: int, device: torch.device, backend: str, timeout: float = 300.0) -> Group:
    """Join the group that torchrun started. Waits for the others at most `timeout` seconds.

    device: this rank's; tensors of collectives live there. backend: as torch.distributed names it.
    Raises ConfigError when the number of processes is not tensor_parallel_size, EngineError naming who never came.
    """
    rank, size = world()
    if size != tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size}, but {size} process{'es' * (size > 1)} running",
            "one process for each share of the model",
            f"start it as: torchrun --nproc-per-node {tensor_parallel_size} YOUR_SCRIPT.py (several machines:"
            f" --nnodes), or set tensor_parallel_size={size}",
        )
    if size == 1:
        return Group(device=device)
    timeout = _number("GLIMMER_JOIN_TIMEOUT", timeout, 0, 1e7)
    local_size = int(_number("LOCAL_WORLD_SIZE", size, 1, size))
    address, port = _meeting()
    meeting = f"{address}:{port}"
    opens = rank == 0 and not _met_by_launcher()
    try:
        store = dist.TCPStore(address, port, None, opens, timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        if opens:
            raise ConfigError(
                f"rank 0 on {socket.gethostname()} cannot open {meeting}: {_first_line(error)}",
                "a free port of this machine",
                "choose another MASTER_PORT, on every machine",
            ) from None
        raise EngineError(
            f"rank {rank} on {socket.gethostname()} cannot reach {meeting}: {_first_line(error)}",
            "the meeting point that rank 0 opens",
            "check MASTER_ADDR and MASTER_PORT, the firewall, and that the first machine's command runs",
        ) from None
    store = dist.PrefixStore(f"glimmer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    deadline = time.monotonic() + timeout
    missing = list(range(size))
    try:
        store.set(f"host/{rank}", socket.gethostname())
        while missing and time.monotonic() < deadline:
            missing = [r for r in missing if not store.check([f"host/{r}"])]
            time.sleep(0.05)
    except RuntimeError as error:
        raise _lost_meeting(rank, error) from None
    if missing:
        ranks = ", ".join(map(str, missing))
        raise EngineError(
            f"{len(missing)} of {size} processes did not join within {timeout:g} s: ranks {ranks}",
            f"every rank to reach {meeting}",
            "start the command on the missing machines too, with the same address, port and number of processes",
        )
    try:
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    except RuntimeError as error:
        raise EngineError(
            f"rank {rank} on {socket.gethostname()} met the others at {meeting}, but cannot connect to them:"
            f" {_first_line(error)}",
            f"{backend} connections between all ranks",
            "see whether another rank ended first; check the firewall, and the network interface if one is set"
            " (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, HCCL_SOCKET_IFNAME)",
        ) from None
    return Group(rank, size, local_size, device, store)


def _number(name: str, default: float, least: float, most: float) -> float:
    """A number from the environment; ConfigError if it is none, or out of bounds."""
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan  # within no bounds
    if least <= value <= most:
        return value
    raise ConfigError(
        f"{name}={text!r} in the environment",
        f"a number from {least:g} to {most:g}",
        f"start the processes with torchrun, or unset {name}",
    )


def _meeting() -> tuple[str, int]:
    """Address and port of the store."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(_number("MASTER_PORT", 29500, 1, 65535))


def _met_by_launcher() -> bool:
    """Whether the launcher has opened the store, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _lost_meeting(rank: int, symptom: object) -> EngineError:
    """Whoever opened the store is gone, and with it every word about the others."""
    address, port = _meeting()
    who = f"{'the launcher' if _met_by_launcher() else 'rank 0'} on {address}"
    return EngineError(
        f"rank {rank} on {socket.gethostname()} lost {who}, which held the meeting point at port {port}"
        f" ({_first_line(symptom)})",
        f"{who} to stay until the job is done",
        "see what was said there: it holds the first error; then start the job again",
    )


def _first_line(error: object) -> str:
    """What a transport has said, without its place in the source, and not at any length."""
    line = re.sub(r"^\[\S+\.(cc|cpp|h|hpp):\d+\] ", "", (str(error).splitlines() or [""])[0])
    return textwrap.shorten(line, 160, placeholder=" ...")


def local_rank() -> int:
    """Which accelerator of this machine is ours."""
    return int(_number("LOCAL_RANK", 0, 0, 2**16))
