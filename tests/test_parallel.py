"""Several processes share a model: the same tokens as one process, and clear words when it cannot be."""

import json
import os
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from glimmer.config import ModelConfig
from glimmer.errors import ConfigError
from glimmer.model.names import check_tensor_parallel, tensor_parallel_sizes
from glimmer.parallel import Group, connect, share, world

SCRIPT = str(Path(__file__).with_name("answer.py"))
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 98, "moe_intermediate_size": 30,
        "use_qk_norm": True, "vocab_size": 323}


def torchrun(processes: int, *args: str, options: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}", SCRIPT, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def answers(out: Path, processes: int) -> list[dict]:
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    """Four processes on two key-value heads, and widths and a vocabulary that four does not divide."""
    return str(checkpoint(**WIDE))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("alone") / "out"
    subprocess.run([sys.executable, SCRIPT, model, str(out)], check=True)
    return answers(out, 1)[0]


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_give_the_tokens_of_one(processes, model, alone, tmp_path):
    job = torchrun(processes, model, str(tmp_path / "out"))
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    for found in answers(tmp_path / "out", processes):
        assert found["found"] == alone["found"]
        for mine, theirs in zip(found["logprobs"], alone["logprobs"]):
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_a_dead_rank_is_named_within_ten_seconds(model, tmp_path):
    begin = time.monotonic()
    job = torchrun(2, model, str(tmp_path / "out"), "die", "1")
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "rank      : 1" in said and "exitcode  : -9" in said, said  # torchrun's own report
    assert time.monotonic() - begin < 40  # the start of two interpreters included


def test_who_never_joined_is_named(model, tmp_path):
    """Rank 0 of 2 starts, the other machine does not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLIMMER_JOIN_TIMEOUT": "2"}
    command = [sys.executable, SCRIPT, model, str(tmp_path / "out")]
    absent, unreachable = "1 of 2 processes did not join within 2 s: ranks 1", f"cannot reach 127.0.0.1:{port}"
    for rank, words in ((0, absent), (1, unreachable)):
        environment = os.environ | meeting | {"RANK": str(rank), "WORLD_SIZE": "2"}
        job = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert job.returncode == 1 and "Traceback" not in job.stderr
        assert words in job.stderr


def test_more_shares_than_processes_is_refused_with_the_command(model):
    import torch

    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        connect(2, torch.device("cpu"), "gloo")


def test_impossible_environment(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="0 <= RANK < WORLD_SIZE"):
        world()


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(model):
    config = ModelConfig.load(model)
    assert tensor_parallel_sizes(config) == [1, 2, 4, 8]
    with pytest.raises(ConfigError) as refusal:
        check_tensor_parallel(config, 3)
    assert refusal.value.expected == "one of 1, 2, 4, 8"


@pytest.mark.parametrize(("n", "size"), [(10, 3), (1, 1), (151552, 24), (1408, 16), (5, 5)])
def test_shares_cover_everything_once(n, size):
    shares = [share(n, size, rank) for rank in range(size)]
    assert shares[0][0] == 0 and shares[-1][1] == n
    assert all(a[1] == b[0] for a, b in pairwise(shares))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1


def test_a_group_of_one_does_nothing():
    import torch

    group, x = Group(), torch.ones(2, 3)
    assert group.all_reduce(x) is x and group.all_gather(x, 3) is x
    assert group.broadcast("anything") == "anything" and group.least(7) == 7 and group.split(9) == (0, 9)
