"""Every op in plain torch: the definition that faster backends must agree with. Runs wherever torch does.

Norms, softmax, routing and every sum are float32 inside; results are rounded once, on the way out. Packed matrices are
Weights on their device. Quantised weights stay as small as they are: they are widened to float32 at each use, which is
slow. Contracts and shapes: base.py.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from glimmer.backends.base import Backend, ExpertSet, KVCache, KVCacheSpec, Packed, RouteRule
from glimmer.batch import Batch
from glimmer.weight import FP8_MAX, ExpertWeights, Kind, Weight

WIDENED_ROWS = 1024  # rows of a bf16 matrix that are widened to float32 at once
EXACT = 1024  # so many products of numbers up to 127 add up exactly in float32: 1024 * 127 * 127 < 2**24
SCALE = torch.float32.itemsize  # bytes behind the codes of a key or a value in an int8 cache
QUERY_ROWS = 512  # query rows of one attention call that needs a mask, so that the mask stays small


@dataclass(frozen=True)
class PackedWeights:
    """Matrices of one shape and kind, as Weights."""

    weights: Sequence[Weight]

    @property
    def count(self) -> int:
        """Matrices."""
        return len(self.weights)

    @property
    def n(self) -> int:
        """Rows of each: outputs."""
        return self.weights[0].shape[0]

    @property
    def k(self) -> int:
        """Columns of each: inputs."""
        return self.weights[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def kind(self) -> str:
        """How their values are stored."""
        return self.weights[0].kind

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale, if the kind is int4."""
        return self.weights[0].group_size


