"""ChatTemplate: golden prompts of GLM's templates, our own template beside them, refusals, and hostile templates."""

import copy
import functools
import json
import resource
import time
from pathlib import Path

import checkpoints
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer.errors import CheckpointError, RequestError
from glimmer.text import sandbox
from glimmer.text.chat import MAX_CHARACTERS, ChatTemplate, template_kwargs
from glimmer.text.sandbox import bounded

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_renders.json").read_text(encoding="utf-8"))
OURS = checkpoints.DEMO / "chat_template.jinja"
TEMPLATES = {name: DATA / name for name in GOLDEN["renders"]} | {"ours": OURS}


def template(source, origin="the template"):
    return ChatTemplate(source, origin)


@functools.cache
def load(path):
    return template(path.read_text(encoding="utf-8"), str(path))


def refusal(kind, act):
    """The error of `kind` that `act` raises, once it has been seen to have three parts."""
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.found and caught.value.expected and caught.value.todo
    return caught.value


# ── golden prompts ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", GOLDEN["cases"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_golden_prompts(name, case):
    golden = GOLDEN["renders"]["GLM-4.5.jinja" if name == "ours" else name][case]
    if case == "content_none_with_call":
        # The golden prompt is what the bare template makes of null: the word None. We promise no text at all.
        golden = golden.replace("\nNone\n", "\n").replace("None", "")
    assert load(TEMPLATES[name]).render(**GOLDEN["cases"][case]) == golden


TEXT = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            "Hi",
            " padded \n",
            "/nothink",
            "say /nothink",
            "<think>a</think>b",
            "\n<think>\n a \n</think>\n\nb",
            "a</think>b</think>c",
            "<think>open",
            "",
            "\n",
        ]
    ),
)
PARTS = st.lists(st.one_of(TEXT, TEXT.map(lambda text: {"type": "text", "text": text})), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
FUNCTION = st.fixed_dictionaries({"name": TEXT, "arguments": st.dictionaries(TEXT, JSON, max_size=3)})
CALLS = st.lists(FUNCTION | FUNCTION.map(lambda function: {"id": "c", "function": function}), max_size=2)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT | PARTS}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT | PARTS | st.none()},
        optional={"reasoning_content": TEXT | st.none(), "tool_calls": CALLS | st.none()},
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("tool"),
            "content": TEXT | st.lists(TEXT | JSON.map(lambda output: {"output": output}), max_size=3),
        }
    ),
)


@settings(max_examples=200, deadline=None)
@given(
    messages=st.lists(MESSAGE, min_size=1, max_size=6),
    begin=st.booleans(),
    tools=st.none() | st.lists(st.dictionaries(TEXT, JSON), max_size=2),
    thinking=st.sampled_from([{}, {"enable_thinking": True}, {"enable_thinking": False}]),
)
def test_our_template_is_glm_4_5_s_on_any_conversation(messages, begin, tools, thinking):
    prompts = [load(path).render(messages, tools, begin, **thinking) for path in (OURS, TEMPLATES["GLM-4.5.jinja"])]
    assert prompts[0] == prompts[1]


def test_our_template_reads_null_as_no_text_even_without_our_checks():
    with bounded():
        bare = load(OURS)._template.render(messages=[{"role": "user", "content": None}])
    assert bare == "[gMASK]<sop><|user|>\n"


# ── what ChatTemplate does to messages ──────────────────────────────────────────────────────────────────────────────

ASK = {"role": "user", "content": "x"}


def calling(arguments, **function):
    function = {"name": "f", "arguments": arguments, **function}
    return [ASK, {"role": "assistant", "tool_calls": [{"function": function}]}]


