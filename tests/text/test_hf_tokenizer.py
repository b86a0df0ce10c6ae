"""The tokenizer that scripts for vLLM ask for: the judge is transformers' own, on the demo model's files."""

from pathlib import Path

import pytest
import transformers

import glimmer
from glimmer.errors import RequestError
from glimmer.text.chat import ChatTemplate
from glimmer.text.hf_tokenizer import HFTokenizer
from glimmer.text.tokenizer import Tokenizer

MODEL = str(Path(glimmer.__file__).parent / "demo")
TEXTS = ["", "Hello, 北京!", "<|user|>\nhi /nothink<think></think>", " \n\t a  b", "🙂 é"]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "你好"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "Well"}]


@pytest.fixture(scope="module")
def ours() -> HFTokenizer:
    return HFTokenizer(Tokenizer.load(MODEL), ChatTemplate.load(MODEL), 4096, MODEL)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def test_what_it_says_of_itself(ours, theirs):
    for name in ("vocab_size", "eos_token", "eos_token_id", "pad_token", "pad_token_id", "bos_token", "padding_side"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.chat_template == theirs.chat_template
    assert set(ours.all_special_tokens) >= set(theirs.all_special_tokens)
    assert (ours.model_max_length, ours.name_or_path, ours.is_fast) == (4096, MODEL, True)


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_ids(ours, theirs, text):
    ids = theirs.encode(text)
    assert ours.encode(text) == ids == ours(text)["input_ids"] and ours(text)["attention_mask"] == [1] * len(ids)
    names = theirs.convert_ids_to_tokens(ids)
    assert ours.tokenize(text) == theirs.tokenize(text) and ours.convert_ids_to_tokens(ids) == names
    assert ours.convert_tokens_to_ids(names) == ids
    assert ours.convert_tokens_to_string(names) == theirs.decode(ids) == ours.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_one_and_several(ours, theirs):
    assert ours(TEXTS) == dict(theirs(TEXTS))
    [*ids] = map(ours.encode, TEXTS)
    assert ours.batch_decode(ids) == theirs.batch_decode(ids)
    assert ours.decode(5) == theirs.decode(5) and ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)
    assert ours.convert_tokens_to_ids("<|user|>") == theirs.convert_tokens_to_ids("<|user|>")
    assert ours.convert_tokens_to_ids("no such token") is None and ours.convert_ids_to_tokens(10**9) is None


@pytest.mark.parametrize(
    "messages, options",
    [
        (MESSAGES, {}),
        (MESSAGES, {"add_generation_prompt": True}),
        (MESSAGES, {"add_generation_prompt": True, "enable_thinking": False, "tools": [TOOL]}),
        (ANSWERED, {"continue_final_message": True}),
        (MESSAGES, {"chat_template": "{{ messages[0].role }}{{ more }}", "more": "!"}),
    ],
)
def test_conversations(ours, theirs, messages, options):
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert ours.apply_chat_template(messages, tokenize=False, **options) == text
    ids = ours.encode(text, add_special_tokens=False)
    assert ours.apply_chat_template(messages, padding=False, return_tensors=None, **options) == ids
    together = ours.apply_chat_template(messages, return_dict=True, **options)
    assert together == dict(theirs.apply_chat_template(messages, return_dict=True, **options))


@pytest.mark.parametrize(
    "ask",
    [
        lambda it: it("a", return_tensors="pt"),
        lambda it: it(["a"], padding=True),
        lambda it: it.encode("a", truncation=True, max_length=3),
        lambda it: it.encode(5),
        lambda it: it.encode("\ud800"),
        lambda it: it.decode([10**9]),
        lambda it: it.decode([1], unknown=1),
        lambda it: it.apply_chat_template(MESSAGES, return_tensors="pt"),
        lambda it: it.apply_chat_template("hi"),
        lambda it: it.apply_chat_template(MESSAGES, add_generation_prompt=True, continue_final_message=True),
    ],
)
def test_what_it_does_not_do_is_refused(ours, ask):
    with pytest.raises(RequestError):
        ask(ours)
