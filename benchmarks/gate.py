"""The speed gate: is anything slower in one commit than in another?

usage: gate.py [BASE] [HEAD] [--processes N] [--pairs N] [--starts N] [--forms bfloat16,int8,int4,fp8]
               [--threshold 0.98]

Each commit is built in a directory of its own, beside the torch that is installed here, and computes on `air-quarter`
(random weights, made in --cache where they are missing). First a few processes of one commit and the other are started
in turn: they give the time of loading and the peak memory. Then one process of each stays in memory, and the two
compute short bursts in turn, as pairs that follow each other directly, every second pair in reverse order: what the
machine does in another second, or to both, does not count. The process whose turn it is not sleeps. Which physical
pages a process has got makes it a few percent faster or slower for as long as it lives, so several such pairs of
processes take part one after the other. Of each figure the median of all pairs' ratios counts: 1.05x means that HEAD
is 5 % better.

Exit code 0: no figure is below the threshold. 1: at least one is; they are named. 2: there are no figures, and why.
The table is printed, and as the last line all figures as JSON. Two models must fit into memory at once. The machine
should do nothing else meanwhile: what others do makes the quartiles wider.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from peers import Failed, cell, label, last_words, processor, ratio

from glimmer import device as devices

HERE = Path(__file__).resolve().parent
FORMS = ("bfloat16", "int8", "int4", "fp8")
MEMORY = 1 / 1.02  # the lowest ratio of peak memory that passes
MIN_STEPS, MAX_STEPS = 8, 256  # decode steps of a burst
PAUSE = 0.02  # seconds between bursts: the threads of the one before sleep by then
Pairs = list[tuple[float, float]]  # (base, head)


def git(*words: str) -> str:
    """The output of a git command in this repository."""
    done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"git {' '.join(words)}: {last_words(done)}")
    return done.stdout.strip()


def build(commit: str, cache: Path) -> Path:
    """The directory that holds the installed package of this commit; built there unless it has been."""
    target = cache / "builds" / commit
    if (target / "ready").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    tree = cache / "trees" / commit
    git("worktree", "add", "--force", "--detach", str(tree), commit)
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--target", target, tree], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"{commit[:12]} cannot be built: {last_words(done)}")
    finally:
        git("worktree", "remove", "--force", str(tree))
    (target / "ready").touch()
    return target


def checkpoints(cache: Path, forms: list[str]) -> dict[str, Path]:
    """The directory that each form is measured on; made where it is missing, under another name until it is whole."""
    found = {}
    for form in forms:
        name = "air-quarter-fp8" if form == "fp8" else "air-quarter"
        directory = cache / name
        if not directory.exists():
            unfinished = cache / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            source = [checkpoints(cache, ["bfloat16"])["bfloat16"]] if form == "fp8" else []
            script = HERE / ("make_fp8.py" if form == "fp8" else "make_checkpoint.py")
            done = subprocess.run([sys.executable, script, *source, unfinished], capture_output=True, text=True)
            if done.returncode != 0:
                raise Failed(f"{name} cannot be made: {last_words(done)}")
            unfinished.rename(directory)
        found[form] = directory
    return found


def environment(package: Path) -> dict[str, str]:
    """Variables with which `python -S -P` imports glimmer from `package`, and everything else from where it is here."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(package), *(p for p in sys.path if "site-packages" in p)])}


def check_builds(packages: list[Path], cache: Path) -> None:
    """Failed unless each build is what its Python imports, and all or none of them have kernels."""
    for package in packages:
        command = [sys.executable, "-S", "-P", "-c", "import glimmer; print(glimmer.__file__)"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(package), cwd=cache)
        if Path(done.stdout.strip()) != package / "glimmer/__init__.py":
            raise Failed(f"glimmer is imported from {done.stdout.strip() or last_words(done)} instead of {package}")
    kernels = [bool(list(package.glob("glimmer/_native*.so"))) for package in packages]
    if any(kernels) != all(kernels):
        raise Failed(
            f"only {packages[kernels.index(True)].name[:12]} was built with kernels: see what the compiler said"
        )


