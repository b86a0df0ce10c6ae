"""Machine: what a plan plans for: this machine, measured, or another one that options describe.

Memory comes from glimmer/device.py (control groups included), the limits of memory and arithmetic from Backend.limits,
the disk from a small probe with direct reads; accelerators from a table of their makers' data sheets. Not here: what a
model needs (model/cost.py), and what follows (plan.py).
"""

import mmap
import os
import re
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from glimmer import __version__
from glimmer import device as devices
from glimmer.backends import selection
from glimmer.backends.base import Backend
from glimmer.backends.measurements import Measurements
from glimmer.backends.op_times import OpTimes
from glimmer.checkpoint.buffers import large_pages
from glimmer.cli.options import size
from glimmer.errors import ConfigError
from glimmer.hub import cache_directory

GIB = 1 << 30
PROBE_SECONDS, PROBE_THREADS, PROBE_BLOCK = 0.5, 8, 2 << 20  # as the store of paged experts reads: csrc/store.h
QUARTERS, LONE_READS, LONE_SECONDS = 4, 31, 0.2  # its parts of an expert; experts read one by one, and for how long
MIN_PROBE = 64 << 20  # bytes of a file from which a disk's speed can be told


@dataclass(frozen=True)
class Accelerator:
    """One card, as its maker describes it: GiB of memory, GB/s, TFLOP/s of bfloat16 and TOP/s of int8, both dense and
    with sums in 32 bits.

    reported: the names that drivers have for it. device_memory: what the family's guide for Ascend sets
    max_device_memory to; None: not in that guide.
    """

    name: str
    memory: int
    bandwidth: float
    bfloat16: float
    int8: float
    source: str
    reported: tuple[str, ...]
    device_memory: str | None = None

    def limits(self) -> dict[str, float]:
        """As Backend.limits has them."""
        return {"read": self.bandwidth * 1e9, "bfloat16": self.bfloat16 * 1e12, "int8": self.int8 * 1e12}


ASCEND = "the guide of MindFormers' glm4_moe; memory and arithmetic as published for Atlas 800T A2: preliminary"
ACCELERATORS = {
    re.sub("[^a-z0-9]", "", card.name.lower()): card
    for card in (
        Accelerator("A100-40GB", 40, 1555, 312, 624, "NVIDIA A100 data sheet", ("A100-SXM4-40GB", "A100-PCIE-40GB")),
        Accelerator("A100", 80, 2039, 312, 624, "NVIDIA A100 data sheet (80GB SXM)", ("A100-SXM4-80GB",)),
        Accelerator("A100-PCIe", 80, 1935, 312, 624, "NVIDIA A100 data sheet (80GB PCIe)", ("A100 80GB PCIe",)),
        Accelerator("H20", 96, 4000, 148, 296, "NVIDIA H20 specifications", ("H20",)),
        Accelerator("H100", 80, 3350, 989, 1979, "NVIDIA H100 data sheet (SXM)", ("H100 80GB HBM3",)),
        Accelerator("H100-PCIe", 80, 2000, 756, 1513, "NVIDIA H100 data sheet (PCIe)", ("H100 PCIe",)),
        Accelerator("H200", 141, 4800, 989, 1979, "NVIDIA H200 data sheet", ("H200",)),
        Accelerator("B200", 180, 7700, 2250, 4500, "NVIDIA HGX B200 data sheet", ("B200",)),
        Accelerator("L4", 24, 300, 121, 242, "NVIDIA L4 data sheet", ("L4",)),
        Accelerator("L40S", 48, 864, 362, 733, "NVIDIA L40S data sheet", ("L40S",)),
        Accelerator("RTX3090", 24, 936, 71, 284, "NVIDIA Ampere GA102 whitepaper", ("GeForce RTX 3090",)),
        Accelerator("RTX4090", 24, 1008, 165, 661, "NVIDIA Ada whitepaper", ("GeForce RTX 4090",)),
        Accelerator("RTX5090", 32, 1792, 209, 838, "NVIDIA RTX Blackwell whitepaper", ("GeForce RTX 5090",)),
        Accelerator("MI300X", 192, 5300, 1307, 2615, "AMD Instinct MI300X data sheet", ("AMD Instinct MI300X",)),
        Accelerator("Ascend910B", 64, 1600, 313, 626, ASCEND, ("Ascend910B3",), "59GB"),
        Accelerator("Ascend910B-32GB", 32, 800, 280, 560, ASCEND.replace("800T", "800I"), ("Ascend910B4",), "30GB"),
    )
}


