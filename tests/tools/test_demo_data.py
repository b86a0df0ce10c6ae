"""The training data: true sums, calls that fit their schemas, a split without overlap, the right targets."""

import json
import re
import string
from random import Random

import generate
import pytest
import talk
import tooling
from dialogue import SEPARATOR, Round, held_out, part, plain, render
from hypothesis import given
from hypothesis import strategies as st
from known import KNOWN
from phrases import GRAMMAR, phrase
from tokenizers import Tokenizer
from words import CITIES, COMMON, PIECES, coined

NUMBERS = st.integers(0, 999)
UNSEEN = [None, tooling.FEW_UNSEEN, tooling.MANY_UNSEEN, tooling.TRIAL_UNSEEN]
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}


@pytest.fixture(scope="module")
def tokenizer(demo):
    return Tokenizer.from_file(str(demo / "tokenizer.json"))


@given(NUMBERS, NUMBERS, st.sampled_from("+-"), st.sampled_from(["en", "zh"]))
def test_every_step_of_a_worked_sum_is_true(a, b, sign, lang):
    if sign == "-" and a < b:
        a, b = b, a
    steps = re.findall(r"([0-9+-]+)=(\d+)", talk.working(a, b, sign, lang))
    assert [eval(left) for left, _ in steps] == [int(right) for _, right in steps]
    top = str(int(steps[-1][1]))
    digits = top + "".join(right[-1] for _, right in reversed(steps[:-1]))
    assert int(digits) == (a + b if sign == "+" else a - b)


@given(st.integers(0, 10**6), st.sampled_from(["en", "zh"]))
def test_a_sum_ends_in_its_result(seed, lang):
    turn = plain(talk.sum_of_two(Random(seed), lang))
    left, right = turn.reply.split("=")
    assert eval(left) == int(right) and turn.think.endswith(right)


def test_cities_are_told_apart_by_name_and_by_sight():
    for lang in ("en", "zh"):
        assert len({c.name[lang] for c in CITIES}) == len({c.sight[lang] for c in CITIES}) == len(CITIES) > 100
    capitals = [c.country["en"] for c in CITIES if c.capital]
    assert len(set(capitals)) == len(capitals), "a country with two capitals"
    assert all(c.millions in talk.CROWD["en"] for c in CITIES)


@pytest.mark.parametrize("city", CITIES, ids=lambda c: c.name["en"])
def test_a_paragraph_tells_every_fact(city):
    for lang in ("en", "zh"):
        text = plain(talk.paragraph(city, lang))
        assert all(fact in text for fact in talk.facts_of(city, lang).values())
        assert ("首都" in text or "the capital of" in text) == city.capital


@given(st.integers(0, 10**6), st.sampled_from(["en", "zh"]), st.sampled_from(UNSEEN), st.sampled_from([0.0, 0.5]))
def test_calls_fit_their_schema_and_values_stand_in_the_request(seed, lang, fresh, strange):
    rng = Random(seed)
    box = tooling.toolbox(rng, lang, fresh, strange)
    turn = plain(tooling.request(rng, lang, box))
    schemas = {c.name: c.schema["function"]["parameters"] for c in box}
    assert len(schemas) == len(box) and len(turn.results) == len(turn.calls) in (1, 2)
    for name, arguments in turn.calls:
        assert set(schemas[name].get("required", [])) <= set(arguments) <= set(schemas[name]["properties"])
        for key, value in arguments.items():
            assert isinstance(value, TYPES[schemas[name]["properties"][key]["type"]])
            if isinstance(value, str):
                assert value in turn.ask


@given(st.integers(0, 10**6), st.sampled_from(["en", "zh"]))
def test_a_form_is_json_that_its_sentence_supports(seed, lang):
    turn = plain(talk.form(Random(seed), lang))
    for value in json.loads(turn.reply).values():
        assert isinstance(value, bool) or str(value) in turn.ask


@given(st.integers(0, 10**6), st.sampled_from(list(generate.EXAMPLES)))
def test_examples_are_the_same_for_the_same_seed_and_lose_their_seams(seed, task):
    text = generate.example(task, Random(seed))
    assert text == generate.example(task, Random(seed))
    assert SEPARATOR not in plain(text)


