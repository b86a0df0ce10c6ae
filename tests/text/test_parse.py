"""AnswerParser: tables of well-formed and malformed answers, cut at every position; round trips through GLM's
templates; properties over whole grammars of answers; and its cost on hostile ones."""

import gc
import json
import re
import time
from itertools import count
from pathlib import Path

import checkpoints
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer import LLM
from glimmer.errors import RequestError
from glimmer.text.answers import merged
from glimmer.text.chat import ChatTemplate
from glimmer.text.parse import (
    AnswerFormat,
    AnswerParser,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    answer_format,
    collect,
    parse_answer,
    random_call_id,
    thinking_open,
)

DATA = Path(__file__).parent / "data"
TEMPLATES = {
    name: (DATA / name).read_text(encoding="utf-8")
    for name in ("GLM-4.5.jinja", "GLM-4.6.jinja", "GLM-4.7-Flash.jinja")
} | {"ours": (checkpoints.DEMO / "chat_template.jinja").read_text(encoding="utf-8")}
COMPILED = {name: ChatTemplate(source, name) for name, source in TEMPLATES.items()}
FORMAT = AnswerFormat()
TAGS = (*FORMAT.think, *FORMAT.call, *FORMAT.key, *FORMAT.value)
PROPERTIES = {
    "text": {"type": "string"},
    "number": {"type": "number"},
    "count": {"type": "integer"},
    "flag": {"type": "boolean"},
    "list": {"type": "array"},
    "object": {"type": "object"},
    "nothing": {"type": "null"},
    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "either": {"type": ["string", "integer"]},
    "title": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "unit": {"enum": ["1", "2"]},
    "step": {"enum": [1, 2]},
    "city": {"$ref": "#/$defs/City"},
    "any": {},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "$defs": {"City": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "read file", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_weather"}},
]


def parse(pieces, tools=TOOLS, thinking=False, stopped=False, **options):
    """The events of an answer that comes in these pieces, neighbours joined."""
    numbers = count()
    parser = AnswerParser(FORMAT, tools, thinking, new_id=lambda: f"call_{next(numbers)}", **options)
    events = [event for piece in pieces for event in parser.push(piece)]
    return merged(events + parser.finish(stopped=stopped))


def told(text, **options):
    """(reasoning, content, [(name, arguments) of each call]), the same wherever the text is cut into two, and in
    single characters. A call that is not complete has "..." after its arguments."""
    whole = parse([text], **options)
    assert parse(text, **options) == whole
    for cut in range(1, len(text)):
        assert parse([text[:cut], text[cut:]], **options) == whole
    answer = collect(whole)
    calls = [(call.name, call.arguments + ("" if call.complete else "...")) for call in answer.tool_calls]
    for call in answer.tool_calls:
        if call.complete:
            assert isinstance(json.loads(call.arguments), dict)
    return answer.reasoning, answer.content, calls


# ── reasoning and text ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, thinking, reasoning, content",
    [
        ("", False, "", ""),
        ("Hello", False, "", "Hello"),
        ("\n<think>\nWhy?\n</think>\nBecause.", False, "Why?", "Because."),
        ("Why?</think>Because.", True, "Why?", "Because."),
        ("<think>Why?</think>Because.", True, "Why?", "Because."),  # opened twice
        ("\n<think></think>\nHi", False, "", "Hi"),
        ("</think>Hi", False, "", "Hi"),  # GLM-4.7 writes this before an answer without reasoning
        ("<think></think></think>Hi", False, "", "Hi"),
        ("<think>a</think><think>b</think>c", False, "ab", "c"),
        ("Why", True, "Why", ""),  # the limit of tokens
        ("<think>Why\n", False, "Why\n", ""),
        ("<think>Why</thi", False, "Why</thi", ""),
        ("Say <think> to think</think>.", False, "", "Say <think> to think</think>."),
        ("<think>a <think> b</think>c</think>d", False, "a <think> b", "c</think>d"),
        ("\n\n    indented\n\ntext \n", False, "", "    indented\n\ntext \n"),
        ("<think>\n\n  a\n b \n\n</think>\n\n  c\n", False, "  a\n b", "  c\n"),
        (" \n\n ", False, "", ""),
        ("<think> \n </think> \n", False, "", ""),
        ("a < b <= c </ d <", False, "", "a < b <= c </ d <"),
        ("</tool_call><arg_key>x</arg_key>", False, "", "</tool_call><arg_key>x</arg_key>"),
    ],
)
def test_reasoning_and_text(text, thinking, reasoning, content):
    assert told(text, thinking=thinking) == (reasoning, content, [])


