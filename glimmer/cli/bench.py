"""`glimmer bench MODEL`: loading, prefill and decode on this machine, as a table and as one JSON line.

Prompts are random token ids, so that any checkpoint will do; answers are greedy and ignore the end of sequence. Prefill
is timed as one prompt to its first token, the best of a few; decode as steps of B sequences after prompts of --context
tokens. Beside each figure the machine's limits are measured, and the work of such steps is counted: the bytes of
weights and cache that they must read, the operations of their products. Each is shown in percent of what the limits
allow, and `predicted` is what glimmer plan would say. Figures of different machines, or of different hours on a shared
one, are not comparable: quote ratios within one run.

All of this is measured without drafts. --speculative adds what these bring (gain.py).
"""

import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glimmer.cli import demo, exits, gain
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, Command, Option, count, counts, truth, without
from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError

if TYPE_CHECKING:
    from glimmer import llm, parallel
    from glimmer.cli import machine as machines
    from glimmer.engine.profile import Profile
    from glimmer.llm import LLM
else:
    llm, parallel = lazy("glimmer.llm"), lazy("glimmer.parallel")
    machines = lazy("glimmer.cli.machine")

PREFILL = (512, 2048)
DECODE = (1, 8, 32)
CONTEXT = 64  # tokens before decoding
WARM, STEPS, COUNTED = 4, 32, 8  # decode steps that pass by, are timed, and are profiled after that
CHUNK = 2048  # tokens of prompts computed in one step
REPEAT = 2  # prefills of each length
# Characters of the longest bar; the share of a step below which a part has no line of its own.
BAR, MIN_SHARE = 40, 0.005


ENGINE_OPTIONS = without(
    ENGINE, "skip_tokenizer_init", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching"
)
COMMAND = Command(
    "bench",
    "Loading, prefill and decode on this machine, as a table and as one JSON line.",
    "[MODEL] [options]",
    {
        "what is measured": {
            "prefill": Option(counts, "N ...", "prompt lengths", " ".join(map(str, PREFILL)), several=True),
            "decode": Option(counts, "B ...", "batch sizes", " ".join(map(str, DECODE)), several=True),
            "context": Option(count, "N", "tokens before decoding", str(CONTEXT)),
            "steps": Option(count, "N", "decode steps to time", str(STEPS)),
            "repeat": Option(count, "N", "prefills of each length; the best counts", str(REPEAT)),
            "profile": Option(truth, "", "show where the time of each figure's steps goes"),
            "speculative": Option(truth, "", "show what drafts bring, for each batch size of --decode"),
        },
        "engine": ENGINE_OPTIONS,
    },
    positional=("model",),
)


