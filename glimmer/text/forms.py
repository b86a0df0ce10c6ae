"""Forms of answers as grammars of the library (llguidance): schemas, expressions, choices and grammars.

What comes from a request is data here: texts become expressions in which every character but letters and digits is
escaped, so nothing in them is syntax. A form that the library cannot enforce is refused, by the keyword at fault.
Sizes, depths and the library's own work are limited. Not here: tools (tools.py), and a model's tokens (grammar.py).
"""

import json
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from glimmer.config import MAX_FORM, StructuredOutputs
from glimmer.errors import EngineError, RequestError
from glimmer.foreign import parse_json
from glimmer.text.constraint import contained

# Without a bound a model may write white space for ever. Indented JSON of sixteen levels fits.
WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,64}"
LIMITS = LLParserLimits(initial_lexer_fuel=400_000, max_items_in_row=4000, verbose_errors=False)
MAX_GRAMMAR = 1 << 16  # characters of a grammar in Lark or EBNF
MAX_PROPERTIES = 500  # of one object; the library follows some more
MAX_CACHE = 1 << 24  # characters of the grammars whose results are kept

if TYPE_CHECKING:  # it exists in the library's stub only
    from llguidance._lib import JsonCompileOptions

T = TypeVar("T")


class Cache(Generic[T]):
    """What has been made of grammars, as long as they have no more than MAX_CACHE characters together."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, T] = OrderedDict()
        self._size, self._guard = 0, Lock()

    def get(self, grammar: str) -> T | None:
        """What was kept for this grammar."""
        with self._guard:
            if grammar in self._known:
                self._known.move_to_end(grammar)
            return self._known.get(grammar)

    def keep(self, grammar: str, made: T) -> None:
        """Keep it, and forget what has not been asked for the longest."""
        with self._guard:
            if grammar not in self._known:
                self._size += len(grammar)
            self._known[grammar] = made
            while self._size > MAX_CACHE and len(self._known) > 1:
                self._size -= len(self._known.popitem(last=False)[0])


_problems: Cache[str] = Cache()


def problem(grammar: str) -> str:
    """What the library says against a grammar without special tokens, on a line; nothing if it can enforce it."""
    known = _problems.get(grammar)
    if known is None:
        try:
            with contained():
                said = LLMatcher.validate_grammar(grammar, limits=LIMITS)
        except EngineError as error:
            said = error.found
        known = " ".join(said.split())[:400]
        _problems.keep(grammar, known)
    return known


def structured_form(asked: StructuredOutputs) -> str:
    """The grammar of an answer. RequestError that names the field, and the keyword, that cannot be enforced.

    A grammar is not looked at before the tokens are known, which it may name.
    """
    if asked.grammar is not None:
        return grammar_form(asked.grammar)
    if asked.regex is not None:
        found, field = expression_form(asked.regex), "structured_outputs.regex"
    elif asked.choice is not None:
        found, field = choice_form(asked.choice), "structured_outputs.choice"
    else:
        field = "structured_outputs.json" if asked.json is not None else "structured_outputs.json_object"
        schema = {"type": "object"} if asked.json is None else read_schema(str(asked.json), field)
        if asked.disable_additional_properties:
            schema = _closed(schema)
        whitespace = asked.whitespace_pattern or WHITESPACE
        found = json_form(schema, strict=True, whitespace=None if asked.disable_any_whitespace else whitespace)
    said = problem(found)
    if asked.regex is not None and escapes_nothing(asked.regex):
        said = r"it ends with a \ that escapes nothing"
    if said:
        raise refused(field, said)
    return found


def escapes_nothing(expression: str) -> bool:
    """Whether an expression ends with a backslash of its own, which the library would pass over."""
    return (len(expression) - len(expression.rstrip("\\"))) % 2 == 1


# What the library calls the parts of a schema, where it does not say the keyword.
KEYWORDS = (
    (("integer range", "float range"), "minimum or maximum"),
    (("regex",), "pattern"),
    (("Pointer", "Resource", "circular"), "$ref"),
    (("schema is false",), "false"),
)


def refused(field: str, said: str) -> RequestError:
    """The error for a form about which the library says this."""
    if "json" in field or "tools" in field:
        said = next((f"{name}: {said}" for words, name in KEYWORDS if any(word in said for word in words)), said)
    return RequestError(
        field,
        f"{field} cannot be enforced: {said}",
        "a form whose every keyword can be enforced while the answer is written",
        "leave that keyword out, or describe it in the prompt",
    )


def read_schema(text: str, field: str) -> Any:
    """A JSON schema from its text. RequestError if it is none, or too large."""
    try:
        if len(text) > MAX_FORM:
            raise ValueError(f"it has {len(text)} characters, where {MAX_FORM} are read")
        schema = parse_json(text)
        if not isinstance(schema, (dict, bool)):
            raise ValueError(f"it is a JSON {type(schema).__name__}")
        _check_width(schema)
        return schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    except ValueError as error:
        raise RequestError(
            field, f"{field} cannot be read: {error}"[:400], "a JSON schema: an object", f"correct {field}"
        ) from None


def _check_width(schema: Any) -> None:
    """ValueError for an object with too many properties: the library's work grows with their square."""
    if isinstance(schema, dict):
        for key, part in schema.items():
            if key == "properties" and isinstance(part, dict) and len(part) > MAX_PROPERTIES:
                raise ValueError(f"properties of {len(part)} keys, where {MAX_PROPERTIES} are read")
            _check_width(part)
    elif isinstance(schema, list):
        for part in schema:
            _check_width(part)