def known(card: devices.Card) -> Accelerator | None:
    """What the table says of a card of this machine; None if its name is none of the table's."""
    name = card.name.removeprefix("NVIDIA ")
    return next((each for each in ACCELERATORS.values() if name in each.reported), None)


@dataclass(frozen=True)
class Disk:
    """The file system where the model lies. speed: bytes/s of direct reads, None where nothing could be measured;
    how: what was read, or why nothing was; file: the one that was read."""

    free: int
    speed: float | None
    how: str
    file: Path | None = None

    def reads(self, nbytes: int) -> tuple[float, float] | None:
        """Seconds until an expert of so many bytes is there, and that each further one takes which is asked for at the
        same time; None where nothing was measured. The first one takes longer: a disk is slow to begin."""
        if self.speed is None:
            return None
        further = nbytes / self.speed
        return (further if self.file is None else max(further, _lone_read(self.file, nbytes))), further


@dataclass(frozen=True)
class Machine:
    """processes compute, each with so many free bytes of memory, `usable` of which it may take; limits: of one of them,
    None where nothing measures them; times: of single ops on it, None likewise; kept: these and limits, also those of
    earlier runs. accelerator: None on a CPU, whose threads are those of one process. cards: what this machine has
    besides. notes: what of it was asked for and cannot be."""

    processes: int
    nodes: int
    total: int
    free: int
    usable: int
    disk: Disk
    threads: int
    kernels: str | None
    limits: Mapping[str, float] | None
    accelerator: Accelerator | None = None
    described: tuple[str, ...] = ()
    cards: tuple[devices.Card, ...] = ()
    notes: tuple[str, ...] = ()
    times: OpTimes | None = None
    kept: Measurements | None = None

    @property
    def name(self) -> str:
        """In words."""
        if self.accelerator is None:
            return "this machine" + (f", but {' and '.join(self.described)}" if self.described else "")
        nodes = f"{self.nodes} machine{'s' * (self.nodes > 1)} of " if self.nodes > 1 else ""
        return f"{nodes}{self.processes // self.nodes} x {self.accelerator.name}"


def accelerator(value: str) -> tuple[Accelerator, int]:
    """ "H100:2" or "H100": a card and how many of them one machine has; ConfigError for an unknown one."""
    name, colon, number = value.partition(":")
    found = ACCELERATORS.get(re.sub("[^a-z0-9]", "", name.lower()))
    if found is None or (colon and not re.fullmatch("[1-9][0-9]{0,4}", number)):
        raise ConfigError(
            f"--gpu {value!r}",
            "NAME or NAME:NUMBER, e.g. H100:2; names: " + ", ".join(card.name for card in ACCELERATORS.values()),
            "choose one of these names" if found is None else "write the number of cards of one machine, from 1 on",
        )
    return found, int(number) if colon else 1


def describe(card: Accelerator, number: int, nodes: int, memory: int | None, share: float, disk: Disk) -> Machine:
    """Some machines with so many cards each; memory: bytes that may be taken on each card, ConfigError if a card has
    less."""
    total = card.memory * GIB
    if memory is not None and memory > total:
        raise ConfigError(
            f"memory={memory / GIB:,.1f} GiB for a card of {card.memory} GiB ({card.name})",
            "at most what each card has",
            "correct memory, leave it out, or name another card (--gpu)",
        )
    guide = size(card.device_memory) if card.device_memory is not None else total
    most = int(total * share)
    said = () if memory is None else (f"{memory / GIB:.1f} GiB on each card",)
    notes = () if memory is None or memory <= most else (_too_much(memory, most, share),)
    return Machine(
        number * nodes, nodes, total, total, min(most, memory or guide), disk, 1, None, card.limits(), card, said,
        notes=notes,
    )  # fmt: skip


def this_machine(threads: int | None, memory: int | None, share: float, disk: Disk, anew: bool = False) -> Machine:
    """This machine's CPU, measured in about two seconds, unless that was kept. memory: bytes that may be taken, in
    place of its own: another machine, where they are more than this one has. anew: nothing that was kept is taken."""
    count = devices.share_cores(1, threads)
    backend = selection.choose(selection.HOST, count)
    free = devices.free_memory(selection.HOST)
    usable = int(free * share) if memory is None else memory
    said = () if memory is None else (f"{memory / GIB:.1f} GiB of memory to take",)
    notes = () if usable <= int(free * share) else (_too_much(usable, int(free * share), share),)
    kept = _kept(backend, anew)
    limits = _limits(backend, kept)
    return Machine(
        1, 1, devices.total_memory(), free, usable, disk, count, backend.kernels, limits, None, said,
        tuple(devices.cards()), notes, OpTimes.of(backend, limits, kept), kept,
    )  # fmt: skip


