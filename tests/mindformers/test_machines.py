"""Two machines: two network namespaces with one cable between them, and the guide's nine arguments on each.

The namespaces share this machine's files, as nodes with a common home directory do, and nothing of its network. Skipped
where they may not be made (they need root and iproute2).
"""

import ast
import os
import shutil
import signal
import subprocess
import time

import jobs
import pytest

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def cable():
    """The names of two namespaces that reach each other as ADDRESSES, and nothing else."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("iproute2 or util-linux is not installed")
    names = tuple(f"glimmer-{os.getpid()}-{side}" for side in "ab")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire1", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"wire{i}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"wire{i}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """The directory in which commands run, on both machines."""
    return jobs.build_checkout(tmp_path)


@pytest.fixture
def start(cable, checkout):
    """start(node, shell command, **variables) -> a running Popen on that machine, whose name is node0 or node1."""
    running = jobs.Jobs(checkout)

    def begin(node: int, command: str, before: str = "", **variables: str) -> subprocess.Popen:
        machine = ["ip", "netns", "exec", cable[node], "unshare", "--uts", "--mount"]
        return running.start(command, machine, f"hostname node{node}; {before}", **variables)

    yield begin
    running.kill()


def test_the_command_of_the_guide_on_two_machines(checkout, start, checkpoint):
    command = jobs.MACHINES.replace("/path/hf_dir", str(checkpoint(dtype="float32")))
    command = command.replace("model_parallel 16", "model_parallel 2")
    command = command.replace('北京"', '北京 --temperature 0 --max_new_tokens 8"')
    variables = {"worker_num": "2", "local_worker": "1", "master_ip": ADDRESSES[0], "port": "50001"}
    both = [start(node, command, **variables, node_rank=str(node)) for node in (1, 0)]
    (code1, out1, err1), (code0, out0, err0) = (jobs.ended(job) for job in both)
    assert (code0, code1) == (0, 0), out0 + err0 + out1 + err1
    [result] = ast.literal_eval((checkout / "text_generation_result.txt").read_text("utf-8"))
    assert f"'text_generation_text': {result['text_generation_text']}" in out0 and out1 == ""
    assert result["text_generation_text"][0].startswith("请介绍一下北京")
    assert (checkout / "output/msrun_log/worker_0.log").is_file() and (
        checkout / "output/msrun_log/worker_1.log"
    ).is_file()


def test_a_rank_that_dies_on_one_machine_ends_the_job_on_the_other(checkout, start):
    """One process on the first machine, two on the second: the machines need not be alike."""
    jobs.script(checkout, "print('up', os.environ['GLOO_SOCKET_IFNAME'], flush=True)\ntime.sleep(100)\n")
    arguments = lambda node, local: (
        "worker.py",
        "3",
        local,
        ADDRESSES[0],
        "50003",
        node,
        "output/msrun_log",
        "False",
        "60",
    )
    both = [start(0, jobs.launcher(*arguments("0", "1"))), start(1, jobs.launcher(*arguments("1", "2")))]
    logs = [checkout / f"output/msrun_log/worker_{rank}.log" for rank in range(3)]
    jobs.until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
    assert [log.read_text() for log in logs] == ["up wire0\n", "up wire1\n", "up wire1\n"]
    os.kill(jobs.rank_in(checkout, 2), signal.SIGKILL)
    begin = time.monotonic()
    for code, _, err in (jobs.ended(job, timeout=20) for job in both):
        assert code == 1
        assert "rank 2 on node1 was killed by signal 9 (SIGKILL); log output/msrun_log/worker_2.log" in err
    assert time.monotonic() - begin < 10 and jobs.processes_in(checkout) == []


def test_a_cut_link_is_named_on_both_sides_by_the_deadline(cable, checkout, start, checkpoint):
    """No packet comes through any more, and no connection is closed: each side hears nothing of the other."""
    log = checkout / "output/msrun_log/worker_0.log"
    command = f"run_mindformer.py --model {checkpoint(dtype='float32')} --max_new_tokens 4000 --ignore-eos hello"
    words = lambda node: (command, "2", "1", ADDRESSES[0], "50005", node, "output/msrun_log", "False", "60")
    both = [start(node, jobs.launcher(*words(str(node))), GLIMMER_COLLECTIVE_TIMEOUT="4") for node in (0, 1)]
    jobs.until(lambda: log.exists() and "loaded" in log.read_text())
    time.sleep(2)
    ip("-n", cable[0], "link", "set", "wire0", "down")
    try:
        begin = time.monotonic()
        (code0, out0, err0), (code1, _, err1) = (jobs.ended(job, timeout=60) for job in both)
        assert time.monotonic() - begin < 4 + 30
    finally:
        ip("-n", cable[0], "link", "set", "wire0", "up")
    assert (code0, code1) == (1, 1)
    assert "lost rank 1 on node1" in out0 + err0, out0 + err0
    assert "node 0 (10.77.0.1) is lost" in err1 or "lost the launcher on 10.77.0.1" in err1, err1
    assert jobs.processes_in(checkout) == []


def test_torchrun_on_machines_whose_own_names_resolve_to_loopback(checkout, start):
    """As many systems set /etc/hosts. The ranks connect through the interface between the machines all the same."""
    script = jobs.ROOT / "tests/ranks.py"
    options = "--nnodes 2 --nproc-per-node 1 --master-addr node0 --master-port 50007"
    command = lambda node: f"$PYTHON -m torch.distributed.run {options} --node-rank {node} {script} exit 0"
    (checkout / "hosts0").write_text("127.0.0.1 localhost\n127.0.1.1 node0\n")
    (checkout / "hosts1").write_text(f"127.0.0.1 localhost\n127.0.1.1 node1\n{ADDRESSES[0]} node0\n")
    both = [
        start(node, command(node), f"mount --bind hosts{node} /etc/hosts; ", GLIMMER_JOIN_TIMEOUT="30")
        for node in (0, 1)
    ]
    for code, out, err in (jobs.ended(job, timeout=90) for job in both):
        assert code == 0, out + err
