"""4-bit codes, eight of them in an int32, <-> bytes of two codes, as Weight has them; 8-bit codes, four in an int32.

    format               tensor     shape               eight codes that share a word, lowest bits first
    compressed-tensors   weights    (out, in / 8)       of one output, inputs 8j .. 8j + 7
                         zeros      (out / 8, groups)   of one group, outputs 8j .. 8j + 7
    AWQ                  weights    (in, out / 8)       of one input, outputs 8j + 0, 2, 4, 6, 1, 3, 5, 7
                         zeros      (groups, out / 8)   the same
    GPTQ                 weights    (in / 8, out)       of one output, inputs 8j .. 8j + 7
                         zeros      (groups, out / 8)   of one group, outputs 8j .. 8j + 7

8-bit codes lie likewise, in fours. Words are little-endian, so that the bytes of a word hold its codes two by two (or
one by one) in their order.
Not here: which tensor is which, slices, scales (the formats themselves).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nibbles(words: Tensor) -> Tensor:
    """(..., n) int32 -> (..., 8n) uint8: the codes of each word, lowest bits first."""
    pairs = _rows(words).view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def unpack(words: Tensor, bits: int) -> Tensor:
    """(..., n) int32 -> (..., 32n / bits) uint8: the codes of 4 or 8 bits of each word, lowest bits first."""
    return nibbles(words) if bits == 4 else _rows(words).view(torch.uint8)


def pairs(codes: Tensor) -> Tensor:
    """(n, m) uint8 in 0..15 -> (n, ceil(m / 2)) uint8, two codes a byte as in Weight."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def words(pairs: Tensor) -> Tensor:
    """(n, m) uint8, two codes a byte -> (n, ceil(m / 4)) int32, the last word filled up with zeros."""
    return F.pad(pairs, (0, -pairs.shape[1] % 4)).clone(memory_format=torch.contiguous_format).view(torch.int32)


def down_columns(words: Tensor) -> Tensor:
    """(n, out) int32, whose words hold codes that follow each other down a column -> (out, 4n) uint8 as in Weight."""
    return _rows(words).view(torch.uint8).reshape(len(words), -1, 4).transpose(0, 1).flatten(1)


def _rows(x: Tensor) -> Tensor:
    """x, its last dimension dense in memory. (`contiguous` leaves any stride to a dimension of one element.)"""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
