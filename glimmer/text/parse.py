"""AnswerParser: the text of an answer as it comes -> reasoning, text and tool calls, for GLM-4.5, 4.6 and 4.7.

    <think>reasoning</think>text<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>

GLM-4.5 and 4.6 write a line break between these parts, 4.7 does not; both are read alike. The events are a function of
the text alone: it does not matter where it was cut into pieces. Each character is read once, and none is lost:

- Reasoning opens in the prompt, or with a <think> before any text; only </think> closes it. These two tags anywhere
  else are text, and so are all other tags that stand where they mean nothing.
- <tool_call> begins a call if a name and then <arg_key> or </tool_call> follow, and else is text. The name need not be
  one of the tools: the client can tell the model so. Within reasoning it must be, since reasoning also talks about
  calls; such a call does not close the reasoning.
- A value ends with </arg_value>; or with </tool_call>, where the answer ends there or goes on with another call or
  </think>. Everything else belongs to the value, other tags too, and its line breaks.
- A closing tag that is missing, and an opening or closing tag that is doubled, are made good. A key without a value has
  null. What is no argument (a key that has been there, a value without a key, other text) is text after the call.
- A call that does not end (the limit of tokens was reached) has no ToolCallEnd, and its arguments are no complete JSON.
- White space around these tags belongs to the format, white space within texts and values does not.

Values are typed by the tool's schema (arguments.py). Not here: token ids, stop strings, and any grammar (grammar.py).
"""

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from glimmer.errors import RequestError, shown
from glimmer.text.answers import (
    AnswerFormat,
    Event,
    ParsedAnswer,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    answer_format,
    collect,
    merged,
    thinking_open,
)
from glimmer.text.arguments import WHITE, JsonArguments

__all__ = [
    "AnswerFormat",
    "AnswerParser",
    "Event",
    "ParsedAnswer",
    "ReasoningDelta",
    "TextDelta",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallStart",
    "answer_format",
    "collect",
    "parse_answer",
    "random_call_id",
    "thinking_open",
]

MAX_NAME = 128  # characters of the name of a function that is not among the tools
MAX_HEADER = 512  # characters between <tool_call> and the next tag; more cannot be a name

_NAME = re.compile(rf"[\w.:/@-]{{1,{MAX_NAME}}}")
_SPACE = re.compile(f"[{WHITE}]*")


