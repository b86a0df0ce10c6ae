"""What a request of OpenAI's Responses may hold, and the conversation that it asks the service to answer.

- Items become messages: `developer` is system; reasoning, text and calls that follow one another are one answer.
- A function of a namespace is NAMESPACE.NAME to the model. A custom tool is a function with one text, `input`; its
  grammar is told to the model and, if it is a regular expression, enforced.
- Tools that OpenAI's servers would run, or whose form only its models know, are left out where agents send them with
  every request (LEFT_OUT); the response lists those that were offered. Further ones are refused.

Further fields are ignored: clients send many that change nothing (REFUSED lists those that would). Not here: the
answer (responses.py), what is kept of it (responses_store.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from glimmer import vllm_names
from glimmer.errors import RequestError, shown
from glimmer.server.openai import NO_EFFORT, sampling_params
from glimmer.server.openai_types import Sampling
from glimmer.server.service import ChatRequest, Service
from glimmer.server.turns import Json, Turns, Words, need, texts_of, unseal, words
from glimmer.vllm_names import NONE, Only

LEFT_OUT = re.compile(r"(web_search|local_shell|shell|apply_patch|tool_search|image_generation)(_.*)?")
TEXTS = ("input_text", "output_text", "text", "refusal")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Reasoning(msgspec.Struct):
    """Whether the model thinks, and whether its thoughts are told as a summary."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None  # an earlier name of summary


class Text(msgspec.Struct):
    """The form of the answer."""

    format: Json | None = None
    verbosity: str | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """POST /v1/responses"""

    input: str | list[Json]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    truncation: str | None = None
    include: list[str] | None = None
    metadata: Json | None = None


REFUSED: Mapping[str, Only] = {
    "background": Only((None, False), "leave it out, and read the answer as a stream"),
    "conversation": Only(NONE, "use previous_response_id"),
    "prompt": Only(NONE, "send what the prompt says as instructions and input"),
    "top_logprobs": Only((None, 0), "ask /v1/chat/completions for logprobs"),
    "moderation": Only(NONE, "leave it out: no model here judges texts"),
    "context_management": Only(NONE, "leave it out, and send a shorter input where the context is full"),
}


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """RequestError for a field that would change the answer, and that is not served."""
    unsupported = {name: body[name] for name in body if name in REFUSED}
    vllm_names.check("/v1/responses", unsupported, REFUSED, (), RequestError)


# ---------------------------------------------------------------------- tools


@dataclass(frozen=True)
class Called:
    """How a call of a tool is given back."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass
class Tools:
    """The tools of a request."""

    functions: list[Json] = field(default_factory=list)  # as the model is told of them, in OpenAI's older form
    places: list[str] = field(default_factory=list)  # where each stands in the request
    called: dict[str, Called] = field(default_factory=dict)  # by the names that the model is told
    offered: list[Json] = field(default_factory=list)  # as the request has them, without those that are left out

    def add(self, tool: Json, at: str) -> None:
        """A tool of the request. RequestError if it cannot be offered."""
        kind = need(tool, "type", str, at)
        if _is_left_out(tool):
            return
        if kind == "namespace":
            namespace = need(tool, "name", str, at)
            for i, inner in enumerate(need(tool, "tools", list, at)):
                self._function(inner, f"{at}.tools[{i}]", namespace)
        else:
            self._function(tool, at, None)
        self.offered.append(tool)

    def _function(self, tool: Json, at: str, namespace: str | None) -> None:
        kind = need(tool, "type", str, at)
        if kind not in ("function", "custom"):
            raise RequestError(
                f"{at}.type",
                f"{at} is of type {shown(kind)}",
                "function, custom or namespace: tools that the client runs",
                "leave it out, or describe a function of the client's own that does the same",
            )
        called = Called(need(tool, "name", str, at), namespace, kind == "custom")
        parameters = _custom(tool) if called.custom else tool.get("parameters") or {"type": "object", "properties": {}}
        description = tool.get("description") or ""
        function = {"name": model_name(called), "description": description, "parameters": parameters}
        strict = {"strict": True} if tool.get("strict") is True else {}
        self.functions.append({"type": "function", "function": function | strict})
        self.places.append(at)
        self.called[model_name(called)] = called

    def choose(self, choice: str | Json | None) -> str | Json | None:
        """tool_choice in OpenAI's older form. allowed_tools leaves no others."""
        if not isinstance(choice, dict):
            return choice
        kind = choice.get("type")
        if kind in ("function", "custom"):
            return _one(_name_of(choice, "tool_choice"))
        if kind == "allowed_tools":
            allowed = [one for one in need(choice, "tools", list, "tool_choice") if not _is_left_out(one)]
            names = {_name_of(one, "tool_choice.tools") for one in allowed}
            kept = [i for i, tool in enumerate(self.functions) if tool["function"]["name"] in names]
            self.functions = [self.functions[i] for i in kept]
            self.places = [self.places[i] for i in kept]
            return str(choice.get("mode", "auto"))
        raise RequestError(
            "tool_choice",
            f"tool_choice={shown(choice)}",
            "auto, none, required, a function or custom tool, or allowed_tools",
            "choose one of these",
        )

    @property
    def words(self) -> Words:
        """The request's own names for what an error is about."""
        return words(
            {
                r"^messages\b": "input",
                r"^max_tokens\b": "max_output_tokens",
                r"^response_format\b": "text.format",
                r"(?<![.\w])tools\[(\d+)\](\.function)?": lambda match: self.places[int(match[1])],
            }
        )


def model_name(called: Called) -> str:
    """What the model calls a tool."""
    return f"{called.namespace}.{called.name}" if called.namespace else called.name


