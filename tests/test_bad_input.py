"""What bad input gets: one clear error in three parts, exit code 2 and no traceback. Each case as a user would meet it.

Most run the command in this process; one starts a real one. What a refusal says about one row of many (a prompt too
long, NaN in the logits) stands in that row, and the other rows are answered.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import empty_checkpoint, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from glimmer import LLM, SamplingParams
from glimmer.checkpoint.files import INDEX
from glimmer.cli.main import main
from glimmer.errors import EngineError

SMALL = ("--max-model-len", "64", "--max-num-seqs", "4", "--max-tokens", "4", "--temperature", "0")


@pytest.fixture
def directory(checkpoint, tmp_path) -> Path:
    """A checkpoint in two files with an index, to be spoilt."""
    return shutil.copytree(checkpoint(shards=2), tmp_path / "model")


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path) -> Callable[..., str]:
    """refused(*argv) -> the message of `glimmer predict` with these arguments, in three parts."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*argv: str) -> str:
        capsys.readouterr()
        code = main(["predict", *map(str, argv), *SMALL, "a prompt"])
        out, err = capsys.readouterr()
        assert code == 2, f"exit code {code}, {err}"
        assert out == "" and "Traceback" not in err
        parts = re.search(r"^glimmer predict: (.+)\n  expected: (.+)\n  to do:    (.+)", err, re.M)
        assert parts is not None and min(map(len, parts.groups())) > 4, err
        assert not list(work.iterdir()), "nothing is written"
        return err

    return run


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def spoil(directory: Path, change: Callable[[dict[str, Tensor]], object], name: str) -> None:
    """Rewrite the file that holds tensor `name`, after change(its tensors)."""
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# ---- the directory -------------------------------------------------------------------------------------------------


def test_directory_missing(refused, tmp_path):
    assert "'" + str(tmp_path / "nowhere") + "' does not exist" in refused("--model", tmp_path / "nowhere")


def test_a_file_for_a_directory(refused, directory):
    assert "is a file" in refused("--model", directory / "config.json")


def test_not_a_model(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "config.json does not exist" in refused("--model", tmp_path / "photos")


@pytest.mark.parametrize("suffix", ["bin", "gguf"])
def test_weights_in_another_container(suffix, refused, directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    (directory / f"model.{suffix}").write_bytes(b"x" * 100)
    message = refused("--model", directory)
    assert "no *.safetensors files" in message and f"*.{suffix}" in message


def test_another_architecture(refused, directory):
    edit(directory / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    message = refused("--model", directory)
    assert "LlamaForCausalLM" in message and "Glm4MoeForCausalLM" in message


@pytest.mark.parametrize(
    "config, word",
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "exllama"}, "'exllama'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits = 3"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "[64, 64]"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_quantisation_is_named(config, word, refused, directory):
    edit(directory / "config.json", quantization_config=config)
    message = refused("--model", directory)
    assert word in message and "quantization_config" in message and "-FP8" in message


# ---- configuration and tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_key_value_heads=None), "no 'num_key_value_heads'"),
        (dict(hidden_size="large"), "hidden_size='large'"),
        (dict(num_experts_per_tok=99), "num_experts_per_tok=99"),
        (dict(rope_scaling={"type": "yarn"}), "no 'factor'"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope_type='linear'"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ],
)
def test_configuration_key_missing_or_impossible(changes, words, refused, directory):
    edit(directory / "config.json", **changes)
    assert words in refused("--model", directory)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX]
)
@pytest.mark.parametrize("content", ["", '{"half": ', "\x00\x01", "[1, 2]"], ids=["empty", "cut", "binary", "list"])
def test_broken_json(name, content, refused, directory):
    (directory / name).write_text(content)
    assert name in refused("--model", directory)


def test_no_tokenizer(refused, directory):
    (directory / "tokenizer.json").unlink()
    assert "tokenizer.json does not exist" in refused("--model", directory)


def test_a_tokenizer_of_another_model(refused, directory, tmp_path):
    write_tokenizer(directory, vocab_extra=100)
    message = refused("--model", directory)
    assert "ids up to 391" in message and "vocab_size is 320" in message


def test_impossible_generation_defaults(refused, directory):
    edit(directory / "generation_config.json", top_p=7)
    assert "top_p=7" in refused("--model", directory)


def test_chat_without_a_template(refused, directory):
    (directory / "chat_template.jinja").unlink()
    assert "no chat template" in refused("--model", directory, "--chat")


def test_chat_with_a_broken_template(refused, directory):
    (directory / "chat_template.jinja").write_text("{% for m in messages %}")
    assert "chat_template.jinja" in refused("--model", directory, "--chat")


# ---- files of weights ----------------------------------------------------------------------------------------------

FIRST = "model-00001-of-00002.safetensors"


def test_index_names_a_missing_file(refused, directory):
    (directory / "model-00002-of-00002.safetensors").unlink()
    message = refused("--model", directory)
    assert "model-00002-of-00002.safetensors" in message and "1 of the 2 files" in message


def test_index_names_a_missing_tensor(refused, directory):
    """The index explains what is missing."""
    first = load_file(directory / FIRST)
    del first["model.layers.1.self_attn.o_proj.weight"]
    save_file(first, directory / FIRST)
    assert "'model.layers.1.self_attn.o_proj.weight' not in" in refused("--model", directory)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda data: data[:-1000], "cut short"),
        (lambda data: data[:500], "ends within its header"),
        (lambda data: data[:3], "ends within its header"),
        (lambda data: b"", "ends within its header"),
        (lambda data: data + b"rest", "4 bytes too many"),
        (lambda data: data[:8] + b"[" + data[9:], "no readable JSON"),
        (lambda data: data[:8] + bytes(len(data) - 8), "no readable JSON"),
        (lambda data: b"\xff" * 8 + data[8:], "claims a header"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        (lambda data: b"<html>404 Not Found</html>", "header"),
    ],
    ids=[
        "cut",
        "cut in the header",
        "cut in the size",
        "empty",
        "too long",
        "no JSON",
        "zeros",
        "huge header",
        "pointer",
        "web page",
    ],
)
def test_truncated_or_corrupt_file(change, words, refused, directory):
    (directory / FIRST).write_bytes(change((directory / FIRST).read_bytes()))
    message = refused("--model", directory)
    assert FIRST in message and words in message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.update({"model.norm.bias": torch.zeros(64)}), "superfluous"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), "[63], config.json says [64]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}), "int32"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(320, 64, dtype=torch.int8)}), "int8"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}), "lm_head.weight_scale"),
    ],
    ids=["missing", "superfluous", "misshapen", "integers", "int8", "fp8 without scales"],
)
def test_tensors_that_are_not_the_model_s(change, words, refused, directory):
    spoil(directory, change, "model.norm.weight")
    message = refused("--model", directory)
    assert words in message and ("model.norm" in message or "lm_head" in message)


