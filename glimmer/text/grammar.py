"""Constrained decoding: what an answer must look like (ConstraintSpec), and the constraint that makes it so (Grammars).

    structured outputs, tools, tool_choice --prompt_constraint()--> ConstraintSpec --Grammars--> Constraint of an answer

    [reasoning] content                     content: free, or of a form (forms.py)
    [reasoning] [content] call call ...     <tool_call>name, then <arg_key>key</arg_key><arg_value>value</arg_value> for
                                            each argument, then </tool_call>; white space as either generation writes it

A ConstraintSpec is plain data and may travel to the process of the engine; it knows no token. Reasoning is free text
and ends with </think>; what is asked for holds for what follows. With tool_choice "auto" the text is free until
<tool_call>, and then nothing but calls may come. Every end-of-sequence id ends an answer that is complete.
Not here: reading answers (parse.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from threading import Lock
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from glimmer.config import StructuredOutputs
from glimmer.errors import EngineError, RequestError, shown
from glimmer.text.answers import AnswerFormat
from glimmer.text.constraint import (
    AnswerConstraint,
    Beginning,
    Fixed,
    FixedText,
    Free,
    Next,
    Phase,
    Spelling,
    Text,
    Vocabulary,
    compute,
    contained,
)
from glimmer.text.forms import LIMITS, Cache, refused, structured_form
from glimmer.text.tokenizer import Tokenizer
from glimmer.text.tools import ToolForm, tool_forms

TURN = "<|assistant|>"  # after which an answer begins
COMPILE_SECONDS = 10.0  # that a grammar may take; the library's own limits end it before
CHOICES = ("auto", "required", "none")
TAGS = (THINK, THINK_END, CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END) = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
ANY_KEY = LLMatcher.grammar_from_lark(r"start: /[^<\s\x00-\x1f]([^<\x00-\x1f]{0,126}[^<\s\x00-\x1f])?/")

_compilers = ThreadPoolExecutor(2, "glimmer-grammars")


@dataclass(frozen=True)
class ConstraintSpec:
    """What the answer to one prompt must look like.

    content   the grammar of its text, as the library's text; None: any
    field     the parameter that `content` comes from, for errors
    tools     those that it may call; choice: "auto", "required" (nothing but calls) or "none" (no calls)
    parallel  several calls may follow one another
    chat      it begins a turn of the model, which may write a line break first
    thinking  it begins within the reasoning; may_think: the model may open its reasoning
    """

    content: str | None = None
    field: str = "structured_outputs"
    tools: tuple[ToolForm, ...] = ()
    choice: str = "auto"
    parallel: bool = True
    chat: bool = False
    thinking: bool = False
    may_think: bool = False


@dataclass(frozen=True)
class Calls:
    """What may be called in an answer, in OpenAI's form. format: how the chat template writes its calls."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    format: AnswerFormat | None


def prompt_constraint(
    prompt_token_ids: Sequence[int],
    tokenizer: Tokenizer,
    structured_outputs: StructuredOutputs | None,
    calls: Calls | None = None,
) -> ConstraintSpec | None:
    """What the answer to this prompt must look like, or None if any text will do. RequestError as constraint_spec.

    calls: None if no tools have been offered.
    """
    asked = calls or Calls(None, None, None, None)
    spec = constraint_spec(structured_outputs, asked.tools, asked.tool_choice, asked.parallel_tool_calls, asked.format)
    if spec is None:
        return None
    chat, thinking, may_think = answer_begins(prompt_token_ids, tokenizer)
    return replace(spec, chat=chat, thinking=thinking, may_think=may_think)


def constraint_spec(
    structured_outputs: StructuredOutputs | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    format: AnswerFormat | None = None,
    thinking: bool = False,
    may_think: bool = True,
) -> ConstraintSpec | None:
    """What is asked for, or None if any text will do.

    tools, tool_choice: in OpenAI's form; a single tool is chosen by {"type": "function", "function": {"name": NAME}}.
    format: how the checkpoint writes its answers (AnswerFormat), in a conversation; None for a raw prompt.
    thinking: the prompt has opened the reasoning. may_think: the answer may do so; answer_begins tells both.
    Raises RequestError that names the field, and the keyword that cannot be enforced.
    """
    content = None if structured_outputs is None else structured_form(structured_outputs)
    forms = tool_forms(tools or ())
    choice, chosen = _choice(tool_choice, forms)
    if parallel_tool_calls not in (None, True, False):
        found = f"parallel_tool_calls={shown(parallel_tool_calls)}"
        raise RequestError("parallel_tool_calls", found, "True or False", "change parallel_tool_calls")
    if content is None and not forms:
        return None
    if forms and (format is None or format.call is None):
        raise RequestError(
            "tools",
            "tools, where the checkpoint's chat template writes no calls",
            "a checkpoint whose template has tools",
            "leave tools out",
        )
    field = "structured_outputs" if structured_outputs is None else _field(structured_outputs)
    one = isinstance(tool_choice, Mapping)
    parallel = parallel_tool_calls is not False and not one
    return ConstraintSpec(
        content, field, chosen, choice, parallel, format is not None, thinking, may_think and format is not None
    )


def _field(asked: StructuredOutputs) -> str:
    kinds = ("json", "json_object", "regex", "choice", "grammar")
    return "structured_outputs." + next(kind for kind in kinds if getattr(asked, kind) is not None)


def _choice(given: Any, forms: tuple[ToolForm, ...]) -> tuple[str, tuple[ToolForm, ...]]:
    """tool_choice as one of CHOICES, and the tools that it leaves."""
    if isinstance(given, Mapping):
        function = given.get("function", given)
        name = function.get("name") if isinstance(function, Mapping) else None
        chosen = tuple(form for form in forms if form.name == name)
        if not chosen:
            names = ", ".join(form.name for form in forms)[:300] or "none: there are no tools"
            raise RequestError(
                "tool_choice", f"tool_choice={shown(given)}", f"the name of one of the tools ({names})", "change it"
            )
        return "required", chosen
    choice = "auto" if given is None else given
    if choice not in CHOICES:
        raise RequestError(
            "tool_choice", f"tool_choice={shown(given)}", f"one of {CHOICES}, or the name of a tool", "change it"
        )
    if choice == "required" and not forms:
        raise RequestError("tool_choice", "tool_choice='required' without tools", "at least one tool", "pass tools")
    return choice, forms


