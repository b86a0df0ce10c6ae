"""Constrained decoding, whatever a model wants: answers of a random model that prefers to come to an end.

An answer is walked through token by token, each drawn from those that the constraint allows; a validator of JSON Schema
and the parser of answers judge it.
"""

import json
import random
import re
import time
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer.config import StructuredOutputs
from glimmer.engine.engine import _from_json, _to_json
from glimmer.engine.sequence import SamplerOutput, problem_of
from glimmer.errors import EngineError, RequestError
from glimmer.text.grammar import Grammars, answer_begins, constraint_spec
from glimmer.text.parse import AnswerFormat, AnswerParser, collect

FORMAT = AnswerFormat()
ENDING = frozenset(b'"]}:,0123456789elnrtu')  # bytes that bring JSON to an end


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, tokenizer.size, eos(tokenizer))


def eos(tokenizer):
    return [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]


def ids(bits, size):
    return range(size) if bits is None else [i for i in range(size) if bits[i >> 3] >> (i & 7) & 1]


def walk(grammars, tokenizer, spec, seed=0, most=800, drafts=False):
    """(text, whether it has ended) of a random answer. drafts: take false steps, and take them back."""
    grammars.check(spec)
    source, constraint, answer, ends = random.Random(seed), grammars.constraint(spec), [], eos(tokenizer)
    for _ in range(most):
        allowed = ids(constraint.mask(), tokenizer.size)
        assert allowed, f"nothing may follow {tokenizer.decode(answer, False)!r}"
        if drafts and source.random() < 0.5:
            count, guess = 0, source.choice(allowed)
            while count < 4 and guess not in ends:
                constraint.accept(guess)
                count += 1
                guess = source.choice(ids(constraint.mask(), tokenizer.size))
            if count:
                constraint.rollback(count)
                assert ids(constraint.mask(), tokenizer.size) == allowed
        tags = [i for i in allowed if i in tokenizer.added_ids and (i in ends or i > ends[0] + 20)]
        ending = tags or [i for i in allowed if i in ENDING]
        token = source.choice(ending if ending and source.random() < 0.5 else allowed)
        if token in ends:
            return tokenizer.decode(answer, False), True
        answer.append(token)
        constraint.accept(token)
    return tokenizer.decode(answer, False), False


def asked(**fields):
    return constraint_spec(StructuredOutputs(**fields))


# ── the text of an answer ───────────────────────────────────────────────────────────────────────────────────────────


NODE = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["n"]}
SCHEMAS = (
    {"type": "integer", "minimum": -7, "maximum": 1000},
    {"type": ["string", "null"], "maxLength": 12},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"type": "object", "properties": {"a": {"enum": ["x", 1, None]}, "b": {"const": "<|user|>"}}, "required": ["b"]},
    {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^[a-f]{2,4}$"}]},
    {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    {"type": "string", "format": "date-time"},
    {"type": "object", "patternProperties": {"^k": {"type": "integer"}}, "additionalProperties": False},
)


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_json_by_a_schema(grammars, tokenizer, schema):
    ended = 0
    for seed in range(6):
        text, end = walk(grammars, tokenizer, asked(json=schema), seed, drafts=seed % 2)
        ended += end
        if end:
            jsonschema.validate(json.loads(text), schema)
    assert ended >= 3


def test_other_forms(grammars, tokenizer):
    for form, good in (
        ({"regex": '[a-c]{2,3}/"[0-9]+'}, '[a-c]{2,3}/"[0-9]+'),
        ({"choice": ['"', "a|b", "<think>", "é\n/"]}, '"|a\\|b|<think>|é\n/'),
        ({"grammar": 'start: "a" B\nB: /[0-9]+/'}, "a[0-9]+"),
        ({"grammar": 'root ::= "x" [0-9]+ "y"?'}, "x[0-9]+y?"),
        ({"grammar": "start: <think> /[a-z]+/ </think>"}, "<think>[a-z]+</think>"),
    ):
        found = [walk(grammars, tokenizer, asked(**form), seed, drafts=True) for seed in range(8)]
        assert all(end and re.fullmatch(good, text) for text, end in found), found
    text, end = walk(grammars, tokenizer, asked(json_object=True))
    assert end and isinstance(json.loads(text), dict)


def test_white_space_in_json(grammars, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}}}, "required": ["a"]}
    schema["additionalProperties"] = False
    texts = [walk(grammars, tokenizer, asked(json=schema), seed)[0] for seed in range(20)]
    assert any(re.search(r"\s", text) for text in texts), "a model may indent"
    assert not any(re.search(r"\n[ \t]{65}|[^\n \t][ \t]{3}", text) for text in texts), "but not for ever"
    compact = asked(json=schema, disable_any_whitespace=True)
    assert not any(re.search(r"\s", walk(grammars, tokenizer, compact, seed)[0]) for seed in range(5))
    tabs = asked(json=schema, whitespace_pattern="\t")
    assert {c for seed in range(20) for c in walk(grammars, tokenizer, tabs, seed)[0] if c.isspace()} == {"\t"}


def test_objects_may_be_closed(grammars, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "null"}}}}}
    closed = asked(json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    found = {walk(grammars, tokenizer, closed, seed)[0] for seed in range(20)}
    assert found == {"{}", '{"a":{}}', '{"a":{"b":null}}'}


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"type": "string", "format": "no-such"}}, "format"),
        ({"json": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}}, "oneOf"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "pattern"),
        ({"json": {"$ref": "#/$defs/missing"}}, "ref"),
        ({"json": {"$ref": "http://127.0.0.1/schema"}}, "ref"),
        ({"json": {"$ref": "#"}}, "no text"),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "minLength"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": False}, "not"),
        ({"json": "[1]"}, "list"),
        ({"json": "{"}, "Expecting"),
        ({"json": {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"minimum": 1e308, "maximum": 1.1e308}}, "minimum"),
        ({"json": '{"a": ' * 100 + "1" + "}" * 100}, "nested"),
        ({"json": {"enum": [f"{i:06}" for i in range(50_000)]}}, "too big|characters"),
        ({"json": {"properties": {f"k{i}": {} for i in range(9000)}}}, "properties"),
        ({"regex": "("}, "unclosed"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "a\\"}, "escapes nothing"),
        ({"regex": "a)(b"}, "unopened"),
        ({"regex": "[^\\s\\S]"}, "no text"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "start: <no_such_token>"}, "no_such_token"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "nested|recursion"),
        ({"grammar": "\0"}, "grammar"),
        pytest.param(
            {"grammar": 'root ::= r0\nr3000 ::= "x"\n' + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(3000))},
            "to compile",
            marks=pytest.mark.slow,
        ),
        ({"choice": []}, "choice"),
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"json": {}, "regex": "a"}, "json and regex"),
        ({}, "none of its kinds"),
        ({"regex": "a" * (1 << 20)}, "characters"),
        ({"grammar": "x" * (1 << 17)}, "characters"),
        ({"regex": "\ud800"}, "regex"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_cannot_be_enforced_is_refused_by_name(grammars, form, named):
    with pytest.raises(RequestError, match=f"(?s){named}") as error:
        grammars.check(asked(**form))
    assert error.value.field.startswith("structured_outputs") and len(str(error.value)) < 1000


# ── conversations ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("thinking", [True, False])
def test_a_form_holds_after_the_reasoning(grammars, tokenizer, thinking):
    spec = replace(asked(regex="[0-9]{3}"), chat=True, thinking=thinking, may_think=not thinking)
    reasoned = 0
    for seed in range(30):
        text, end = walk(grammars, tokenizer, spec, seed, drafts=seed % 2)
        parser = AnswerParser(FORMAT, None, thinking)
        answer = collect([*parser.push(text), *parser.finish()])
        assert end and re.fullmatch("[0-9]{3}", answer.content), text
        assert answer.reasoning is not None if thinking else True
        reasoned += bool(answer.reasoning)
    assert reasoned > 3


def test_how_a_prompt_begins_the_answer(tokenizer):
    for prompt, begins in (
        ("[gMASK]<sop><|user|>\nHi", (False, False, False)),
        ("<|user|>\nHi<|assistant|>", (True, False, True)),
        ("<|user|>\n<think><|assistant|>\n<think></think>", (True, False, False)),
        ("<|user|>Hi<|assistant|><think>", (True, True, False)),
        ("<|user|>Hi<|assistant|><think>Well,", (False, True, False)),
        ("<|user|>Hi<|assistant|></think>", (True, False, False)),
        ("<|user|>Hi<|assistant|>The answer is", (False, False, False)),
    ):
        assert answer_begins(tokenizer.encode(prompt), tokenizer) == begins, prompt


# ── tools ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def tool(name, parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where", "format": "city-name"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14, "default": 1},
        "unit": {"type": "string", "enum": ["c", "f"]},
        "note": {"type": ["string", "null"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "uniqueItems": True, "maxItems": 3},
        "when": {"$ref": "#/$defs/when"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
        "plain": {"type": "string", "pattern": "x", "minLength": 2, "maxLength": 9},
        "mixed": {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
        "level": {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 9}, {"type": "string"}]},
        "any": {},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"when": {"type": "object", "properties": {"h": {"type": "integer"}}, "required": ["h"]}},
}
TOOLS = [tool("get_weather", WEATHER), tool("now"), tool("free", {"type": "object"})]
SCHEMA = {one["function"]["name"]: one["function"]["parameters"] or {"type": "object"} for one in TOOLS}


def read(text, tools, thinking=False):
    parser = AnswerParser(FORMAT, tools, thinking)
    return collect([*parser.push(text), *parser.finish(stopped=True)])


def enforced(schema):
    """A schema without the keywords that only `strict` demands."""
    if isinstance(schema, dict):
        return {key: enforced(part) for key, part in schema.items() if key not in ("uniqueItems", "format")}
    return schema


@pytest.mark.parametrize("choice", ["required", "auto", tool("get_weather")], ids=["required", "auto", "named"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.slow
def test_calls_are_well_formed(grammars, tokenizer, choice, parallel):
    spec = constraint_spec(None, TOOLS, choice, parallel, FORMAT, thinking=False, may_think=False)
    called, most = set(), 0
    for seed in range(14):
        text, end = walk(grammars, tokenizer, spec, seed, drafts=seed % 5 == 0)
        if not end:
            continue
        answer = read(text, TOOLS)
        assert answer.tool_calls or choice == "auto"
        if answer.tool_calls:
            assert choice == "auto" or not answer.content
            most = max(most, len(answer.tool_calls))
        for call in answer.tool_calls:
            jsonschema.validate(json.loads(call.arguments), enforced(SCHEMA[call.name]))
            called.add(call.name)
    assert called == ({"get_weather"} if isinstance(choice, dict) else set(SCHEMA))
    assert (most > 1) == (parallel and not isinstance(choice, dict))


def test_no_calls(grammars, tokenizer):
    spec = constraint_spec(None, TOOLS, "none", format=FORMAT)
    texts = [walk(grammars, tokenizer, spec, seed)[0] for seed in range(40)]
    assert not any("<tool_call>" in text for text in texts)
    assert any("</tool_call>" in text or "<arg_key>" in text for text in texts), "these tokens may come"


def test_content_or_calls(grammars, tokenizer):
    spec = constraint_spec(StructuredOutputs(regex="[ab]+"), TOOLS[1:2], "auto", format=FORMAT)
    kinds = set()
    for seed in range(20):
        text, end = walk(grammars, tokenizer, spec, seed)
        answer = read(text, TOOLS)
        assert end and (re.fullmatch("[ab]+", answer.content or "") or answer.tool_calls)
        kinds.add(bool(answer.tool_calls))
    assert kinds == {True, False}


def spelt(tokenizer, text):
    """A text as the tokens of its bytes."""
    return list(text.encode())


def test_tags_cannot_be_spelt_out(grammars, tokenizer):
    texts = tool("find", {"type": "object", "properties": {"texts": {"type": "array", "items": {"type": "string"}}}})
    for choice, before, tag in (
        ("auto", "free text <", "<tool_call>"),
        ("required", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>a<", "</arg_value>"),
        ("required", "<tool_call>get_weather<arg_key>city</arg_key><arg_value><<", "</tool_call>"),
        ("required", '<tool_call>find<arg_key>texts</arg_key><arg_value>["<', "</arg_value>"),
    ):
        constraint = grammars.constraint(constraint_spec(None, [*TOOLS, texts], choice, format=FORMAT))
        for token in tokenizer.encode(before.removesuffix("<")) + spelt(tokenizer, tag[:-1]):
            constraint.accept(token)
        allowed = ids(constraint.mask(), tokenizer.size)
        assert tag[-1].encode()[0] not in allowed and ord("x") in allowed, (choice, tag)
        assert not any(tokenizer.token_bytes(i).startswith(b">") for i in allowed)


@given(
    name=st.text(min_size=1, max_size=12),
    key=st.text(min_size=1, max_size=12),
    values=st.lists(st.text(max_size=8), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_nothing_in_a_request_is_syntax(grammars, tokenizer, name, key, values, seed):
    tools = [tool(name, {"type": "object", "properties": {key: {"enum": values}}, "required": [key]})]
    try:
        spec = constraint_spec(None, tools, "required", format=FORMAT, may_think=False)
        grammars.check(spec)
    except RequestError as error:
        plain = all(word.isprintable() and word == word.strip() for word in (name, key))
        assert not plain or any(c == "<" or "\ud800" <= c <= "\udfff" for c in name + key + "".join(values)), error
        return
    text, end = walk(grammars, tokenizer, spec, seed)
    assert end, text
    answer = read(text, tools)
    assert not answer.content
    for call in answer.tool_calls:
        assert call.name == name and json.loads(call.arguments)[key] in values


@pytest.mark.parametrize(
    "text",
    ['"', "\\", '" | "x', "a\nb", "{x}", "</tool_call>", "<[1]>", "/a/", "%json {}", "start: x", "'", "a b", "日本"],
)
def test_names_and_keys_are_data(grammars, tokenizer, text):
    tools = [tool(text, {"type": "object", "properties": {text: {"enum": [text]}}, "required": [text]})]
    if "<" in text or "\n" in text:
        with pytest.raises(RequestError, match="name"):
            constraint_spec(None, tools, "required", format=FORMAT)
        return
    spec = constraint_spec(None, tools, tool(text), format=FORMAT, may_think=False)
    [call] = read(walk(grammars, tokenizer, spec)[0], tools).tool_calls
    assert call.name == text and json.loads(call.arguments) == {text: text}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "format": "uri"}, "format"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "^a|b$"}, "pattern"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "allOf"),
        ({"$ref": "#/properties/a"}, "ref"),
        ({"$ref": "#/$defs/missing"}, "ref"),
    ],
    ids=str,
)
def test_only_strict_tools_demand_every_keyword(grammars, tokenizer, schema, named):
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    with pytest.raises(RequestError, match=named) as error:
        constraint_spec(None, [tool("f", parameters, strict=True)], "required", format=FORMAT)
    assert error.value.field == "tools[0].function.parameters"
    spec = constraint_spec(None, [tool("f", parameters)], "required", format=FORMAT, may_think=False)
    [call, *_] = read(walk(grammars, tokenizer, spec)[0], [tool("f", parameters)]).tool_calls
    assert call.name == "f" and "a" in json.loads(call.arguments)


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        (["f"], None, "tools[0]"),
        ([{"type": "function"}], None, "tools[0].function.name"),
        ([tool("f"), tool("f")], None, "tools"),
        ([tool("f", {"type": "object", "properties": {"a\n": {}}})], None, "tools[0].function.parameters.properties"),
        ([tool("f", [])], None, "tools[0].function.parameters"),
        ([tool("f", json.loads('{"a":' * 90 + "1" + "}" * 90))], None, "tools[0].function.parameters"),
        ([tool("f")], "sometimes", "tool_choice"),
        ([tool("f")], tool("g"), "tool_choice"),
        ([], "required", "tool_choice"),
    ],
    ids=repr,
)
def test_tools_are_refused_by_field(tools, choice, field):
    with pytest.raises(RequestError) as error:
        constraint_spec(None, tools, choice, format=FORMAT)
    assert error.value.field == field


def test_every_end_of_sequence_id_ends_an_answer(grammars, tokenizer):
    constraint = grammars.constraint(asked(choice=["ab"]))
    assert next(iter(ids(constraint.mask(), tokenizer.size))) == ord("a")
    for token in b"ab":
        constraint.accept(token)
    assert list(ids(constraint.mask(), tokenizer.size)) == eos(tokenizer)
    constraint.accept(eos(tokenizer)[1])  # a request may ask that it does not end the answer
    assert list(ids(constraint.mask(), tokenizer.size)) == eos(tokenizer)


def test_a_token_that_is_not_allowed_fails_at_the_next_mask(grammars, tokenizer):
    wrong, right = (grammars.constraint(asked(regex="[0-9]{3}")) for _ in range(2))
    for constraint, token in ((wrong, ord("x")), (right, ord("5"))):
        constraint.accept(token)
    with pytest.raises(EngineError, match="could not be followed"):
        wrong.mask()
    assert ord("5") in ids(right.mask(), tokenizer.size), "a copy of the same grammar goes on"


@pytest.mark.parametrize("field, form", [("regex", "(a{9999}){9999}"), ("json", {"pattern": "^(a{9999}){9999}$"})])
def test_what_only_following_shows_to_be_beyond_the_limits_is_the_request_s_fault(grammars, tokenizer, field, form):
    """Its error names the field, also as the reason why an answer ends."""
    constraint = grammars.constraint(asked(**{field: form}))
    with pytest.raises(RequestError, match="could not be followed") as refusal:
        for _ in range(4):
            constraint.accept(next(id for id in ids(constraint.mask(), tokenizer.size) if id in b'"a'))
    assert refusal.value.field == f"structured_outputs.{field}"
    problem = problem_of("sampling", refusal.value)
    assert _from_json(_to_json(SamplerOutput(problem=problem))).problem.field == refusal.value.field


def test_costly_forms_end_within_limits(grammars, tokenizer):
    """Either they are refused, or their masks come within seconds; and the process lives."""
    for form in (
        {"regex": "((a{1000}){1000}){1000}"},
        {"regex": "(a|b)*a(a|b){200}(c|d)*c(c|d){200}"},
        {"grammar": 'start: s\ns: s s | s s s | "a" | "b" |'},
        {"grammar": "start: A\nA: /(.|\\n)*a.{50}/ & /(.|\\n)*b.{60}/ & ~/(.|\\n)*c.{40}d(.|\\n)*/"},
        {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
        {"json": {"type": "string", "maxLength": 10**9}},
        {"json": {"allOf": [{"anyOf": [{"properties": {f"k{i}{k}": {}}} for k in range(6)]} for i in range(8)]}},
        {"json": {"enum": [f"x{i}" for i in range(20_000)]}},
    ):
        started = time.monotonic()
        try:
            constraint = grammars.constraint(asked(**form))
            for _ in range(12):
                constraint.accept(ids(constraint.mask(), tokenizer.size)[-1])
        except (RequestError, EngineError) as error:
            assert "structured_outputs" in error.found or "grammar" in error.found
        assert time.monotonic() - started < 30, form


def test_a_model_whose_answers_never_end_has_no_forms(tokenizer):
    without = Grammars(tokenizer, tokenizer.size, [])
    without.prepare()
    spec = constraint_spec(StructuredOutputs(choice=["yes", "no"]), None, None, True, None)
    with pytest.raises(RequestError, match="end-of-sequence"):
        without.check(spec)
