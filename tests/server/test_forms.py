"""Answers of a given form over HTTP: schemas, choices, tool_choice; budgets of thought."""

import json

import openai
import pytest

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": "请介绍一下北京"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
CHECK = {"type": "function", "function": {"name": "check", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def chat(client, **asked):
    return client.chat.completions.create(model="any", **{"messages": ASK, "temperature": 0, "max_tokens": 400} | asked)


def test_an_answer_by_a_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    for thinks in (True, False):
        kwargs = {"chat_template_kwargs": {"enable_thinking": thinks}}
        message = chat(client, response_format=form, extra_body=kwargs).choices[0].message
        assert set(json.loads(message.content)) == {"name", "old"} and bool(message.reasoning) <= thinks


@pytest.mark.parametrize(
    "form", [{"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]},
             {"structured_outputs": {"regex": "yes|no"}}, {"guided_regex": "(yes|no)"}],
)  # fmt: skip
def test_names_of_vllm(client, form):
    assert chat(client, extra_body=form).choices[0].message.content in ("yes", "no")
    done = client.completions.create(model="any", prompt="Well:", max_tokens=50, extra_body=form)
    assert done.choices[0].text in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "check"}}])
def test_a_call_that_must_come(client, choice):
    tools = [CHECK] if choice == "required" else [OTHER, CHECK]
    stream = chat(client, tools=tools, tool_choice=choice, parallel_tool_calls=False, stream=True)
    chunks = list(stream)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "check" and {call.index for call in calls} == {0}
    arguments = json.loads("".join(call.function.arguments for call in calls))
    assert set(arguments) == {"name", "old"} and isinstance(arguments["old"], bool)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_budget_of_thoughts(client):
    question = [{"role": "user", "content": "What is 347 + 586?"}]
    free = chat(client, messages=question)
    for budget in (0, 5):
        done = chat(client, messages=question, extra_body={"thinking_token_budget": budget})
        assert done.usage.completion_tokens_details.reasoning_tokens == budget
        assert free.choices[0].message.reasoning.startswith(done.choices[0].message.reasoning or "")
        assert done.choices[0].message.content


def test_thinking_can_be_switched_off(client):
    for off in (
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        assert chat(client, extra_body=off).choices[0].message.reasoning is None


@pytest.mark.parametrize(
    "field, asked",
    [
        ("response_format", {"response_format": {"type": "yaml"}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "tuple"}}}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
        ("guided_regex", {"guided_regex": "("}),
        ("guided_json", {"guided_json": {"type": 5}}),
        ("structured_outputs", {"structured_outputs": {"colour": "red"}}),
        ("guided_regex", {"guided_regex": "a", "response_format": {"type": "json_object"}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [CHECK], "tool_choice": {"type": "function", "function": {"name": "none"}}}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("thinking_token_budget", {"thinking_token_budget": -1}),
        ("thinking.type", {"thinking": {"type": "perhaps"}}),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_named(client, field, asked):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body=asked)
    assert refused.value.param.startswith(field), refused.value


COMPLEX = {"type": "string", "pattern": "^(a{9999}){9999}$"}  # the library compiles it, and cannot follow it
NAMED = {"type": "json_schema", "name": "x", "schema": COMPLEX}
QUICK = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 20}
TOO_COMPLEX = {
    "/v1/chat/completions": (
        "response_format",
        {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": {"schema": COMPLEX}}} | QUICK,
    ),
    "/v1/completions": (
        "structured_outputs.regex",
        {"prompt": "x", "max_tokens": 20, "structured_outputs": {"regex": "(a{9999}){9999}"}},
    ),
    "/v1/messages": (
        "output_config.format",
        {"messages": ASK, "max_tokens": 200, "output_config": {"format": NAMED}},
    ),
    "/v1/responses": (
        "text.format",
        {"input": "x", "reasoning": {"effort": "none"}, "max_output_tokens": 20, "text": {"format": NAMED}},
    ),
}


@pytest.mark.parametrize("path", TOO_COMPLEX)
def test_a_form_that_proves_too_complex_while_it_is_followed(server, path):
    """A refusal that names the field; in a stream that has begun, the last event, in the shape of the API."""
    field, body = TOO_COMPLEX[path]
    refused = server.post(path, body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error" and "could not be followed" in error["message"]
    assert field in (error.get("param"), error["message"].partition(":")[0])

    stream = server.post(path, body | {"stream": True})
    assert stream.status_code == 200
    *_, last = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert "[DONE]" not in stream.text
    if path == "/v1/responses":
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        failed = last["response"]["error"]
        assert failed["code"] == "invalid_prompt" and "could not be followed" in failed["message"]
    else:
        assert last["error"] == error and last.get("type") == ("error" if path == "/v1/messages" else None)
