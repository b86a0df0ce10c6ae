"""Timed: a backend that measures another one: how long each op takes, what it must read, and what it computes.

The arguments of a call tell its work: bytes of weights and cache that it cannot do without (of experts, those that a
token has chosen), and operations, a multiplication and an addition being two. It captures no steps: what Python does
between the ops is in sight. Not here: what the machine could do at best (Backend.limits), parts of a step that are no
ops (engine/profile.py).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glimmer.backends.base import Backend, ExpertSet, KVCache, KVCacheSpec, Packed, RouteRule
from glimmer.batch import Batch
from glimmer.weight import ExpertWeights, Kind, Weight

# Which of Backend.limits() holds for products of a kind. float32 has no limit of its own there: it is not counted.
LIMIT_OF = {"bfloat16": "bfloat16", Kind.FP8: "bfloat16", Kind.INT8: "int8", Kind.INT4: "int8"}


LENGTHS = 64  # lengths of sequences count as the next multiple of this: a token more is no other call


class Values(NamedTuple):
    """A tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Matrix(NamedTuple):
    """`number` packed matrices (n, k). stored: the dtype of plain values; wide: results are float32."""

    kind: str
    n: int
    k: int
    group_size: int | None
    stored: torch.dtype
    wide: bool
    number: int = 1

    @property
    def row_bytes(self) -> float:
        """Of one of the n rows, without its scales."""
        return self.k * (self.stored.itemsize if self.kind == Kind.PLAIN else Kind(self.kind).bits / 8)


class Cache(NamedTuple):
    """A layer's KV cache, of whatever length."""

    block_size: int
    heads: int
    head_dim: int
    dtype: torch.dtype


class Lengths(NamedTuple):
    """A batch: rows of each sequence, and keys that they see."""

    query: tuple[int, ...]
    seq: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """An op, and of its arguments what decides how long it takes; for experts (x, choices of each row, gate_up, down),
    whose number is that of the distinct experts that are chosen."""

    op: str
    arguments: tuple[object, ...]

    @staticmethod
    def of(op: str, *arguments: object) -> "Call":
        """The call of an op with these arguments."""
        return Call(op, tuple(_described(argument) for argument in arguments))


@dataclass
class Cost:
    """What one part of the steps took: seconds, bytes read at least, operations by the limit that holds for them, and
    the calls of ops."""

    seconds: float = 0.0
    nbytes: int = 0
    operations: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    calls: Counter[Call] = field(default_factory=Counter)

    def add(self, nbytes: int, kind: str, operations: int) -> None:
        """Count work. kind: of the numbers that are multiplied."""
        self.nbytes += nbytes
        if kind in LIMIT_OF:
            self.operations[LIMIT_OF[kind]] += operations

    def include(self, other: "Cost") -> None:
        """Count another part's work, without its seconds."""
        self.nbytes += other.nbytes
        self.calls.update(other.calls)
        for kind, operations in other.operations.items():
            self.operations[kind] += operations

    @property
    def sequences(self) -> float:
        """How many there were in a step."""
        counts = [(n, len(a.query)) for call, n in self.calls.items() for a in call.arguments if isinstance(a, Lengths)]
        return sum(n * sequences for n, sequences in counts) / max(sum(n for n, _ in counts), 1)

    def at_best(self, limits: Mapping[str, float]) -> tuple[float, float]:
        """Seconds that its reads, and that its operations would take alone at the machine's limits."""
        return self.nbytes / limits["read"], sum(n / limits[kind] for kind, n in self.operations.items())


