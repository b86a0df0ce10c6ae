"""ChatTemplate: messages and tools -> the prompt, by the Jinja template that comes with a checkpoint.

Neither input is trusted. Messages come from users: they are checked and copied into the form that GLM's templates rely
on; the caller's objects are not changed. The template comes from the checkpoint: it is a program, and runs with the
bounds of sandbox.py. A template that cannot be compiled is refused when it is asked for: raw prompts need none.
Not here: tokens (tokenizer.py), and reading answers back into reasoning, content and tool calls (parse.py).
"""

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError

from glimmer.errors import CheckpointError, RequestError, shown
from glimmer.foreign import read_optional_json, read_text
from glimmer.text.sandbox import MAX_CHARACTERS, MAX_SOURCE, Refusal, Sandbox, bounded

MAX_DEPTH = 64  # of lists and objects within a message
ROLES = ("system", "user", "assistant", "tool", "developer")
# What render() sets itself, so that no request may set it for the template.
OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class ChatTemplate:
    """The chat template of a checkpoint. One object may render for several threads at once.

    source: the template, or None if there is none that could be read.
    fault:  why no conversation can be rendered, which render() raises; or None. Raw prompts need no template.
    """

    def __init__(self, source: str | None, origin: str):
        """`source`: None if the checkpoint has none. `origin` says in error messages where it came from."""
        self.source, self.origin = source, origin
        self._template: Template | None = None
        self.fault: CheckpointError | None = None
        if source is None:
            self.fault = CheckpointError(
                f"{origin} has no chat template",
                'chat_template.jinja, or "chat_template" in tokenizer_config.json',
                "copy chat_template.jinja from the model's repository; raw prompts (completions) work without it",
            )
            return
        try:
            self._template = _compile(source, origin)
        except CheckpointError as fault:
            self.fault = fault

    @classmethod
    def load(cls, directory: str | Path) -> "ChatTemplate":
        """The template in chat_template.jinja, else the one under "chat_template" in tokenizer_config.json.

        A checkpoint without any, or with a broken one, is loaded too: only render() needs it, and says what is wrong.
        """
        path = Path(directory) / "chat_template.jinja"
        try:
            if os.path.lexists(path):
                return cls(read_text(path, MAX_SOURCE), str(path))
            path = Path(directory) / "tokenizer_config.json"
            return cls(_configured_template(path), f'"chat_template" in {path}' if path.exists() else str(directory))
        except CheckpointError as fault:
            broken = cls(None, str(path))
            broken.fault = fault
            return broken

    def render(
        self,
        /,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt. It holds all special tokens, to be encoded with add_special_tokens=False.

        messages: dicts with "role" (system, user, assistant, tool; developer is system) and "content" (a text, a list
            of text parts, or None), and where they apply "reasoning_content" (or "reasoning") and "tool_calls", as in
            OpenAI's API.
        tools: JSON objects that describe functions; the template prints each as it is.
        add_generation_prompt: begin the assistant's answer.
        continue_final_message: end with the last message, which is the assistant's, so that the model goes on with it.
        kwargs: further variables, such as enable_thinking (4.5, 4.6, 4.7) or clear_thinking (4.7).
        Raises RequestError that names the field at fault, or CheckpointError if there is no template or it misbehaves.
        """
        if self._template is None:
            assert self.fault is not None
            raise CheckpointError(*self.fault.args)  # a new one: each raise adds to the traceback of an exception
        variables = {
            **kwargs,
            "messages": _messages(messages),
            "tools": _tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = io.StringIO()
        try:
            with bounded():
                for piece in self._template.generate(variables):
                    if prompt.tell() + len(piece) > MAX_CHARACTERS:
                        break
                    prompt.write(piece)
                else:
                    return (
                        _up_to(variables["messages"][-1], prompt.getvalue())
                        if continue_final_message
                        else prompt.getvalue()
                    )
        except RequestError:
            raise
        except Refusal as error:
            raise RequestError(
                "messages",
                f"the chat template refuses them: {_problem(error)}",
                "a conversation that this model was trained on",
                "change the messages as the template says",
            ) from error
        except SecurityError as error:
            raise CheckpointError(
                f"{self.origin} does what a template may not: {_problem(error)}",
                "a template that reads its variables and prints text",
                "use the chat_template.jinja of the model's repository",
            ) from error
        except Exception as error:  # whatever the template's own expressions raise on this input
            raise RequestError(
                "messages",
                f"{self.origin} fails on them: {_problem(error)}",
                "messages, tools and template arguments of the form that the template reads",
                "compare the request with what the template uses; if it is in order, the template is at fault",
            ) from error
        raise RequestError(
            "messages",
            f"the chat template makes more than {MAX_CHARACTERS} characters of them",
            f"a prompt of at most {MAX_CHARACTERS} characters",
            "send fewer or shorter messages; if they are short, the template is at fault",
        )


# ── the template ─────────────────────────────────────────────────────────────────────────────────────────────


_ENVIRONMENT = Sandbox()


def _compile(source: str, origin: str) -> Template:
    try:
        if len(source) > MAX_SOURCE:
            raise ValueError(f"it has {len(source)} characters, where {MAX_SOURCE} are read")
        return _ENVIRONMENT.from_string(source)
    except Exception as error:  # a template can make Jinja's compiler fail in many ways, with the same remedy
        raise CheckpointError(
            f"{origin} is not a template that Jinja can compile: {_problem(error)}",
            "a chat template as transformers renders it",
            "use the chat_template.jinja of the model's repository; raw prompts (completions) work without it",
        ) from error


def _configured_template(path: Path) -> str | None:
    """ "chat_template" in tokenizer_config.json: absent, a text, or a list of named texts of which "default" counts."""
    found = read_optional_json(path, "the tokenizer's configuration").get("chat_template")
    try:
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}["default"]
        if found is None or isinstance(found, str):
            return found
        problem = f"it is {_kind(found)}"
    except KeyError as error:
        problem = f"it is a list without {error}"
    except TypeError as error:
        problem = _problem(error)
    raise CheckpointError(
        f'"chat_template" in {path} cannot be read: {problem}',
        'a text, or a list of {"name": ..., "template": ...} of which one is named "default"',
        "put the template into a file chat_template.jinja beside it",
    )


def _problem(error: Exception) -> str:
    """The message of an exception that Jinja or a template has raised, on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, Refusal) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 300 else text[:300] + "...")


