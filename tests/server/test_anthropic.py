"""Anthropic's API as its real client uses it, over a real socket; the demo model answers."""

import json

import anthropic
import pytest

from glimmer.cli import demo

pytestmark = pytest.mark.slow
SUM = [{"role": "user", "content": "What is 347 + 586?"}]
WEATHER = [{"role": "user", "content": "巴黎今天天气怎么样？"}]
CITY = demo.TOOL["function"]["parameters"]
TOOL = {"name": "get_weather", "description": "Get the weather", "input_schema": CITY}
THINK = {"type": "enabled", "budget_tokens": 1024}
RAW = {"model": "any", "max_tokens": 400, "temperature": 0}
BASE = {"model": "any", "max_tokens": 400, "extra_body": {"temperature": 0}}  # the client has no field for it


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_conversation(client):
    done = client.messages.create(**BASE, messages=SUM, thinking=THINK)
    thinking, text = done.content
    assert (thinking.type, text.type, done.role, done.stop_reason) == ("thinking", "text", "assistant", "end_turn")
    assert "so 933" in thinking.thinking and thinking.signature and text.text == "347+586=933"
    usage = done.usage
    assert 0 < usage.output_tokens_details.thinking_tokens < usage.output_tokens and usage.input_tokens > 0
    assert usage.cache_creation_input_tokens == 0
    again = client.messages.create(**BASE, messages=SUM, thinking=THINK)
    assert again.content == done.content and again.usage.cache_read_input_tokens > 0
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == (
        usage.input_tokens + usage.cache_read_input_tokens
    )


def test_a_stream_says_the_same(client):
    done = client.messages.create(**BASE, messages=SUM, thinking=THINK)
    with client.messages.stream(**BASE, messages=SUM, thinking=THINK) as stream:
        kinds = [event.type for event in stream if event.type.startswith(("message", "content"))]
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.content[0] == done.content[0]
    assert final.content[1].text == done.content[1].text and len(final.content) == 2
    assert final.usage.output_tokens == done.usage.output_tokens
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2


@pytest.mark.parametrize("thinking, kinds", [(None, ["text"]), ({"type": "disabled"}, ["text"]),
                                             ({"type": "adaptive"}, ["thinking", "text"])])  # fmt: skip
def test_who_does_not_ask_for_thoughts_gets_none(client, thinking, kinds):
    asked = {} if thinking is None else {"thinking": thinking}
    done = client.messages.create(**BASE, messages=SUM, **asked)
    assert [block.type for block in done.content] == kinds
    assert (done.usage.output_tokens_details.thinking_tokens > 0) == ("thinking" in kinds)


def test_thoughts_that_are_not_shown_come_back(client, server):
    shown = client.messages.create(**BASE, messages=SUM, thinking=THINK).content[0]
    hidden = client.messages.create(**BASE, messages=SUM, thinking=THINK | {"display": "omitted"}).content[0]
    assert hidden.thinking == "" and hidden.signature != shown.signature
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "巴黎"}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "晴"}]}

    def tokens(block):
        history = [*SUM, {"role": "assistant", "content": [block, call]}, result]
        return client.messages.count_tokens(model="any", messages=history, tools=[TOOL]).input_tokens

    assert tokens(hidden.model_dump()) == tokens(shown.model_dump()) > tokens({"type": "text", "text": "x"})
    foreign = {"type": "redacted_thinking", "data": "EqQBCgIYAhIM"}
    assert tokens(foreign) == tokens(shown.model_dump() | {"thinking": ""})


