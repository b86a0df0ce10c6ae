"""SamplingParams.structured_outputs with the demo model: the offline interface, from a form to answers that have it."""

import asyncio
import json
import re

import jsonschema
import pytest
from checkpoints import DEMO

from glimmer import LLM, SamplingParams
from glimmer.config import StructuredOutputs
from glimmer.engine.sequence import FinishReason
from glimmer.errors import RequestError
from glimmer.text.parse import answer_format, parse_answer, thinking_open
from glimmer.text.tokenizer import Tokenizer

CALL = Tokenizer.load(str(DEMO)).token_to_id("<tool_call>")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 10_000_000},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["city", "population", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm():
    with LLM(str(DEMO), max_model_len=1024, kv_cache_memory_bytes=64 << 20) as llm:
        yield llm


def params(max_tokens=250, **form):
    return SamplingParams(structured_outputs=form, max_tokens=max_tokens, temperature=1.5, seed=3)


def test_every_form_beside_free_answers(llm):
    forms = [
        {"json": CITY},
        {"regex": "[0-9]{4}-[0-9]{2}"},
        {"choice": ["yes", "no"]},
        {"grammar": 'start: "a" /[0-9]{2}/'},
    ]
    forms = [form | {} for form in forms for _ in range(2)]
    free = SamplingParams(max_tokens=20, temperature=0)
    alone = llm.generate("The capital of", free)[0].outputs[0].text
    prompts = ["What is the capital of France?"] * len(forms) + ["The capital of"]
    outputs = llm.generate(prompts, [*(params(**form) for form in forms), free])
    assert outputs[-1].outputs[0].text == alone
    good = (None, "[0-9]{4}-[0-9]{2}", "yes|no", "a[0-9]{2}")
    for i, output in enumerate(outputs[:-1]):
        answer = output.outputs[0]
        assert answer.finish_reason == FinishReason.STOP
        if good[i // 2] is None:
            jsonschema.validate(json.loads(answer.text), CITY)
        else:
            assert re.fullmatch(good[i // 2], answer.text)


@pytest.mark.parametrize("think", [True, False])
def test_a_conversation_thinks_first(llm, think):
    for seed in range(3):
        asked = SamplingParams(structured_outputs={"json": CITY}, max_tokens=400, temperature=1, seed=seed)
        [output] = llm.chat(QUESTION, asked, chat_template_kwargs={"enable_thinking": think})
        text = output.outputs[0].text
        reasoning, tag, content = text.rpartition("</think>")
        assert think or not tag
        jsonschema.validate(json.loads(content), CITY)
    assert not think or reasoning.startswith("\n<think>")


def tool(name, key):
    schema = {"type": "object", "properties": {key: {"enum": ["yes", "no"]}}, "required": [key]}
    return {"type": "function", "function": {"name": name, "parameters": schema | {"additionalProperties": False}}}


TOOLS = [tool("turn_left", "sharply"), tool("go_on", "fast")]
GO_ON = {"type": "function", "function": {"name": "go_on"}}
AT_ONCE = {"enable_thinking": False}


def called(llm, output):
    """The calls of an answer, as (name, arguments); and what else it says."""
    format = answer_format(llm.chat_template.source, llm.tokenizer.added_names)
    answer = parse_answer(output.outputs[0].text, format, TOOLS, thinking_open(output.prompt, format))
    assert all(call.complete for call in answer.tool_calls)
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls], answer.content


def test_tool_choice(llm):
    wild = [SamplingParams(max_tokens=400, temperature=2, seed=seed) for seed in range(4)]
    ask = lambda **options: llm.chat([QUESTION] * len(wild), wild, tools=TOOLS, chat_template_kwargs=AT_ONCE, **options)
    for output in ask(tool_choice="required"):
        calls, content = called(llm, output)
        assert calls and not content.strip() and output.outputs[0].finish_reason == FinishReason.STOP
        for name, arguments in calls:
            [parameters] = [one["function"]["parameters"] for one in TOOLS if one["function"]["name"] == name]
            jsonschema.validate(arguments, parameters)
    for output in ask(tool_choice=GO_ON):
        [(name, arguments)], _ = called(llm, output)
        assert name == "go_on" and arguments["fast"] in ("yes", "no")
    assert all(len(called(llm, output)[0]) == 1 for output in ask(tool_choice="required", parallel_tool_calls=False))
    for output in ask(tool_choice="none"):
        assert CALL not in output.outputs[0].token_ids and "sharply" in output.prompt


def test_tool_choice_auto_is_the_default(llm):
    eager = [SamplingParams(max_tokens=400, temperature=2, seed=seed, logit_bias={CALL: 50}) for seed in range(4)]
    options = {"tools": TOOLS, "chat_template_kwargs": AT_ONCE, "parallel_tool_calls": False}
    auto = llm.chat([QUESTION] * len(eager), eager, **options)
    named = llm.chat([QUESTION] * len(eager), eager, tool_choice="auto", **options)
    assert [one.outputs[0].token_ids for one in auto] == [one.outputs[0].token_ids for one in named]
    for output in auto:
        [(name, arguments)], _ = called(llm, output)
        assert name in ("turn_left", "go_on") and set(arguments.values()) <= {"yes", "no"}


def test_a_form_or_calls(llm):
    asked = SamplingParams(max_tokens=400, temperature=1, seed=1, structured_outputs={"json": CITY})
    for choice in ("none", "required"):
        [output] = llm.chat(QUESTION, asked, tools=TOOLS, tool_choice=choice, chat_template_kwargs=AT_ONCE)
        calls, content = called(llm, output)
        assert bool(calls) == (choice == "required")
        if not calls:
            jsonschema.validate(json.loads(content), CITY)


def test_calls_in_a_stream(llm):
    asked = SamplingParams(max_tokens=100, temperature=1, seed=2)
    options = {"tools": TOOLS, "tool_choice": GO_ON, "chat_template_kwargs": AT_ONCE}
    whole = llm.chat(QUESTION, asked, **options)[0].outputs[0].text
    assert whole.lstrip().startswith("<tool_call>go_on")
    assert "".join(piece.text for piece in llm.stream_chat(QUESTION, asked, **options)) == whole

    async def pieces():
        return "".join([piece.text async for piece in llm.astream_chat(QUESTION, asked, **options)])

    assert asyncio.run(pieces()) == whole


@pytest.mark.parametrize(
    ("options", "field", "found"),
    [
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "'sometimes'"),
        ({"tools": TOOLS, "tool_choice": 7}, "tool_choice", "7"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "go_back"}}}, "tool_choice", "go_back"),
        ({"tools": TOOLS, "parallel_tool_calls": "yes"}, "parallel_tool_calls", "'yes'"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "'yes'"),
        ({"tools": TOOLS, "tool_choice": "auto", "chat_template": "{{ messages[0].content }}"}, "tools", "no calls"),
    ],
)
def test_calls_that_cannot_be(llm, options, field, found):
    with pytest.raises(RequestError) as error:
        llm.chat(QUESTION, SamplingParams(max_tokens=1), **options)
    assert error.value.field == field and found in error.value.found
    with pytest.raises(RequestError):
        llm.stream_chat(QUESTION, **options)


