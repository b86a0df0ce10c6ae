"""A scripted model: it stores each token in the slot that the batch names, and "predicts" a hash of all the tokens that
the block table then shows it. Any lost, shared or overwritten slot changes the prediction."""

from contextlib import nullcontext
from hashlib import blake2b

import torch

from glimmer.backends.reference import Reference
from glimmer.config import EngineConfig
from glimmer.engine.engine import Engine
from glimmer.engine.runner import KVCacheConfig, Runner
from glimmer.group import Group

VOCABULARY = 50


class ScriptedRunner:
    """In place of Runner. `batch` is the real one; the cache holds token ids instead of keys and values."""

    batch = Runner.batch
    device = torch.device("cpu")

    def __init__(self, num_blocks: int, block_size: int, max_model_len: int):
        self.kv_cache_config = KVCacheConfig(num_blocks, max_model_len)
        self.block_size = block_size
        self.slots = [-1] * (num_blocks * block_size)
        self.steps, self.rows = 0, 0

    kv_identity = "scripted"

    @property
    def kv_block_bytes(self) -> int:
        return 4 * self.block_size

    def export_blocks(self, blocks):
        size = self.block_size
        held = torch.tensor([self.slots[block * size : (block + 1) * size] for block in blocks], dtype=torch.int32)
        return held.view(torch.uint8)

    def import_blocks(self, blocks, data):
        size = self.block_size
        for block, row in zip(blocks, data.view(torch.int32).view(len(blocks), size).tolist()):
            self.slots[block * size : (block + 1) * size] = row

    def checksum(self, data):
        return blake2b(data, digest_size=32).digest()

    def forbid(self, logits, allowed):
        Reference(self.device).forbid_(logits, allowed)

    def running(self):
        return nullcontext()

    def forward(self, batch):
        self.steps += 1
        self.rows = max(self.rows, len(batch.tokens))
        assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping), "two tokens in one slot"
        for token, slot in zip(batch.tokens.tolist(), batch.slot_mapping.tolist()):
            self.slots[slot] = token
        wanted, logits = set(batch.logits_indices.tolist()), []
        for s, length in enumerate(batch.seq_lens.tolist()):
            table = batch.block_tables[s].tolist()
            size = self.block_size
            history = [self.slots[table[p // size] * size + p % size] for p in range(length)]
            first, last = batch.query_start_loc[s : s + 2].tolist()
            assert batch.positions[first:last].tolist() == list(range(length - (last - first), length))
            logits += [row_for(history[: length - last + r + 1]) for r in range(first, last) if r in wanted]
        return torch.tensor(batch.tokens[:, None].tolist()), torch.tensor(logits) if logits else None


def next_token(history) -> int:
    """What the scripted model says after `history`."""
    return blake2b(repr(list(history)).encode(), digest_size=4).digest()[0] % VOCABULARY


def row_for(history) -> list[float]:
    """Logits with the scripted token on top and all others in a fixed order."""
    token = next_token(history)
    return [10.0 if i == token else -float(i) / VOCABULARY for i in range(VOCABULARY)]


def scripted_engine(num_blocks=64, block_size=4, max_model_len=64, **settings) -> Engine:
    """An Engine over the scripted model."""
    config = EngineConfig(model="scripted", block_size=block_size, **settings)
    return Engine(config, ScriptedRunner(num_blocks, block_size, max_model_len), Group(), VOCABULARY, VOCABULARY)
