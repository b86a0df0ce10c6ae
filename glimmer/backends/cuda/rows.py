"""Triton kernels whose programs compute one row each, or a part of it: norms, rotation, routing, quantising inputs.

Sums are float32 inside; a result is rounded once, on the way out. Shapes and contracts: backends/base.py. Not here:
products with weights (products.py), attention and its cache (attention.py), and any launch (backend.py).
"""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
# Added to a number and taken away again, these leave it rounded, half to even, to a whole number or a multiple of 2^-9.
ROUND_TO_ONE = tl.constexpr(1.5 * 2.0**23)
ROUND_TO_E4M3_STEP = tl.constexpr(1.5 * 2.0**14)
LEAST_NORMAL_E4M3 = tl.constexpr(2.0**-6)


@triton.jit
def embed(tokens, table, y, first, held, N, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one token's row."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens + t) - first
    width = tl.where((row >= 0) & (row < held), N, 0)
    values = tl.load(table + row * N + columns, mask=columns < width, other=0.0)
    tl.store(y + t * N + columns, values, mask=columns < N)


@triton.jit
def rms_norm(x, weight, y, HEADS, row_stride, head_stride, N, eps, BLOCK: tl.constexpr):
    """One program: one head of one row."""
    i = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    live = columns < N
    v = tl.load(x + i // HEADS * row_stride + i % HEADS * head_stride + columns, mask=live, other=0.0).to(tl.float32)
    _store_norm(v, weight, y + i * N, columns, live, N, eps)


@triton.jit
def add_rms_norm(x, residual, weight, total, y, N, eps, BLOCK: tl.constexpr):
    """One program: one row. total: residual + x, as it is kept."""
    i = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    live = columns < N
    v = tl.load(residual + i * N + columns, mask=live, other=0.0).to(tl.float32)
    v += tl.load(x + i * N + columns, mask=live, other=0.0).to(tl.float32)
    kept = v.to(total.dtype.element_ty)
    tl.store(total + i * N + columns, kept, mask=live)
    _store_norm(kept.to(tl.float32), weight, y + i * N, columns, live, N, eps)


@triton.jit
def _store_norm(v, weight, y, columns, live, N, eps):
    normed = v * (1.0 / tl.sqrt_rn(tl.sum(v * v, 0) / N + eps))
    normed *= tl.load(weight + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(y + columns, normed.to(y.dtype.element_ty), mask=live)


@triton.jit
def swiglu(x, y, M, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row of y."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < M
    gate = tl.load(x + t * 2 * M + columns, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + t * 2 * M + M + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(y + t * M + columns, silu_times(gate, up).to(y.dtype.element_ty), mask=live)


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up, in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def rope(
    q, k, cos, sin, q_heads, k_heads, q_row_stride, q_head_stride, k_row_stride, k_head_stride, HALF,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row of q or, behind its heads, of k; in place."""
    i = tl.program_id(0).to(tl.int64)
    t, head, columns = i // (q_heads + k_heads), i % (q_heads + k_heads), tl.arange(0, BLOCK)
    own = q + t * q_row_stride + head * q_head_stride
    if head >= q_heads:
        own = k + t * k_row_stride + (head - q_heads) * k_head_stride
    live = columns < HALF
    first = own + columns
    a = tl.load(first, mask=live, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=live, other=0.0).to(tl.float32)
    c = tl.load(cos + t * HALF + columns, mask=live, other=0.0)
    s = tl.load(sin + t * HALF + columns, mask=live, other=0.0)
    tl.store(first, (a * c - b * s).to(q.dtype.element_ty), mask=live)
    tl.store(first + HALF, (b * c + a * s).to(q.dtype.element_ty), mask=live)


@triton.jit
def forbid(logits, allowed, V, row_stride, allowed_stride, BLOCK: tl.constexpr):
    """One program: BLOCK logits of one row, in place."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(allowed + t * allowed_stride + columns // 8, mask=columns < V, other=255)
    refused = ((bits >> (columns % 8).to(tl.uint8)) & 1) == 0
    tl.store(logits + t * row_stride + columns, float("-inf"), mask=refused & (columns < V))


@triton.jit
def route(
    logits, bias, ids, scores, E, factor,
    TOP_K: tl.constexpr, CHOSEN: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the TOP_K experts of one token, the best first, of equal ones the first.

    A choice is ordered as a whole number: the bits of score + bias, and below them the expert's number. NaN and
    infinity are the best choice. CHOSEN: TOP_K, or the next power of two.
    """
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    live = e < E
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits + t * E + e, mask=live, other=0.0)))
    choice = score + tl.load(bias + e, mask=live, other=0.0)
    choice = tl.where(choice != choice, float("inf"), choice + 0.0)  # -0 becomes 0
    bits = choice.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (BLOCK - 1 - e).to(tl.int64)
    none = -(2**63)
    key = tl.where(live, key, none)
    k = tl.arange(0, CHOSEN)
    best = tl.zeros((CHOSEN,), tl.int64)
    weight = tl.zeros((CHOSEN,), tl.float32)
    for i in tl.static_range(TOP_K):
        found = BLOCK - 1 - (tl.max(key, 0) & 0xFFFFFFFF)
        best = tl.where(k == i, found, best)
        weight = tl.where(k == i, tl.sum(tl.where(e == found, score, 0.0), 0), weight)
        key = tl.where(e == found, none, key)
    if NORM:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(ids + t * TOP_K + k, best, mask=k < TOP_K)
    tl.store(scores + t * TOP_K + k, weight * factor, mask=k < TOP_K)


@triton.jit
def quantize(x, codes, scales, K, row_stride, GROUP, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """One program: GROUP columns of one row, as codes and a scale.

    FP8: codes are e4m3 numbers, kept as bfloat16, and the scale is largest / 448; else int8 and largest / 127. Where
    there is a NaN or an infinity, the scale is NaN and the codes are 0.
    """
    t, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inside = tl.arange(0, BLOCK)
    columns = g * GROUP + inside
    live = (inside < GROUP) & (columns < K)
    v = tl.load(x + t * row_stride + columns, mask=live, other=0.0).to(tl.float32)
    v, scale = scaled(v, E4M3_MAX if FP8 else 127.0)
    if FP8:
        # e4m3 keeps 3 bits after the first; what is smaller than the smallest normal number has steps of 2^-9.
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (v + ROUND_TO_E4M3_STEP) - ROUND_TO_E4M3_STEP
        v = tl.where(tl.abs(v) < LEAST_NORMAL_E4M3, small, rounded.to(tl.float32, bitcast=True))
        v = tl.minimum(tl.maximum(v, -E4M3_MAX), E4M3_MAX)
    else:
        v = to_int8(v)
    tl.store(codes + t * K + columns, v.to(codes.dtype.element_ty), mask=live)
    tl.store(scales + t * tl.num_programs(1) + g, scale)


@triton.jit
def scaled(v, most):
    """(v / scale, scale), where the largest of v / scale is `most`. With a NaN or an infinity: zeros, and NaN."""
    size = tl.abs(v)
    broken = tl.max(tl.where(size < float("inf"), 0, 1), 0) != 0
    scale = tl.maximum(tl.div_rn(tl.max(size, 0), most), TINY)
    return tl.where(broken, 0.0, tl.div_rn(v, scale)), tl.where(broken, float("nan"), scale)


@triton.jit
def to_int8(v):
    """v, at most 127 in size, rounded to whole numbers, half to even; float32 still."""
    v = (v + ROUND_TO_ONE) - ROUND_TO_ONE
    return tl.minimum(tl.maximum(v, -127.0), 127.0)


@triton.jit
def combine(rows, scores, y, H, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one token, the sum of its experts' rows (T * K, H) by their scores, in order."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < H
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(TOP_K):
        row = tl.load(rows + (t * TOP_K + k) * H + columns, mask=live, other=0.0).to(tl.float32)
        total += row * tl.load(scores + t * TOP_K + k)
    tl.store(y + t * H + columns, total, mask=live)