class Timed(Backend):
    """The ops of `inner`, measured. Whoever computes with it holds what `inner` has packed and allocated.

    names: of packed matrices, by id. synchronize: waits until the device has finished all that was queued.
    """

    name = "timed"

    def __init__(self, inner: Backend, names: Mapping[int, str], synchronize: Callable[[], None]):
        super().__init__(inner.device, inner.threads)
        self.inner, self.names, self.synchronize = inner, names, synchronize
        self._parts: defaultdict[str, Cost] = defaultdict(Cost)
        self._chosen: list[tuple[object, Tensor, ExpertSet]] = []  # of whose experts only the distinct ones are read

    def parts(self) -> dict[str, Cost]:
        """What each op took, linear ones by the names of their matrices."""
        part = self._parts["experts"] if self._chosen else Cost()
        for x, ids, experts in self._chosen:
            distinct = len(ids.unique())
            for packed in (experts.gate_up, experts.down):
                part.nbytes += int(distinct / packed.count * packed.nbytes)
            matrices = (_matrix(packed)._replace(number=distinct) for packed in (experts.gate_up, experts.down))
            part.calls[Call("experts", (x, _described(ids), *matrices))] += 1
        self._chosen.clear()
        return dict(self._parts)

    @contextmanager
    def measure(self, name: str, *call: Any) -> Iterator[Cost]:
        """The time of a block as a part's. call: the op and its arguments, where it is the call of an op."""
        part = self._parts[name]
        self.synchronize()
        begin = perf_counter()
        yield part
        self.synchronize()
        part.seconds += perf_counter() - begin
        if call:
            part.calls[Call.of(*call)] += 1

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        with self.measure("embed", "embed", tokens, table, first):
            return self.inner.embed(tokens, table, first)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with self.measure("rms_norm", "rms_norm", x, weight, eps):
            return self.inner.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        with self.measure("add_rms_norm", "add_rms_norm", x, residual, weight, eps):
            return self.inner.add_rms_norm(x, residual, weight, eps)

    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        with self.measure("concat", "concat", x, y):
            return self.inner.concat(x, y)

    def add_(self, y: Tensor, x: Tensor) -> None:
        with self.measure("add_", "add_", y, x):
            self.inner.add_(y, x)

    def swiglu(self, x: Tensor) -> Tensor:
        with self.measure("swiglu", "swiglu", x):
            return self.inner.swiglu(x)

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        with self.measure("rope_", "rope_", q, k, cos, sin):
            self.inner.rope_(q, k, cos, sin)

    def forbid_(self, logits: Tensor, allowed: Tensor) -> None:
        self.inner.forbid_(logits, allowed)  # a part of sampling, which is no part of the model

    def argmax_(self, tokens: Tensor, logits: Tensor) -> None:
        self.inner.argmax_(tokens, logits)  # a part of drafting

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        with self.measure(self.names[id(weight)], "linear", x, weight, bias) as part:
            y = self.inner.linear(x, weight, bias)
        # y is float32 where the weights are.
        part.add(weight.nbytes, _numbers(weight.kind, y), 2 * len(x) * weight.n * weight.k)
        return y

    def route(self, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        with self.measure("route", "route", logits, bias, rule):
            return self.inner.route(logits, bias, rule)

    def experts(self, x: Tensor, ids: Tensor, scores: Tensor, experts: ExpertSet) -> Tensor:
        with self.measure("experts") as part:
            y = self.inner.experts(x, ids, scores, experts)
        for packed in (experts.gate_up, experts.down):
            part.add(0, _numbers(packed.kind, x), 2 * ids.numel() * packed.n * packed.k)
        self._chosen.append((_described(x), ids.clone(), experts))
        return y

    def fetch_experts(self, ids: Tensor, experts: ExpertSet) -> None:
        self.inner.fetch_experts(ids, experts)

    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        with self.measure("store_kv_", "store_kv_", k, v, kv, slot_mapping):
            self.inner.store_kv_(k, v, kv, slot_mapping)

    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        with self.measure("attention", "attention", q, kv, batch, scale) as part:
            y = self.inner.attention(q, kv, batch, scale)
        query_start_loc, seq_lens = batch.query_start_loc_cpu.tolist(), batch.seq_lens_cpu.tolist()
        rows = [stop - start for start, stop in pairwise(query_start_loc)]
        pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(rows, seq_lens))
        part.add(sum(seq_lens) * kv.token_bytes, _numbers(Kind.PLAIN, q), 4 * q.shape[1] * q.shape[2] * pairs)
        return y

    def quantize(self, weight: Weight, kind: str, group: int | None) -> Weight:
        return self.inner.quantize(weight, kind, group)

    def pack_linear(self, parts: Sequence[Weight], dtype: torch.dtype) -> Packed:
        return self.inner.pack_linear(parts, dtype)

    def pack_experts(self, experts: Iterable[ExpertWeights], count: int, dtype: torch.dtype) -> ExpertSet:
        return self.inner.pack_experts(experts, count, dtype)

    def packed_bytes(self, weight: Weight) -> int:
        return self.inner.packed_bytes(weight)

    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int) -> list[KVCache]:
        return self.inner.allocate_kv(spec, num_blocks)

    def kv_block_bytes(self, spec: KVCacheSpec) -> int:
        return self.inner.kv_block_bytes(spec)

    def export_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int]) -> Tensor:
        return self.inner.export_blocks(caches, blocks)

    def import_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int], data: Tensor) -> None:
        self.inner.import_blocks(caches, blocks, data)

    def checksum(self, data: memoryview) -> bytes:
        return self.inner.checksum(data)

    def prepare(self, batch: Batch) -> Batch:
        return self.inner.prepare(batch)

    @property
    def torch_threads(self) -> int:
        return self.inner.torch_threads

    def serves(self, op: str) -> str:
        return self.inner.serves(op)


def _described(argument: object) -> object:
    """What of an argument decides how long an op takes."""
    if isinstance(argument, Tensor):
        return Values(tuple(argument.shape), argument.dtype)
    if isinstance(argument, KVCache):
        return Cache(argument.block_size, argument.num_kv_heads, argument.head_dim, argument.keys.dtype)
    if isinstance(argument, Batch):
        starts, lens = argument.query_start_loc_cpu.tolist(), argument.seq_lens_cpu.tolist()
        rounded = (-(-length // LENGTHS) * LENGTHS for length in lens)
        return Lengths(tuple(stop - start for start, stop in pairwise(starts)), tuple(rounded))
    return _matrix(argument) if hasattr(argument, "kind") else argument


def _matrix(packed: Any) -> Matrix:
    """A packed matrix, of whatever backend."""
    stored = torch.float32 if getattr(packed, "stored_kind", None) == "float32" else torch.bfloat16
    group_size = packed.group_size if packed.kind == Kind.INT4 else None
    return Matrix(packed.kind, packed.n, packed.k, group_size, stored, getattr(packed, "float32", False))


def _numbers(kind: str, values: Tensor) -> str:
    """The kind of the numbers that are multiplied: that of the weights, or of plain values their dtype."""
    return str(values.dtype).removeprefix("torch.") if kind == Kind.PLAIN else kind
