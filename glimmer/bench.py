"""`glimmer bench MODEL`: loading, prefill and decode on this machine, as a table and as one JSON line.

Prompts are random token ids, so that any checkpoint will do; answers are greedy and ignore the end of sequence. Prefill
is timed as one prompt to its first token, the best of a few; decode as steps of B sequences after prompts of --context
tokens. Beside each figure the machine's limits are measured, and the work of such steps is counted: the bytes of
weights and cache that they must read, the operations of their products. Each is shown in percent of what the limits
allow. Figures of different machines, or of different hours on a shared one, are not comparable: quote ratios within
one run.
"""

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass

from glimmer.config import SamplingParams
from glimmer.errors import ConfigError
from glimmer.llm import LLM, Profile
from glimmer.showcase import default_model

PREFILL = (512, 2048)
DECODE = (1, 8, 32)
CONTEXT = 64  # tokens before decoding
WARM, STEPS, COUNTED = 4, 32, 8  # decode steps that pass by, are timed, and are profiled after that
CHUNK = 2048  # tokens of prompts computed in one step
BAR, LEAST = 40, 0.005  # characters of the longest bar; the share of a step below which a part has no line of its own


@dataclass
class Figure:
    """`tokens` in `seconds`; where it is wanted, a profile of `seen` times that; the machine's limits just then."""

    key: str
    what: str
    tokens: int
    seconds: float
    seen: int
    profile: Profile | None
    limits: dict[str, float] | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def percent(self) -> dict[str, float]:
        """{"bandwidth", "arithmetic"}: what the work counted would take at the limits, in percent of what it took."""
        if self.profile is None or self.limits is None:
            return {}
        best = (100 * seconds / self.seen for seconds in self.profile.total.at_best(self.limits))
        return {name: round(value / self.seconds, 1) for name, value in zip(("bandwidth", "arithmetic"), best)}


