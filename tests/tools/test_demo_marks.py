"""The judge of the demo model's answers: what counts as a call, as right, as reasoning; and the table it writes."""

from types import SimpleNamespace

import evaluate
import pytest

TOOLS = [
    {"function": {"name": "find", "parameters": {"properties": {"what": {"type": "string"}, "many": {"type": "integer"},
                                                                "tags": {"type": "array"}}, "required": ["what"]}}},
    {"function": {"name": "now", "parameters": {"properties": {}}}},
]  # fmt: skip


def call(name: str, **arguments: str) -> str:
    lines = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments.items())
    return f"<tool_call>{name}\n{lines}</tool_call>"


def answer(text: str, finish: str = "stop") -> SimpleNamespace:
    return SimpleNamespace(outputs=[SimpleNamespace(text=text, finish_reason=finish)])


def test_calls_are_read_with_their_types():
    text = call("find", what="12", many="3", tags='["a", "b"]') + "\n" + call("now")
    assert evaluate.calls_in(text, TOOLS) == [("find", {"what": "12", "many": 3, "tags": ["a", "b"]}), ("now", {})]


@pytest.mark.parametrize("text", [
    "", "It is noon.", call("fetch", what="x"), call("find", that="x"), call("find", many="3"),
    call("find", what="x", many="three"), "well: " + call("now"), call("now").removesuffix(">"),
])  # fmt: skip
def test_what_is_not_well_formed_is_no_call(text):
    assert evaluate.calls_in(text, TOOLS) is None


@pytest.mark.parametrize("text, right, wellformed", [
    ("\n<think>hm</think>\n" + call("find", what="x"), True, True),
    ("\n<think>hm</think>\n" + call("find", what="y"), False, True),
    ("\n<think>hm</think>\n" + call("find", which="x"), False, False),
])  # fmt: skip
def test_a_call_is_judged(text, right, wellformed):
    marks, item = evaluate.Marks(), {"task": "tool", "tools": TOOLS, "calls": [("find", {"what": "x"})]}
    assert evaluate.judge(marks, item, False, answer(text)) == right
    assert marks.share("tool calls right") == right and marks.share("tool calls well-formed") == wellformed
    assert marks.share("reasoning where asked for, none where not") == 1


def test_sums_forms_and_facts_are_judged():
    marks = evaluate.Marks()
    assert evaluate.judge(marks, {"task": "sum", "reply": "1+2=3"}, True, answer("\n1+2=3"))
    assert not evaluate.judge(marks, {"task": "sum", "reply": "1+2=3"}, False, answer("\n<think>x</think>\n1+2=4"))
    assert evaluate.judge(marks, {"task": "json", "reply": '{"a": 1}'}, True, answer('\n{"a":1}'))
    assert not evaluate.judge(marks, {"task": "json", "reply": '{"a": 1}'}, True, answer('\n{"a":1', "length"))
    assert evaluate.judge(marks, {"task": "fact", "answers": ["France"]}, True, answer("\nParis is in France."))
    assert marks.share("JSON valid") == 0.5 and marks.share("turns ended") == 0.8
    assert marks.share("sums right, without reasoning") == 1 and marks.share("sums right, with reasoning") == 0


def test_the_table_says_what_was_asked_for_and_what_was_reached():
    marks = evaluate.Marks()
    for name in evaluate.GOALS:
        marks.add(name, True)
    report = dict.fromkeys(evaluate.GOALS, 0.9) | {"expert load, least and most of each layer": [[0.5, 1.5]]}
    lines = evaluate.table(report, marks)
    assert "| city facts right | 90.0% | 1 | 95% |" in lines and "0.50 to 1.50" in lines[-1]
