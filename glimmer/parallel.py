"""Mesh: the processes that share one model, connected as groups for tensor, expert and data parallelism.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts the processes; all of them run the
same program. `Mesh` connects them and names a process that does not come. A mesh of one process connects nothing, and
its collectives return their argument.

Every wait has a deadline, which the environment sets: GLIMMER_JOIN_TIMEOUT seconds (300) for the others to start,
GLIMMER_COLLECTIVE_TIMEOUT (300) for each collective, GLIMMER_HEARTBEAT_TIMEOUT (15) for a sign of life while there is
nothing to compute, GLIMMER_REQUEST_TIMEOUT (1800) for the other ranks to ask what this one asks, and
GLIMMER_MISMATCH_TIMEOUT (30) for the same while rank 0 asks for something else. When a peer is lost, the EngineError
names it. What may wait for another machine within a library is called in a thread (within), so that a signal ends the
process all the while; and a rank ends with its launcher. The process groups are destroyed by `close`, and at the latest
when the interpreter exits: a thread of gloo that frees a tensor while the interpreter is being finalised would abort
the process.

This is the only file, beside the launcher, that uses torch.distributed or reads torchrun's variables. Not here: the
collectives as the model sees them (group.py), which tensor is cut in which way (model/names.py).
"""

import atexit
import fcntl
import functools
import itertools
import math
import os
import queue
import re
import signal
import socket
import stat
import struct
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch exports them without saying so

from glimmer.errors import ConfigError, EngineError
from glimmer.group import Group, Timeouts

T = TypeVar("T")

ANSWER = 10.0  # seconds within which a store answers that is not lost
GRACE = 3.0  # seconds that the survivors of a failed collective wait for a sign of life of each other
LATE = 5.0  # seconds that the end of a program waits for a call of a library that is beyond its deadline
SLICE = 1.0  # seconds between two looks at signals and at the deadline while a collective runs


class Mesh:
    """The processes of a job as three kinds of group: `tp`, `ep` and `dp`; `world` is the group of all.

    tp: ranks that share the matrices of one replica (tensor parallelism). dp: ranks with the same place in different
    replicas (data parallelism). The job has tp * dp processes, and neighbours are in one replica: rank = dp's rank * tp
    + tp's rank, as in vLLM. ep: ranks that share the experts as whole experts. ep=1 leaves the experts cut like other
    matrices; ep=tp shares them within a replica; ep=tp*dp shares them over all replicas, as vLLM's
    enable_expert_parallel does, and makes the replicas run in step.

    device: of this process; the tensors of collectives live there. backend: its name in torch.distributed.
    join_timeout: seconds that this process waits for the others to start.
    Raises ConfigError if the sizes do not fit the number of processes, EngineError that names who never came.
    """

    def __init__(
        self, tp: int = 1, ep: int = 1, dp: int = 1, *, device: torch.device, backend: str, join_timeout: float = 300.0
    ):
        rank, size = world()
        _check_sizes(tp, ep, dp, size)
        if size == 1:
            self.world = self.tp = self.ep = self.dp = Group(device=device)
            return
        local_size = int(_number("LOCAL_WORLD_SIZE", size, 1, size))
        connected = World(rank, size, device, backend, join_timeout)

        def groups(members: list[tuple[int, ...]]) -> Group:
            """Of the groups that cover the job, the one that holds this rank."""
            for ranks in members:
                connected.add(ranks)
            own = next(ranks for ranks in members if rank in ranks)
            if len(own) == 1:
                return Group(0, 1, local_size, device)
            return Group(own.index(rank), len(own), local_size, device, own, connected)

        try:
            self.world = groups([tuple(range(size))])
            self.tp = groups([tuple(range(first, first + tp)) for first in range(0, size, tp)])
            self.ep = groups([tuple(range(first, first + ep)) for first in range(0, size, ep)])
            self.dp = groups([tuple(range(first, size, tp)) for first in range(tp)])
        except BaseException:
            connected.close()
            raise

    def close(self) -> None:
        """Destroy the process groups. May be called again; the interpreter's exit calls it too."""
        self.world.close()


