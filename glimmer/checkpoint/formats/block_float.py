"""8-bit floats in blocks of 128 x 128, as DeepSeek and its successors store them, in both spellings."""

from typing import Any

import torch

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats.base import (
    FLOATS,
    Config,
    Format,
    Matrix,
    Slice,
    Unsupported,
    check_scales,
    each_column,
    misfit,
    want_one,
)
from glimmer.weight import Kind, Weight

BLOCK = (128, 128)
SPELLINGS = ("weight_scale_inv", "weight_scale")  # the names of the scales; both are factors


def check_block(key: str, value: Any) -> None:
    """The value must be the rows and columns of a block."""
    if not (isinstance(value, list) and value == list(BLOCK) and all(type(side) is int for side in value)):
        raise Unsupported(key, value, str(list(BLOCK)))


class BlockFloat(Format):
    """X.weight (out, in) float8_e4m3fn and one scale for each block of it: X.weight_scale_inv (quant_method fp8) or
    X.weight_scale (compressed-tensors, strategy block), both (ceil(out / 128), ceil(in / 128)).

    Read as plain values: code times scale.
    """

    accepts = "fp8 (8-bit floats in blocks of 128 x 128)"
    codes, codes_dtypes = "weight", (torch.float8_e4m3fn,)
    quant_method = "fp8"

    def check_config(self, config: Config) -> None:
        want_one("fmt", config.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"))
        want_one("activation_scheme", config.get("activation_scheme", "dynamic"), ("dynamic",))
        check_block("weight_block_size", config.get("weight_block_size"))

    def matches(self, checkpoint: Checkpoint, module: str, config: Config) -> bool:
        """One scale for each row is another format; so is a matrix without scales, which is told so there."""
        return super().matches(checkpoint, module, config) and self._scale(checkpoint, module) is not None

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        name, scale = self.codes_of(module), self._scale(checkpoint, module)
        assert scale is not None
        out, inner = checkpoint.shape(name)
        blocks = -(-out // BLOCK[0]), -(-inner // BLOCK[1])
        if checkpoint.shape(scale) != blocks or checkpoint.dtype(scale) not in FLOATS:
            misfit(checkpoint, scale, f"bfloat16, float16 or float32 of shape {blocks}: one scale for each block")
        widened = "FP8 in blocks of 128 x 128"
        return Matrix(Kind.PLAIN, (out, inner), (name, scale), dtype=torch.float32, widened=widened)

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        (out, inner), (name, scale) = (found := self.stored(checkpoint, module, config)).shape, found.tensors
        (first, last), (start, stop) = rows or (0, out), cols or (0, inner)
        high, wide = BLOCK
        scales = checkpoint.tensor(scale, (first // high, -(-last // high)), (start // wide, -(-stop // wide))).float()
        check_scales(checkpoint, scale, scales, scales >= 0, None)
        scales = each_column(each_column(scales, wide, start, stop).T, high, first, last).T
        return Weight(Kind.PLAIN, checkpoint.tensor(name, (first, last), (start, stop)).float() * scales)

    def _scale(self, checkpoint: Checkpoint, module: str) -> str | None:
        """The tensor with the scales of blocks."""
        inverse, plain = (f"{module}.{end}" for end in SPELLINGS)
        if inverse in checkpoint:
            return inverse
        out, inner = checkpoint.shape(self.codes_of(module))
        blocks = -(-out // BLOCK[0]), -(-inner // BLOCK[1])
        return plain if plain in checkpoint and checkpoint.shape(plain) == blocks != (out, 1) else None
