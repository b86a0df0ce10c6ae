"""Real clients beside the plain one of test_openai.py: the asynchronous openai client, its parsed answers and raw
responses, and LangChain's ChatOpenAI, whole and in pieces, with tools and with structured output."""

import asyncio

import openai
import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow
WEATHER = [{"role": "user", "content": "巴黎的天气怎么样？"}]
CITY = [{"role": "user", "content": "请介绍一下北京"}]


class City(BaseModel):
    """A city, for an answer of a given form."""

    name: str = Field(max_length=12)
    old: bool


def get_weather(city: str) -> str:
    """Get the weather"""
    return city


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "City"}},
            "required": ["city"],
        },
    },
}


def test_the_asynchronous_client(server):
    """Several streams at once in one loop; one is left in its middle."""

    async def ask(client: openai.AsyncOpenAI, left: bool) -> str:
        asked = {"model": "any", "messages": CITY, "temperature": 0, "max_tokens": 40}
        text = ""
        async with await client.chat.completions.create(**asked, stream=True) as stream:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if left and text:
                    break
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, left=number == 0) for number in range(4)))

    left, *whole = asyncio.run(all_of_them())
    assert left and len(set(whole)) == 1 and whole[0].startswith(left)


def test_answers_that_the_client_parses(server):
    with server.openai() as client:
        done = client.chat.completions.parse(
            model="any", messages=CITY, response_format=City, temperature=0, max_tokens=300
        )
        assert isinstance(done.choices[0].message.parsed, City)
        tools = [openai.pydantic_function_tool(City, name="remember")]
        called = client.chat.completions.parse(
            model="any", messages=CITY, tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=0
        )
        [call] = called.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, City)
        with client.chat.completions.stream(model="any", messages=WEATHER, tools=[TOOL], temperature=0) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        assert final.choices[0].message.tool_calls[0].function.parsed_arguments is None  # the tool is not strict
        assert final.choices[0].finish_reason == "tool_calls"


def test_raw_responses_and_errors(server):
    with server.openai() as client:
        raw = client.chat.completions.with_raw_response.create(model="any", messages=CITY, max_tokens=2)
        assert raw.headers["content-type"] == "application/json" and raw.parse().usage.completion_tokens == 2
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="any", messages=CITY, temperature=-1)
        assert refused.value.param == "temperature" and refused.value.code == "invalid_value"


@pytest.fixture(scope="module")
def model(server):
    """LangChain's ChatOpenAI."""
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    return chat(
        base_url=f"{server.url}/v1",
        api_key="none",
        model="any",
        temperature=0,
        max_tokens=300,
        max_retries=0,
        stream_usage=True,
    )


def test_langchain_whole_and_in_pieces(model):
    whole = model.invoke("What is 347 + 586?")
    assert whole.content == "347+586=933" and whole.response_metadata["finish_reason"] == "stop"
    pieces = list(model.stream("What is 347 + 586?"))
    assert "".join(piece.content for piece in pieces) == whole.content
    used = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert used[-1]["output_tokens"] == whole.usage_metadata["output_tokens"]


def test_langchain_tools(model):
    """A call, its result in a second turn, and the answer."""
    from langchain_core.messages import HumanMessage, ToolMessage

    asking = model.bind_tools([get_weather])
    question = HumanMessage("巴黎的天气怎么样？")
    called = asking.invoke([question])
    [call] = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "巴黎"})
    first, *others = asking.stream([question])
    [streamed] = sum(others, start=first).tool_calls
    assert streamed["args"] == call["args"]
    assert asking.invoke([question, called, ToolMessage("22 度，晴", tool_call_id=call["id"])]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(model, method):
    assert isinstance(model.with_structured_output(City, method=method).invoke("请介绍一下北京"), City)
