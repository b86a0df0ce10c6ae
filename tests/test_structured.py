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