class Child:
    """A process of one build that has a model in memory: see gate_child.py. load_s: how long that took."""

    def __init__(self, package: Path, model: Path, form: str, args: argparse.Namespace):
        command = [sys.executable, "-S", "-P", HERE / "gate_child.py", model, "--steps", MAX_STEPS]
        command += ["--prefill", *args.prefill, "--decode", *args.decode]
        command += ["--quantization", form] if form in ("int8", "int4") else []
        self.timeout = args.timeout
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (close closes it)
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment(package), cwd=args.cache,
        )  # fmt: skip
        try:
            self.load_s = self._answer()["load_s"]
        except BaseException:
            self.close()
            raise

    def ask(self, *words: object) -> float:
        """The figure that this line of words is answered with."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: no answer comes, and its last words tell why
            print(*words, file=self.process.stdin, flush=True)
        return next(iter(self._answer().values()))

    def _answer(self) -> dict:
        timer = threading.Timer(self.timeout, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        code = self.process.wait()
        if code == -signal.SIGKILL:
            raise Failed(f"killed: by this program after {self.timeout:g} s, or by the system for its memory")
        self.errors.seek(0)
        raise Failed(f"exit code {code}: {last_words(subprocess.CompletedProcess([], code, '', self.errors.read()))}")

    def close(self) -> None:
        """Let it end, and wait for that."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def measure(count: int, burst: Callable[[int], object]) -> list[tuple]:
    """`count` pairs of (base, head); burst(0) measures the base, burst(1) the head."""
    pairs = []
    for i in range(count):
        first = i % 2  # every second pair in reverse order
        found = {which: burst(which) for which in (first, 1 - first)}
        pairs.append((found[0], found[1]))
    return pairs


def starts(start: Callable[[int], Child], args: argparse.Namespace) -> dict[str, Pairs]:
    """Pairs of loading time and of peak memory, which the longest prompt and the largest batch have been part of."""

    def burst(which: int) -> tuple[float, float]:
        with start(which) as child:
            for what, numbers, count in (("prefill", args.prefill, 1), ("decode", args.decode, MIN_STEPS)):
                if numbers:
                    child.ask(what, max(numbers), count)
            return child.load_s, child.ask("peak")

    pairs = measure(args.starts, burst)
    return {key: [(base[i], head[i]) for base, head in pairs] for i, key in enumerate(("load_s", "peak_memory_gib"))}


def check_memory(found: dict[str, Pairs]) -> None:
    """Failed unless both models fit into the memory that is free now, as their peaks have been."""
    wanted = max(map(sum, found["peak_memory_gib"]))
    free = devices.free_memory(devices.resolve("cpu", 0)) / 2**30
    if wanted > free:
        raise Failed(
            f"both models at once take {wanted:.1f} GiB of memory, {free:.1f} GiB are free: use another machine"
        )


def bursts(children: list[Child], args: argparse.Namespace) -> dict[str, Pairs]:
    """Pairs of tokens per second, for each length of prefill and each batch of decode."""
    found = {}
    for what, number in [("prefill", n) for n in args.prefill] + [("decode", b) for b in args.decode]:
        # The first bursts are not counted: they warm up, and their speed says how long the others must be.
        least = MIN_STEPS if what == "decode" else 1
        rate = min(child.ask(what, number, least) for child in children)
        count = min(max(round(args.seconds * rate / number), least), MAX_STEPS)

        def burst(which: int, words: tuple[str, int, int] = (what, number, count)) -> float:
            time.sleep(PAUSE)
            return children[which].ask(*words)

        found[f"{what}_{'b' * (what == 'decode')}{number}"] = measure(args.pairs, burst)
    return found


def resident(start: Callable[[int], Child], args: argparse.Namespace) -> dict[str, Pairs]:
    """The pairs of `bursts` of several pairs of processes, of which every second one starts in reverse order."""
    found: dict[str, Pairs] = {}
    for i in range(args.processes):
        first = i % 2
        with start(first) as one, start(1 - first) as other:
            for key, pairs in bursts([other, one] if first else [one, other], args).items():
                found.setdefault(key, []).extend(pairs)
    return found


