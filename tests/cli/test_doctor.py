"""`glimmer doctor` names what will serve: the same as the engine would choose."""

import json
import shutil

import pytest
import torch

from glimmer.backends.selection import choose
from glimmer.cli import doctor
from glimmer.cli.main import main


@pytest.mark.parametrize("only", ["", "reference"])
def test_findings(capsys, monkeypatch, only):
    monkeypatch.setenv("GLIMMER_BACKEND", only)
    assert doctor.main(["--device", "cpu"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("op "))
    ops = choose(torch.device("cpu"))
    assert rows["kernels"] == (ops.kernels or "none of our own")
    assert int(rows["threads"].split()[0]) >= 1 and rows["device"].startswith("cpu")
    if ops.kernels is not None:
        used, _, could = ops.kernels.partition(" (of ")
        assert used == could.rstrip(")").split(", ")[-1], "the best that this processor can"


def test_every_op_is_listed(capsys):
    doctor.main(["--device", "cpu"])
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if line.startswith("op ")] == [
        ["op", op, backend] for op, backend in choose(torch.device("cpu")).table()
    ]


def test_a_block_size_that_plain_torch_serves_is_said(capsys):
    assert doctor.main(["--device", "cpu", "--block-size", "5"]) == 0
    assert {"op attention", "op store_kv_"} == {
        line.rsplit(None, 1)[0].rstrip()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("op attention", "op store_kv_")) and line.endswith(" reference")
    }


def test_a_backend_that_is_not_here_is_refused(capsys):
    assert main(["doctor", "--device", "cpu", "--backend", "tpu"]) == 2
    assert "backend='tpu'" in capsys.readouterr().err


def test_a_model_and_what_ends_its_answers(capsys, checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint(), tmp_path / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": 7, "top_p": 0.9}')
    tokens = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens | {"eos_token": {"content": "</think>"}}))
    assert main(["doctor", str(directory), "--device", "cpu"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("op "))
    names = [each.split()[1] for each in rows["eos"].split(", ")]
    assert rows["eos"].startswith("7 ") and names[1:] == ["<|endoftext|>", "<|user|>", "<|observation|>", "</think>"]
    assert rows["context"] == "4096 tokens" and rows["sampling"] == "top_p 0.9"


def test_a_model_that_is_not_there(capsys):
    assert main(["doctor", "/nowhere/at all"]) == 2
    assert "does not exist" in capsys.readouterr().err
