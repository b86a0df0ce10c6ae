"""Ops: the ops to arithmetic, and who serves each of them.

The model calls nothing but these. `choose` fills the record once per process, op by op, from the backends that
serve the device; whatever is left comes from `reference`, the definition that every backend is compared with. An op
gets tensors and numbers, never a configuration; it writes over an input only if its name ends in `_`.

    op          inputs -> output                                                      (T rows, H wide)
    embed         tokens (T,), table (V', H), first -> (T, H); zeros for tokens outside first..first+V'
    rms_norm      x (..., N), weight (N,), eps -> (..., N) in weight's dtype
    add_rms_norm  x (T, H), residual (T, H), weight, eps -> (normed, residual + x); residual keeps its dtype
    linear        x (T, in), packed, bias (out,) or None -> (T, out) in x's dtype, float32 where the weights are
    add_          y (T, H), x (T, H): y += x
    swiglu        x (T, 2M): gate then up -> (T, M), silu(gate) * up
    rope_         q (T, h, D), k (T, g, D), cos, sin (T, R/2): rotates the first R of D in place, pairs (i, i+R/2)
    store_kv_     k, v (T, g, D), keys, values (blocks, block_size, g, D), slots (T,): writes rows to their slots
    attention     q (T, h, D), keys, values, batch, scale -> (T, h*D); causal within each sequence of the batch
                  (both: keys and values are in k's and q's dtype, or int8 with reference.SCALE bytes more in the last
                  dimension: codes, and the float32 scale of each slot and head)
    route         logits (T, E) float32, bias (E,) float32, rule -> ids (T, K) int64, scores (T, K) float32
    experts       x (T, H), ids, scores, gate_up, down (packed) -> (T, H) float32, a sum over K
    quantize      plain or fp8 Weight, "int8" or "int4", group -> such a Weight, to be packed or stored
    pack_linear   Weights whose rows follow each other, dtype, device -> packed
    pack_experts  for each expert such Weights, their count, dtype, device -> packed; takes one expert at a time

Not here: any choice made per call, and any knowledge of ranks. To bisect a wrong answer set GLIMMER_BACKEND=reference.
"""

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from types import ModuleType
from typing import Any

from glimmer.errors import ConfigError
from glimmer.weight import Weight

log = logging.getLogger("glimmer")


@dataclass(frozen=True)
class RouteRule:
    """How a token chooses experts; fields as in config.json, top_k = num_experts_per_tok."""

    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True)
class Ops:
    """One callable an op; see the table above for what each takes and promises."""

    embed: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    linear: Callable[..., Any]
    add_: Callable[..., Any]
    swiglu: Callable[..., Any]
    rope_: Callable[..., Any]
    store_kv_: Callable[..., Any]
    attention: Callable[..., Any]
    route: Callable[..., Any]
    experts: Callable[..., Any]
    quantize: Callable[..., Any]
    pack_linear: Callable[..., Any]
    pack_experts: Callable[..., Any]
    # No ops: what records the ops' calls, to be made again (None: nothing does); and the bytes that a Weight,
    # perhaps without values, takes once packed, given whether the scales of int4 are bfloat16 numbers.
    record: Callable[..., Any] | None
    packed_bytes: Callable[[Weight, bool], int]

    @property
    def own_threads(self) -> bool:
        """Whether an op has a thread pool of its own, with which torch's would compete for the cores."""
        return any(backend == "cpu" for _, backend in self.table())

    @property
    def kernels(self) -> str | None:
        """Which instruction set the CPU backend use, and of which others it was chosen; None: there are no such."""
        return _load("cpu").kernels() if self.own_threads else None

    def limits(self) -> dict[str, float] | None:
        """What this machine can do at best, measured now by all threads of the CPU backend; None: there are none.

        "read": bytes a second; "bfloat16", "int8": multiplications and additions a second in dot products of these.
        """
        return _load("cpu").limits() if self.own_threads else None

    def table(self) -> list[tuple[str, str]]:
        """(op, backend) for each op: what `glimmer doctor` and the start-up log print."""
        ops = (f.name for f in fields(self) if f.name not in ("record", "packed_bytes"))
        return [(op, getattr(self, op).__module__.rpartition(".")[2]) for op in ops]


# Modules of glimmer.backends that serve each kind of device, best first; reference completes them all.
HOST = "cpu"
BACKENDS: dict[str, tuple[str, ...]] = {HOST: ("cpu",), "cuda": (), "npu": ()}


def choose(device: str, threads: int = 1) -> Ops:
    """The ops for a kind of device ("cpu", "cuda", "npu"); threads: for those that have a pool of their own.

    Raises ConfigError when GLIMMER_BACKEND names no backend that is here.
    """
    modules = _modules(device)
    _tell(modules, threads)
    return Ops(**{f.name: _first(modules, f.name) for f in fields(Ops)})


def quantizer(threads: int) -> Callable[[Weight, str, int | None], Weight]:
    """The op `quantize` for matrices in the host's memory, where all are read, whatever device serves the model.

    threads: as for `choose`, which has told them to no backend of the host's where another device serves. Raises
    ConfigError as it does.
    """
    modules = _modules(HOST)
    _tell(modules, threads)
    return _first(modules, "quantize")


def _modules(device: str) -> list[ModuleType]:
    """What serves this kind of device, best first, the reference last."""
    asked = os.environ.get("GLIMMER_BACKEND", "")
    modules = [m for m in map(_load, BACKENDS.get(device, ())) if m is not None] + [_load("reference")]
    available = [m.__name__.rpartition(".")[2] for m in modules]
    if asked and asked not in available:
        raise ConfigError(
            f"GLIMMER_BACKEND={asked!r}",
            " or ".join(map(repr, available)),
            "unset GLIMMER_BACKEND, or set it to one of these",
        )
    return [m for m in modules if not asked or m.__name__.endswith((f".{asked}", ".reference"))]


def _tell(modules: list[ModuleType], threads: int) -> None:
    for module in modules:
        if hasattr(module, "set_threads"):
            module.set_threads(threads)


def _first(modules: list[ModuleType], name: str) -> Any:
    return next(getattr(m, name) for m in modules if hasattr(m, name))


@lru_cache
def _load(backend: str) -> ModuleType | None:
    """The module, or None, said once, where what it stands on is not installed."""
    try:
        return importlib.import_module(f"glimmer.backends.{backend}")
    except ImportError as error:
        log.warning(
            "slow: no %s operations (%s), the reference serves; with a C++ compiler, installing again builds them",
            backend,
            error,
        )
        return None
