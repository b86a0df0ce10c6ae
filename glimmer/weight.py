"""Weight: a matrix as it is stored, before any backend has packed it.

Kinds: "plain" (codes are bf16, fp16 or fp32 values) and "fp8" (codes are float8_e4m3fn, one float32 scale per output
row, and whoever multiplies by it quantises its activations per token, as the official FP8 checkpoints prescribe).
A Weight joins and widens itself, so that nobody else has to know how a kind lays out its bits.
Not here: files (checkpoint/), packing (ops/), devices.
"""

from collections.abc import Sequence
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

    @staticmethod
    def join(parts: "Sequence[Weight]", dtype: torch.dtype, device: torch.device) -> "Weight":
        """The rows of all parts, in order (q, k, v or gate, up), copied once to `device`; plain values become `dtype`.

        All parts must be of one kind. FP8 codes stay as they are.
        """
        kind = parts[0].kind
        assert all(p.kind == kind for p in parts), f"cannot join kinds {[p.kind for p in parts]}"
        if kind == "fp8":
            dtype = torch.float8_e4m3fn
        codes = torch.empty(sum(p.shape[0] for p in parts), parts[0].shape[1], dtype=dtype, device=device)
        row = 0
        for part in parts:
            codes[row : row + part.shape[0]].copy_(part.codes)
            row += part.shape[0]
        scales = torch.cat([p.scales for p in parts]).to(device) if kind == "fp8" else None
        return Weight(kind, codes, scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in) values in `dtype`."""
        if self.scales is None:
            return self.codes.to(dtype)
        return (self.codes.float() * self.scales).to(dtype)
