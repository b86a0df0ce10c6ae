"""The CPU ops over glimmer._native: check the arguments, allocate the result, then one call.

Every row comes out bit for bit the same whatever rows are beside it and however many threads there are: an output is
one sum in one order. Packed matrices live in the extension's own memory, in the panels that csrc/kernels.h describes.
Not here: any arithmetic. Where the extension is not installed this module does not import; `backends.choose` says so.
"""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glimmer import _native
from glimmer.backends import RouteRule, reference
from glimmer.batch import Batch
from glimmer.weight import Weight, layout

set_threads = _native.set_threads
STRETCH = 4 << 20  # bytes of a plain matrix that are converted at once
POOLED, MAX_UNUSED = (
    1 << 20,
    512 << 20,
)  # bytes of a result that is lent its memory; the most that lies unused between steps
FLOATS = (torch.float32, torch.bfloat16)


class CapturedStep:
    """The calls that ops make while it is entered, to be made again by `replay` on the same tensors.

    Whoever plays it puts new values into those that the ops were given. Lists among the arguments (a batch's lengths)
    are read anew each time. Inside, an op that would have to copy an input raises RuntimeError: a copy would not be
    repeated. Results lie in `memory`, where a later one takes the place of one that nobody holds any more. Recordings
    may share it: what one has left there is good until another is played.
    """

    def __init__(self, memory: _native.BufferPool | None = None):
        self.memory = memory or _native.BufferPool(sys.maxsize)
        self._parts: list[Callable[[], None]] = []  # most of them many calls, made without Python
        self._kept: list[tuple] = []

    def __enter__(self) -> "CapturedStep":
        _own.recording = self
        return self

    def __exit__(self, *_) -> None:
        _own.recording = None

    def add(self, call: Callable, args: tuple, kept: Tensor | None) -> None:
        self._kept.append((args, kept))
        queue = getattr(_native, f"queue_{call.__name__}", None)
        if queue is None:  # lists among its arguments, or none of the extension's
            self._parts.append(partial(call, *args))
            return
        if not self._parts or not isinstance(self._parts[-1], _native.CallList):
            self._parts.append(_native.CallList())
        queue(self._parts[-1], *args)

    def replay(self) -> None:
        for part in self._parts:
            part()


record = CapturedStep


class _Own(threading.local):
    """Of each thread: other engines may run beside the one that records."""

    recording: CapturedStep | None = None


_own = _Own()
_results = _native.BufferPool(MAX_UNUSED)


def _run(call: Callable, *args, kept: Tensor | None = None) -> None:
    """call(*args). kept: what it reads, besides results of ops and what was given to them."""
    if _own.recording is not None:
        _own.recording.add(call, args, kept)
    call(*args)


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    """Where an op's result will be."""
    nbytes = math.prod(shape) * dtype.itemsize
    recording = _own.recording
    if recording is None and nbytes < POOLED:
        return torch.empty(shape, dtype=dtype)
    return (recording.memory if recording is not None else _results).acquire(nbytes).view(dtype).view(shape)


def _whole(x: Tensor) -> Tensor:
    """x, contiguous."""
    if x.is_contiguous():
        return x
    if _own.recording is not None:
        raise RuntimeError(f"a copy of {tuple(x.shape)} cannot be recorded")
    return x.contiguous()


def _input(x: Tensor, width: int) -> Tensor:
    """x (T, width) as the extension reads it. Raises ValueError for another shape or dtype."""
    if x.ndim != 2 or x.shape[1] != width or x.dtype not in FLOATS or x.device.type != "cpu":
        raise ValueError(f"{tuple(x.shape)} {x.dtype} on {x.device}, where (T, {width}) float32 or bfloat16 is wanted")
    return _whole(x)


def _refuse(op: str, *tensors: Tensor) -> None:
    """Raises ValueError: what an op was given is not what the table in backends/__init__.py says."""
    found = ", ".join(f"{t.dtype} {tuple(t.shape)} strides {t.stride()} on {t.device}" for t in tensors)
    raise ValueError(f"{op} of {found}")