def test_an_answer_that_continues_a_text_begins_within_it():
    assert told("\n  more <think>", continues=True) == ("", "\n  more <think>", [])
    assert told("\n  more</think>\ntext", continues=True, thinking=True) == ("\n  more", "text", [])


def test_the_parser_knows_whether_the_reasoning_is_open():
    parser = AnswerParser(FORMAT, TOOLS, False)
    states = []
    for piece in ("\n", "<think>", "a", "<tool_call>f</tool_call>", "b</thi", "nk>", "c", "<think>"):
        parser.push(piece)
        states.append(parser.reasoning)
    assert states == [False, True, True, True, True, False, False, False]


def test_text_is_told_as_soon_as_it_cannot_be_anything_else():
    parser = AnswerParser(FORMAT, TOOLS, False)
    shown = [parser.push(piece) for piece in ["<th", "ink>a", " b", "\n", "c</", "think", "ing", "</think>", "\n", "d"]]
    assert shown == [
        [],
        [ReasoningDelta("a")],
        [ReasoningDelta(" b")],
        [],
        [ReasoningDelta("\nc")],
        [],
        [ReasoningDelta("</thinking")],
        [],
        [],
        [TextDelta("d")],
    ]


# ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CALL = "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n</tool_call>"
TOLD = ("f", '{"text": "a"}')


@pytest.mark.parametrize(
    "text, content, calls",
    [
        (CALL, "", [TOLD]),
        (CALL.replace("\n", ""), "", [TOLD]),
        (f"\nLet me see.\n{CALL}", "Let me see.", [TOLD]),
        (f"{CALL}\n{CALL}", "", [TOLD, TOLD]),
        (f"{CALL}{CALL}", "", [TOLD, TOLD]),
        (f"one\n{CALL}\ntwo\n{CALL}\n", "one\ntwo", [TOLD, TOLD]),
        (f"{CALL}\n two", " two", [TOLD]),
        ("<tool_call>f\n</tool_call>", "", [("f", "{}")]),
        ("<tool_call>f</tool_call>", "", [("f", "{}")]),
        ("<tool_call> \n f \n </tool_call>", "", [("f", "{}")]),
        ("<tool_call>read file</tool_call>", "", [("read file", "{}")]),
        ("<tool_call>nobody.knows-it:1</tool_call>", "", [("nobody.knows-it:1", "{}")]),
        (CALL.replace(">f", ">unknown").replace("text", "n").replace("a<", "12<"), "", [("unknown", '{"n": 12}')]),
    ],
)
def test_calls(text, content, calls):
    assert told(text) == ("", content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "Write <tool_call> first, then the name.",
        "`<tool_call>` and `</tool_call>`",
        "<tool_call></tool_call>",
        "<tool_call>\n</tool_call>",
        "<tool_call>f is a call</tool_call>",
        "<tool_call>f",  # the limit of tokens, or prose
        "<tool_call>f\n<arg_k",
        "<tool_call>f\n\n",
        "<tool_call>f<arg_value>a</arg_value></tool_call>",
        '<tool_call>{"name": "f", "arguments": {"text": "a"}}</tool_call>',
        '<tool_call>f{"text": "a"}</tool_call>',
        "<tool_call>" + "f" * 200 + "</tool_call>",
        "<tool_call>" + " " * 600 + "f</tool_call>",
        "<tool_call><tool_call",
    ],
)
def test_what_is_no_call_is_text(text):
    assert told(text) == ("", text, [])
    assert told(f"a {text}", thinking=True) == (f"a {text}", "", [])
    assert told(f"<tool_call>{CALL}") == ("", "<tool_call>", [TOLD])