def _is_left_out(tool: object) -> bool:
    """Whether this is one of the tools that agents always send, and that cannot be offered."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and LEFT_OUT.fullmatch(kind) is not None


def _name_of(item: object, at: str) -> str:
    """The name of a tool that an item means, as the model is told it."""
    name, namespace = need(item, "name", str, at), item.get("namespace") if isinstance(item, dict) else None
    return model_name(Called(name, namespace if isinstance(namespace, str) else None))


def _one(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


def _custom(tool: Json) -> Json:
    """The parameters of a custom tool."""
    form = tool.get("format")
    text: Json = {"type": "string", "description": "The whole input of the tool, as it is."}
    if isinstance(form, dict) and form.get("type") == "grammar" and isinstance(form.get("definition"), str):
        syntax, definition = form.get("syntax"), form["definition"]
        text["description"] += f" It follows this grammar ({syntax}):\n{definition}"
        if syntax == "regex":
            text["pattern"] = f"^({definition})$"
    return {"type": "object", "properties": {"input": text}, "required": ["input"], "additionalProperties": False}


# ---------------------------------------------------------------------- the conversation


def items_of(body: ResponsesBody) -> list[Json]:
    """The items of a request's input."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": body.input}]}]
    return body.input


def tools_of(body: ResponsesBody, items: Sequence[Json]) -> Tools:
    """The tools of a request, and those that its input brings."""
    tools = Tools()
    for i, tool in enumerate(body.tools or ()):
        tools.add(tool, f"tools[{i}]")
    for i, item in enumerate(items):
        if item.get("type") == "additional_tools":
            for j, tool in enumerate(need(item, "tools", list, f"input[{i}]")):
                tools.add(tool, f"input[{i}].tools[{j}]")
    return tools


def chat_request(
    body: ResponsesBody, earlier: Sequence[Json], own: Sequence[Json], tools: Tools, service: Service
) -> ChatRequest:
    """What a body asks for with its own items, after earlier ones. RequestError names the field at fault."""
    effort = body.reasoning and body.reasoning.effort
    if effort is not None and effort not in EFFORTS:
        found = f"reasoning.effort={shown(effort)}"
        raise RequestError("reasoning.effort", found, ", ".join(EFFORTS), "choose one of these")
    choice = tools.choose(body.tool_choice)
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p, response_format=_form(body))
    return ChatRequest(
        messages=conversation(body.instructions, earlier, own),
        params=sampling_params(sampling, service, max_tokens=body.max_output_tokens, logprobs=None),
        tools=tools.functions or None,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        chat_template_kwargs={} if effort is None else {"enable_thinking": effort not in NO_EFFORT},
        form_field="text.format",
    )


def _form(body: ResponsesBody) -> Json | None:
    """The format of the answer in OpenAI's older form."""
    form = body.text.format if body.text is not None else None
    return {"type": "json_schema", "json_schema": form} if form and form.get("type") == "json_schema" else form


def conversation(instructions: str | None, earlier: Sequence[Json], own: Sequence[Json]) -> list[Json]:
    """The messages in OpenAI's older form."""
    turns = Turns()
    if instructions:
        turns.say("system", instructions)
    for item in earlier:
        _add(item, "previous_response_id", turns)
    for i, item in enumerate(own):
        _add(item, f"input[{i}]", turns)
    return turns.messages


def _add(item: Json, at: str, turns: Turns) -> None:
    """Put an item into the conversation. RequestError if it is none that the models can read."""
    match item.get("type", "message" if "role" in item else None):
        case "message":
            _message(item, at, turns)
        case "reasoning":
            turns.think(_thoughts(item, at))
        case "function_call":
            turns.call(need(item, "call_id", str, at), _name_of(item, at), _arguments(item, at))
        case "custom_tool_call":
            input = {"input": need(item, "input", str, at)}
            turns.call(need(item, "call_id", str, at), _name_of(item, at), input)
        case "function_call_output" | "custom_tool_call_output":
            output = texts_of(item.get("output") or [], f"{at}.output", TEXTS)
            turns.result(need(item, "call_id", str, at), "\n".join(output))
        case "additional_tools":
            pass  # tools_of has read them
        case other:
            raise RequestError(
                f"{at}.type",
                f"{at} is of type {shown(other)}",
                "message, reasoning, function_call, custom_tool_call, or the output of such a call",
                "leave it out, or send what it says as a message",
            )


def _message(item: Json, at: str, turns: Turns) -> None:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        found = f"{at}.role is {shown(role)}"
        raise RequestError(f"{at}.role", found, "user, assistant, system or developer", "correct the role")
    texts = texts_of(item.get("content"), f"{at}.content", TEXTS)
    if role == "assistant":
        turns.speak("".join(texts))
    else:
        turns.say("user" if role == "user" else "system", "\n".join(texts))


def _thoughts(item: Json, at: str) -> str:
    """The text of an item of reasoning: in full, sealed, or its summary. Nothing if another server has sealed it."""
    content = "".join(texts_of(item.get("content") or [], f"{at}.content", ("reasoning_text", "text")))
    summary = texts_of(item.get("summary") or [], f"{at}.summary", ("summary_text",))
    return content or unseal(item.get("encrypted_content")) or "\n\n".join(summary)


def _arguments(item: Json, at: str) -> Json:
    """The arguments of a call."""
    text = need(item, "arguments", str, at)
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        found = f"{at}.arguments is {shown(text)}"
        raise RequestError(f"{at}.arguments", found, "the text of a JSON object", "send what the call came with")
    return arguments