def json_form(schema: Any, strict: bool, whitespace: str | None = WHITESPACE) -> str:
    """The grammar of JSON by a schema. strict: what the library does not know is an error, not ignored."""
    found: str = LLMatcher.grammar_from_json_schema(
        json.dumps(schema, ensure_ascii=False), overrides=_options(strict, whitespace)
    )
    return found


def _options(strict: bool, whitespace: str | None) -> "JsonCompileOptions":
    """The library's options. They outrank those that a schema brings under "x-guidance"."""
    return {
        "lenient": not strict,
        "coerce_one_of": not strict,
        "whitespace_flexible": whitespace is not None,
        "whitespace_pattern": whitespace,
        "item_separator": ",",
        "key_separator": ":",
    }


def embedded_schema(schema: Mapping[str, Any], strict: bool) -> str:
    """A schema as it stands in a Lark grammar after %json."""
    return json.dumps({**schema, "x-guidance": _options(strict, WHITESPACE)}, ensure_ascii=False)


def expression_form(expression: str) -> str:
    """The grammar of an answer that matches a regular expression."""
    found: str = LLMatcher.grammar_from_regex(expression)
    return found


def choice_form(texts: Iterable[str]) -> str:
    """The grammar of an answer that is one of these texts."""
    return expression_form(choice_expression(texts))


def choice_expression(texts: Iterable[str]) -> str:
    """The regular expression of some texts, in which nothing is syntax."""
    return f"({'|'.join(map(literal, texts))})"


def literal(text: str) -> str:
    """The regular expression of a text."""
    return re.sub(r"[^A-Za-z0-9_]", lambda match: f"\\x{{{ord(match[0]):X}}}", text)


def grammar_form(text: str) -> str:
    """The grammar that a text describes in Lark or EBNF."""
    try:
        if len(text) > MAX_GRAMMAR:
            raise ValueError(f"it has {len(text)} characters, where {MAX_GRAMMAR} are read")
        with contained():
            found: str = LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # of the translation from EBNF, in many ways
        raise refused("structured_outputs.grammar", f"{type(error).__name__}: {error}"[:300]) from None
    if not _bearable(found):
        said = f"it takes more than {TRIAL_SECONDS} s, or {TRIAL_BYTES >> 20} MB, to compile"
        raise refused("structured_outputs.grammar", said)
    return found


TRIAL_SECONDS = 2  # of computing, and bytes of address space, that a grammar may take
TRIAL_BYTES = 2 << 30
_TRIAL = f"""
import resource, sys
from llguidance import LLMatcher
resource.setrlimit(resource.RLIMIT_CPU, ({TRIAL_SECONDS}, {TRIAL_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({TRIAL_BYTES}, {TRIAL_BYTES}))
LLMatcher.validate_grammar(sys.stdin.read())
"""
_trials: Cache[bool] = Cache()


def _bearable(grammar: str) -> bool:
    """Whether the library can compile a grammar, or refuse it, with little time and memory: a process of its own tries.

    Terminals that name others are expanded before any limit of the library counts: forty short lines may stand for more
    than a machine holds. Schemas and expressions have nothing of this kind.
    """
    known = _trials.get(grammar)
    if known is None:
        try:
            command = [sys.executable, "-I", "-c", _TRIAL]
            known = not subprocess.run(
                command, input=grammar.encode(), capture_output=True, timeout=5 * TRIAL_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            known = False
        _trials.keep(grammar, known)
    return known


def _closed(schema: Any) -> Any:
    """A schema whose objects with `properties` have no others, unless it says so."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    data = ("enum", "const", "default", "examples")
    closed = {key: part if key in data else _closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed
