"""Draft chains: guesses of the MTP layer that follow from each other, as one computation.

A guess is the likeliest token after a row; the layer's next row pairs that token with the row's own hidden state. All
else that the rows read is known before the first guess, so no Python is needed between two guesses: where the backend
captures, a chain of the same length for as many sequences is repeated, as a step is (capture.py).
Not here: which rows there are (draft.py), and rows of the layer whose tokens are known (runner.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glimmer.backends.base import Captured, KVCache
from glimmer.batch import Batch
from glimmer.engine.capture import MAX_BATCH
from glimmer.model.glm4_moe import Glm4Moe


class Chain:
    """The tensors of a chain of q rows for each of S sequences.

    hidden     (S, H)       the MTP hidden states that it begins with
    tokens     (q + 1, S)   the guesses: of those hidden states, and of each row after them
    positions  (q, S)       of the rows; slot_mapping and seq_lens likewise, as in Batch
    cos, sin   (q, S, R/2)  their rotary angles
    """

    def __init__(self, model: Glm4Moe, hidden: Tensor, batch: Batch | None, columns: int):
        """For what `fill` is given, and other chains of as many rows; block tables have up to `columns` columns."""
        (count, _), device = hidden.shape, hidden.device
        self.model, self.rows = model, 0 if batch is None else len(batch.tokens) // count
        self.hidden, self.residual = torch.empty_like(hidden), torch.zeros_like(hidden, dtype=model.residual_dtype)
        self.tokens = torch.zeros(self.rows + 1, count, dtype=torch.int64, device=device)
        self.positions, self.slot_mapping = torch.zeros_like(self.tokens[1:]), torch.zeros_like(self.tokens[1:])
        self.block_tables = self.tokens.new_zeros(count, columns)
        self.seq_lens_cpu = torch.zeros(self.rows, count, dtype=torch.int64)
        self.seq_lens = self.seq_lens_cpu.to(device)  # the same tensor where that is the host
        self.cos, self.sin = (x.view(self.rows, count, x.shape[1]) for x in model.rotary(self.positions.flatten()))
        query_start_loc = torch.arange(count + 1)
        there = query_start_loc.to(device)
        self.batches = [
            Batch(
                tokens=self.tokens[i],
                positions=self.positions[i],
                slot_mapping=self.slot_mapping[i],
                block_tables=self.block_tables,
                logits_indices=there[:0],
                query_start_loc=there,
                seq_lens=self.seq_lens[i],
                query_start_loc_cpu=query_start_loc,
                seq_lens_cpu=self.seq_lens_cpu[i],
            )
            for i in range(self.rows)
        ]
        self._later = torch.arange(self.rows - 1, -1, -1)[:, None]  # rows of the same sequence after each
        self.fill(hidden, batch)

    def fill(self, hidden: Tensor, batch: Batch | None) -> None:
        """Another chain: hidden (S, H), and the rows, q of each sequence, as a batch whose tokens are not known; None
        if there are none."""
        count = len(hidden)
        self.hidden.copy_(hidden)
        if batch is None:
            return
        self.positions.copy_(batch.positions.view(count, self.rows).t())
        self.slot_mapping.copy_(batch.slot_mapping.view(count, self.rows).t())
        self.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        torch.sub(batch.seq_lens_cpu, self._later, out=self.seq_lens_cpu)
        if self.seq_lens is not self.seq_lens_cpu:
            self.seq_lens.copy_(self.seq_lens_cpu)
        for own, new in zip((self.cos, self.sin), self.model.rotary(self.positions.flatten())):
            own.copy_(new.view_as(own))


class DraftChains:
    """The chains of a model. max_blocks: of the longest sequence that there may be."""

    def __init__(self, model: Glm4Moe, kv: Sequence[KVCache], max_blocks: int):
        self.model, self.kv, self.max_blocks = model, kv, max_blocks
        self._captured: dict[tuple[int, int, int], tuple[Chain, Captured]] = {}

    def run(self, hidden: Tensor, batch: Batch | None, vocab_size: int) -> Tensor:
        """The guesses (q + 1, S), ids below vocab_size, valid until the next call; see Chain.fill."""
        model, count = self.model, len(hidden)
        rows, columns = (0, 0) if batch is None else (len(batch.tokens), batch.block_tables.shape[1])
        if not model.backend.captures or model.group.size > 1 or count > MAX_BATCH:
            return self._compute(Chain(model, hidden, batch, columns), vocab_size)
        key = count, rows, vocab_size
        if key in self._captured:
            chain, captured = self._captured[key]
            chain.fill(hidden, batch)
            captured.replay()
        else:
            chain = Chain(model, hidden, batch, self.max_blocks)
            captured = model.backend.capture(lambda: self._compute(chain, vocab_size))
            self._captured[key] = chain, captured
        return captured.output

    def _compute(self, chain: Chain, vocab_size: int) -> Tensor:
        """The guesses. Ops and collectives only."""
        hidden = chain.hidden
        for i, batch in enumerate(chain.batches):
            self._guess(chain.tokens[i], hidden, vocab_size)
            rotary = chain.cos[i], chain.sin[i]
            hidden = self.model.run_draft(hidden, chain.residual, rotary, batch, self.kv)
        self._guess(chain.tokens[-1], hidden, vocab_size)
        return chain.tokens

    def _guess(self, tokens: Tensor, hidden: Tensor, vocab_size: int) -> None:
        """tokens (S,) = the likeliest below vocab_size after each row (S, H)."""
        self.model.backend.argmax_(tokens, self.model.draft_logits(hidden)[:, :vocab_size])
