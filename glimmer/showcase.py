"""`glimmer demo`: three things that a GLM can do, asked of one model, each with its speed.

A raw prompt, a sum thought over before it is answered, and a call of a tool that the prompt describes: what the model
writes is shown as it comes, control tags included. Any GLM-4.5 checkpoint will do; the questions suit the demo model.
Speeds count the whole time from question to last token. Not here: tools that really run, any other question (predict).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from glimmer.config import SamplingParams
from glimmer.errors import ConfigError
from glimmer.llm import LLM

MODEL = Path(__file__).with_name("demo")  # the demo model: a small checkpoint that comes with the package

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


def default_model() -> Path:
    """The checkpoint that answers when a command names none: the demo model. ConfigError if it is not installed."""
    if not (MODEL / "config.json").is_file():
        raise ConfigError(
            "no model is named, and this installation has no demo model",
            f"a Hugging Face directory of the GLM-4.5 family, or the demo model in {MODEL}",
            "name a model with --model DIR, or install glimmer again",
        )
    return MODEL


def main(argv: list[str]) -> int:
    """Ask and show; rank 0 speaks."""
    parser = argparse.ArgumentParser("glimmer demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="a Hugging Face directory (the demo model)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or npu")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="processes that torchrun started")
    parser.add_argument("--max-tokens", type=int, default=256, help="where an answer ends that does not end by itself")
    args = parser.parse_args(argv)
    llm = LLM(
        args.model or str(default_model()),
        dtype=args.dtype,
        device=args.device,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=1024 + args.max_tokens,
        max_num_seqs=1,
    )
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    llm.generate(CITY, SamplingParams(temperature=0, max_tokens=1))  # whatever is slow only once, is slow here
    for title, question, prompt in (
        ("A raw prompt", CITY, CITY),
        ("A sum, thought over", SUM, llm.render(_user(SUM))),
        (f"A tool: {json.dumps(TOOL, ensure_ascii=False)}", WEATHER, llm.render(_user(WEATHER), [TOOL])),
    ):
        _show(llm, f"## {title}\n> {question}\n")
        begin, tokens = time.perf_counter(), 0
        for piece in llm.stream(prompt, params):
            _show(llm, piece.text)
            tokens += len(piece.token_ids)
        seconds = time.perf_counter() - begin
        _show(llm, f"\n({tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s)\n\n")
    llm.close()
    return 0


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _show(llm: LLM, text: str) -> None:
    if llm.rank == 0:
        print(text, end="", flush=True)
