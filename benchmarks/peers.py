"""glimmer and transformers on the same checkpoint, one after the other on the same machine, as a table of ratios.

usage: peers.py MODEL [--rounds N] [--write] [options of `glimmer bench`: --prefill, --decode, --steps]

Absolute figures of one machine and one hour mean little; the ratio within one run means something. Each round runs
glimmer, then the peer; the table shows medians over the rounds. --write puts it into README.md between its marks.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"


def run(*command: str) -> dict:
    """The JSON line that a benchmark ends with."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def processor() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.*)", info)
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{f}\b", info)]
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {' '.join(flags)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    args, options = parser.parse_known_args()
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(run("-m", "glimmer", "bench", args.model, *options))
        theirs.append(run(str(HERE / "time_transformers.py"), args.model, *options))
    median = lambda runs, key: statistics.median(r[key] for r in runs)
    lines = [
        f"`{Path(args.model).name}`, {datetime.date.today()}, {processor()}; medians of {args.rounds}.",
        "",
        f"| | glimmer | {theirs[0]['engine']} | glimmer is |",
        "|---|---:|---:|---:|",
    ]
    for key in (k for k in ours[0] if k in theirs[0] and k != "engine"):
        a, b = median(ours, key), median(theirs, key)
        better = b / a if key in ("load_s", "peak_memory_gib") else a / b
        what, _, number = key.partition("_")
        name = {
            "load": "load, s",
            "peak": "peak memory, GiB",
            "prefill": f"prefill of {number} tokens, tokens/s",
            "decode": f"decode, batch {number[1:]}, tokens/s",
        }[what]
        lines.append(f"| {name} | {a:,.2f} | {b:,.2f} | {better:.2f}x |")
    table = "\n".join(lines)
    print(table)
    print(json.dumps({"glimmer": ours, "transformers": theirs}))
    if args.write:
        readme = HERE.parent / "README.md"
        text = readme.read_text()
        head, tail = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        readme.write_text(f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{tail}")


main()