@pytest.mark.parametrize(
    "given, meant",
    [
        ('{"a": 1, "b": "ü"}', {"a": 1, "b": "ü"}),
        ('{"a": {"b": null}}', {"a": {"b": None}}),
        ("{}", {}),
        ("", {}),
        (None, {}),
    ],
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_may_be_json_text(name, given, meant):
    assert load(TEMPLATES[name]).render(calling(given)) == load(TEMPLATES[name]).render(calling(meant))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tool_s_answer_in_text_parts_is_one_answer(name):
    parts = [ASK, {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert load(TEMPLATES[name]).render(parts) == load(TEMPLATES[name]).render([ASK, {"role": "tool", "content": "ab"}])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_developer_speaks_as_the_system(name):
    prompts = {load(TEMPLATES[name]).render([{"role": role, "content": "x"}, ASK]) for role in ("system", "developer")}
    assert len(prompts) == 1 and "<|system|>" in prompts.pop()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_text_parts_are_joined(name, role):
    parts = [{"type": "text", "text": "a\n"}, "b", {"type": "text", "text": " c"}]
    rendered = [
        load(TEMPLATES[name]).render([ASK, {"role": role, "content": content}]) for content in (parts, "a\nb c")
    ]
    assert rendered[0] == rendered[1]
    assert template("{{ messages[0].content + '!' }}").render([{"role": role, "content": parts}]) == "a\nb c!"


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_of_the_history_has_two_names(name):
    def prompt(**reasoning):
        call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": None}], **reasoning}
        return load(TEMPLATES[name]).render([ASK, call, {"role": "tool", "content": "1"}])

    assert "<think>why</think>" in prompt(reasoning_content="why")
    assert prompt(reasoning_content="why") == prompt(reasoning="why") == prompt(reasoning_content=None, reasoning="why")
    assert prompt(reasoning_content="why", reasoning="other") == prompt(reasoning_content="why")
    assert prompt(reasoning=None) == prompt()


@pytest.mark.parametrize(
    "kwargs, thinking, meant",
    [
        (None, None, {}),
        ({"enable_thinking": False, "x": [1]}, None, {"enable_thinking": False, "x": [1]}),
        (None, {"type": "enabled"}, {"enable_thinking": True}),
        (None, {"type": "adaptive", "budget_tokens": 100}, {"enable_thinking": True}),
        (None, {"type": None, "clear_thinking": None}, {}),
        (None, {"clear_thinking": False}, {"clear_thinking": False}),
        ({}, {"type": "disabled"}, {"enable_thinking": False}),
        (None, {"type": "enabled", "clear_thinking": False}, {"enable_thinking": True, "clear_thinking": False}),
        ({"enable_thinking": True, "x": 1}, {"type": "enabled"}, {"enable_thinking": True, "x": 1}),
    ],
)
def test_a_request_sets_variables_of_the_template(kwargs, thinking, meant):
    assert template_kwargs(kwargs, thinking) == meant


def test_the_vendor_s_thinking_is_the_template_s_variable():
    template = load(TEMPLATES["GLM-4.7-Flash.jinja"])
    assert template.render([ASK], **template_kwargs(None, {"type": "disabled"})).endswith("<|assistant|></think>")
    assert template.render([ASK], **template_kwargs(None, {"type": "enabled"})).endswith("<|assistant|><think>")


@pytest.mark.parametrize(
    "kwargs, thinking, field",
    [
        ([], None, "chat_template_kwargs"),
        ("x", None, "chat_template_kwargs"),
        ({"messages": []}, None, "chat_template_kwargs"),
        ({"add_generation_prompt": False}, None, "chat_template_kwargs"),
        (None, True, "thinking"),
        (None, {"type": "off"}, "thinking.type"),
        (None, {"type": False}, "thinking.type"),
        (None, {"type": ["enabled"]}, "thinking.type"),
        (None, {"type": "enabled", "clear_thinking": 1}, "thinking.clear_thinking"),
        ({"enable_thinking": True}, {"type": "disabled"}, "thinking"),
        ({"enable_thinking": 1}, {"type": "enabled"}, "thinking"),
    ],
)
def test_variables_that_cannot_be_served_are_named(kwargs, thinking, field):
    assert refusal(RequestError, lambda: template_kwargs(kwargs, thinking)).field == field


def test_the_caller_s_objects_stay_as_they_were():
    messages = [
        *calling('{"a": 1}'),
        {"role": "assistant", "content": None},
        {"role": "tool", "content": [{"type": "text", "text": "a"}]},
    ]
    tools = [{"function": {"name": "f"}}]
    before = copy.deepcopy((messages, tools))
    load(OURS).render(messages, tools)
    assert (messages, tools) == before


@pytest.mark.parametrize(
    "messages, field",
    [
        (None, "messages"),
        ("Hi", "messages"),
        ([], "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        ([ASK, "Hi"], "messages[1]"),
        ([ASK, ASK, {"content": "x"}], "messages[2].role"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([{"role": None, "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content"),
        ([{"role": "user", "content": ["x", 5]}], "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([ASK, {"role": "tool", "content": [{"output": 1}, {"result": 1}]}], "messages[1].content[1]"),
        ([ASK, {"role": "assistant", "reasoning_content": ["x"]}], "messages[1].reasoning_content"),
        ([ASK, {"role": "assistant", "reasoning": {"text": "x"}}], "messages[1].reasoning"),
        ([ASK, {"role": "assistant", "tool_calls": {"name": "f"}}], "messages[1].tool_calls"),
        ([ASK, {"role": "assistant", "tool_calls": ["f"]}], "messages[1].tool_calls[0]"),
        ([ASK, {"role": "assistant", "tool_calls": [{"function": "f"}]}], "messages[1].tool_calls[0].function"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 1}]}], "messages[0].tool_calls[0].arguments"),
        (calling("{}", name=None), "messages[1].tool_calls[0].function.name"),
        (calling("[1]"), "messages[1].tool_calls[0].function.arguments"),
        (calling('{"a":'), "messages[1].tool_calls[0].function.arguments"),
        (calling("[" * 100_000), "messages[1].tool_calls[0].function.arguments"),
        (calling('{"a": ' + "1" * 10_000 + "}"), "messages[1].tool_calls[0].function.arguments"),
        (calling([1]), "messages[1].tool_calls[0].function.arguments"),
    ],
)
def test_a_message_that_cannot_be_served_is_named(messages, field):
    error = refusal(RequestError, lambda: load(OURS).render(messages))
    assert error.field == field
    assert field in error.found and len(str(error)) < 1000


@pytest.mark.parametrize("tools, field", [("f", "tools"), ({"f": 1}, "tools"), ([{"f": 1}, "g"], "tools[1]")])
def test_a_tool_that_cannot_be_served_is_named(tools, field):
    assert refusal(RequestError, lambda: load(OURS).render([ASK], tools)).field == field


# ── what a template finds ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "source, prompt",
    [
        ("{{ kwargs_come_through }}", "yes"),
        ("{{ messages[0].nothing }}", ""),
        ("{% for m in messages %}\n  {% break %}\n{% endfor %}\nend", "end"),
        ('{{ {"b": "<ü>", "a": 1} | tojson }}', '{"b": "<ü>", "a": 1}'),
        ('{{ {"b": "ü", "a": 1} | tojson(ensure_ascii=true, sort_keys=true) }}', '{"a": 1, "b": "\\u00fc"}'),
        ('{{ {"b": 2, "a": 1} | tojson(separators=(",", ":")) }}', '{"b":2,"a":1}'),
        ('{{ {"a": 1} | tojson(indent=2) }}', '{\n  "a": 1\n}'),
        ('{{ strftime_now("%Y") | length }}', "4"),
        ("{{ 3 * 4 }} {{ 2 ** 10 }} {{ 0.5 * 4 }} {{ 4 ** 0.5 }}", "12 1024 2.0 2.0"),
        ("{{ 'ab' * 3 }} {{ 3 * [1] }} {{ 'a' * -1 }}.", "ababab [1, 1, 1] ."),
    ],
)
def test_templates_find_what_transformers_gives_them(source, prompt):
    assert template(source).render([ASK], kwargs_come_through="yes", self="") == prompt


def test_a_template_may_refuse_the_conversation():
    error = refusal(RequestError, lambda: template('{{ raise_exception("users first") }}').render([ASK]))
    assert error.field == "messages" and "users first" in error.found


@pytest.mark.parametrize(
    "source",
    [
        "{{ nothing.at.all }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].nothing | tojson }}",
        "{% include 'other' %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 10.0 ** 10000 }}",
        "{{ none * 2 }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(10) %}{{ 'x' * 2000000 }}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_an_error_and_no_traceback(source):
    assert refusal(RequestError, lambda: template(source).render([ASK])).field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ('{0.' ~ '__class__.__mro__}').format(messages) }}",
    ],
)
def test_a_template_that_reaches_too_far_is_stopped(source):
    messages = [dict(ASK)]
    with pytest.raises((CheckpointError, RequestError)) as caught:
        template(source).render(messages)
        pytest.fail(f"{source} was rendered")
    assert caught.value.found and messages == [ASK]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 2 ** 65 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ ('x' * 20000000) | length }}",
        "{{ (20000000 * [messages]) | length }}",
        "{% set n = namespace(x=3) %}{% for i in range(9) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_no_single_product_or_power_is_huge(source):
    error = refusal(CheckpointError, lambda: template(source).render([ASK]))
    assert "would be too big" in error.found


