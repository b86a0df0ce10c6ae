"""Weight: a matrix as it is stored, before any backend has packed it.

Kinds: "plain" (bf16, fp16 or fp32 values), "fp8" (the official FP8 checkpoints), "int8" and "int4". Whoever multiplies
by one of the last three quantises its activations too, as they come: "fp8" and "int8" per row, "int4" per row and
group, so that the codes' products are exact and only scales are multiplied in float32 (ops/reference.py says how).
A Weight joins, widens and quantises itself, so that nobody else has to know how a kind lays out its bits.
Not here: files (checkpoint/), packing (ops/), devices, and which matrix of a model becomes what (model/load.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIDDLE = 8  # the zero of an int4 weight that stores none: codes 0..15 mean -8..7
GROUP = 32  # what a matrix whose width is no multiple of the group asked for is quantised by


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
    `group` does not divide `in`. `in` is even. zeros (out, groups) uint8, 0..15, or None: 8 everywhere.
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
            zeros = torch.cat([p.centers().to(torch.uint8) for p in parts]).to(device)
        return Weight(kind, codes, scales, zeros, group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) values in `dtype`."""
        if self.kind == "plain":
            return self.codes.to(dtype)
        if self.kind != "int4":
            return (self.codes.float() * self.scales).to(dtype)
        spread = lambda each: each.repeat_interleave(self.group, 1)[:, : self.shape[1]]
        scales, zeros = spread(self.scales), spread(self.centers())
        return ((self.nibbles().float() - zeros) * scales).to(dtype)

    def nibbles(self) -> Tensor:
        """(out, in) uint8 in 0..15: the codes of an int4 weight, one a byte."""
        return torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1)

    def centers(self) -> Tensor:
        """(out, groups) float32: the zeros of an int4 weight, also where it stores none."""
        return torch.full_like(self.scales, MIDDLE) if self.zeros is None else self.zeros.float()
