"""Runner: how the memory is divided, and what is said while a model starts."""

import pytest
import torch

from glimmer import device as devices
from glimmer.config import EngineConfig, ModelConfig
from glimmer.engine.runner import Room, make_room
from glimmer.errors import NotEnoughMemory
from glimmer.parallel import Group

GIB = 1 << 30


def room(directory, weights: int = 0, **settings) -> Room:
    config, cpu = EngineConfig(model=str(directory), max_num_batched_tokens=64, **settings), torch.device("cpu")
    return make_room(config, ModelConfig.load(directory), Group(), cpu, torch.float32, weights)


def test_the_smaller_of_share_and_cap_is_divided(checkpoint, monkeypatch):
    directory = checkpoint()
    monkeypatch.setattr(devices, "free_memory", lambda device, processes: 10 * GIB)
    monkeypatch.setattr(devices, "default_cache", lambda device: None)
    room(directory, weights=4 * GIB, gpu_memory_utilization=0.5)
    with pytest.raises(NotEnoughMemory, match=r"which 5\.00 GiB may be used \(gpu_memory_utilization=0.5\)"):
        room(directory, weights=5 * GIB, gpu_memory_utilization=0.5, max_memory_bytes=9 * GIB)
    with pytest.raises(NotEnoughMemory, match=r"which 1\.00 GiB may be used \(max_memory_bytes=1073741824\)") as short:
        room(directory, weights=GIB, max_memory_bytes=GIB)
    assert short.value.todo.endswith("or raise max_memory_bytes")
    few, many = (room(directory, max_memory_bytes=n << 20, max_num_seqs=10**6).num_blocks for n in (20, 30))
    assert 0 < few < many