def random_call_id() -> str:
    """An id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


class _Tags:
    """Some tags, without those that are empty, and the search for them."""

    def __init__(self, *names: str):
        self.names = [name for name in names if name]
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        self.longest = max(map(len, self.names), default=0)

    def next(self, text: str, at: int) -> tuple[int, str | None]:
        """Where the next of these tags begins, and which it is. None: where one may begin at the end of `text`, else
        its length. Tags begin with their only "<"."""
        found = self.pattern.search(text, at)
        if found:
            return found.start(), found[0]
        start = text.rfind("<", max(at, len(text) - self.longest + 1))
        return (start if start >= 0 and self._begins(text[start:]) else len(text)), None

    def here(self, text: str, at: int) -> str | None:
        """Which of these tags begins at this place; "" if none does, None if more text will tell."""
        found = self.pattern.match(text, at)
        if found:
            return found[0]
        rest = text[at : at + self.longest]
        return None if self._begins(rest) else ""

    def _begins(self, text: str) -> bool:
        return any(name.startswith(text) for name in self.names)


class AnswerParser:
    """Reads one answer. Its state is the method that reads what comes next, and returns False to wait for more."""

    def __init__(
        self,
        format: AnswerFormat,
        tools: Sequence[dict[str, Any]] | None,
        thinking: bool,
        *,
        continues: bool = False,
        new_id: Callable[[], str] = random_call_id,
    ):
        """tools: in OpenAI's form. Without any, calls are text.
        thinking: the prompt has opened the reasoning (thinking_open).
        continues: the answer continues a text or reasoning that the prompt has begun, so that white space and <think>
            at its beginning are part of it.
        new_id: makes the id of a call.
        """
        self._new_id = new_id
        self._parameters = dict(map(_function, tools or ()))
        self._tag(format, bool(tools))
        self._state: Callable[[], bool] = self._prose
        self._text, self._at = "", 0  # what has come, and how much of it has been read
        self._events: list[Event] = []
        self._finished = False
        self._reasoning = thinking
        self._fresh = not continues  # nothing but white space has come since the beginning or the last tag
        self._shown = {thinking: continues, not thinking: False}  # whether any reasoning, any text has come
        self._space: list[str] = []  # white space that does not count if a tag follows
        self._held: list[str] = []  # text whose meaning the next tag tells
        # the call that is being read:
        self._calls = 0
        self._arguments = JsonArguments(None)
        self._key: str | None = None  # without a value yet
        self._in_stray = False  # the value that is being read is no argument
        self._stray: list[str] = []  # what is no argument

    def _tag(self, format: AnswerFormat, has_tools: bool) -> None:
        """The tags that each state looks for."""
        self._think_open, self._think_close = think = format.think or ("", "")
        self._call_open, self._call_close = call = format.call or ("", "")
        self._key_open, self._key_close = key = format.key
        self._value_open, self._value_close = value = format.value
        begins_call = (self._call_open,) if format.call is not None and has_tools else ()
        self._prose_tags = _Tags(*think, *begins_call)
        self._name_tags = _Tags(self._key_open, self._call_close)
        self._key_tags = _Tags(*key, self._value_open, *call)
        self._after_key_tags = _Tags(*key, *value, *call)
        self._value_tags = _Tags(self._value_close, self._call_close)
        self._body_tags = _Tags(*key, *value, *call, self._think_close)
        self._next_tags = _Tags(self._call_open, self._think_close)

    @property
    def reasoning(self) -> bool:
        """Whether what has come last is reasoning, or a call within it."""
        return self._reasoning

    def push(self, text: str) -> list[Event]:
        """What more text makes known."""
        assert not self._finished, "push() after finish()"
        self._text, self._at = self._text[self._at :] + text, 0
        while self._state():
            pass
        return self._take()

    def finish(self, *, stopped: bool = False) -> list[Event]:
        """What is known now that no more text will come. Call once.

        stopped: the model itself has ended its answer (no stop string, no limit), so that a call of which only
            </tool_call> is missing is complete.
        """
        assert not self._finished, "finish() twice"
        self._finished = True
        rest, self._text, self._at = self._text[self._at :], "", 0  # may have become a tag
        if self._state == self._name:
            self._no_call()
        if self._state == self._prose:
            self._say(rest)
            if not self._fresh:
                self._show("".join(self._space))
        elif self._state == self._after_value and stopped:
            self._between(rest)
            self._end_call()
        elif self._state == self._after_close and not rest:
            self._end_value()
            self._end_call()
        else:
            self._break_off(rest)
        return self._take()

    def _break_off(self, rest: str) -> None:
        """The call that is being read will not end."""
        if self._state == self._in_key:
            self._named("".join(self._held) + rest)
            if self._key:
                self._delta(self._arguments.unfinished_key(self._key))
        elif self._state == self._after_value:
            self._between(rest)
        else:
            if self._state == self._after_key:
                self._begin_value()
            self._value("".join(self._held) + rest if self._state == self._after_close else rest)
            if not self._in_stray:
                self._delta(self._arguments.unfinished())
        self._enter(self._reasoning)
        self._say("".join(self._stray))

    # ------------------------------------------------------------------ reasoning and text

    def _prose(self) -> bool:
        """Reasoning or text."""
        plain, tag = self._until(self._prose_tags)
        self._say(plain)
        if tag is None:
            return False
        if tag == self._call_open:
            self._held, self._state = [], self._name
        elif self._fresh or (self._reasoning and tag == self._think_close):
            self._enter(tag == self._think_open)
        else:
            self._say(tag)
        return True

    def _enter(self, reasoning: bool) -> None:
        """What follows is reasoning, or text. White space before this place does not count."""
        self._state, self._reasoning, self._fresh, self._space = self._prose, reasoning, True, []

    def _say(self, text: str) -> None:
        """More reasoning or text. White space at its end waits, until more text or a tag follows."""
        words = text.rstrip(WHITE)
        if words:
            said = "".join(self._space) + words
            if self._fresh and not self._shown[self._reasoning]:
                said = said[said.rfind("\n", 0, len(said) - len(said.lstrip(WHITE))) + 1 :]  # without blank lines
            self._show(said)
            self._fresh, self._shown[self._reasoning], self._space = False, True, []
        self._space.append(text[len(words) :])

    def _show(self, text: str) -> None:
        if text:
            self._events.append(ReasoningDelta(text) if self._reasoning else TextDelta(text))

    # ------------------------------------------------------------------ a call

    def _name(self) -> bool:
        """After <tool_call>."""
        end = self._text.find("<", self._at, self._at + MAX_HEADER + 1)
        end = end if end >= 0 else min(len(self._text), self._at + MAX_HEADER + 1)
        self._held = ["".join(self._held) + self._text[self._at : end]]
        self._at = end
        header = self._held[0]
        if not self._may_become_name(header):
            self._no_call()
            return True
        tag = self._name_tags.here(self._text, self._at)
        if tag is None:
            return False
        name = header.strip(WHITE)
        if not tag or not self._is_name(name):
            self._no_call()
            return True
        self._at += len(tag)
        self._begin_call(name, has_arguments=tag == self._key_open)
        return True

    def _may_become_name(self, header: str) -> bool:
        """Whether this may still be, or become, the name of a call."""
        if len(header) > MAX_HEADER:
            return False
        name = header.strip(WHITE)
        if not name or self._is_name(name):
            return True
        return any(known.startswith(header.lstrip(WHITE)) for known in self._parameters)

    def _is_name(self, name: str) -> bool:
        return name in self._parameters or (not self._reasoning and _NAME.fullmatch(name) is not None)

    def _no_call(self) -> None:
        """What looked like the beginning of a call is none."""
        self._state = self._prose
        self._say(self._call_open + "".join(self._held))

    def _begin_call(self, name: str, has_arguments: bool) -> None:
        self._events.append(ToolCallStart(self._calls, self._new_id(), name))
        self._calls += 1
        self._arguments, self._stray, self._key = JsonArguments(self._parameters.get(name)), [], None
        self._delta(self._arguments.open())
        if has_arguments:
            self._held, self._state = [], self._in_key
        else:
            self._end_call()

    def _end_call(self) -> None:
        self._no_value()
        self._delta(self._arguments.close())
        self._events.append(ToolCallEnd(self._calls - 1))
        self._enter(self._reasoning)
        self._say("".join(self._stray))

    def _in_key(self) -> bool:
        """After <arg_key>."""
        plain, tag = self._until(self._key_tags)
        self._held.append(plain)
        if tag is None:
            return False
        key = "".join(self._held)
        if key.strip(WHITE) or tag in (self._key_close, self._value_open):
            self._named(key)
        self._after_tag(tag)
        return True

    def _named(self, key: str) -> None:
        """A key is complete. The same key twice, without a value between, is one."""
        key = key.strip(WHITE)
        if self._key != key:
            self._no_value()
        self._key = key

    def _no_value(self) -> None:
        """There will be no value for the key before."""
        if self._key is not None and self._key in self._arguments:
            self._stray += ["\n", self._key_open, self._key, self._key_close]
        elif self._key is not None:
            self._delta(self._arguments.key(self._key) + "null")
        self._key = None

    def _after_key(self) -> bool:
        """After </arg_key>."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()
        tag = self._after_key_tags.here(self._text, self._at)
        if tag is None:
            return False
        self._at += len(tag)
        self._after_tag(tag or self._value_open)
        return True

    def _after_tag(self, tag: str) -> None:
        """A tag outside a value."""
        if tag == self._key_open:
            self._held, self._state = [], self._in_key
        elif tag == self._value_open:
            self._begin_value()
            self._state = self._in_value
        elif tag == self._call_close:
            self._end_call()
        elif tag == self._call_open:
            self._end_call()
            self._held, self._state = [], self._name
        elif self._key is None:
            self._held, self._state = [], self._after_value
        elif tag == self._key_close:
            self._state = self._after_key
        else:
            self._begin_value()
            self._end_value()

    def _begin_value(self) -> None:
        key, self._key = self._key, None
        self._in_stray = key is None or key in self._arguments
        if key is None:
            self._stray += ["\n", self._value_open]
        elif self._in_stray:
            self._stray += ["\n", self._key_open, key, self._key_close, self._value_open]
        else:
            self._delta(self._arguments.begin(key))

    def _in_value(self) -> bool:
        """After <arg_value>."""
        plain, tag = self._until(self._value_tags)
        self._value(plain)
        if tag == self._value_close:
            self._end_value()
        elif tag is not None:
            self._held, self._state = [tag], self._after_close
        return tag is not None

    def _value(self, text: str) -> None:
        if self._in_stray:
            self._stray.append(text)
        elif text:
            self._delta(self._arguments.text(text))

    def _end_value(self) -> None:
        if self._in_stray:
            self._stray.append(self._value_close)
        else:
            self._delta(self._arguments.end())
        self._held, self._state = [], self._after_value

    def _after_close(self) -> bool:
        """After a </tool_call> within a value, which ends the call if nothing but a call or </think> follows."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._held.append(space[0])
        self._at = space.end()
        tag = self._next_tags.here(self._text, self._at)
        if tag is None:
            return False
        if tag == self._call_open or (tag and self._reasoning):
            self._end_value()
            self._end_call()
        else:
            self._value("".join(self._held))
            self._state = self._in_value
        return True

    def _after_value(self) -> bool:
        """After </arg_value>."""
        plain, tag = self._until(self._body_tags)
        self._held.append(plain)
        if tag is None:
            return False
        if tag != self._think_close:
            self._between("")
            self._after_tag(tag)
        elif self._reasoning:
            self._between("")
            self._end_call()
            self._enter(reasoning=False)
        else:
            self._held.append(tag)
        return True

    def _between(self, rest: str) -> None:
        """Text between two arguments is complete with `rest`."""
        text = ("".join(self._held) + rest).strip(WHITE)
        self._held = []
        if text:
            self._stray += ["\n", text]

    def _delta(self, arguments: str) -> None:
        if arguments:
            self._events.append(ToolCallDelta(self._calls - 1, arguments))

    # ------------------------------------------------------------------ what comes and goes

    def _until(self, tags: _Tags) -> tuple[str, str | None]:
        """Reads to the end of the next of these tags: (what stands before it, the tag). None: more text is needed."""
        start = self._at
        end, tag = tags.next(self._text, start)
        self._at = end + len(tag or "")
        return self._text[start:end], tag

    def _take(self) -> list[Event]:
        events, self._events = merged(self._events), []
        return events


def parse_answer(
    text: str,
    format: AnswerFormat,
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = False,
    *,
    stopped: bool = False,
) -> ParsedAnswer:
    """An answer that is there as a whole; the arguments are those of AnswerParser and its finish()."""
    parser = AnswerParser(format, tools, thinking)
    return collect([*parser.push(text), *parser.finish(stopped=stopped)])


def _function(tool: Any) -> tuple[str, Any]:
    """(name, schema of the arguments) of a tool in OpenAI's form, or of its function alone."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(
            "tools",
            f"a tool that is {shown(tool)}",
            'objects such as {"type": "function", "function": {"name": ..., "parameters": ...}}',
            "give each tool a name",
        )
    return function["name"], function.get("parameters")
