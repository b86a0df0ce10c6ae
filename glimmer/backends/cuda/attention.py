"""Triton kernels of the KV cache: keys and values are stored in its blocks, and attention reads them there.

The cache is laid out as the reference lays it out (backends/base.py). A program of `attend` computes a tile of query
rows, the heads that share a key-value head side by side; when decoding, the keys are cut into splits, one program for
each, whose results `merge` puts together. Not here: launches (backend.py).
"""

import triton
import triton.language as tl

from glimmer.backends.cuda.rows import scaled, to_int8


@triton.jit
def store(
    k, v, keys, values, slots, heads, k_row_stride, k_head_stride, v_row_stride, v_head_stride, D, WIDTH,
    CODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row of k, or of v, to its slot. CODES: int8 codes, then their scale as float32."""
    i = tl.program_id(0).to(tl.int64)
    t, head, d = i // heads, i % heads, tl.arange(0, BLOCK)
    live = d < D
    own, cache = k + t * k_row_stride + head * k_head_stride, keys
    if tl.program_id(1) == 1:
        own, cache = v + t * v_row_stride + head * v_head_stride, values
    x = tl.load(own + d, mask=live, other=0.0)
    place = cache + (tl.load(slots + t) * heads + head) * WIDTH
    if CODES:
        x, scale = scaled(x.to(tl.float32), 127.0)
        x = to_int8(x)
        tl.store((place + D).to(tl.pointer_type(tl.float32)), scale)
    tl.store(place + d, x.to(keys.dtype.element_ty), mask=live)


@triton.jit
def attend(
    q, keys, values, y, largest, sums, block_tables, query_start_loc, seq_lens,
    scale, S, T, table_columns, row_stride, head_stride, kv_heads, BLOCK_SIZE, split_size, max_splits,
    D: tl.constexpr, WIDTH: tl.constexpr, SHARE: tl.constexpr, CODES: tl.constexpr, SPLIT: tl.constexpr,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile: up to ROWS // SHARE positions of one sequence, with the SHARE query heads of one key-value head.

    Tiles of sequence s begin at query_start_loc[s] // positions + s, so that nobody has to count them; some are empty.
    scale: times log2(e), for powers of two. D and WIDTH are constants, so that the compiler knows alignments.
    SPLIT: y holds sums that are not divided yet, (splits, T, heads, D) float32, and largest and sums (splits, T, heads)
    what `merge` needs beside them. A split has split_size keys, or that times the power of two with which max_splits
    suffice for the sequence: it depends on nothing else, so neither do the sums' bits.
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    positions: tl.constexpr = ROWS // SHARE
    low, high = 0, S
    while low < high:  # the last sequence whose tiles begin at or before this one
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // positions + middle <= tile:
            low = middle + 1
        else:
            high = middle
    s = low - 1
    first, last = tl.load(query_start_loc + s), tl.load(query_start_loc + s + 1)
    begin = first + (tile - (first // positions + s)) * positions
    if begin >= last:
        return
    length = tl.load(seq_lens + s)
    m = tl.arange(0, ROWS)
    rows = begin + m // SHARE
    live = (rows < last) & (m < positions * SHARE)
    heads = kv_head * SHARE + m % SHARE
    seen = rows - last + length + 1  # keys that a row sees
    d = tl.arange(0, BLOCK)
    inside = d < D
    place = rows[:, None] * row_stride + heads[:, None] * head_stride + d[None, :]
    query = tl.load(q + place, mask=live[:, None] & inside[None, :], other=0.0)
    query = query.to(tl.float32) if WIDEN else query

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    all_see = begin - last + length + 1  # keys that every row of the tile sees
    some_see = tl.minimum(begin + positions, last) - last + length  # keys that any row sees
    key_begin, key_end = 0, some_see
    if SPLIT:
        size = split_size
        while size * max_splits < length:
            size *= 2
        key_begin = split * size
        key_end = tl.minimum(some_see, key_begin + size)
        if key_begin >= key_end:  # as most splits of a captured step, which has room for the longest sequence
            tl.store(largest + (split.to(tl.int64) * T + rows) * (kv_heads * SHARE) + heads, top, mask=live)
            return
    for at in range(key_begin, key_end, KEYS):
        key = at + tl.arange(0, KEYS)
        there = key < key_end
        block = tl.load(block_tables + s * table_columns + key // BLOCK_SIZE, mask=there, other=0)
        line = ((block * BLOCK_SIZE + key % BLOCK_SIZE) * kv_heads + kv_head) * WIDTH
        k = tl.load(keys + line[:, None] + d[None, :], mask=there[:, None] & inside[None, :], other=0)
        v = tl.load(values + line[:, None] + d[None, :], mask=there[:, None] & inside[None, :], other=0)
        if CODES:  # whole numbers up to 127, which every type of q holds
            k, v = k.to(query.dtype), v.to(query.dtype)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if CODES:
            scores *= tl.load((keys + line + D).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)[None, :]
        visible = (key[None, :] < seen[:, None]) & there[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # nothing has been seen yet
        shrink = tl.exp2(top - base)
        p = tl.exp2(scores - base[:, None])
        weights = weights * shrink + tl.sum(p, 1)
        if CODES:
            own = tl.load((values + line + D).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
            p = tl.where(visible, p * own[None, :], 0.0)
        total *= shrink[:, None]
        if (not CODES) and at + KEYS > all_see:
            # 0 * NaN is NaN: what not every row sees must not reach those that do not see it.
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            broken = tl.where(finite, 0.0, 1.0).to(v.dtype)
            v = tl.where(finite, v, 0.0).to(v.dtype)
            reached = tl.dot(tl.where(visible, 1.0, 0.0).to(v.dtype), broken, input_precision="ieee")
            total = tl.where(reached > 0, float("nan"), total)
        total = tl.dot(p.to(v.dtype), v, total, input_precision="ieee")
        top = above
    if SPLIT:
        row = split.to(tl.int64) * T + rows
        at = row * (kv_heads * SHARE) + heads
        tl.store(largest + at, top, mask=live)
        tl.store(sums + at, weights, mask=live)
    else:
        at = rows * (kv_heads * SHARE) + heads
        total = total / weights[:, None]
    where = at[:, None].to(tl.int64) * D + d[None, :]
    tl.store(y + where, total.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def merge(parts, largest, sums, y, rows, splits, D, BLOCK: tl.constexpr):
    """One program: one head of one row. rows: of all, T * heads."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    for s in range(splits):
        top = tl.maximum(top, tl.load(largest + s * rows + i))
    weights = tl.zeros((), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        own = tl.load(largest + s * rows + i)
        if own != float("-inf"):  # an empty split has none, and nothing beside it
            factor = tl.exp2(own - top)
            weights += tl.load(sums + s * rows + i) * factor
            total += tl.load(parts + (s * rows + i) * D + d, mask=d < D, other=0.0) * factor
    tl.store(y + i * D + d, (total / weights).to(y.dtype.element_ty), mask=d < D)
