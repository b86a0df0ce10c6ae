"""Recorded steps: a decoding step is the same calls on the same tensors each time, so they are made from a list.

What Python does between two kernels of a step costs about as much as the smaller kernels themselves. The first step of
n sequences with one token each goes through the model as ever, while its doors' calls are recorded; the next one of n
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

MOST = 64  # sequences; beyond, a step's kernels are so long that the rest does not matter


@dataclass(frozen=True)
class Recorded:
    """One step's tensors and calls: inputs that play() reads, and the hidden states that it leaves."""

    inputs: tuple[Tensor, ...]  # x, residual, cos, sin, slots
    blocks: Tensor  # (n, columns) int64
    lengths: list[int]
    calls: Any  # what ops.record gave
    hidden: Tensor


class Graphs:
    """model(batch, cache) for steps of one token a sequence. columns: blocks of the longest sequence there may be."""

    def __init__(self, model: Glm4Moe, cache: Cache, columns: int):
        self.model, self.cache, self.columns = model, cache, columns
        self._steps: dict[int, Recorded] = {}
        self._memory = None  # of all recordings' results, one after the other

    def serves(self, batch: Batch) -> bool:
        one_each = len(batch.tokens) == len(batch.lengths) <= MOST
        return one_each and self.model.ops.record is not None and self.model.group.size == 1

    def __call__(self, batch: Batch) -> Tensor:
        """The hidden states (n, H) of a batch that is served; valid until the next call."""
        step = self._steps.get(len(batch.lengths))
        if step is None:
            step = self._steps[len(batch.lengths)] = self._record(batch)
            return step.hidden
        x, residual, turn = self.model.enter(batch)
        for mine, new in zip(step.inputs, (x, residual, *turn, batch.slots)):
            mine.copy_(new)
        step.blocks[:, : batch.blocks.shape[1]] = batch.blocks
        step.lengths[:] = batch.lengths
        step.calls.play()
        return step.hidden

    def _record(self, batch: Batch) -> Recorded:
        x, residual, turn = self.model.enter(batch)
        blocks = torch.zeros(len(batch.lengths), self.columns, dtype=batch.blocks.dtype)
        blocks[:, : batch.blocks.shape[1]] = batch.blocks
        slots, lengths = batch.slots.clone(), list(batch.lengths)
        own = Batch(batch.tokens, batch.positions, slots, blocks, batch.rows, batch.starts, lengths)
        with self.model.ops.record(self._memory) as calls:
            hidden = self.model.through(x, residual, turn, own, self.cache)
        self._memory = calls.memory
        return Recorded((x, residual, *turn, slots), blocks, lengths, calls, hidden)
