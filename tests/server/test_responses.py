"""OpenAI's Responses as the real client uses them, over a real socket; the demo model answers."""

import json

import httpx
import openai
import pytest

from glimmer.cli import demo
from glimmer.server.responses_store import ResponseStore

SUM = "What is 347 + 586?"
WEATHER = "巴黎今天天气怎么样？"
CITY = demo.TOOL["function"]["parameters"]
TOOL = {"type": "function", "name": "get_weather", "description": "Get the weather", "parameters": CITY}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Changes files",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[a-z]{2,6}"},
}
AGENTS = {
    "type": "namespace",
    "name": "agents",
    "description": "Other agents",
    "tools": [{"type": "function", "name": "wait", "strict": False, "parameters": CITY}],
}
BASE = {"model": "any", "temperature": 0, "max_output_tokens": 400}


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def events(response: httpx.Response) -> list[dict]:
    """The events of a stream: each has its type as its name, and the number of its place."""
    pairs = [text.split("\n", 1) for text in response.text.split("\n\n") if text.startswith("event")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


@pytest.mark.slow
def test_a_response(client):
    done = client.responses.create(**BASE, input=SUM)
    reasoning, message = done.output
    assert done.status == "completed" and done.output_text == "347+586=933" and message.role == "assistant"
    assert "so 933" in reasoning.content[0].text and reasoning.summary == [] and reasoning.encrypted_content is None
    usage = done.usage
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    again = client.responses.create(**BASE, input=[{"role": "user", "content": SUM}], metadata={"a": "b"})
    assert again.output_text == done.output_text and again.metadata == {"a": "b"}
    assert 0 < again.usage.input_tokens_details.cached_tokens < usage.input_tokens


@pytest.mark.slow
@pytest.mark.parametrize("summary", [None, "auto"])
def test_a_stream_says_the_same(client, server, summary):
    asked = BASE | {"input": SUM, "reasoning": {"summary": summary}}
    done = client.responses.create(**asked)
    told = events(server.post("/v1/responses", asked | {"stream": True}))
    part, text = ("reasoning_summary_part", "reasoning_summary_text") if summary else ("content_part", "reasoning_text")
    order = list(dict.fromkeys(event["type"].removeprefix("response.") for event in told))
    assert order == list(dict.fromkeys([
        "created", "in_progress", "output_item.added", f"{part}.added", f"{text}.delta", f"{text}.done",
        f"{part}.done", "output_item.done", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "completed"]))  # fmt: skip
    for name in (text, "output_text"):
        pieces = [event["delta"] for event in told if event["type"] == f"response.{name}.delta"]
        [whole] = [event["text"] for event in told if event["type"] == f"response.{name}.done"]
        assert "".join(pieces) == whole
    plain = lambda output: [{**item, "id": ""} for item in output]
    last = told[-1]["response"]
    assert plain(last["output"]) == plain(done.model_dump(exclude_unset=True)["output"])
    assert [event["item"] for event in told if event["type"] == "response.output_item.done"] == last["output"]
    assert told[0]["response"]["status"] == "in_progress" and told[0]["response"]["output"] == []
    with client.responses.stream(model="any", input=SUM, temperature=0, reasoning={"summary": summary}) as stream:
        assert stream.get_final_response().output_text == done.output_text


@pytest.mark.slow
def test_the_limit_of_tokens(client, server):
    cut = client.responses.create(**BASE | {"max_output_tokens": 3}, input=SUM)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.output[-1].status == "incomplete" and cut.usage.output_tokens == 3
    told = events(server.post("/v1/responses", BASE | {"max_output_tokens": 3, "input": SUM, "stream": True}))
    assert told[-1]["type"] == "response.incomplete"
    assert client.responses.create(**BASE, input="x", previous_response_id=cut.id).status == "completed"


@pytest.mark.slow
def test_a_call_and_its_output(client, server):
    asked = BASE | {"tools": [TOOL]}
    first = client.responses.create(**asked, input=WEATHER)
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "巴黎"})
    told = events(server.post("/v1/responses", asked | {"input": WEATHER, "stream": True}))
    pieces = [event["delta"] for event in told if event["type"] == "response.function_call_arguments.delta"]
    [whole] = [event for event in told if event["type"] == "response.function_call_arguments.done"]
    assert "".join(pieces) == whole["arguments"] == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "晴，25度"}
    by_id = client.responses.create(**asked, input=[output], previous_response_id=first.id)
    history = [{"role": "user", "content": WEATHER}, *[item.model_dump() for item in first.output], output]
    by_hand = client.responses.create(**asked, input=history, store=False)
    assert by_id.output_text == by_hand.output_text != "" and by_id.usage.input_tokens == by_hand.usage.input_tokens
    output["output"] = [{"type": "input_text", "text": "晴，25度"}]
    assert client.responses.create(**asked, input=[*history[:-1], output]).output_text == by_hand.output_text


