"""`glimmer quantize`: what it writes is what quantising while loading makes, and it is there whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, empty_checkpoint
from safetensors.torch import load_file

from glimmer import LLM, SamplingParams
from glimmer.backends import selection
from glimmer.checkpoint.files import INDEX, Checkpoint
from glimmer.cli import demo, quantize
from glimmer.cli.main import main
from glimmer.config import EngineConfig
from glimmer.errors import CheckpointError, ConfigError
from glimmer.group import Group
from glimmer.model.load import WeightLoader, build_model
from glimmer.model_config import ModelConfig

HOW = [("int8", None), ("int4", None), ("int4", 128)]
VARIANTS = [dict(), dict(mtp="full", use_qk_norm=True), dict(fp8=True, mtp="separate_file"),
            dict(mtp="without_copies", hidden_size=128, moe_intermediate_size=44, intermediate_size=176)]  # fmt: skip


def tensors(directory: Path, **asked) -> dict[str, torch.Tensor]:
    config = ModelConfig.load(directory)
    with Checkpoint(directory) as checkpoint:
        mtp = any(name.endswith("eh_proj.weight") for name in checkpoint.names())
        model = build_model(config, checkpoint, Group(), selection.choose(selection.HOST), torch.float32, mtp)
        loader = WeightLoader(model, checkpoint, torch.float32, **asked)
        return {name: tensor.clone() for name, tensor in loader.tensors()}


def logits(directory: Path, **settings) -> list[dict]:
    llm = LLM(str(directory), dtype="float32", max_model_len=64, **settings)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=20, prompt_logprobs=20)
    (answer,) = llm.generate({"prompt_token_ids": [5, 60, 200, 7, 31, 90, 250, 3]}, params)
    llm.close()
    positions = answer.prompt_logprobs[1:] + answer.outputs[0].logprobs
    return [{token: found.logprob for token, found in position.items()} for position in positions]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind, group", HOW, ids=str)
def test_it_loads_as_what_loading_would_have_made(kind, group, variant, checkpoint, tmp_path):
    source, out = checkpoint(**variant), tmp_path / "out"
    command = ["quantize", str(source), str(out), "--quantization", kind, *(["--group-size", "128"] if group else [])]
    assert main(command) == 0
    asked = dict(quantization=kind, group_size=group)
    expected, found = tensors(source, **asked), tensors(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert logits(out) == logits(source, **asked)


@pytest.mark.parametrize("variant, quantised", [({}, "plain"), (dict(fp8=True), "FP8")], ids=str)
def test_which_matrices_become_what(variant, quantised, checkpoint, tmp_path):
    quantize.quantize(checkpoint(mtp="full", **variant), tmp_path / "out", "int4", None)
    with Checkpoint(tmp_path / "out") as found:
        kinds = {name: str(found.dtype(name)).removeprefix("torch.") for name in found.names()}
    layer = "model.layers.1.mlp.experts.0.down_proj"
    assert {f"{layer}.{end}": kinds.get(f"{layer}.{end}") for end in (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight"
    )} == {f"{layer}.weight_packed": "int32", f"{layer}.weight_scale": "bfloat16", f"{layer}.weight_shape": "int64",
           f"{layer}.weight_zero_point": "int32", f"{layer}.weight": None}  # fmt: skip
    for name in ("lm_head", "model.layers.4.shared_head.head", "model.layers.4.eh_proj"):
        assert (kinds[f"{name}.weight"], kinds[f"{name}.weight_scale"]) == ("int8", "float32")
    for name in ("model.embed_tokens", "model.layers.2.mlp.gate", "model.norm", "model.layers.4.enorm"):
        assert kinds[f"{name}.weight"] == "bfloat16" and f"{name}.weight_scale" not in kinds
    assert "model.layers.0.self_attn.o_proj.weight_packed" in kinds
    assert kinds["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"


def test_other_readers_can_read_the_files(checkpoint, tmp_path, monkeypatch):
    """Several files, with an index; read by the safetensors library; none much larger than asked."""
    monkeypatch.setattr(quantize, "SHARD", 60_000)
    out = tmp_path / "out"
    nbytes = quantize.quantize(checkpoint(mtp="full"), out, "int4", 32)
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found = {}
    for file in files:
        part = load_file(out / file)
        assert sum(t.nbytes for t in part.values()) <= 60_000 or len(part) == 1
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert sum(t.nbytes for t in found.values()) == nbytes == index["metadata"]["total_size"]
    expected = tensors(checkpoint(mtp="full"), quantization="int4", group_size=32)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_config_says_what_was_done(checkpoint, tmp_path):
    source = checkpoint()
    quantize.quantize(source, tmp_path / "out", "int8", None)
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    said = after.pop("quantization_config")
    assert after == before and said["quant_method"] == "compressed-tensors" and said["format"] == "int-quantized"
    assert said["ignore"] == ["model.embed_tokens", r"re:^model\.layers\.\d+\.mlp\.gate$"]


@pytest.mark.parametrize("settings, found", [
    (dict(quantization="fp4"), "quantization='fp4'"), (dict(quantization=8), "quantization=8"),
    (dict(quantization="int4", group_size=48), "group_size=48"),
    (dict(quantization="int4", group_size=0), "group_size=0"),
    (dict(quantization="int4", group_size=True), "group_size=True"), (dict(group_size=32), "quantization=None"),
    (dict(quantization="int8", group_size=32), "quantization='int8'"),
])  # fmt: skip
def test_settings_are_checked(settings, found):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", **settings)
    assert found in caught.value.found
    EngineConfig(model="m", quantization="int4", group_size=96)


# ---- what is refused, and what is left behind ----------------------------------------------------------------------


@pytest.mark.parametrize("arguments, found", [
    (("{model}", "{model}", "--quantization", "int8"), "exists"),
    (("{model}", "{new}", "--quantization", "int4", "--group-size", "48"), "group_size=48"),
    (("{model}", "{new}", "--quantization", "int8", "--group-size", "32"), "group_size=32"),
    (("{new}", "{new}", "--quantization", "int8"), "does not exist"),
    (("{model}", "{new}/deeper", "--quantization", "int8"), "cannot be written"),
    (("{done}", "{new}", "--quantization", "int8"), "is int4 already"),
])  # fmt: skip
def test_refused(arguments, found, checkpoint, tmp_path, capsys):
    model, done, new = tmp_path / "model", tmp_path / "done", tmp_path / "new"
    shutil.copytree(checkpoint(), model)
    quantize.quantize(model, done, "int4", None)
    before = sorted(tmp_path.rglob("*"))
    assert main(["quantize", *(a.format(model=model, done=done, new=new) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert found in err and "expected:" in err and "to do:" in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("failure, raised", [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CheckpointError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (MemoryError(), MemoryError),
])  # fmt: skip
def test_an_interruption_leaves_nothing(failure, raised, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "SHARD", 60_000)
    calls = []

    def fail(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised) as caught:
        quantize.quantize(checkpoint(), tmp_path / "out", "int8", None)
    assert len(calls) == 2 and not list(tmp_path.iterdir())
    if raised is CheckpointError:
        assert "No space left" in caught.value.found and "GB" in caught.value.expected


def test_a_full_disk_is_noticed_before_the_work(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="GB free"):
        quantize.quantize(checkpoint(), tmp_path / "out", "int8", None)
    assert not list(tmp_path.iterdir())


def test_somebody_elses_directory_is_left_alone(checkpoint, tmp_path, monkeypatch):
    """A directory of that name that appears meanwhile, and what is in it."""
    out = tmp_path / "out"

    def appear(fd: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("theirs")

    monkeypatch.setattr(os, "fsync", appear)
    with pytest.raises((CheckpointError, ConfigError), match="cannot be written"):
        quantize.quantize(checkpoint(), out, "int8", None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "theirs").read_text() == "theirs"


CHILD = """
import sys
from pathlib import Path
from glimmer.cli import quantize

def kib(key):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))

quantize.quantize(Path(sys.argv[2]), Path(sys.argv[3]), "int4", 32)  # a small one first: what everything needs
before = kib("VmHWM")
quantize.quantize(Path(sys.argv[1]), Path(sys.argv[4]), "int4", 32)
print(before, kib("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_a_few_matrices(checkpoint, tmp_path):
    config = TINY | {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 32, "vocab_size": 8000,
                     "eos_token_id": [0], "pad_token_id": 0, "num_nextn_predict_layers": 0}  # fmt: skip
    empty_checkpoint(tmp_path / "large", config, mtp=None)
    paths = [tmp_path / "large", checkpoint(), tmp_path / "small out", tmp_path / "large out"]
    child = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    before, peak = map(int, child.stdout.split())
    with Checkpoint(tmp_path / "large") as large:
        size, largest = (f(large.nbytes(name) for name in large.names()) for f in (sum, max))
    assert size > 300 << 20 and (peak - before) << 10 < 3 * largest, f"{peak - before} KiB for {size >> 10}"


def test_a_missing_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    assert main(["quantize", str(demo.MODEL), str(tmp_path / "no/out"), "--quantization", "int8"]) == 2
    assert f"there is no directory {tmp_path / 'no'}" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
