"""NVFP4: 4-bit floats in groups of 16, as llm-compressor and as ModelOpt store them; read as plain values."""

from typing import ClassVar

import torch
from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats.base import (
    Config,
    Format,
    Matrix,
    Slice,
    check_scales,
    each_column,
    misfit,
    table,
    want,
    want_one,
    want_tensor,
)
from glimmer.weight import Kind, Weight

GROUP = 16
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0..7; codes 8..15 are their negatives


class NVFP4(Format):
    """Codes (out, in / 2) uint8, that of column 2j in the low half of byte j; X.weight_scale (out, in / 16)
    float8_e4m3fn; one float32 scale of the whole matrix.

    overall      last part of the name of the scale of the whole matrix
    inputs       the same of the scale of its inputs, which is not used: activations are not quantised
    divides      whether the overall scale is a divisor
    """

    codes_dtypes = (torch.uint8,)
    overall: ClassVar[str]
    inputs: ClassVar[str]
    divides: ClassVar[bool]

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        name, scale, overall = self.codes_of(module), f"{module}.weight_scale", f"{module}.{self.overall}"
        (out, half), inputs = checkpoint.shape(name), f"{module}.{self.inputs}"
        for each in (scale, overall):
            if each not in checkpoint:
                misfit(checkpoint, name, f"a tensor {each} with the scales of these codes")
        want_tensor(checkpoint, scale, (out, -(-2 * half // GROUP)), torch.float8_e4m3fn)
        if checkpoint.shape(overall) not in ((), (1,)) or checkpoint.dtype(overall) is not torch.float32:
            misfit(checkpoint, overall, "one number of float32")
        has = [each for each in (inputs,) if each in checkpoint]
        return Matrix(
            Kind.PLAIN, (out, 2 * half), (name, scale, overall, *has), dtype=torch.float32, widened="NVFP4"
        )  # fmt: skip

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        (out, inner), (name, scale, overall, *_) = (found := self.stored(checkpoint, module, config))[1:3]
        (first, last), (start, stop) = rows or (0, out), cols or (0, inner)
        whole = checkpoint.tensor(overall).float().reshape(1, 1)
        check_scales(checkpoint, overall, whole, whole > 0, None)
        scales = checkpoint.tensor(scale, (first, last), (start // GROUP, -(-stop // GROUP))).float()
        check_scales(checkpoint, scale, scales, scales >= 0, rows)
        scales = scales / whole if self.divides else scales * whole
        values = _values(checkpoint.tensor(name, (first, last), (start // 2, -(-stop // 2))))
        values = values[:, start % 2 : start % 2 + stop - start]
        return Weight(found.kind, values * each_column(scales, GROUP, start, stop))


class ModelOptNVFP4(NVFP4):
    """ModelOpt: X.weight, X.weight_scale_2, a factor."""

    accepts = "modelopt (NVFP4)"
    codes, overall, inputs, divides = "weight", "weight_scale_2", "input_scale", False
    quant_method = "modelopt"

    def check_config(self, config: Config) -> None:
        inner = table("quantization", config.get("quantization") or {})
        algorithm = config.get("quant_algo", inner.get("quant_algo"))
        want_one("quant_algo", algorithm, ("NVFP4",))
        want("group_size", config.get("group_size", GROUP), GROUP)


def _values(pairs: Tensor) -> Tensor:
    """(rows, n) uint8 -> (rows, 2n) float32."""
    codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1).int()
    return torch.tensor([*VALUES, *(-value for value in VALUES)])[codes]
