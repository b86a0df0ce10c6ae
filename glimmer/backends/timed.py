"""Timed: a backend that measures another one: how long each op takes, what it must read, and what it computes.

The arguments of a call tell its work: bytes of weights and cache that it cannot do without (of experts, those that a
token has chosen), and operations, a multiplication and an addition being two. It captures no steps: what Python does
between the ops is in sight. Not here: what the machine could do at best (Backend.limits), parts of a step that are no
ops (engine/profile.py).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from glimmer.backends.base import Backend, ExpertSet, KVCache, KVCacheSpec, Packed, RouteRule
from glimmer.batch import Batch
from glimmer.weight import ExpertWeights, Kind, Weight

# Which of Backend.limits() holds for products of a kind. float32 has no limit of its own there: it is not counted.
LIMIT_OF = {"bfloat16": "bfloat16", Kind.FP8: "bfloat16", Kind.INT8: "int8", Kind.INT4: "int8"}


@dataclass
class Cost:
    """What one part of the steps took: seconds, bytes read at least, operations by the limit that holds for them,
    elements that ops have gone through row by row (norms, rotations, sums), and calls of ops."""

    seconds: float = 0.0
    nbytes: int = 0
    operations: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    elements: int = 0
    calls: int = 0

    def add(self, nbytes: int, kind: str, operations: int) -> None:
        """Count work. kind: of the numbers that are multiplied."""
        self.nbytes += nbytes
        if kind in LIMIT_OF:
            self.operations[LIMIT_OF[kind]] += operations

    def include(self, other: "Cost") -> None:
        """Count another part's work, without its seconds."""
        self.nbytes += other.nbytes
        self.elements += other.elements
        self.calls += other.calls
        for kind, operations in other.operations.items():
            self.operations[kind] += operations

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
        self._chosen: list[tuple[Tensor, ExpertSet]] = []  # of whose experts only the distinct ones are read

    def parts(self) -> dict[str, Cost]:
        """What each op took, linear ones by the names of their matrices."""
        for ids, experts in self._chosen:
            distinct = len(ids.unique())
            for packed in (experts.gate_up, experts.down):
                self._parts["experts"].nbytes += int(distinct / packed.count * packed.nbytes)
        self._chosen.clear()
        return dict(self._parts)

    @contextmanager
    def measure(self, name: str) -> Iterator[Cost]:
        """The time of a block as a part's."""
        part = self._parts[name]
        self.synchronize()
        begin = perf_counter()
        yield part
        self.synchronize()
        part.seconds += perf_counter() - begin
        part.calls += 1

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        with self.measure("embed") as part:
            y = self.inner.embed(tokens, table, first)
        part.elements += y.numel()
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with self.measure("rms_norm") as part:
            part.elements += x.numel()
            return self.inner.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        with self.measure("add_rms_norm") as part:
            part.elements += x.numel()
            return self.inner.add_rms_norm(x, residual, weight, eps)

    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        with self.measure("concat") as part:
            part.elements += x.numel() + y.numel()
            return self.inner.concat(x, y)

    def add_(self, y: Tensor, x: Tensor) -> None:
        with self.measure("add_") as part:
            part.elements += x.numel()
            self.inner.add_(y, x)

    def swiglu(self, x: Tensor) -> Tensor:
        with self.measure("swiglu") as part:
            part.elements += x.numel()
            return self.inner.swiglu(x)

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        with self.measure("rope_") as part:
            part.elements += q.numel() + k.numel()
            self.inner.rope_(q, k, cos, sin)

    def forbid_(self, logits: Tensor, allowed: Tensor) -> None:
        self.inner.forbid_(logits, allowed)  # a part of sampling, which is no part of the model

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        with self.measure(self.names[id(weight)]) as part:
            y = self.inner.linear(x, weight, bias)
        # y is float32 where the weights are.
        part.add(weight.nbytes, _numbers(weight.kind, y), 2 * len(x) * weight.n * weight.k)
        return y

    def route(self, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        with self.measure("route"):
            return self.inner.route(logits, bias, rule)

    def experts(self, x: Tensor, ids: Tensor, scores: Tensor, experts: ExpertSet) -> Tensor:
        with self.measure("experts") as part:
            y = self.inner.experts(x, ids, scores, experts)
        for packed in (experts.gate_up, experts.down):
            part.add(0, _numbers(packed.kind, x), 2 * ids.numel() * packed.n * packed.k)
        self._chosen.append((ids.clone(), experts))
        return y

    def fetch_experts(self, ids: Tensor, experts: ExpertSet) -> None:
        self.inner.fetch_experts(ids, experts)

    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        with self.measure("store_kv_") as part:
            part.elements += k.numel() + v.numel()
            self.inner.store_kv_(k, v, kv, slot_mapping)

    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        with self.measure("attention") as part:
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


def _numbers(kind: str, values: Tensor) -> str:
    """The kind of the numbers that are multiplied: that of the weights, or of plain values their dtype."""
    return str(values.dtype).removeprefix("torch.") if kind == Kind.PLAIN else kind
