"""Mesh, its groups and their end, in real processes: ranks.py is what each of them runs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glimmer.errors import ConfigError
from glimmer.group import Group
from glimmer.parallel import Mesh

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("ranks.py"))
CPU = torch.device("cpu")


@pytest.fixture
def ranks():
    """ranks(size, *words, **environment) -> the running processes; whatever is left of them at the end is killed."""
    running: list[subprocess.Popen] = []

    def start(size: int, *words: str, **environment: str) -> list[subprocess.Popen]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        for rank in range(size):
            running.append(
                subprocess.Popen(
                    [sys.executable, SCRIPT, *words],
                    env=os.environ | meeting | {"RANK": str(rank), "GLIMMER_JOIN_TIMEOUT": "60"} | environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return running[-size:]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def ended(job: list[subprocess.Popen], code: int = 0) -> list[tuple[str, str]]:
    """(stdout, stderr) of processes that all end with this exit code, without a traceback."""
    said = [process.communicate(timeout=100) for process in job]
    assert [process.returncode for process in job] == [code] * len(job), said
    assert not any("Traceback" in out + err for out, err in said), said
    return said


def test_four_ranks_as_two_replicas_of_two(ranks):
    """Experts are shared over all four ranks, of which the first two have one more of the ten."""
    found = [json.loads(out) for out, _ in ended(ranks(4, "mesh", "2", "4", "2"))]
    members = {
        "world": [[0, 1, 2, 3]] * 4,
        "tp": [[0, 1], [0, 1], [2, 3], [2, 3]],
        "ep": [[0, 1, 2, 3]] * 4,
        "dp": [[0, 2], [1, 3], [0, 2], [1, 3]],
    }
    for name, expected in members.items():
        for rank, mine in enumerate(expected):
            facts = found[rank][name]
            assert facts["place"] == [mine.index(rank), len(mine), mine]
            assert facts["sum"] == sum(mine)
            tenths = torch.tensor(0.1, dtype=torch.bfloat16).float() * len(mine)
            assert facts["bfloat16"] == torch.full((2, 2), tenths.item(), dtype=torch.bfloat16).tolist()
            assert facts["columns"] == torch.arange(7.0).expand(2, 7).tolist()
            assert facts["told"] == {"from": mine[0], "text": "é" * 10} and facts["told long"] == 20000
            assert facts["told by the last"] == mine[-1]
            assert facts["least"] == mine[0] + 10
    assert [rank["ep"]["experts"] for rank in found] == [[0, 3], [3, 6], [6, 8], [8, 10]]


def test_experts_within_a_replica_and_none(ranks):
    """ep=tp shares experts within each replica; ep=1 leaves every rank a group of its own, which does nothing."""
    found = [json.loads(out) for out, _ in ended(ranks(4, "mesh", "2", "2", "2"))]
    assert [rank["ep"]["place"] for rank in found] == [[0, 2, [0, 1]], [1, 2, [0, 1]], [0, 2, [2, 3]], [1, 2, [2, 3]]]
    found = [json.loads(out) for out, _ in ended(ranks(2, "mesh", "1", "1", "2"))]
    assert [rank["dp"]["place"] for rank in found] == [[0, 2, [0, 1]], [1, 2, [0, 1]]]
    assert all(rank[name]["place"] == [0, 1, [0]] for rank in found for name in ("tp", "ep"))


def test_ranks_that_differ_are_named(ranks):
    """Every rank says the same: the first rank that differs, and both values."""
    host = socket.gethostname()
    for _, err in ended(ranks(3, "equal"), 2):
        assert err.startswith(f"settings of rank 2 on {host} is 8192, of rank 0 on {host} 4096\n")


def test_models_that_differ_are_refused_with_the_first_difference(ranks, checkpoint, tmp_path):
    """Settings, values of config.json, and files; what a machine has for itself may differ, such as the path."""
    model = checkpoint()

    def changed(name: str, file: str = "config.json", **values) -> list:
        """A copy of the model with these values in one of its JSON files."""
        directory = shutil.copytree(model, tmp_path / name)
        before = json.loads((directory / file).read_text()) if (directory / file).exists() else {}
        (directory / file).write_text(json.dumps(before | values))
        return [str(directory), {}]

    weights = changed("weights")
    with next(Path(weights[0]).glob("*.safetensors")).open("r+b") as shard:
        shard.seek(-2, os.SEEK_END)
        byte = shard.read(1)
        shard.seek(-2, os.SEEK_END)
        shard.write(bytes([byte[0] ^ 1]))
    fewer = changed("fewer")
    (Path(fewer[0]) / "chat_template.jinja").unlink()
    settings = {"dtype": "float32", "block_size": 32, "max_model_len": 64, "quantization": "int8", "max_num_seqs": 3}
    differences: dict[str, list] = {name: [str(model), {name: value}] for name, value in settings.items()}
    for name, value in (("rope_theta", 5e5), ("norm_topk_prob", False), ("routed_scaling_factor", 2.0)):
        differences[f"{name} in config.json"] = changed(name, **{name: value})
    quantized = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    differences["quantization_config.format in config.json"] = changed("quantized", quantization_config=quantized)
    differences["generation_config.json"] = changed("sampling", "generation_config.json", temperature=0.3)
    differences["tokenizer_config.json"] = changed("tokens", "tokenizer_config.json", eos_token="[MASK]")
    differences["chat_template.jinja"], differences["model-00001-of-00001.safetensors"] = fewer, weights
    copy = str(shutil.copytree(model, tmp_path / "copy"))
    equal = [copy, {"threads": 1, "max_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.5, "backend": "reference"}]
    cases = [[[str(model), {}], case] for case in [*differences.values(), equal]]
    host = socket.gethostname()
    for out, _ in ended(ranks(2, "models", json.dumps(cases))):
        found = json.loads(out)
        assert found.pop() == ""
        for name, words in zip(differences, found, strict=True):
            assert words.startswith(f"{name} of rank 1 on {host} is ") and f", of rank 0 on {host} " in words, words
    assert "rope_theta in config.json of rank 1 on" in found[5] and "is 500000.0, of rank 0" in found[5]


def test_ranks_wait_for_all(ranks):
    """A slow rank is waited for; one that never comes is named."""
    first, second = ranks(2, "late")
    out, err = first.communicate(timeout=100)
    assert (first.returncode, out) == (1, "0\n")
    assert err.startswith("rank 1 did not come within 0.5 s to where every rank has left\n")
    assert ended([second]) == [("0\n", "")]


def test_nobody_waits_for_a_rank_0_that_has_left(ranks):
    first, second = ranks(2, "left")
    assert ended([second]) == [("False\n", "")]
    assert first.communicate("go\n", timeout=30) == ("", "") and first.returncode == 0


def test_a_stopped_rank_is_named_after_the_timeout(ranks):
    """A process that is stopped keeps its connections open: only the deadline finds it."""
    others = ranks(3, "stopped", GLIMMER_COLLECTIVE_TIMEOUT="2")
    stopped = others.pop(1)
    for _, err in ended(others, 1):
        assert f"lost rank 1 on {socket.gethostname()} (" in err
    assert stopped.poll() is None


def test_an_interrupt_ends_a_rank_that_waits_and_the_others_learn_it(ranks):
    waiting, other = job = ranks(2, "interrupted")
    assert [process.stdout.readline() for process in job] == ["up\n", "up\n"]
    time.sleep(0.5)  # until rank 0 waits in its collective
    begin = time.monotonic()
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(10) == 130
    assert time.monotonic() - begin < 2.5
    _, err = other.communicate("go\n", timeout=30)
    assert other.returncode == 1 and "rank 1 on" in err and "lost" in err


@pytest.mark.parametrize(("where", "later"), [("store", 0), ("collective", 0), ("collective", 0.05)])
def test_a_rank_that_exits_while_a_thread_waits(ranks, where, later):
    """The thread comes out of its wait before the interpreter is finalised."""
    begin = time.monotonic()
    assert ended(ranks(2, "thread", where, str(later))) == [("", "")] * 2
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize("code", [0, 2])
def test_a_rank_that_never_closes_ends_with_its_own_exit_code(ranks, code):
    """A thread of gloo that frees a tensor while the interpreter is finalised would abort the process."""
    for _ in range(3):
        assert ended(ranks(2, "exit", str(code)), code) == [("", "")] * 2


@pytest.mark.parametrize(
    ("sizes", "size", "found", "expected"),
    [
        ((2, 1, 2), 3, "tensor_parallel_size=2 times data_parallel_size=2, but 3 processes running", "one process"),
        ((4, 3, 1), 4, "expert_parallel_size=3 with tensor_parallel_size=4", "one of 1, 4"),
        ((2, 3, 2), 4, "expert_parallel_size=3 with tensor_parallel_size=2, data_parallel_size=2", "one of 1, 2, 4"),
        ((0, 1, 1), 1, "tensor_parallel_size=0", "a whole number of at least 1"),
        ((1, 1, True), 1, "data_parallel_size=True", "a whole number of at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(monkeypatch, sizes, size, found, expected):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(ConfigError) as refusal:
        Mesh(*sizes, device=CPU, backend="gloo")
    assert refusal.value.found.startswith(found) and refusal.value.expected.startswith(expected)


def test_a_mesh_of_one_connects_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    mesh = Mesh(device=CPU, backend="gloo")
    assert mesh.tp == mesh.ep == mesh.dp == mesh.world == Group(device=CPU)
    mesh.tp.check_equal({"settings": "any"})
    mesh.tp.wait_for_all("has loaded", 0)
    mesh.close()
    assert not torch.distributed.is_initialized()
