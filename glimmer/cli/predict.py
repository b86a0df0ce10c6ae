"""`glimmer predict`: prompts in, text out; run_mindformer.py is its other name.

The command line says what is asked for (`read_job`), results.py reads prompts and keeps answers, and here both meet the
model: load, answer, report. Answers go to --output as each one is done, and at the end to text_generation_result.txt
and to stdout, as the Python list of MindSpore Transformers; on a terminal `glimmer predict` shows plain text, and a
single answer as it comes. Under torchrun every rank runs this program; rank 0 alone reads prompts, asks the model,
prints and writes files.
Not here: how processes are started (mindformers/launch.py, torchrun).
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from glimmer.cli import demo, exits, identity
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, SAMPLING, Command, Option, Settings, default, path, text, truth, without
from glimmer.cli.results import Prompt, Results, is_prompt_file, read_prompts, row, save
from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError, GlimmerError, RequestError
from glimmer.foreign import parse_json, read_bytes, read_json
from glimmer.hub import model_directory
from glimmer.mindformers import options as mindformers
from glimmer.mindformers.options import GENERATION, KEYS, TRANSLATED

if TYPE_CHECKING:
    from glimmer import llm, outputs, parallel
else:
    llm, outputs, parallel = lazy("glimmer.llm"), lazy("glimmer.outputs"), lazy("glimmer.parallel")

RESULT = Path("text_generation_result.txt")
EVERY = 30.0  # seconds between lines about progress where there is no terminal
MAX_TOKENS = 512  # of the answer to a raw prompt, where nobody says otherwise

INPUT = {
    "chat": Option(truth, "", "put each prompt through the checkpoint's chat template; raw otherwise"),
    "system": Option(text, "TEXT", "with --chat: the system message"),
    "no_think": Option(truth, "", "with --chat: ask for an answer without thinking"),
    "tools": Option(path, "FILE.json", "with --chat: a JSON list of the tools that the model may call"),
    "tool_choice": Option(text, "NAME", "with --tools: auto, required, none, or the tool to call", "auto"),
    "special_tokens_in_content": Option(
        text,
        "NAME",
        "with --chat: what <|user|> is in a message: control or text",
        "control",
        choices=("control", "text"),
    ),
}
OUTPUT = {
    "output": Option(path, "FILE.jsonl", "one JSON object a prompt, added as each one is done"),
    "resume": Option(truth, "", "with --output: keep the rows that are there, answer the rest"),
    "quiet": Option(truth, "", "no progress on stderr; what went wrong is still said"),
}
NEEDS = {  # options that mean nothing without another one
    "system": "chat",
    "no_think": "chat",
    "tools": "chat",
    "tool_choice": "tools",
    "special_tokens_in_content": "chat",
    "resume": "output",
    "logprobs": "output",
}
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # by generation_config.json
ANSWERS = (
    without(SAMPLING, "seed", "prompt_logprobs")
    | {name: default(SAMPLING[name], "the checkpoint's") for name in RECOMMENDED}
    | {"max_tokens": default(SAMPLING["max_tokens"], f"{MAX_TOKENS}; of a conversation what the context holds")}
    | {"logprobs": replace(SAMPLING["logprobs"], help="with --output: of the N likeliest tokens at each place")}
)
MAKERS = ("dtype", "quantization", "group_size", "kv_cache_dtype", "seed", "max_model_len")  # of what is in a row
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
    "Answers prompts with a model of the GLM-4.5 family. A .txt file has one prompt a line, where \\n is a new line\n"
    'and \\\\n is \\n; a .jsonl file has {"prompt": TEXT} or {"messages": [...]} a line; - is stdin, as either.\n'
    "On a terminal answers are shown as text, and a single one as it comes; elsewhere they are printed as\n"
    f"'text_generation_text': [...], which is also saved in {RESULT}.",
    "[PROMPT | FILE.txt | FILE.jsonl | - ...] [--model DIR] [options]",
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
    return exits.run(COMMAND.name, lambda: 0 if COMMAND.asks_for_help(argv) else predict(argv, home))


# ---------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Job:
    """What the settings ask for together.

    engine, sampling   fields of EngineConfig and SamplingParams that somebody has set, and MAX_TOKENS
    do_sample          None: nobody has said; True: not greedy, even if generation_config.json is
    of_mindformers     as MindSpore Transformers does it: greedy unless something says otherwise
    limited            somebody has said how long an answer may be
    data, prompts      texts in which \\n is a new line, and texts as they are; either may name files
    literal            texts that are no file's name
    ignored            keys that mean nothing here
    """

    engine: dict[str, Any]
    sampling: dict[str, Any]
    do_sample: bool | None
    of_mindformers: bool
    limited: bool
    data: list[str]
    prompts: list[str]
    literal: list[str]
    chat: bool
    system: str | None
    think: bool
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    special_tokens: str
    output: Path | None
    resume: bool
    quiet: bool
    ignored: list[str]

    def is_conversation(self, prompt: Prompt) -> bool:
        """Whether a prompt goes through the chat template; its answer then stands alone."""
        return self.chat or not isinstance(prompt, str)


def read_job(
    settings: Settings, argv: list[str], running: int, default_model: Callable[[], Path], home: Path | None = None
) -> Job:
    """What the settings ask for in a group of `running` processes.

    argv, home: as main got them, to say how the same command is started on more processes. Raises ConfigError or
    RequestError for everything that can be refused before a model is opened.
    """
    given, take = settings.given, settings.take
    for word in (*settings.words, *take("prompts", [])):
        check_prompt(word)
    engine = settings.fields(ENGINE_OPTIONS)
    engine["model"] = str(model_directory(mindformers.one_directory(given) or default_model()))
    engine["tensor_parallel_size"] = mindformers.processes(given, running, argv, home)
    sampling = {"max_tokens": MAX_TOKENS} | settings.fields(ANSWERS)
    if mindformers.greedy(given):
        sampling["temperature"] = 0.0
    length = mindformers.max_length(given)
    if length is not None:
        engine["max_model_len"] = min(length, engine.get("max_model_len", length))
        sampling["max_tokens"] = None
    settings.check(EngineConfig, engine)
    settings.check(SamplingParams, sampling)
    special_tokens = take("special_tokens_in_content", "control")
    if special_tokens not in ("control", "text"):
        found = f"special_tokens_in_content={special_tokens!r}"
        raise ConfigError(found, "control or text", "choose one of these")
    for name, needed in NEEDS.items():
        if take(name) not in (None, False) and not take(needed):
            raise ConfigError(f"--{name.replace('_', '-')} without --{needed}", "both or none", f"add --{needed}")
    return Job(
        engine=engine,
        sampling=sampling,
        do_sample=take("do_sample"),
        of_mindformers=home is not None or mindformers.speaks(given),
        limited=length is not None or "max_tokens" in given,
        data=take("prompts", []),
        prompts=settings.words,
        literal=settings.literal,
        chat=take("chat", False),
        system=take("system"),
        think=not take("no_think", False),
        tools=read_tools(Path(take("tools"))) if take("tools") else None,
        tool_choice=read_tool_choice(take("tool_choice")),
        special_tokens=special_tokens,
        output=Path(take("output")) if take("output") else None,
        resume=take("resume", False),
        quiet=take("quiet", False),
        ignored=settings.ignored,
    )


def check_prompt(word: str) -> None:
    """ConfigError for a word that names a directory, or a file that is not read as prompts."""
    if os.path.isdir(word):  # False for what no path can be, such as a long text
        kind, todo = "a directory", f"if it is the model, write --model {word}"
    elif os.path.exists(word) and not is_prompt_file(word):
        kind, todo = "a file", f"if it holds prompts, name it .txt or .jsonl, or write - < {word}"
    else:
        return
    raise ConfigError(
        f"{word!r}, which is {kind}, as a prompt",
        "a text, or a .txt or .jsonl file with one prompt a line",
        f"{todo}; if it is a prompt, write it after a lone --",
    )


def read_tools(file: Path) -> list[dict[str, Any]]:
    """The descriptions of tools in a JSON file. ConfigError if it holds anything else."""
    try:
        tools = parse_json(read_bytes(file, error=ConfigError))
    except (FileNotFoundError, ValueError):
        tools = None
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(
            f"--tools {file} holds no tools" if file.is_file() else f"--tools {file} is no file",
            'a JSON list of {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}',
            "correct the file or the path",
        )
    return tools


def read_tool_choice(given: str | None) -> str | dict[str, Any] | None:
    """A word of OpenAI's, or the name of a tool in OpenAI's form."""
    return given if given in (None, "auto", "required", "none") else {"type": "function", "function": {"name": given}}


def made_by(job: Job) -> dict[str, Any]:
    """What decides an answer besides its prompt, in JSON's types: it is kept with each row of --output."""
    settings = {name: value for name, value in (job.engine | job.sampling).items() if name in (*MAKERS, *ANSWERS)}
    settings |= {"chat": job.chat, "system": job.system, "no_think": not job.think, "do_sample": job.do_sample}
    if job.special_tokens != "control":
        settings["special_tokens_in_content"] = job.special_tokens
    if job.tools is not None:
        settings["tools"] = blake2b(json.dumps(job.tools).encode(), digest_size=8).hexdigest()
    if job.tool_choice is not None:
        settings["tool_choice"] = job.tool_choice
    if job.do_sample is None and "temperature" not in job.sampling:
        settings["do_sample"] = "as in MindSpore Transformers" if job.of_mindformers else "as in the checkpoint"
    chosen = {name: value for name, value in settings.items() if value not in (None, False)}
    made: dict[str, Any] = json.loads(json.dumps({"model_digest": identity.of_model(job.engine["model"])} | chosen))
    return made


