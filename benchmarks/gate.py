"""The speed gate: is anything slower in one commit than in another?

usage: gate.py [BASE] [HEAD] [--rounds N] [--forms bfloat16,int8,int4,fp8] [--threshold 0.98]

Each commit is built in a directory of its own, beside the torch that is installed here. Then `glimmer bench` runs on
`air-quarter` (random weights, made in --cache where they are missing) for one commit and the other in turn, as pairs
that follow each other directly, and every second pair in reverse order, so that a machine that gets warmer or busier
harms both alike. Of each figure the median of the pairs' ratios counts: 1.05x means that HEAD is 5 % better.

Exit code 0: no figure is below the threshold. 1: at least one is; they are named. 2: there are no figures, and why.
The table is printed, and as the last line all runs as JSON. The machine must do nothing else meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from peers import Failed, cell, label, last_words, processor, ratio, run

HERE = Path(__file__).resolve().parent
FORMS = ("bfloat16", "int8", "int4", "fp8")


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


def measure(rounds: int, bench: Callable[[int], dict]) -> list[tuple[dict, dict]]:
    """(base, head) figures of each pair; bench(0) measures the base, bench(1) the head."""
    pairs = []
    for i in range(rounds):
        first = i % 2  # every second pair in reverse order
        figures = {which: bench(which) for which in (first, 1 - first)}
        pairs.append((figures[0], figures[1]))
    return pairs


def compare(pairs: list[tuple[dict, dict]]) -> dict[str, list[float]]:
    """Of each figure that all runs have: the pairs' ratios, each of which says how many times better the head is."""
    keys = [key for key in pairs[0][0] if key.startswith(("load_s", "prefill_", "decode_", "peak_memory_gib"))]
    keys = [key for key in keys if all(isinstance(figures.get(key), int | float) for pair in pairs for figures in pair)]
    return {key: [ratio(key, head[key], base[key]) for base, head in pairs] for key in keys}


def slower(ratios: dict[str, list[float]], threshold: float) -> list[str]:
    """The figures whose median ratio is below the threshold."""
    return [key for key, found in ratios.items() if statistics.median(found) < threshold]


def table(form: str, pairs: list[tuple[dict, dict]], threshold: float) -> list[str]:
    """A Markdown table: medians of both commits, the median ratio and how far the ratios of single pairs spread."""
    ratios = compare(pairs)
    below = slower(ratios, threshold)
    lines = [f"**{form}**", "", "| | base | head | head is | pairs from | to | |", "|---|---:|---:|---:|---:|---:|---|"]
    for key, found in ratios.items():
        base, head = (statistics.median(pair[which][key] for pair in pairs) for which in (0, 1))
        spread = f"**{statistics.median(found):.3f}x** | {min(found):.3f}x | {max(found):.3f}x"
        lines.append(f"| {label(key)} | {cell(base)} | {cell(head)} | {spread} | {'slower' if key in below else ''} |")
    return [*lines, ""]


def main() -> int:
    """Build, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="HEAD^", help="the commit to compare with")
    parser.add_argument("head", nargs="?", default="HEAD", help="the commit that must not be slower")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs for each form")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {', '.join(FORMS)}, with commas")
    parser.add_argument("--threshold", type=float, default=0.98, help="the lowest ratio that passes")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/glimmer-benchmarks", help="for all files")
    parser.add_argument("--prefill", nargs="*", default=["512", "2048"], metavar="N", help="prompt lengths")
    parser.add_argument("--decode", nargs="*", default=["1", "8", "32"], metavar="B", help="batch sizes")
    parser.add_argument("--steps", default="32", help="decode steps to time")
    parser.add_argument("--repeat", default="2", help="prefills of each length; the best counts")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run")
    args = parser.parse_args()
    forms = args.forms.split(",")
    if unknown := set(forms) - set(FORMS):
        parser.error(f"no form {', '.join(sorted(unknown))}; there are {', '.join(FORMS)}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    options = ["--prefill", *args.prefill, "--decode", *args.decode, "--steps", args.steps, "--repeat", args.repeat]
    try:
        args.cache = args.cache.resolve()
        args.cache.mkdir(parents=True, exist_ok=True)
        commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (args.base, args.head)]
        packages = [build(commit, args.cache) for commit in commits]
        check_builds(packages, args.cache)
        models = checkpoints(args.cache, forms)
        results = {}
        for form in forms:
            quantized = ["--quantization", form] if form in ("int8", "int4") else []
            command = [sys.executable, "-S", "-P", "-m", "glimmer", "bench", str(models[form]), *options, *quantized]

            def bench(which: int, form: str = form, command: list[str] = command) -> dict:
                print(f"{form}, {('base', 'head')[which]}", file=sys.stderr, flush=True)
                return run(command, args.timeout, env=environment(packages[which]), cwd=args.cache)

            results[form] = measure(args.rounds, bench)
    except Failed as failed:
        print(f"gate.py: {failed}", file=sys.stderr)
        return 2
    print(f"{commits[1][:12]} beside {commits[0][:12]} on {processor()}; medians of {args.rounds} pairs.\n")
    below = []
    for form, pairs in results.items():
        print("\n".join(table(form, pairs, args.threshold)))
        below += [f"{label(key)}, {form}" for key in slower(compare(pairs), args.threshold)]
    print(f"below {args.threshold}x: {'; '.join(below)}" if below else f"nothing is below {args.threshold}x")
    print(json.dumps({"base": commits[0], "head": commits[1], "pairs": results}))
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
