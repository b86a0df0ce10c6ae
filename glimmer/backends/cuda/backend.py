"""Cuda: one GPU's ops as Triton kernels, for NVIDIA's cards and AMD's; what Triton would do no better, torch does.

It allocates results and launches kernels, and nowhere waits for the device, so that a decoding step can become a graph.
Matrices are packed as they come, all experts of a layer in one tensor; plain matrices are torch's to multiply. The KV
cache is laid out as the reference's. Under TRITON_INTERPRET=1 the same kernels run on a CPU, slowly: for tests.
Not here: the kernels (rows.py, products.py, attention.py), several GPUs (group.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from glimmer.backends.base import Captured, ExpertSet, KVCache, KVCacheSpec, Packed, RouteRule
from glimmer.backends.cuda import attention, products, rows
from glimmer.backends.reference import Reference
from glimmer.batch import Batch
from glimmer.weight import ExpertWeights, Kind, Weight

COLUMNS = 1024  # of a row, that one program computes where columns do not depend on each other
FEW_ROWS, MANY_ROWS = 16, 64  # of a tile: the fewest that matrix units take, and as many as fit registers well
SPLIT = 1024  # keys that one program of a decoding step reads, or more where MAX_SPLITS would not suffice
MAX_SPLITS = 32  # each takes memory for every row
LOG2_E = 1.4426950408889634
CODES = {Kind.PLAIN: products.PLAIN, Kind.FP8: products.FP8, Kind.INT8: products.INT8, Kind.INT4: products.INT4}


@dataclass(frozen=True)
class PackedMatrices:
    """`count` matrices (n, k) of one kind. codes (count, n, ...), scales and zeros (count, n, groups), as Weight's."""

    kind: Kind
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    group_size: int | None

    @property
    def count(self) -> int:
        """Matrices."""
        return self.codes.shape[0]

    @property
    def n(self) -> int:
        """Rows of each: outputs."""
        return self.codes.shape[1]

    @property
    def k(self) -> int:
        """Columns of each: inputs."""
        return self.codes.shape[2] * (2 if self.kind == Kind.INT4 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros) if part is not None)

    @staticmethod
    def of(weight: Weight) -> "PackedMatrices":
        """One matrix, where it lies."""
        codes, scales, zeros = (None if p is None else p[None] for p in (weight.codes, weight.scales, weight.zeros))
        assert codes is not None
        return PackedMatrices(Kind(weight.kind), codes, scales, zeros, weight.group_size)

    @staticmethod
    def like(weight: Weight, count: int) -> "PackedMatrices":
        """Room for matrices like this one, on its device."""
        parts = (weight.codes, weight.scales, weight.zeros)
        codes, scales, zeros = (None if part is None else part.new_empty((count, *part.shape)) for part in parts)
        assert codes is not None
        return PackedMatrices(Kind(weight.kind), codes, scales, zeros, weight.group_size)

    def put(self, e: int, weight: Weight) -> None:
        """Matrix e."""
        pairs = ((self.codes, weight.codes), (self.scales, weight.scales), (self.zeros, weight.zeros))
        for place, values in pairs:
            assert (place is None) == (values is None), "matrices with zero points beside others without"
            if place is not None and values is not None:
                place[e].copy_(values)


class Graph:
    """A captured step: a CUDA graph, whose results lie in memory that all graphs of one backend share."""

    def __init__(self, function: Callable[[], Tensor], pool: Any):
        function()  # what Triton compiles and torch allocates once is no part of a graph
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and copy meanwhile: blocks of the cache to the disk, for one.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function()
        self._graph.replay()

    def replay(self) -> None:
        self._graph.replay()


