"""Completions and the tokens of a text, with the real client; the demo model answers as it does offline."""

import math

import openai
import pytest
from servers import events

pytestmark = pytest.mark.slow
CITY = "请介绍一下北京"


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


def test_several_prompts_of_both_kinds(server, client):
    ids = server.post("/tokenize", {"prompt": CITY, "return_token_strs": True}).json()
    assert ids["count"] == len(ids["tokens"]) == len(ids["token_strs"]) and ids["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": CITY}
    asked = {"model": "any", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(prompt=CITY, **asked)
    assert one.choices[0].finish_reason == "length" and one.usage.completion_tokens == 8
    several = client.completions.create(prompt=[ids["tokens"], ids["tokens"]], n=2, **asked)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in several.choices} == {one.choices[0].text}
    assert several.usage.prompt_tokens == 2 * one.usage.prompt_tokens and several.usage.completion_tokens == 32


def test_a_stream_of_several_prompts(server, client):
    body = {"prompt": [CITY, "1+1="], "max_tokens": 5, "temperature": 0, "echo": True, "stream": True}
    chunks = events(server.post("/v1/completions", body | {"stream_options": {"include_usage": True}}))
    *told, usage = chunks
    texts = ["".join(c["choices"][0]["text"] for c in told if c["choices"][0]["index"] == i) for i in range(2)]
    whole = client.completions.create(model="any", prompt=[CITY, "1+1="], max_tokens=5, temperature=0, echo=True)
    assert texts == [choice.text for choice in whole.choices] and texts[0].startswith(CITY)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 10
    assert sum(c["choices"][0]["finish_reason"] == "length" for c in told) == 2


def test_logprobs_of_the_prompt(client):
    """What evaluation programs ask: how likely is this text?"""
    asked = {"model": "any", "prompt": CITY, "temperature": 0, "echo": True, "logprobs": 2}
    done = client.completions.create(max_tokens=0, **asked)
    [choice], found = done.choices, done.choices[0].logprobs
    assert choice.text == CITY and done.usage.completion_tokens == 0
    assert found.tokens[0] and found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert len(found.tokens) == done.usage.prompt_tokens and all(-math.inf < p <= 0 for p in found.token_logprobs[1:])
    longer = client.completions.create(max_tokens=2, **asked).choices[0]
    assert longer.logprobs.tokens[:-2] == found.tokens and longer.text.startswith(CITY)
    assert all(token in top for token, top in zip(longer.logprobs.tokens[1:], longer.logprobs.top_logprobs[1:]))


def test_tokens_without_text_are_chunks_too(server):
    """While a stop string may be coming there is no text to tell, but a client sees that the answer grows."""
    [x] = server.post("/tokenize", {"prompt": "x"}).json()["tokens"]
    body = {"prompt": CITY, "max_tokens": 200, "ignore_eos": True, "allowed_token_ids": [x], "stop": ["x" * 300]}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *told, end, _ = events(server.post("/v1/completions", body | {"stream": True, "stream_options": options}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in told if chunk["choices"][0]["text"] == ""]
    assert len(counts) > 2 and counts == sorted(set(counts)) and counts[0] < 200
    assert end["choices"][0]["finish_reason"] == "length"
    assert "".join(chunk["choices"][0]["text"] for chunk in told) == "x" * 200


def test_a_stop_string_never_shows_its_beginning(client):
    whole = client.completions.create(model="any", prompt=CITY, max_tokens=24, temperature=0).choices[0].text
    stop = whole[6:9]
    cut = client.completions.create(model="any", prompt=CITY, max_tokens=24, temperature=0, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)] and (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    stream = client.completions.create(model="any", prompt=CITY, max_tokens=24, temperature=0, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == cut.text


@pytest.mark.parametrize(
    "field, value",
    [("suffix", "x"), ("best_of", 3), ("logprobs", 21), ("n", 129), ("max_tokens", 0), ("prompt", []), ("prompt", ""),
     ("prompt", [[]]), ("prompt", [-1]), ("prompt", [10**30]), ("prompt", "x" * 10**6), ("echo", "yes"), ("n", 0),
     ("stop", [""]), ("stop", 5), ("seed", 10**60), ("logit_bias", {"x": 1}), ("logit_bias", {"99999999": 1}),
     ("top_p", 0), ("temperature", "hot"), ("typical_p", 0.5), ("return_token_ids", True),
     ("n_predict", 5)],
)  # fmt: skip
def test_what_cannot_be_served_is_named(client, field, value):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="any", **{"prompt": "hi"}, extra_body={field: value})
    assert refused.value.param == field and refused.value.type == "invalid_request_error", refused.value
