"""`glimmer predict`: prompts in, text out; run_mindformer.py is its other name.

keys.py says what is asked for, rows.py what is read and kept. Here both meet the model: load, answer, report. Answers
go to the terminal, to text_generation_result.txt, and to --output as each one is done. Under torchrun every rank runs
this program; rank 0 alone reads prompts, speaks and writes. Not here: how processes are started (launch.py).
"""

import io
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError, GlimmerError, RequestError
from glimmer.llm import LLM, RequestOutput, join
from glimmer.parallel import world
from glimmer.predict.options import ENGINE, GENERATION, INPUT, OUTPUT, SAMPLING, TRANSLATED, Plan, plan
from glimmer.predict.results import Rows, read_prompts, row, save
from glimmer.showcase import default_model

RESULT = Path("text_generation_result.txt")
EVERY = 30.0  # seconds between lines about progress where there is no terminal


def main(argv: list[str], home: Path | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the engine failed, 2 bad input or a failed row, 130 Ctrl-C.

    home: the directory of the script that was started, if it was not `glimmer`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character gets its number
            stream.reconfigure(errors="backslashreplace")
    if not {"-h", "--help"}.isdisjoint(argv):
        print(usage(), end="")
        return 0
    try:
        return predict(argv, home)
    except GlimmerError as error:
        rank, size = world()
        who = f" (rank {rank} on {socket.gethostname()})" if size > 1 else ""
        print(f"glimmer predict{who}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Terminated:  # so it was, and whoever started this process shall see it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise


class Terminated(BaseException):
    """SIGTERM has come: another rank was lost, or somebody wants the job to end."""


def _terminate(*_: object) -> None:
    raise Terminated


def predict(argv: list[str], home: Path | None) -> int:
    """Read, load, answer, report. Raises GlimmerError, KeyboardInterrupt and, among several ranks, Terminated: after a
    word about the answers so far."""
    rank, size = world()
    logging.basicConfig(format="glimmer predict: %(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    if rank == 0 and not sys.stderr.isatty():  # a log is read later, by somebody who wants to know what ran
        logging.getLogger("glimmer").setLevel(logging.INFO)
    asked = plan(argv, size, default_model, home)
    progress = Progress(shown=rank == 0)
    if rank != 0:
        answer(asked, Rows([], None, False), progress)
        return 0
    if asked.ignored:
        progress.say("these keys mean nothing here and are ignored: " + ", ".join(asked.ignored))
    if not os.access(RESULT.parent, os.W_OK):
        raise ConfigError(f"{Path.cwd()} cannot be written", f"a place for {RESULT}", "start the command elsewhere")
    if size > 1:
        signal.signal(signal.SIGTERM, _terminate)
    rows = Rows(read_prompts(asked.data, asked.prompts, home), asked.output, asked.resume)
    if rows.rows:
        progress.say(f"{len(rows.rows)} of {len(rows.prompts)} rows are in {rows.path} already")
    try:
        if rows.todo or size > 1:
            answer(asked, rows, progress)
    except (GlimmerError, KeyboardInterrupt, Terminated) as reason:
        word = "interrupted" if isinstance(reason, KeyboardInterrupt) else "stopped"
        if progress.begun and rows.path is not None:
            progress.say(
                f"{word}; {len(rows.rows)} of {len(rows.prompts)} rows are in {rows.path};"
                " the same command with --resume answers the rest"
            )
        elif progress.begun:
            progress.say(f"{word}; no answer is kept (with --output FILE.jsonl those that are done would be)")
        elif word == "interrupted":
            progress.say(word)
        raise
    return report(asked, rows, progress)


def answer(asked: Plan, rows: Rows, progress: "Progress") -> None:
    """Load the model and answer the prompts that have no row. Every rank calls this, and does what rank 0 was asked."""
    group = None
    if world()[1] > 1:
        group = join(EngineConfig(**asked.engine))
        if not group.broadcast(bool(rows.todo)):  # nothing that a model would be needed for
            return group.close()
    llm = LLM(**asked.engine, group=group, on_load=progress.loading)
    progress.loaded(" by rank 0" if llm.size > 1 else "")
    for i in [i for i in rows.todo if not rows.prompts[i].strip()]:
        empty = RequestError("prompt", "an empty prompt", "some text", "write one, or remove the line")
        rows.add(row(i, rows.prompts[i], None, empty))
    task = llm.group.broadcast(job(asked, rows, llm.default_sampling_params()))
    here, first = engine_settings(asked), task["engine"]
    for name in sorted(here.keys() | first.keys()):
        if here.get(name) != first.get(name):
            raise ConfigError(
                f"{name}={here.get(name)!r}, but {first.get(name)!r} on rank 0",
                "the same on every rank",
                "give the same command and the same YAML file on every machine",
            )
    # The row decides the randomness: an answer is the same whether the run was resumed before it or not.
    params = SamplingParams(**task["params"] | {"logit_bias": dict(task["params"]["logit_bias"])})
    each = [replace(params, seed=(llm.config.seed << 32) + index) for index in task["indices"]]

    def finished(n: int, output: RequestOutput) -> None:
        if llm.rank == 0:
            index = task["indices"][n]
            rows.add(row(index, rows.prompts[index], output, output.error))
        progress.answered()

    options = {"errors": "return", "on_finish": finished, "on_step": progress.step}
    with progress.generating(len(each)):
        if task["chat"] and each:
            llm.chat(task["inputs"], each, chat_template_kwargs=task["template"], **options)
        else:
            llm.generate(task["inputs"], each, **options)
    llm.close()


def job(asked: Plan, rows: Rows, defaults: SamplingParams) -> dict[str, Any]:
    """What rank 0 tells the others to do, in JSON's types. defaults: what the checkpoint recommends."""
    params = replace(defaults, **asked.sampling)
    if asked.do_sample and params.temperature == 0 and "temperature" not in asked.sampling:
        params = replace(params, temperature=1.0)
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    prompts = [rows.prompts[i] for i in rows.todo]
    return {
        "engine": engine_settings(asked),
        "params": asdict(params) | {"logit_bias": list(params.logit_bias.items())},  # JSON has no such keys
        "indices": rows.todo,
        "inputs": [[*system, {"role": "user", "content": p}] for p in prompts] if asked.chat else prompts,
        "chat": asked.chat,
        "template": {} if asked.think else {"enable_thinking": False},
    }


def engine_settings(asked: Plan) -> dict[str, Any]:
    """What must be alike on all ranks: everything but where the model is, and on what it runs."""
    return {name: value for name, value in asked.engine.items() if name not in ("model", "device")}


def report(asked: Plan, rows: Rows, progress: "Progress") -> int:
    """Print and save all answers, in the prompts' order; the exit code says whether every prompt has one."""
    answers, failed = [], 0
    for i, prompt in enumerate(rows.prompts):
        row = rows.rows[i]
        answers.append(row["text"] if asked.chat else prompt + row["text"])
        if row["error"] is not None:
            failed += 1
            answers[-1] += f"[error: {row['error']}]"
            progress.say(f"prompt {i} failed: {row['error']}")
    print(f"'text_generation_text': {answers}", flush=True)
    save(RESULT, str([{"text_generation_text": answers}]) + "\n")
    return ConfigError.exit_code if failed else 0


class Progress:
    """How far it is: bars on a terminal, single lines in a log, nothing on ranks other than 0."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.bar = tqdm(disable=True)
        self.begun = False  # answering; before that there is only loading
        self.done = self.total = self.tokens = 0
        self.begin = self.spoken = time.monotonic()

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        if self.shown:
            tqdm.write(f"glimmer predict: {line}", file=sys.stderr)
            sys.stderr.flush()

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

    def generating(self, total: int) -> tqdm:
        """A bar of `total` prompts, to be used in a `with`."""
        self.begun, self.total, self.begin, self.spoken = True, total, time.monotonic(), time.monotonic()
        layout = "{desc}: {n_fmt}/{total_fmt} prompts |{bar:20}| {elapsed}{postfix}"
        self.bar = self._bar(total=total, desc="generating", bar_format=layout)
        return self.bar

    def step(self, new: int) -> None:
        """As LLM's on_step: tokens."""
        self.tokens += new
        now = time.monotonic()
        if now - self.spoken > (EVERY if self.bar.disable else 0.2):
            self.spoken = now
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

    def _bar(self, **options: Any) -> tqdm:
        return tqdm(disable=not (self.shown and sys.stderr.isatty()), leave=False, file=sys.stderr, **options)


def usage() -> str:
    """What --help prints."""
    entry = lambda name, help: f"  {name:36}{help}" if len(name) < 36 else f"  {name}\n{'':38}{help}"
    lines = [
        "usage: glimmer predict [PROMPT | FILE.txt ...] [--model DIR] [options]",
        "",
        "Answers prompts with a model of the GLM-4.5 family. A .txt file has one prompt a line; \\n is a new line.",
        f"The answers are printed as 'text_generation_text': [...] and saved in {RESULT}.",
    ]
    for title, group in (
        ("input", INPUT),
        ("output", OUTPUT),
        ("answers (what is left out: as the checkpoint's generation_config.json says)", SAMPLING),
        ("engine (defaults in brackets)", ENGINE),
    ):
        lines += ["", title]
        lines += [entry(f"--{name.replace('_', '-')} {option.value}", option.help) for name, option in group.items()]
    lines += ["", "the names of MindSpore Transformers, as --a.b VALUE, --a.b=VALUE or in YAML"]
    lines += [entry(name, "the only value") for name in ("--run_mode predict", "--parallel_config.data_parallel 1")]
    lines += [
        entry(f"--{name} VALUE", translation.help)
        for name, translation in TRANSLATED.items()
        if name not in GENERATION and not name.startswith(("model.", "context."))
    ]
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
    return "\n".join(lines) + "\n"
