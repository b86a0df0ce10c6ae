"""scripts/msrun_launcher.sh: the guide's commands word for word, and what is said when a job fails.

Path and number of cards aside, the commands in jobs.py are the guide's; here they run on two processes of this machine.
Failures that need no model run a script of a few lines instead. Several machines: test_machines.py.
"""

import ast
import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
from jobs import ROOT, ended, launcher, processes_in, script, until

from glimmer.cli import predict
from glimmer.errors import ConfigError, EngineError, GlimmerError
from glimmer.mindformers import launch
from glimmer.parallel import interface_towards

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path):
    """The directory in which commands run."""
    return jobs.build_checkout(tmp_path)


@pytest.fixture
def start(checkout):
    """start(shell command, **variables) -> a running Popen."""
    running = jobs.Jobs(checkout)
    yield running.start
    running.kill()


# ---------------------------------------------------------------------- the guide's commands


def test_the_commands_are_those_of_the_page():
    for page in ("mindformers.md", "mindformers.zh.md"):
        text = (ROOT / "docs" / page).read_text("utf-8")
        assert all(command in text for command in (jobs.ONE, jobs.BATCH, jobs.MACHINES))


def test_one_prompt_on_several_processes(checkout, start, checkpoint):
    command = jobs.ONE.replace("/path/hf_dir", str(checkpoint(dtype="float32"))).replace(" 8", " 2")
    code, out, err = ended(start(command))
    assert code == 0, out + err
    [result] = ast.literal_eval((checkout / "text_generation_result.txt").read_text("utf-8"))
    [answer] = result["text_generation_text"]
    assert answer.startswith("请介绍一下北京") and f"'text_generation_text': [{answer!r}]" in out
    logs = checkout / "output/msrun_log"
    spoken = (logs / "worker_0.log").read_text("utf-8")
    assert f"{answer!r}" in spoken and spoken.count("glimmer predict: operations: ") == 1, "rank 0 speaks"
    assert (logs / "worker_1.log").read_text("utf-8") == "", "and rank 1 does not"