def ratios(key: str, pairs: Pairs) -> list[float]:
    """Of each pair: how many times better the head is."""
    return [ratio(key, head, base) for base, head in pairs]


def quartiles(found: list[float]) -> tuple[float, float]:
    """Between these two lie half of the values."""
    low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return low, high


def slower(figures: dict[str, Pairs], threshold: float) -> list[str]:
    """The figures whose median ratio is below the threshold; of peak memory it is MEMORY."""
    least = {"peak_memory_gib": MEMORY}
    return [key for key, of in figures.items() if statistics.median(ratios(key, of)) < least.get(key, threshold)]


def table(form: str, figures: dict[str, Pairs], threshold: float) -> list[str]:
    """A Markdown table: medians of both commits, the median ratio and the quartiles of the pairs' ratios."""
    below = slower(figures, threshold)
    lines = [f"**{form}**", "", "| | base | head | head is | quartiles | | pairs | |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---|"]
    for key, pairs in figures.items():
        base, head = (cell(statistics.median(of)) for of in zip(*pairs))
        found = ratios(key, pairs)
        low, high = quartiles(found)
        spread = f"**{statistics.median(found):.3f}x** | {low:.3f}x | {high:.3f}x"
        lines.append(
            f"| {label(key)} | {base} | {head} | {spread} | {len(pairs)} | {'worse' if key in below else ''} |"
        )
    return [*lines, ""]


def main() -> int:
    """Build, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="HEAD^", help="the commit to compare with")
    parser.add_argument("head", nargs="?", default="HEAD", help="the commit that must not be slower")
    parser.add_argument("--processes", type=int, default=5, help="pairs of processes that stay in memory")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of bursts of each of them, for each figure")
    parser.add_argument("--starts", type=int, default=5, help="pairs of starts for each form")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long a burst lasts")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {', '.join(FORMS)}, with commas")
    parser.add_argument("--threshold", type=float, default=0.98, help="the lowest ratio that passes")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/glimmer-benchmarks", help="for all files")
    parser.add_argument("--prefill", nargs="*", type=int, default=[512], metavar="N", help="prompt lengths")
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 8, 32], metavar="B", help="batch sizes")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one answer of a process")
    args = parser.parse_args()
    forms = args.forms.split(",")
    if unknown := set(forms) - set(FORMS):
        parser.error(f"no form {', '.join(sorted(unknown))}; there are {', '.join(FORMS)}")
    if min(args.processes, args.pairs, args.starts) < 1:
        parser.error("--processes, --pairs and --starts must be at least 1")
    try:
        args.cache = args.cache.resolve()
        args.cache.mkdir(parents=True, exist_ok=True)
        commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (args.base, args.head)]
        packages = [build(commit, args.cache) for commit in commits]
        check_builds(packages, args.cache)
        models = checkpoints(args.cache, forms)
        results = {}
        for form in forms:

            def start(which: int, form: str = form) -> Child:
                print(f"{form}, {('base', 'head')[which]}", file=sys.stderr, flush=True)
                return Child(packages[which], models[form], form, args)

            found = starts(start, args)
            check_memory(found)
            results[form] = found | resident(start, args)
    except Failed as failed:
        print(f"gate.py: {failed}", file=sys.stderr)
        return 2
    print(f"{commits[1][:12]} beside {commits[0][:12]} on {processor()}; medians of the pairs' ratios.\n")
    below = []
    for form, figures in results.items():
        print("\n".join(table(form, figures, args.threshold)))
        below += [f"{label(key)}, {form}" for key in slower(figures, args.threshold)]
    print(f"below {args.threshold}x: {'; '.join(below)}" if below else f"nothing is below {args.threshold}x")
    print(json.dumps({"base": commits[0], "head": commits[1], "pairs": results}))
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
