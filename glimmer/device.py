"""Devices: the kinds that this machine has, their memory, and the library for their collectives.

The only file outside backends/ that uses torch.cuda or torch.npu. A kind is "cpu", "cuda" or "npu"; Ascend's needs the
torch_npu package. Not here: arithmetic.
"""

import logging
import math
import os
import platform
import resource
from pathlib import Path
from typing import NamedTuple

import torch

from glimmer.errors import ConfigError

log = logging.getLogger("glimmer")
SYS = Path("/sys")
FOR_THREADS = 256 << 20  # bytes of address space: stacks, and what the allocator sets aside for each thread
TORCH_THREADS = torch.get_num_threads()  # as torch found it: by affinity, or OMP_NUM_THREADS
COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def _npu_available() -> bool:
    try:
        import torch_npu  # noqa: F401  (registers torch.npu)
    except ImportError:
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]  # torch_npu adds the module


def available() -> list[str]:
    """Kinds of device that this machine has, fastest first."""
    return [*(["npu"] if _npu_available() else []), *(["cuda"] if torch.cuda.is_available() else []), "cpu"]


def resolve(name: str, index: int) -> torch.device:
    """The device that `name` ("auto", "cpu", "cuda", "npu") means for the index-th process of this machine."""
    kinds = available()
    kind = kinds[0] if name == "auto" else name
    if kind not in kinds:
        raise ConfigError(
            f"device={name!r}",
            "'auto' or one that this machine has: " + ", ".join(map(repr, kinds)),
            "choose one of these" + (" (Ascend needs the torch_npu package and its driver)" if kind == "npu" else ""),
        )
    if kind == "cpu":
        return torch.device("cpu")
    module = getattr(torch, kind)
    if index >= module.device_count():
        raise ConfigError(
            f"process {index} of this machine asks for {kind}:{index}",
            f"one process a device; there are {module.device_count()}",
            "start fewer processes, or spread them over more machines",
        )
    module.set_device(index)
    return torch.device(kind, index)


def available_cpus() -> int:
    """CPUs that this process may use: its affinity on Linux, all of them elsewhere, and no more than its control
    group's quota of CPU time, rounded down to whole CPUs and at least 1."""
    return int(min(len(_affinity()), _cpu_quota()))


def share_cores(processes: int, asked: int | None = None) -> int:
    """Threads for this one of the `processes` that compute on this machine: what was asked for, with a warning where it
    may not use so many CPUs; else its part of the physical cores (at most OMP_NUM_THREADS where it is alone)."""
    cpus = available_cpus()
    if asked is not None:
        if asked > cpus:
            log.warning(
                "threads=%d, but this process may use %d CPU%s: computing with %d thread%s",
                asked, cpus, "s" * (cpus != 1), cpus, "s" * (cpus != 1),
            )  # fmt: skip
        return min(asked, cpus)
    cores = len({_siblings(cpu) for cpu in _affinity()})
    share = max(1, min(cores, cpus) // processes)
    return min(share, TORCH_THREADS) if processes == 1 else share


def _affinity() -> set[int]:
    """The numbers of the CPUs that the system may run this process on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The CPUs that share this one's core, itself included, as Linux lists them; elsewhere a CPU is a core."""
    try:
        return (SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cpu_quota() -> float:
    """Whole CPUs whose time the control group grants, of version 2 or 1; math.inf without a quota."""
    cgroup = SYS / "fs/cgroup"
    for files in ((cgroup / "cpu.max",), (cgroup / "cpu/cpu.cfs_quota_us", cgroup / "cpu/cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for file in files for word in file.read_text().split())
        except (OSError, ValueError):  # no control group of this version, or "max"
            continue
        if quota > 0 and period > 0:  # -1 is version 1's word for no quota
            return max(1, quota // period)
    return math.inf


def residual_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """float32 on a CPU, where it is cheap; the model's own dtype on accelerators."""
    return torch.float32 if device.type == "cpu" else dtype


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process can still take on the device. An accelerator is its own; a machine's RAM (within the
    control group's limit) is divided by the `processes` that want it, each within its own address space. Cached file
    pages count as free."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).mem_get_info(device)[0])
    free = _meminfo()["MemAvailable"]
    for folder, limit, used in (
        (SYS / "fs/cgroup", "memory.max", "memory.current"),
        (SYS / "fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            taken = int((folder / used).read_text()) - _cached(folder / "memory.stat")
            free = min(free, int((folder / limit).read_text()) - taken)
        except (OSError, ValueError):  # no control group, or "max"
            continue
    free, space = max(free, 0) // processes, address_space(device)
    return free if space is None else min(free, space)


def total_memory() -> int:
    """Bytes of RAM that the machine has."""
    return _meminfo()["MemTotal"]


def address_space(device: torch.device) -> int | None:
    """Bytes that this process may still map (ulimit -v), without what threads want for themselves; None: no limit, or
    it is none of the device's memory."""
    if device.type != "cpu":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        return None
    return None if limit == resource.RLIM_INFINITY else max(limit - pages * resource.getpagesize() - FOR_THREADS, 0)


def _cached(stat: Path) -> int:
    """Bytes of file pages in a control group's memory.stat: the kernel gives them up when memory is wanted."""
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))


def default_cache(device: torch.device) -> int | None:
    """Bytes of KV cache when nobody says how many; None: all that is left. Others want a machine's RAM too."""
    return 4 << 30 if device.type == "cpu" else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all that was queued; a CPU always has."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held on the device (on a CPU: resident)."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


class Card(NamedTuple):
    """An accelerator of this machine: "cuda:0", the name that its driver gives, bytes of memory and of those free."""

    device: str
    name: str
    total: int
    free: int


def cards() -> list[Card]:
    """The accelerators that torch sees here."""
    found = []
    for kind in available():
        if kind == "cpu":
            continue
        module = getattr(torch, kind)
        for i in range(module.device_count()):
            free, total = module.mem_get_info(i)
            found.append(Card(f"{kind}:{i}", module.get_device_name(i), total, free))
    return found


def describe() -> list[tuple[str, str]]:
    """(what, finding) rows about this machine, for `glimmer doctor`."""
    flags = _cpu_flags()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
    total = _meminfo()["MemTotal"]
    rows = [
        ("processor", f"{_cpu_name()}, {available_cpus()} cores for this process"),
        ("instructions", " ".join(f for f in wanted if f in flags) or "none of those that matter here"),
        ("memory", f"{total / 2**30:.1f} GiB, {free_memory(torch.device('cpu')) / 2**30:.1f} GiB free"),
    ]
    for card in cards():
        memory = f"{card.total / 2**30:.1f} GiB, {card.free / 2**30:.1f} GiB free"
        rows.append((card.device, f"{card.name}, {memory}"))
    if len(rows) == 3:
        rows.append(("accelerators", "none that torch can use"))
    return rows


def identity() -> dict[str, str]:
    """What this machine is: two of which any of this differs are not equally fast."""
    return {
        "host": platform.node(),
        "system": platform.release(),
        "processor": _cpu_name(),
        "instructions": " ".join(sorted(_cpu_flags())),
        "cpus": f"{available_cpus()} of {os.cpu_count()}",
        "memory": f"{total_memory() / 2**30:.0f} GiB",
    }


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    except OSError:  # not Linux
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {"MemTotal": total, "MemAvailable": total}


def _cpu_field(*names: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in names), "")


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpu_field("flags", "Features").split())
