"""Which backend serves a device: `choose` makes the one of an engine.

To find out whether a wrong answer comes from our own kernels, set GLIMMER_BACKEND=reference.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache

import torch

from glimmer.backends.base import Backend, KVCacheSpec
from glimmer.backends.reference import Reference
from glimmer.errors import ConfigError
from glimmer.weight import Weight

_missing: ImportError | None = None
try:
    from glimmer.backends import cpu
except ImportError as error:  # installed without a compiler
    _missing = error

log = logging.getLogger("glimmer")
HOST = torch.device("cpu")


def choose(device: torch.device, threads: int = 1, cache: KVCacheSpec | None = None, backend: str = "auto") -> Backend:
    """The backend for a device. threads: as many of the CPU's as compute. cache: what its KV cache shall hold.

    backend: its name; "auto": what GLIMMER_BACKEND names, else the fastest. Raises ConfigError when there is none of
    that name for this device here.
    """
    variable = os.environ.get("GLIMMER_BACKEND", "") if backend == "auto" else ""
    asked = variable or backend
    chosen = next((each for each in _backends(device) if asked in ("auto", each.name)), None)
    if chosen is None:
        raise ConfigError(
            f"GLIMMER_BACKEND={asked!r}" if variable else f"backend={asked!r}",
            " or ".join(map(repr, ("auto", *names(device)))) + f", which serve {device.type} here",
            "unset GLIMMER_BACKEND, or set it to one of these" if variable else "choose one of these",
        )
    if device.type == HOST.type and _missing is not None:
        _say_what_is_missing()
    return chosen.make(device, threads, cache)


def _backends(device: torch.device) -> Iterator[type[Backend]]:
    """What serves a device here, first what "auto" means. Triton's kernels have never run on a GPU: who wants them asks
    for them by name. On a CPU they run under TRITON_INTERPRET=1 only, for tests."""
    if device.type == HOST.type and _missing is None:
        yield cpu.Cpu
    yield Reference
    if device.type == "cuda" or (device.type == HOST.type and os.environ.get("TRITON_INTERPRET") == "1"):
        with suppress(ImportError):  # torch for CPUs, and for some GPUs, comes without Triton
            yield importlib.import_module("glimmer.backends.cuda.backend").Cuda


def names(device: torch.device) -> list[str]:
    """The names of the backends that serve a device here, the best first."""
    return [each.name for each in _backends(device)]


def host_quantizer(threads: int) -> Callable[[Weight, str, int | None], Weight]:
    """The op `quantize` for matrices in the host's memory, where all are read, whatever device serves the model."""
    return choose(HOST, threads).quantize


@lru_cache
def _say_what_is_missing() -> None:
    """Once in a process."""
    log.warning(
        "slow: no kernels for the CPU (%s), plain torch computes; with a C++ compiler, installing again builds them",
        _missing,
    )
