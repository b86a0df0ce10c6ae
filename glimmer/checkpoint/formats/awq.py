"""AWQ (AutoAWQ's "gemm" layout, 4 bits).

Also here: what AWQ's tensors have in common with GPTQ's, which have the same names.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats import packed
from glimmer.checkpoint.formats.base import (
    Config,
    Format,
    Matrix,
    Slice,
    check_order,
    group_scales,
    misfit,
    sliced_groups,
    stored_group_size,
    want,
    want_group_size,
    want_one,
    want_tensor,
)
from glimmer.checkpoint.formats.schemes import scheme
from glimmer.checkpoint.formats.wide import wide_matrix, wide_weight
from glimmer.weight import Kind, Weight

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word AWQ keeps the code of output 8j + 0, 1, 2, ...


class QWeight(Format):
    """A matrix in X.qweight, X.qzeros (groups, out * bits / 32), X.scales (groups, out) and, perhaps, X.g_idx (in,).

    Eight 4-bit codes (or, GPTQ only, four 8-bit codes) share an int32; which, and in which order, is the difference
    between AWQ and GPTQ. Where config.json says that a matrix is symmetric, qzeros may be empty or missing.
    """

    codes = "qweight"

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        name, zero, scale, order = (f"{module}.{end}" for end in ("qweight", "qzeros", "scales", "g_idx"))
        if scale not in checkpoint or len(checkpoint.shape(scale)) != 2:
            misfit(checkpoint, name, f"a tensor {scale} (groups, out) with the scales of these codes")
        said, bits = scheme(config, module), self.bits(config, module)
        each = 32 // bits
        out, inner = checkpoint.shape(scale)[1], self.inputs(checkpoint.shape(name)[0], bits)
        group_size = stored_group_size(checkpoint, scale, (None, out), inner, said.group_size)
        if out % each or inner % each:
            misfit(checkpoint, name, "inputs and outputs in eights")
        want_tensor(checkpoint, name, self.codes_shape(out, inner, bits), torch.int32)
        groups, empty = -(-inner // group_size), zero not in checkpoint or not checkpoint.nbytes(zero)
        if empty and said.symmetric is not True:
            misfit(checkpoint, name, f"a tensor {zero} with the zeros of these codes")
        if not empty:
            want_tensor(checkpoint, zero, (groups, out // each), torch.int32)
        has = [tensor for tensor in (zero, order) if tensor in checkpoint]
        if order in has:
            want_tensor(checkpoint, order, (inner,), torch.int32)
        if bits == 8:
            return wide_matrix((out, inner), (name, scale, *has), groups, said.symmetric is not True)
        return Matrix(Kind.INT4, (out, inner), (name, scale, *has), group_size, not empty)

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        matrix, bits = self.stored(checkpoint, module, config), self.bits(config, module)
        (out, inner), (name, scale, *_), zero = matrix.shape, matrix.tensors, f"{module}.qzeros"
        each = 32 // bits
        size = stored_group_size(checkpoint, scale, (None, out), inner, scheme(config, module).group_size)
        (first, last), (start, stop) = rows or (0, out), cols or (0, inner)
        groups = (start // size, -(-stop // size)) if bits == 8 else sliced_groups(module, size, start, stop)
        check_order(checkpoint, f"{module}.g_idx", inner, size)
        codes = self.unpack_codes(checkpoint, name, (first, last), (start, stop), bits)
        points = None
        if zero in checkpoint and checkpoint.nbytes(zero):
            words = checkpoint.tensor(zero, groups, (first // each, -(-last // each)))  # several rows share a word
            zeros = self.unpack_zeros(words, bits)[first % each : first % each + last - first]
            points = self.zero_points(checkpoint, module, zeros, bits, config)
        scales = group_scales(checkpoint, scale, checkpoint.tensor(scale, groups, (first, last)).T, rows)
        if bits == 8:
            return wide_weight(matrix, codes, scales, points, size, (start, stop), checkpoint.dtype(scale))
        points = None if points is None else points.contiguous()
        return Weight(Kind.INT4, codes, scales, points, size, checkpoint.dtype(scale))

    def bits(self, config: Config, module: str) -> int:
        """Bits of a code."""
        return 4

    @abstractmethod
    def inputs(self, rows: int, bits: int) -> int:
        """Inputs of a matrix whose qweight has so many rows."""

    @abstractmethod
    def codes_shape(self, out: int, inner: int, bits: int) -> tuple[int, int]:
        """Shape of qweight."""

    @abstractmethod
    def unpack_codes(
        self, checkpoint: Checkpoint, name: str, rows: tuple[int, int], cols: tuple[int, int], bits: int
    ) -> Tensor:
        """Rows and columns of qweight: 4-bit codes as a Weight has them, 8-bit codes one a byte."""

    @abstractmethod
    def unpack_zeros(self, words: Tensor, bits: int) -> Tensor:
        """(groups, n) int32 of qzeros -> (32n / bits, groups) uint8."""

    @abstractmethod
    def zero_points(
        self, checkpoint: Checkpoint, module: str, zeros: Tensor, bits: int, config: Config
    ) -> Tensor | None:
        """The zero points that the unpacked qzeros of `module` mean; None: the middle of all codes everywhere."""


class AWQ(QWeight):
    """qweight (in, out / 8): a word has outputs 8j + 0, 2, 4, 6, 1, 3, 5, 7 of one input, lowest bits first."""

    accepts = "awq (4 bits, gemm)"
    quant_method = "awq"

    def check_config(self, config: Config) -> None:
        want("bits", config.get("bits", config.get("w_bit")), 4)
        want_one("version", str(config.get("version", "gemm")).lower(), ("gemm",))
        want("zero_point", config.get("zero_point", True), True)
        want_group_size("group_size", config.get("group_size", config.get("q_group_size")))

    def matches(self, checkpoint: Checkpoint, module: str, config: Config) -> bool:
        """GPTQ's qweight has a column for each output, as the scales have."""
        scale = f"{module}.scales"
        columns = checkpoint.shape(self.codes_of(module))[1]
        return scale in checkpoint and len(checkpoint.shape(scale)) == 2 and checkpoint.shape(scale)[1] != columns

    def inputs(self, rows: int, bits: int) -> int:
        return rows

    def codes_shape(self, out: int, inner: int, bits: int) -> tuple[int, int]:
        return inner, out // 8

    def unpack_codes(
        self, checkpoint: Checkpoint, name: str, rows: tuple[int, int], cols: tuple[int, int], bits: int
    ) -> Tensor:
        words = checkpoint.tensor(name, cols, (rows[0] // 8, -(-rows[1] // 8)))
        return packed.pairs(self.unpack_zeros(words, bits)[rows[0] % 8 : rows[0] % 8 + rows[1] - rows[0]])

    def unpack_zeros(self, words: Tensor, bits: int) -> Tensor:
        return packed.nibbles(words).view(len(words), -1, 8)[..., PLACES].flatten(-2).T

    def zero_points(
        self, checkpoint: Checkpoint, module: str, zeros: Tensor, bits: int, config: Config
    ) -> Tensor | None:
        return zeros
