"""msrun_launcher: MindFormers' launcher arguments, served by torchrun's elastic agent.

    COMMAND                                                       8 processes on this machine
    COMMAND WORKER_NUM                                            as many as that; the port is a free one
    COMMAND WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT  the same, with everything said
    COMMAND WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK [LOG_DIR JOIN CLUSTER_TIME_OUT]
                                                                  this machine's part of a job on several

The agent starts the processes, watches them and ends them all when one fails. This file tells it how the machines
find each other (Rendezvous) and where each process logs (WorkerLogs), and explains what went wrong. The launcher stays
in the foreground. Not here: what the processes do, and how they exchange tensors (parallel.py).
"""

import fcntl
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.multiprocessing.tail_log import TailLog
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from glimmer.cli.child import ends_with_parent
from glimmer.errors import ConfigError, EngineError, GlimmerError
from glimmer.parallel import JobStore, collective_timeout, first_line, interface_towards, within

USAGE = """\
usage: bash scripts/msrun_launcher.sh "COMMAND" [WORKER_NUM]
       bash scripts/msrun_launcher.sh "COMMAND" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
       bash scripts/msrun_launcher.sh "COMMAND" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK \\
                                      [LOG_DIR JOIN CLUSTER_TIME_OUT]

Runs COMMAND in WORKER_NUM processes that share one model, on this machine or on several.

  COMMAND           one string: a Python script with its arguments, e.g. "run_mindformer.py --predict_data 'Hello'"
  WORKER_NUM        processes of the whole job (8)
  LOCAL_WORKER      processes on this machine (all); machines may have different numbers
  MASTER_ADDR       address of the machine that is node 0, as the others reach it
  MASTER_PORT       a free port of node 0, the same for every machine; on one machine 0 finds one
  NODE_RANK         number of this machine: 0, 1, 2, ...
  LOG_DIR           each process writes LOG_DIR/worker_N.log (output/msrun_log); $MF_LOG_SUFFIX is added to the name
  JOIN              True: show every local process on the terminal; False: only rank 0. The launcher waits either way
  CLUSTER_TIME_OUT  seconds that the machines wait for each other (300)

example
  bash scripts/msrun_launcher.sh "run_mindformer.py --config configs/glm4_moe/predict_glm4_moe.yaml \\
    --use_parallel True --parallel_config.model_parallel 2 --pretrained_model_dir DIR --predict_data 'Hello'" 2
"""

ROOT = Path(__file__).resolve().parents[2]
SELF = 5.0  # seconds that node 0 tries to reach itself at the address that it has been given
REPORTING = 0.5  # seconds that a node takes at most to report why it ends
REPORTED = 1.0  # seconds that node 0 stays after a failure, so that the other machines hear of it
LOST = 30.0  # seconds without an answer from node 0 after which it counts as lost; or GLIMMER_COLLECTIVE_TIMEOUT
STOP = 5  # seconds that processes have after a signal, before they are killed


@dataclass(frozen=True)
class Job:
    """This machine's part of a job. A timeout in seconds; port 0 is any free one."""

    command: tuple[str, ...]
    worker_num: int = 8
    local_worker: int = 8
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    node_rank: int = 0
    log_dir: Path = Path("output/msrun_log")
    join: bool = False
    timeout: float = 300.0

    @property
    def alone(self) -> bool:
        """All processes are on this machine."""
        return self.worker_num == self.local_worker


# ---------------------------------------------------------------------- arguments