def test_the_longest_prompt():
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    half = {"role": "user", "content": "x" * (MAX_CHARACTERS // 2)}
    assert len(template(source).render([half, half])) == MAX_CHARACTERS
    error = refusal(RequestError, lambda: template(source).render([half, half, ASK]))
    assert str(MAX_CHARACTERS) in error.found


@pytest.mark.parametrize(
    "source",
    [
        *(
            f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ ns.x }}}}"
            for start, step in (
                ("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
                ("'ab'", "{% set ns.x = ns.x + ns.x %}"),
                ("'ab'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
                ("'ab'", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
                ("'ab'", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
                ("'ab'", "{% set ns.x = [ns.x, ns.x] | join %}"),
                ("'ab'", "{% set ns.x = ns.x.replace('a', 'aa') %}"),
                ("'ab'", "{% set ns.x = ns.x | replace('a', 'aa') %}"),
                ("'ab'", "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns.x = twice(ns.x) %}"),
                ("[1]", "{% set ns.x = ns.x + ns.x %}"),
                ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
                ("[1]", "{% set ns.x = (ns.x, ns.x) %}"),
                ("{}", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
                ("{}", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
            )
        ),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['x' * 9999999] %}{% endfor %}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x' | indent(10 ** 10, true) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ 'x'.zfill(10 ** 10) }}",
        "{{ '\t'.expandtabs(10 ** 10) }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10 ** 10) }}",
        "{{ {'a': 1} | tojson(indent=10 ** 10) }}",
        "{{ [[1] * 99999] * 99999 | sum(start=[]) }}",
        "{{ (('x' * 9999999).split('') | list) }}",
        "{{ ' '.join([' ' * 9999999] * 9999) }}",
        "{{ range(10 ** 10) }}",
    ],
)
def test_time_and_memory_of_a_template_are_bounded(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((CheckpointError, RequestError)):
        template(source).render([ASK])
    assert time.monotonic() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_bounds_change_no_ordinary_template():
    source = (
        "{%- set ns = namespace(last=-1, seen=[]) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{%- set ns.last = loop.index0 -%}{%- set ns.seen = ns.seen + [m.content] -%}{%- endif -%}"
        "{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{%- endfor -%}"
        "{% for a, b in [(1, 2), (3, 4)] %}[{{ a + b }}]{% endfor %}{{ ns.last }}{{ ns.seen | join('+') }}"
        "{{ {'a': [1, 'x']} | tojson }}{{ 'a' ~ 1 ~ none }}{{ '%s-%d' % ('y', 5) }}{{ '{}!'.format('z') }}"
        "{{ messages | map(attribute='role') | list }}{{ ('user', 'x')[0] in ['user'] }}"
    )
    rendered = template(source).render([ASK, {"role": "assistant", "content": "y"}])
    assert rendered == "1/2,2/2[3][7]0x" + '{"a": [1, "x"]}' + "a1Noney-5z!['user', 'assistant']True"


def test_a_generation_block_is_what_is_inside():
    source = "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}"
    assert template(source).render([ASK]) == "<x>"


# ── load ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_comes_before_the_configuration(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "from the configuration"}')
    assert ChatTemplate.load(tmp_path).render([ASK]) == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from the file: ü", encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render([ASK]) == "from the file: ü"


def test_of_several_templates_the_default_counts(tmp_path):
    entries = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    assert ChatTemplate.load(tmp_path).render([ASK]) == "default"


@pytest.mark.parametrize("config", [None, "{}", '{"chat_template": null}'])
def test_without_a_template_only_rendering_fails(tmp_path, config):
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    absent = ChatTemplate.load(tmp_path)
    error = refusal(CheckpointError, lambda: absent.render([ASK]))
    assert str(tmp_path) in error.found and "raw prompts" in error.todo
    assert absent.fault is not None and absent.fault.found == error.found and absent.source is None


@pytest.mark.parametrize(
    "name, content",
    [
        ("chat_template.jinja", b"{% if %}"),
        ("chat_template.jinja", b"{{ 1"),
        ("chat_template.jinja", b"{% for x in y %}"),
        ("chat_template.jinja", b"{{ x | no_such_filter }}"),
        ("chat_template.jinja", b"{{ " + b"(" * 10_000),
        ("chat_template.jinja", b"{% for x in y %}" * 30 + b"{% endfor %}" * 30),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}'),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"template": "x"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": null}, 5]}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[" * 100_000),
    ],
)
def test_a_broken_template_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    broken = ChatTemplate.load(tmp_path)  # raw prompts need no template
    assert str(tmp_path / name) in refusal(CheckpointError, lambda: broken.render([ASK])).found
    assert broken.fault is not None and str(tmp_path / name) in broken.fault.found
    errors = [refusal(CheckpointError, lambda: broken.render([ASK])) for _ in range(2)]
    assert errors[0] is not errors[1]  # an exception that is raised again keeps what it was raised with before


def test_the_test_checkpoint_has_our_template(directory):
    template = ChatTemplate.load(directory)
    assert template.render([ASK]) == "[gMASK]<sop><|user|>\nx<|assistant|>"
    assert template.fault is None and template.source == OURS.read_text(encoding="utf-8")
