"""8-bit integer codes with scales for groups of columns: what GPTQ and compressed-tensors have in common.

Symmetric ones with one scale for a row are the kind int8. No kernel multiplies the others; they become plain values.
"""

import torch
from torch import Tensor

from glimmer.checkpoint.formats.base import Matrix, each_column
from glimmer.weight import Kind, Weight

DEFAULT_ZERO_POINT = 128  # of codes 0..255: what symmetric ones have


def wide_matrix(shape: tuple[int, int], tensors: tuple[str, ...], groups: int, zeros: bool) -> Matrix:
    """What `wide_weight` will make of a matrix; zeros: whether zero points may differ from the middle."""
    if groups == 1 and not zeros:
        return Matrix(Kind.INT8, shape, tensors)
    return Matrix(Kind.PLAIN, shape, tensors, dtype=torch.float32, widened="8-bit integers in groups")


def wide_weight(
    matrix: Matrix,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    cols: tuple[int, int],
    scales_dtype: torch.dtype,
) -> Weight:
    """A slice of a matrix, columns `cols` of it: codes (rows, columns) uint8, scales float32 and zeros (None: 128
    everywhere) of the groups that these columns touch."""
    if matrix.kind is Kind.INT8:
        return Weight(Kind.INT8, (codes ^ DEFAULT_ZERO_POINT).view(torch.int8), scales, scales_dtype=scales_dtype)
    points = DEFAULT_ZERO_POINT if zeros is None else each_column(zeros.float(), group_size, *cols)
    return Weight(Kind.PLAIN, (codes.float() - points) * each_column(scales, group_size, *cols))