def main(argv: list[str]) -> int:
    """Measure and print; rank 0 speaks."""
    parser = argparse.ArgumentParser("glimmer bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="a Hugging Face directory (the demo model)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="quantise while loading (as stored)")
    parser.add_argument("--group-size", type=int, help="with int4: inputs that share a scale (32)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto (the model's dtype) or int8")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or npu")
    parser.add_argument("--threads", type=_count, help="CPU threads of each process (its part of the CPUs)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="processes that torchrun started")
    parser.add_argument("--prefill", type=_count, nargs="*", default=PREFILL, metavar="N", help="prompt lengths")
    parser.add_argument("--decode", type=_count, nargs="*", default=DECODE, metavar="B", help="batch sizes")
    parser.add_argument("--context", type=_count, default=CONTEXT, metavar="N", help="tokens before decoding (64)")
    parser.add_argument("--steps", type=_count, default=STEPS, help="decode steps to time")
    parser.add_argument("--repeat", type=_count, default=2, help="prefills of each length; the best counts")
    parser.add_argument("--profile", action="store_true", help="show where the time of each figure's steps goes")
    args = parser.parse_args(argv)
    lengths = [args.context + _answer(batch, args.context, args.steps) for batch in args.decode]
    begin = time.perf_counter()
    llm = LLM(
        args.model or str(default_model()),
        dtype=args.dtype,
        quantization=args.quantization,
        group_size=args.group_size,
        kv_cache_dtype=args.kv_cache_dtype,
        device=args.device,
        threads=args.threads,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=max([*args.prefill, *lengths, 16]) + 1,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=max([*args.decode, 1]),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    load, load_peak = time.perf_counter() - begin, llm.peak_memory()
    prompts = random.Random(1)
    _prefill(llm, prompts, 16)
    watched = args.profile or llm.limits() is not None
    figures = []
    for length in args.prefill:
        figures.append(_best_prefill(llm, prompts, length, args.repeat, watched))
        figures[-1].limits = llm.limits()
    for batch in args.decode:
        figures.append(_decode(llm, prompts, batch, args.context, args.steps, watched))
        figures[-1].limits = llm.limits()
    memory = {"load_s": load, "load_peak_memory_gib": load_peak / 2**30, "peak_memory_gib": llm.peak_memory() / 2**30}
    if llm.rank == 0:
        _print(llm, figures, memory, args.profile)
    llm.close()
    return 0


def _count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, where a whole number from 1 on is expected")
    return int(text)


def _prompt(llm: LLM, source: random.Random, length: int) -> dict:
    return {"prompt_token_ids": [source.randrange(3, llm.model_config.vocab_size) for _ in range(length)]}


def _prefill(llm: LLM, source: random.Random, length: int) -> float:
    """Seconds from one prompt to its first token."""
    prompt = _prompt(llm, source, length)
    begin = time.perf_counter()
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return time.perf_counter() - begin


def _best_prefill(llm: LLM, source: random.Random, length: int, repeat: int, watched: bool) -> Figure:
    """The best of `repeat`, the first of which is profiled."""
    with ExitStack() as open_:
        profile = open_.enter_context(llm.profile()) if watched else None
        seconds = [_prefill(llm, source, length)]
    seconds += [_prefill(llm, source, length) for _ in range(repeat - 1)]
    return Figure(f"prefill_{length}", f"prefill of {length:,} tokens", length, min(seconds), 1, profile)


def _answer(batch: int, context: int, steps: int) -> int:
    """Tokens of an answer that begins when its own prompt is done, and lasts until all have decoded together."""
    return 1 + batch * context // CHUNK + WARM + steps + COUNTED


def _decode(llm: LLM, source: random.Random, batch: int, context: int, steps: int, watched: bool) -> Figure:
    """Steps in which all `batch` sequences decode; `steps` are timed, COUNTED more are profiled."""
    marks: list[float] = []  # the ends of steps that brought a token to every sequence
    profile = llm.profile() if watched else None
    with ExitStack() as open_:

        def mark(new: int) -> None:
            if new == batch:
                marks.append(time.perf_counter())
            if watched and len(marks) == 1 + WARM + steps:
                open_.enter_context(profile)
            elif len(marks) == 1 + WARM + steps + COUNTED:
                open_.close()

        llm.generate(
            [_prompt(llm, source, context) for _ in range(batch)],
            SamplingParams(temperature=0, max_tokens=_answer(batch, context, steps), ignore_eos=True),
            on_step=mark,
        )
    if len(marks) < 1 + WARM + steps + COUNTED:
        raise ConfigError(
            f"{batch} sequences of {context} tokens and more do not decode together: the KV cache is too small",
            "room for all of them",
            "ask for a smaller --context, or for a smaller batch with --decode",
        )
    key = f"decode_b{batch}" + (f"_after_{context}" if context != CONTEXT else "")
    what = f"decode, batch {batch}" + (f", after {context:,}" if context != CONTEXT else "")
    return Figure(key, what, batch, (marks[WARM + steps] - marks[WARM]) / steps, COUNTED, profile)


def _print(llm: LLM, figures: list[Figure], memory: dict[str, float], profile: bool) -> None:
    on = f"{llm.group.device}, {llm.size} process{'es' * (llm.size > 1)}" + (f", {llm.kernels}" if llm.kernels else "")
    print(f"{llm.config.model} on {on}")
    print(f"  {'load':<34}{memory['load_s']:>12,.2f} s")
    for figure in figures:
        shares = "".join(f"{value:>9.1f} % of {name}" for name, value in figure.percent.items())
        print(f"  {figure.what:<34}{figure.rate:>12,.2f} tokens/s{shares}")
    print(f"  {'peak memory of a process':<34}{memory['peak_memory_gib']:>12,.2f} GiB")
    if all(figure.limits for figure in figures):
        for name, unit in (("read", "GB/s"), ("bfloat16", "G operations/s"), ("int8", "G operations/s")):
            found = sorted(figure.limits[name] / 1e9 for figure in figures)
            if found:
                between = f"{statistics.median(found):>12,.1f} {unit} ({found[0]:,.1f} to {found[-1]:,.1f})"
                print(f"  {'limit beside them: ' + name:<34}{between}")
    else:
        print("  no percentages: this machine's limits are measured by the CPU kernels, which do not serve here")
    if profile:
        for figure in figures:
            _picture(figure)
    sys.stdout.flush()
    line = {"engine": "glimmer", "model": llm.config.model, "quantization": llm.config.quantization}
    line |= {"kv_cache_dtype": llm.config.kv_cache_dtype}
    line |= {"processes": llm.size} | {name: round(value, 2) for name, value in memory.items()}
    line |= {figure.key: round(figure.rate, 2) for figure in figures}
    line["percent"] = {figure.key: figure.percent for figure in figures if figure.percent}
    line["limits"] = {figure.key: figure.limits for figure in figures if figure.limits}
    if profile:
        milliseconds = lambda figure, part: round(part.seconds / figure.seen * 1e3, 3)
        line["profile_ms"] = {
            figure.key: {name: milliseconds(figure, part) for name, part in figure.profile.parts.items()}
            for figure in figures
        }
    print(json.dumps(line))


def _picture(figure: Figure) -> None:
    """Where the time goes, as bars; beside them, how near each part is to whichever limit holds it back."""
    parts, whole = figure.profile.parts, figure.profile.seconds
    milliseconds = whole / figure.seen * 1e3
    print(f"\n{figure.what}: {figure.seconds * 1e3:,.2f} ms; operation by operation {milliseconds:,.2f} ms:")
    longest = max(part.seconds for part in parts.values())
    small = sum(part.seconds for part in parts.values() if part.seconds < LEAST * whole)
    rows = [(name, part.seconds, part) for name, part in parts.items() if part.seconds >= LEAST * whole]
    for name, seconds, part in [*rows, ("all others", small, None)]:
        near = max(part.at_best(figure.limits)) / seconds if part and figure.limits else 0
        limit = f"{100 * near:>5.0f} % of its limit" if near else f"{'':19}"
        bar = "█" * round(BAR * seconds / longest)
        print(f"  {name:<32}{seconds / figure.seen * 1e3:>10.2f} ms{100 * seconds / whole:>6.1f} %{limit}  {bar}")
