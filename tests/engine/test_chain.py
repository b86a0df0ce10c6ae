"""A chain of drafts is what the MTP layer gives row by row, captured or not: the same guesses, the same cache."""

import pytest
import torch

from glimmer.batch import Batch
from glimmer.engine.runner import Runner

SIZE = 16  # of a block


def batch_of(tokens: list[int], starts: list[int], rows: int, tables: list[list[int]]) -> Batch:
    """`rows` rows of each sequence from its start on, each of the tokens of one sequence after the other."""
    positions = [start + i for start in starts for i in range(rows)]
    blocks = [table[(start + i) // SIZE] for start, table in zip(starts, tables) for i in range(rows)]
    slots = [block * SIZE + position % SIZE for block, position in zip(blocks, positions)]
    lengths = [start + rows for start in starts]
    return Batch.of(tokens, positions, slots, tables, [], [rows] * len(starts), lengths)


def row_by_row(runner: Runner, hidden: torch.Tensor, starts: list[int], rows: int, tables: list, vocab: int) -> list:
    """What `draft_chain` is defined to give."""
    guesses = [runner.model.draft_logits(hidden)[:, :vocab].argmax(-1).tolist()]
    for i in range(rows):
        hidden = runner.draft(hidden, batch_of(guesses[-1], [start + i for start in starts], 1, tables))
        guesses.append(runner.model.draft_logits(hidden)[:, :vocab].argmax(-1).tolist())
    return [list(one) for one in zip(*guesses)]


@pytest.mark.parametrize("captures", [True, False])
def test_a_chain_is_what_one_row_after_the_other_gives(captures, checkpoint, engine, monkeypatch):
    llm = engine(checkpoint(mtp="full"), speculative_config="mtp", max_model_len=64)
    runner, width = llm._runner, llm.model_config.hidden_size
    monkeypatch.setattr(runner.backend, "captures", captures and runner.backend.captures, raising=False)
    source = torch.Generator().manual_seed(1)
    for vocab in (llm.model_config.vocab_size, 20):
        for starts in ([5], [15, 3, 14]):
            lower, upper = ([[base + 2 * i, base + 2 * i + 1] for i in range(len(starts))] for base in (0, 8))
            for rows in (0, 1, 4, 4):  # the last one is repeated, where steps are captured
                with torch.inference_mode(), runner.running():
                    before = torch.randn(sum(starts), width, generator=source)
                    last = torch.randn(len(starts), width, generator=source)
                    for tables in (lower, upper):  # what the cache holds before the chain
                        begin = 0
                        for start, table in zip(starts, tables):
                            rest = batch_of(list(range(start)), [0], start, [table])
                            runner.draft(before[begin : begin + start], rest)
                            begin += start
                    expected = row_by_row(runner, last, starts, rows, lower, vocab)
                    unknown = batch_of([0] * rows * len(starts), starts, rows, upper) if rows else None
                    assert runner.draft_chain(last, unknown, vocab) == expected
                    assert all(token < vocab for guesses in expected for token in guesses)
                    held = [
                        runner.export_blocks([block for table in both for block in table]) for both in (lower, upper)
                    ]
                    assert torch.equal(*held)
