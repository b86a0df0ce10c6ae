"""Weight: a matrix as it is stored, before any backend has packed it.

Kinds: "plain" (bf16, fp16 or fp32 values), "fp8" (the official FP8 checkpoints), "int8" and "int4". Whoever multiplies
by one of the last three quantises its activations too, as they come: "fp8" and "int8" per row, "int4" per row and
group, so that the codes' products are exact and only scales are multiplied in float32 (backends/reference.py says how).
A Weight joins, widens and quantises itself, so that nobody else has to know how a kind lays out its bits.
Not here: files (checkpoint/), packing (ops/), devices, and which matrix of a model becomes what (model/load.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_ZERO_POINT = 8  # the zero of an int4 weight that stores none: codes 0..15 mean -8..7
GROUP = 32  # the group of a matrix whose width is no multiple of the one asked for
TINY = torch.finfo(torch.float32).tiny  # the scale of zeros, which have none of their own
BLOCK = 1 << 16  # values quantised at once: as float32, with all that is derived from them, they stay in the cache

# torch adds up so many columns side by side, and fewer in another order: a group's scale must not depend on how many
# others there are.
LANES = 64

# A group's range is stretched by each of these, and what fits its values best is taken. With four, the error is within
# 0.5 % of what a fine search finds; 0.8 and below never won.
STRETCHES = (1.05, 1.0, 0.95, 0.9)


class Kind(StrEnum):
    """How the values of a matrix are kept; see Weight."""

    PLAIN = "plain"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


def layout(kind: str, inner: int, group: int | None) -> tuple[str, int | None]:
    """(kind, group) that `Weight.quantize` gives a matrix of `inner` columns, when asked for these.

    int4 in groups that do not divide the width becomes int4 in groups of 32, the last of them shorter; of an odd
    width, which leaves half a byte, int8.
    """
    if kind != "int4" or inner % 2:
        return "int8", None
    return kind, GROUP if inner % group else group


@dataclass(frozen=True)
class Weight:
    """A matrix of `out` rows and `in` columns: y = x @ W.T.

    kind    W                            codes                                       scales
    plain   codes                        (out, in) bf16, fp16 or fp32                None
    fp8     codes * scales               (out, in) float8_e4m3fn                     (out, 1) float32
    int8    codes * scales               (out, in) int8, -127..127                   (out, 1) float32
    int4    (nibbles - zeros) * scales   (out, in / 2) uint8, column 2j in byte j's  (out, groups) float32
                                         low half, column 2j + 1 in its high half

    int4 only: column i belongs to group i // group; there are ceil(in / group) of them, and the last is shorter when
    `group` does not divide `in` (or the only one, where `group` exceeds it). `in` is even. zeros (out, groups) uint8,
    0..15, or None: 8 everywhere. int8: others' checkpoints also have -128.
    """

    kind: str
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix, however many codes a byte holds."""
        out, inner = self.codes.shape
        return out, 2 * inner if self.kind == "int4" else inner

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.zeros) if tensor is not None)

    @staticmethod
    def empty(
        kind: str,
        shape: tuple[int, int],
        group: int | None = None,
        zeros: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "meta",
    ) -> "Weight":
        """A Weight without values; on torch's meta device, only what one would be like. dtype: of plain values."""
        out, inner = shape
        types = {"plain": dtype, "fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
        empty = lambda width, dtype: torch.empty(out, width, dtype=dtype, device=device)
        codes = empty(inner // 2 if kind == "int4" else inner, types[kind])
        if kind != "int4":
            return Weight(kind, codes, None if kind == "plain" else empty(1, torch.float32))
        groups = -(-inner // group)
        return Weight(kind, codes, empty(groups, torch.float32), empty(groups, torch.uint8) if zeros else None, group)

    @staticmethod
    def join(parts: "Sequence[Weight]", dtype: torch.dtype, device: torch.device) -> "Weight":
        """The rows of all parts, in order (q, k, v or gate, up), copied once to `device`; plain values become `dtype`.

        All parts must be of one kind and group. Codes stay as they are.
        """
        kinds = {(p.kind, p.group) for p in parts}
        assert len(kinds) == 1, f"cannot join {kinds}"
        ((kind, group),) = kinds
        codes = torch.empty(
            sum(p.codes.shape[0] for p in parts),
            parts[0].codes.shape[1],
            dtype=dtype if kind == "plain" else parts[0].codes.dtype,
            device=device,
        )
        row = 0
        for part in parts:
            codes[row : row + part.shape[0]].copy_(part.codes)
            row += part.shape[0]
        scales = zeros = None
        if kind != "plain":
            scales = torch.cat([p.scales for p in parts]).to(device)
        if any(p.zeros is not None for p in parts):
            zeros = torch.cat([p.zero_points().to(torch.uint8) for p in parts]).to(device)
        return Weight(kind, codes, scales, zeros, group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) values in `dtype`."""
        if self.kind == "plain":
            return self.codes.to(dtype)
        if self.kind != "int4":
            return (self.codes.float() * self.scales).to(dtype)
        spread = lambda each: each.repeat_interleave(self.group, 1)[:, : self.shape[1]]
        scales, zeros = spread(self.scales), spread(self.zero_points())
        return ((self.nibbles().float() - zeros) * scales).to(dtype)

    def quantize(self, kind: str, group: int | None = None) -> "Weight":
        """A plain or fp8 matrix as "int8", or as "int4" in groups of `group` columns; see `layout` for odd widths.

        int8: each row by its largest value. int4: each group with a scale and a zero of its own, scale and codes chosen
        for the least squared error; scales are numbers that bfloat16 holds exactly. A row or group with NaN or infinity
        becomes NaN. A block of rows at a time, so that little more memory is needed than the result's.
        """
        assert self.kind in ("plain", "fp8"), f"{self.kind} is quantised already"
        (out, inner), (kind, group) = self.shape, layout(kind, self.shape[1], group)
        made = Weight.empty(kind, self.shape, group, device=self.codes.device)
        step = max(1, BLOCK // inner)
        for row in range(0, out, step):
            rows = slice(row, row + step)
            block = Weight(self.kind, self.codes[rows], None if self.scales is None else self.scales[rows]).dequantize()
            if kind == "int8":
                made.codes[rows], made.scales[rows] = _to_int8(block)
            else:
                made.codes[rows], made.scales[rows], made.zeros[rows] = _to_int4(block, group)
        return made

    def nibbles(self) -> Tensor:
        """(out, in) uint8 in 0..15: the codes of an int4 weight, one a byte."""
        return torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1)

    def zero_points(self) -> Tensor:
        """(out, groups) float32: the zeros of an int4 weight, also where it stores none."""
        return torch.full_like(self.scales, DEFAULT_ZERO_POINT) if self.zeros is None else self.zeros.float()


def _to_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of (rows, in) float32 values."""
    scales = w.abs().amax(1, keepdim=True) / 127
    scales = torch.where(scales.isfinite(), scales.clamp_min(TINY), torch.nan)
    return (w / scales).round_().clamp_(-127, 127).nan_to_num_(0).to(torch.int8), scales


def _to_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of (rows, in) float32 values.

    The zero is where the range's own end points put it. Of the scales, those of a stretched range are tried; to the
    codes c (counted from the zero) that each leads to, the scale <w, c> / <c, c> fits best and takes <w, c>^2 / <c, c>
    off the squared error, and the codes are rounded once more with the best of these.
    """
    rows, inner = w.shape
    w = F.pad(w, (0, -inner % group)).view(-1, group)  # a zero more is no error more: every range holds zero
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