# ── the messages ─────────────────────────────────────────────────────────────────────────────────────────────────


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages in the form that templates rely on, or RequestError."""
    _need(messages, list | tuple, "messages", "a list of messages")
    if not messages:
        raise RequestError(
            "messages",
            "messages is empty",
            "at least one message",
            'send [{"role": "user", "content": "..."}]',
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def template_kwargs(chat_template_kwargs: Any, thinking: Any = None) -> dict[str, Any]:
    """What a request sets for the template: its chat_template_kwargs, and the `thinking` of the vendor's own API.

    thinking: {"type": "enabled" or "disabled"}, which is enable_thinking, and "clear_thinking" (4.7), or one of them.
        Models of this family decide themselves how long they think, so "auto" and "adaptive" are "enabled".
    Raises RequestError if either is malformed, or if they contradict each other.
    """
    kwargs: dict[str, Any] = {}
    if chat_template_kwargs is not None:
        _need(chat_template_kwargs, Mapping, "chat_template_kwargs", "an object with the template's variables")
        kwargs = dict(chat_template_kwargs)
    if own := [name for name in OWN_VARIABLES if name in kwargs]:
        raise RequestError(
            "chat_template_kwargs",
            f"{own} among chat_template_kwargs",
            "variables of the template's own, such as enable_thinking",
            "send these as fields of the request",
        )
    if thinking is None:
        return kwargs
    _need(thinking, dict, "thinking", 'an object such as {"type": "disabled"}')
    meant: dict[str, bool] = {}
    if (type := thinking.get("type")) is not None:
        if type not in ("enabled", "disabled", "auto", "adaptive"):
            raise RequestError(
                "thinking.type",
                f"thinking.type is {shown(type)}",
                '"enabled" or "disabled"',
                "choose one of these, or leave thinking out",
            )
        meant["enable_thinking"] = type != "disabled"
    if thinking.get("clear_thinking") is not None:
        _need(thinking["clear_thinking"], bool, "thinking.clear_thinking", "true or false")
        meant["clear_thinking"] = thinking["clear_thinking"]
    for name, value in meant.items():
        if name in kwargs and kwargs[name] is not value:
            raise RequestError(
                "thinking",
                f"thinking is {shown(thinking)}, and {name} in chat_template_kwargs is {shown(kwargs[name])}",
                "one of the two, or the same in both",
                "leave out one of them",
            )
    return kwargs | meant


def check_turn(messages: Any, add_generation_prompt: bool, continue_final_message: bool) -> None:
    """RequestError if it is not the assistant's turn. What is no list of messages is left to render() to refuse."""
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    role = last.get("role") if isinstance(last, dict) else None
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "continue_final_message",
            "continue_final_message=True with add_generation_prompt=True",
            "either a new answer, or more of the last message",
            "pass add_generation_prompt=False with it",
        )
    if add_generation_prompt and role == "assistant":
        raise RequestError(
            "messages",
            "the last message is the assistant's",
            "a message that can be answered",
            "to continue it, pass continue_final_message=True and add_generation_prompt=False",
        )
    if continue_final_message and role != "assistant":
        raise RequestError(
            "messages",
            f"continue_final_message=True, and the last message is of role {shown(role)}",
            "an assistant's message to continue",
            "leave continue_final_message out, or append the beginning of the answer",
        )


