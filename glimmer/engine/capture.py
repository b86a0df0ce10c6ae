"""Captured steps: a decoding step is the same calls on the same tensors each time, so the backend repeats them.

What Python does between two kernels of a step costs about as much as the smaller kernels themselves. The first step of
n sequences with q rows each (one, or one and a few drafts) runs as ever, while the backend captures it; the next one of
the same n and q copies its inputs to where the first had them and replays. The same arithmetic, so the same bits.
Not here: how a backend captures (backends/), steps with prompts, large batches, several ranks (collectives are not
captured).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from glimmer.backends.base import Captured, KVCache
from glimmer.batch import Batch
from glimmer.model.glm4_moe import Glm4Moe, Rotary

MAX_BATCH = 64  # rows; beyond, a step's kernels are so long that the rest does not matter

Inputs = tuple[Tensor, Tensor, Rotary]  # x, residual, and the rotary angles


class Layers(Protocol):
    """Layers of the model that are captured: Glm4Moe.run_layers or Glm4Moe.run_draft."""

    def __call__(self, x: Tensor, residual: Tensor, rotary: Rotary, batch: Batch, kv: Sequence[KVCache]) -> Tensor: ...


@dataclass(frozen=True)
class CapturedDecode:
    """One captured step of n sequences: the tensors that it reads, and the calls."""

    inputs: tuple[Tensor, ...]  # x, residual, cos, sin
    batch: Batch
    captured: Captured


class StepCapture:
    """`layers` of a model for steps in which all sequences have as many rows, at most max_query_len.

    max_blocks: of the longest sequence that there may be.
    """

    def __init__(self, model: Glm4Moe, layers: Layers, kv: Sequence[KVCache], max_blocks: int, max_query_len: int):
        self.model, self.layers, self.kv = model, layers, kv
        self.max_blocks, self.max_query_len = max_blocks, max_query_len
        self._steps: dict[tuple[int, int], CapturedDecode] = {}  # by (sequences, rows of each)

    def serves(self, batch: Batch) -> bool:
        """Whether a step with this batch is captured."""
        if not self.model.backend.captures or self.model.group.size > 1 or len(batch.tokens) > MAX_BATCH:
            return False
        rows = len(batch.tokens) // batch.num_sequences
        if rows > self.max_query_len:
            return False
        if rows == 1 or batch.num_sequences == 1:
            return len(batch.tokens) == rows * batch.num_sequences
        query_start_loc = batch.query_start_loc_cpu.tolist()
        return query_start_loc == list(range(0, rows * batch.num_sequences + 1, rows)) and query_start_loc[-1] == len(
            batch.tokens
        )

    def run(self, inputs: Inputs, batch: Batch) -> Tensor:
        """What `layers` returns, (T, H), captured or not; valid until the next call."""
        if not self.serves(batch):
            return self.layers(*inputs, batch, self.kv)
        x, residual, rotary = inputs
        key = batch.num_sequences, len(batch.tokens) // batch.num_sequences
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._capture(x, residual, rotary, batch)
            return step.captured.output
        for mine, new in zip(step.inputs, (x, residual, *rotary)):
            mine.copy_(new)
        step.batch.tokens.copy_(batch.tokens)
        step.batch.slot_mapping.copy_(batch.slot_mapping)
        step.batch.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        step.batch.seq_lens.copy_(batch.seq_lens)
        step.captured.replay()
        return step.captured.output

    def _capture(self, x: Tensor, residual: Tensor, rotary: Rotary, batch: Batch) -> CapturedDecode:
        own, x, residual = batch.widened(self.max_blocks), x.clone(), residual.clone()  # x may be another one's output
        captured = self.model.backend.capture(lambda: self.layers(x, residual, rotary, own, self.kv))
        return CapturedDecode((x, residual, *rotary), own, captured)
