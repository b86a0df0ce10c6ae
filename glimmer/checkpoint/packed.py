"""int4 codes, eight of them in an int32, as three formats lay them out <-> bytes of two nibbles, as Weight has them.

    format               tensor     shape               eight codes that share a word, lowest bits first
    compressed-tensors   weights    (out, in / 8)       of one output, inputs 8j .. 8j + 7
                         zeros      (out / 8, groups)   of one group, outputs 8j .. 8j + 7
    AWQ                  weights    (in, out / 8)       of one input, outputs 8j + 0, 2, 4, 6, 1, 3, 5, 7
                         zeros      (groups, out / 8)   the same
    GPTQ                 weights    (in / 8, out)       of one output, inputs 8j .. 8j + 7
                         zeros      (groups, out / 8)   of one group, outputs 8j .. 8j + 7

Words are little-endian, so that the bytes of a word hold its nibbles two by two in their order.
Not here: which tensor is which, slices, scales (formats.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word AWQ keeps the code of output 8j + 0, 1, 2, ...


def nibbles(words: Tensor) -> Tensor:
    """(..., n) int32 -> (..., 8n) uint8: the codes of each word, lowest bits first."""
    pairs = _rows(words).view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def pairs(codes: Tensor) -> Tensor:
    """(n, m) uint8 in 0..15 -> (n, ceil(m / 2)) uint8, two codes a byte as in Weight."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def words(pairs: Tensor) -> Tensor:
    """(n, m) uint8, two codes a byte -> (n, ceil(m / 4)) int32, the last word filled up with zeros."""
    return F.pad(pairs, (0, -pairs.shape[1] % 4)).clone(memory_format=torch.contiguous_format).view(torch.int32)


def from_awq(packed: Tensor) -> Tensor:
    """(n, out / 8) int32 -> (out, n) uint8: weights or zeros."""
    return nibbles(packed).unflatten(-1, (-1, 8))[..., AWQ_PLACES].flatten(-2).T


def from_gptq(packed: Tensor) -> Tensor:
    """Weights (in / 8, out) int32 -> bytes (out, in / 2) uint8 as in Weight."""
    return _rows(packed).view(torch.uint8).unflatten(-1, (-1, 4)).transpose(0, 1).flatten(1)


def _rows(x: Tensor) -> Tensor:
    """x, its last dimension dense in memory. (`contiguous` leaves any stride to a dimension of one element.)"""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
