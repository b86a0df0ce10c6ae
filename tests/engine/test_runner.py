"""Runner: how the memory is divided, and what is said while a model starts."""

import json
import logging
import re
import shutil

import pytest
import torch

from glimmer import LLM
from glimmer import device as devices
from glimmer.backends import selection
from glimmer.backends.base import KVCacheSpec
from glimmer.config import EngineConfig
from glimmer.engine.runner import KVCacheConfig, make_kv_cache_config
from glimmer.errors import ConfigError, NotEnoughMemory
from glimmer.group import Group
from glimmer.model_config import ModelConfig

GIB = 1 << 30


def room(directory, weights: int = 0, **settings) -> KVCacheConfig:
    config = EngineConfig(model=str(directory), max_num_batched_tokens=64, **settings)
    model, kept = ModelConfig.load(directory), torch.int8 if config.kv_cache_dtype == "int8" else torch.float32
    spec = KVCacheSpec(model.num_hidden_layers, config.block_size, model.num_key_value_heads, model.head_dim, kept)
    backend = selection.choose(torch.device("cpu"), cache=spec)
    return make_kv_cache_config(config, model, Group(), backend, spec, weights)


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


def test_codes_leave_room_for_more_tokens(checkpoint):
    """A head of 16 numbers takes 64 bytes, or 16 and a scale; what is counted is what is there."""
    directory, asked = checkpoint(), dict(kv_cache_memory_bytes=1 << 20, max_num_seqs=10**6)
    plain, codes = (room(directory, kv_cache_dtype=dtype, **asked).num_blocks for dtype in ("auto", "int8"))
    assert plain * 64 // 20 <= codes <= (plain + 1) * 64 // 20
    for dtype, blocks in (("auto", plain), ("int8", codes)):
        llm = LLM(str(directory), dtype="float32", max_model_len=64, kv_cache_dtype=dtype, device="cpu", **asked)
        layers = llm._runner.kv
        taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert len(layers) == llm.model_config.num_hidden_layers
        assert all(layer.num_blocks == blocks for layer in layers) and 0.9 * 2**20 < taken <= 2**20
        llm.close()


def test_one_line_says_who_serves_each_door(checkpoint, caplog):
    caplog.set_level(logging.INFO, "glimmer")
    LLM(str(checkpoint()), max_model_len=64, max_num_seqs=1)
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("operations: ")]
    table = selection.choose(devices.resolve("auto", 0)).table()
    said = {
        op: backend
        for part in line.removeprefix("operations: ").split("; ")
        for ops, _, backend in [part.partition(" by ")]
        for op in ops.split(", ")
    }
    assert said == dict(table) and line.count(" by ") == len({backend for _, backend in table})


def test_a_format_that_we_cannot_read_is_named_before_its_files_are_opened(checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint(), tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ConfigError, match="gptq"):
        LLM(str(directory), max_model_len=64)


@pytest.mark.parametrize("setting, found", [({"backend": "tpu"}, "backend='tpu'"), ({}, "GLIMMER_BACKEND='tpu'")])
def test_a_backend_that_is_not_here_is_refused_before_anything_is_loaded(setting, found, checkpoint, monkeypatch):
    monkeypatch.setenv("GLIMMER_BACKEND", "tpu")
    with pytest.raises(ConfigError, match=re.escape(found)) as refused:
        LLM(str(checkpoint()), max_model_len=64, device="cpu", **setting)
    assert "'reference'" in refused.value.expected


def test_a_backend_is_chosen_by_name(checkpoint, monkeypatch):
    monkeypatch.setenv("GLIMMER_BACKEND", "tpu")  # which a setting overrules
    llm = LLM(str(checkpoint()), max_model_len=64, device="cpu", backend="reference")
    assert llm.kernels is None and {who for _, who in llm._runner.backend.table()} == {"reference"}
