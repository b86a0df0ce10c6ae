"""LangChain over a real socket, by each of its APIs: conversations, streams, tools, answers of a given form."""

import pytest

from glimmer.cli.demo import TOOL

pytestmark = pytest.mark.slow
openai = pytest.importorskip("langchain_openai")
SUM, WEATHER = "What is 347 + 586?", "巴黎今天天气怎么样？"
AGE = {
    "title": "age",
    "description": "An age",
    "type": "object",
    "properties": {"old": {"type": "boolean"}},
    "required": ["old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["chat", "responses", "anthropic"])
def model(request, server):
    """A chat model of LangChain."""
    if request.param == "anthropic":
        anthropic = pytest.importorskip("langchain_anthropic")
        return anthropic.ChatAnthropic(
            model="any", base_url=server.url, api_key="none", max_tokens=400, max_retries=0, timeout=60
        )
    return openai.ChatOpenAI(
        model="any", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=400, max_retries=0,
        timeout=60, use_responses_api=request.param == "responses",
    )  # fmt: skip


def test_a_conversation_and_its_stream(model):
    done = model.invoke([("system", "Be brief."), ("user", SUM)])
    assert done.text and done.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream([("system", "Be brief."), ("user", SUM)]))
    assert "".join(chunk.text for chunk in chunks) and len(chunks) > 1


def test_tools(model):
    bound, asked = model.bind_tools([TOOL]), [("user", WEATHER)]
    answer = model.bind_tools([TOOL], tool_choice="any").invoke(asked)
    [call] = answer.tool_calls[:1]
    assert call["name"] == "get_weather" and isinstance(call["args"]["city"], str)
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "晴，25度"} for one in answer.tool_calls]
    then = bound.invoke([*asked, answer, *results])
    assert then.text or then.tool_calls


def test_an_answer_of_a_given_form(model):
    method = {} if "Anthropic" in type(model).__name__ else {"method": "json_schema", "strict": True}
    assert set(model.with_structured_output(AGE, **method).invoke(SUM)) == {"old"}