def answer_begins(prompt_token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[bool, bool, bool]:
    """How an answer to this prompt begins: chat, thinking and may_think of its ConstraintSpec."""
    turn, opens, closes = map(tokenizer.token_to_id, (TURN, THINK, THINK_END))
    if None in (turn, opens, closes) or turn not in prompt_token_ids:
        return False, False, False
    begun = list(prompt_token_ids[len(prompt_token_ids) - tuple(reversed(prompt_token_ids)).index(turn) :])
    tags = [id for id in begun if id in (opens, closes)]
    blank = all(id in tags or tokenizer.token_bytes(id).isspace() for id in begun)
    return blank, tags[-1:] == [opens], blank and not tags


class Grammars:
    """Makes the constraints of a model's answers. Any thread may call it.

    vocab_size: ids below it may be sampled. eos_token_ids: all of them end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]):
        self._tokenizer, self._size = tokenizer, min(vocab_size, tokenizer.size)
        self._eos = [id for id in eos_token_ids if id < self._size]
        self._guard = Lock()
        self._compiled: Cache[Beginning] = Cache()
        self._spellings: dict[tuple[str, ...], Spelling] = {}
        self._tags = {name: id for name in TAGS if (id := tokenizer.token_to_id(name)) is not None and id < self._size}

    def check(self, spec: ConstraintSpec) -> None:
        """RequestError if no answer of this kind can be written, or its grammars are beyond the limits."""
        self._start(spec)
        for i, tool in enumerate(spec.tools):
            grammars = [grammar for _, grammar in tool.values] + ([] if tool.other is None else [tool.other])
            for grammar in grammars:
                self._matcher(grammar, f"tools[{i}].function.parameters")

    def prepare(self) -> None:
        """Make what the first constraint needs: a second or two, in which other threads wait now and then."""
        if self._eos:
            self._matcher(ANY_KEY, "tools")

    def constraint(self, spec: ConstraintSpec) -> AnswerConstraint:
        """The constraint of one answer, at its beginning. RequestError as `check`."""
        self.check(spec)  # while the answer is written, nothing has to be compiled
        return AnswerConstraint(self._start(spec), "tools" if spec.content is None else spec.field)

    def _start(self, spec: ConstraintSpec) -> Phase:
        if not self._eos:
            raise RequestError(
                spec.field,
                "a model without an end-of-sequence token",
                "a token that ends the answer when its form is complete",
                "add eos_token_id to the checkpoint's generation_config.json",
            )
        needed = TAGS if spec.tools else TAGS[:2] if spec.chat or spec.thinking else ()
        if missing := next((tag for tag in needed if tag not in self._tags), None):
            raise RequestError(
                "tools" if spec.tools else spec.field,
                f"a tokenizer without a token {missing}",
                "the tokenizer of a GLM-4.5, 4.6 or 4.7 checkpoint",
                "use the checkpoint's own tokenizer.json",
            )
        if spec.content is not None:
            self._matcher(spec.content, spec.field)
        return _Answer(self, spec).start()

    # ------------------------------------------------------------------ the library

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens that may be sampled."""
        added = self._tokenizer.added_ids
        tokens = (b"" if id in added else self._tokenizer.token_bytes(id) for id in range(self._size))
        return Vocabulary(self._size, tokens, self._eos)

    @cached_property
    def _library(self) -> LLTokenizer:
        """The tokenizer as the library wants it."""
        tokenizer = TokenizerWrapper(_Tokens(self._tokenizer, self._size, self._eos))
        return LLTokenizer(tokenizer, n_vocab=self._size, eos_token=self._eos)

    def _matcher(self, grammar: str, field: str) -> Beginning:
        """A grammar's matcher at its beginning, for one text. RequestError if there is none."""
        known = self._compiled.get(grammar)
        if known is None:
            try:
                known = _compilers.submit(self._compile, grammar, field).result(COMPILE_SECONDS)
            except TimeoutError:
                raise refused(field, f"it took more than {COMPILE_SECONDS:g} s to compile") from None
            self._compiled.keep(grammar, known)
        return known

    def _compile(self, grammar: str, field: str) -> Beginning:
        with self._guard:
            library = self._library
        try:
            with contained():
                matcher = LLMatcher(library, grammar, limits=LIMITS, log_level=0)
        except EngineError as error:
            raise refused(field, error.found) from None
        if matcher.is_error():
            raise refused(field, " ".join(matcher.get_error().split())[:400])
        try:
            return Beginning(matcher, compute(matcher))
        except EngineError as error:
            raise refused(field, "no text satisfies it" if "NoExtension" in error.found else error.found) from None

    # ------------------------------------------------------------------ for _Answer

    def id(self, tag: str) -> int:
        """The token of a tag."""
        return self._tags[tag]

    def spelling(self, *tags: str) -> Spelling:
        """These tags, spelt out of ordinary tokens."""
        if tags not in self._spellings:
            self._spellings[tags] = Spelling(self.vocabulary, tags)
        return self._spellings[tags]

    def matcher(self, grammar: str) -> Beginning:
        """The beginning of a grammar that has been checked."""
        return self._matcher(grammar, "structured_outputs")


class _Tokens:
    """A tokenizer in the form that the library asks for. All added tokens are special, and no text has any."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos: list[int]):
        self._tokenizer, self.eos_token_id = tokenizer, eos[0]
        self.tokens = [tokenizer.token_bytes(id) for id in range(size)]
        self.special_token_ids = sorted(id for id in tokenizer.added_ids if id < size)

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_plain(text.decode(errors="replace"))


Exits = Mapping[int, Next]


class _Answer:
    """The phases of an answer; each method makes one, or says which tokens lead where."""

    def __init__(self, grammars: Grammars, spec: ConstraintSpec):
        self.grammars, self.spec, self.vocabulary = grammars, spec, grammars.vocabulary
        self.calls = bool(spec.tools) and spec.choice != "none"
        self.forced = spec.content is not None or spec.choice == "required"
        self.newline = self.vocabulary.ids.get(b"\n")

    def start(self) -> Phase:
        """The first phase."""
        return self.reasoning() if self.spec.thinking else self.answer(self.spec.may_think)

    def reasoning(self) -> Phase:
        """After <think>. The answer must not end before what is asked for has come."""
        exits: Exits = {self.grammars.id(THINK_END): partial(self.answer, may_think=False)}
        forbidden = list(self.vocabulary.eos_token_ids) if self.forced else []
        if self.spec.tools and not self.calls:
            forbidden.append(self.grammars.id(CALL))
        return Free(self.vocabulary, exits, forbidden, self.grammars.spelling(THINK_END))

    def answer(self, may_think: bool) -> Phase:
        """What is asked for."""
        opening: dict[int, Next] = {self.grammars.id(THINK): self.reasoning} if may_think else {}
        if not self.forced:
            id, spelling = self.grammars.id(CALL), self.grammars.spelling(CALL)
            exits, forbidden = ({id: self.name}, ()) if self.calls else ({}, (id,))
            return Free(self.vocabulary, exits, forbidden, spelling, opening)
        if self.calls:
            opening[self.grammars.id(CALL)] = self.name
        if self.spec.chat or self.spec.thinking:
            return self.form(self.with_newline(opening, self.form))
        return self.form(opening)

    def form(self, opening: Exits) -> Phase:
        """The content, if there may be one; `opening` says what may come instead."""
        if self.spec.content is None or self.spec.choice == "required":
            return Fixed(self.vocabulary, opening)
        end = dict.fromkeys(self.vocabulary.eos_token_ids, self.end)
        spelling = self.grammars.spelling(CALL) if self.spec.tools else None
        return Text(self.vocabulary, self.grammars.matcher(self.spec.content), lambda _: end, spelling, opening)

    def end(self) -> Phase:
        """After the end: a request may ask that it is ignored."""
        return Fixed(self.vocabulary, dict.fromkeys(self.vocabulary.eos_token_ids, self.end))

    def with_newline(self, exits: Exits, phase: Callable[[Exits], Phase]) -> Exits:
        """These exits, before which a line break may come."""
        return exits if self.newline is None else {**exits, self.newline: lambda: phase(exits)}

    def fixed(self, exits: Exits) -> Phase:
        return Fixed(self.vocabulary, exits)

    # ------------------------------------------------------------------ a call

    def name(self) -> Phase:
        """After <tool_call>."""
        exits = {tool.name.encode(): self.with_newline(self.next(tool, ()), self.fixed) for tool in self.spec.tools}
        return FixedText(self.vocabulary, exits)

    def next(self, tool: ToolForm, given: tuple[str, ...]) -> Exits:
        """After the name or an argument; `given`: the keys that have come."""
        exits: dict[int, Next] = {}
        if tool.other is not None or any(key not in given for key, _ in tool.values):
            exits[self.grammars.id(KEY)] = lambda: self.key(tool, given)
        if all(key in given for key in tool.required):
            exits[self.grammars.id(CALL_END)] = self.after_call
        return exits

    def key(self, tool: ToolForm, given: tuple[str, ...]) -> Phase:
        """After <arg_key>."""
        end = self.grammars.id(KEY_END)
        if tool.other is None:
            left = {key: grammar for key, grammar in tool.values if key not in given}
            exits = {key.encode(): {end: self.value(tool, given, key, grammar)} for key, grammar in left.items()}
            return FixedText(self.vocabulary, exits)
        known, other = dict(tool.values), tool.other

        def ends(read: Callable[[], bytes]) -> Exits:
            key = read().decode(errors="replace")
            return {} if key in given else {end: self.value(tool, given, key, known.get(key, other))}

        return Text(self.vocabulary, self.grammars.matcher(ANY_KEY), ends)

    def value(self, tool: ToolForm, given: tuple[str, ...], key: str, grammar: str) -> Next:
        """After </arg_key>."""
        ends: Exits = {
            self.grammars.id(VALUE_END): lambda: self.fixed(
                self.with_newline(self.next(tool, (*given, key)), self.fixed)
            )
        }
        spelling = self.grammars.spelling(VALUE_END, CALL_END)
        begin: Exits = {
            self.grammars.id(VALUE): lambda: Text(
                self.vocabulary, self.grammars.matcher(grammar), lambda _: ends, spelling
            )
        }
        return lambda: self.fixed(self.with_newline(begin, self.fixed))

    def after_call(self) -> Phase:
        """After </tool_call>."""
        exits: dict[int, Next] = dict.fromkeys(self.vocabulary.eos_token_ids, self.end)
        if self.spec.parallel:
            exits[self.grammars.id(CALL)] = self.name
        return self.fixed(self.with_newline(exits, self.fixed))