def connect(tensor_parallel_size: int, device: torch.device, backend: str, timeout: float = 300.0) -> Group:
    """The group of all processes, all of which share one replica: Mesh(tp=tensor_parallel_size).tp. Errors: Mesh."""
    return Mesh(tensor_parallel_size, device=device, backend=backend, join_timeout=timeout).tp


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


def local_rank() -> int:
    """The number of this process among those of its machine, and so of its accelerator."""
    return int(_number("LOCAL_RANK", 0, 0, 2**16))


def within(seconds: float, what: Callable[[], T]) -> T:
    """What `what` returns or raises; RuntimeError if that takes longer.

    It is called in a thread of its own: this one handles signals meanwhile, and goes on at the deadline.
    """
    results: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()

    def call() -> None:
        try:
            results.put(what())
        except BaseException as error:
            results.put(error)

    thread = threading.Thread(target=call, name="glimmer-wait", daemon=True)
    thread.start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        _late.append(thread)
        raise RuntimeError(f"no answer within {seconds:g} s") from None
    if isinstance(result, BaseException):
        raise result
    return result


_late: list[threading.Thread] = []  # calls that had not come back at their deadline


@atexit.register
def _wait_for_late_calls() -> None:
    """Give calls that are late a moment to end: a library's error that comes while the interpreter ends aborts it."""
    deadline = time.monotonic() + LATE
    for thread in _late:
        thread.join(max(0.0, deadline - time.monotonic()))


class JobStore:
    """The key-value store through which the processes of a job find each other, wherever it is.

    Its methods are those of torch.distributed's stores. Each of them raises RuntimeError if the store is lost, or has
    not answered within the timeout; signals are handled meanwhile. `torch` is the store itself. lost: makes another
    error of that one.
    """

    def __init__(self, store: Any, lost: Callable[[RuntimeError], Exception] = lambda error: error):
        self.torch, self.lost = store, lost

    @staticmethod
    def open(
        address: str, port: int, timeout: float, *, master: bool = False, listener: int | None = None
    ) -> "JobStore":
        """Connect to a store, or open it (master), on the socket with the file descriptor `listener` if it is given.

        RuntimeError after `timeout` seconds, also if something listens there that is no store and says nothing.
        """
        limit = timedelta(seconds=timeout)
        connect = partial(TCPStore, address, port, None, master, limit, False, master_listen_fd=listener)
        return JobStore(within(timeout + SLICE, connect))

    def prefixed(self, prefix: str) -> "JobStore":
        """The same store, in which every key begins with the prefix."""
        return JobStore(PrefixStore(prefix, self.torch), self.lost)

    @property
    def timeout(self) -> timedelta:
        """How long a call may take."""
        timeout: timedelta = self.torch.timeout
        return timeout

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long a call may take."""
        self.torch.set_timeout(timeout)

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value."""
        self._call(lambda: self.torch.set(key, value))

    def get(self, key: str) -> bytes:
        """A value, as soon as it is there."""
        return bytes(self._call(lambda: self.torch.get(key)))

    def check(self, keys: list[str]) -> bool:
        """Whether there are values of all these keys."""
        return bool(self._call(lambda: self.torch.check(keys)))

    def wait(self, keys: list[str]) -> None:
        """Return when there are values of all these keys."""
        self._call(lambda: self.torch.wait(keys))

    def add(self, key: str, amount: int) -> int:
        """Add to a number, and return it."""
        return int(self._call(lambda: self.torch.add(key, amount)))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write a value if the present one is the expected one; return what is there then."""
        return bytes(self._call(lambda: self.torch.compare_set(key, expected, desired)))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Values, as soon as they are there."""
        return list(self._call(lambda: self.torch.multi_get(keys)))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        """Write values."""
        self._call(lambda: self.torch.multi_set(keys, values))

    def _call(self, what: Callable[[], T]) -> T:
        try:
            return within(self.timeout.total_seconds() + SLICE, what)
        except RuntimeError as error:
            raise self.lost(error) from None


@functools.cache
def end_with_launcher() -> None:
    """Have this process end when torchrun's agent or the launcher, its parent, ends, even if that is killed."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # nobody but those ends all ranks when one of them fails
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SLICE)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5 * SLICE)  # for a handler that saves something
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="glimmer-launcher", daemon=True).start()


def address_towards(address: str) -> str | None:
    """The address (IPv4) from which this machine reaches another address or name; None if that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: it only asks the routing table
        except OSError:
            return None
        own: str = probe.getsockname()[0]
        return own


