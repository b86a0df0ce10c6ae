"""`glimmer demo`: three things that a GLM can do, asked of one model, each with its speed.

A raw prompt, a sum thought over before it is answered, and a call of a tool that the prompt describes: what the model
writes is shown as it comes, control tags included. Any GLM-4.5 checkpoint will do; the questions suit the demo model,
a small checkpoint that comes with the package and that belongs to this file. Speeds count the whole time from question
to last token. Not here: tools that really run, any other question (predict).
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glimmer.cli import exits
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, SAMPLING, Command, default, without
from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError

if TYPE_CHECKING:
    from glimmer import llm, parallel
else:
    llm, parallel = lazy("glimmer.llm"), lazy("glimmer.parallel")

MODEL = Path(__file__).parents[1] / "demo"  # the demo model: a small checkpoint that comes with the package
MAX_TOKENS = 256
CITY = "请介绍一下北京"
SUM = "What is 347 + 586?"
WEATHER = "巴黎今天天气怎么样？"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "City"}},
            "required": ["city"],
        },
    },
}


ENGINE_OPTIONS = without(ENGINE, "skip_tokenizer_init", "max_num_seqs")
COMMAND = Command(
    "demo",
    "Three things that a GLM can do, asked of one model, each with its speed.",
    "[MODEL] [options]",
    {
        "answers": {"max_tokens": default(SAMPLING["max_tokens"], str(MAX_TOKENS))},
        "engine": ENGINE_OPTIONS,
    },
    positional=("model",),
)


def default_model(command: str) -> Path:
    """The checkpoint that answers when a command names none: the demo model. It is said on stderr.

    ConfigError if this installation has none.
    """
    if not (MODEL / "config.json").is_file():
        raise ConfigError(
            "no model is named, and this installation has no demo model",
            f"a Hugging Face directory of the GLM-4.5 family, or the demo model in {MODEL}",
            "name a model with --model DIR, or install glimmer again",
        )
    exits.say(command, "no model is named, so the small demo model answers; --model DIR names another")
    return MODEL


def main(argv: list[str]) -> int:
    """Ask the three questions and print the answers; ranks other than 0 take part in the steps."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    max_tokens = settings.take("max_tokens", MAX_TOKENS)
    engine = {"max_model_len": 1024 + max_tokens, "tensor_parallel_size": parallel.world()[1], "max_num_seqs": 1}
    engine |= settings.fields(ENGINE_OPTIONS)
    if "model" not in engine:
        engine["model"] = str(default_model(COMMAND.name))
    settings.check(EngineConfig, engine)
    params = settings.check(SamplingParams, {"temperature": 0, "max_tokens": max_tokens})
    model = llm.LLM(**engine)
    if model.rank != 0:
        model.follow()
        model.close()
        return 0
    model.generate(CITY, SamplingParams(temperature=0, max_tokens=1))  # whatever is slow only once, is slow here
    for title, question, prompt in (
        ("A raw prompt", CITY, CITY),
        ("A sum, thought over", SUM, model.render(_user(SUM))),
        (f"A tool: {json.dumps(TOOL, ensure_ascii=False)}", WEATHER, model.render(_user(WEATHER), [TOOL])),
    ):
        _show(f"## {title}\n> {question}\n")
        pieces = model.stream(prompt, params)
        begin, tokens = time.perf_counter(), 0
        for piece in pieces:
            _show(piece.text)
            tokens += len(piece.token_ids)
        seconds = time.perf_counter() - begin
        _show(f"\n({tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s)\n\n")
    model.close()
    return 0


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _show(text: str) -> None:
    print(text, end="", flush=True)
