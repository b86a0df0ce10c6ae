"""Captured steps: a decoding step is the same calls on the same tensors each time, so the backend repeats them.

What Python does between two kernels of a step costs about as much as the smaller kernels themselves. The first step of
n sequences with q rows each (one, or one and a few drafts) runs as ever, while the backend captures it; the next one of
the same n and q copies its inputs to where the first had them and replays. The same arithmetic, so the same bits.
Not here: how a backend captures (backends/), steps with prompts, large batches, several ranks (collectives are not
captured).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from glimmer.backends.base import Captured, KVCache
from glimmer.batch import Batch
from glimmer.model.glm4_moe import Glm4Moe

MAX_BATCH = 64  # rows; beyond, a step's kernels are so long that the rest does not matter


@dataclass(frozen=True)
class CapturedDecode:
    """One captured step of n sequences: the tensors that it reads, and the calls."""

    inputs: tuple[Tensor, ...]  # hidden states, where the layers begin with some; cos, sin
    residual: Tensor  # zeros
    batch: Batch
    captured: Captured


class StepCapture:
    """`layers` of a model for steps in which all sequences have as many rows, at most max_query_len.

    layers: Glm4Moe.run_layers, or run_draft, which begins with hidden states. max_blocks: of the longest sequence that
    there may be.
    """

    def __init__(
        self,
        model: Glm4Moe,
        layers: Callable[..., Tensor],
        kv: Sequence[KVCache],
        max_blocks: int,
        max_query_len: int,
    ):
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

    def run(self, batch: Batch, *hidden: Tensor) -> Tensor:
        """What `layers` returns, (T, H), captured or not; valid until the next call. hidden: (T, H), or nothing."""
        if not self.serves(batch):
            return self.layers(*hidden, *self.model.start(batch), batch, self.kv)
        key = batch.num_sequences, len(batch.tokens) // batch.num_sequences
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._capture(batch, hidden)
            return step.captured.output
        for mine, new in zip(step.inputs, (*hidden, *self.model.rotary(batch.positions))):
            mine.copy_(new)
        step.batch.tokens.copy_(batch.tokens)
        step.batch.slot_mapping.copy_(batch.slot_mapping)
        step.batch.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        step.batch.seq_lens.copy_(batch.seq_lens)
        step.captured.replay()
        return step.captured.output

    def _capture(self, batch: Batch, hidden: tuple[Tensor, ...]) -> CapturedDecode:
        own, (residual, rotary) = batch.widened(self.max_blocks), self.model.start(batch)
        hidden = tuple(x.clone() for x in hidden)  # it may be another one's output
        captured = self.model.backend.capture(lambda: self.layers(*hidden, residual, rotary, own, self.kv))
        return CapturedDecode((*hidden, *rotary), residual, own, captured)