@dataclass
class Figure:
    """`tokens` in `seconds`; where it is wanted, a profile of `seen` times that; the machine's limits just then."""

    key: str
    what: str
    tokens: int
    seconds: float
    seen: int
    profile: "Profile | None"
    limits: dict[str, float] | None = None
    predicted: float | None = None  # tokens/s that the cost model of `glimmer plan` expects of such work

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
    """Measure and print; ranks other than 0 take part in the steps."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    prefill, decode = settings.take("prefill", list(PREFILL)), settings.take("decode", list(DECODE))
    context, steps = settings.take("context", CONTEXT), settings.take("steps", STEPS)
    repeat, watch = settings.take("repeat", REPEAT), settings.take("profile", False)
    speculative = settings.take("speculative", False)
    lengths = [context + _answer(batch, context, steps) for batch in decode]
    engine: dict[str, Any] = {
        "tensor_parallel_size": parallel.world()[1],
        "max_model_len": max([*prefill, *lengths, gain.CONTEXT if speculative else 16]) + 1,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": max([*decode, 1]),
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    engine |= settings.fields(ENGINE_OPTIONS)
    if "model" not in engine:
        engine["model"] = str(demo.default_model(COMMAND.name))
    if speculative:
        engine["skip_tokenizer_init"] = not (Path(engine["model"]) / "tokenizer.json").is_file()
    else:
        engine["speculative_config"] = "off"
    settings.check(EngineConfig, engine)
    begin = time.perf_counter()
    model = llm.LLM(**engine)
    if model.rank != 0:
        model.follow()
        model.close()
        return 0
    load, load_peak = time.perf_counter() - begin, model.peak_memory()
    prompts = random.Random(1)
    _prefill(model, prompts, 16)
    watched = watch or model.limits() is not None
    figures = []
    with model.without_drafts():
        for length in prefill:
            figures.append(_best_prefill(model, prompts, length, repeat, watched))
            figures[-1].limits = _limits(model, figures[-1].profile)
        for batch in decode:
            figures.append(_decode(model, prompts, batch, context, steps, watched))
            figures[-1].limits = _limits(model, figures[-1].profile)
    gains = [gain.measure(model, prompts, batch) for batch in decode] if speculative and model.drafts else []
    memory = {"load_s": load, "load_peak_memory_gib": load_peak / 2**30, "peak_memory_gib": model.peak_memory() / 2**30}
    for figure in figures:
        figure.predicted = _predicted(figure)
    _print(model, figures, memory, watch, gains if speculative else None)
    model.close()
    return 0


def _limits(model: "LLM", profile: "Profile | None") -> dict[str, float] | None:
    """What the machine can do just then; its disk too, where experts were read from it."""
    limits = model.limits()
    if limits is not None and profile is not None and profile.missed:
        reads = machines.disk_of(Path(model.config.model), None).reads(profile.expert_bytes)
        limits |= {} if reads is None else {"first_read": reads[0], "further_read": reads[1]}
    return limits


def _predicted(figure: Figure) -> float | None:
    """After the peak of memory has been read, since it takes some."""
    profile, limits = figure.profile, figure.limits
    if profile is None or limits is None or (profile.missed and "first_read" not in limits):
        return None
    return figure.tokens * figure.seen / profile.expected(limits, figure.key.startswith("decode"))


def _prompt(model: "LLM", source: random.Random, length: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [source.randrange(3, model.model_config.vocab_size) for _ in range(length)]}


def _prefill(model: "LLM", source: random.Random, length: int) -> float:
    """Seconds from one prompt to its first token."""
    prompt = _prompt(model, source, length)
    begin = time.perf_counter()
    model.generate(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return time.perf_counter() - begin


def _best_prefill(model: "LLM", source: random.Random, length: int, repeat: int, watched: bool) -> Figure:
    """The best of `repeat`, the first of which is profiled."""
    with ExitStack() as open_:
        profile = open_.enter_context(model.profile()) if watched else None
        seconds = [_prefill(model, source, length)]
    seconds += [_prefill(model, source, length) for _ in range(repeat - 1)]
    return Figure(f"prefill_{length}", f"prefill of {length:,} tokens", length, min(seconds), 1, profile)


def _answer(batch: int, context: int, steps: int) -> int:
    """Tokens of an answer that begins when its own prompt is done, and lasts until all have decoded together."""
    return 1 + batch * context // CHUNK + WARM + steps + COUNTED


def _decode(model: "LLM", source: random.Random, batch: int, context: int, steps: int, watched: bool) -> Figure:
    """Steps in which all `batch` sequences decode; `steps` are timed, COUNTED more are profiled."""
    marks: list[float] = []  # the ends of steps that brought a token to every sequence
    paged: list[tuple[int, int]] = []  # experts wanted, and missed, before and after those that are timed
    profile = model.profile() if watched else None
    with ExitStack() as open_:

        def mark(new: int) -> None:
            if new == batch:
                marks.append(time.perf_counter())
                if model.paging is not None and len(marks) in (1 + WARM, 1 + WARM + steps):
                    paged.append((model.paging.wanted, model.paging.missed))
            if profile is not None and len(marks) == 1 + WARM + steps:
                open_.enter_context(profile)
            elif len(marks) == 1 + WARM + steps + COUNTED:
                open_.close()

        model.generate(
            [_prompt(model, source, context) for _ in range(batch)],
            SamplingParams(temperature=0, max_tokens=_answer(batch, context, steps), ignore_eos=True),
            on_step=mark,
        )
    if len(marks) < 1 + WARM + steps + COUNTED:
        raise ConfigError(
            f"{batch} sequences of {context} tokens and more do not decode together: the KV cache is too small",
            "a cache that holds all of them",
            "ask for a smaller --context, or for a smaller batch with --decode",
        )
    if profile is not None and paged:
        # Those of the timed steps: the profiled ones follow, and find more experts in memory.
        profile.wanted, profile.missed = ((end - begin) * COUNTED // steps for begin, end in zip(*paged, strict=True))
    key = f"decode_b{batch}" + (f"_after_{context}" if context != CONTEXT else "")
    what = f"decode, batch {batch}" + (f", after {context:,}" if context != CONTEXT else "")
    return Figure(key, what, batch, (marks[WARM + steps] - marks[WARM]) / steps, COUNTED, profile)


def _print(
    model: "LLM", figures: list[Figure], memory: dict[str, float], profile: bool, gains: list[gain.Gain] | None
) -> None:
    on = f"{model.group.device}, {model.size} process{'es' * (model.size > 1)}"
    on += f", {model.kernels}" if model.kernels else ""
    print(f"{model.config.model} on {on}")
    print(f"  {'load':<34}{memory['load_s']:>12,.2f} s")
    for figure in figures:
        shares = "".join(f"{value:>9.1f} % of {name}" for name, value in figure.percent.items())
        predicted = "" if figure.predicted is None else f"{figure.predicted:>12,.2f} predicted"
        print(f"  {figure.what:<34}{figure.rate:>12,.2f} tokens/s{predicted}{shares}")
    print(f"  {'peak memory of a process':<34}{memory['peak_memory_gib']:>12,.2f} GiB")
    if all(figure.limits for figure in figures):
        for name, unit in (("read", "GB/s"), ("bfloat16", "G operations/s"), ("int8", "G operations/s")):
            found = sorted(figure.limits[name] / 1e9 for figure in figures if figure.limits)
            if found:
                between = f"{statistics.median(found):>12,.1f} {unit} ({found[0]:,.1f} to {found[-1]:,.1f})"
                print(f"  {'limit beside them: ' + name:<34}{between}")
    else:
        print("  no percentages: this machine's limits are measured by the CPU kernels, which do not serve here")
    for drafted in gains or ():
        print(f"  {f'drafts, batch {drafted.batch}':<34}{drafted}")
    if gains == []:
        print("  no drafts: the model has no MTP layer, or speculation is off (--spec-method ngram needs no layer)")
    if profile:
        for figure in figures:
            if figure.profile is not None:
                _picture(figure, figure.profile)
    sys.stdout.flush()
    line: dict[str, Any] = {"engine": "glimmer", "model": model.config.model, "quantization": model.config.quantization}
    line |= {"kv_cache_dtype": model.config.kv_cache_dtype}
    line |= {"processes": model.size} | {name: round(value, 2) for name, value in memory.items()}
    line |= {figure.key: round(figure.rate, 2) for figure in figures}
    line["percent"] = {figure.key: figure.percent for figure in figures if figure.percent}
    line["predicted"] = {figure.key: round(figure.predicted, 2) for figure in figures if figure.predicted}
    line["limits"] = {figure.key: figure.limits for figure in figures if figure.limits}
    if gains is not None:
        line["speculative"] = {f"b{drafted.batch}": drafted.as_json() for drafted in gains}
    if profile:
        line["profile_ms"] = {
            figure.key: {
                name: round(part.seconds / figure.seen * 1e3, 3) for name, part in figure.profile.parts.items()
            }
            for figure in figures
            if figure.profile is not None
        }
    print(json.dumps(line))


def _picture(figure: Figure, profile: "Profile") -> None:
    """Where the time goes, as bars; beside them, how near each part is to whichever limit holds it back."""
    parts, whole = profile.parts, profile.seconds
    milliseconds = whole / figure.seen * 1e3
    print(f"\n{figure.what}: {figure.seconds * 1e3:,.2f} ms; operation by operation {milliseconds:,.2f} ms:")
    longest = max(part.seconds for part in parts.values())
    block = "█" if exits.can_show("█") else "#"
    small = sum(part.seconds for part in parts.values() if part.seconds < MIN_SHARE * whole)
    rows = [(name, part.seconds, part) for name, part in parts.items() if part.seconds >= MIN_SHARE * whole]
    for name, seconds, part in [*rows, ("all others", small, None)]:
        near = max(part.at_best(figure.limits)) / seconds if part and figure.limits else 0
        limit = f"{100 * near:>5.0f} % of its limit" if near else f"{'':19}"
        bar = block * round(BAR * seconds / longest)
        print(f"  {name:<32}{seconds / figure.seen * 1e3:>10.2f} ms{100 * seconds / whole:>6.1f} %{limit}  {bar}")
