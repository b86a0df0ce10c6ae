"""Batch: all that one forward pass is told; the word that model and ops share.

A step computes chunks: n tokens of one sequence each. A long prompt's chunk has many rows, a decoding sequence has
one, a draft check a few; nothing in the model or the kernels distinguishes them.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step as tensors: T tokens from S sequences, rows in sequence order.

    tokens           (T,)    int64   token ids
    positions        (T,)    int64   index of each token in its own sequence
    slot_mapping     (T,)    int64   where the token's key and value are stored: block * block_size + offset
    block_tables     (S, B)  int64   block table of each sequence, padded with 0
    logits_indices   (R,)    int64   rows whose logits are wanted
    query_start_loc  S+1 ints        rows of sequence s are query_start_loc[s]:query_start_loc[s+1]
    seq_lens         S ints          keys that the last row of s sees (all of them, itself included)

    `query_start_loc` and `seq_lens` are host values, so that no kernel waits for the device to learn its loop bounds.
    """

    tokens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    logits_indices: Tensor
    query_start_loc: tuple[int, ...]
    seq_lens: tuple[int, ...]
