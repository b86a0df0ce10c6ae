"""How fast glimmer decodes beside other programs that compute, with few threads and with many.

usage: busy.py [MODEL] [--loops 0 1 2 4] [--threads 1 2] [--rounds N] [--quantization int8]

Beside each number of endless loops, each a process of its own, engines with each number of threads decode one sequence
in turn, a second at a time. The table shows medians in tokens per second, and in brackets their ratio to the best
number of threads beside as many loops. Every model is in memory once for each number of threads. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from peers import processor

from glimmer import LLM, SamplingParams
from glimmer import device as devices

DEMO = Path(__file__).resolve().parents[1] / "glimmer/demo"
PROMPT, MAX_STEPS = 16, 2048  # tokens of a prompt; steps of a burst at most


class Over(Exception):
    """The burst has lasted long enough."""


def decode(llm: LLM, seconds: float) -> float:
    """Tokens per second of one sequence, over about so many seconds."""
    marks: list[float] = []  # the ends of the steps, without the first, which computes the prompt

    def mark(new: int) -> None:
        marks.append(time.perf_counter())
        if marks[-1] - marks[0] > seconds and len(marks) > 2:
            raise Over

    try:
        params = SamplingParams(temperature=0, max_tokens=MAX_STEPS, ignore_eos=True)
        llm.generate({"prompt_token_ids": [3] * PROMPT}, params, on_step=mark)
    except Over:
        pass  # the sequence has been aborted
    return (len(marks) - 1) / (marks[-1] - marks[0])


def beside(loops: int, engines: dict[int, LLM], rounds: int, seconds: float) -> dict[int, float]:
    """The median speed of each engine beside so many loops."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(loops)]
    try:
        found: dict[int, list[float]] = {threads: [] for threads in engines}
        for i in range(rounds):
            for threads in sorted(engines, reverse=bool(i % 2)):
                found[threads].append(decode(engines[threads], seconds))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return {threads: statistics.median(rates) for threads, rates in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--loops", nargs="+", type=int, default=[0, 1, 2, 4], metavar="K")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, devices.available_cpus()}), metavar="N")
    parser.add_argument("--rounds", type=int, default=7, help="bursts of each engine beside each number of loops")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a burst lasts")
    parser.add_argument("--quantization", help="int8 or int4")
    args = parser.parse_args()
    engines = {
        threads: LLM(
            args.model, threads=threads, quantization=args.quantization, max_model_len=PROMPT + MAX_STEPS,
            max_num_seqs=1, enable_prefix_caching=False, skip_tokenizer_init=True, speculative_config="off",
        )
        for threads in args.threads
    }  # fmt: skip
    for llm in engines.values():
        decode(llm, args.seconds)
    print(f"{Path(args.model).resolve().name} on {processor()}; medians of {args.rounds}, tokens/s.\n")
    print(f"| loops |{'|'.join(f' threads={threads} ' for threads in engines)}|")
    print(f"|---:|{'---:|' * len(engines)}")
    results = {}
    for loops in args.loops:
        rates = results[loops] = beside(loops, engines, args.rounds, args.seconds)
        best = max(rates.values())
        print(f"| {loops} |{'|'.join(f' {r:,.1f} ({r / best:.2f}x) ' for r in rates.values())}|", flush=True)
    print(json.dumps({"model": args.model, "quantization": args.quantization, "tokens_per_s": results}))


if __name__ == "__main__":
    main()
