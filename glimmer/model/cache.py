"""Cache: keys and values of every layer, in blocks of `block_size` tokens. Not here: who owns which block (engine/)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glimmer import device as devices
from glimmer.backends.reference import SCALE


class Cache:
    """For each layer a pair of tensors (num_blocks, block_size, kv_heads, head_dim) in the model's dtype; or in int8,
    each head's scale behind its codes (backends/__init__.py).

    The MTP layer, where it is loaded, owns one more layer at the end.
    """

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (2, num_blocks, block_size, kv_heads, _wide(head_dim, dtype))
        # Zeros, not garbage: a kernel may read slots that no token has filled before it masks them.
        self._layers: Sequence[Tensor] = [devices.zeros(shape, dtype, device) for _ in range(layers)]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of one layer."""
        return self._layers[index].unbind(0)


def block_bytes(layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values together."""
    return 2 * layers * block_size * kv_heads * _wide(head_dim, dtype) * dtype.itemsize


def _wide(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a head's key or value."""
    return head_dim + SCALE if dtype == torch.int8 else head_dim