# ---------------------------------------------------------------------- from the model to the answers


def predict(argv: list[str], home: Path | None) -> int:
    """Read, load, answer, report; returns the exit code.

    Raises GlimmerError and exits.Terminated, after it has said which answers are kept.
    """
    settings = COMMAND.read(argv, home)
    rank, size = parallel.world()
    logging.basicConfig(format="glimmer predict: %(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    job = read_job(settings, argv, size, lambda: demo.default_model(COMMAND.name), home)
    if rank == 0 and not job.quiet and not exits.is_terminal(sys.stderr):  # a log is read later: it says what ran
        logging.getLogger("glimmer").setLevel(logging.INFO)
    progress = Progress(shown=rank == 0 and not job.quiet, warns=rank == 0)
    if rank != 0:
        try:
            answer(job, Results([], None, False), progress)
        except KeyboardInterrupt:
            return exits.INTERRUPTED
        return 0
    if size > 1:
        signal.signal(signal.SIGTERM, exits.terminate)
    here = os.access(RESULT.parent, os.W_OK)
    if not here and job.output is None:
        raise ConfigError(
            f"{Path.cwd()} cannot be written",
            f"a place for {RESULT}",
            "start the command elsewhere, or keep the answers with --output FILE.jsonl",
        )
    prompts = read_prompts(job.data, job.prompts, home, job.literal, progress.say)
    results = Results(prompts, job.output, job.resume, made_by(job) if job.output else None)
    try:
        if not here:
            progress.warn(f"{Path.cwd()} cannot be written: answers are in {job.output} only, not in {RESULT}")
        if results.rows:
            progress.say(f"{len(results.rows)} of {len(prompts)} rows are in {results.path} already")
        plain = home is None and exits.is_terminal(sys.stdout)
        shown = plain and len(prompts) == 1 == len(results.todo) and job.sampling.get("n", 1) == 1
        shown = shown and job.sampling.get("logprobs") is None  # pieces have none
        if (results.todo or size > 1) and (code := run(job, results, progress, shown)):
            return code
        return report(job, results, progress, here, "" if shown else "text" if plain else "list")
    finally:
        results.close()


def run(job: Job, results: Results, progress: "Progress", shown: bool) -> int:
    """`answer`. What stops it is raised after it has been said which answers are kept; Ctrl-C is an exit code."""
    try:
        answer(job, results, progress, shown)
        return 0
    except (GlimmerError, KeyboardInterrupt, exits.Terminated) as reason:
        by_hand = isinstance(reason, KeyboardInterrupt)
        by_hand |= isinstance(reason, exits.Terminated) and parallel.world()[1] == 1  # else the launcher ends a job
        word = "interrupted" if by_hand else "stopped"
        if progress.begun and results.path is not None:
            progress.warn(
                f"{word}; {len(results.rows)} of {len(results.prompts)} rows are in {results.path};"
                " the same command with --resume answers the rest"
            )
        elif progress.begun:
            progress.warn(f"{word}; no answer is kept (with --output FILE.jsonl those that are done would be)")
        elif by_hand:
            progress.warn(word)
        if isinstance(reason, KeyboardInterrupt):
            return exits.INTERRUPTED
        if isinstance(reason, exits.Terminated):
            reason.reported = True
        raise


def answer(job: Job, results: Results, progress: "Progress", shown: bool = False) -> None:
    """Load the model and answer the prompts that have no row. Rank 0 asks; the other ranks follow it.

    shown: the one prompt's answer is printed as it comes.
    """
    group = None
    if parallel.world()[1] > 1:
        group = llm.join(EngineConfig(**job.engine))
        if not group.broadcast(bool(results.todo)):  # nothing that a model would be needed for
            return group.close()
    model = llm.LLM(**job.engine, group=group, on_load=progress.loading)
    progress.loaded(" by rank 0" if model.size > 1 else "")
    here = engine_settings(job)
    first = model.group.broadcast({"engine": here})["engine"]
    for name in sorted(here.keys() | first.keys()):
        if here.get(name) != first.get(name):
            raise ConfigError(
                f"{name}={here.get(name)!r}, but {first.get(name)!r} on rank 0",
                "the same on every rank",
                "give the same command and the same YAML file on every machine",
            )
    if model.rank != 0:
        model.follow()
        return model.close()
    with progress.generating(len(results.todo), hidden=shown):
        prompts: dict[int, llm.Prompt] = {}
        for index in results.todo:
            try:
                prompts[index] = rendered(model, results.prompts[index], job)
            except RequestError as error:
                results.add(row(index, results.prompts[index], None, error))
                progress.answered()
        # The row decides the randomness: an answer is the same whether the run was resumed before it or not.
        common = sampling_params(job, model, progress)
        params = {index: replace(common, seed=(model.config.seed << 32) + index) for index in prompts}
        for index in prompts:
            if job.is_conversation(results.prompts[index]) and not job.limited:
                params[index] = replace(params[index], max_tokens=None)

        def finished(n: int, output: "outputs.RequestOutput") -> None:
            index = list(prompts)[n]
            results.add(row(index, results.prompts[index], output, output.error))
            progress.answered()

        if shown and prompts:
            [(index, prompt)] = prompts.items()
            echo = "" if job.is_conversation(results.prompts[index]) else str(results.prompts[index])
            finished(0, show(model, prompt, params[index], echo, progress))
        else:
            model.generate(
                list(prompts.values()),
                list(params.values()),
                errors="return",
                on_finish=finished,
                on_step=progress.step,
            )
    model.close()


def rendered(model: "llm.LLM", prompt: Prompt, job: Job) -> "llm.Prompt":
    """What `generate` takes for a prompt. RequestError if it has no text, or if the chat template refuses it."""
    if isinstance(prompt, str) and not prompt.strip():
        raise RequestError("prompt", "an empty prompt", "some text", "write one, or remove the line")
    if isinstance(prompt, str) and not job.chat:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if job.system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": job.system}, *messages]
    kwargs = {} if job.think else {"enable_thinking": False}
    return model.render(
        messages,
        job.tools,
        kwargs,
        tool_choice=job.tool_choice,
        special_tokens_in_content=job.special_tokens,
    )


def sampling_params(job: Job, model: "llm.LLM", progress: "Progress") -> SamplingParams:
    """How prompts are answered: the checkpoint's recommendations, under what the job says."""
    params = replace(model.default_sampling_params(), **job.sampling)
    if "temperature" in job.sampling:
        return params
    if job.do_sample and params.temperature == 0:
        return replace(params, temperature=1.0)
    if job.of_mindformers and job.do_sample is None and params.temperature > 0:
        file = Path(model.config.model) / "generation_config.json"
        if not file.is_file() or read_json(file, "generation defaults").get("do_sample") is not True:
            progress.say("answers are greedy, as in MindSpore Transformers; --do_sample True draws them at random")
            return replace(params, temperature=0.0)
    return params


def show(
    model: "llm.LLM", prompt: "llm.Prompt", params: SamplingParams, echo: str, progress: "Progress"
) -> "outputs.RequestOutput":
    """Answer one prompt and print the answer as it comes, after `echo`. A terminal that is gone loses nothing."""
    stream = model.stream(prompt, params)  # RequestError before anything is printed
    answer = outputs.CompletionOutput(0)
    output = outputs.RequestOutput(None, [], [answer])
    lost = exits.write(echo)
    try:
        for piece in stream:
            answer.text += piece.text
            answer.token_ids += piece.token_ids
            answer.finish_reason = piece.finish_reason
            lost = lost or exits.write(piece.text)
            progress.step(len(piece.token_ids))
    except GlimmerError as error:
        if answer.finish_reason is None:  # not this answer alone has failed
            raise
        output.error = error
    if lost is None:
        exits.write("\n")
    return output


def engine_settings(job: Job) -> dict[str, Any]:
    """What must be alike on all ranks: everything but where the model is, and on what it runs."""
    return {name: value for name, value in job.engine.items() if name not in ("model", "device")}


def report(job: Job, results: Results, progress: "Progress", here: bool, form: str) -> int:
    """Save and print all answers, in the prompts' order; the exit code says whether every prompt has one.

    They are saved first, so that a terminal or a pipe that is gone loses nothing; where they cannot be saved they are
    printed all the same. here: the current directory can be written. form: how they are printed: "list", "text" or "".
    """
    texts: list[str] = []
    reasons: list[str] = []
    for i, prompt in enumerate(results.prompts):
        row = results.rows[i]
        for one in row.get("outputs", [row]):
            texts.append(one["text"] if job.is_conversation(prompt) else f"{prompt}{one['text']}")
            reasons.append(one["finish_reason"])
        if row["error"] is not None:
            texts[-1] += f"[error: {row['error']}]"
            progress.warn(f"prompt {i} failed: {row['error']}")
    unsaved = None
    if here:
        try:
            save(RESULT, str([{"text_generation_text": texts, "finish_reason": reasons}]) + "\n")
        except ConfigError as error:
            unsaved = error
    words = "\n\n".join(texts) + "\n" if form == "text" else f"'text_generation_text': {texts}\n"
    lost = exits.write(words) if form else None
    if lost is not None and not isinstance(lost, BrokenPipeError):  # whoever closes a pipe has seen enough
        progress.warn(f"the answers cannot be printed ({lost.strerror}); they are in {RESULT if here else job.output}")
    cut_off(job, results, progress)
    if unsaved is not None:
        raise unsaved
    return ConfigError.exit_code if any(row["error"] is not None for row in results.rows.values()) else 0


def cut_off(job: Job, results: Results, progress: "Progress") -> None:
    """Say which answers end before they are complete, and what would make them longer."""
    limit = job.sampling["max_tokens"]
    by_limit: list[int] = []
    by_context: list[int] = []
    for i, kept in sorted(results.rows.items()):
        cut = [one for one in kept.get("outputs", [kept]) if one["finish_reason"] == "length"]
        limited = limit is not None and (job.limited or not job.is_conversation(results.prompts[i]))
        if cut:
            (by_limit if limited and any(one["completion_tokens"] >= limit for one in cut) else by_context).append(i)
    whose = "" if job.limited else ", the default"
    for cut_rows, why, more in (
        (by_limit, f"after {limit} tokens (max_tokens{whose})", "--max-tokens N allows more"),
        (by_context, "where the context is full (max_model_len)", "a larger --max-model-len allows more"),
    ):
        if len(results.prompts) == 1 and cut_rows:
            progress.warn(f"the answer is cut off {why}; {more}")
        elif cut_rows:
            named = ", ".join(map(str, cut_rows[:10])) + ", ..." * (len(cut_rows) > 10)
            progress.warn(f"{len(cut_rows)} of {len(results.prompts)} answers are cut off {why}: {named}; {more}")


class Progress:
    """Progress on stderr: bars on a terminal, single lines in a log, nothing on ranks other than 0."""

    def __init__(self, shown: bool, warns: bool = True):
        tqdm.monitor_interval = 0  # no thread of its own: _bar looks at the clock with each update
        self.shown, self.warns = shown, warns
        self.hidden = False
        self.bar = tqdm(disable=True)
        self.begun = False  # answering; before that there is only loading
        self.done = self.total = self.tokens = 0
        self.begin = self.reported = time.monotonic()

    def say(self, line: str) -> None:
        """One line about progress, above the bar if there is one."""
        if self.shown:
            self.warn(line)

    def warn(self, line: str) -> None:
        """One line that is said also where no progress is wanted."""
        if self.warns:
            with tqdm.external_write_mode(file=sys.stderr):
                exits.to_stderr(f"glimmer predict: {line}")

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

    def generating(self, total: int, hidden: bool = False) -> "tqdm[Any]":
        """A bar of `total` prompts, to be used in a `with`; none where the answer itself is shown."""
        self.begun, self.hidden, self.total, self.begin = True, hidden, total, time.monotonic()
        self.reported = self.begin
        layout = "{desc}: {n_fmt}/{total_fmt} prompts |{bar:20}| {elapsed}{postfix}"
        self.bar = tqdm(disable=True) if hidden else self._bar(total=total, desc="generating", bar_format=layout)
        return self.bar

    def step(self, new: int) -> None:
        """As LLM's on_step: tokens."""
        self.tokens += new
        now = time.monotonic()
        if now - self.reported > (EVERY if self.bar.disable else 0.2):
            self.reported = now
            self.bar.set_postfix_str(self.speed)
            if self.bar.disable and not self.hidden:
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
        hidden = not (self.shown and exits.is_terminal(sys.stderr))
        return tqdm(disable=hidden, leave=False, file=sys.stderr, miniters=1, **options)
