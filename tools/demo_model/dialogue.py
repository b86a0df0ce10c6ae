"""A conversation as data: rounds of question and answer, and the text that the chat template makes of them.

`slot` marks where a sentence's filling begins and ends, because the tokenizer must never learn a token that straddles
such a border ("巴黎的"): a name would then be spelled differently in a question and in the answer that copies it.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glimmer.text.chat import ChatTemplate

SEPARATOR = "\ue000"  # a private-use character; none reaches a finished text
TEMPLATE = Path(__file__).parents[2] / "glimmer" / "demo" / "chat_template.jinja"


@dataclass
class Round:
    """One thing that a user asks and all that follows from it.

    `key` is what the split goes by; two rounds with the same key are the same question. `answers` are the words
    one of which a right reply must hold (empty: nobody checks).
    """

    task: str
    key: str
    ask: str
    reply: str = ""
    think: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    result_think: str = ""
    answers: list[str] = field(default_factory=list)
    quick: bool = False


def slot(template: str, /, **values: Any) -> str:
    """The template with its {names} replaced, each between separators."""
    return template.format_map({name: f"{SEPARATOR}{value}{SEPARATOR}" for name, value in values.items()})


def plain(value: Any) -> Any:
    """The same without separators, through lists, tuples and dicts."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, "")
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    return value


def part(key: str) -> str:
    """The part of all questions that one belongs to, by its own text alone: "train", "test" (one in twenty) or "trial".

    The test is what the model card states; choices between models are made by the trial (one in forty). "" is trained.
    """
    place = hashlib.sha256(plain(key).encode()).digest()[0] if key else 255
    return "test" if place < 13 else "trial" if place < 20 else "train"


def held_out(key: str) -> bool:
    """Whether a question is never trained on."""
    return part(key) != "train"


def messages(rounds: list[Round]) -> list[dict[str, Any]]:
    """The rounds as chat messages. A quick round's question ends in /nothink, and its replies have no reasoning."""
    out: list[dict[str, Any]] = []
    for turn in rounds:
        out.append({"role": "user", "content": turn.ask + ("/nothink" if turn.quick else "")})
        if turn.calls:
            calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in turn.calls]
            out.append({"role": "assistant", "content": "", "tool_calls": calls, **_thought(turn, turn.think)})
            out += [{"role": "tool", "content": result} for result in turn.results]
        if turn.reply:
            thought = turn.result_think if turn.calls else turn.think
            out.append({"role": "assistant", "content": turn.reply, **_thought(turn, thought)})
    return out


def _thought(turn: Round, text: str) -> dict[str, str]:
    return {} if turn.quick or not text else {"reasoning_content": text}


_TEMPLATE = ChatTemplate.load(TEMPLATE.parent)


def render(rounds: list[Round], tools: list[dict[str, Any]] | None = None, system: str = "") -> str:
    """What the chat template makes of a finished conversation, and the role tag that ends its last turn."""
    spoken = ([{"role": "system", "content": system}] if system else []) + messages(rounds)
    last = rounds[-1]
    end = "<|observation|>" if last.calls and not last.reply else "<|user|>"
    return _TEMPLATE.render(spoken, tools=tools, add_generation_prompt=False) + end