@pytest.mark.slow
def test_sealed_thoughts_come_back(client):
    asked = BASE | {"tools": [TOOL], "store": False, "include": ["reasoning.encrypted_content"]}
    first = client.responses.create(**asked, input=WEATHER)
    reasoning, call = first.output[0].model_dump(), first.output[-1].model_dump()
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "晴"}

    def tokens(item):
        history = [{"role": "user", "content": WEATHER}, item, call, output]
        return client.responses.input_tokens.count(model="any", input=history, tools=[TOOL]).input_tokens

    bare = {"type": "reasoning", "id": "rs_1", "summary": []}
    assert tokens(reasoning | {"content": None}) == tokens(reasoning) > tokens(bare)
    assert tokens(bare | {"encrypted_content": "gAAAAAB"}) == tokens(bare)
    summary = [{"type": "summary_text", "text": reasoning["content"][0]["text"]}]
    assert tokens(bare | {"summary": summary}) == tokens(reasoning)


@pytest.mark.slow
def test_custom_tools_and_namespaces(client, server):
    asked = BASE | {"input": "Go on", "tools": [PATCH, AGENTS, {"type": "web_search"}]}
    choice = {"type": "custom", "name": "apply_patch"}
    done = client.responses.create(**asked, tool_choice=choice)
    call = done.output[-1]
    assert (call.type, call.name) == ("custom_tool_call", "apply_patch")
    assert 2 <= len(call.input) <= 6 and call.input.isalpha()
    assert [tool.type for tool in done.tools] == ["custom", "namespace"]
    told = events(server.post("/v1/responses", asked | {"tool_choice": choice, "stream": True}))
    assert [event["input"] for event in told if event["type"].endswith("custom_tool_call_input.done")] == [call.input]
    choice = {"type": "function", "name": "wait", "namespace": "agents"}
    then = client.responses.create(**asked, tool_choice=choice).output[-1]
    assert (then.type, then.name, then.namespace) == ("function_call", "wait", "agents")
    outputs = [
        {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"},
        {"type": "function_call_output", "call_id": then.call_id, "output": "done"},
    ]
    history = [{"role": "user", "content": "Go on"}, call.model_dump(), outputs[0], then.model_dump(), outputs[1]]
    assert client.responses.create(**asked | {"input": history}).status == "completed"


@pytest.mark.slow
def test_tool_choice(client):
    tools = [TOOL, TOOL | {"name": "other"}]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    for choice, name in (("required", None), ({"type": "function", "name": "other"}, "other"), (allowed, "other")):
        done = client.responses.create(**BASE, input=WEATHER, tools=tools, tool_choice=choice)
        assert done.output[-1].type == "function_call" and name in (None, done.output[-1].name)
    none = client.responses.create(**BASE, input=WEATHER, tools=tools, tool_choice="none")
    assert none.output[-1].type != "function_call"


@pytest.mark.slow
def test_an_answer_by_a_schema(client):
    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "name": "age", "schema": schema, "strict": True}
    for effort in ("none", "high"):
        done = client.responses.create(**BASE, input=SUM, text={"format": form}, reasoning={"effort": effort})
        assert set(json.loads(done.output_text)) == {"old"}
        assert ("reasoning" in [item.type for item in done.output]) <= (effort == "high")


@pytest.mark.slow
def test_what_is_stored(client, server):
    first = client.responses.create(**BASE, input=SUM, instructions="Be brief.")
    found = client.responses.retrieve(first.id)
    assert found == first
    listed = client.responses.input_items.list(first.id)
    assert [item.role for item in listed.data] == ["user"] and listed.data[0].id
    second = client.responses.create(**BASE, input="And twice that?", previous_response_id=first.id)
    items = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.type for item in items.data] == ["message", "reasoning"] and items.has_more
    [item] = client.responses.input_items.list(second.id, order="asc", after=items.data[-1].id, limit=1).data
    assert item.role == "assistant" and item.content[0].text == first.output_text
    for field, asked in (("limit", "x"), ("limit", "0"), ("limit", "101"), ("order", "up"), ("after", "msg_0")):
        refused = server.get(f"/v1/responses/{first.id}/input_items", params={field: asked})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == field
    assert server.get(f"/v1/responses/{first.id}?stream=true").json()["error"]["param"] == "stream"
    client.responses.delete(first.id)
    for gone in (first.id, client.responses.create(**BASE, input=SUM, store=False).id, "resp_x"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError) as refused:
            client.responses.create(**BASE, input=SUM, previous_response_id=gone)
        assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(gone)
    assert client.responses.create(**BASE, input="And that?", previous_response_id=second.id).output_text


def test_the_store_forgets():
    now = [0.0]
    store = ResponseStore(100, most=3, seconds=10, clock=lambda: now[0])
    for id in "abc":
        store.keep(id, b"r" * 10, b"i" * 10)
    assert store.get("a").response == b"r" * 10
    store.keep("d", b"", b"")  # one too many: the one that was not asked for
    assert store.get("b") is None and store.get("a") and len(store) == 3
    store.keep("large", b"x" * 101, b"")
    assert store.get("large") is None and len(store) == 3
    store.keep("e", b"x" * 60, b"")  # too much together
    assert store.get("c") is None and store.get("e")
    assert store.drop("e") and not store.drop("e")
    now[0] = 11.0
    assert store.get("a") is None and len(store) == 0
    none = ResponseStore(0)
    none.keep("a", b"{}", b"[]")
    assert none.get("a") is None


