"""The Triton kernel that multiplies rows by weights of any kind, those of one matrix or of many experts.

A program computes a tile of ROWS rows by COLUMNS outputs. Sums are float32, of int8 codes exact int32 and float32 only
between scales, as the reference defines it. Not here: how rows are brought into the order of their experts, and how
inputs are quantised (backend.py, rows.py).
"""

import triton
import triton.language as tl

from glimmer.backends.cuda.rows import silu_times

PLAIN, FP8, INT8, INT4 = (tl.constexpr(i) for i in range(4))


@triton.jit
def multiply(
    x, x_scales, w, w_scales, w_zeros, bias, y, order, counts, ends, tile_ends, experts_of_tiles,
    T, N, K, E, x_stride, groups, group_size,
    KIND: tl.constexpr, ROUTED: tl.constexpr, GATHER: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    ZEROS: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """y = x @ W.T of one matrix W (N, K); ROUTED: of the expert to which the rows of a tile belong.

    ROUTED: pair p of order (T,) is row p // (T // rows of x) of x where GATHER says so, else x has a row for each place
    in the order; experts' rows lie one after the other, counts and ends (E,) say where. tile_ends (E,): tiles of the
    experts up to each; experts_of_tiles: E where there is no tile. y has a row for each place in the order where GATHER
    says so, else for each pair.
    GATED: W has 2 N rows, gate above up, and y = silu(gate) * up. WIDEN: operands become float32 before a product,
    which Triton's interpreter needs. INNER: columns of a step; of INT4 no more than a group has.
    """
    tile = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    expert = tl.zeros((), tl.int64)
    if ROUTED:
        expert = tl.load(experts_of_tiles + tile)
        if expert >= E:
            return
        count, end = tl.load(counts + expert), tl.load(ends + expert)
        first = end - count + (tile - tl.load(tile_ends + expert) + tl.cdiv(count, ROWS)) * ROWS
        places = first + tl.arange(0, ROWS)
        live = places < end
        pairs = tl.load(order + places, mask=live, other=0)
        rows = pairs // GATHER if GATHER > 0 else places
        results = places if GATHER > 0 else pairs
    else:
        rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        live = rows < T
        results = rows
    height = 2 * N if GATED else N
    lines = expert * height + columns.to(tl.int64)  # of W, over all experts
    total = _dot_rows(
        x, x_scales, w, w_scales, w_zeros, rows, live, lines, inside, K, x_stride, groups, group_size,
        KIND, ZEROS, WIDEN, ROWS, COLUMNS, INNER,
    )  # fmt: skip
    if GATED:
        up = _dot_rows(
            x, x_scales, w, w_scales, w_zeros, rows, live, lines + N, inside, K, x_stride, groups, group_size,
            KIND, ZEROS, WIDEN, ROWS, COLUMNS, INNER,
        )  # fmt: skip
        # Gate and up are rounded as the reference rounds them, between its two ops.
        gate, up = total.to(y.dtype.element_ty).to(tl.float32), up.to(y.dtype.element_ty).to(tl.float32)
        total = silu_times(gate, up)
    if BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = results[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def _dot_rows(
    x, x_scales, w, w_scales, w_zeros, rows, live, lines, inside, K, x_stride, groups, group_size,
    KIND: tl.constexpr, ZEROS: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) float32: rows of x times lines of W, scales included."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if KIND == INT4:
        for g in range(groups):
            exact = tl.zeros((ROWS, COLUMNS), tl.int32)
            zero = tl.full((COLUMNS,), 8, tl.int8)
            if ZEROS:
                zero = tl.load(w_zeros + lines * groups + g, mask=inside, other=8).to(tl.int8)
            for begin in range(0, group_size, INNER):
                within = begin + tl.arange(0, INNER)
                k = g * group_size + within
                a = _tile(x, rows, live, x_stride, k, (within < group_size) & (k < K))
                half = begin // 2 + tl.arange(0, INNER // 2)
                there = (half < group_size // 2) & (g * group_size + 2 * half < K)
                at = lines[:, None] * (K // 2) + (g * (group_size // 2) + half)[None, :]
                pair = tl.load(w + at, mask=inside[:, None] & there[None, :], other=0)
                b = tl.interleave((pair & 15).to(tl.int8), (pair >> 4).to(tl.int8)) - zero[:, None]
                exact = tl.dot(a, tl.trans(b), exact)  # beyond the group a is 0, whatever b is
            own = tl.load(x_scales + rows * groups + g, mask=live, other=0.0)
            scale = tl.load(w_scales + lines * groups + g, mask=inside, other=0.0)
            total += exact.to(tl.float32) * own[:, None] * scale[None, :]
    elif KIND == INT8:
        exact = tl.zeros((ROWS, COLUMNS), tl.int32)
        for begin in range(0, K, INNER):
            k = begin + tl.arange(0, INNER)
            a = _tile(x, rows, live, x_stride, k, k < K)
            b = _tile(w, lines, inside, K, k, k < K)
            exact = tl.dot(a, tl.trans(b), exact)
        total = _scaled(exact.to(tl.float32), x_scales, rows, live, w_scales, lines, inside)
    else:
        for begin in range(0, K, INNER):
            k = begin + tl.arange(0, INNER)
            a = _tile(x, rows, live, x_stride, k, k < K)
            b = _tile(w, lines, inside, K, k, k < K)
            if KIND == FP8:
                b = e4m3_value(b)
                b = b if WIDEN else b.to(tl.bfloat16)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        if KIND == FP8:
            total = _scaled(total, x_scales, rows, live, w_scales, lines, inside)
    return total


@triton.jit
def _tile(values, rows, live, stride, k, there):
    """(rows, k) of a matrix, zeros where there is nothing."""
    return tl.load(values + rows[:, None] * stride + k[None, :], mask=live[:, None] & there[None, :], other=0)


@triton.jit
def _scaled(total, x_scales, rows, live, w_scales, lines, inside):
    """Times the rows' scales, then the lines'."""
    own = tl.load(x_scales + rows, mask=live, other=0.0)
    return total * own[:, None] * tl.load(w_scales + lines, mask=inside, other=0.0)[None, :]


@triton.jit
def e4m3_value(code):
    """The float32 that a byte of e4m3 means. All of them are bfloat16 numbers.

    The seven bits below the sign, put where a float32 has exponent and fraction, mean 2^-120 of it, for numbers below
    the smallest normal one too. By whole numbers, since GPUs before Hopper, and AMD's, do not know this format.
    """
    low = (code & 0x7F).to(tl.int32)
    size = (low << 20).to(tl.float32, bitcast=True) * 2.0**120
    size = tl.where(low == 0x7F, float("nan"), size)
    return tl.where((code & 0x80) != 0, -size, size)
