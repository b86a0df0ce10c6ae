"""ToolForm: the calls of one tool, as grammars of its name, its keys and the value of each key.

GLM writes a string as it is and every other value as JSON, and whoever reads a value goes by its schema (arguments.py):

    strings only     raw text, by enum, const, pattern, minLength and maxLength
    no strings       JSON by the schema
    strings or else  either; raw text that would be read as another type comes only where that type may be anything
    anything         raw text

Tools come from agents, with schemas that say more than can be enforced. A tool with `strict` is refused then, by the
keyword. For any other tool the value follows the rest of its schema; and only the types that it allows, where the
library refuses the schema as a whole. Keys may come in any order, once each; required ones must come.
Not here: tags, and the tokens of a model (grammar.py).
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from glimmer.errors import RequestError, shown
from glimmer.text.forms import (
    choice_expression,
    embedded_schema,
    escapes_nothing,
    expression_form,
    json_form,
    problem,
    read_schema,
    refused,
)

MAX_TOOLS = 1024
MAX_SIZE = 1 << 23  # characters of the grammars of all tools of a request
MAX_SECONDS = 10.0  # that they may take
MAX_NAME = 256  # characters of a tool's name or of a key
WHITE = " \t\r\n"
# Keywords without a meaning for the value.
NOTES = frozenset(("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"))
NOTES |= {"$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "nullable", "x-guidance"}
STRING = frozenset(("type", "enum", "const", "pattern", "minLength", "maxLength")) | NOTES
ANY_TEXT = "/(?s:.*)/"


@dataclass(frozen=True)
class ToolForm:
    """The calls of a tool. All grammars are the library's texts.

    values  the grammar of the value of each key; other: of keys that are not among them, None if there are none
    """

    name: str
    required: tuple[str, ...]
    values: tuple[tuple[str, str], ...]
    other: str | None = None

    @property
    def size(self) -> int:
        """Characters of all grammars."""
        return sum(len(grammar) for _, grammar in self.values) + len(self.other or "")


def tool_forms(tools: Any) -> tuple[ToolForm, ...]:
    """The forms of the tools of a request, in OpenAI's form. RequestError that names the tool and what is wrong."""
    if not isinstance(tools, (list, tuple)) or len(tools) > MAX_TOOLS:
        raise RequestError("tools", f"tools={shown(tools)}", f"a list of at most {MAX_TOOLS} tools", "change tools")
    forms: list[ToolForm] = []
    left = MAX_SIZE
    started = time.monotonic()
    for i, tool in enumerate(tools):
        forms.append(_tool(tool, f"tools[{i}]", left))
        left -= forms[-1].size
        if time.monotonic() - started > MAX_SECONDS:
            found = f"{len(tools)} tools that take more than {MAX_SECONDS:g} s to compile"
            raise RequestError("tools", found, "tools of simpler schemas", "pass fewer or simpler tools")
    names = [form.name for form in forms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError("tools", f"two tools named {shown(twice)}", "a name for each tool", "rename one of them")
    return tuple(forms)


def _tool(tool: Any, place: str, left: int) -> ToolForm:
    """The form of one tool. left: characters that its grammars may have."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(place, f"{place}={shown(tool)}", '{"type": "function", "function": {...}}', "change it")
    name, given = function.get("name"), function.get("parameters")
    _check_name(name, f"{place}.function.name")
    field = f"{place}.function.parameters"
    try:
        root = read_schema(json.dumps(given if given is not None else {}, ensure_ascii=False), field)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(field, f"{field} is no JSON: {error}"[:300], "a JSON schema", "correct it") from None
    return _Parameters(root, field, bool(function.get("strict")), left).form(str(name))


def _check_name(name: Any, field: str) -> None:
    """RequestError for a name that cannot be written between tags, and read back."""
    good = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name == name.strip(WHITE) and "<" not in name
    if not good or not name.isprintable():
        expected = f"a text of 1 to {MAX_NAME} printable characters, without < and without spaces around it"
        raise RequestError(field, f"{field}={shown(name)}", expected, "rename it")


class _Parameters:
    """The schema of a tool's arguments. strict: every keyword must be enforced."""

    def __init__(self, root: dict[str, Any], field: str, strict: bool, left: int):
        self.root, self.field, self.strict, self.left = root, field, strict, left

    def form(self, name: str) -> ToolForm:
        root = self._resolved(self.root)
        self._demand(root, {"type", "properties", "required", "additionalProperties", "$ref"} | NOTES)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for part in self._parts(root):
            own, needed = part.get("properties"), part.get("required")
            for key, schema in own.items() if isinstance(own, dict) else ():
                properties.setdefault(key, schema)
            required += needed if isinstance(needed, list) and part is root else []
        for key in properties:
            _check_name(key, f"{self.field}.properties")
        others = root.get("additionalProperties", bool(root) and "properties" not in root)
        if absent := [key for key in required if not isinstance(key, str) or key not in properties]:
            missing = absent[0]
            if not isinstance(missing, str) or others is False:
                found = f"{self.field}.required with {shown(missing)}"
                raise RequestError(self.field, found, "keys that properties has", "add it to properties")
            properties[missing] = others if isinstance(others, dict) else {}
            return _Parameters({**root, "properties": properties}, self.field, self.strict, self.left).form(name)
        return ToolForm(
            name,
            tuple(dict.fromkeys(required)),
            tuple((key, self._value(schema)) for key, schema in properties.items()),
            None if others is False else self._value(others if isinstance(others, dict) else {}),
        )

    def _parts(self, root: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """The schema of the arguments, and the alternatives and parts that may have properties."""
        yield root
        for combined in ("anyOf", "oneOf", "allOf"):
            parts = root.get(combined)
            yield from map(self._resolved, parts if isinstance(parts, list) else ())

    def _resolved(self, schema: Any) -> dict[str, Any]:
        """The schema that a chain of references leads to; {} if it leads nowhere, which `strict` does not accept."""
        for _ in range(16):
            if not isinstance(schema, dict):
                break
            if not isinstance(schema.get("$ref"), str):
                return schema
            target: Any = self.root
            path = schema["$ref"]
            for step in path[2:].split("/") if path.startswith("#/") else () if path == "#" else ("",):
                step = step.replace("~1", "/").replace("~0", "~")
                target = target.get(step) if isinstance(target, dict) else None
            schema = target
        if self.strict and not isinstance(schema, bool):
            raise refused(self.field, "$ref, where it leads to no schema of its own")
        return {}

    def _demand(self, schema: dict[str, Any], known: Iterable[str]) -> None:
        """RequestError if every keyword must be enforced, and one is not among these."""
        if self.strict and (beyond := [key for key in schema if key not in known]):
            raise refused(self.field, f"{beyond[0]}, which is not supported there")

    # ------------------------------------------------------------------ the value of a key

    def _value(self, schema: Any) -> str:
        """The grammar of a value."""
        raw: list[str] = []
        rest: list[Any] = []
        self._divide(schema if isinstance(schema, dict) else {}, raw, rest, 8)
        if not raw:
            whole = schema if isinstance(schema, dict) else {}
            return self._agreed(
                json_form(self._with_definitions(whole), self.strict), json_form(self._loose(rest), False)
            )
        if not rest:
            return self._agreed(_lark(raw), _lark([ANY_TEXT]))
        schemas = self._with_definitions({"anyOf": rest})
        either = _lark(_apart(raw, [self._resolved(one) for one in rest]), embedded_schema(schemas, self.strict))
        return self._agreed(either, _lark([ANY_TEXT]))

    def _agreed(self, form: str, instead: str) -> str:
        """The form, or what stands in for it where the library refuses it and the tool is not strict."""
        self.left -= len(form)
        if self.left < 0:
            found = f"tools whose grammars have more than {MAX_SIZE} characters"
            raise RequestError(self.field, found, "tools of simpler schemas", "pass fewer or simpler tools")
        said = problem(form)
        if said and self.strict:
            raise refused(self.field, said)
        return instead if said else form

    def _divide(self, schema: Any, raw: list[str], rest: list[Any], depth: int) -> None:
        """The expressions of the strings that a schema allows, and the schemas of everything else."""
        if not isinstance(schema, dict) or not depth:
            schema = {}
        parts, types = self._alternatives(schema), _types(self._resolved(schema))
        values = (
            schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
        )
        if types and "string" not in types:
            rest.append(schema)
        elif parts:
            for part in parts:
                self._divide(part, raw, rest, depth - 1)
        elif values:
            self._demand(schema, {"type", "enum", "const"} | NOTES)
            raw.append(f"/{choice_expression(_written(values, types))}/")
        elif others := types - {"string"}:
            raw.append(self._string(schema))
            rest.append({key: part for key, part in schema.items() if key not in STRING} | {"type": sorted(others)})
        else:
            self._demand(schema, STRING)
            raw.append(self._string(schema))

    def _alternatives(self, schema: dict[str, Any]) -> list[Any]:
        """The schemas of which a value may satisfy any, where a schema says nothing else."""
        words = set(schema) - NOTES
        if len(words) != 1:
            return []
        [word] = words
        if word == "$ref":
            return [self._resolved(schema)]
        parts = schema[word]
        combined = word in ("anyOf", "oneOf") or (word == "allOf" and isinstance(parts, list) and len(parts) == 1)
        return parts if combined and isinstance(parts, list) else []

    def _string(self, schema: dict[str, Any]) -> str:
        """The expression of the strings that a schema of strings allows."""
        parts = []
        low, high = (schema.get(key) for key in ("minLength", "maxLength"))
        if any(type(bound) is int for bound in (low, high)):
            least, most = low if type(low) is int else 0, high if type(high) is int else ""
            parts.append(f"/(?s:.{{{least},{most}}})/")
        if isinstance(schema.get("pattern"), str):
            pattern = _searched(schema["pattern"])
            if pattern is not None and not problem(_lark([pattern])):
                parts.append(pattern)
            elif self.strict:
                raise refused(self.field, f"pattern {shown(schema['pattern'])} of a string argument")
        return " & ".join(parts) or ANY_TEXT

    def _loose(self, schemas: list[Any]) -> dict[str, Any]:
        """A schema of nothing but the types that some schemas name."""
        types = {type for schema in schemas for type in _types(self._resolved(schema))}
        return {"type": sorted(types)} if types else {}

    def _with_definitions(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema with all that its references may lead to: they begin at the schema of the arguments."""
        if '"$ref"' not in json.dumps(schema):
            return schema
        return {"$defs": {"parameters": _moved(self.root)}, "allOf": [_moved(schema)]}


def _moved(schema: Any) -> Any:
    """A schema whose references lead to where _with_definitions puts the schema of the arguments."""
    if isinstance(schema, list):
        return [_moved(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part) for key, part in schema.items()}
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        moved["$ref"] = "#/$defs/parameters" + schema["$ref"][1:]
    return moved


def _types(schema: dict[str, Any]) -> set[str]:
    """The types that a schema names; none if it names none."""
    named = schema.get("type")
    names = named if isinstance(named, list) else [named]
    types = {name for name in names if isinstance(name, str)}
    if not types and ("properties" in schema or "items" in schema):
        types = {"object" if "properties" in schema else "array"}
    if types and schema.get("nullable") is True:
        types.add("null")
    return types


def _written(values: list[Any], types: set[str]) -> list[str]:
    """How GLM writes these values; without those that the types exclude, or that would be read as something else."""
    if types == {"string"}:
        return [value for value in values if isinstance(value, str)]
    only_strings = all(isinstance(value, str) for value in values)
    texts = [value for value in values if isinstance(value, str) and (only_strings or not _is_json(value))]
    return texts + [json.dumps(value, ensure_ascii=False) for value in values if not isinstance(value, str)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _apart(raw: list[str], rest: list[dict[str, Any]]) -> list[str]:
    """The expressions of strings that nobody takes for a value of the other schemas."""
    types = set().union(*map(_types, rest))
    opening = "".join(character for type, character in (("array", "\\["), ("object", "{")) if type in types)
    apart = f" & /[ \\t\\r\\n]*([^ \\t\\r\\n{opening}](?s:.*))?/" if opening else ""
    if any(_types(one) & {"integer", "number"} and set(one) - NOTES - {"type"} for one in rest):
        apart += " & ~/[ \\t\\r\\n]*[-+.0-9eE]+[ \\t\\r\\n]*/"
    return [one + apart for one in raw]


def _lark(raw: list[str], schema: str | None = None) -> str:
    """The grammar of texts that match one of these expressions, or of JSON by a schema."""
    names = [f"RAW_{i}" for i in range(len(raw))]
    lines = ["start: " + " | ".join([*names, *(["json"] if schema is not None else [])])]
    lines += [f"{name}: {one}" for name, one in zip(names, raw)]
    lines += [f"json: %json {schema}"] if schema is not None else []
    found: str = LLMatcher.grammar_from_lark("\n".join(lines))
    return found


def _searched(pattern: str) -> str | None:
    """A pattern of JSON Schema, which may be found anywhere in a text, as an expression of the whole text; None if it
    cannot be rewritten."""
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    if escapes_nothing(inner) or problem(expression_form(inner)) or ((begins or ends) and _has_alternatives(inner)):
        return None
    return f"/{'' if begins else '(?s:.*)'}({regex_to_lark(inner)}){'' if ends else '(?s:.*)'}/"


def _has_alternatives(pattern: str) -> bool:
    """Whether a pattern has alternatives outside of parentheses, to which ^ and $ do not belong alike."""
    without = re.sub(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", "", pattern, flags=re.DOTALL)
    depth = 0
    for character in without:
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            return True
    return False