def test_fp8_scales_that_are_no_numbers(refused, checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint(fp8=True), tmp_path / "model")
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    spoil(directory, lambda tensors: tensors[name].fill_(float("nan")), name)
    assert name in refused("--model", directory)


# ---- memory and machine --------------------------------------------------------------------------------------------

AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "torch_dtype": "bfloat16",
}


@pytest.mark.slow
def test_not_enough_memory_for_the_weights(refused, tmp_path):
    """All of GLM-4.5-Air, in true headers: refused from these alone, within seconds, with both figures."""
    directory = empty_checkpoint(tmp_path / "air", AIR)
    write_tokenizer(directory)
    begin = time.process_time()
    message = refused("--model", directory, "--gpu-memory-utilization", "0.001")  # too little on any machine
    assert time.process_time() - begin < 5
    assert "199.07 GiB for weights" in message and "GiB free" in message and "nothing has been loaded" in message


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit no address space")
def test_a_limit_of_address_space_is_called_that(tmp_path):
    """Too small for torch, for the tokenizer, for the weights: never a damaged download, never a traceback."""
    directory = empty_checkpoint(
        tmp_path / "part", AIR | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, mtp=None
    )
    write_tokenizer(directory)
    for kib in (300_000, 600_000, 900_000, 1_400_000):
        command = f'ulimit -v {kib}; exec "$0" -m glimmer predict --model "$1" hi'
        child = subprocess.run(
            ["sh", "-c", command, sys.executable, directory], capture_output=True, text=True, timeout=120
        )
        assert child.returncode == 2, child.stderr
        assert "ulimit -v" in child.stderr and "expected:" in child.stderr and "to do:" in child.stderr
        assert "download" not in child.stderr and "Traceback" not in child.stderr


def test_not_enough_memory_for_the_cache(refused, directory):
    message = refused("--model", directory, "--kv-cache-memory-bytes", "900TB")
    assert "GiB for the KV cache" in message and "GiB free" in message


def test_a_cache_too_small_for_the_context(refused, directory):
    message = refused("--model", directory, "--kv-cache-memory-bytes", "9000")
    assert "kv_cache_memory_bytes=9000 for a context of 64 tokens" in message


