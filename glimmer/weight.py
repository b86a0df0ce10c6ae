"""Weight: a matrix as a checkpoint stores it, before a backend has packed it.

Its kind is plain (bf16, fp16 or fp32 values), fp8 (the official FP8 checkpoints), int8 or int4. Whoever multiplies by
one of the last three quantises the activations too, as they come: for fp8 and int8 by the row, for int4 by the row and
group of columns, so that the products of the codes are exact and only scales are multiplied in float32
(backends/reference.py says how). A Weight joins, widens and quantises itself, and a Kind says what follows from it, so
that nobody else has to know how a kind lays out its bits, nor which kinds there are.
Not here: files (checkpoint/), packing (backends/), devices, and which matrix of a model becomes what (model/load.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_ZERO_POINT = 8  # the zero point of an int4 weight that stores none: codes 0..15 mean -8..7
GROUP_SIZE = 32  # columns that share a scale in an int4 matrix whose width is no multiple of the number asked for
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
TINY = torch.finfo(torch.float32).tiny  # the scale of a row or group of zeros, which has none of its own
BLOCK = 1 << 16  # values quantised at once: as float32, with all that is derived from them, they stay in the cache

# torch adds up so many columns side by side, and fewer in another order: the scale of a group must not depend on how
# many other groups there are.
LANES = 64

# The range of a group is stretched by each of these, and what fits its values best is taken. With four, the error is
# within 0.5 % of what a fine search finds; 0.8 and below never won.
STRETCHES = (1.05, 1.0, 0.95, 0.9)


class Kind(StrEnum):
    """How the values of a matrix are stored; Weight says what each kind holds."""

    PLAIN = "plain"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Bits of a code; of a plain value, the fewest that there are."""
        return {Kind.PLAIN: 16, Kind.FP8: 8, Kind.INT8: 8, Kind.INT4: 4}[self]

    @property
    def floating(self) -> bool:
        """Whether the codes are floating-point numbers, which can be quantised to integers."""
        return self in (Kind.PLAIN, Kind.FP8)

    @property
    def scaled(self) -> bool:
        """Whether there are scales beside the codes."""
        return self is not Kind.PLAIN

    @property
    def grouped(self) -> bool:
        """Whether scales belong to groups of columns, and not to whole rows."""
        return self is Kind.INT4

    def at_least(self, bits: int) -> "Kind":
        """This kind, or the next one whose codes have so many significant bits (8 at most): int8 after int4. Of fp8,
        four are significant, and plain values come after it, as in the official FP8 checkpoints."""
        if bits <= 4 or self not in (Kind.FP8, Kind.INT4):
            return self
        return Kind.PLAIN if self.floating else Kind.INT8


def layout(kind: str, inner: int, group_size: int | None) -> tuple[Kind, int | None]:
    """(kind, group_size) that `Weight.quantize` gives a matrix of `inner` columns, when asked for these.

    int4 in groups that do not divide the width becomes int4 in groups of 32, the last of them shorter; of an odd
    width, which leaves half a byte, int8.
    """
    if not Kind(kind).grouped:
        return Kind(kind), None
    if inner % 2:
        return Kind.INT8, None
    assert group_size is not None, "int4 needs a group size"
    return Kind.INT4, GROUP_SIZE if inner % group_size else group_size