def _heads(x: Tensor) -> Tensor:
    """x (T, h, D) with the heads of a row side by side; rows may lie further apart, as those of q in qkv."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else _whole(x)


def embed(tokens: Tensor, table: Tensor, first: int) -> Tensor:
    """Rows of the table for tokens first..first+len(table), zeros for the others."""
    if tokens.dtype != torch.int64 or table.dtype not in FLOATS or not table.is_contiguous():
        _refuse("embed", tokens, table)
    tokens, (rows, n) = _whole(tokens), table.shape
    is_bf16, y = table.dtype == torch.bfloat16, _new(len(tokens), n, dtype=table.dtype)
    _run(_native.embed, tokens.data_ptr(), len(tokens), table.data_ptr(), is_bf16, rows, n, first, y.data_ptr())
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., N) -> (..., N) contiguous, in weight's dtype."""
    n = x.shape[-1]
    if weight.shape != (n,) or x.dtype not in FLOATS or weight.dtype not in FLOATS or weight.stride(0) != 1:
        _refuse("rms_norm", x, weight)
    y = _new(*x.shape, dtype=weight.dtype)
    if x.ndim == 3:
        x = _heads(x)
        rows, heads, stride = len(x), x.shape[1], x.stride(0)
    else:
        x = _whole(x)
        rows, heads, stride = y.numel() // n, 1, n
    is_bf16, result = x.dtype == torch.bfloat16, weight.dtype == torch.bfloat16
    _run(
        _native.rms_norm,
        x.data_ptr(),
        is_bf16,
        rows,
        heads,
        n,
        stride,
        weight.data_ptr(),
        result,
        eps,
        y.data_ptr(),
    )
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed in weight's dtype, residual + x in residual's)."""
    rows, n = x.shape
    floats = x.dtype in FLOATS and residual.dtype in FLOATS and weight.dtype in FLOATS
    if not floats or residual.shape != (rows, n) or weight.shape != (n,) or weight.stride(0) != 1:
        _refuse("add_rms_norm", x, residual, weight)
    x, residual = _whole(x), _whole(residual)
    total, y = _new(rows, n, dtype=residual.dtype), _new(rows, n, dtype=weight.dtype)
    is_bf16, kept, result = (t.dtype == torch.bfloat16 for t in (x, residual, weight))
    _run(
        _native.add_rms_norm,
        x.data_ptr(),
        is_bf16,
        residual.data_ptr(),
        kept,
        rows,
        n,
        weight.data_ptr(),
        result,
        eps,
        total.data_ptr(),
        y.data_ptr(),
    )
    return y, total


def swiglu(x: Tensor) -> Tensor:
    """(T, 2M), gate then up -> (T, M) silu(gate) * up."""
    rows, both = x.shape
    if x.dtype not in FLOATS or both % 2:
        _refuse("swiglu", x)
    x, y = _whole(x), _new(rows, both // 2, dtype=x.dtype)
    _run(_native.swiglu, x.data_ptr(), x.dtype == torch.bfloat16, rows, both // 2, y.data_ptr())
    return y


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turns pairs (i, i+R/2) of the first R dimensions of q (T, h, D) and k (T, g, D) in place."""
    (rows, heads, width), (others, kv_heads, _), half = q.shape, k.shape, cos.shape[1]
    fits = rows == others == len(cos) and k.shape[2] == width >= 2 * half and cos.shape == sin.shape
    types = q.dtype == k.dtype and q.dtype in FLOATS and cos.dtype == sin.dtype == torch.float32
    if not fits or not types or _heads(q) is not q or _heads(k) is not k:
        _refuse("rope_", q, k, cos, sin)
    cos, sin = _whole(cos), _whole(sin)
    _run(
        _native.rope,
        q.data_ptr(),
        heads,
        q.stride(0),
        k.data_ptr(),
        kv_heads,
        k.stride(0),
        q.dtype == torch.bfloat16,
        rows,
        width,
        cos.data_ptr(),
        sin.data_ptr(),
        half,
    )


