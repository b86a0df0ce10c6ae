"""Real clients beside the plain one of test_openai.py: the asynchronous openai client, its parsed answers and raw
responses. LangChain has a file of its own, test_langchain.py."""

import asyncio

import openai
import pytest
from pydantic import BaseModel, Field

from glimmer.cli.demo import TOOL

pytestmark = pytest.mark.slow
WEATHER = [{"role": "user", "content": "巴黎的天气怎么样？"}]
CITY = [{"role": "user", "content": "请介绍一下北京"}]


class City(BaseModel):
    """A city, for an answer of a given form."""

    name: str = Field(max_length=12)
    old: bool


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