@dataclass(frozen=True)
class Weight:
    """A matrix of `out` rows and `in` columns: y = x @ W.T.

    kind    W                            codes                                       scales
    plain   codes                        (out, in) bf16, fp16 or fp32                None
    fp8     codes * scales               (out, in) float8_e4m3fn                     (out, 1) float32
    int8    codes * scales               (out, in) int8, -127..127                   (out, 1) float32
    int4    (nibbles - zeros) * scales   (out, in / 2) uint8, column 2j in byte j's  (out, groups) float32
                                         low half, column 2j + 1 in its high half

    int4 only: column i belongs to group i // group_size; there are ceil(in / group_size) groups, and the last is
    shorter when group_size does not divide `in` (or the only one, where it exceeds `in`). `in` is even. zeros (the zero
    points): (out, groups) uint8, 0..15, or None: 8 everywhere. int8: checkpoints of others also have -128.
    scales_dtype: a type that holds every scale exactly, so that a backend may pack them in it.
    """

    kind: str
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group_size: int | None = None
    scales_dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix, however many codes a byte holds."""
        out, inner = self.codes.shape
        return out, 2 * inner if self.kind == Kind.INT4 else inner

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros) if tensor is not None)

    @staticmethod
    def empty(
        kind: str,
        shape: tuple[int, int],
        group_size: int | None = None,
        zeros: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "meta",
        scales_dtype: torch.dtype = torch.float32,
    ) -> "Weight":
        """A Weight without values; on torch's meta device, only what one would be like. dtype: of plain values."""
        (out, inner), kind = shape, Kind(kind)
        types = {Kind.PLAIN: dtype, Kind.FP8: torch.float8_e4m3fn, Kind.INT8: torch.int8, Kind.INT4: torch.uint8}

        def empty(width: int, dtype: torch.dtype | None) -> Tensor:
            return torch.empty(out, width, dtype=dtype, device=device)

        codes = empty(inner * kind.bits // 8 if kind.grouped else inner, types[kind])
        if not kind.grouped:
            scales = empty(1, torch.float32) if kind.scaled else None
            return Weight(kind, codes, scales, scales_dtype=scales_dtype)
        assert group_size is not None, "int4 needs a group size"
        groups = -(-inner // group_size)
        zero_points = empty(groups, torch.uint8) if zeros else None
        return Weight(kind, codes, empty(groups, torch.float32), zero_points, group_size, scales_dtype)

    @staticmethod
    def join(parts: "Sequence[Weight]", dtype: torch.dtype, device: torch.device) -> "Weight":
        """The rows of all parts, in order (q, k, v or gate, up), copied once to `device`; plain values become `dtype`.

        All parts must be of one kind and group size. Codes stay as they are.
        """
        kinds = {(p.kind, p.group_size) for p in parts}
        assert len(kinds) == 1, f"cannot join {kinds}"
        ((kind, group_size),) = kinds
        codes = torch.empty(
            sum(p.codes.shape[0] for p in parts),
            parts[0].codes.shape[1],
            dtype=dtype if kind == Kind.PLAIN else parts[0].codes.dtype,
            device=device,
        )
        row = 0
        for part in parts:
            codes[row : row + part.shape[0]].copy_(part.codes)
            row += part.shape[0]
        scales = zeros = None
        if kind != Kind.PLAIN:
            scales = torch.cat([p.scales for p in parts if p.scales is not None]).to(device)
        if any(p.zeros is not None for p in parts):
            zeros = torch.cat([p.zero_points().to(torch.uint8) for p in parts]).to(device)
        (scales_dtype, *others) = {p.scales_dtype for p in parts}
        return Weight(kind, codes, scales, zeros, group_size, torch.float32 if others else scales_dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) values in `dtype`."""
        if self.scales is None:
            return self.codes.to(dtype)
        if self.group_size is None:
            return (self.codes.float() * self.scales).to(dtype)
        columns = torch.arange(self.shape[1], device=self.codes.device) // self.group_size
        scales, zeros = self.scales[:, columns], self.zero_points()[:, columns]
        return ((self.nibbles().float() - zeros) * scales).to(dtype)

    def quantize(self, kind: str, group_size: int | None = None) -> "Weight":
        """A plain or fp8 matrix as fp8, int8, or int4 in groups of `group_size` columns; see `layout` for odd widths.

        fp8 and int8: each row by its largest value. int4: each group with a scale and a zero point of its own, scale
        and codes chosen for the least squared error; scales are numbers that bfloat16 holds exactly. A row or group
        with NaN or infinity becomes NaN. A block of rows at a time, so that little more memory is needed than for the
        result.
        """
        assert Kind(self.kind).floating, f"{self.kind} is quantised already"
        assert Kind(kind).scaled, "plain values are not quantised"
        (out, inner), (kind, group_size) = self.shape, layout(kind, self.shape[1], group_size)
        made = Weight.quantized(kind, self.shape, group_size, self.codes.device)
        assert made.scales is not None
        step = max(1, BLOCK // inner)
        for row in range(0, out, step):
            rows = slice(row, row + step)
            block = Weight(self.kind, self.codes[rows], None if self.scales is None else self.scales[rows]).dequantize()
            if made.zeros is not None and group_size is not None:
                made.codes[rows], made.scales[rows], made.zeros[rows] = _to_int4(block, group_size)
            else:
                made.codes[rows], made.scales[rows] = (_to_fp8 if kind is Kind.FP8 else _to_int8)(block)
        return made

    @staticmethod
    def quantized(
        kind: str, shape: tuple[int, int], group_size: int | None, device: torch.device | str = "meta"
    ) -> "Weight":
        """Codes without values, for `quantize` to fill; int4 has zero points, and scales that fit bfloat16."""
        scales_dtype = torch.bfloat16 if Kind(kind).grouped else torch.float32
        return Weight.empty(kind, shape, group_size, device=device, scales_dtype=scales_dtype)

    def nibbles(self) -> Tensor:
        """(out, in) uint8 in 0..15: the codes of an int4 weight, one a byte."""
        return torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1)

    def zero_points(self) -> Tensor:
        """(out, groups) float32: the zero points of an int4 weight, also where it stores none."""
        if self.zeros is not None:
            return self.zeros.float()
        assert self.scales is not None
        return torch.full_like(self.scales, DEFAULT_ZERO_POINT)


class ExpertWeights(NamedTuple):
    """One expert, as it is packed: gate_up are the two matrices (M, H) gate and up, down is (H, M)."""

    gate_up: Sequence[Weight]
    down: Weight


def _to_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of (rows, in) float32 values."""
    scales = _row_scales(w, 127)
    return (w / scales).round_().clamp_(-127, 127).nan_to_num_(0).to(torch.int8), scales


def _to_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of (rows, in) float32 values. What exceeds the largest code would become NaN, not this code."""
    scales = _row_scales(w, FP8_MAX)
    return (w / scales).clamp_(-FP8_MAX, FP8_MAX).nan_to_num_(0).to(torch.float8_e4m3fn), scales


def _row_scales(w: Tensor, largest: float) -> Tensor:
    """(rows, 1): the scales that make the largest value of each row the largest code."""
    scales = w.abs().amax(1, keepdim=True) / largest
    return torch.where(scales.isfinite(), scales.clamp_min(TINY), torch.nan)


def _to_int4(w: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of (rows, in) float32 values.

    The zero point is where the end points of the range put it. Of the scales, those of a stretched range are tried; to
    the codes c (counted from the zero point) that each leads to, the scale <w, c> / <c, c> fits best and takes
    <w, c>^2 / <c, c> off the squared error, and the codes are rounded once more with the best of these.
    """
    rows, inner = w.shape
    w = F.pad(w, (0, -inner % group_size)).view(-1, group_size)  # a zero more is no error more: every range holds zero
    groups = len(w)
    w = F.pad(w, (0, 0, 0, -groups % LANES)).T.contiguous()  # a group is a column: sums and broadcasts are 3x faster
    low, high = w.amin(0).clamp_max_(0), w.amax(0).clamp_min_(0)
    span = (high - low).clamp_min_(TINY)
    zeros = (low / span * -15).round_()
    least, most = -zeros, 15 - zeros
    best, gained = span / 15, torch.full_like(span, -1)
    for stretch in STRETCHES:
        c = (w * (15 / stretch / span)).round_().clamp_(least, most)
        along, square = (w * c).sum(0), c.square().sum(0).clamp_min_(1)
        scale, gain = along / square, along.square() / square
        best, gained = torch.where(gain > gained, scale, best), torch.maximum(gain, gained)
    best = best.bfloat16().float().clamp_min_(TINY)
    scales = torch.where(span.isfinite(), best, torch.nan)
    codes = (w / scales).round_().clamp_(least, most).add_(zeros).nan_to_num_(0).to(torch.uint8)
    codes = (codes[0::2] | codes[1::2] << 4).T[:groups].reshape(rows, -1)[:, : inner // 2]
    zeros = zeros.nan_to_num_(0).to(torch.uint8)
    return codes, scales[:groups].view(rows, -1), zeros[:groups].view(rows, -1)
