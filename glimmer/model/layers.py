"""Linear, Experts, RMSNorm, Embedding: where weights meet the backend.

A leaf is empty until load.py fills it; then it holds what its backend packed, and a forward pass is one call of an op.
Not here: names on disk, and which part is this rank's (names.py).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from glimmer.backends.base import Backend, Packed
from glimmer.weight import Weight


class Linear(nn.Module):
    """y = x @ W.T + b, (T, in) -> (T, out). W may be several matrices of the checkpoint, one under the other."""

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend
        self.packed: Packed | None = None
        self.bias: Tensor | None = None

    def fill(self, parts: Sequence[Weight], bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self.packed = self.backend.pack_linear(parts, dtype)
        self.bias = None if bias is None else bias.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.linear(x, self.packed, self.bias)


class Experts(nn.Module):
    """One matrix for each expert; MoE owns two of these and hands both to one op."""

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend
        self.packed: Packed | None = None

    def fill(self, experts: Iterable[Sequence[Weight]], count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.packed = self.backend.pack_matrices(experts, count, dtype)


class RMSNorm(nn.Module):
    """Over the last dimension. With a residual: (normed, residual + x) in one op."""

    def __init__(self, backend: Backend, eps: float):
        super().__init__()
        self.backend, self.eps = backend, eps
        self.weight: Tensor | None = None

    def fill(self, weight: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = weight.to(device, dtype, copy=True)

    def forward(self, x: Tensor, residual: Tensor | None = None):
        if residual is None:
            return self.backend.rms_norm(x, self.weight, self.eps)
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps)


class Embedding(nn.Module):
    """Rows first..first+len of the vocabulary; tokens of other ranks give zeros."""

    def __init__(self, backend: Backend, first: int):
        super().__init__()
        self.backend, self.first = backend, first
        self.table: Tensor | None = None

    def fill(self, table: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.table = table.to(device, dtype, copy=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.backend.embed(tokens, self.table, self.first)


class Vector(nn.Module):
    """A float32 vector that takes part in routing: the experts' correction bias."""

    def __init__(self):
        super().__init__()
        self.value = None

    def fill(self, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.value = value.to(device, torch.float32, copy=True)