def test_tools_of_another_template_are_its_own_affair(llm):
    template = "{{ messages[0].content }} {{ tools[0].function.name }}:"
    [output] = llm.chat(QUESTION, SamplingParams(max_tokens=1), tools=TOOLS, chat_template=template)
    assert "turn_left" in output.prompt


def test_a_prompt_with_calls_of_its_own_making_is_refused(llm):
    with pytest.raises(RequestError) as error:
        llm.generate({"prompt": "x", "calls": TOOLS})
    assert error.value.field == "prompt"


def test_answers_of_all_kinds_of_calls_are_equal(llm):
    asked = params(json=CITY, max_tokens=120)
    whole = llm.generate("x", asked)[0].outputs[0].text
    assert "".join(piece.text for piece in llm.stream("x", asked)) == whole

    async def pieces():
        return "".join([piece.text async for piece in llm.astream("x", asked)])

    assert asyncio.run(pieces()) == whole
    assert asked == params(json=json.dumps(CITY), max_tokens=120), "a dict, its text and StructuredOutputs are the same"
    assert asked.structured_outputs == StructuredOutputs(json=CITY)


def test_n_answers_are_constrained_each(llm):
    asked = SamplingParams(n=4, structured_outputs={"choice": ["yes", "no", "perhaps"]}, temperature=9, seed=1)
    texts = [answer.text for answer in llm.generate("x", asked)[0].outputs]
    assert len(set(texts)) > 1 and set(texts) <= {"yes", "no", "perhaps"}


def test_refusals_spare_the_others(llm):
    bad, good = params(json={"uniqueItems": True, "type": "array"}), params(choice=["yes"])
    with pytest.raises(RequestError, match="uniqueItems") as error:
        llm.generate(["a", "b"], [bad, good])
    assert error.value.field == "structured_outputs.json"
    refused, answered = llm.generate(["a", "b"], [bad, good], errors="return")
    assert refused.error.field == "structured_outputs.json" and answered.outputs[0].text == "yes"


def test_a_complete_answer_that_must_not_end_fails_alone(llm):
    short = SamplingParams(structured_outputs={"choice": ["yes"]}, min_tokens=20, max_tokens=30)
    failed, answered = llm.generate(["a", "b"], [short, params(choice=["no"])])
    assert failed.outputs[0].finish_reason == FinishReason.ERROR and "min_tokens" in str(failed.error)
    assert answered.outputs[0].text == "no"


def test_without_a_tokenizer(checkpoint, engine):
    with pytest.raises(RequestError, match="skip_tokenizer_init") as error:
        engine(checkpoint(), skip_tokenizer_init=True).generate({"prompt_token_ids": [5]}, params(choice=["a"]))
    assert error.value.field == "structured_outputs"