def _up_to(last: dict[str, Any], prompt: str) -> str:
    """The prompt up to the end of the last message's text, as transformers cuts it. RequestError if it is not there."""
    text = last["content"]
    start = prompt.rfind(text.strip())
    if start < 0 or not text.strip():
        raise RequestError(
            "messages",
            "the last message's content is empty, or not in the prompt as it is written",
            "a text that the chat template prints unchanged",
            "put thoughts into reasoning_content, or send the prompt as text to generate",
        )
    whole = prompt[start : start + len(text)] == text  # else the template has stripped it
    return prompt[: start + len(text if whole else text.strip())]


def choose_mark(prompt: str) -> str:
    """A character that is not in a rendered prompt, and never part of a text. RequestError if there is none."""
    for mark in map(chr, range(0xFDD0, 0xFDF0)):
        if mark not in prompt:
            return mark
    raise RequestError(
        "messages",
        "all 32 noncharacters from U+FDD0 to U+FDEF",
        "text, in which there is none of them",
        "remove one of them",
    )


def mark_content(messages: Sequence[dict[str, Any]], names: Iterable[str], mark: str) -> list[dict[str, Any]]:
    """The messages, with the mark after each character of a user's or tool's content that may begin one of `names`.

    So no name that is typed there is found in the rendered prompt, wherever the template puts it. For messages that
    render() accepts; RequestError if their content is nested too deeply.
    """
    first = re.compile("[" + "".join(re.escape(name[0]) for name in names if name) + "]" if names else "(?!)")
    return [
        message | {"content": _marked(message.get("content"), first, mark)}
        if message["role"] in ("user", "tool")
        else message
        for message in messages
    ]


def _marked(value: Any, first: re.Pattern[str], mark: str, depth: int = 0) -> Any:
    """A JSON value with the mark in all of its texts."""
    if depth > MAX_DEPTH:
        raise RequestError(
            "messages", f"content nested more than {MAX_DEPTH} deep", "text, or a list of texts", "send text"
        )
    if isinstance(value, str):
        return first.sub(lambda found: found[0] + mark, value)
    if isinstance(value, dict):
        return {key: item if key == "type" else _marked(item, first, mark, depth + 1) for key, item in value.items()}
    return [_marked(item, first, mark, depth + 1) for item in value] if isinstance(value, list | tuple) else value