def interface_towards(address: str) -> str | None:
    """The network interface through which this machine reaches `address` (IPv4); None if that cannot be told."""
    get_address = 0x8915  # SIOCGIFADDR of Linux
    own = address_towards(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex() if own else ():
            try:
                answer = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


_numbers = itertools.count()  # of the connections that this process has made: alike on all ranks


class World:
    """The connection of this process to all others: store, process groups, deadlines, and an orderly end.

    Only `Mesh` makes one. Collectives are started by one thread at a time; `close` may be called by any thread.
    """

    def __init__(self, rank: int, size: int, device: torch.device, backend: str, join_timeout: float):
        self.rank, self.size, self.device = rank, size, device
        self._number = next(_numbers)
        self.timeouts = _timeouts()
        end_with_launcher()
        self.store = _join(rank, size, _number("GLIMMER_JOIN_TIMEOUT", join_timeout, 0, 1e7))
        _choose_interface(rank, size, self.store)
        self.store.set_timeout(timedelta(seconds=self.timeouts.collective))
        self._backend = backend
        self._handles: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._connections: dict[int, tuple[int, int]] = {}  # file descriptor -> device and inode of its socket
        self._running: Any = None  # the collective that has been started and has not returned
        self._closed, self._pid = False, os.getpid()
        self._inside: set[int] = set()  # the threads that wait for other ranks
        self._changed = threading.Condition()  # guards the three
        atexit.register(self.close)

    def add(self, ranks: tuple[int, ...]) -> None:
        """Make the process group of these ranks, unless it is there. Every rank of the job makes the same calls."""
        if len(ranks) == 1 or ranks in self._handles:
            return
        before = _sockets()
        # gloo waits a little longer than we do, so that the deadline is ours, and ends by itself soon after it
        timeout = timedelta(seconds=max(self.timeouts.collective, self.timeouts.heartbeat) + 5 * SLICE)

        def make() -> dist.ProcessGroup | None:
            if not dist.is_initialized():
                store = PrefixStore("group", self.store.torch)
                dist.init_process_group(
                    self._backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout
                )
            if len(ranks) == self.size:
                return dist.group.WORLD
            made: dist.ProcessGroup | None = dist.new_group(list(ranks), timeout=timeout, backend=self._backend)
            return made

        try:
            handle = within(self.timeouts.collective + 10 * SLICE, make)
        except RuntimeError as error:
            raise EngineError(
                f"rank {self.rank} on {socket.gethostname()} met the others at {':'.join(map(str, _store_address()))},"
                f" but cannot connect to them: {first_line(error)}",
                f"{self._backend} connections between all ranks",
                "see whether another rank ended first; check the firewall, and the network interface if one is set"
                " (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, HCCL_SOCKET_IFNAME)",
            ) from None
        if self.rank in ranks:
            assert handle is not None
            self._handles[ranks] = handle
        self._connections |= {fd: inode for fd, inode in _sockets().items() if before.get(fd) != inode}

    def all_reduce(
        self, x: Tensor, members: Sequence[int], minimum: bool = False, timeout: float | None = None
    ) -> None:
        """Replace x by the sum (or the minimum) over the members. timeout: in place of timeouts.collective."""
        self._run(members, timeout, dist.all_reduce, x, dist.ReduceOp.MIN if minimum else dist.ReduceOp.SUM)

    def all_gather(self, parts: list[Tensor], x: Tensor, members: Sequence[int]) -> None:
        """Fill parts with the members' x, in order."""
        self._run(members, None, dist.all_gather, parts, x)

    def broadcast(self, x: Tensor, members: Sequence[int], source: int, timeout: float | None = None) -> None:
        """Replace x by that of the member at place `source`. timeout: as in all_reduce."""
        self._run(members, timeout, dist.broadcast, x, group_src=source)

    def wait_for_all(self, members: Sequence[int], what: str, timeout: float) -> bool:
        """True when every member has made this call, False if the first of them has closed its connection instead.

        EngineError after `timeout` seconds names who has not come.
        """
        missing, first = list(members), members[0]
        deadline = time.monotonic() + timeout
        with self._waits():
            try:
                self.store.set(f"{what}/{self.rank}", "1")
                while True:
                    left = self.store.check([self._left_key(first)])
                    missing = [r for r in missing if not self.store.check([f"{what}/{r}"])]
                    if not missing:
                        return True
                    if left and first in missing:
                        return False
                    if self._closed:
                        raise self._left(members)
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
            except RuntimeError as error:
                raise _lost_store(self.rank, error) from None
        raise EngineError(
            f"{', '.join(f'rank {r}' for r in missing)} did not come within {timeout:g} s to where every rank {what}",
            f"all {len(members)} ranks to go on together",
            "read the log of the first rank named above, then start the job again",
        )

    def _run(
        self,
        members: Sequence[int],
        timeout: float | None,
        collective: Callable[..., Any],
        *args: Any,
        **options: Any,
    ) -> None:
        """Run a collective of torch.distributed; if it fails, raise the EngineError that names the lost rank."""
        with self._waits():
            handle = self._handles.get(tuple(members))
            if handle is None:
                raise self._left(members)
            try:
                work = collective(*args, **options, group=handle, async_op=True)
                self._wait(work, self.timeouts.collective if timeout is None else timeout)
            except RuntimeError as error:
                if self._closed:
                    raise self._left(members) from None
                self.abort()
                self.store.set_timeout(timedelta(seconds=ANSWER))
                lost = lost_peer(self.rank, members, self.store, str(error), lambda: self._closed)
                raise (self._left(members) if self._closed else lost) from None
            except BaseException:  # an interrupt: the others must not wait for a rank that has left the collective
                self.abort()
                raise
            finally:
                del handle  # nothing but this object may keep a process group alive

    @contextmanager
    def _waits(self) -> Iterator[None]:
        """While this thread waits for other ranks: `close` lets it come out first."""
        thread = threading.get_ident()
        with self._changed:
            self._inside.add(thread)
        try:
            yield
        finally:
            with self._changed:
                self._inside.discard(thread)
                self._changed.notify_all()

    def _left_key(self, rank: int) -> str:
        """Under which a rank says in the store that it has closed this connection; later ones have other numbers."""
        return f"left {self._number}/{rank}"

    def _left(self, members: Sequence[int]) -> EngineError:
        return EngineError(
            f"rank {self.rank} has left the group of ranks {', '.join(map(str, members))}",
            "no collectives after close",
            "close the LLM when nothing is computed any more",
        )

    def _wait(self, work: Any, timeout: float) -> None:
        """Wait for a started collective; RuntimeError if it fails or takes longer than `timeout` seconds.

        On a host, the wait is cut into slices, between which Python handles signals. On an accelerator the host does
        not wait here: the library (NCCL, HCCL) ends a process whose collective takes longer than timeouts.collective.
        """
        self._running = work
        if not _waits_on_host(self.device, next(iter(self._handles.values()), None)):
            work.wait()
            self._running = None
            return
        deadline = time.monotonic() + timeout
        while True:
            try:
                work.wait(timedelta(seconds=min(SLICE, max(deadline - time.monotonic(), 0.01))))
                break
            except RuntimeError:
                if not work.is_completed() and time.monotonic() < deadline:
                    continue
                if not work.is_completed():
                    raise RuntimeError(f"no answer within {timeout:g} s") from None
                work.wait()  # it has ended meanwhile: returns, or raises why it failed
                break
        self._running = None

    def abort(self) -> None:
        """Shut the connections of the process groups down, so that every collective that waits for this rank fails."""
        sockets = _sockets()
        for fd, inode in self._connections.items():
            if sockets.get(fd) == inode:
                with socket.socket(fileno=os.dup(fd)) as connection:
                    try:
                        connection.getpeername()  # shutting gloo's listening socket down would end the process
                        connection.shutdown(socket.SHUT_RDWR)
                    except OSError:  # it listens, or its peer has closed it
                        continue

    def close(self) -> None:
        """Destroy the process groups. A collective that still runs fails, in whatever thread waits for it."""
        if os.getpid() != self._pid:  # a forked child does not own the connections
            return
        with self._changed:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        if self._running is not None and not self._running.is_completed():
            self.abort()
        with self._changed:  # a thread that is inside torch when the interpreter is finalised would abort the process
            self._changed.wait_for(lambda: self._inside <= {threading.get_ident()}, GRACE)
        self._running = None
        self._handles.clear()
        with suppress(RuntimeError):  # the store is gone, and nobody waits there
            self.store.torch.set(self._left_key(self.rank), "1")  # not in a thread: the interpreter may be ending
        if dist.is_initialized():
            dist.destroy_process_group()


def lost_peer(
    rank: int, members: Sequence[int], store: Any, symptom: str, closed: Callable[[], bool] = lambda: False
) -> EngineError:
    """The error that names the lost members: those that write no sign of life into the store within GRACE seconds.

    closed: whether this rank is being closed, when nobody wants to know and the interpreter may be about to end.
    """
    try:
        missing = _silent(store, "alive", rank, set(members), closed)
        where = {r: store.get(f"host/{r}").decode() for r in sorted(missing)}
    except RuntimeError as error:
        return _lost_store(rank, error)
    with suppress(RuntimeError):  # the store may end with this process: the other survivors learn the names first
        _silent(store, "named", rank, set(members) - missing, closed)
    culprits = ", ".join(f"rank {r} on {host}" for r, host in where.items()) or "a rank that has failed by itself"
    return EngineError(
        f"rank {rank} on {socket.gethostname()} lost {culprits} ({first_line(symptom)})",
        f"all {len(members)} ranks to compute each step together",
        "read the log of the rank named above: it holds the first error; then start the job again",
    )


def _silent(store: Any, key: str, rank: int, members: set[int], closed: Callable[[], bool]) -> set[int]:
    """Write that this rank has come to `key`; which of the members do not write the same within GRACE seconds."""
    store.set(f"{key}/{rank}", "1")
    deadline = time.monotonic() + GRACE
    silent = set(members)
    while silent and time.monotonic() < deadline and not closed():
        silent = {r for r in silent if not store.check([f"{key}/{r}"])}
        time.sleep(0.05)
    return silent


def _waits_on_host(device: torch.device, handle: dist.ProcessGroup | None) -> bool:
    """Whether waiting for a collective of this process group blocks the calling thread: gloo does."""
    return (
        handle is not None
        and dist.is_gloo_available()
        and isinstance(handle._get_backend(device), dist.ProcessGroupGloo)
    )


def _sockets() -> dict[int, tuple[int, int]]:
    """The sockets of this process: file descriptor -> (device, inode), which no later socket has."""
    found = {}
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:  # the descriptor that listed the directory
            continue
        if stat.S_ISSOCK(status.st_mode):
            found[int(name)] = (status.st_dev, status.st_ino)
    return found


def _check_sizes(tp: int, ep: int, dp: int, size: int) -> None:
    """ConfigError unless so many processes can be arranged in this way."""
    for name, number in (
        ("tensor_parallel_size", tp),
        ("expert_parallel_size", ep),
        ("data_parallel_size", dp),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name}={number!r}", "a whole number of at least 1", f"change {name}")
    wanted = tp * dp
    if size != wanted:
        asked = f"tensor_parallel_size={tp}" + (f" times data_parallel_size={dp}" if dp > 1 else "")
        raise ConfigError(
            f"{asked}, but {size} process{'es' * (size > 1)} running",
            "one process for each share of the model" + (" in each replica" if dp > 1 else ""),
            f"start it as: torchrun --nproc-per-node {wanted} YOUR_SCRIPT.py (several machines: --nnodes), or set"
            + (f" tensor_parallel_size={size}" if dp == 1 else f" sizes whose product is {size}"),
        )
    if ep not in (1, tp, wanted):
        raise ConfigError(
            f"expert_parallel_size={ep} with tensor_parallel_size={tp}, data_parallel_size={dp}",
            "one of " + ", ".join(map(str, sorted({1, tp, wanted}))),
            "choose 1 (experts are cut like other matrices), or share whole experts in a replica, or over all replicas",
        )


def collective_timeout(default: float = 300.0) -> float:
    """Seconds that a process may wait for another in the middle of a job: GLIMMER_COLLECTIVE_TIMEOUT."""
    return _number("GLIMMER_COLLECTIVE_TIMEOUT", default, 1, 1e7)


def _timeouts() -> Timeouts:
    """Those that the environment sets, and the default of each."""
    return Timeouts(
        collective=collective_timeout(),
        heartbeat=_number("GLIMMER_HEARTBEAT_TIMEOUT", 15.0, 1, 1e7),
        request=_number("GLIMMER_REQUEST_TIMEOUT", 1800.0, 1, 1e7),
        mismatch=_number("GLIMMER_MISMATCH_TIMEOUT", 30.0, 1, 1e7),
    )


def _choose_interface(rank: int, size: int, store: JobStore) -> None:
    """Have gloo use the network interface through which the ranks have met, unless the user has chosen one.

    By itself it takes the one that the host's name resolves to, which many systems set to loopback. Where the meeting
    point is reached by loopback, ranks of other machines know from where this one can be reached.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address, _ = _store_address()
    try:
        if store.get(f"address/{rank}").startswith(b"127."):
            others = (store.get(f"address/{other}").decode() for other in range(size))
            address = next((other for other in others if other and not other.startswith("127.")), address)
    except RuntimeError as error:
        raise _lost_store(rank, error) from None
    interface = interface_towards(address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _join(rank: int, size: int, timeout: float) -> JobStore:
    """The store of the job, in which every rank has written the name of its host, and its address towards the store.

    Waits `timeout` seconds for all ranks.
    """
    address, port = _store_address()
    place = f"{address}:{port}"
    opens = rank == 0 and not _store_of_launcher()
    deadline = time.monotonic() + timeout
    try:
        opened = JobStore.open(address, port, timeout, master=opens)
    except RuntimeError as error:
        if opens:
            raise ConfigError(
                f"rank 0 on {socket.gethostname()} cannot open {place}: {first_line(error)}",
                "a free port of this machine",
                "choose another MASTER_PORT, on every machine",
            ) from None
        raise EngineError(
            f"rank {rank} on {socket.gethostname()} cannot reach {place}: {first_line(error)}",
            "the meeting point that rank 0 opens",
            "check MASTER_ADDR and MASTER_PORT, the firewall, and that the first machine's command runs; where that"
            " machine's own name resolves to loopback, give it torchrun's --local-addr",
        ) from None
    opened.set_timeout(timedelta(seconds=min(timeout, ANSWER)))
    store = opened.prefixed(f"glimmer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
    missing = list(range(size))
    try:
        store.set(f"address/{rank}", address_towards(address) or "")
        store.set(f"host/{rank}", socket.gethostname())
        while missing and time.monotonic() < deadline:
            missing = [r for r in missing if not store.check([f"host/{r}"])]
            time.sleep(0.05)
    except RuntimeError as error:
        raise _lost_store(rank, error) from None
    if missing:
        ranks = ", ".join(map(str, missing))
        raise EngineError(
            f"{len(missing)} of {size} processes did not join within {timeout:g} s: ranks {ranks}",
            f"every rank to reach {place}",
            "start the command on the missing machines too, with the same address, port and number of processes",
        )
    return store


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


def _store_address() -> tuple[str, int]:
    """Address and port of the store."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(_number("MASTER_PORT", 29500, 1, 65535))


def _store_of_launcher() -> bool:
    """Whether the launcher has opened the store, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _lost_store(rank: int, symptom: object) -> EngineError:
    """The process that opened the store is gone, and with it all that the store knew about the other ranks."""
    address, port = _store_address()
    who = f"{'the launcher' if _store_of_launcher() else 'rank 0'} on {address}"
    return EngineError(
        f"rank {rank} on {socket.gethostname()} lost {who}, which held the meeting point at port {port}"
        f" ({first_line(symptom)})",
        f"{who} to stay until the job is done",
        "see what was said there: it holds the first error; then start the job again",
    )


def first_line(error: object) -> str:
    """The first line of a transport's error message, shortened, without its place in the source."""
    line = re.sub(r"^\[\S+\.(cc|cpp|h|hpp):\d+\] ", "", (str(error).splitlines() or [""])[0])
    return textwrap.shorten(line, 160, placeholder=" ...")