class Cuda(Reference):
    """One GPU, or under Triton's interpreter a CPU."""

    name = "triton"
    cache_layout = "triton 1"

    def __init__(self, device: torch.device, threads: int = 1):
        super().__init__(device, threads)
        self._interpreted = bool(triton.knobs.runtime.interpret)
        self._graphs: Any = None  # the memory of all graphs
        self.captures = device.type == "cuda"

    def capture(self, function: Callable[[], Tensor]) -> Captured:
        if self._graphs is None:
            self._graphs = torch.cuda.graph_pool_handle()
        return Graph(function, self._graphs)

    # ------------------------------------------------------------------ rows

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        tokens, n = tokens.contiguous(), table.shape[1]
        y = table.new_empty(len(tokens), n)
        rows.embed[_grid(len(tokens), n)](tokens, table, y, first, len(table), n, BLOCK=COLUMNS)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        n = x.shape[-1]
        y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        if x.ndim == 3:
            x = _heads(x)
            heads, row_stride, head_stride = x.shape[1], x.stride(0), x.stride(1)
        else:
            x = x.contiguous().view(-1, n)
            heads, row_stride, head_stride = 1, n, 0
        rows.rms_norm[(len(x) * heads,)](
            x, weight, y, heads, row_stride, head_stride, n, eps, BLOCK=triton.next_power_of_2(n)
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual, n = x.contiguous(), residual.contiguous(), x.shape[1]
        total, y = torch.empty_like(residual), torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        rows.add_rms_norm[(len(x),)](x, residual, weight, total, y, n, eps, BLOCK=triton.next_power_of_2(n))
        return y, total

    def swiglu(self, x: Tensor) -> Tensor:
        x, m = x.contiguous(), x.shape[1] // 2
        y = x.new_empty(len(x), m)
        rows.swiglu[_grid(len(x), m)](x, y, m, BLOCK=COLUMNS)
        return y

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        cos, sin, half = cos.contiguous(), sin.contiguous(), cos.shape[1]
        assert q.stride(2) == k.stride(2) == 1, "heads whose dimensions lie apart"
        rows.rope[(len(q) * (q.shape[1] + k.shape[1]),)](
            q, k, cos, sin, q.shape[1], k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1), half,
            BLOCK=triton.next_power_of_2(half),
        )  # fmt: skip

    def forbid_(self, logits: Tensor, allowed: Tensor) -> None:
        assert logits.stride(1) == 1 and allowed.stride(1) == 1, "rows whose columns lie apart"
        v = logits.shape[1]
        rows.forbid[_grid(len(logits), v)](logits, allowed, v, logits.stride(0), allowed.stride(0), BLOCK=COLUMNS)

    # ------------------------------------------------------------------ weights

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, PackedMatrices)
        if weight.kind == Kind.PLAIN:
            w = weight.codes[0]
            wide = w.dtype == torch.float32
            y = F.linear(x.float() if wide else x, w)
            return (y if bias is None else y + bias).to(x.dtype)
        codes, scales = _quantized(x, weight)
        y = x.new_empty(len(x), weight.n)
        per_tile = FEW_ROWS if len(x) <= FEW_ROWS else MANY_ROWS
        self._multiply(codes, scales, weight, y, per_tile, triton.cdiv(len(x), per_tile), bias=bias)
        return y

    def route(self, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        """Groups of experts, which no checkpoint of this family has, are the reference's to choose."""
        if rule.n_group > 1:
            return super().route(logits, bias, rule)
        logits, (t, e) = logits.float().contiguous(), logits.shape
        ids = torch.empty(t, rule.top_k, dtype=torch.int64, device=logits.device)
        scores = logits.new_empty(t, rule.top_k)
        rows.route[(t,)](
            logits, bias, ids, scores, e, rule.routed_scaling_factor, TOP_K=rule.top_k,
            CHOSEN=triton.next_power_of_2(rule.top_k), NORM=rule.norm_topk_prob, BLOCK=triton.next_power_of_2(e),
        )  # fmt: skip
        return ids, scores

    def experts(self, x: Tensor, ids: Tensor, scores: Tensor, experts: ExpertSet) -> Tensor:
        gate_up, down = experts.gate_up, experts.down
        assert isinstance(gate_up, PackedMatrices) and isinstance(down, PackedMatrices)
        top_k, pairs, e = ids.shape[1], ids.numel(), gate_up.count
        per_tile = FEW_ROWS if pairs <= FEW_ROWS * e else MANY_ROWS
        flat = ids.flatten()
        order = flat.argsort(stable=True)  # token-expert pairs, sorted by expert
        counts = torch.zeros(e, dtype=torch.int64, device=x.device).scatter_add_(0, flat, torch.ones_like(flat))
        ends, tile_ends = counts.cumsum(0), ((counts + per_tile - 1) // per_tile).cumsum(0)
        # As many tiles as there can be at most: how many there are, the device alone knows.
        tiles = min(pairs, pairs // per_tile + e)
        of_tiles = torch.searchsorted(tile_ends, torch.arange(tiles, device=x.device), right=True)
        routed = (order, counts, ends, tile_ends, of_tiles)
        m, h = gate_up.n // 2, down.n
        y = x.new_empty(pairs, m)
        codes, row_scales = _quantized(x, gate_up)
        self._multiply(codes, row_scales, gate_up, y, per_tile, tiles, routed=routed, gather=top_k, gated=True)
        codes, row_scales = _quantized(y, down)
        each = x.new_empty(pairs, h)
        self._multiply(codes, row_scales, down, each, per_tile, tiles, routed=routed)
        total = torch.empty(len(x), h, dtype=torch.float32, device=x.device)
        rows.combine[_grid(len(x), h)](each, scores.contiguous(), total, h, TOP_K=top_k, BLOCK=COLUMNS)
        return total

    def _multiply(
        self,
        x: Tensor,
        x_scales: Tensor,
        w: PackedMatrices,
        y: Tensor,
        per_tile: int,
        tiles: int,
        *,
        bias: Tensor | None = None,
        routed: tuple[Tensor, ...] | None = None,
        gather: int = 0,
        gated: bool = False,
    ) -> None:
        """products.multiply. gather: experts of a row of x, where its rows are taken by the order of the pairs."""
        n = y.shape[1]
        group = w.group_size or w.k
        least = 32 if w.kind == Kind.INT4 else 64
        columns = 64 if per_tile == FEW_ROWS else 128
        products.multiply[(tiles, triton.cdiv(n, columns))](
            x, x_scales, _bytes(w), x if w.scales is None else w.scales, x if w.zeros is None else w.zeros,
            x if bias is None else bias, y, *(routed or (x,) * 5),
            len(routed[0]) if routed else len(x), n, w.k, w.count, x.stride(0), x_scales.shape[-1], group,
            KIND=CODES[w.kind], ROUTED=routed is not None, GATHER=gather, GATED=gated, BIAS=bias is not None,
            ZEROS=w.zeros is not None, WIDEN=self._interpreted, ROWS=per_tile, COLUMNS=columns,
            INNER=min(128, max(least, triton.next_power_of_2(group))) if w.kind == Kind.INT4 else least,
        )  # fmt: skip

    def pack_linear(self, parts: Sequence[Weight], dtype: torch.dtype) -> Packed:
        return PackedMatrices.of(Weight.join(parts, dtype, self.device))

    def pack_experts(self, experts: Iterable[ExpertWeights], count: int, dtype: torch.dtype) -> ExpertSet:
        gate_up: PackedMatrices | None = None
        down: PackedMatrices | None = None
        for e, (both, low) in enumerate(experts):
            upper, lower = Weight.join(both, dtype, self.device), Weight.join([low], dtype, self.device)
            if gate_up is None or down is None:
                gate_up, down = PackedMatrices.like(upper, count), PackedMatrices.like(lower, count)
            gate_up.put(e, upper)
            down.put(e, lower)
        assert gate_up is not None and down is not None, "a layer without experts"
        return ExpertSet(gate_up, down)

    def packed_bytes(self, weight: Weight) -> int:
        return super().packed_bytes(weight)

    # ------------------------------------------------------------------ cache

    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int) -> list[KVCache]:
        return super().allocate_kv(spec, num_blocks)

    def export_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int]) -> Tensor:
        return super().export_blocks(caches, blocks)

    def import_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int], data: Tensor) -> None:
        super().import_blocks(caches, blocks, data)

    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        k, v, slots, d = _heads(k), _heads(v), slot_mapping.contiguous(), kv.head_dim
        attention.store[(len(k) * k.shape[1], 2)](
            k, v, kv.keys, kv.values, slots, k.shape[1], k.stride(0), k.stride(1), v.stride(0), v.stride(1), d,
            kv.keys.shape[3], CODES=kv.quantized, BLOCK=triton.next_power_of_2(d),
        )  # fmt: skip

    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        q, (t, heads, d) = _heads(q), q.shape
        g, share = kv.num_kv_heads, heads // kv.num_kv_heads
        lens = batch.query_start_loc_cpu.diff()
        fewest = max(FEW_ROWS, triton.next_power_of_2(share))
        decodes = int(lens.max()) <= fewest // share
        per_tile = fewest if decodes else max(MANY_ROWS, fewest)
        # Of the table, not of the sequences: a captured step serves sequences of any length that it has room for.
        longest = batch.block_tables.shape[1] * kv.block_size
        splits = min(triton.cdiv(longest, SPLIT), MAX_SPLITS) if decodes else 1
        y = q.new_empty(t, heads * d)
        parts, largest, sums = y, y, y
        if splits > 1:
            parts = torch.empty(splits, t, heads, d, dtype=torch.float32, device=q.device)
            largest, sums = (torch.empty(splits, t, heads, dtype=torch.float32, device=q.device) for _ in range(2))
        tiles = t // (per_tile // share) + batch.num_sequences
        attention.attend[(tiles, g, splits)](
            q, kv.keys, kv.values, parts, largest, sums, batch.block_tables, batch.query_start_loc, batch.seq_lens,
            scale * LOG2_E, batch.num_sequences, t, batch.block_tables.shape[1], q.stride(0), q.stride(1), g,
            kv.block_size, SPLIT, MAX_SPLITS, D=d, WIDTH=kv.keys.shape[3], SHARE=share, CODES=kv.quantized,
            SPLIT=splits > 1, WIDEN=self._interpreted, ROWS=per_tile, KEYS=64, BLOCK=triton.next_power_of_2(max(16, d)),
        )  # fmt: skip
        if splits > 1:
            block = triton.next_power_of_2(d)
            attention.merge[(t * heads,)](parts, largest, sums, y, t * heads, splits, d, BLOCK=block)
        return y


def _grid(count: int, width: int) -> tuple[int, int]:
    """Programs for rows of which each computes COLUMNS columns."""
    return count, triton.cdiv(width, COLUMNS)


def _heads(x: Tensor) -> Tensor:
    """x (T, h, D) with the dimensions of a head side by side; rows and heads may lie further apart."""
    return x if x.stride(2) == 1 else x.contiguous()


def _bytes(w: PackedMatrices) -> Tensor:
    """The codes as the kernel reads them: e4m3 as bytes, since not every GPU knows the format."""
    return w.codes.view(torch.uint8) if w.kind == Kind.FP8 else w.codes


def _quantized(x: Tensor, w: PackedMatrices) -> tuple[Tensor, Tensor]:
    """Rows as codes and scales (T, groups), as weights of this kind are multiplied; as they are for plain ones."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if w.kind == Kind.PLAIN:
        return (x.float() if w.codes.dtype == torch.float32 else x), x
    t, k = x.shape
    group = w.group_size or k
    groups = triton.cdiv(k, group)
    codes = torch.empty(t, k, dtype=torch.bfloat16 if w.kind == Kind.FP8 else torch.int8, device=x.device)
    scales = torch.empty(t, groups, dtype=torch.float32, device=x.device)
    rows.quantize[(t, groups)](
        x, codes, scales, k, x.stride(0), group, FP8=w.kind == Kind.FP8, BLOCK=triton.next_power_of_2(min(group, k))
    )
    return codes, scales