def test_no_held_out_question_is_drawn_for_training():
    rng = Random(7)
    for task in ("sum", "fact", "introduction", "json", "repeat"):
        assert not any(held_out(generate.rounds_for(task, rng, lang).key) for lang in ("en", "zh") for _ in range(200))
    assert not any(held_out(turn.key) for _ in range(200) for turn in generate.tool_rounds(rng, "en")[0])
    held = [item for item in generate.heldout_examples(1, {"sum": 20, "fact": 20, "json": 20, "tool": 20})]
    assert len(held) == 80 and all(part(item["key"]) == "test" for item in held)


def test_the_trial_is_neither_trained_on_nor_the_test():
    keys = [f"question {i}" for i in range(20_000)]
    shares = {name: sum(part(key) == name for key in keys) / len(keys) for name in ("train", "trial", "test")}
    assert shares["trial"] == pytest.approx(7 / 256, abs=0.005) and shares["test"] == pytest.approx(13 / 256, abs=0.005)
    assert all(held_out(key) == (part(key) != "train") for key in keys) and part("") == "train"
    trial = list(generate.heldout_examples(1, {"sum": 20, "tool": 20, "tool, twice": 10, "tool, unseen": 20}, "trial"))
    assert all(part(item["key"]) == "trial" for item in trial if item["task"] != "tool, unseen")
    nouns = {noun for noun, _ in tooling.TRIAL_UNSEEN.nouns}
    assert all(name.split("_")[1] in nouns for item in trial[50:] for name, _ in item["calls"])
    few, many, own = (unseen.words() for unseen in UNSEEN[1:])
    assert not own & (few | many)


def test_unseen_tools_have_words_that_no_tool_of_training_has():
    known = {word for words in tooling.WORDS.values() for word in words.split()}
    assert not tooling.UNSEEN & (known | {noun for noun, _ in tooling.NOUNS})
    for task, fresh in (("tool, unseen", tooling.FEW_UNSEEN), ("tool, many unseen", tooling.MANY_UNSEEN)):
        nouns = {noun for noun, _ in fresh.nouns}
        for item in generate.heldout_examples(2, {task: 30}):
            assert all(name.split("_")[1] in nouns for name, _ in item["calls"])
    rng = Random(3)
    strange = [tooling.strange_word(rng) for _ in range(5000)]
    assert not tooling.UNSEEN & {part for word, _ in strange for part in word.split("_")}
    assert not tooling.UNSEEN & {chinese for _, chinese in strange}


def test_nothing_that_requests_are_about_holds_an_unseen_word():
    for lang, kinds in GRAMMAR.items():
        texts = [text for kind in kinds.values() for text in kind]
        assert not tooling.UNSEEN & {word for text in texts for word in re.findall("[a-z]+", text.lower())}
        chinese = [word for word in tooling.UNSEEN if not word.isascii()]
        assert not [word for word in chinese if any(word in text for text in texts)], lang


@pytest.mark.parametrize("tool", KNOWN, ids=lambda tool: tool.names.split("/")[1].split()[0])
def test_every_way_to_ask_for_a_tool_gives_what_it_requires(tool):
    slots = {ask: {field for _, field, _, _ in string.Formatter().parse(ask) if field} for lang in ("en", "zh")
             for ask in tool.asks[lang]}  # fmt: skip
    required = set.intersection(*(slots[ask] for ask in tool.asks["en"]))
    assert all(required <= found <= set(tool.parameters) for found in slots.values())
    assert set.union(*slots.values()) == set(tool.parameters)
    first = [parameter.names.split()[0] for parameter in tool.parameters.values()]
    assert len(set(first)) == len(first)


@given(st.integers(0, 10**6), st.sampled_from(["en", "zh"]), st.sampled_from(list(GRAMMAR["en"])))
def test_phrases_are_whole(seed, lang, kind):
    text = phrase(Random(seed), lang, kind)
    assert text and not set(text) & set('<>"“”') and text == phrase(Random(seed), lang, kind)


def test_phrases_have_no_end():
    rng = Random(8)
    for lang, kind in [(lang, kind) for lang in GRAMMAR for kind in ("chore", "note", "topic", "song")]:
        assert len({phrase(rng, lang, kind) for _ in range(1000)}) > 400


