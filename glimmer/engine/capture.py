"""Captured steps: a decoding step is the same calls on the same tensors each time, so the backend repeats them.

What Python does between two kernels of a step costs about as much as the smaller kernels themselves. The first step of
n sequences with one token each runs the model as ever, while the backend captures it; the next one of n copies its
inputs to where the first had them and replays. The same arithmetic, so the same bits.
Not here: how a backend captures (backends/), steps with prompts, large batches, several ranks (collectives are not
captured).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from glimmer.backends.base import Captured, KVCache
from glimmer.batch import Batch
from glimmer.model.glm4_moe import Glm4Moe

MAX_BATCH = 64  # sequences; beyond, a step's kernels are so long that the rest does not matter


@dataclass(frozen=True)
class CapturedDecode:
    """One captured step of n sequences: the tensors that it reads, and the calls."""

    inputs: tuple[Tensor, ...]  # x, residual, cos, sin
    batch: Batch
    captured: Captured


class StepCapture:
    """model.forward for steps of one token a sequence. max_blocks: of the longest sequence that there may be."""

    def __init__(self, model: Glm4Moe, kv: Sequence[KVCache], max_blocks: int):
        self.model, self.kv, self.max_blocks = model, kv, max_blocks
        self._steps: dict[int, CapturedDecode] = {}

    def serves(self, batch: Batch) -> bool:
        """Whether `forward` may be given this batch."""
        one_each = len(batch.tokens) == batch.num_sequences <= MAX_BATCH
        return one_each and self.model.backend.captures and self.model.group.size == 1

    def forward(self, batch: Batch) -> Tensor:
        """The hidden states (n, H) of a batch that is served; valid until the next call."""
        step = self._steps.get(batch.num_sequences)
        if step is None:
            step = self._steps[batch.num_sequences] = self._capture(batch)
            return step.captured.output
        x, residual, rotary = self.model.embed(batch)
        for mine, new in zip(step.inputs, (x, residual, *rotary)):
            mine.copy_(new)
        step.batch.slot_mapping.copy_(batch.slot_mapping)
        step.batch.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        step.batch.seq_lens.copy_(batch.seq_lens)
        step.captured.replay()
        return step.captured.output

    def _capture(self, batch: Batch) -> CapturedDecode:
        x, residual, rotary = self.model.embed(batch)
        own = batch.widened(self.max_blocks)
        captured = self.model.backend.capture(lambda: self.model.run_layers(x, residual, rotary, own, self.kv))
        return CapturedDecode((x, residual, *rotary), own, captured)