def _kept(backend: Backend, anew: bool) -> Measurements:
    """What was measured here before with these kernels and threads."""
    machine = devices.identity() | {
        "kernels": backend.kernels or "none",
        "build": backend.build or "none",
        "threads": str(backend.threads),
        "torch": torch.__version__,
        "glimmer": __version__,
    }
    return Measurements(cache_directory() / "measured", machine, anew)


def _limits(backend: Backend, kept: Measurements) -> dict[str, float] | None:
    """Backend.limits, measured together where one of them was not kept."""
    if backend.build is None:
        return None
    measured = cache(lambda: backend.limits() or {})
    names = ("read", "cached", "bfloat16", "int8", "cache")
    return {name: kept.get(f"limit: {name}", partial(lambda name: measured()[name], name)) for name in names}


def _too_much(memory: int, most: int, share: float) -> str:
    return (
        f"{memory / GIB:,.1f} GiB are asked for; {most / GIB:,.1f} are what would be taken there, {share:.0%} of what"
        " is free"
    )


def disk_of(directory: Path, speed: int | None) -> Disk:
    """The disk where a model lies; speed: as asserted, in bytes/s, else it is measured."""
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if speed is not None:
        return Disk(free, float(speed), "as given")
    files = sorted(_files(directory), key=lambda file: file.stat().st_size, reverse=True)
    solid = [file for file in files if file.stat().st_blocks * 512 >= file.stat().st_size // 2]  # holes are not read
    if not solid or solid[0].stat().st_size < MIN_PROBE:
        return Disk(free, None, f"no file of {MIN_PROBE >> 20} MB or more to read there: give --disk-speed")
    try:
        found = _probe(solid[0], PROBE_BLOCK, PROBE_THREADS)
        return Disk(free, found, f"direct reads of {solid[0].name}", solid[0])
    except OSError as error:
        return Disk(free, None, f"{solid[0].name} refuses direct reads ({error.strerror}): give --disk-speed")


def _files(directory: Path) -> Iterator[Path]:
    for pattern in ("*.safetensors", "weights-*.bin", "packed-*/weights-*.bin"):
        yield from (file for file in directory.glob(pattern) if file.is_file())


def _lone_read(file: Path, nbytes: int) -> float:
    """Seconds from asking for so many bytes until all are there, read directly by a thread for each quarter while
    nothing else is read: the median of LONE_READS, of fewer where these last long, with as much time between them.
    Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    part = -(-nbytes // (QUARTERS * mmap.PAGESIZE)) * mmap.PAGESIZE
    count = max(1, os.fstat(descriptor).st_size // (QUARTERS * part))
    memory = large_pages(QUARTERS * part)
    buffers = [memory[i * part : (i + 1) * part] for i in range(QUARTERS)]
    seconds: list[float] = []
    try:
        with ThreadPoolExecutor(QUARTERS) as threads:
            end = time.perf_counter() + LONE_SECONDS
            for turn in range(LONE_READS):
                place = turn * 7919 % count * QUARTERS
                begin = time.perf_counter()
                reads = [
                    threads.submit(os.preadv, descriptor, [buffer], (place + i) * part)
                    for i, buffer in enumerate(buffers)
                ]
                for read in reads:
                    read.result()
                seconds.append(time.perf_counter() - begin)
                time.sleep(seconds[-1])
                if time.perf_counter() > end:
                    break
    finally:
        os.close(descriptor)
    return statistics.median(seconds)


def _probe(file: Path, block: int, depth: int) -> float:
    """Bytes/s of direct reads of blocks by so many threads, in an order that no read-ahead knows. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    count = os.fstat(descriptor).st_size // block
    read = [0] * depth
    faults: list[OSError] = []
    buffers = [large_pages(block) for _ in range(depth)]
    end = time.perf_counter() + PROBE_SECONDS

    def work(me: int) -> None:
        turn = me
        try:
            while time.perf_counter() < end and not faults:
                read[me] += os.preadv(descriptor, [buffers[me]], turn * 7919 % count * block)
                turn += depth
        except OSError as error:
            faults.append(error)

    begin = time.perf_counter()
    threads = [threading.Thread(target=work, args=(me,)) for me in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    if faults:
        raise faults[0]
    return sum(read) / (time.perf_counter() - begin)
