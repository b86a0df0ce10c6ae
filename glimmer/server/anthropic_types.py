"""What a request of Anthropic's Messages may hold, and the conversation that it asks the service to answer.

- A text of several blocks is joined by line breaks; what the assistant said, by nothing, as it was written.
- Thoughts of earlier turns come back as thoughts. Those that another server has sealed are left out.
- Tools have an input_schema. Tools that Anthropic's servers run, or whose schema only its models know, are refused.
- Without `thinking` the model does not think; `adaptive` lets it think as long as it likes. `effort` changes nothing.
- Where the assistant has the last message, the answer continues it.

Further fields are ignored: clients send many that change nothing (REFUSED lists those that would). Not here: the
answer (anthropic.py).
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from glimmer import vllm_names
from glimmer.errors import RequestError, shown
from glimmer.server.openai import sampling_params
from glimmer.server.openai_types import Sampling
from glimmer.server.service import ChatRequest, Service
from glimmer.server.turns import Json, Turns, need, parts_of, texts_of, unknown, unseal, words
from glimmer.text.chat import template_kwargs
from glimmer.vllm_names import NONE, Only

# Claude Code begins its system prompt with a block for Anthropic's accounting. It says nothing to a model, and differs
# between conversations, which could share no cached beginning.
ACCOUNTING = "x-anthropic-billing-header:"

WORDS = words(
    {
        r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
        r"(tools\[\d+\])\.function": r"\1",
        r"^stop\b": "stop_sequences",
        r"^thinking_token_budget\b": "thinking.budget_tokens",
        r"^response_format\b": "output_config.format",
    }
)


class Thinking(msgspec.Struct):
    """Whether the model thinks. display: "omitted" keeps the thoughts in the signature alone."""

    type: str
    budget_tokens: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None
    display: str | None = None


class OutputConfig(msgspec.Struct):
    """The form of the answer."""

    effort: str | None = None
    format: Json | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens"""

    messages: list[Json]
    model: str | None = None
    system: str | list[Json] | None = None
    tools: list[Json] | None = None
    tool_choice: Json | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Json | None = None  # an earlier name of output_config.format


class MessagesBody(CountBody, kw_only=True):
    """POST /v1/messages"""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None


REFUSED: Mapping[str, Only] = {
    "mcp_servers": Only(NONE, "offer the servers' tools as tools with an input_schema"),
    "container": Only((None,), "leave it out: nothing is run on the server"),
}


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """RequestError for a field that would change the answer, and that is not served."""
    unsupported = {name: body[name] for name in body if name in REFUSED}
    vllm_names.check("/v1/messages", unsupported, REFUSED, (), RequestError)


def chat_request(body: MessagesBody, service: Service) -> ChatRequest:
    """What a body asks for. RequestError names the field at fault."""
    messages = conversation(body)
    continues = bool(messages) and messages[-1]["role"] == "assistant"
    if continues and "tool_calls" in messages[-1]:
        raise RequestError(
            "messages",
            "a tool_use at the end of messages",
            "a tool_result for each tool_use, in a message of the user",
            "append the results",
        )
    choice, parallel = _tool_choice(body.tool_choice)
    thinking = body.thinking or Thinking("disabled")
    form = _form(body)
    sampling = Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences or None,
        response_format=form and {"type": "json_schema", "json_schema": form},
    )
    return ChatRequest(
        messages=messages,
        params=sampling_params(sampling, service, max_tokens=body.max_tokens, logprobs=None),
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())] or None,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        chat_template_kwargs=template_kwargs(None, {"type": thinking.type}),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        thinking_token_budget=thinking.budget_tokens if thinking.type == "enabled" and service.thoughts else None,
        form_field="output_config.format",
    )


def _form(body: CountBody) -> Json | None:
    """The format of the answer, with its schema."""
    form = (body.output_config and body.output_config.format) or body.output_format
    if form is not None and form.get("type") != "json_schema":
        found = f"output_config.format.type={shown(form.get('type'))}"
        raise RequestError("output_config.format", found, '{"type": "json_schema", "schema": {...}}', "correct it")
    return form


# ---------------------------------------------------------------------- the conversation


def conversation(body: CountBody) -> list[Json]:
    """The messages in OpenAI's form."""
    turns = Turns()
    system = [text for text in texts_of(body.system or [], "system", ("text",)) if not text.startswith(ACCOUNTING)]
    if system:
        turns.say("system", "\n".join(system))
    for i, message in enumerate(body.messages):
        at = f"messages[{i}]"
        content = message.get("content")
        match message.get("role"):
            case "user":
                _user(content, f"{at}.content", turns)
            case "assistant":
                for block, place in parts_of(content, f"{at}.content", "text"):
                    _assistant(block, place, turns)
            case "system":
                turns.say("system", "\n".join(texts_of(content, f"{at}.content", ("text",))))
            case other:
                found, accepted = f"{at}.role is {shown(other)}", "user, assistant or system"
                raise RequestError(f"{at}.role", found, accepted, "correct the role")
    return turns.messages


def _user(content: object, at: str, turns: Turns) -> None:
    """What a user says, and what tools have answered, in its order."""
    texts: list[str] = []
    results = 0
    for block, place in parts_of(content, at, "text"):
        if block["type"] == "text":
            texts.append(need(block, "text", str, place))
        elif block["type"] == "tool_result":
            if texts:
                turns.say("user", "\n".join(texts))
            text = "\n".join(texts_of(block.get("content") or [], f"{place}.content", ("text",)))
            turns.result(need(block, "tool_use_id", str, place), f"Error: {text}" if block.get("is_error") else text)
            texts, results = [], results + 1
        else:
            raise unknown(block, place, ("text", "tool_result"))
    if texts or not results:
        turns.say("user", "\n".join(texts))


def _assistant(block: Json, at: str, turns: Turns) -> None:
    """What the assistant said, thought or called."""
    match block["type"]:
        case "text":
            turns.speak(need(block, "text", str, at))
        case "thinking":
            turns.think(need(block, "thinking", str, at) or unseal(block.get("signature")))
        case "redacted_thinking":
            turns.think(unseal(block.get("data")))
        case "tool_use":
            turns.call(need(block, "id", str, at), need(block, "name", str, at), need(block, "input", dict, at))
        case _:
            raise unknown(block, at, ("text", "thinking", "redacted_thinking", "tool_use"))


# ---------------------------------------------------------------------- tools


def _tool(tool: Json, at: str) -> Json:
    """A tool in OpenAI's form."""
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"{at}.type",
            f"{at} is of type {shown(tool['type'])}",
            "tools that the client runs, with an input_schema",
            "leave it out, or describe a tool of the client's own that does the same",
        )
    function = {
        "name": need(tool, "name", str, at),
        "description": tool.get("description") or "",
        "parameters": need(tool, "input_schema", dict, at),
    }
    return {"type": "function", "function": function | ({"strict": True} if tool.get("strict") is True else {})}


def _tool_choice(choice: Json | None) -> tuple[str | Json | None, bool]:
    """tool_choice in OpenAI's form, and whether several calls may come."""
    if choice is None:
        return None, True
    kind = need(choice, "type", str, "tool_choice")
    parallel = choice.get("disable_parallel_tool_use") is not True
    if kind == "tool":
        return {"type": "function", "function": {"name": need(choice, "name", str, "tool_choice")}}, parallel
    known = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in known:
        found = f"tool_choice.type={shown(kind)}"
        raise RequestError("tool_choice", found, "auto, any, tool or none", "choose one of these")
    return known[kind], parallel
