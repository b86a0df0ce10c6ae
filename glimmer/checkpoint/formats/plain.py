"""Plain values: X.weight in bf16, fp16 or fp32, as every checkpoint has some."""

from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats.base import FLOATS, Config, Format, Matrix, Slice, misfit
from glimmer.weight import Kind, Weight


class Plain(Format):
    """X.weight (out, in) in a floating-point type; `read` gives it as it is stored."""

    accepts = "no quantization_config (bf16, fp16, fp32)"
    codes, codes_dtypes = "weight", FLOATS
    writes = Kind.PLAIN

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        name, scale = f"{module}.weight", f"{module}.weight_scale"
        if scale in checkpoint:
            misfit(checkpoint, name, f"float8_e4m3fn or int8, because there is a {scale}")
        shape = checkpoint.shape(name)
        return Matrix(Kind.PLAIN, (shape[0], shape[1]), (name,), dtype=checkpoint.dtype(name))

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        (name,) = self.stored(checkpoint, module, config).tensors
        return Weight(Kind.PLAIN, checkpoint.tensor(name, rows, cols))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        return {"weight": weight.codes}