def test_a_tool_and_its_result(client):
    asked = BASE | {"tools": [TOOL], "thinking": {"type": "adaptive"}}
    done = client.messages.create(**asked, messages=WEATHER)
    call = done.content[-1]
    assert done.stop_reason == "tool_use" and (call.type, call.name, call.input) == (
        "tool_use",
        "get_weather",
        {"city": "巴黎"},
    )
    with client.messages.stream(**asked, messages=WEATHER) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == {"city": "巴黎"} == final.content[-1].input
    for content in ("晴，25度", [{"type": "text", "text": "晴，"}, {"type": "text", "text": "25度"}]):
        result = {"type": "tool_result", "tool_use_id": call.id, "content": content, "is_error": False}
        history = [*WEATHER, {"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
        then = client.messages.create(**asked, messages=history)
        assert then.stop_reason == "end_turn" and then.content[-1].text


@pytest.mark.parametrize("choice, called", [({"type": "any"}, True), ({"type": "tool", "name": "get_weather"}, True),
                                            ({"type": "none"}, False)])  # fmt: skip
def test_tool_choice(client, choice, called):
    done = client.messages.create(**BASE, messages=SUM, tools=[TOOL], tool_choice=choice)
    assert (done.stop_reason == "tool_use") == called == (done.content[-1].type == "tool_use")


def test_the_reasons_why_it_stops(client):
    stopped = client.messages.create(**BASE, messages=SUM, stop_sequences=["=9", "xyz"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "=9")
    assert stopped.content[0].text == "347+586"
    cut = client.messages.create(**BASE | {"max_tokens": 3}, messages=SUM)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3
    asked = {"messages": WEATHER, "tools": [TOOL], "tool_choice": {"type": "any"}}
    for most in range(6, 20):  # somewhere the limit is within the arguments
        cut = client.messages.create(**BASE | {"max_tokens": most}, **asked)
        call = cut.content[-1] if cut.content else None
        if call is not None and call.type == "tool_use" and "INVALID_JSON" in call.input:
            break
    assert cut.stop_reason == "max_tokens" and call.input["INVALID_JSON"].startswith("{")


def test_an_answer_by_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    done = client.messages.create(
        **BASE, messages=SUM, output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "high"}
    )
    assert set(json.loads(done.content[0].text)) == {"name", "old"}


def test_the_beginning_of_the_answer(client):
    done = client.messages.create(**BASE, messages=[*SUM, {"role": "assistant", "content": "347+586=9"}])
    assert done.content[0].text.isdigit()  # no more than the rest, which the model guesses without thinking


def test_what_an_agent_sends(server):
    """The shape of what Claude Code 2.1 sends: blocks, accounting, a system message after the user's, betas."""
    cached = {"cache_control": {"type": "ephemeral"}}
    body = RAW | {
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2.3;"},
            {"type": "text", "text": "Be brief.", **cached},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Today is Friday."},
                                         {"type": "text", "text": SUM[0]["content"], **cached}]},
            {"role": "system", "content": "There are no other agents."},
        ],
        "tools": [{"name": "Bash", "description": "Runs a command", "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "additionalProperties": False,
            "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}}, "required": ["command"]}}],
        "metadata": {"user_id": "{\"device_id\": \"0\"}"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }  # fmt: skip
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,effort-2025-11-24"}
    answer = server.post("/v1/messages?beta=true", body, headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names[0] == "message_start" and names[-1] == "message_stop"

    def tokens(**fields):
        asked = {name: body[name] for name in ("system", "messages", "tools", "thinking")} | fields
        return server.post("/v1/messages/count_tokens?beta=true", asked).json()["input_tokens"]

    assert tokens() == tokens(system="Be brief.") > tokens(system=None)
    calls = [{"type": "tool_use", "id": f"toolu_{i}", "name": "Bash", "input": {"command": "ls"}} for i in (1, 2)]
    results = [
        {"tool_use_id": "toolu_1", "type": "tool_result", "content": "a", "is_error": False},
        {"tool_use_id": "toolu_2", "type": "tool_result", "content": "b", "is_error": True, **cached},
    ]
    history = [*body["messages"], {"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    assert server.post("/v1/messages", body | {"messages": history}).status_code == 200


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
BAD = [
    ("max_tokens", {"max_tokens": None}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"type": "document"}]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[1].role", {"messages": [*SUM, {"role": "tool", "content": "x"}]}),
    ("messages[0].content[0].input", {"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "x"}]}]}),
    ("messages", {"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "x", "input": {}}]}]}),
    ("messages", {"messages": []}),
    ("system[0].type", {"system": [IMAGE]}),
    ("tools[0].type", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ("tools[0].input_schema", {"tools": [{"name": "x"}]}),
    ("tools", {"tools": [TOOL, TOOL]}),
    ("tools[0].name", {"tools": [TOOL | {"name": "a<b"}]}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}),
    ("tool_choice", {"tool_choice": {"type": "required"}}),
    ("tool_choice.type", {"tool_choice": {"type": ["auto"]}}),
    ("tool_choice.name", {"tool_choice": {"type": "tool"}}),
    ("messages[0].content[0].content", {"messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "x", "content": 5}]}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [5]}]}),
    ("thinking.type", {"thinking": {"type": "perhaps"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": -1}}),
    ("output_config.format", {"output_config": {"format": {"type": "yaml"}}}),
    ("output_config.format", {"output_config": {"format": {"type": "json_schema", "schema": {"type": "tuple"}}}}),
    ("stop_sequences", {"stop_sequences": [""]}),
    ("temperature", {"temperature": -1}),
    ("mcp_servers", {"mcp_servers": [{"type": "url", "url": "http://example.com"}]}),
]  # fmt: skip


@pytest.mark.parametrize("field, asked", BAD)
def test_bad_requests(server, field, asked):
    refused = server.post("/v1/messages", RAW | {"messages": SUM} | asked)
    said = refused.json()
    assert refused.status_code == 400 and said["type"] == "error" and said["request_id"], said
    assert said["error"]["type"] == "invalid_request_error" and said["error"]["message"].startswith(field), said


def test_errors_have_anthropic_s_shape(server, client):
    long = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        client.messages.create(**BASE, messages=long)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.count_tokens(model="any", messages=[{"role": "user", "content": "word " * 300000}])
    assert server.post("/v1/messages", b"{").json()["type"] == "error"
    assert server.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
