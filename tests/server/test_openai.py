"""OpenAI's API as the real client uses it, over a real socket; the demo model answers."""

import json

import pytest
from servers import events

from glimmer.cli.demo import TOOL

pytestmark = pytest.mark.slow
SUM = [{"role": "user", "content": "What is 347 + 586?"}]
WEATHER = [{"role": "user", "content": "巴黎今天天气怎么样？"}]


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def test_a_conversation(client):
    done = client.chat.completions.create(model="any", messages=SUM, temperature=0)
    message, usage = done.choices[0].message, done.usage
    assert message.content == "347+586=933" and "so 933" in message.reasoning_content
    assert message.reasoning == message.reasoning_content and done.choices[0].finish_reason == "stop"
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_says_the_same(client):
    done = client.chat.completions.create(model="any", messages=SUM, temperature=0)
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="any", messages=SUM, temperature=0, stream=True, stream_options=options)
    )
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    deltas = [chunk.choices[0].delta for chunk in middle]
    assert "".join(delta.content or "" for delta in deltas) == done.choices[0].message.content
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == done.choices[0].message.reasoning
    assert last.choices[0].finish_reason == "stop" and not last.choices[0].delta.model_dump(exclude_none=True)
    assert usage.choices == [] and usage.usage.completion_tokens == done.usage.completion_tokens


def test_a_tool_call_in_pieces(client):
    asked = {"model": "any", "messages": WEATHER, "tools": [TOOL], "temperature": 0}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    first, *others = deltas
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather") and first.id
    assert all(one.index == 0 and one.id is None and one.function.name is None for one in others)
    assert json.loads("".join(one.function.arguments for one in deltas)) == {"city": "巴黎"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    [call] = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "巴黎"}


def test_a_call_that_a_stop_string_cuts_off_is_no_call_to_make(client):
    asked = {"model": "any", "messages": WEATHER, "tools": [TOOL], "temperature": 0}
    for stop in ("</arg_value>", "</tool_call>"):
        [choice] = client.chat.completions.create(**asked, stop=[stop]).choices
        assert choice.finish_reason == "stop"
        assert choice.message.tool_calls[0].function.arguments.startswith('{"city": "巴黎')
        with pytest.raises(ValueError):
            json.loads(choice.message.tool_calls[0].function.arguments)


def test_thinking_in_the_vendor_s_words(server):
    def answer(**fields):
        return server.post("/v1/chat/completions", {"messages": SUM, "temperature": 0, **fields})

    quick = answer(thinking={"type": "disabled"}).json()["choices"][0]["message"]
    assert quick["content"] and not quick["reasoning_content"]
    refused = answer(thinking={"type": "disabled"}, chat_template_kwargs={"enable_thinking": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "thinking"
    assert answer(thinking={"type": "off"}).json()["error"]["param"] == "thinking.type"


@pytest.mark.parametrize("field, value", [("echo", True), ("return_token_ids", True), ("include_reasoning", False)])
def test_fields_of_other_servers_that_would_change_an_answer_are_refused_by_name(server, field, value):
    body = {"messages": SUM, "temperature": 0, "max_tokens": 2}
    error = server.post("/v1/chat/completions", body | {field: value}).json()["error"]
    assert error["param"] == field and error["type"] == "invalid_request_error"
    assert server.post("/v1/chat/completions", body | {field: not value}).status_code == 200


def test_the_raw_stream(server):
    response = server.post("/v1/chat/completions", {"messages": SUM, "stream": True, "max_tokens": 3})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }


def test_the_model_has_a_name(server, client):
    [model] = client.models.list().data
    assert model.id == "glimmer-demo" and model.max_model_len == 1024
    assert server.get("/version").json()["version"] and server.get("/ready").status_code == 200


def test_a_beginning_that_has_been_there_is_cached(client):
    long = [{"role": "user", "content": "cats and dogs " * 30}]
    used = [client.chat.completions.create(model="any", messages=long, max_tokens=2).usage for _ in range(2)]
    assert used[1].prompt_tokens_details.cached_tokens >= 16 > 0 == used[0].prompt_tokens_details.cached_tokens
    salted = client.chat.completions.create(model="any", messages=long, max_tokens=2, extra_body={"cache_salt": "mine"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_several_answers_with_logprobs(client):
    asked = {
        "messages": SUM,
        "n": 3,
        "seed": 5,
        "temperature": 1.0,
        "max_tokens": 6,
        "logprobs": True,
        "top_logprobs": 2,
    }
    done = client.chat.completions.create(model="any", **asked)
    again = client.chat.completions.create(model="any", **asked)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    for one, other in zip(done.choices, again.choices):
        assert one.message.reasoning == other.message.reasoning and len(one.logprobs.content) == 6
        assert all(bytes(p.bytes).decode(errors="replace") == p.token and p.logprob <= 0 for p in one.logprobs.content)
        assert all(len(place.top_logprobs) == 2 for place in one.logprobs.content)
    streamed = list(client.chat.completions.create(model="any", **asked, stream=True))
    places = [
        p for c in streamed if c.choices[0].index == 1 and c.choices[0].logprobs for p in c.choices[0].logprobs.content
    ]
    assert [place.token for place in places] == [place.token for place in done.choices[1].logprobs.content]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_so_far_in_each_chunk(server, path):
    body = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = body | {"max_tokens": 12, "ignore_eos": True, "stream": True, "stream_options": options, "n": 2, "seed": 3}
    lines = [line[6:] for line in server.post(path, asked).text.splitlines() if line.startswith("data: {")]
    usages = [json.loads(line)["usage"] for line in lines]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts) and counts[0] < 24 and counts[-1] == 24  # what comes together is one chunk
    assert len({usage["prompt_tokens"] for usage in usages}) == 1
    assert usages[-2] == usages[-1]