def test_a_context_longer_than_the_model_s(capsys, directory):
    assert main(["predict", "--model", str(directory), "--max-model-len", "5000", "x"]) == 2
    assert "max_model_len=5000" in capsys.readouterr().err


def test_more_processes_than_there_are(refused, directory):
    assert "torchrun" in refused("--model", directory, "--tensor-parallel-size", "2")


@pytest.mark.parametrize("device", ["cuda", "npu", "tpu"])
def test_a_device_that_is_not_here(device, refused, directory):
    if device in ("cuda", "npu") and getattr(getattr(torch, device, None), "is_available", bool)():
        pytest.skip(f"this machine has {device}")
    message = refused("--model", directory, "--device", device)
    assert device in message and "cpu" in message


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(capsys, monkeypatch, tmp_path) -> Callable[..., tuple[int, list[dict]]]:
    """rows(directory, prompts...) -> exit code, and the rows of the output file in the prompts' order."""
    monkeypatch.chdir(tmp_path)

    def run(directory: Path, *prompts: str) -> tuple[int, list[dict]]:
        code = main(["predict", "--model", str(directory), *SMALL, "--output", "rows.jsonl", *prompts])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert len(found) == len(prompts)
        assert code == 0 or all(row["error"] is None or row["error"].splitlines()[0] in err for row in found)
        return code, sorted(found, key=lambda row: row["index"])

    return run


def test_prompts_too_long_and_empty(rows, checkpoint):
    code, found = rows(checkpoint(), "fine", "long " * 30, " ", "fine")
    assert code == 2
    assert [row["error"] is None for row in found] == [True, False, False, True]
    assert "a prompt of 150 tokens" in found[1]["error"] and "empty" in found[2]["error"]
    assert found[0]["text"] == found[3]["text"] and found[0]["text"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_spoil_only_the_answers_they_touch(value, rows, directory):
    """One token's embedding is broken: who uses it is told so, who does not gets what anyone would."""
    whole = LLM(str(directory), max_model_len=64, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=4, logit_bias={ord("x"): -1e6})
    expected = [o.outputs[0].token_ids for o in whole.generate(["good", "fine"], params)]
    spoil(directory, lambda t: t["model.embed_tokens.weight"][ord("x")].fill_(value), "model.embed_tokens.weight")
    llm = LLM(str(directory), max_model_len=64, max_num_seqs=4)
    for _ in range(2):
        good, bad, fine = llm.generate(["good", "an x in it", "fine"], params)
        assert [good.outputs[0].token_ids, fine.outputs[0].token_ids] == expected
        assert good.error is None and fine.outputs[0].finish_reason == "length"
        assert bad.outputs[0].finish_reason == "error" and bad.outputs[0].token_ids == []
        assert isinstance(bad.error, EngineError) and "NaN or infinity" in bad.error.found
    with pytest.raises(EngineError, match="NaN or infinity"):
        list(llm.stream("an x in it", params))
    again = llm.generate("an x in it", SamplingParams(temperature=0, prompt_logprobs=1))[0]
    assert again.outputs[0].finish_reason == "error" and again.prompt_logprobs[0] is None

    code, found = rows(directory, "good", "an x in it")
    assert code == 2 and "NaN or infinity" in found[1]["error"] and found[0]["error"] is None
    assert found[1]["finish_reason"] == "error"


def test_broken_weights_in_the_head(rows, directory):
    """Nothing can be answered: every row says so."""
    spoil(directory, lambda t: t["lm_head.weight"][300, 3].fill_(float("nan")), "lm_head.weight")
    code, found = rows(directory, "one", "two")
    assert code == 2 and all("NaN or infinity" in row["error"] for row in found)


# ---- real processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exit_code_and_streams_of_a_real_process(tmp_path):
    command = [sys.executable, "-m", "glimmer", "predict", "--model", "/nowhere/at all", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-3:] == [
        "glimmer predict: model directory '/nowhere/at all' does not exist",
        "  expected: a Hugging Face model directory (config.json, tokenizer.json, *.safetensors)",
        "  to do:    check the path; glimmer downloads nothing by itself",
    ]


@pytest.mark.parametrize("argv", [["fly"], ["predict", "--fly"], ["bench", "/nowhere"]], ids=" ".join)
def test_commands_that_make_no_sense(argv, capsys):
    try:
        code = main(argv)
    except SystemExit as leaving:  # argparse's own way
        code = leaving.code
    assert code == 2 and capsys.readouterr().err
