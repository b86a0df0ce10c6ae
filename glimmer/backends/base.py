"""Backend: the arithmetic of one kind of device, behind one object for each engine.

The model calls nothing but these methods (the ops). A backend owns what its ops share: how weights are packed, how the
KV cache is laid out, what a step needs on the device, how a step is captured, how many threads compute. An op gets
tensors and numbers, never a configuration; it writes over an input only if its name ends in `_`. reference.py is the
definition with which every other backend is compared; a backend that overrides one op of a layout overrides them all
(LAYOUTS). Not here: knowledge of ranks, and any choice made per call.

In the shapes: T rows (tokens of the step), H hidden size, h query heads, g key-value heads, D head dimension, R rotated
dimensions, E experts, K experts of a token, M the width of an expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from glimmer.batch import Batch
from glimmer.foreign import pread
from glimmer.weight import ExpertWeights, Kind, Weight

# Ops that share a layout: all of them are one class's, or none.
LAYOUTS = {
    "weights": ("pack_linear", "pack_experts", "packed_bytes", "linear", "experts"),
    "cache": ("allocate_kv", "store_kv_", "attention", "export_blocks", "import_blocks"),
}
WEIGHT_OPS = ("linear", "experts")  # which one backend may serve for some kinds of weights, another for others
OPS = (
    "embed", "rms_norm", "add_rms_norm", "concat", "linear", "add_", "swiglu", "rope_", "store_kv_", "attention",
    "route", "experts", "forbid_", "argmax_", "quantize", "pack_linear", "pack_experts",
)  # fmt: skip


@dataclass(frozen=True)
class RouteRule:
    """How a token chooses experts; fields as in config.json, top_k = num_experts_per_tok."""

    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class Packed(Protocol):
    """`count` matrices (n, k), y = x @ W.T, in a backend's own layout."""

    @property
    def count(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

    @property
    def kind(self) -> str:
        """A Kind of weight.py."""
        ...


@dataclass(frozen=True)
class ExpertSet:
    """The routed experts of one layer, all of them in the device's memory.

    gate_up holds (2M, H) of each expert, gate above up; down holds (H, M).
    """

    gate_up: Packed
    down: Packed

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class KVCacheSpec:
    """What one block of the KV cache holds, over all layers. dtype: the model's, or int8 for codes with scales."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, laid out by the backend that has allocated them; only its ops look inside.

    keys and values have the shape (blocks, block_size, g, D), or D + 4 bytes of int8: codes and a float32 scale.
    """

    keys: Tensor
    values: Tensor
    head_dim: int

    @property
    def num_blocks(self) -> int:
        """Blocks that there are."""
        return self.keys.shape[0]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """g."""
        return self.keys.shape[2]

    @property
    def quantized(self) -> bool:
        """Whether int8 codes and scales are kept in place of values."""
        return self.keys.dtype == torch.int8

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return (self.keys.nbytes + self.values.nbytes) // (self.num_blocks * self.block_size)


class Captured(Protocol):
    """A computation that can be repeated without Python: recorded calls on a CPU, a graph on a GPU."""

    @property
    def output(self) -> Tensor:
        """What the captured function has returned; `replay` writes a new value into it."""
        ...

    def replay(self) -> None:
        """Compute once more from what now lies in the tensors that the captured function has read."""
        ...


class Backend(ABC):
    """One device of one engine. Two backends of one process do not disturb each other."""

    name: ClassVar[str]
    # Changes with the bytes of a block of the cache, be it their layout or how the values in them are rounded.
    cache_layout: ClassVar[str] = "1"
    captures: bool = False  # whether `capture` is there

    def __init__(self, device: torch.device, threads: int = 1):
        """threads: CPU threads that compute, where the CPU does."""
        self.device, self.threads = device, threads

    @classmethod
    def make(cls, device: torch.device, threads: int, cache: "KVCacheSpec | None") -> "Backend":
        """The backend for an engine whose KV cache shall hold what `cache` says; None: it has none."""
        return cls(device, threads)

    # ------------------------------------------------------------------ rows

    @abstractmethod
    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        """tokens (T,) int64, table (V', H) -> (T, H): rows of the table for first..first+V', zeros for other tokens."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (..., N), weight (N,) -> (..., N) in weight's dtype: x / sqrt(mean(x²) + eps) * weight, in float32."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x, residual (T, H) -> (the norm of residual + x in weight's dtype, residual + x in residual's dtype)."""

    @abstractmethod
    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        """x (T, M), y (T, N) of one dtype -> (T, M + N)."""

    @abstractmethod
    def add_(self, y: Tensor, x: Tensor) -> None:
        """y (T, H) += x (T, H)."""

    @abstractmethod
    def swiglu(self, x: Tensor) -> Tensor:
        """x (T, 2M), gate then up -> (T, M): silu(gate) * up."""

    @abstractmethod
    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate pairs (i, i + R/2) of the first R dimensions of q (T, h, D) and k (T, g, D) by cos, sin (T, R/2)."""

    @abstractmethod
    def forbid_(self, logits: Tensor, allowed: Tensor) -> None:
        """logits (T, V) float32 = -infinity at id i where bit i % 8 of byte i // 8 of allowed (T, V/8 or more) is 0."""

    @abstractmethod
    def argmax_(self, tokens: Tensor, logits: Tensor) -> None:
        """tokens (T,) int64 = the first of the largest of each row of logits (T, V)."""

    # ------------------------------------------------------------------ weights

    @abstractmethod
    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """x (T, in) -> (T, out) in x's dtype, or in float32 where the weights are float32."""

    @abstractmethod
    def route(self, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        """logits (T, E) float32, bias (E,) float32 -> ids (T, K) int64, scores (T, K) float32."""

    @abstractmethod
    def experts(self, x: Tensor, ids: Tensor, scores: Tensor, experts: ExpertSet) -> Tensor:
        """(T, H) -> (T, H) float32: the sum over K of scores[:, k] * down(swiglu(gate_up(x))) of expert ids[:, k]."""

    def fetch_experts(self, ids: Tensor, experts: ExpertSet) -> None:  # noqa: B027  # most backends have nothing to do
        """ids (T, K) will be asked for: where experts are not in memory, begin to read them."""

    @abstractmethod
    def quantize(self, weight: Weight, kind: str, group: int | None) -> Weight:
        """A plain or fp8 Weight as fp8, int8, or int4 in groups of `group` columns; see `Weight.quantize`."""

    @abstractmethod
    def pack_linear(self, parts: Sequence[Weight], dtype: torch.dtype) -> Packed:
        """One matrix with the rows of all parts, on the device; plain values become `dtype`."""

    @abstractmethod
    def pack_experts(self, experts: Iterable[ExpertWeights], count: int, dtype: torch.dtype) -> ExpertSet:
        """All experts of a layer, on the device, taken one at a time; plain values become `dtype`.

        gate_up of all experts are of one kind and group size, and so are all down.
        """

    @abstractmethod
    def packed_bytes(self, weight: Weight) -> int:
        """Bytes that a Weight, perhaps without values, takes once packed."""

    def pread(self, descriptor: int, memory: Tensor, offset: int) -> int:
        """Read bytes of an open file, from `offset` on, into memory (n,) uint8 of the host, with as many threads as
        pay: how many there are before its end. OSError."""
        return pread(descriptor, memory.numpy().data, offset)

    # ------------------------------------------------------------------ cache

    @abstractmethod
    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int) -> list[KVCache]:
        """An empty cache for each layer. What no token has filled reads as zeros."""

    @abstractmethod
    def kv_block_bytes(self, spec: KVCacheSpec) -> int:
        """Bytes that one block takes over all layers, keys and values together."""

    @abstractmethod
    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        """Write k, v (T, g, D) to slots (T,) int64 of the cache: slot = block * block_size + offset."""

    @abstractmethod
    def export_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int]) -> Tensor:
        """What these blocks hold in all layers: (blocks, kv_block_bytes) uint8 on the host. For any thread."""

    @abstractmethod
    def import_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int], data: Tensor) -> None:
        """The reverse: fill blocks with bytes that `export_blocks` gave, while no op uses them. For any thread."""

    @abstractmethod
    def checksum(self, data: memoryview) -> bytes:
        """32 bytes that change when the data do, other than by somebody's intent. By the calling thread alone."""

    @abstractmethod
    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        """q (T, h, D) -> (T, h * D): causal within each sequence of the batch; query head i reads head i // (h/g)."""

    # ------------------------------------------------------------------ steps

    @abstractmethod
    def prepare(self, batch: Batch) -> Batch:
        """The batch with what its ops need on the device, uploaded once a step."""

    def capture(self, function: Callable[[], Tensor]) -> Captured:
        """Call function, which calls ops of this backend and nothing else, and keep the calls to be repeated.

        Only where `captures` says so. What one capture returns is valid until another one is replayed.
        """
        raise NotImplementedError(f"{self.name} captures nothing")

    @contextmanager
    def running(self) -> Iterator[None]:
        """The time in which this backend computes: torch's own threads are as many as it wants, before and after it as
        many as they were."""
        before, wanted = torch.get_num_threads(), self.torch_threads
        if before != wanted:
            torch.set_num_threads(wanted)
        try:
            yield
        finally:
            if before != wanted:
                torch.set_num_threads(before)

    @property
    def torch_threads(self) -> int:
        """Threads for what this backend leaves to torch."""
        return self.threads

    # ------------------------------------------------------------------ what there is

    @property
    def kernels(self) -> str | None:
        """The instruction set of our own kernels, and of which others it was chosen; None: torch computes."""
        return None

    @property
    def build(self) -> str | None:
        """Which build of our own kernels it is: a digest; None: torch computes."""
        return None

    def limits(self) -> dict[str, float] | None:
        """What this machine can do at best, measured now by all threads of our own kernels; None: there are none.

        "read": bytes a second; "cached": the same of what fits in the processor's cache, which has "cache" bytes;
        "bfloat16", "int8": multiplications and additions a second in dot products of these.
        """
        return None

    def table(self) -> list[tuple[str, str]]:
        """(op, the backend that serves it), ops that multiply by weights once for each kind of weights."""
        rows: list[tuple[str, str]] = []
        for op in OPS:
            name = self.serves(op)
            rows += [(f"{op}[{kind}]", name) for kind in Kind] if op in WEIGHT_OPS else [(op, name)]
        return rows

    def serves(self, op: str) -> str:
        """The name of the backend whose code an op runs."""
        return next(cls.name for cls in type(self).__mro__ if op in vars(cls) and issubclass(cls, Backend))
