"""Hub ids, folders of the local cache and snapshots, for everything that takes a model."""

import shutil
from pathlib import Path

import pytest

import glimmer
from glimmer.cli.main import main
from glimmer.errors import CheckpointError
from glimmer.hub import download, model_directory
from glimmer.model_config import check_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repository(tmp_path):
    """A repository with one snapshot in a cache."""
    found = tmp_path / "hub" / "models--zai-org--GLM-4.5-Air"
    (found / "snapshots" / COMMIT).mkdir(parents=True)
    (found / "refs").mkdir()
    (found / "refs" / "main").write_text(COMMIT)
    return found


@pytest.mark.parametrize("words", ["predict --model {} hi", "plan {}", "quantize {demo} {}", "prepare {demo} --out {}"])
def test_a_path_that_the_system_refuses(words, capsys):
    """A name that is too long: what is looked at, and what is written, is refused in the system's words."""
    argv = words.format("a" * 300, demo=Path(glimmer.__file__).with_name("demo")).split()
    assert main([*argv, "--quantization", "int8"] if argv[0] == "quantize" else argv) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("variable, below", [("HF_HUB_CACHE", "hub"), ("HF_HOME", ".")])
def test_an_id_is_found_in_the_cache(variable, below, repository, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / below))
    assert model_directory("zai-org/GLM-4.5-Air") == repository / "snapshots" / COMMIT
    with pytest.raises(CheckpointError, match="no such repository"):
        model_directory("zai-org/GLM-4.6")


def test_folders_of_the_cache_and_snapshots(repository):
    snapshot = repository / "snapshots" / COMMIT
    assert model_directory(repository) == model_directory(str(snapshot)) == snapshot
    (repository / "refs" / "main").unlink()
    assert model_directory(repository) == snapshot
    (repository / "snapshots" / "other").mkdir()
    with pytest.raises(CheckpointError, match="2 snapshots"):
        model_directory(repository)


def test_a_path_comes_before_an_id(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zai-org" / "GLM-4.5-Air").mkdir(parents=True)
    assert str(model_directory("zai-org/GLM-4.5-Air")) == "zai-org/GLM-4.5-Air"


@pytest.mark.parametrize("name", ["a b", "nothing", "/nowhere/at all", "./a/b", "a/b/c"])
def test_what_is_no_path_and_no_id(name):
    with pytest.raises(CheckpointError, match="does not exist"):
        check_directory(model_directory(name))


@pytest.mark.parametrize(
    "command", ["serve X", "serve X --download", "plan X", "prepare X", "doctor X", "quantize X Y"]
)
def test_every_command_says_that_a_directory_does_not_exist(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["a b" if word == "X" else word for word in command.split()]
    assert main([*words, "--quantization", "int8"] if "quantize" in words else words) == 2
    assert "model directory 'a b' does not exist" in capsys.readouterr().err


def test_commands_take_an_id(checkpoint, tmp_path, repository, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint(), repository / "snapshots" / COMMIT, dirs_exist_ok=True)
    name = "zai-org/GLM-4.5-Air"
    assert main(["doctor", name, "--device", "cpu"]) == 0
    assert main(["predict", "--model", name, "--max-tokens", "2", "--max-model-len", "32", "hi"]) == 0
    assert main(["quantize", name, str(tmp_path / "out"), "--quantization", "int8"]) == 0


@pytest.mark.parametrize(
    "below", ["models/ZhipuAI/GLM-4___5-Air", "ZhipuAI/GLM-4.5-Air", "hub/models/ZhipuAI/GLM-4.5-Air"]
)
def test_an_id_is_found_in_the_cache_of_modelscope(below, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    (tmp_path / below).mkdir(parents=True)
    (tmp_path / below / "config.json").write_text("{}")
    assert model_directory("ZhipuAI/GLM-4.5-Air") == tmp_path / below


def test_a_download_that_fails_is_an_error_of_ours(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert download(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="cannot be downloaded"):  # HF_HUB_OFFLINE is set
        download("zai-org/no-such-model")