def parse(argv: list[str]) -> Job:
    """The job that the positional arguments describe. ConfigError for anything that could not run."""
    if len(argv) not in (1, 2, 6, 9):
        raise ConfigError(
            f"{len(argv)} arguments",
            "1, 2, 6 or 9",
            "quote COMMAND as one argument; `bash scripts/msrun_launcher.sh --help` lists the others",
        )
    names = ["worker_num", "local_worker", "master_addr", "master_port", "node_rank", "log_dir", "join", "timeout"]
    if len(argv) == 6 and argv[4].lower() in ("true", "false"):
        names = ["worker_num", "master_port", "log_dir", "join", "timeout"]
    given = dict(zip(names, argv[1:]))
    fields: dict[str, Any] = {"command": split_command(argv[0])}
    for name, least, most in (
        ("worker_num", 1, 2**16),
        ("local_worker", 1, 2**16),
        ("node_rank", 0, 2**16),
        ("master_port", 0, 65535),
        ("timeout", 1, 10**7),
    ):
        if name in given:
            fields[name] = _whole(name, given[name], least, most)
    fields.setdefault("worker_num", 8)
    fields.setdefault("local_worker", fields["worker_num"])
    if "join" in given:
        if given["join"].lower() not in ("true", "false"):
            raise ConfigError(f"JOIN={given['join']!r}", "True or False", "choose one of them")
        fields["join"] = given["join"].lower() == "true"
    suffix = os.environ.get("MF_LOG_SUFFIX")
    fields["log_dir"] = Path(given.get("log_dir", "output/msrun_log") + (f"_{suffix}" if suffix else ""))
    if fields["local_worker"] > fields["worker_num"]:
        raise ConfigError(
            f"LOCAL_WORKER={fields['local_worker']} of WORKER_NUM={fields['worker_num']}",
            "WORKER_NUM to count the processes of all machines together",
            "raise WORKER_NUM or lower LOCAL_WORKER",
        )
    if fields["local_worker"] == fields["worker_num"]:
        return Job(**fields | {"node_rank": 0})  # one machine: its own address will do
    if fields["node_rank"] >= fields["worker_num"]:
        raise ConfigError(
            f"NODE_RANK={fields['node_rank']} with WORKER_NUM={fields['worker_num']}",
            "the number of this machine: 0, 1, 2, ...",
            "correct NODE_RANK",
        )
    if fields["master_port"] == 0:
        raise ConfigError("MASTER_PORT=0 on several machines", "a port that all of them know", "choose one, e.g. 50001")
    return Job(**fields, master_addr=given["master_addr"])


def _whole(name: str, text: str, least: int, most: int) -> int:
    label = {"timeout": "CLUSTER_TIME_OUT"}.get(name, name.upper())
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise ConfigError(f"{label}={text!r}", f"a whole number from {least} to {most}", f"correct {label}")
    return int(text)


def split_command(text: str) -> tuple[str, ...]:
    """The words of COMMAND by the shell's quoting rules; nothing in it is expanded or executed.

    A Python script (with or without `python` in front) runs with this interpreter; it is looked for in the current
    directory, then beside glimmer.
    """
    try:
        words = shlex.split(text.replace("\\\r\n", " ").replace("\\\n", " "))
    except ValueError as error:
        raise ConfigError(f"COMMAND {text!r}: {error}", "quotes in pairs", "close the quote") from None
    if words and Path(words[0]).name in ("python", "python3"):
        words[0] = sys.executable
    elif words and words[0].endswith(".py"):
        words.insert(0, sys.executable)
    if words and words[0] == sys.executable:
        options = {"-m", "-c"}  # behind these there is no script
        at = next((i for i, word in enumerate(words[1:], 1) if word in options or not word.startswith("-")), 0)
        if at and words[at] not in options and not Path(words[at]).is_file():
            if not (ROOT / words[at]).is_file():
                raise ConfigError(f"no script {words[at]!r} in {Path.cwd()}", "a Python script", "correct the path")
            words[at] = str(ROOT / words[at])
        return tuple(words)
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(
            f"COMMAND {text!r}",
            "a Python script or a program, with its arguments, in one quoted string",
            "e.g. \"run_mindformer.py --predict_data 'Hello'\"",
        )
    return tuple(words)


# ---------------------------------------------------------------------- rendezvous