def test_without_tools_calls_are_text():
    for tools in (None, []):
        assert told(f"<think>a</think>\n{CALL}", tools=tools) == ("a", CALL, [])


@pytest.mark.parametrize(
    "text, reasoning, content, calls",
    [
        (f"hm\n{CALL}", "hm", "", [TOLD]),
        (f"hm\n{CALL}\n</think>\nok", "hm", "ok", [TOLD]),
        (f"hm\n{CALL}\nso\n</think>\nok{CALL}", "hm\nso", "ok", [TOLD, TOLD]),
        ("I write <tool_call>name<arg_key>k</arg_key>.", "I write <tool_call>name<arg_key>k</arg_key>.", "", []),
        ("or <tool_call>foo</tool_call></think>ok", "or <tool_call>foo</tool_call>", "ok", []),
        ("<tool_call></think>ok", "<tool_call>", "ok", []),
        (f"hm{CALL[:-12]}</think>ok", "hm", "ok", [TOLD]),
        (f"hm{CALL.replace('</arg_value>', '')}\n</think>ok", "hm", "ok", [("f", r'{"text": "a\n"}')]),
    ],
)
def test_calls_within_reasoning(text, reasoning, content, calls):
    assert told(text, thinking=True) == (reasoning, content, calls)


@pytest.mark.parametrize(
    "body, content, arguments",
    [
        # closing tags that are missing, opening ones that are doubled
        ("<arg_key>text<arg_value>a</arg_value>", "", '{"text": "a"}'),
        ("<arg_key>text\n<arg_value>a</arg_value>", "", '{"text": "a"}'),
        ("<arg_key><arg_key>text</arg_key><arg_value>a</arg_value>", "", '{"text": "a"}'),
        ("<arg_key>text</arg_key></arg_key><arg_value>a</arg_value>", "", '{"text": "a"}'),
        ("<arg_key>text</arg_key><arg_key>text</arg_key><arg_value>a</arg_value>", "", '{"text": "a"}'),
        ("<arg_key>text</arg_key><arg_value>a</arg_value></arg_value></arg_key>", "", '{"text": "a"}'),
        ("<arg_key>text</arg_key><arg_value>a</arg_value><arg_key>", "", '{"text": "a"}'),
        ("<arg_key>text</arg_key>a</arg_value>", "", '{"text": "a"}'),
        ("<arg_key>text</arg_key><arg_value>a", "", '{"text": "a"}'),
        ("<arg_key>text</arg_key></arg_value>", "", '{"text": ""}'),
        ("<arg_key></arg_key><arg_value>a</arg_value>", "", '{"": "a"}'),
        # keys without values
        ("<arg_key>text</arg_key>", "", '{"text": null}'),
        ("<arg_key>text", "", '{"text": null}'),
        ("<arg_key>text<arg_key>flag</arg_key><arg_value>true</arg_value>", "", '{"text": null, "flag": true}'),
        # what is no argument
        ("<arg_key>text</arg_key><arg_value>a</arg_value>, so", ", so", '{"text": "a"}'),
        (
            "<arg_key>text</arg_key><arg_value>a</arg_value><arg_value>b\n</arg_value>",
            "<arg_value>b\n</arg_value>",
            '{"text": "a"}',
        ),
        (
            "<arg_key>text</arg_key><arg_value>a</arg_value><arg_key>text</arg_key><arg_value>b</arg_value>",
            "<arg_key>text</arg_key><arg_value>b</arg_value>",
            '{"text": "a"}',
        ),
        (
            "<arg_key>text</arg_key><arg_value>a</arg_value><arg_key>text</arg_key>",
            "<arg_key>text</arg_key>",
            '{"text": "a"}',
        ),
        # tags within values
        ("<arg_key>text</arg_key><arg_value></arg_value a</arg_value>", "", '{"text": "</arg_value a"}'),
        ("<arg_key>text</arg_key><arg_value><arg_key>a</arg_key></arg_value>", "", '{"text": "<arg_key>a</arg_key>"}'),
        ("<arg_key>text</arg_key><arg_value></tool_call>\n;</arg_value>", "", r'{"text": "</tool_call>\n;"}'),
        ("<arg_key>text</arg_key><arg_value></think></arg_value>", "", '{"text": "</think>"}'),
        ("<arg_key>text</arg_key><arg_value>\n\n a\n</arg_value>", "", r'{"text": "\n\n a\n"}'),
    ],
)
def test_bodies(body, content, arguments):
    assert told(f"<tool_call>f<{body[1:]}</tool_call>") == ("", content, [("f", arguments)])
    assert told(f"<tool_call>f\n{body}</tool_call>\n{CALL}") == ("", content, [("f", arguments), TOLD])


def test_a_call_may_lack_its_end_where_another_begins():
    assert told(CALL[:-12] + CALL) == ("", "", [TOLD, TOLD])


@pytest.mark.parametrize(
    "text, content, arguments",
    [
        ("<arg_key>", "", "{"),
        ("<arg_key>te", "", '{"te'),
        ("<arg_key>text</arg_k", "", '{"text</arg_k'),
        ("<arg_key>text</arg_key>", "", '{"text": "'),
        ("<arg_key>count</arg_key>\n<arg_va", "", '{"count": "<arg_va'),
        ("<arg_key>text</arg_key><arg_value>", "", '{"text": "'),
        ("<arg_key>text</arg_key><arg_value>a\n", "", r'{"text": "a\n'),
        ("<arg_key>text</arg_key><arg_value>a</arg_", "", '{"text": "a</arg_'),
        ("<arg_key>text</arg_key><arg_value>a</tool_call><", "", '{"text": "a</tool_call><'),
        ("<arg_key>list</arg_key><arg_value>[1, 2", "", '{"list": [1, 2'),
        ("<arg_key>text</arg_key><arg_value>a</arg_value>", "", '{"text": "a"'),
        ("<arg_key>text</arg_key><arg_value>a</arg_value> so\n", "so", '{"text": "a"'),
        ("<arg_key>text</arg_key><arg_value>a</arg_value><arg_key>flag</arg_key>", "", '{"text": "a", "flag": '),
    ],
)
def test_a_call_that_is_cut_off_has_no_end(text, content, arguments):
    assert told(f"<tool_call>f\n{text}") == ("", content, [("f", arguments + "...")])


def test_a_call_is_complete_without_its_last_tag_if_the_model_has_stopped():
    assert told(CALL[:-12], stopped=True) == ("", "", [TOLD])
    assert told(CALL[:-12] + " so", stopped=True) == ("", "so", [TOLD])
    assert told(CALL[:-25], stopped=True) == ("", "", [("f", '{"text": "a...')])


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "key, written, value",
    [
        ("text", "123", '"123"'),
        ("text", "true", '"true"'),
        ("text", "null", '"null"'),
        ("text", '{"a": 1}', '"{\\"a\\": 1}"'),
        ("text", '"quoted"', '"\\"quoted\\""'),
        ("text", " 北京 🙂\t\x00", '" 北京 🙂\\t\\u0000"'),
        ("text", "", '""'),
        ("city", "123", '"123"'),
        ("unit", "1", '"1"'),
        ("step", "1", "1"),
        ("count", "5", "5"),
        ("count", "\n-5 ", "-5"),
        ("count", "12345678901234567890123", "12345678901234567890123"),
        ("count", "9" * 5000, "9" * 5000),
        ("count", "five", '"five"'),
        ("count", "007", '"007"'),
        ("count", "true", "true"),
        ("number", "1.10", "1.10"),
        ("number", "5", "5"),
        ("number", "NaN", '"NaN"'),
        ("number", "1e999", "1e999"),
        ("flag", "true", "true"),
        ("flag", "False", "false"),
        ("flag", "yes", '"yes"'),
        ("nothing", "null", "null"),
        ("nothing", "None", "null"),
        ("list", '[1, "a", {"b": null}]', '[1, "a", {"b": null}]'),
        ("list", '["a\nb"]', '["a\\nb"]'),  # a line break in a string of JSON
        ("list", "a, b", '"a, b"'),
        ("list", "[" * 100_000, '"' + "[" * 100_000 + '"'),
        ("object", '{"z": 1, "a": 2.50}', '{"z": 1, "a": 2.50}'),
        ("object", "{'a': 1}", "\"{'a': 1}\""),
        ("object", "", '""'),
        ("maybe", "5", "5"),
        ("maybe", "null", "null"),
        ("maybe", "none", '"none"'),
        ("either", "5", "5"),
        ("either", "5.0", '"5.0"'),
        ("either", "true", '"true"'),
        ("either", "-", '"-"'),
        ("title", "null", "null"),
        ("title", "5", '"5"'),
        ("title", "news", '"news"'),
        ("any", "5", "5"),
        ("any", '"5"', '"5"'),
        ("any", "True", '"True"'),
        ("any", "hello", '"hello"'),
        ("any", " \n", '" \\n"'),
        ("unknown", "[1]", "[1]"),
        ("unknown", "[1", '"[1"'),
    ],
)
def test_values_are_typed_by_the_schema(key, written, value):
    text = f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>"
    for pieces in ([text], text if len(text) < 10_000 else [text[:60], text[60:]]):
        assert collect(parse(pieces)).tool_calls[0].arguments == f'{{"{key}": {value}}}'


@pytest.mark.parametrize(
    "parameters, value",
    [
        ({"properties": {"k": {"type": "string"}}}, '"5"'),
        ({"properties": {"k": {"type": "str"}}}, '"5"'),
        ({"properties": {"k": {"type": "float"}}}, "5"),
        ({"properties": {"k": {"const": "5"}}}, '"5"'),
        ({"properties": {"k": {"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]}}}, '"5"'),
        ({"properties": {"k": {"oneOf": [{"type": "string"}, {"enum": ["a"]}]}}}, '"5"'),
        ({"properties": {"k": {"type": "string", "nullable": True}}}, '"5"'),
        ({"allOf": [{"properties": {"k": {"type": "string"}}}]}, '"5"'),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"properties": {"k": {"type": "string"}}}}}, '"5"'),
        ({"additionalProperties": {"type": "string"}}, '"5"'),
        ({"properties": {"k": {"$ref": "#/anyOf/0"}}, "anyOf": [{"type": "string"}]}, '"5"'),
        ({"properties": {"k": {"$ref": "#/x"}}, "x": {"anyOf": [{"$ref": "#/x"}, {"type": "string"}]}}, '"5"'),
        # whatever is no schema allows everything
        ({"properties": {"k": {"$ref": "#/x"}}, "x": {"$ref": "#/x"}}, "5"),
        ({"properties": {"k": {"$ref": "http://x"}}}, "5"),
        ({"properties": {"k": {"$ref": "#/a/99999999999"}}, "a": []}, "5"),
        ({"properties": {"k": {"type": "text"}}}, "5"),
        ({"properties": {"k": {"type": []}}}, "5"),
        ({"properties": {"k": {"type": [5]}}}, "5"),
        ({"properties": {"k": {"enum": 5, "anyOf": {}, "type": None}}}, "5"),
        ({"properties": {"k": True}}, "5"),
        ({"properties": []}, "5"),
        ("schema", "5"),
        (None, "5"),
    ],
)
def test_schemas_of_all_kinds(parameters, value):
    tools = [{"name": "f", "parameters": parameters}]
    text = "<tool_call>f<arg_key>k</arg_key><arg_value>5</arg_value></tool_call>"
    assert told(text, tools=tools) == ("", "", [("f", f'{{"k": {value}}}')])


def test_a_hostile_schema_costs_little():
    deep = {"type": "string"}
    for _ in range(10_000):
        deep = {"anyOf": [deep]}
    twice = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)} | {"a60": {"type": "string"}}
    for schema in (deep, {"$ref": "#/$defs/a0"}):
        parameters = {"properties": {"k": schema}, "$defs": twice, "anyOf": [{"$ref": "#"}] * 1000}
        started = time.perf_counter()
        text = "<tool_call>f<arg_key>k</arg_key><arg_value>5</arg_value></tool_call>"
        collect(parse([text], tools=[{"name": "f", "parameters": parameters}]))
        assert time.perf_counter() - started < 1


def test_long_strings_stream_in_whole_escapes():
    parser = AnswerParser(FORMAT, TOOLS, False)
    parser.push("<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>")
    joined = '{"text": "'
    for piece in ['say "', "\\", "\n\x01", "🙂", "<", "/arg", "é</arg_value", " \ud7ff"]:
        joined += "".join(event.arguments for event in parser.push(piece))
        json.loads(joined + '"}')  # at any moment, what has come is the beginning of a string, and no half escape
    ended = parser.push("</arg_value></tool_call>")
    joined += "".join(event.arguments for event in ended if isinstance(event, ToolCallDelta))
    assert json.loads(joined) == {"text": 'say "\\\n\x01🙂</argé</arg_value \ud7ff'}


def test_events_of_a_call_come_as_soon_as_they_can():
    parser = AnswerParser(FORMAT, TOOLS, False, new_id=lambda: "call_x")
    pieces = [
        "<tool_call>",
        "f",
        "\n",
        "<arg_key>",
        "text",
        "</arg_key>",
        "\n",
        "<arg_value>",
        "a b",
        " c",
        "</arg_value>",
    ]
    shown = [parser.push(piece) for piece in [*pieces, "</tool_call>"]]
    assert shown == [
        [],
        [],
        [],
        [ToolCallStart(0, "call_x", "f"), ToolCallDelta(0, "{")],
        [],
        [],
        [],
        [ToolCallDelta(0, '"text": "')],
        [ToolCallDelta(0, "a b")],
        [ToolCallDelta(0, " c")],
        [ToolCallDelta(0, '"')],
        [ToolCallDelta(0, "}"), ToolCallEnd(0)],
    ]


def test_ids_of_calls_are_unique():
    ids = {random_call_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(re.fullmatch("call_[0-9a-f]{24}", id) for id in ids)


@pytest.mark.parametrize("tools", [["f"], [{}], [{"function": {}}], [{"function": {"name": 5}}], [None]])
def test_tools_without_a_name_are_refused(tools):
    with pytest.raises(RequestError) as caught:
        AnswerParser(FORMAT, tools, False)
    assert caught.value.field == "tools"


# ── the checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_comes_from_the_checkpoint(name):
    separator = "" if name == "GLM-4.7-Flash.jinja" else "\n"
    for tokens in (TAGS, ()):
        assert answer_format(TEMPLATES[name], tokens) == AnswerFormat(separator=separator)


def test_formats_of_other_checkpoints():
    assert answer_format(None, TAGS) == AnswerFormat()
    assert answer_format(None, ()) is None
    assert answer_format("{{ messages[0].content }}", ()) is None
    assert answer_format("{{ messages[0].content }}", TAGS) == AnswerFormat(call=None)  # it does not write calls
    assert answer_format("{{ broken", TAGS) == AnswerFormat(call=None)
    assert answer_format(TEMPLATES["ours"].replace("think>", "thought>"), TAGS[2:]) == AnswerFormat(think=None)
    no_calls = AnswerParser(AnswerFormat(call=None), TOOLS, False)
    assert no_calls.push(CALL) + no_calls.finish() == [TextDelta(CALL)]
    no_thoughts = AnswerParser(AnswerFormat(think=None), TOOLS, False)
    assert no_thoughts.push("<think>") + no_thoughts.finish() == [TextDelta("<think>")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_whether_the_prompt_has_opened_the_reasoning(name):
    template = COMPILED[name]
    for content in ("Hi", "what is <think>?", "a</think>b", "<|assistant|><think>"):
        asked = [{"role": "user", "content": content}]
        assert thinking_open(template.render(asked), FORMAT) == (name == "GLM-4.7-Flash.jinja")
        assert not thinking_open(template.render(asked, enable_thinking=False), FORMAT)
    begun = [*asked, {"role": "assistant", "content": "I am", "reasoning_content": "thoughts"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert not thinking_open(template.render(begun, **options), FORMAT)
    assert thinking_open("<think>\n", FORMAT) and not thinking_open("<think>a", FORMAT)
    assert not thinking_open("<think>", AnswerFormat(think=None))


WORDS = st.text('ab<>/_\n "\\{}1é🙂', max_size=12)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "text": WORDS | st.sampled_from(["123", "true", "\n x \n", "</arg_value", "</tool_call> and so on"]),
        "number": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        "count": st.integers(),
        "flag": st.booleans(),
        "list": st.lists(st.integers() | WORDS, max_size=3),
        "object": st.dictionaries(WORDS, WORDS | st.none(), max_size=3),
        "nothing": st.none(),
        "maybe": st.integers() | st.none(),
    },
).filter(lambda values: "</arg_value>" not in json.dumps(values))


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    reasoning=st.sampled_from(["", "why", "a\n\nb < c"]),
    content=st.sampled_from(["", "Here.", "a <b>\n\nc", "x\n  y"]),
    calls=st.lists(st.tuples(st.sampled_from(["f", "read file"]), VALUES), max_size=3),
    size=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_what_a_template_writes_of_an_answer_is_read_back(name, reasoning, content, calls, size):
    template = COMPILED[name]
    asked = [{"role": "user", "content": "?"}]
    functions = [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in calls]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": functions}
    prompt = template.render(asked)
    text = template.render([*asked, answer], add_generation_prompt=False)
    if not text.startswith(prompt):  # GLM-4.7's prompt opens the reasoning, its history closes it if there was none
        prompt = prompt.removesuffix("<think>")
    text = text.removeprefix(prompt)
    got = collect(
        parse([text[i : i + size] for i in range(0, len(text), size)], thinking=thinking_open(prompt, FORMAT))
    )
    assert (got.reasoning, got.content) == (reasoning, content)
    assert [(call.name, json.loads(call.arguments)) for call in got.tool_calls] == calls
    assert all(call.complete for call in got.tool_calls)


# ── whole grammars of answers ───────────────────────────────────────────────────────────────────────────────────────

FRAGMENTS = st.sampled_from(
    [
        *TAGS,
        *TAGS,
        "\n",
        " ",
        "<",
        "</",
        "</arg_value",
        "f",
        "text",
        "count",
        "list",
        "unknown",
        "read file",
        "[1]",
        '"',
    ]
)
PARTS = st.lists(FRAGMENTS | WORDS, max_size=30) | st.lists(
    st.sampled_from([CALL, CALL.replace("\n", ""), "<think>a</think>", "</think>", CALL[:30], CALL[-30:], "x", "\n"]),
    max_size=6,
)


@given(parts=PARTS, thinking=st.booleans(), continues=st.booleans(), stopped=st.booleans(), data=st.data())
@settings(max_examples=250, deadline=None)
def test_an_answer_is_the_same_wherever_it_is_cut(parts, thinking, continues, stopped, data):
    text = "".join(parts)
    options = {"thinking": thinking, "continues": continues, "stopped": stopped}
    whole = parse([text], **options)
    assert parse(text, **options) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(pieces, **options) == whole
    for call in collect(whole).tool_calls:
        if call.complete:
            assert isinstance(json.loads(call.arguments), dict)
        else:
            with pytest.raises(ValueError):
                json.loads(call.arguments)


BEGINNINGS = ("<tool_call>f\n<arg_key>", "<tool_call>f<arg_key>text</arg_key><arg_value>", "</arg_value></tool_call>")


@given(
    tags=st.lists(st.sampled_from([*TAGS, *BEGINNINGS, "\n", ""]), max_size=25),
    thinking=st.booleans(),
    stopped=st.booleans(),
)
@settings(max_examples=250, deadline=None)
def test_no_word_is_lost(tags, thinking, stopped):
    """Words that are all different, between any tags in any order: each is somewhere in what is told, once."""
    text = "".join(f"{tag}w{i}." for i, tag in enumerate(tags))
    answer = collect(parse([text], thinking=thinking, stopped=stopped))
    told = [answer.reasoning, answer.content]
    for call in answer.tool_calls:
        told += [call.name, call.arguments]
    for i in range(len(tags)):
        assert "\n".join(told).count(f"w{i}.") == 1


@given(text=st.text("ab< >\n\t/", max_size=20), continues=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_text_without_tags_is_told_as_it_is(text, continues):
    """But for blank lines in front of it, which the format of GLM-4.5 has there."""
    white = text[: len(text) - len(text.lstrip())]
    expected = text if continues or text == white else text[white.rfind("\n") + 1 :]
    assert collect(parse(text, continues=continues)).content == ("" if text == white and not continues else expected)


HOSTILE = (*TAGS, "<", "</", "\n", "<tool_call>x ", "<tool_call>f<arg_key>", "<tool_call>f</tool_call>", "a ")
OPENINGS = (
    "",
    "<tool_call>",
    "<tool_call>f<arg_key>",
    "<tool_call>f<arg_key>text</arg_key>",
    "<tool_call>f<arg_key>text</arg_key><arg_value>",
    "<tool_call>f<arg_key>list</arg_key><arg_value>[",
    "<tool_call>f<arg_key>text</arg_key><arg_value></arg_value>",
)


def cost(text, size):
    """Seconds of the processor to parse a text in pieces of this many characters: this thread's, without collections
    of garbage, which take long after many other tests."""
    gc.disable()
    try:
        started = time.thread_time()
        parse([text[i : i + size] for i in range(0, len(text), size)])
        return time.thread_time() - started
    finally:
        gc.enable()


@pytest.mark.parametrize("opening", OPENINGS)
def test_hostile_answers_cost_what_others_do(opening):
    """16 times the length costs about 16 times as much; to read anything twice would make that 256 times."""
    for unit in HOSTILE:
        small, large = (cost(opening + unit * (length // len(unit)), length) for length in (1 << 12, 1 << 16))
        assert large < 48 * small + 0.4, (unit, small, large)


@pytest.mark.slow
@pytest.mark.parametrize("opening", OPENINGS)
def test_hostile_answers_in_small_pieces_cost_what_others_do(opening):
    for unit in ("<", "\n"):
        small, large = (cost(opening + unit * length, 16) for length in (1 << 14, 1 << 18))
        assert large < 48 * small + 0.4, (unit, small, large)


@pytest.mark.slow
def test_a_megabyte_of_tags_is_read_within_seconds():
    for unit in ("<", "<tool_call>", "</tool_call>x"):
        assert cost("<tool_call>f<arg_key>text</arg_key><arg_value>" + unit * ((1 << 20) // len(unit)), 1 << 20) < 20


# ── a real answer ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_an_answer_of_the_demo_model_is_read_as_the_readme_says():
    with LLM(model=str(checkpoints.DEMO), device="cpu") as llm:
        format = answer_format(llm.chat_template.source, llm.tokenizer.added_names)
        assert format == AnswerFormat()
        out = llm.chat([{"role": "user", "content": "What is the capital of France?"}], tools=TOOLS)[0]
        answer = parse_answer(out.outputs[0].text, format, TOOLS, thinking_open(out.prompt, format))
        assert answer.content and not re.search("|".join(TAGS), answer.content)
        pieces = [piece.text for piece in llm.stream(out.prompt)]
        events = parse(pieces, thinking=thinking_open(out.prompt, format))
        assert collect(events) == parse_answer("".join(pieces), format, TOOLS, thinking_open(out.prompt, format))
