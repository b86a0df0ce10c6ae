"""What the tests of the launcher share: the guide's commands word for word, and how jobs are started and watched."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ONE = r"""bash scripts/msrun_launcher.sh "run_mindformer.py \
 --config configs/glm4_moe/predict_glm4_moe.yaml \
 --run_mode predict \
 --use_parallel True \
 --pretrained_model_dir '/path/hf_dir' \
 --parallel_config.data_parallel 1 \
 --parallel_config.model_parallel 8 \
 --predict_data '请介绍一下北京'" 8
"""
BATCH = r"""bash scripts/msrun_launcher.sh "run_mindformer.py \
 --config configs/glm4_moe/predict_glm4_moe.yaml \
 --run_mode predict \
 --predict_batch_size 4 \
 --use_parallel True \
 --pretrained_model_dir '/path/hf_dir' \
 --parallel_config.data_parallel 1 \
 --parallel_config.model_parallel 8 \
 --predict_data path/to/input_predict_data.txt" 8
"""
MACHINES = r"""bash scripts/msrun_launcher.sh "run_mindformer.py \
 --config configs/glm4_moe/predict_glm4_moe.yaml \
 --run_mode predict \
 --use_parallel True \
 --pretrained_model_dir '/path/hf_dir' \
 --parallel_config.data_parallel 1 \
 --parallel_config.model_parallel 16 \
 --predict_data 请介绍一下北京" $worker_num $local_worker $master_ip $port $node_rank output/msrun_log False 300
"""


def build_checkout(directory: Path) -> Path:
    """Make `directory` look like this checkout to the guide's commands; it will get their logs and results."""
    for name in ("scripts", "configs", "run_mindformer.py", "glimmer"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def launcher(*words: str) -> str:
    """The launcher with these arguments, as a shell command."""
    return "bash scripts/msrun_launcher.sh " + " ".join(f"'{word}'" for word in words)


def script(checkout: Path, body: str) -> None:
    """Write worker.py, a worker without a model, which starts in no time."""
    (checkout / "worker.py").write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + body)


class Jobs:
    """Shell commands running in `checkout`, each in front of `prefix`; `kill` ends whatever is left of them."""

    def __init__(self, checkout: Path):
        self.checkout = checkout
        self.running: list[subprocess.Popen] = []

    def start(self, command: str, prefix: Sequence[str] = (), before: str = "", **variables: str) -> subprocess.Popen:
        """Run `before` and then the command, which takes the shell's place."""
        env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
        words = [*prefix, "bash", "-c", f"{before}exec {command}"]
        self.running.append(subprocess.Popen(words, cwd=self.checkout, env=env, stdout=-1, stderr=-1, text=True))
        return self.running[-1]

    def kill(self) -> None:
        """End what has not ended by itself."""
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.communicate()


# A line with which torchrun tells of its own troubles: its agents leave one after the other, and one that asks the
# first of them for the last time may find that it has gone.
OF_TORCHRUN = re.compile(r"^[EW]\d{4} .* torch/distributed/elastic/.*$", re.MULTILINE)


def ended(process: subprocess.Popen, timeout: float = 100) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) at its end, in which nobody wants to see a traceback of ours."""
    out, err = process.communicate(timeout=timeout)
    assert "Traceback" not in OF_TORCHRUN.sub("", out + err), out + err
    return process.returncode, out, err


def until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def processes_in(directory: Path) -> list[int]:
    """Every process that works in `directory`."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.resolve(strict=True) == directory.resolve():
                found.append(int(link.parent.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def rank_in(directory: Path, rank: int) -> int:
    """The process of that rank, and none that it has started: their numbers may be lower."""
    mark, parents = f"\0RANK={rank}\0".encode(), {}
    for process in processes_in(directory):
        try:
            if mark in b"\0" + Path(f"/proc/{process}/environ").read_bytes():
                stat = Path(f"/proc/{process}/stat").read_text()
                parents[process] = int(stat.rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    (found,) = (process for process, parent in parents.items() if parent not in parents)
    return found
