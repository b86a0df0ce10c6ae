"""Layer: a place of the model that holds parameters, and whose forward pass is one call of an op of the backend.

Linear, Experts, RMSNorm, Embedding and Vector each say what they hold: in which precision it must be kept, which
matrices are packed as one, and how what the loader has read becomes what the backend computes with (`load`).
Not here: names on disk and which part of a matrix is this rank's (names.py), reading and quantising (load.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from glimmer.backends.base import Backend, ExpertSet, Packed
from glimmer.weight import ExpertWeights, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class LayerWeights:
    """What a checkpoint has for one layer: this rank's part of it, quantised as it will be held.

    vectors   the weight of a norm, or the biases of the matrices in their order
    units     what is packed at once: the matrices of a Linear, or of one expert. A unit is read when it is asked for;
              its memory is used again for later ones when none of its tensors is held any more
    count     how many units there are
    dtype     in what vectors and plain values are kept
    """

    vectors: Sequence[Tensor]
    units: Iterator[Sequence[Weight]]
    count: int
    dtype: torch.dtype


class Layer(nn.Module, ABC):
    """A layer is empty until `load`, which is called once.

    keep_float32   kept in float32, whatever the dtype of the model
    plain          matrices are held as plain values: never quantised while loading, and dequantised where they are
                   stored quantised
    min_bits       the fewest bits of a code to which matrices may be quantised while loading
    HELD           the attributes that `load` sets; a packed file holds them under these names
    """

    HELD: ClassVar[tuple[str, ...]]
    keep_float32: bool = False
    plain: bool = False
    min_bits: int = 4

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend

    @abstractmethod
    def load(self, weights: LayerWeights) -> None:
        """Keep what the checkpoint has for this layer, in the form and on the device of the backend."""

    def held(self) -> dict[str, Packed | ExpertSet | Tensor]:
        """What `load` has made."""
        return {name: value for name in self.HELD if (value := getattr(self, name)) is not None}

    def hold(self, held: Mapping[str, Packed | ExpertSet | Tensor | None]) -> None:
        """In place of `load`: what was made elsewhere."""
        for name in self.HELD:
            setattr(self, name, held.get(name))

    def packed_together(self, unit: Sequence[T]) -> tuple[Sequence[T], ...]:
        """The matrices of a unit, divided into those that are packed as one; over all units, these must be of one
        kind and group size."""
        return (unit,)

    def _copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor as it is kept: always a copy, since what was read may be a slice of more."""
        return tensor.to(self.backend.device, dtype, copy=True)


class Linear(Layer):
    """y = x @ W.T + b, (T, in) -> (T, out). W may be several matrices of the checkpoint, one above the other.

    keep_float32: the weights are plain and in float32 (the router). min_bits: see Layer.
    """

    HELD = ("packed", "bias")
    packed: Packed

    def __init__(self, backend: Backend, keep_float32: bool = False, min_bits: int = 4):
        super().__init__(backend)
        self.keep_float32 = self.plain = keep_float32
        self.min_bits = min_bits
        self.bias: Tensor | None = None

    def load(self, weights: LayerWeights) -> None:
        self.packed = self.backend.pack_linear(next(weights.units), weights.dtype)
        self.bias = self._copy(torch.cat(list(weights.vectors)), weights.dtype) if weights.vectors else None

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.linear(x, self.packed, self.bias)


class Experts(Layer):
    """All routed experts of a layer, each with the matrices gate, up and down; this rank has M columns of each."""

    HELD = ("packed",)
    packed: ExpertSet

    def load(self, weights: LayerWeights) -> None:
        experts = (ExpertWeights(gate_up, down) for gate_up, (down,) in map(self.packed_together, weights.units))
        self.packed = self.backend.pack_experts(experts, weights.count, weights.dtype)

    def packed_together(self, unit: Sequence[T]) -> tuple[Sequence[T], ...]:
        return unit[:2], unit[2:]

    def fetch(self, ids: Tensor) -> None:
        """These will be asked for: reads of what is not in memory may begin."""
        self.backend.fetch_experts(ids, self.packed)

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return self.backend.experts(x, ids, scores, self.packed)


class RMSNorm(Layer):
    """Over the last dimension. With a residual: (normed, residual + x) in one op."""

    HELD = ("weight",)
    weight: Tensor

    def __init__(self, backend: Backend, eps: float):
        super().__init__(backend)
        self.eps = eps

    def load(self, weights: LayerWeights) -> None:
        (weight,) = weights.vectors
        self.weight = self._copy(weight, weights.dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return self.backend.rms_norm(x, self.weight, self.eps)
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps)


class Embedding(Layer):
    """Rows first..first+len of the vocabulary; tokens of other ranks give zeros."""

    plain = True
    HELD = ("table",)
    table: Tensor

    def __init__(self, backend: Backend, first: int):
        super().__init__(backend)
        self.first = first

    def load(self, weights: LayerWeights) -> None:
        (table,) = next(weights.units)
        self.table = self._copy(table.codes, weights.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.backend.embed(tokens, self.table, self.first)


class Vector(Layer):
    """A float32 vector that takes part in routing: the correction bias of the experts."""

    keep_float32 = True
    HELD = ("value",)
    value: Tensor

    def load(self, weights: LayerWeights) -> None:
        (value,) = weights.vectors
        self.value = self._copy(value, weights.dtype)