def test_thanks_never_follow_a_value():
    rng = Random(9)
    for lang, end in (("en", ": {text}"), ("zh", "：{text}")):
        assert {tooling.carried(rng, lang, end)[-1] for _ in range(300)} == {"}"}
    assert len({tooling.carried(rng, "en", "What is the time?") for _ in range(1000)}) > 30


def test_strange_words_are_made_of_all_tokens(tokenizer):
    rng = Random(4)
    drawn = {token for _ in range(20000) for token in tokenizer.encode(coined(rng)).tokens}
    assert len(set(PIECES) - drawn) < 0.02 * len(PIECES)
    assert set(COMMON) == {character for _ in range(40000) for character in coined(rng, "zh")} and len(COMMON) == 3755


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_request_for_two_places_is_two_calls_of_one_tool(lang):
    rng = Random(5)
    rounds = [round for _ in range(50) for round in generate.tool_rounds(rng, lang, "two calls")[0]]
    for first, second in (turn.calls for turn in rounds):
        assert first[0] == second[0] and first[1] != second[1]
    twice = list(generate.heldout_examples(3, {"tool, twice": 20}))
    assert all(len(item["calls"]) == 2 and held_out(item["key"]) for item in twice)


def spoken(tokenizer: Tokenizer, rounds: list[Round]) -> str:
    role = {tag: tokenizer.token_to_id(tag) for tag in generate.SPECIAL}
    ids, wanted = generate.encode(tokenizer, role, "mixed", render(rounds))
    return tokenizer.decode([t for t, w in zip(ids, wanted, strict=True) if w], skip_special_tokens=False)


def test_only_the_assistants_words_are_targets(tokenizer):
    first, last = Round("sum", "", "1+2=?", "1+2=3", quick=True), Round("sum", "", "2+2=?", "2+2=4", "four")
    quick, slow = "\n<think></think>\n1+2=3<|user|>", "\n<think>four</think>\n2+2=4<|user|>"
    assert spoken(tokenizer, [first, last]) == quick + slow
    first.quick = False  # its reasoning is not rendered any more: nothing to learn there
    assert spoken(tokenizer, [first, last]) == slow


def test_a_call_ends_at_the_observation_and_the_result_is_not_a_target(tokenizer):
    turn = Round("tool", "", "time?", "noon", calls=[("clock", {})], results=["12"], quick=True)
    call = "\n<think></think>\n<tool_call>clock\n</tool_call><|observation|>"
    assert spoken(tokenizer, [turn]) == call + "\n<think></think>\nnoon<|user|>"


def test_a_raw_prompt_goes_straight_into_its_answer(tokenizer):
    role = {tag: tokenizer.token_to_id(tag) for tag in generate.SPECIAL}
    text = plain(generate.example("raw", Random(3)))
    ids, wanted = generate.encode(tokenizer, role, "raw", text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("<|assistant|>", "")
    assert wanted == sorted(wanted) and ids[-1] == role["<|endoftext|>"]


def test_a_name_is_spelled_alike_wherever_it_stands(tokenizer):
    for name in ("Paris", "Marago", "libe", "city_name", "num_days", "巴黎"):
        spelled = tokenizer.encode(name).tokens
        for text in ("weather in %s?", '{"name": "%s"}', "<arg_value>%s</arg_value>", "问：%s，"):
            tokens = tokenizer.encode(text % name, add_special_tokens=False).tokens
            assert any(tokens[i : i + len(spelled)] == spelled for i in range(len(tokens))), text


def test_a_tool_goes_by_many_names_and_its_schema_by_many_orders():
    rng, weather = Random(5), KNOWN[0]
    boxes = [tooling.known(rng, weather) for _ in range(300)]
    assert len({c.name for c in boxes}) > 40 and len({c.arguments["city"] for c in boxes}) > 8
    orders = {tuple(c.arguments) for c in boxes}
    assert orders == {("city", "days"), ("days", "city")}
    for c in boxes:
        told = list(c.schema["function"]["parameters"]["properties"])
        assert [name for name in told if name in c.arguments.values()] == list(c.arguments.values())


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.encode("4096+512=4608").tokens == [*"4096", "+", *"512", "=", *"4608"]
    assert not any(sum(c in "0123456789" for c in token) > 1 for token in tokenizer.get_vocab())
