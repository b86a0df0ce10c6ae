"""Weight: a matrix as it is stored, before any backend has packed it.

Kinds: "plain" (codes are bf16, fp16 or fp32 values) and "fp8" (codes are float8_e4m3fn, one float32 scale per output
row, and whoever multiplies by it quantises its activations per token, as the official FP8 checkpoints prescribe).
A Weight slices and joins itself, so that nobody else has to know how a format lays out its bits.
Not here: files (checkpoint/), packing (ops/), devices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """A matrix of `out` rows and `in` columns: y = x @ W.T, W = codes * scales.

    codes:  (out, in)    values ("plain") or float8_e4m3fn codes ("fp8")
    scales: (out, 1)     float32, or None when kind is "plain"
    """

    kind: str
    codes: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def rows(self, start: int, stop: int) -> "Weight":
        """Output rows start:stop, a view; the scales go with their rows."""
        scales = None if self.scales is None else self.scales[start:stop]
        return Weight(self.kind, self.codes[start:stop], scales)

    def cols(self, start: int, stop: int) -> "Weight":
        """Input columns start:stop, a view; per-row scales serve every column and stay whole."""
        return Weight(self.kind, self.codes[:, start:stop], self.scales)

    @staticmethod
    def cat(parts: "list[Weight]") -> "Weight":
        """The rows of all parts, in order (q, k, v or gate, up in one matrix). All parts must be of one kind."""
        assert len({p.kind for p in parts}) == 1, f"cannot join kinds {[p.kind for p in parts]}"
        if len(parts) == 1:
            return parts[0]
        scales = None if parts[0].scales is None else torch.cat([p.scales for p in parts])
        return Weight(parts[0].kind, torch.cat([p.codes for p in parts]), scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) values in `dtype`."""
        if self.scales is None:
            return self.codes.to(dtype)
        return (self.codes.float() * self.scales).to(dtype)
