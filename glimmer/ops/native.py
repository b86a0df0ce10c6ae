"""The CPU doors over glimmer._native: check the arguments, allocate the result, then one call.

Every row comes out bit for bit the same whatever rows are beside it and however many threads there are: an output is
one sum in one order. Packed matrices live in the extension's own memory, in the panels that csrc/kernels.h describes.
Not here: any arithmetic. Where the extension is not installed this module does not import, and `ops.choose` says so.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from glimmer import _native
from glimmer.weight import Weight

set_threads = _native.set_threads
STRETCH = 4 << 20  # bytes of a plain matrix that are converted at once
FLOATS = (torch.float32, torch.bfloat16)


def _input(x: Tensor, width: int) -> Tensor:
    """x (T, width) as the extension reads it. Raises ValueError for another shape or dtype."""
    if x.ndim != 2 or x.shape[1] != width or x.dtype not in FLOATS or x.device.type != "cpu":
        raise ValueError(f"{tuple(x.shape)} {x.dtype} on {x.device}, where (T, {width}) float32 or bfloat16 is wanted")
    return x.contiguous()


def linear(x: Tensor, packed: _native.Packed, bias: Tensor | None) -> Tensor:
    """(T, in) -> (T, out) in x's dtype."""
    x = _input(x, packed.k)
    y = x.new_empty(len(x), packed.n)
    bias = None if bias is None else bias.float().contiguous()
    if bias is not None and bias.shape != (packed.n,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)}, where ({packed.n},) is wanted")
    narrow = x.dtype == torch.bfloat16
    _native.linear(x.data_ptr(), narrow, len(x), packed, 0 if bias is None else bias.data_ptr(), y.data_ptr(), narrow)
    return y


def experts(x: Tensor, ids: Tensor, scores: Tensor, gate_up: _native.Packed, down: _native.Packed) -> Tensor:
    """(T, H) -> (T, H) float32; see the reference. Raises ValueError for an id that is no expert."""
    x = _input(x, gate_up.k)
    if ids.shape != scores.shape or len(ids) != len(x) or ids.dtype != torch.int64 or scores.dtype != torch.float32:
        found = f"ids {ids.dtype} {tuple(ids.shape)}, scores {scores.dtype} {tuple(scores.shape)}"
        raise ValueError(f"{found} for {len(x)} rows, where int64 and float32 (rows, K) are wanted")
    ids, scores = ids.contiguous(), scores.contiguous()
    y = torch.empty(len(x), down.n)
    narrow = x.dtype == torch.bfloat16
    _native.experts(
        x.data_ptr(), narrow, len(x), ids.data_ptr(), scores.data_ptr(), ids.shape[1], gate_up, down, y.data_ptr()
    )
    return y


def pack_linear(parts: Sequence[Weight], dtype: torch.dtype, device: torch.device) -> _native.Packed:
    """One matrix holding the rows of all parts."""
    packed = _empty(parts, dtype, 1, 1)
    _fill(packed, 0, parts, dtype)
    return packed


def pack_experts(
    experts: Iterable[Sequence[Weight]], count: int, dtype: torch.dtype, device: torch.device
) -> _native.Packed:
    """`count` matrices, taken one at a time; two parts of a matrix (gate, up) lie interleaved."""
    packed = None
    for e, parts in enumerate(experts):
        if packed is None:
            packed = _empty(parts, dtype, count, len(parts))
        _fill(packed, e, parts, dtype)
    return packed


def _empty(parts: Sequence[Weight], dtype: torch.dtype, count: int, pieces: int) -> _native.Packed:
    first = parts[0]
    kind = str(dtype).removeprefix("torch.") if first.kind == "plain" else first.kind
    rows, inner = sum(p.shape[0] for p in parts), first.shape[1]
    int4 = kind == "int4"
    # float32 only where bfloat16 would lose something: a community checkpoint's float16 scales.
    exact = lambda scales: torch.equal(scales.bfloat16().float().nan_to_num(0), scales.nan_to_num(0))
    wide = int4 and not all(exact(p.scales) for p in parts)
    zeros = int4 and any(p.zeros is not None for p in parts)
    group = -(-first.group // 32) * 32 if int4 else 32
    return _native.Packed(kind, count, rows, inner, pieces, group, wide, zeros)


def _fill(packed: _native.Packed, e: int, parts: Sequence[Weight], dtype: torch.dtype) -> None:
    row = 0
    for part in parts:
        # A stretch of rows at a time: where values change their type, so little is held twice.
        step = max(1, STRETCH // (part.shape[1] * dtype.itemsize)) if part.kind == "plain" else part.shape[0]
        for first in range(0, part.shape[0], step):
            codes = part.codes[first : first + step]
            codes = codes.to(dtype) if part.kind == "plain" else codes
            codes = codes if codes.stride(1) == 1 else codes.contiguous()
            scales = None if part.scales is None else part.scales.contiguous()
            zeros = part.centers().to(torch.uint8).contiguous() if packed.zeros else None
            stride = codes.stride(0) * codes.itemsize
            packed.fill(e, row, len(codes), codes.data_ptr(), stride, _address(scales), _address(zeros))
            row += len(codes)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
