"""`glimmer predict`: prompts in, text out; run_mindformer.py is its other name.

The command line says what is asked for (`read_job`), results.py reads prompts and keeps answers, and here both meet the
model: load, answer, report. Answers go to --output as each one is done, and at the end to text_generation_result.txt
and the terminal. Under torchrun every rank runs this program; rank 0 alone reads prompts, prints and writes files.
Not here: how processes are started (mindformers/launch.py, torchrun).
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from glimmer.cli import demo, exits
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, SAMPLING, Command, Option, Settings, default, path, text, truth, without
from glimmer.cli.results import Results, read_prompts, row, save
from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError, GlimmerError, RequestError
from glimmer.mindformers.options import GENERATION, KEYS, TRANSLATED, greedy, max_length, one_directory, processes

if TYPE_CHECKING:
    from glimmer import llm, parallel
else:
    llm, parallel = lazy("glimmer.llm"), lazy("glimmer.parallel")

RESULT = Path("text_generation_result.txt")
EVERY = 30.0  # seconds between lines about progress where there is no terminal
MAX_TOKENS = 512  # of an answer, where nobody says otherwise

INPUT = {
    "chat": Option(truth, "", "put each prompt through the checkpoint's chat template; raw otherwise"),
    "system": Option(text, "TEXT", "with --chat: the system message"),
    "no_think": Option(truth, "", "with --chat: ask for an answer without thinking"),
}
OUTPUT = {
    "output": Option(path, "FILE.jsonl", "one JSON object a prompt, added as each one is done"),
    "resume": Option(truth, "", "with --output: keep the rows that are there, answer the rest"),
}
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # by generation_config.json
ANSWERS = (
    without(SAMPLING, "seed", "n", "logprobs", "prompt_logprobs")
    | {name: default(SAMPLING[name], "the checkpoint's") for name in RECOMMENDED}
    | {"max_tokens": default(SAMPLING["max_tokens"], str(MAX_TOKENS))}
)
ENGINE_OPTIONS = without(ENGINE, "skip_tokenizer_init")


def _notes() -> tuple[str, ...]:
    """The end of --help: the names of MindSpore Transformers, and examples."""
    lines = ["", "the names of MindSpore Transformers, as --a.b VALUE, --a.b=VALUE or in YAML"]
    rows = {"run_mode predict": "the only value", "parallel_config.data_parallel 1": "the only value"}
    for key, translation in TRANSLATED.items():
        if key not in GENERATION and not key.startswith(("model.", "context.")):
            rows[f"{key} VALUE"] = translation.help
    lines += [f"  --{name:34}{help}" if len(name) < 34 else f"  --{name}\n{'':38}{help}" for name, help in rows.items()]
    lines += [
        "  --" + ", --".join(GENERATION),
        "  Every key and what becomes of it: docs/mindformers.md",
        "",
        "examples",
        '  glimmer predict "请介绍一下北京"',
        '  glimmer predict --model DIR --chat --no-think "Why is the sky blue?"',
        "  glimmer predict --model DIR prompts.txt --output results.jsonl --resume",
        '  torchrun --nproc-per-node 8 -m glimmer predict --model DIR "请介绍一下北京"',
        '  bash scripts/msrun_launcher.sh "run_mindformer.py --config configs/glm4_moe/predict_glm4_moe.yaml \\',
        "    --use_parallel True --pretrained_model_dir DIR --predict_data '请介绍一下北京'\" 8",
    ]
    return tuple(lines)


COMMAND = Command(
    "predict",
    "Answers prompts with a model of the GLM-4.5 family. A .txt file has one prompt a line; \\n is a new line.\n"
    f"The answers are printed as 'text_generation_text': [...] and saved in {RESULT}.",
    "[PROMPT | FILE.txt ...] [--model DIR] [options]",
    {
        "input": INPUT,
        "output": OUTPUT,
        "answers (the checkpoint's: as its generation_config.json recommends)": ANSWERS,
        "engine": ENGINE_OPTIONS,
    },
    positional=None,
    foreign=KEYS,
    notes=_notes(),
)


def main(argv: list[str], home: Path | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the engine failed, 2 bad input or a failed row, 130 Ctrl-C.

    home: the directory of the script that was started, if it was not `glimmer`. KeyboardInterrupt is raised until the
    model is being loaded; after that it is the exit code.
    """
    if COMMAND.asks_for_help(argv):
        return 0
    try:
        return exits.run(COMMAND.name, lambda: predict(argv, home))
    except Terminated:  # the process that started this one shall see that SIGTERM ended it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise


