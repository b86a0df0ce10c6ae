"""What an answer consists of: AnswerFormat, its tags, and events, which tell an answer piece by piece.

AnswerFormat is chosen from the checkpoint: its template and its tokens. Not here: reading an answer (parse.py).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from glimmer.errors import CheckpointError, RequestError
from glimmer.text.arguments import WHITE
from glimmer.text.chat import ChatTemplate

# ── the format ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class AnswerFormat:
    """How a checkpoint writes its answers: pairs of opening and closing tags. None: it has no such part.

    separator: what the model writes between the parts of an answer and of a call: a line break in GLM-4.5 and 4.6,
               nothing in 4.7. The parser takes either.
    turn:      the token after which an answer begins in the prompt.
    """

    think: tuple[str, str] | None = ("<think>", "</think>")
    call: tuple[str, str] | None = ("<tool_call>", "</tool_call>")
    key: tuple[str, str] = ("<arg_key>", "</arg_key>")
    value: tuple[str, str] = ("<arg_value>", "</arg_value>")
    separator: str = "\n"
    turn: str = "<|assistant|>"


def answer_format(template_source: str | None, token_names: Iterable[str]) -> AnswerFormat | None:
    """The format of a checkpoint with this chat template and these added tokens; None if it has no tags at all.

    A template tells how calls are written by writing one. One that fails on calls, or leaves them out, has none.
    """
    names = frozenset(token_names)
    known = AnswerFormat()
    assert known.think is not None and known.call is not None
    has = lambda tag: tag in names or tag in (template_source or "")
    think = known.think if all(map(has, known.think)) else None
    call = known.call if all(map(has, known.call + known.key + known.value)) else None
    separator = known.separator
    if call is not None and template_source is not None:
        written = re.search(f"{call[0]}NAME(\\s*){known.key[0]}KEY{known.key[1]}", _probe(template_source))
        call, separator = (call, written[1]) if written else (None, separator)
    return None if think is None and call is None else AnswerFormat(think=think, call=call, separator=separator)


def _probe(template_source: str) -> str:
    """A conversation with a call as the template writes it; nothing if it cannot."""
    call = {"id": "call_0", "type": "function", "function": {"name": "NAME", "arguments": {"KEY": "VALUE"}}}
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [{"role": "user", "content": "?"}, answer]
    try:
        return ChatTemplate(template_source, "the chat template").render(messages, add_generation_prompt=False)
    except (CheckpointError, RequestError):  # said to whoever renders a conversation
        return ""


def thinking_open(prompt: str, format: AnswerFormat) -> bool:
    """Whether an answer to this prompt begins within its reasoning. What users have typed does not count."""
    if format.think is None:
        return False
    turn = prompt.rfind(format.turn)
    if turn < 0:
        return prompt.rstrip(WHITE).endswith(format.think[0])
    return prompt.rfind(format.think[0], turn) > prompt.rfind(format.think[1], turn)


# ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More of the visible text."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins. index: 0, 1, ... in one answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    arguments: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call is complete: its pieces of arguments, joined, are a JSON object."""

    index: int


Event = ReasoningDelta | TextDelta | ToolCallStart | ToolCallDelta | ToolCallEnd


@dataclass(frozen=True)
class ToolCall:
    """One call. arguments: a JSON object as text, if `complete`; else its beginning."""

    id: str
    name: str
    arguments: str
    complete: bool


@dataclass(frozen=True)
class ParsedAnswer:
    """A whole answer."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


def collect(events: Iterable[Event]) -> ParsedAnswer:
    """The answer that the events of one parser tell."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: list[ToolCallStart] = []
    pieces: list[list[str]] = []
    complete: set[int] = set()
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case TextDelta(text):
                content.append(text)
            case ToolCallStart():
                starts.append(event)
                pieces.append([])
            case ToolCallDelta(index, arguments):
                pieces[index].append(arguments)
            case ToolCallEnd(index):
                complete.add(index)
    calls = (ToolCall(s.id, s.name, "".join(p), s.index in complete) for s, p in zip(starts, pieces, strict=True))
    return ParsedAnswer("".join(reasoning), "".join(content), tuple(calls))


def merged(events: list[Event]) -> list[Event]:
    """The same events, with neighbours of one kind joined."""
    merged: list[Event] = []
    for kind, group in groupby(events, type):
        same = list(group)
        if kind is ReasoningDelta:
            merged.append(ReasoningDelta("".join(event.text for event in same if isinstance(event, ReasoningDelta))))
        elif kind is TextDelta:
            merged.append(TextDelta("".join(event.text for event in same if isinstance(event, TextDelta))))
        elif isinstance(same[0], ToolCallDelta):
            pieces = "".join(event.arguments for event in same if isinstance(event, ToolCallDelta))
            merged.append(ToolCallDelta(same[0].index, pieces))
        else:
            merged += same
    return merged