def test_a_batch_file(checkout, start, checkpoint):
    (checkout / "path/to").mkdir(parents=True)
    (checkout / "path/to/input_predict_data.txt").write_text("请介绍一下北京\n" * 4, encoding="utf-8")
    command = jobs.BATCH.replace("/path/hf_dir", str(checkpoint(dtype="float32"))).replace(" 8", " 2")
    command = command.replace('data.txt"', 'data.txt --temperature 0 --max_new_tokens 8 --output rows.jsonl"')
    code, out, err = ended(start(command))
    assert code == 0, out + err
    rows = [json.loads(line) for line in (checkout / "rows.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 4 and len({row["text"] for row in rows}) == 1, "equal prompts, greedy: equal answers"
    [result] = ast.literal_eval((checkout / "text_generation_result.txt").read_text("utf-8"))
    assert result["text_generation_text"] == ["请介绍一下北京" + row["text"] for row in rows]


def test_nine_arguments_on_one_machine(start, checkpoint):
    command = jobs.MACHINES.replace("/path/hf_dir", str(checkpoint(dtype="float32")))
    command = command.replace("model_parallel 16", "model_parallel 1").replace('北京"', '北京 --max_new_tokens 8"')
    variables = {"worker_num": "1", "local_worker": "1", "master_ip": "192.168.1.1", "port": "0", "node_rank": "0"}
    code, out, err = ended(start(command, **variables))
    assert code == 0 and "'text_generation_text': ['请介绍一下北京" in out, out + err


# ---------------------------------------------------------------------- failures


def test_a_killed_rank_ends_the_job_and_is_named(checkout, start, checkpoint):
    log = checkout / "output/msrun_log/worker_0.log"
    job = start(
        launcher(
            f"run_mindformer.py --model {checkpoint(dtype='float32')} --max_new_tokens 4000 --ignore-eos hello", "2"
        )
    )
    until(lambda: log.exists() and "loaded" in log.read_text())
    os.kill(jobs.rank_in(checkout, 1), signal.SIGKILL)
    begin = time.monotonic()
    code, _, err = ended(job, timeout=30)
    assert time.monotonic() - begin < 10
    assert code == 1 and "rank 1 on " in err and "signal 9 (SIGKILL)" in err and "worker_1.log" in err
    assert processes_in(checkout) == []


def test_when_a_rank_is_lost_rank_0_says_what_is_kept(checkout, start, checkpoint):
    (checkout / "prompts.txt").write_text("hello\n" * 40)
    rows, log = checkout / "rows.jsonl", checkout / "output/msrun_log/worker_0.log"
    job = start(
        launcher(
            f"run_mindformer.py --model {checkpoint(dtype='float32')} --predict_data prompts.txt --output rows.jsonl"
            " --max_new_tokens 40 --ignore-eos --max-num-seqs 1",
            "2",
        )
    )
    until(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 2)
    os.kill(jobs.rank_in(checkout, 1), signal.SIGKILL)
    code, _, err = ended(job, timeout=30)
    kept = rows.read_bytes().count(b"\n")
    assert code == 1 and "rank 1 on " in err and "signal 9 (SIGKILL)" in err
    assert kept < 40
    assert f"stopped; {kept} of 40 rows are in rows.jsonl; the same command with --resume" in log.read_text()


def test_resume_with_nothing_left_loads_no_model(checkout, start, checkpoint):
    command = (
        f"run_mindformer.py --model {checkpoint(dtype='float32')} --predict_data hello --max_new_tokens 2"
        " --output rows.jsonl --resume"
    )
    log, said = checkout / "output/msrun_log/worker_0.log", []
    for _ in range(2):
        code, out, err = ended(start(launcher(command, "2")))
        assert code == 0, out + err
        said.append((log.read_text(), (checkout / "text_generation_result.txt").read_text()))
    (first, answer), (second, again) = said
    assert "weights loaded" in first and "weights loaded" not in second and "1 of 1 rows are in rows.jsonl" in second
    assert again == answer


def test_refusals_end_with_their_own_code_every_time(start, checkpoint):
    """The process groups are destroyed on this path too: no rank is ended by a signal of its own making."""
    command = f"run_mindformer.py --model {checkpoint(dtype='float32')} --max-model-len 99999999 hello"
    for _ in range(3):
        code, out, err = ended(start(launcher(command, "2")))
        assert code == 2 and "ended with exit code 2" in err and "signal" not in err, out + err
        assert "max_model_len=99999999" in out


def test_two_jobs_at_once_and_the_end_of_both(checkout, start):
    """They take different ports and log directories; Ctrl-C and SIGTERM leave no process behind. nohup works."""
    script(checkout, "print(os.environ['MASTER_PORT'], flush=True)\ntime.sleep(100)\n")
    both = [start(launcher("worker.py", "2"), before='trap "" HUP; ') for _ in range(2)]
    logs = [checkout / f"output/{name}/worker_{rank}.log" for name in ("msrun_log", "msrun_log_2") for rank in (0, 1)]
    until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
    ports = [log.read_text() for log in logs]
    assert ports[0] == ports[1] != ports[2] == ports[3]
    for job in both:
        job.send_signal(signal.SIGHUP)
    for job, number, code in zip(both, (signal.SIGINT, signal.SIGTERM), (130, 143)):
        assert len(processes_in(checkout)) >= 3
        job.send_signal(number)
        _, err = job.communicate(timeout=20)
        assert job.returncode == code and number.name in err and "Traceback" not in err
    assert processes_in(checkout) == []


def test_ctrl_c_keeps_rows_and_resume_goes_on(checkout, start, checkpoint, monkeypatch, capsys):
    rows = checkout / "rows.jsonl"
    argv = ["--model", str(checkpoint(dtype="float32")), "--output", "rows.jsonl", "--predict_batch_size", "1"]
    argv += ["--ignore-eos", "--max_new_tokens", "10", *"abcdefghijkl"]
    job = start(launcher("run_mindformer.py " + " ".join(argv), "2"))
    until(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 2)
    job.send_signal(signal.SIGINT)
    code, out, _ = ended(job, timeout=40)
    kept = rows.read_bytes().count(b"\n")
    assert code == 130 and 2 <= kept < 12 and f"{kept} of 12 rows are in rows.jsonl" in out and "--resume" in out
    monkeypatch.chdir(checkout)
    assert predict.main([*argv, "--resume"]) == 0, capsys.readouterr().err  # one process may go on where two began
    found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    assert sorted(row["index"] for row in found) == list(range(12)) and all(row["error"] is None for row in found)


def test_failures_are_told_in_words(checkout, start):
    script(
        checkout,
        "print('last words of', rank, sys.argv[2], flush=True)\n"
        "if rank == 1: sys.exit(int(sys.argv[1]))\ntime.sleep(60)\n",
    )
    said = "$HOME ${local_rank} $$ 北京"
    commands = {n: launcher(f'python worker.py {n} "{said}"', "2", "0", f"log{n}", "False", "9") for n in (3, 2)}
    for number, job in {n: start(command) for n, command in commands.items()}.items():
        code, out, err = ended(job)
        assert code == {3: 1, 2: 2}[number], "2 is bad input, everything else a failure"
        assert f"last words of 0 {said}\n" in out and "last words of 1" not in out
        lines = err.splitlines()
        assert lines[1].startswith("msrun_launcher: rank 1 on ")
        assert lines[1].endswith(f" ended with exit code {number}; log log{number}/worker_1.log")
        assert lines[2].startswith("  expected: ") and lines[3].startswith("  to do:    ")
        assert lines[4] == f"    | last words of 1 {said}"


def test_what_rank_0_has_said_is_not_said_again(checkout, start):
    script(
        checkout, "print(f'bad input (rank {rank} on here)', flush=True)\nif rank == 0: time.sleep(1)\nsys.exit(2)\n"
    )
    code, out, err = ended(start(launcher("worker.py", "2")))
    assert code == 2 and out == "bad input (rank 0 on here)\n"
    assert "rank 1 on " in err and "see what rank 0 said above: it is the same" in err and "    | " not in err


@pytest.mark.parametrize("node", [0, 1])
def test_ctrl_c_on_one_machine_is_heard_on_the_other(node, checkout, start):
    """Both are this machine; each has a log directory of its own."""
    script(checkout, "print('up', flush=True)\ntry: time.sleep(100)\nexcept KeyboardInterrupt: sys.exit(130)\n")
    with socket.create_server(("127.0.0.1", 0)) as op:
        port = str(op.getsockname()[1])
    rest = lambda n: ("2", "1", "127.0.0.1", port, str(n), f"logs{n}", "False", "60")
    both = [start(launcher("worker.py", *rest(n))) for n in (0, 1)]
    logs = [checkout / f"logs{n}/worker_{n}.log" for n in (0, 1)]
    until(lambda: all(log.exists() and log.read_text() == "up\n" for log in logs))
    both[node].send_signal(signal.SIGINT)
    results = [ended(job, timeout=20) for job in both]
    assert results[node][0] == 130 and "ended by SIGINT; no process is left" in results[node][2]
    code, _, err = results[1 - node]
    assert code == 1 and f"the launcher on {socket.gethostname()} was ended by SIGINT" in err
    assert processes_in(checkout) == []


def test_ranks_end_with_a_launcher_that_is_killed(checkout, start):
    script(checkout, "print('up', flush=True)\ntime.sleep(100)\n")
    job = start(launcher("worker.py", "2"))
    logs = [checkout / f"output/msrun_log/worker_{rank}.log" for rank in (0, 1)]
    until(lambda: all(log.exists() and log.read_text() == "up\n" for log in logs))
    job.kill()
    until(lambda: processes_in(checkout) == [], 2)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (None, 1)])