# ---------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Job:
    """What the settings ask for together.

    engine, sampling   fields of EngineConfig and SamplingParams that somebody has set
    do_sample          None: nobody has said; True: not greedy, even if generation_config.json is
    data, prompts      texts in which \\n is a new line, and texts as they are; either may name .txt files
    ignored            keys that mean nothing here
    """

    engine: dict[str, Any]
    sampling: dict[str, Any]
    do_sample: bool | None
    data: list[str]
    prompts: list[str]
    chat: bool
    system: str | None
    think: bool
    output: Path | None
    resume: bool
    ignored: list[str]


def read_job(
    settings: Settings, argv: list[str], running: int, default_model: Callable[[], Path], home: Path | None = None
) -> Job:
    """What the settings ask for in a group of `running` processes.

    argv, home: as main got them, to say how the same command is started on more processes. Raises ConfigError or
    RequestError for everything that can be refused before a model is opened.
    """
    given, take = settings.given, settings.take
    for word in settings.words:
        if Path(word[:1000]).is_dir():
            raise ConfigError(
                f"{word!r}, which is a directory, as a prompt",
                "a text, or a .txt file with one prompt a line",
                f"if it is the model, write --model {word}; if it is a prompt, write it after a lone --",
            )
    engine = settings.fields(ENGINE_OPTIONS)
    engine["model"] = one_directory(given) or str(default_model())
    engine["tensor_parallel_size"] = processes(given, running, argv, home)
    sampling = {"max_tokens": MAX_TOKENS} | settings.fields(ANSWERS)
    if greedy(given):
        sampling["temperature"] = 0.0
    length = max_length(given)
    if length is not None:
        engine["max_model_len"] = min(length, engine.get("max_model_len", length))
        sampling["max_tokens"] = None
    settings.check(EngineConfig, engine)
    settings.check(SamplingParams, sampling)
    for name, needed in (("system", "chat"), ("no_think", "chat"), ("resume", "output")):
        if take(name) and not take(needed):
            raise ConfigError(f"--{name.replace('_', '-')} without --{needed}", "both or none", f"add --{needed}")
    return Job(
        engine=engine,
        sampling=sampling,
        do_sample=take("do_sample"),
        data=take("prompts", []),
        prompts=settings.words + settings.literal,
        chat=take("chat", False),
        system=take("system"),
        think=not take("no_think", False),
        output=Path(take("output")) if take("output") else None,
        resume=take("resume", False),
        ignored=settings.ignored,
    )


# ---------------------------------------------------------------------- from the model to the answers


class Terminated(BaseException):
    """SIGTERM has come: the launcher ends the job, because another rank was lost or because it was told to."""


def _terminate(*_: object) -> None:
    raise Terminated


