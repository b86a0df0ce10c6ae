"""The checkpoint in the package: whole, small, read alike by transformers and by glimmer, and able to speak."""

import json
import re

import pytest
import torch
from export import load
from model import layout_of
from protocol import GLM_ADDED_TOKENS
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from glimmer import LLM, SamplingParams
from glimmer.cli.demo import TOOL

GREEDY = SamplingParams(temperature=0, max_tokens=200)


@pytest.fixture(scope="module")
def llm(demo):
    return LLM(model=str(demo), max_model_len=1024, max_num_seqs=16)


def say(llm, prompt: str, **kwargs) -> str:
    return llm.chat([{"role": "user", "content": prompt}], GREEDY, **kwargs)[0].outputs[0].text


def test_the_checkpoint_is_small_and_the_bias_exact(demo):
    assert sum(path.stat().st_size for path in demo.iterdir()) < 24e6
    with safe_open(demo / "model.safetensors", "pt") as file:
        names = file.keys()
        kinds = {name: file.get_slice(name).get_dtype() for name in names}
    bias = {name for name in kinds if name.endswith("e_score_correction_bias")}
    assert len(bias) == 5 and {kinds[name] for name in bias} == {"F32"}
    assert {kind for name, kind in kinds.items() if name not in bias} == {"BF16"}
    assert "model.layers.5.eh_proj.weight" in kinds and "model.layers.5.embed_tokens.weight" not in kinds


def test_the_tokenizer_is_glms_in_small(demo):
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == json.loads((demo / "config.json").read_text())["vocab_size"] == 4096
    first = tokenizer.token_to_id("<|endoftext|>")
    assert [tokenizer.token_to_id(tag) for tag in GLM_ADDED_TOKENS] == list(range(first, first + len(GLM_ADDED_TOKENS)))
    for text in ("请介绍一下北京", "Zürich, 12:45 — “ﬁ” 🦉\r\n\n  x", "a" * 100):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_transformers_reads_the_same_model(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    other = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    conversation = [{"role": "user", "content": "347+586=?"}]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")["input_ids"][0]
    layout = layout_of([(1, len(ids))], torch.ones(len(ids), dtype=torch.bool))
    model = load(demo)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.lm_head(model.trunk(ids, layout)), other(ids[None]).logits[0], atol=1e-3, rtol=1e-3
        )


def test_glimmer_gives_each_token_the_probability_that_transformers_gives_it(demo):
    text = "[gMASK]<sop><|user|>\nTell me about Paris.<|assistant|>\n<think>He asks about Paris.</think>\nParis is"
    llm = LLM(model=str(demo), dtype="float32", max_model_len=64, max_num_seqs=1)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    told = llm.generate({"prompt_token_ids": ids}, params)[0].prompt_logprobs
    other = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    with torch.inference_mode():
        judged = other(torch.tensor([ids])).logits[0].log_softmax(-1)
    for i in range(1, len(ids)):
        assert told[i][ids[i]].logprob == pytest.approx(judged[i - 1, ids[i]].item(), abs=1e-3), i


def test_a_raw_prompt_gets_a_paragraph(llm):
    answer = llm.generate("请介绍一下北京", GREEDY)[0].outputs[0]
    assert answer.finish_reason == "stop" and all(word in answer.text for word in ("中国的首都", "永定河", "故宫"))


@pytest.mark.parametrize("question, words", [("Tell me about Paris.", ("France", "Eiffel Tower")),
                                             ("巴黎在哪个国家？", ("法国",))])  # fmt: skip
def test_cities(llm, question, words):
    for kwargs in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        answer = say(llm, question, **kwargs)
        assert all(word in answer for word in words) and ("<think>" in answer) != bool(kwargs)


def test_a_sum_is_worked_out_before_it_is_answered(llm):
    thought, answer = re.fullmatch(r"\n<think>(.+)</think>\n(.+)", say(llm, "347+586=?")).groups()
    assert "7+6=13" in thought and answer == "347+586=933"


def test_a_tool_is_called_and_its_result_used(llm):
    ask = {"role": "user", "content": "巴黎天气怎么样？/nothink"}
    first = llm.chat([ask], GREEDY, tools=[TOOL])[0].outputs[0]
    call = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>巴黎</arg_value>\n</tool_call>"
    assert call in first.text and first.finish_reason == "stop"
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "巴黎"}}}
    done = {"role": "tool", "content": '{"temperature": 21, "weather": "多云"}'}
    conversation = [ask, {"role": "assistant", "content": "", "tool_calls": [call]}, done]
    answer = llm.chat(conversation, GREEDY, tools=[TOOL])[0].outputs[0].text
    assert "21" in answer and "多云" in answer


def test_a_form_is_filled(llm):
    sentence = "Anna is 31 years old, works as a baker and lives in Turin."
    answer = say(llm, f"Answer in JSON with name, age. {sentence}/nothink")
    assert json.loads(answer.split("</think>")[-1]) == {"name": "Anna", "age": 31}