def _message(message: Any, at: str) -> dict[str, Any]:
    """One message: content a text or a list of parts, arguments of tool calls as objects."""
    _need(message, dict, at, "an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        # GLM's templates leave out messages of a role that they do not know, and say nothing.
        raise RequestError(
            f"{at}.role",
            f"{at}.role is {shown(role) if 'role' in message else 'absent'}",
            f"one of {', '.join(ROLES)}",
            "correct the role; the results of functions go under tool",
        )
    if role != "assistant" and "content" not in message:
        raise RequestError(
            f"{at}.content",
            f"{at}.content is absent",
            "a text, or a list of text parts",
            f"send what the {role} says as {at}.content",
        )
    checked: dict[str, Any] = {**message, "content": _content(message.get("content"), role, f"{at}.content")}
    checked["role"] = "system" if role == "developer" else role
    for name in ("reasoning_content", "reasoning"):  # names of one field, of which templates know the first
        if checked.get(name) is not None:
            _need(checked[name], str, f"{at}.{name}", "a text")
    if checked.get("reasoning_content") is None and checked.get("reasoning") is not None:
        checked["reasoning_content"] = checked["reasoning"]
    if checked.get("tool_calls") is not None:
        calls = checked["tool_calls"]
        _need(calls, list | tuple, f"{at}.tool_calls", "a list of tool calls")
        checked["tool_calls"] = [_tool_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return checked


def _content(content: Any, role: str, at: str) -> str | list[Any]:
    """A text, into which text parts are joined; or the list of results of a tool."""
    if content is None:
        return ""  # the template would print the word None
    if isinstance(content, str):
        return content
    _need(content, list | tuple, at, "a text or a list of text parts")
    if all(_is_text_part(part) or (isinstance(part, str) and role != "tool") for part in content):
        # Templates join them too, but for those of a tool, which they take for as many results.
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    known, expected = (
        (_is_result, 'a text or {"output": ...}')
        if role == "tool"
        else (_is_text_part, 'a text or {"type": "text", "text": ...}')
    )
    for i, part in enumerate(content):
        if not (isinstance(part, str) or known(part)):
            # The template would leave it out and say nothing.
            found = f"a part of type {shown(part.get('type'))}" if isinstance(part, dict) else _kind(part)
            raise RequestError(f"{at}[{i}]", f"{at}[{i}] is {found}", expected, "send the content as text")
    return list(content)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_result(part: Any) -> bool:
    """GLM's own form: a tool message may hold a list of results."""
    return isinstance(part, dict) and "output" in part


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    """One tool call, {"function": {"name", "arguments"}} or the inner object alone, with arguments as an object."""
    _need(call, dict, at, "an object with a function")
    if call.get("function"):
        _need(call["function"], dict, f"{at}.function", "an object with name and arguments")
        return {**call, "function": _function(call["function"], f"{at}.function")}
    return _function(call, at)


def _function(function: dict[str, Any], at: str) -> dict[str, Any]:
    _need(function.get("name"), str, f"{at}.name", "the name of a function")
    return {**function, "arguments": _arguments(function.get("arguments"), f"{at}.arguments")}


def _arguments(arguments: Any, at: str) -> dict[str, Any]:
    """OpenAI's API carries arguments as JSON text; templates walk an object. Nothing at all means no arguments."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                at,
                f"{at} is not JSON: {_problem(error)}",
                "a JSON object, or the text of one",
                'send the arguments as the model gave them, such as {"city": "Paris"}',
            ) from error
    _need(arguments, dict, at, "a JSON object, or the text of one")
    checked: dict[str, Any] = arguments
    return checked


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    _need(tools, list | tuple, "tools", "a list of tools")
    for i, tool in enumerate(tools):
        _need(tool, dict, f"tools[{i}]", "an object that describes a function")
    return list(tools)


def _need(value: Any, type: Any, field: str, expected: str) -> None:
    """Raise RequestError that names `field` unless `value` is of `type`."""
    if not isinstance(value, type):
        raise RequestError(field, f"{field} is {_kind(value)}", expected, f"send {expected} as {field}")


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    kinds = {
        type(None): "null or absent",
        bool: "a boolean",
        str: "a text",
        int: "a number",
        float: "a number",
        list: "a list",
        tuple: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