def test_a_launcher_ends_although_node_0_is_silent(number, code, checkout, start):
    """Node 0's launcher, which holds the meeting point, is stopped: its connections stay, and it says nothing."""
    script(checkout, "print('up', flush=True)\ntime.sleep(100)\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    rest = lambda n: ("2", "1", "127.0.0.1", port, str(n), f"logs{n}", "False", "60")
    deadline = "60" if number else "3"
    both = [start(launcher("worker.py", *rest(n)), GLIMMER_COLLECTIVE_TIMEOUT=deadline) for n in (0, 1)]
    logs = [checkout / f"logs{n}/worker_{n}.log" for n in (0, 1)]
    until(lambda: all(log.exists() and log.read_text() == "up\n" for log in logs))
    both[0].send_signal(signal.SIGSTOP)
    time.sleep(1)  # until node 1 waits for an answer
    begin = time.monotonic()
    if number:
        both[1].send_signal(number)
    found, _, err = ended(both[1], timeout=20)
    assert found == code and time.monotonic() - begin < (2 if number else 10), err
    assert (number.name if number else "node 0 (127.0.0.1) is lost: no answer within") in err
    both[0].kill()
    until(lambda: processes_in(checkout) == [], 2)


def test_a_busy_port_is_reported_at_once(start):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        code, _, err = ended(start(launcher("run_mindformer.py x", "1", port, "output/log", "True", "99")), timeout=15)
    assert code == 2 and f"port {port}" in err and "Address already in use" in err


def test_join_shows_every_rank(checkout, start):
    script(checkout, "print('hello from', rank, flush=True)\nprint('and', rank, file=sys.stderr, flush=True)\n")
    code, out, _ = ended(start(launcher("worker.py", "2", "0", "output/logs", "True", "9"), MF_LOG_SUFFIX="x"))
    assert code == 0
    assert sorted(out.splitlines()) == ["[rank 1] and 1", "[rank 1] hello from 1", "and 0", "hello from 0"]
    assert (checkout / "output/logs_x/worker_1.log").read_text() == "hello from 1\nand 1\n"


# ---------------------------------------------------------------------- rendezvous


def rendezvous(*machines: tuple[int, int, int], timeout: float = 20) -> list:
    """What comes of (NODE_RANK, LOCAL_WORKER, WORKER_NUM) on each machine, all of them here: ranks and errors."""
    with socket.create_server(("", 0)) as op:
        port = op.getsockname()[1]
    command = (sys.executable,)
    parts = [launch.Job(command, all, local, "127.0.0.1", port, node, timeout=timeout) for node, local, all in machines]
    handlers = [launch.Rendezvous(part) for part in parts]  # kept until all are done: the store of node 0 is in there

    def join(handler: launch.Rendezvous):
        try:
            found = handler.next_rendezvous()
            return found.rank, found.world_size
        except GlimmerError as error:
            return error

    with ThreadPoolExecutor(len(handlers)) as threads:
        return list(threads.map(join, handlers))


def test_machines_find_each_other_in_any_order_and_number():
    assert rendezvous((2, 1, 6), (0, 2, 6), (1, 3, 6)) == [(2, 3), (0, 3), (1, 3)]


def test_who_is_missing_is_named():
    host = socket.gethostname()
    [first] = rendezvous((0, 2, 4), timeout=1)
    assert isinstance(first, EngineError)
    assert first.found == f"node 1 did not come within 1 s: 2 of 4 processes are here, node 0 ({host}) with 2"
    [second] = rendezvous((1, 2, 4), timeout=1)
    assert isinstance(second, EngineError) and second.found.startswith("node 0 did not come within 1 s: 127.0.0.1:")
    assert f"does not answer node 1, {host} (Connection refused)" in second.found
    for error in rendezvous((0, 1, 4), (2, 1, 4), timeout=2):
        assert "node 1 did not come within 2 s: 2 of 4" in error.found or "node 0 (127.0.0.1) is lost" in error.found


def test_something_else_that_listens_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        part = launch.Job((sys.executable,), 2, 1, "127.0.0.1", silent.getsockname()[1], 1, timeout=2)
        begin = time.monotonic()
        with pytest.raises(EngineError, match=r"node 0 did not come within 2 s: .*\(no answer"):
            launch.Rendezvous(part).next_rendezvous()
    assert time.monotonic() - begin < 6


def test_who_ended_a_job_is_who_refused_it(tmp_path):
    logs = launch.WorkerLogs(launch.Job((sys.executable,), log_dir=tmp_path))
    for rank in range(3):
        logs.file(rank).write_text("")
    for codes, culprit in (((1, 2, -15), 1), ((143, 1, -15), 1), ((-15, -9, 1), 1), ((143, -15, 143), 0)):
        failures = {rank: SimpleNamespace(exitcode=code) for rank, code in enumerate(codes)}
        assert f"rank {culprit} on here " in launch.failure(failures, logs, "here").found
    logs.close()


def test_machines_that_contradict_each_other_are_told():
    for error in rendezvous((0, 2, 3), (1, 2, 3)):
        assert isinstance(error, ConfigError) and "4 processes for WORKER_NUM=3" in error.found
    for error in rendezvous((0, 1, 2), (1, 1, 3)):
        assert isinstance(error, ConfigError) and "WORKER_NUM=2 or 3" in error.found
    results = rendezvous((0, 1, 3), (1, 1, 3), (1, 2, 3), timeout=3)
    assert sum("NODE_RANK=1" in str(error) and "has that number already" in str(error) for error in results) == 1


def test_an_address_that_is_not_ours():
    part = launch.Job((sys.executable,), 2, 1, "192.0.2.1", 50099, 0, timeout=0.1)
    with pytest.raises(ConfigError, match=r"cannot reach itself as MASTER_ADDR=192\.0\.2\.1"):
        launch.Rendezvous(part).next_rendezvous()


# ---------------------------------------------------------------------- arguments


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a script in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MF_LOG_SUFFIX", raising=False)
    (tmp_path / "w.py").write_text("")


def test_the_forms_of_the_arguments(here):
    command = (sys.executable, "w.py")
    job = launch.Job
    assert launch.parse(["w.py"]) == job(command, 8, 8)
    assert launch.parse(["w.py", "4"]) == job(command, 4, 4)
    alone = job(command, 2, 2, master_port=8118, log_dir=Path("logs"), join=True, timeout=60)
    assert launch.parse(["w.py", "2", "8118", "logs", "True", "60"]) == alone
    part = job(command, 16, 8, "10.0.0.1", 50001, 1, Path("logs"), False, 300)
    assert launch.parse(["w.py", "16", "8", "10.0.0.1", "50001", "1", "logs", "False", "300"]) == part
    short = job(command, 16, 8, "10.0.0.1", 50001, 1)
    assert launch.parse(["w.py", "16", "8", "10.0.0.1", "50001", "1"]) == short
    whole = launch.parse(["w.py", "2", "2", "10.0.0.1", "50001", "0", "logs", "False", "300"])
    assert whole.alone and whole.master_addr == "127.0.0.1", "one machine needs no address"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["w.py", "2", "3"], "1, 2, 6 or 9"),
        (["run", "predict", "--x"], "quote COMMAND"),
        (["w.py", "two"], "WORKER_NUM='two'"),
        (["w.py", "0"], "WORKER_NUM='0'"),
        (["w.py", "2", "70000", "logs", "True", "60"], "MASTER_PORT='70000'"),
        (["w.py", "2", "3", "10.0.0.1", "50001", "0"], "LOCAL_WORKER=3 of WORKER_NUM=2"),
        (["w.py", "2", "1", "10.0.0.1", "0", "0"], "MASTER_PORT=0"),
        (["w.py", "2", "1", "10.0.0.1", "50001", "2"], "NODE_RANK=2"),
        (["w.py", "2", "1", "10.0.0.1", "50001", "0", "logs", "maybe", "60"], "JOIN='maybe'"),
        (["w.py", "2", "1", "10.0.0.1", "50001", "0", "logs", "False", "0"], "CLUSTER_TIME_OUT='0'"),
        (["nothing.py"], "no script 'nothing.py'"),
        (["w.py 'open"], "No closing quotation"),
        (["no_such_program x"], "COMMAND 'no_such_program x'"),
        ([""], "COMMAND ''"),
    ],
)
def test_arguments_that_are_refused(here, argv, words):
    with pytest.raises(ConfigError) as caught:
        launch.parse(argv)
    assert words in str(caught.value)


def test_commands_are_split_as_a_shell_would_and_nothing_more(here):
    python = sys.executable
    assert launch.split_command("python -u w.py 'a b' \"c\"d $HOME `ls` *") == (
        python,
        "-u",
        "w.py",
        "a b",
        "cd",
        "$HOME",
        "`ls`",
        "*",
    )
    assert launch.split_command("w.py \\\n --a '请介绍\n北京'") == (python, "w.py", "--a", "请介绍\n北京")
    assert launch.split_command("python -m glimmer predict x.py")[:3] == (python, "-m", "glimmer")
    assert launch.split_command("run_mindformer.py") == (python, str(ROOT / "run_mindformer.py"))
    assert launch.split_command("sh -c true") == ("sh", "-c", "true")


def test_usage(capsys):
    assert launch.main([]) == 2 and launch.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("WORKER_NUM", "LOCAL_WORKER", "MASTER_ADDR", "NODE_RANK", "CLUSTER_TIME_OUT"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_the_interface_towards_an_address():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such name") is None