class Rendezvous(RendezvousHandler):
    """Where the machines of a job find each other, and where each hears that another has failed.

    Node 0 opens a store at MASTER_ADDR:MASTER_PORT, which its processes use too. Every node signs in there; the job
    begins when the nodes 0, 1, 2, ... together have WORKER_NUM processes. Whoever fails first says so under "failed".
    """

    use_agent_store = True

    def __init__(self, job: Job):
        self.job, self.host, self.nodes = job, socket.gethostname(), 1
        self.store: JobStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes. EngineError says who is missing, ConfigError how nodes contradict each other."""
        job, deadline = self.job, time.monotonic() + self.job.timeout
        self.store = self._host() if job.node_rank == 0 else self._visit(deadline)
        self.store.lost = self._lost
        me = {"host": self.host, "pid": os.getpid(), "workers": job.local_worker, "worker_num": job.worker_num}
        first = json.loads(self.store.compare_set(f"node/{job.node_rank}", "", json.dumps(me)))
        if first != me:
            raise ConfigError(
                f"NODE_RANK={job.node_rank} on {self.host}, but {first['host']} has that number already",
                "a NODE_RANK of its own for each machine: 0, 1, 2, ...",
                "correct NODE_RANK on one of them",
            )
        nodes = self._gather(deadline)
        self.nodes = len(nodes)
        self.store.set_timeout(timedelta(seconds=collective_timeout(LOST)))
        place = RendezvousStoreInfo(job.master_addr, self.store.torch.port)
        store: Any = self.store.prefixed("agent")  # the agent calls nothing but the methods that a JobStore has
        return RendezvousInfo(store, job.node_rank, len(nodes), place)

    def _host(self) -> JobStore:
        job = self.job
        try:
            if job.alone:  # nobody else has business there
                listener = socket.create_server((job.master_addr, job.master_port))
            elif socket.has_dualstack_ipv6():
                listener = socket.create_server(("", job.master_port), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                listener = socket.create_server(("", job.master_port))
        except OSError as error:
            raise ConfigError(
                f"port {job.master_port} of {self.host} cannot be opened: {os.strerror(error.errno or 0)}",
                "a free port" + (" (0 finds one)" if job.alone else ""),
                f"choose another from 50000 to 65535, or see who has it: ss -ltnp 'sport = :{job.master_port}'",
            ) from None
        port = listener.getsockname()[1]
        if not job.alone:
            self._say(
                f"node 0 with {job.local_worker} of {job.worker_num} processes waits at"
                f" {job.master_addr}:{port} for the others, at most {job.timeout:g} s"
            )
        self._reach(
            port,
            time.monotonic() + min(job.timeout, SELF),
            ConfigError(
                f"node 0 on {self.host} cannot reach itself as MASTER_ADDR={job.master_addr}",
                "an address of this machine",
                "correct MASTER_ADDR, or run this command on that machine",
            ),
        )
        return JobStore.open(job.master_addr, port, job.timeout, master=True, listener=listener.detach())

    def _visit(self, deadline: float) -> JobStore:
        job, place = self.job, f"{self.job.master_addr}:{self.job.master_port}"
        self._say(
            f"node {job.node_rank} with {job.local_worker} of {job.worker_num} processes looks for node 0 at"
            f" {place}, at most {job.timeout:g} s"
        )
        absent = EngineError(
            f"node 0 did not come within {job.timeout:g} s: {place} does not answer node {job.node_rank}, {self.host}",
            "the launcher of node 0 to listen there",
            "start it on node 0 with the same MASTER_ADDR and MASTER_PORT; check the addresses and the firewall",
        )
        self._reach(job.master_port, deadline, absent)
        try:
            store = JobStore.open(job.master_addr, job.master_port, max(deadline - time.monotonic(), 1))
        except RuntimeError as error:  # something else listens there
            absent.found += f" ({first_line(error)})"
            raise absent from None
        store.set_timeout(timedelta(seconds=collective_timeout(LOST)))
        return store

    def _reach(self, port: int, deadline: float, otherwise: GlimmerError) -> None:
        """Connect to MASTER_ADDR until something listens there. (Ctrl-C would not end the store's own attempts.)"""
        while True:
            try:
                return socket.create_connection((self.job.master_addr, port), timeout=2).close()
            except socket.gaierror:
                raise ConfigError(
                    f"MASTER_ADDR={self.job.master_addr!r} is no address and no name that this machine knows",
                    "the address of node 0",
                    "correct MASTER_ADDR",
                ) from None
            except OSError as error:
                if time.monotonic() > deadline:
                    otherwise.found += f" ({error.strerror or error})"
                    raise otherwise from None
                time.sleep(0.2)

    def _gather(self, deadline: float) -> dict[int, dict[str, Any]]:
        """All nodes, by number."""
        job = self.job
        nodes: dict[int, dict[str, Any]] = {}
        while True:
            for rank in range(job.worker_num):
                if rank not in nodes and self._joined.check([f"node/{rank}"]):
                    nodes[rank] = json.loads(self._joined.get(f"node/{rank}"))
            here = sum(node["workers"] for node in nodes.values())
            came = ", ".join(f"node {r} ({n['host']}) with {n['workers']}" for r, n in sorted(nodes.items()))
            if here > job.worker_num or len({node["worker_num"] for node in nodes.values()}) > 1:
                wanted = " or ".join(sorted({str(node["worker_num"]) for node in nodes.values()}))
                raise ConfigError(
                    f"{here} processes for WORKER_NUM={wanted}: {came}",
                    "the same WORKER_NUM everywhere, and LOCAL_WORKERs that add up to it",
                    "correct the numbers",
                )
            if here == job.worker_num and set(nodes) == set(range(len(nodes))):
                return nodes
            if time.monotonic() > deadline:
                absent = next(r for r in range(len(nodes) + 1) if r not in nodes)
                raise EngineError(
                    f"node {absent} did not come within {job.timeout:g} s: {here} of {job.worker_num} processes are"
                    f" here, {came}",
                    f"{job.worker_num} processes on nodes 0, 1, 2, ...",
                    f"start the same command with NODE_RANK={absent} on that machine;"
                    f" it must reach {job.master_addr}:{job.master_port}",
                )
            time.sleep(0.1)

    def num_nodes_waiting(self) -> int:
        """The agent asks this ten times a second: the moment to hear of a failure elsewhere, as an EngineError."""
        if self.nodes > 1 and self._joined.check(["failed"]):
            raise EngineError(*json.loads(self._joined.get("failed")))
        return 0

    @property
    def _joined(self) -> JobStore:
        assert self.store is not None, "the store is opened by next_rendezvous"
        return self.store

    def _lost(self, error: RuntimeError) -> EngineError:
        return EngineError(
            f"node 0 ({self.job.master_addr}) is lost: {first_line(error)}",
            "node 0 to stay until the job is done",
            "see what its launcher said, then start again everywhere",
        )

    def report(self, error: GlimmerError) -> None:
        """Let the other nodes know why this one ends. The first report counts."""
        if self.store is None or self.nodes == 1:
            return
        store, words = self.store.torch, json.dumps([error.found, error.expected, error.todo])
        try:
            within(REPORTING, lambda: store.compare_set("failed", "", words))
        except RuntimeError:
            return  # node 0 is gone, or cannot be reached: the others find out by themselves
        if self.job.node_rank == 0:
            time.sleep(REPORTED)

    def _say(self, line: str) -> None:
        print(f"msrun_launcher: {line}", file=sys.stderr, flush=True)

    def get_backend(self) -> str:
        """Its name, for the agent's records."""
        return "glimmer"

    def get_run_id(self) -> str:
        """One job, one rendezvous: no name is needed."""
        return "msrun"

    def is_closed(self) -> bool:
        """Nobody joins twice: max_restarts is 0."""
        return False

    def set_closed(self) -> None:
        """Nothing to do: the store goes with the launcher."""

    def shutdown(self) -> bool:
        """Nothing to do: the store goes with the launcher."""
        return True


# ---------------------------------------------------------------------- logs


class WorkerLogs(LogsSpecs):
    """LOG_DIR/worker_N.log for each rank N: both of its streams, as they come. Rank 0's is shown on the terminal too.

    Two jobs with the same LOG_DIR would write over each other's logs: the second one takes LOG_DIR_2.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.job = job
        self.tail: TailLog | None = None
        self.ranks: dict[int, int] = {}
        for n in range(1, 1000):
            self.directory = job.log_dir if n == 1 else job.log_dir.with_name(f"{job.log_dir.name}_{n}")
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self.lock = (self.directory / f".node_{job.node_rank}").open("w")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self.lock.close()
            except OSError as error:
                raise ConfigError(
                    f"LOG_DIR={str(self.directory)!r} cannot be written: {error.strerror}",
                    "a directory for logs",
                    "choose another LOG_DIR, or start the command from another directory",
                ) from None
        raise ConfigError(f"{n} jobs log into {str(job.log_dir)!r}", "a LOG_DIR for each", "give one")

    @property
    def root_log_dir(self) -> str:
        """Where the logs are, as text."""
        return str(self.directory)

    def file(self, rank: int) -> Path:
        """The log of a global rank."""
        return self.directory / f"worker_{rank}.log"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called by the agent when it knows which ranks are ours: envs is {local rank: environment}."""
        self.ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        files = {local: str(self.file(rank)) for local, rank in self.ranks.items()}
        for file in files.values():
            Path(file).write_text("")  # of an earlier job
        shown = {local: file for local, file in files.items() if self.job.join or self.ranks[local] == 0}
        prefixes = {local: f"[rank {rank}] " if rank else "" for local, rank in self.ranks.items()}
        self.tail = TailLog("worker", shown, sys.stdout, prefixes).start()
        silent = dict.fromkeys(envs, "")
        return LogsDest(stdouts=files, stderrs=silent, error_files=silent)  # sh sends stderr after stdout

    def repeats(self, rank: int) -> bool:
        """Whether a rank has said nothing but what rank 0, which is shown, has said too: bad input concerns all."""
        if 0 not in self.ranks.values():
            return False
        own, shown = (re.sub(r"\brank \d+", "rank", self.file(r).read_text(errors="replace")) for r in (rank, 0))
        return own != "" and own in shown

    def close(self) -> None:
        """Show what is left, and unlock the directory."""
        if self.tail is not None:
            self.tail.stop()
        self.lock.close()


# ---------------------------------------------------------------------- a job from beginning to end


def run(job: Job) -> int:
    """Run this machine's part of the job; returns the exit code. GlimmerError names the process or machine at fault."""
    logs, rendezvous = WorkerLogs(job), Rendezvous(job)
    interface = interface_towards(job.master_addr)
    if interface is not None and (job.alone or interface != "lo"):  # processes of ours find a better one
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # logs are read while they are written
    os.environ["GLIMMER_JOIN_TIMEOUT"] = f"{job.timeout:g}"
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: the agent shall not listen to it either
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    logging.disable(logging.CRITICAL)  # what the agent would say is said here, in other words
    print(
        f"msrun_launcher: {job.local_worker} process{'es' * (job.local_worker > 1)} on {rendezvous.host},"
        f" logs in {logs.directory}/worker_N.log",
        file=sys.stderr,
        flush=True,
    )
    spec = WorkerSpec(
        role="worker",
        local_world_size=job.local_worker,
        entrypoint=sys.executable,
        # The agent would open a file for each stream. It substitutes $names: doubled.
        args=tuple(ends_with_parent([word.replace("$", "$$") for word in job.command], join_streams=True)),
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        result = LocalElasticAgent(spec, logs, exit_barrier_timeout=60, shutdown_timeout=STOP).run()
        if result.is_failed():
            raise failure(result.failures, logs, rendezvous.host)
    except SignalException as caught:
        name = signal.Signals(caught.sigval).name
        rendezvous.report(
            EngineError(
                f"the launcher on {rendezvous.host} was ended by {name}",
                "every machine to stay until the job is done",
                "start the job again on all of them",
            )
        )
        logs.close()
        print(f"msrun_launcher: ended by {name}; no process is left", file=sys.stderr)
        return 128 + caught.sigval
    except GlimmerError as error:
        rendezvous.report(error)
        raise
    finally:
        logs.close()
    return 0


def failure(failures: dict[int, ProcessFailure], logs: WorkerLogs, host: str) -> GlimmerError:
    """Which process ended the job, and how. Those that the agent then ended by SIGTERM are not to blame."""
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    order = {ConfigError.exit_code: 0} | dict.fromkeys(ended, 2)  # the others of a refused job have lost that rank
    rank = min(failures, key=lambda rank: (order.get(failures[rank].exitcode, 1), rank))
    culprit = failures[rank]
    code, file = culprit.exitcode, logs.file(rank)
    how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code} ({signal.Signals(-code).name})"
    todo = "see what it said" + " above" * (rank == 0)
    if code == -signal.SIGKILL:
        todo = "if nobody killed it, memory ran out (see dmesg)"
    if rank != 0 and logs.repeats(rank):
        todo = "see what rank 0 said above: it is the same"
    elif rank != 0:
        lines = file.read_text(errors="replace").splitlines()[-12:]
        todo += "; its log " + ("ends with" if lines else "is empty") + "".join(f"\n    | {line}" for line in lines)
    kind = ConfigError if code == ConfigError.exit_code else EngineError
    return kind(f"rank {rank} on {host} {how}; log {file}", "every process to end with exit code 0", todo)


def main(argv: list[str] | None = None) -> int:
    """The launcher's command line; returns the exit code (of the process at fault: 2 bad input, 1 any other)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        return run(parse(argv))
    except GlimmerError as error:
        print(f"msrun_launcher: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nmsrun_launcher: interrupted", file=sys.stderr)
        return 130