def route(logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """ids, scores (T, K), the best first, of equals the one with the lowest number."""
    rows, experts = logits.shape
    if logits.dtype != torch.float32 or bias.dtype != torch.float32 or bias.shape != (experts,):
        _refuse("route", logits, bias)
    logits, bias = _whole(logits), _whole(bias)
    ids, scores = (_new(rows, rule.top_k, dtype=dtype) for dtype in (torch.int64, torch.float32))
    _run(
        _native.route,
        logits.data_ptr(),
        bias.data_ptr(),
        rows,
        experts,
        rule.top_k,
        rule.n_group,
        rule.topk_group,
        rule.norm_topk_prob,
        rule.routed_scaling_factor,
        ids.data_ptr(),
        scores.data_ptr(),
    )
    return ids, scores


def _in_strips(keys: Tensor) -> bool:
    """Whether the cache is laid out for the extension, which csrc/attention.h describes; else as the reference does."""
    return keys.shape[1] % 16 == 0 and _width(keys) % 2 == 0


def _width(keys: Tensor) -> int:
    """D of a cache, whose scales, if it has any, are behind each D codes."""
    return keys.shape[3] - (reference.SCALE if keys.dtype == torch.int8 else 0)


def store_kv_(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write k, v (T, g, D) into their slots of a cache (blocks, block_size, g, D), for `attention` alone to read."""
    if not _in_strips(keys):
        return _run(reference.store_kv_, k, v, keys, values, slots)
    (blocks, size, heads, _), width = keys.shape, _width(keys)
    k, v, slots = _heads(k), _heads(v), _whole(slots)
    fits = k.shape == v.shape == (len(slots), heads, width) and slots.dtype == torch.int64
    if not fits or k.dtype != v.dtype or not _sound(k, keys, values):
        _refuse("store_kv_", k, v, keys, values, slots)
    _run(
        _native.store_kv,
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        k.dtype == torch.bfloat16,
        len(slots),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.dtype == torch.int8,
        blocks,
        size,
        heads,
        width,
    )


def attention(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """q (T, h, D) -> (T, h*D): each row over the keys of its own sequence up to its own position."""
    if not _in_strips(keys):
        y = q.new_empty(len(q), q.shape[1] * q.shape[2])
        _run(lambda: y.copy_(reference.attention(q, keys, values, batch, scale)))
        return y
    (rows, q_heads, width), (blocks, size, heads, _) = q.shape, keys.shape
    q, table = _heads(q), _whole(batch.block_tables)
    fits = width == _width(keys) and rows == batch.query_start_loc[-1] and len(table) == len(batch.seq_lens)
    if not fits or table.dtype != torch.int64 or not _sound(q, keys, values):
        _refuse("attention", q, keys, values, table)
    y = _new(rows, q_heads * width, dtype=q.dtype)
    _run(
        _native.attention,
        q.data_ptr(),
        q.stride(0),
        q_heads,
        q.dtype == torch.bfloat16,
        keys.data_ptr(),
        values.data_ptr(),
        keys.dtype == torch.int8,
        blocks,
        size,
        heads,
        width,
        table.data_ptr(),
        table.shape[1],
        batch.query_start_loc,
        batch.seq_lens,
        scale,
        y.data_ptr(),
    )
    return y


def _sound(rows: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether a cache is one, and the rows that it is given or asked by are of its dtype, or it has codes."""
    same = keys.shape == values.shape and keys.dtype == values.dtype and keys.dtype in (rows.dtype, torch.int8)
    return same and rows.dtype in FLOATS and keys.is_contiguous() and values.is_contiguous()


def add_(y: Tensor, x: Tensor) -> None:
    """y (T, H) += x."""
    if y.ndim != 2 or x.shape != y.shape or y.dtype not in FLOATS or x.dtype not in FLOATS or not y.is_contiguous():
        _refuse("add_", y, x)
    x, (rows, n) = _whole(x), y.shape
    is_bf16 = x.dtype == torch.bfloat16
    _run(_native.add, y.data_ptr(), y.dtype == torch.bfloat16, x.data_ptr(), is_bf16, rows, n)


def linear(x: Tensor, packed: _native.Packed, bias: Tensor | None) -> Tensor:
    """(T, in) -> (T, out) in x's dtype; float32 where the weights are."""
    x = _input(x, packed.k)
    is_bf16 = x.dtype == torch.bfloat16
    result = is_bf16 and not packed.float32
    y = _new(len(x), packed.n, dtype=x.dtype if result else torch.float32)
    bias = None if bias is None else bias.float()
    if bias is not None and bias.shape != (packed.n,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)}, where ({packed.n},) is wanted")
    _run(_native.linear, x.data_ptr(), is_bf16, len(x), packed, _address(bias), y.data_ptr(), result, kept=bias)
    return y


def experts(x: Tensor, ids: Tensor, scores: Tensor, gate_up: _native.Packed, down: _native.Packed) -> Tensor:
    """(T, H) -> (T, H) float32; see the reference. Raises ValueError for an id that is no expert."""
    x = _input(x, gate_up.k)
    if ids.shape != scores.shape or len(ids) != len(x) or ids.dtype != torch.int64 or scores.dtype != torch.float32:
        found = f"ids {ids.dtype} {tuple(ids.shape)}, scores {scores.dtype} {tuple(scores.shape)}"
        raise ValueError(f"{found} for {len(x)} rows, where int64 and float32 (rows, K) are wanted")
    ids, scores = _whole(ids), _whole(scores)
    y = _new(len(x), down.n, dtype=torch.float32)
    is_bf16 = x.dtype == torch.bfloat16
    _run(
        _native.experts,
        x.data_ptr(),
        is_bf16,
        len(x),
        ids.data_ptr(),
        scores.data_ptr(),
        ids.shape[1],
        gate_up,
        down,
        y.data_ptr(),
    )
    return y


def quantize(weight: Weight, kind: str, group: int | None) -> Weight:
    """As the reference does, except that an int4 group's sums are added up in another order."""
    kind, group = layout(kind, weight.shape[1], group)
    if kind != "int4" or weight.codes.device.type != "cpu":
        return reference.quantize(weight, kind, group)
    values = weight.codes if weight.codes.dtype in FLOATS else weight.dequantize()
    values = values if values.stride(1) == 1 else values.contiguous()
    (out, inner), made = weight.shape, Weight.empty(kind, weight.shape, group, device=values.device)
    _native.quantize(
        values.data_ptr(), values.dtype == torch.bfloat16, values.stride(0), out, inner, group,
        made.codes.data_ptr(), made.scales.data_ptr(), made.zeros.data_ptr(),
    )  # fmt: skip
    return made


def pack_linear(parts: Sequence[Weight], dtype: torch.dtype, device: torch.device) -> _native.Packed:
    """One matrix holding the rows of all parts."""
    if dtype == torch.float32 and all(p.codes.dtype == torch.bfloat16 for p in parts):
        kind, dtype = "float32 as bfloat16", torch.bfloat16  # half the bytes, the same sums
    else:
        kind = _kind(parts[0], dtype)
    packed = _empty(parts, kind, 1, 1)
    _fill(packed, 0, parts, dtype)
    return packed


def pack_experts(
    experts: Iterable[Sequence[Weight]], count: int, dtype: torch.dtype, device: torch.device
) -> _native.Packed:
    """`count` matrices, taken one at a time; two parts of a matrix (gate, up) lie interleaved."""
    packed = None
    for e, parts in enumerate(experts):
        if packed is None:
            packed = _empty(parts, _kind(parts[0], dtype), count, len(parts))
        _fill(packed, e, parts, dtype)
    return packed


def _kind(weight: Weight, dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if weight.kind == "plain" else weight.kind


def _empty(parts: Sequence[Weight], kind: str, count: int, pieces: int) -> _native.Packed:
    rows, inner = sum(p.shape[0] for p in parts), parts[0].shape[1]
    # Wide only where bfloat16 would lose something: a community checkpoint's float16 scales.
    exact = lambda scales: torch.equal(scales.bfloat16().float().nan_to_num(0), scales.nan_to_num(0))
    wide_scales = kind == "int4" and not all(exact(p.scales) for p in parts)
    group = -(-parts[0].group // 32) * 32 if kind == "int4" else 32
    return _native.Packed(kind, count, rows, inner, pieces, group, wide_scales)


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
            zeros = None if part.zeros is None else part.zeros.contiguous()
            stride = codes.stride(0) * codes.itemsize
            packed.fill(e, row, len(codes), codes.data_ptr(), stride, _address(scales), _address(zeros))
            row += len(codes)


def packed_bytes(weight: Weight, bfloat16_scales: bool) -> int:
    if weight.kind != "int4":
        return weight.nbytes
    # A group's scale and zero share a word; a row has a power of two.
    return weight.codes.nbytes + weight.scales.numel() * (2 if bfloat16_scales else 4) + weight.shape[0] * 4


def kernels() -> str:
    """The instruction set in use, and all that this build and this processor could use."""
    return f"{_native.isa()} (of {', '.join(_native.available().split())})"


def limits() -> dict[str, float]:
    """See Ops.limits. In a process of its own: what it reads shall not count as memory of this one."""
    program = Path(__file__).with_name("limits.py")
    command = [sys.executable, "-P", program, _native.__file__, _native.isa(), str(_native.threads())]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