def predict(argv: list[str], home: Path | None) -> int:
    """Read, load, answer, report; returns the exit code.

    Raises GlimmerError and, among several ranks, Terminated, after it has said which answers are kept.
    """
    settings = COMMAND.read(argv, home)
    rank, size = parallel.world()
    logging.basicConfig(format="glimmer predict: %(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    if rank == 0 and not sys.stderr.isatty():  # a log is read later, by somebody who wants to know what ran
        logging.getLogger("glimmer").setLevel(logging.INFO)
    job = read_job(settings, argv, size, lambda: demo.default_model(COMMAND.name), home)
    progress = Progress(shown=rank == 0)
    if rank != 0:
        try:
            answer(job, Results([], None, False), progress)
        except KeyboardInterrupt:
            return exits.INTERRUPTED
        return 0
    if not os.access(RESULT.parent, os.W_OK):
        raise ConfigError(f"{Path.cwd()} cannot be written", f"a place for {RESULT}", "start the command elsewhere")
    if size > 1:
        signal.signal(signal.SIGTERM, _terminate)
    results = Results(read_prompts(job.data, job.prompts, home), job.output, job.resume)
    if results.rows:
        progress.say(f"{len(results.rows)} of {len(results.prompts)} rows are in {results.path} already")
    try:
        if results.todo or size > 1:
            answer(job, results, progress)
    except (GlimmerError, KeyboardInterrupt, Terminated) as reason:
        word = "interrupted" if isinstance(reason, KeyboardInterrupt) else "stopped"
        if progress.begun and results.path is not None:
            progress.say(
                f"{word}; {len(results.rows)} of {len(results.prompts)} rows are in {results.path};"
                " the same command with --resume answers the rest"
            )
        elif progress.begun:
            progress.say(f"{word}; no answer is kept (with --output FILE.jsonl those that are done would be)")
        elif word == "interrupted":
            progress.say(word)
        if isinstance(reason, KeyboardInterrupt):
            return exits.INTERRUPTED
        raise
    return report(job, results, progress)


def answer(job: Job, results: Results, progress: "Progress") -> None:
    """Load the model and answer the prompts that have no row. Every rank calls this, and does what rank 0 tells it."""
    group = None
    if parallel.world()[1] > 1:
        group = llm.join(EngineConfig(**job.engine))
        if not group.broadcast(bool(results.todo)):  # nothing that a model would be needed for
            return group.close()
    model = llm.LLM(**job.engine, group=group, on_load=progress.loading)
    progress.loaded(" by rank 0" if model.size > 1 else "")
    for i in [i for i in results.todo if not results.prompts[i].strip()]:
        empty = RequestError("prompt", "an empty prompt", "some text", "write one, or remove the line")
        results.add(row(i, results.prompts[i], None, empty))
    task = model.group.broadcast(task_of(job, results, model.default_sampling_params()))
    here, first = engine_settings(job), task["engine"]
    for name in sorted(here.keys() | first.keys()):
        if here.get(name) != first.get(name):
            raise ConfigError(
                f"{name}={here.get(name)!r}, but {first.get(name)!r} on rank 0",
                "the same on every rank",
                "give the same command and the same YAML file on every machine",
            )
    # The row decides the randomness: an answer is the same whether the run was resumed before it or not.
    params = SamplingParams(**task["params"] | {"logit_bias": dict(task["params"]["logit_bias"])})
    each = [replace(params, seed=(model.config.seed << 32) + index) for index in task["indices"]]

    def finished(n: int, output: "llm.RequestOutput") -> None:
        if model.rank == 0:
            index = task["indices"][n]
            results.add(row(index, results.prompts[index], output, output.error))
        progress.answered()

    options: dict[str, Any] = {"errors": "return", "on_finish": finished, "on_step": progress.step}
    with progress.generating(len(each)):
        if task["chat"] and each:
            model.chat(task["inputs"], each, chat_template_kwargs=task["template"], **options)
        else:
            model.generate(task["inputs"], each, **options)
    model.close()


def task_of(job: Job, results: Results, defaults: SamplingParams) -> dict[str, Any]:
    """What rank 0 tells the others to do, in JSON's types. defaults: what the checkpoint recommends."""
    params = replace(defaults, **job.sampling)
    if job.do_sample and params.temperature == 0 and "temperature" not in job.sampling:
        params = replace(params, temperature=1.0)
    system = [{"role": "system", "content": job.system}] if job.system else []
    prompts = [results.prompts[i] for i in results.todo]
    return {
        "engine": engine_settings(job),
        "params": asdict(params) | {"logit_bias": list((params.logit_bias or {}).items())},  # JSON has no such keys
        "indices": results.todo,
        "inputs": [[*system, {"role": "user", "content": p}] for p in prompts] if job.chat else prompts,
        "chat": job.chat,
        "template": {} if job.think else {"enable_thinking": False},
    }


def engine_settings(job: Job) -> dict[str, Any]:
    """What must be alike on all ranks: everything but where the model is, and on what it runs."""
    return {name: value for name, value in job.engine.items() if name not in ("model", "device")}


def report(job: Job, results: Results, progress: "Progress") -> int:
    """Save and print all answers, in the prompts' order; the exit code says whether every prompt has one.

    They are saved first, so that a terminal or a pipe that is gone loses nothing.
    """
    answers, failed = [], 0
    for i, prompt in enumerate(results.prompts):
        row = results.rows[i]
        answers.append(row["text"] if job.chat else prompt + row["text"])
        if row["error"] is not None:
            failed += 1
            answers[-1] += f"[error: {row['error']}]"
            progress.say(f"prompt {i} failed: {row['error']}")
    save(RESULT, str([{"text_generation_text": answers}]) + "\n")
    try:
        print(f"'text_generation_text': {answers}", flush=True)
    except OSError as error:
        exits.discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # whoever closes a pipe has seen enough
            progress.say(f"the answers cannot be printed ({error.strerror}); they are in {RESULT}")
    return ConfigError.exit_code if failed else 0


class Progress:
    """Progress on stderr: bars on a terminal, single lines in a log, nothing on ranks other than 0."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.bar = tqdm(disable=True)
        self.begun = False  # answering; before that there is only loading
        self.done = self.total = self.tokens = 0
        self.begin = self.reported = time.monotonic()

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        if self.shown:
            with tqdm.external_write_mode(file=sys.stderr):
                exits.tell(f"glimmer predict: {line}")

    def loading(self, done: int, total: int) -> None:
        """As LLM's on_load: bytes."""
        if self.total != total:
            self.total, self.begin = total, time.monotonic()
            self.bar = self._bar(total=total, desc="loading", unit="B", unit_scale=True)
        self.bar.update(done - self.bar.n)

    def loaded(self, who: str) -> None:
        """The model is there."""
        self.bar.close()
        size = tqdm.format_sizeof(self.total, "B")
        self.say(f"{size} of weights loaded{who} in {time.monotonic() - self.begin:.1f} s")

    def generating(self, total: int) -> "tqdm[Any]":
        """A bar of `total` prompts, to be used in a `with`."""
        self.begun, self.total, self.begin, self.reported = True, total, time.monotonic(), time.monotonic()
        layout = "{desc}: {n_fmt}/{total_fmt} prompts |{bar:20}| {elapsed}{postfix}"
        self.bar = self._bar(total=total, desc="generating", bar_format=layout)
        return self.bar

    def step(self, new: int) -> None:
        """As LLM's on_step: tokens."""
        self.tokens += new
        now = time.monotonic()
        if now - self.reported > (EVERY if self.bar.disable else 0.2):
            self.reported = now
            self.bar.set_postfix_str(self.speed)
            if self.bar.disable:
                self.say(f"{self.done} of {self.total} prompts, {self.speed}")

    def answered(self) -> None:
        """One prompt more."""
        self.done += 1
        self.bar.update()
        if self.done == self.total:
            self.bar.close()
            self.say(f"{self.done} prompt{'s' * (self.done > 1)}, {self.speed}")

    @property
    def speed(self) -> str:
        """Tokens so far, and how fast they came."""
        seconds = max(time.monotonic() - self.begin, 1e-9)
        return f"{self.tokens} tokens in {seconds:.1f} s, {self.tokens / seconds:.1f} tokens/s"

    def _bar(self, **options: Any) -> "tqdm[Any]":
        return tqdm(disable=not (self.shown and sys.stderr.isatty()), leave=False, file=sys.stderr, **options)
