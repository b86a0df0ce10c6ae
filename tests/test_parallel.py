"""Several processes share a model: the same tokens as one process, and clear words when it cannot be."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from jobs import processes_in, until
from torch.distributed import HashStore, TCPStore

from glimmer.errors import ConfigError, EngineError
from glimmer.group import Group, share
from glimmer.model.names import check_tensor_parallel, tensor_parallel_sizes
from glimmer.model_config import ModelConfig
from glimmer.parallel import connect, local_rank, lost_peer, world

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("answer.py"))
WIDE = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 98,
    "moe_intermediate_size": 30,
    "use_qk_norm": True,
    "vocab_size": 323,
}


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


def test_a_silent_listener_does_not_defeat_the_timeout(model, tmp_path):
    """Something else listens at the meeting point: it takes the connection and says nothing. Ctrl-C ends the wait."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]), "WORLD_SIZE": "2"}
        jobs = [
            subprocess.Popen(
                [sys.executable, SCRIPT, model, str(tmp_path / "out")],
                env=os.environ | meeting | {"RANK": "1", "GLIMMER_JOIN_TIMEOUT": timeout},
                stderr=subprocess.PIPE,
                text=True,
            )
            for timeout in ("3", "60")
        ]
        _, said = jobs[0].communicate(timeout=40)
        assert jobs[0].returncode == 1 and "cannot reach 127.0.0.1" in said and "Traceback" not in said
        begin = time.monotonic()
        jobs[1].send_signal(signal.SIGINT)
        jobs[1].communicate(timeout=20)
        assert time.monotonic() - begin < 6  # the end of an interpreter with torch included, on a busy machine


def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path):
    """torchrun leaves its processes running; ours see that their parent is gone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("ranks.py")), "interrupted"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    job = subprocess.Popen(command, cwd=tmp_path, **pipes)
    assert [job.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
    assert len(processes_in(tmp_path)) == 3
    job.kill()
    until(lambda: processes_in(tmp_path) == [], 4)
    job.communicate(timeout=10)


STORE = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
print(store.port, flush=True)
while not store.check([sys.argv[1]]):
    time.sleep(0.02)
"""


@pytest.fixture
def meeting(monkeypatch):
    """meeting(key) -> a process that holds the meeting point of two ranks until somebody has written `key`."""
    opened = []

    def open_(key: str) -> subprocess.Popen:
        opened.append(subprocess.Popen([sys.executable, "-c", STORE, key], stdout=subprocess.PIPE, text=True))
        for name, value in (
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", opened[-1].stdout.readline().strip()),
            ("RANK", "1"),
            ("WORLD_SIZE", "2"),
            ("GLIMMER_JOIN_TIMEOUT", "30"),
        ):
            monkeypatch.setenv(name, value)
        return opened[-1]

    yield open_
    for process in opened:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("agent, who", [("False", "rank 0"), ("True", "the launcher")])
def test_a_meeting_point_that_vanishes_while_joining_is_named(meeting, monkeypatch, agent, who):
    meeting("glimmer/0/host/1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    with pytest.raises(EngineError) as lost:
        connect(2, torch.device("cpu"), "gloo")
    assert lost.value.found.startswith(f"rank 1 on {socket.gethostname()} lost {who} on 127.0.0.1, which held the")


def test_a_rank_never_says_that_it_lost_itself(meeting, monkeypatch):
    process = meeting("gone")
    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), None, False, timedelta(seconds=30))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store.set("gone", "1")
    process.wait(30)
    lost = lost_peer(0, (0, 1), store, "connection closed")
    assert f"rank 0 on {socket.gethostname()} lost the launcher on 127.0.0.1" in lost.found


def test_a_lost_rank_is_named_with_what_was_felt():
    store = HashStore()
    for rank in (0, 1):
        store.set(f"host/{rank}", f"node{rank}")
    said = "[/somewhere/gloo/transport/tcp/pair.cc:537] Connection reset by peer. " + "long advice " * 20 + "\nframes"
    lost = lost_peer(0, (0, 1), store, said)
    assert re.fullmatch(r"rank 0 on \S+ lost rank 1 on node1 \(Connection reset by peer\. long .* \.\.\.\)", lost.found)
    assert len(lost.found) < 250


def test_ranks_that_meet_and_cannot_connect(model, tmp_path):
    """Both ranks reach the meeting point; the interface that they shall use is not there."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "nowhere0"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, model, "x"]
    job = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert job.returncode != 0 and "but cannot connect to them" in job.stderr and "GLOO_SOCKET_IFNAME" in job.stderr
    assert 'File "' + SCRIPT not in job.stderr, "no traceback of ours"


def test_more_shares_than_processes_is_refused_with_the_command(model):
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        connect(2, torch.device("cpu"), "gloo")


def test_impossible_environment(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="0 <= RANK < WORLD_SIZE"):
        world()
    monkeypatch.setenv("RANK", "1")
    for name, value in (("LOCAL_WORLD_SIZE", "3"), ("MASTER_PORT", "a"), ("GLIMMER_JOIN_TIMEOUT", "nan")):
        with monkeypatch.context() as changed, pytest.raises(ConfigError, match=f"{name}='{value}' in the environment"):
            changed.setenv(name, value)
            connect(2, torch.device("cpu"), "gloo")
    monkeypatch.setenv("LOCAL_RANK", "-1")
    with pytest.raises(ConfigError, match="LOCAL_RANK='-1'"):
        local_rank()


def test_a_busy_port_is_reported_as_such(monkeypatch):
    """Without a launcher: rank 0 opens the meeting point itself."""
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"cannot open 127.0.0.1:{port}.*in use") as busy:
            connect(2, torch.device("cpu"), "gloo")
    assert busy.value.expected == "a free port of this machine"


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
    group, x = Group(), torch.ones(2, 3)
    assert group.all_reduce(x) is x and group.all_gather(x, 3) is x
    assert group.broadcast("anything") == "anything" and group.all_reduce_min(7) == 7 and group.split(9) == (0, 9)