@pytest.mark.slow
def test_what_an_agent_sends(server):
    """The shape of what Codex 0.171 sends: developer messages, namespaces, web_search, sealed thoughts, its own ids."""
    text = lambda role, words: {"type": "message", "id": "msg_1", "role": role,
                                "content": [{"type": "input_text", "text": words}]}  # fmt: skip
    run = {"type": "function", "name": "exec_command", "description": "Runs a command", "strict": False,
           "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}, "tty": {"type": "boolean"}},
                          "required": ["cmd"], "additionalProperties": False}}  # fmt: skip
    body = {
        "model": "glimmer",
        "stream": True,
        "store": False,
        "input": [text("developer", "Be brief."), text("user", "Today is Friday."), text("user", SUM)],
        "tools": [run, AGENTS, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0",
        "client_metadata": {"session_id": "0"},
    }
    told = events(server.post("/v1/responses", body))
    assert told[-1]["type"] == "response.completed"
    call = {"type": "function_call", "status": "completed", "id": "fc_1", "name": "exec_command", "call_id": "call_1",
            "arguments": "{\"cmd\": \"ls\"}"}  # fmt: skip
    wait = call | {"name": "wait", "namespace": "agents", "call_id": "call_2", "arguments": '{"city": "x"}'}
    outputs = [
        {"type": "function_call_output", "id": f"fco_{i}", "call_id": f"call_{i}", "output": "x"} for i in (1, 2)
    ]
    answer = {"type": "message", "status": "completed", "id": "msg_2", "role": "assistant",
              "content": [{"type": "output_text", "text": "Look", "annotations": []}]}  # fmt: skip
    history = [*body["input"], told[-1]["response"]["output"][0], answer, call, wait, *outputs]
    assert events(server.post("/v1/responses", body | {"input": history}))[-1]["type"] == "response.completed"


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,"}
CALL = {"type": "function_call", "call_id": "1", "name": "x", "arguments": "{}"}
BAD = [
    ("input", {"input": None}),
    ("input", {"input": []}),
    ("input[0].content[0].type", {"input": [{"role": "user", "content": [IMAGE]}]}),
    ("input[0].type", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
    ("input[0].type", {"input": [{}]}),
    ("input[0].role", {"input": [{"role": "critic", "content": "x"}]}),
    ("input[0].arguments", {"input": [CALL | {"arguments": "{\"a"}]}),
    ("input[1].output[0].type", {"input": [CALL, {"type": "function_call_output", "call_id": "1", "output": [IMAGE]}]}),
    ("input[0].call_id", {"input": [{"type": "function_call_output", "output": ""}]}),
    ("tools[0].name", {"tools": [{"type": "function"}]}),
    ("tools[0].type", {"tools": [{"type": "mcp", "server_url": "http://example.com"}]}),
    ("tools[1].tools[0].type", {"tools": [TOOL, {"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]}),
    ("tools[1].tools[0].parameters", {"tools": [{"type": "web_search"}, {"type": "namespace", "name": "n", "tools": [
        TOOL | {"strict": True, "parameters": {"type": "object", "minProperties": 1}}]}]}),
    ("tool_choice", {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tools[0].tools", {"tools": [{"type": "namespace", "name": "x", "tools": 5}]}),
    ("tools[0].tools[0].type", {"tools": [{"type": "namespace", "name": "x", "tools": [5]}]}),
    ("tools[0].parameters", {"tools": [{"type": "function", "name": "x", "parameters": 7}]}),
    ("tools[0].parameters", {"tools": [TOOL | {"parameters": CITY | {"required": [["city"]]}}]}),
    ("tools[0].parameters", {"tools": [TOOL | {"parameters": CITY | {"required": [None]}}]}),
    ("tool_choice.tools", {"tool_choice": {"type": "allowed_tools", "tools": 5}}),
    ("tool_choice.tools.name", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [5]}}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": [], "tools": []}}),
    ("input[0].tools", {"input": [{"type": "additional_tools", "tools": 5}]}),
    ("input[0].type", {"input": [{"type": ["x"]}]}),
    ("input[0].summary", {"input": [{"type": "reasoning", "summary": 5}]}),
    ("input[0]", {"input": [5]}),
    ("text.format", {"text": {"format": {"type": "yaml"}}}),
    ("text.format", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "tuple"}}}}),
    ("reasoning.effort", {"reasoning": {"effort": "some"}}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("temperature", {"temperature": -1}),
    ("background", {"background": True}),
    ("conversation", {"conversation": "conv_1"}),
    ("prompt", {"prompt": {"id": "pmpt_1"}}),
    ("top_logprobs", {"top_logprobs": 3}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("field, asked", BAD)
def test_bad_requests(server, field, asked):
    refused = server.post("/v1/responses", BASE | {"input": SUM} | asked)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == field, refused.text


@pytest.mark.slow
def test_an_input_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**BASE, input="word " * 3000, truncation="auto")
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