class Reference(Backend):
    """Complete; every other backend begins with it and overrides what it does better."""

    name = "reference"

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        local = tokens - first
        mine = (local >= 0) & (local < len(table))
        return F.embedding(local.where(mine, 0), table).masked_fill_(~mine[:, None], 0)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return (x * weight).to(weight.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = (residual + x).to(residual.dtype)
        return Reference.rms_norm(self, residual, weight, eps), residual

    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat((x, y), -1)

    def add_(self, y: Tensor, x: Tensor) -> None:
        y.add_(x)

    def swiglu(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate.float()).mul_(up).to(x.dtype)

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        half = cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]  # (T, 1, R/2): one angle for all heads
        for x in (q, k):
            a, b = x[..., :half].float(), x[..., half : 2 * half].float()
            rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
            x[..., : 2 * half] = rotated

    def forbid_(self, logits: Tensor, allowed: Tensor) -> None:
        bits = allowed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=allowed.device) & 1
        logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))

    def argmax_(self, tokens: Tensor, logits: Tensor) -> None:
        tokens.copy_(logits.argmax(-1))

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """For a quantised weight, x is quantised first, and both sides' codes are multiplied exactly."""
        assert isinstance(weight, PackedWeights)
        y = _linear(x, weight.weights[0])
        return (y if bias is None else y + bias).to(x.dtype)

    def route(self, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        """Sigmoid scores; the correction bias takes part in choosing experts, never in weighing them."""
        scores = logits.float().sigmoid()
        choice = (scores + bias).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # scores keep the NaN
        if rule.n_group > 1:
            groups = choice.unflatten(-1, (rule.n_group, -1))  # (T, G, E/G)
            of_group = groups.topk(2, -1).values.sum(-1)
            of_group = of_group.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
            best = _best(of_group, rule.topk_group)  # (T, topk_group)
            allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            choice = groups.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        ids = _best(choice, rule.top_k)
        scores = scores.gather(-1, ids)
        if rule.norm_topk_prob:
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return ids, scores * rule.routed_scaling_factor

    def experts(self, x: Tensor, ids: Tensor, scores: Tensor, experts: ExpertSet) -> Tensor:
        gate_up, down = experts.gate_up, experts.down
        assert isinstance(gate_up, PackedWeights) and isinstance(down, PackedWeights)
        top_k = ids.shape[1]
        order = ids.flatten().argsort(stable=True)  # token-expert pairs, sorted by expert
        found, counts = ids.flatten()[order].unique_consecutive(return_counts=True)
        chosen, sizes = found.tolist(), counts.tolist()
        y = x[order // top_k]  # (T*K, H)
        each = [_linear(rows, gate_up.weights[e]).to(x.dtype) for e, rows in zip(chosen, y.split(sizes))]
        y = Reference.swiglu(self, torch.cat(each))
        y = torch.cat([_linear(rows, down.weights[e]).to(x.dtype) for e, rows in zip(chosen, y.split(sizes))])
        y = y[order.argsort()].unflatten(0, (-1, top_k)).float()  # back in token order, (T, K, H)
        return torch.bmm(scores[:, None], y).squeeze(1)  # (T, 1, K) @ (T, K, H)

    def quantize(self, weight: Weight, kind: str, group: int | None) -> Weight:
        return weight.quantize(kind, group)

    def pack_linear(self, parts: Sequence[Weight], dtype: torch.dtype) -> Packed:
        return PackedWeights((Weight.join(parts, dtype, self.device),))

    def pack_experts(self, experts: Iterable[ExpertWeights], count: int, dtype: torch.dtype) -> ExpertSet:
        pairs = [
            (Weight.join(gate_up, dtype, self.device), Weight.join([down], dtype, self.device))
            for gate_up, down in experts
        ]
        gate_up, down = zip(*pairs)
        return ExpertSet(PackedWeights(gate_up), PackedWeights(down))

    def packed_bytes(self, weight: Weight) -> int:
        return weight.nbytes

    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int) -> list[KVCache]:
        # Zeros, not garbage: a kernel may read slots that no token has filled before it masks them.
        shape = (2, num_blocks, spec.block_size, spec.num_kv_heads, _row_width(spec))
        layers = (_zeros(shape, spec.dtype, self.device).unbind(0) for _ in range(spec.num_layers))
        return [KVCache(keys, values, spec.head_dim) for keys, values in layers]

    def kv_block_bytes(self, spec: KVCacheSpec) -> int:
        return 2 * spec.num_layers * spec.block_size * spec.num_kv_heads * _row_width(spec) * spec.dtype.itemsize

    def export_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int]) -> Tensor:
        chosen = torch.tensor(blocks, device=self.device)
        parts = [_block_bytes(part)[chosen] for kv in caches for part in (kv.keys, kv.values)]
        return torch.cat(parts, 1).cpu()

    def import_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int], data: Tensor) -> None:
        chosen = torch.tensor(blocks, device=self.device)
        places = [_block_bytes(part) for kv in caches for part in (kv.keys, kv.values)]
        parts = data.view(len(blocks), -1).to(self.device).split([place.shape[1] for place in places], 1)
        for place, part in zip(places, parts, strict=True):
            place[chosen] = part

    def checksum(self, data: memoryview) -> bytes:
        return blake2b(data, digest_size=32).digest()

    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        if kv.quantized:
            k, v = _encoded(k), _encoded(v)
        kv.keys.flatten(0, 1)[slot_mapping] = k
        kv.values.flatten(0, 1)[slot_mapping] = v

    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        """Keys and values of an int8 cache are codes * scale, and all is float32 then."""
        h, g = q.shape[1], kv.num_kv_heads
        out = torch.empty_like(q)
        query_start_loc = batch.query_start_loc_cpu.tolist()
        for s, length in enumerate(batch.seq_lens_cpu.tolist()):
            first, last = query_start_loc[s], query_start_loc[s + 1]
            table = batch.block_tables[s, : -(-length // kv.block_size)]
            k, v = (x[table].flatten(0, 1)[:length] for x in (kv.keys, kv.values))
            if kv.quantized:
                k, v = _decoded(k), _decoded(v)
            k, v = k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]  # (g, 1, L, d)
            rows = q[first:last].to(k.dtype).unflatten(1, (g, h // g)).permute(1, 2, 0, 3)  # (g, h/g, n, d)
            out[first:last].unflatten(1, (g, h // g)).permute(1, 2, 0, 3).copy_(_attend(rows, k, v, scale))
        return out.flatten(1)

    def prepare(self, batch: Batch) -> Batch:
        return batch.to(self.device)


def _block_bytes(part: Tensor) -> Tensor:
    """Keys or values of a layer as (blocks, bytes) uint8, a view."""
    return part.flatten(1).view(torch.uint8)


def _linear(x: Tensor, w: Weight) -> Tensor:
    """x (T, in) @ W.T (T, out); in float32 or in x's dtype."""
    match w.kind:
        case Kind.FP8:
            assert w.scales is not None
            codes, scales = quantize_fp8(x)
            exact = torch.float32 if x.dtype == torch.float32 else torch.bfloat16  # holds every e4m3 value exactly
            return _matmul(codes.to(exact), w.codes.to(exact)).float() * scales * w.scales.T
        case Kind.INT8:
            return _linear_int8(x, w)
        case Kind.INT4:
            return _linear_int4(x, w)
    return _matmul(x.float() if w.codes.dtype == torch.float32 else x, w.codes)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, but on a CPU memory is taken from the system page by page when it is first used.

    torch.zeros would write over gigabytes at every start. Pages are large ones where the system has them: a prompt's
    first tokens wait for each page that they are the first to use.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _row_width(spec: KVCacheSpec) -> int:
    """Elements of one head's key or value of one token."""
    return spec.head_dim + SCALE if spec.dtype == torch.int8 else spec.head_dim


@lru_cache
def _multiplies_bf16(device: torch.device) -> bool:
    """Whether torch's bf16 matrix product is fast there. On a CPU without bf16 instructions it is a scalar loop."""
    if device.type != "cpu":
        return True
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    """x (T, in) @ w (out, in).T; the result is in x's dtype or, where that costs nothing, in float32."""
    if x.dtype == torch.bfloat16 and len(x) > 3 and not _multiplies_bf16(x.device):
        # From 4 rows on, widening the weights is cheaper than torch's loop; a block at a time, for the cache's sake.
        x = x.float()
        return torch.cat([F.linear(x, block.float()) for block in w.split(WIDENED_ROWS)], -1)
    return F.linear(x, w)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic per-token FP8: codes (T, in) float8_e4m3fn and scales (T, 1) float32, x ≈ codes * scales."""
    x = x.float()
    scales = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic int8 over the last dimension: whole numbers -127..127, rounded half to even, as float32, and the scales
    (..., 1) float32, largest/127 (at least the smallest normal number, so that zeros become zeros). Where there is a
    NaN or an infinity, the scale is NaN and the numbers are 0.
    """
    x = x.float()
    scales = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    scales = scales.where(scales.isfinite(), torch.nan)
    return (x / scales).round_().clamp_(-127, 127).nan_to_num_(0), scales


def _dot(x: Tensor, w: Tensor) -> Tensor:
    """x (T, n) @ w (out, n).T of whole numbers up to 127: exact, then rounded once to float32."""
    if x.shape[-1] <= EXACT:
        return F.linear(x, w.float())
    total = torch.zeros(*x.shape[:-1], len(w), dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(EXACT, 1), w.split(EXACT, 1)):
        total += F.linear(a, b.float()).to(torch.int32)
    return total.float()


def _linear_int8(x: Tensor, w: Weight) -> Tensor:
    """dot(codes of the row, codes of the output) * the row's scale * the output's scale."""
    assert w.scales is not None
    codes, scales = quantize_int8(x)
    y = torch.cat([_dot(codes, block) for block in w.codes.split(WIDENED_ROWS)], -1)
    return y * scales * w.scales.T


def _linear_int4(x: Tensor, w: Weight) -> Tensor:
    """For each group, dot(codes, nibbles - zero) * the row's scale there * the output's; summed in ascending order."""
    assert w.scales is not None
    nibbles, zeros = w.nibbles().split(w.group_size, 1), w.zero_points()
    y = torch.zeros(len(x), w.shape[0], device=x.device)
    for g, part in enumerate(x.split(w.group_size, 1)):
        codes, scales = quantize_int8(part)
        values = nibbles[g].float() - zeros[:, g, None]
        y += _dot(codes, values) * scales * w.scales[:, g]
    return y


def _encoded(x: Tensor) -> Tensor:
    """(T, g, D) -> (T, g, D + SCALE) int8: D codes, then the bytes of their scale."""
    codes, scales = quantize_int8(x)
    return torch.cat((codes.to(torch.int8), scales.view(torch.int8)), -1)


def _decoded(x: Tensor) -> Tensor:
    """What _encoded made, as float32 (..., D)."""
    return x[..., :-SCALE] * x[..., -SCALE:].contiguous().view(torch.float32)


def _best(x: Tensor, count: int) -> Tensor:
    """Indices of the largest numbers of each row, the largest first; of equal ones the first, unlike topk."""
    return x.sort(stable=True, dim=-1, descending=True).indices[..., :count]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention, with NaN for each row that sees a NaN or an infinite score.

    torch gives zeros for such a row, and lets the NaN of a value that a row does not see into it.
    """
    y = _attend_finite(q, k, v, scale)
    largest = q.abs().amax().double() * k.abs().amax().double() * q.shape[-1]
    if largest < torch.finfo(torch.float32).max and v.isfinite().all():
        return y
    n, length = q.shape[2], k.shape[2]
    for i in range(n):
        seen = length - n + i + 1
        scores = (q[:, :, i : i + 1].float() @ k[:, :, :seen].float().transpose(-1, -2)) * scale
        row = (scores.softmax(-1) @ v[:, :, :seen].float()).to(y.dtype)
        found = y[:, :, i : i + 1]
        found.copy_(torch.where(row.isfinite() & found.isfinite(), found, row))
    return y


def _attend_finite(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q (g, h/g, n, d) are the last n of the L positions that k, v (g, 1, L, d) hold."""
    g, heads, n, _ = q.shape
    length = k.shape[2]
    if n == 1:  # nothing to hide: the heads of a group become rows of one product
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale).transpose(1, 2)
    k, v = k.expand(g, heads, length, -1), v.expand(g, heads, length, -1)
    if n == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    position = torch.arange(length, device=q.device)
    parts = []
    for a in range(0, n, QUERY_ROWS):
        b = min(a + QUERY_ROWS, n)
        seen = length - n + b  # keys that the last row of this part sees
        mask = position[None, :seen] <= position[length - n + a : seen, None]
        part = F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale)
        parts.append(part)
    return torch.cat(parts, 2)
