"""CapturedInputs steps: a decoding step is the same calls on the same tensors each time, so they are made from a list.

What Python does between two kernels of a step costs about as much as the smaller kernels themselves. The first step of
n sequences with one token each goes through the model as ever, while its ops' calls are recorded; the next one of n
copies its inputs to where the first had them and makes the calls again. The same arithmetic, so the same bits.
Not here: steps with prompts, large batches, several ranks (collectives are not recorded), backends that cannot record.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glimmer.batch import Batch
from glimmer.model.cache import Cache
from glimmer.model.glm4_moe import Glm4Moe

MAX_BATCH = 64  # sequences; beyond, a step's kernels are so long that the rest does not matter


@dataclass(frozen=True)
class CapturedInputs:
    """One step's tensors and calls: inputs that replay() reads, and the hidden states that it leaves."""

    inputs: tuple[Tensor, ...]  # x, residual, cos, sin, slots
    blocks: Tensor  # (n, columns) int64
    lengths: list[int]
    calls: Any  # what backends.record gave
    hidden: Tensor


class StepCapture:
    """model(batch, cache) for steps of one token a sequence. columns: blocks of the longest sequence there may be."""

    def __init__(self, model: Glm4Moe, cache: Cache, columns: int):
        self.model, self.cache, self.columns = model, cache, columns
        self._steps: dict[int, CapturedInputs] = {}
        self._memory = None  # of all recordings' results, one after the other

    def serves(self, batch: Batch) -> bool:
        one_each = len(batch.tokens) == len(batch.seq_lens) <= MAX_BATCH
        return one_each and self.model.ops.record is not None and self.model.group.size == 1

    def __call__(self, batch: Batch) -> Tensor:
        """The hidden states (n, H) of a batch that is served; valid until the next call."""
        step = self._steps.get(len(batch.seq_lens))
        if step is None:
            step = self._steps[len(batch.seq_lens)] = self._record(batch)
            return step.hidden
        x, residual, rotary = self.model.embed(batch)
        for mine, new in zip(step.inputs, (x, residual, *rotary, batch.slot_mapping)):
            mine.copy_(new)
        step.blocks[:, : batch.block_tables.shape[1]] = batch.block_tables
        step.lengths[:] = batch.seq_lens
        step.calls.replay()
        return step.hidden

    def _record(self, batch: Batch) -> CapturedInputs:
        x, residual, rotary = self.model.embed(batch)
        blocks = torch.zeros(len(batch.seq_lens), self.columns, dtype=batch.block_tables.dtype)
        blocks[:, : batch.block_tables.shape[1]] = batch.block_tables
        slots, lengths = batch.slot_mapping.clone(), list(batch.seq_lens)
        own = Batch(batch.tokens, batch.positions, slots, blocks, batch.logits_indices, batch.query_start_loc, lengths)
        with self.model.ops.record(self._memory) as calls:
            hidden = self.model.run_layers(x, residual, rotary, own, self.cache)
        self._memory = calls.memory
        return CapturedInputs((x, residual, *rotary, slots), blocks, lengths, calls, hidden)
