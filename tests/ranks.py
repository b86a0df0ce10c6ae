"""One rank of a job without a model, run by test_mesh.py: does what its first argument says and prints what it found.

usage: ranks.py mesh TP EP DP | equal | models CASES | stopped | interrupted | late | left | thread store|collective
SECONDS | exit CODE
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from glimmer.config import EngineConfig
from glimmer.engine.runner import check_ranks
from glimmer.errors import ConfigError, GlimmerError
from glimmer.group import Group
from glimmer.model_config import ModelConfig
from glimmer.parallel import Mesh

CPU = torch.device("cpu")


def connected(tp: int, ep: int = 1, dp: int = 1) -> Mesh:
    return Mesh(tp, ep, dp, device=CPU, backend="gloo")


def facts(group: Group, mine: int) -> dict:
    """What a group is, and what its collectives give on this rank."""
    first, last = group.split(7)
    columns = torch.arange(7.0).expand(2, 7)[:, first:last]
    return {
        "place": [group.rank, group.size, list(group.members)],
        "sum": group.all_reduce(torch.tensor([float(mine)])).item(),
        "bfloat16": group.all_reduce(torch.full((2, 2), 0.1, dtype=torch.bfloat16)).tolist(),
        "columns": group.all_gather(columns, 7).tolist(),
        "told": group.broadcast({"from": mine, "text": "é" * 10}),
        "told long": len(group.broadcast("long" * 5000 if group.rank == 0 else None)),
        "told by the last": group.broadcast(mine, group.size - 1),
        "least": group.all_reduce_min(mine + 10),
        "experts": list(group.split(10)),
    }


def refused(group: Group, model: str, settings: dict) -> str:
    """Why the ranks may not load these models with these settings; empty if they may."""
    config = EngineConfig(model=model, tensor_parallel_size=group.size, **settings)
    try:
        check_ranks(config, ModelConfig.load(model), group, CPU)
        return ""
    except ConfigError as error:
        return error.found


def gloo_threads() -> list[str]:
    """The names of this process's threads that gloo has started."""
    names = []
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append(comm.read_text())
    return [name for name in names if "gloo" in name]


def main(what: str, *words: str) -> int:
    if what == "mesh":
        mesh, mine = connected(*map(int, words)), int(os.environ["RANK"])
        print(json.dumps({name: facts(getattr(mesh, name), mine) for name in ("world", "tp", "ep", "dp")}))
        mesh.close()
        mesh.close()  # again does nothing
        deadline = time.monotonic() + 2  # the system shows a thread for a moment after it has been joined
        while (left := gloo_threads()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, left
        return 0
    group = connected(int(os.environ["WORLD_SIZE"])).tp
    if what == "equal":
        group.check_equal({"settings": "a long value " * 100})
        group.check_equal({"first": "same", "settings": "8192" if group.rank == 2 else "4096", "last": str(group.rank)})
    elif what == "models":  # CASES: for each case the [directory, settings] of each rank
        print(json.dumps([refused(group, *case[group.rank]) for case in json.loads(words[0])]))
    elif what == "late":
        time.sleep(group.rank)
        group.wait_for_all("has loaded", 60)
        print(json.dumps(group.all_reduce_min(group.rank)))
        if group.rank == 0:
            group.wait_for_all("has left", 0.5)
    elif what == "left":
        if group.rank == 0:
            group.close()
            sys.stdin.readline()  # it holds the meeting point
        else:
            print(group.wait_for_all("asks", 60))
    elif what == "stopped":
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if group.rank == 2:
            time.sleep(1)  # it finds out later than rank 0, at which the ranks meet
        group.all_reduce(torch.ones(4))
    elif what == "interrupted":
        os.write(1, b"up\n")  # at once: ranks share the pipe, and print may write the line's end by itself
        if group.rank == 1:
            sys.stdin.readline()
        group.all_reduce(torch.ones(4))
    elif what == "thread":
        waits = {
            "store": lambda: group.wait_for_all("comes", 60),
            "collective": lambda: group.all_reduce(torch.ones(4)),
        }

        def wait() -> None:
            with contextlib.suppress(GlimmerError):
                waits[words[0]]()

        if group.rank == 0:
            threading.Thread(target=wait, daemon=True).start()
            time.sleep(float(words[1]))  # in between rank 1 may have left, and the thread looks for who is lost
        time.sleep(1)
    elif what == "exit":
        for _ in range(5):
            group.all_reduce(torch.ones(64, 1024))
        return int(words[0])
    return 0


try:
    code = main(*sys.argv[1:])
except GlimmerError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
except KeyboardInterrupt:
    code = 130
sys.exit(code)
