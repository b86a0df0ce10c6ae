"""Batch: all inputs of one forward pass; the type that model and backends share.

A step computes chunks: n tokens of one sequence each. A long prompt's chunk has many rows, a decoding sequence has
one, a draft check a few; nothing in the model or the kernels distinguishes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

TENSORS = ("tokens", "positions", "slot_mapping", "block_tables", "logits_indices", "query_start_loc", "seq_lens")


@dataclass(frozen=True)
class Batch:
    """One step as tensors of int64: T tokens from S sequences, rows in sequence order.

    tokens           (T,)    token ids
    positions        (T,)    index of each token in its own sequence
    slot_mapping     (T,)    where the token's key and value are stored: block * block_size + offset
    block_tables     (S, B)  block table of each sequence, padded with 0
    logits_indices   (R,)    rows whose logits are wanted
    query_start_loc  (S+1,)  rows of sequence s are query_start_loc[s]:query_start_loc[s+1]
    seq_lens         (S,)    keys that the last row of s sees (all of them, itself included)

    query_start_loc_cpu and seq_lens_cpu hold the same in the host's memory, so that no kernel waits for the device to
    learn its loop bounds.
    """

    tokens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    logits_indices: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    query_start_loc_cpu: Tensor
    seq_lens_cpu: Tensor

    @staticmethod
    def of(
        tokens: Sequence[int],
        positions: Sequence[int],
        slot_mapping: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        logits_indices: Sequence[int],
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
    ) -> "Batch":
        """A batch in the host's memory. query_lens: rows of each sequence; block tables may differ in length."""
        columns = max(map(len, block_tables))
        tables = [block for table in block_tables for block in (*table, *[0] * (columns - len(table)))]
        query_start_loc = list(accumulate(query_lens, initial=0))
        parts = [tokens, positions, slot_mapping, tables, logits_indices, query_start_loc, seq_lens]
        numbers = np.array([x for part in parts for x in part], np.int64)  # in a quarter of the time of torch.tensor
        return _views(torch.from_numpy(numbers), [len(part) for part in parts], None)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.seq_lens_cpu)

    def widened(self, columns: int) -> "Batch":
        """A copy whose block tables have so many columns, at least as many as now."""
        tables = self.block_tables.new_zeros(self.num_sequences, columns)
        tables[:, : self.block_tables.shape[1]] = self.block_tables
        parts = [getattr(self, name).flatten() if name != "block_tables" else tables.flatten() for name in TENSORS]
        host = None if self.seq_lens_cpu is self.seq_lens else (self.query_start_loc_cpu, self.seq_lens_cpu)
        return _views(torch.cat(parts), [len(part) for part in parts], host)

    def to(self, device: torch.device) -> "Batch":
        """The same with its tensors on the device, in one upload; a batch that is there already is returned itself."""
        if self.tokens.device == device:
            return self
        parts = [getattr(self, name).flatten() for name in TENSORS]
        data = torch.cat(parts).to(device, non_blocking=True)
        return _views(data, [len(part) for part in parts], (self.query_start_loc_cpu, self.seq_lens_cpu))


def _views(data: Tensor, sizes: list[int], host: tuple[Tensor, Tensor] | None) -> Batch:
    """The parts of one tensor as a Batch; host: the last two of them in the host's memory, None if all are there."""
    tokens, positions, slot_mapping, tables, logits_indices, query_start_loc, seq_lens = data.split_with_sizes(sizes)
    block_tables = tables.view(len(seq_lens), -1)
    on_host = host or (query_start_loc, seq_lens)
    return Batch(tokens, positions, slot_mapping, block_tables, logits_indices, query_start_loc, seq_lens, *on_host)
