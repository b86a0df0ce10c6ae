"""JsonArguments: the arguments of one tool call, which GLM writes as bare texts, as JSON typed by the tool's schema.

The model writes a string as it is and every other value as JSON, with nothing that tells one from the other: "123" is a
number or a text. The schema decides. Where it allows a string only, the value is a string, whatever it looks like, and
goes out while it comes. Where it allows no string, the value is JSON if it can be read as such, even of another type
than the schema wants: judging that is the tool's part. Where it allows both, the value is JSON if it can be read as one
of the other types; where it says nothing, if it can be read as JSON at all. Whatever cannot be read is a string, so no
value is lost. Not here: the tags of a call (parse.py), and whether arguments satisfy the schema.
"""

import json
from functools import reduce
from typing import Any
from urllib.parse import unquote

WHITE = " \t\r\n"
MAX_DEPTH = 64  # of a schema; what is deeper allows everything

ALL = frozenset(("string", "integer", "number", "boolean", "null", "array", "object"))
# Names that are not JSON Schema's, and that tools use nevertheless.
ALIASES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}
# The characters with which a value of each type begins; Python's True, False and None among them.
FIRST = {
    "string": '"',
    "integer": "-0123456789",
    "number": "-0123456789",
    "boolean": "tfTF",
    "null": "nN",
    "array": "[",
    "object": "{",
}
PYTHON = {"True": "true", "False": "false", "None": "null"}

Types = frozenset[str] | None  # which a value may have; None: any


class JsonArguments:
    """What the methods return, joined, is one JSON object, once close() has been called."""

    def __init__(self, parameters: Any):
        """`parameters`: the JSON schema of the arguments. None, or what is no schema, allows everything."""
        self._parameters = parameters
        self._keys: set[str] = set()
        self._types: Types = None
        self._readable = ALL  # the types that the value may be read as, in place of a string
        self._first = ""  # the characters with which such a value may begin
        self._is_string = False
        self._held: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def open(self) -> str:
        """Before the first key."""
        return "{"

    def close(self) -> str:
        """After the last value."""
        return "}"

    def key(self, key: str) -> str:
        """A key that has not been there."""
        separator = ", " if self._keys else ""
        self._keys.add(key)
        return f"{separator}{_string(key)}: "

    def begin(self, key: str) -> str:
        """A key that has not been there, and the beginning of its value, which follows as text."""
        self._types = _types(_property(self._parameters, key), self._parameters)
        if self._types is None or "string" not in self._types:
            self._readable = ALL
        else:
            self._readable = _wide(self._types) - {"string"}
        self._first = "".join(FIRST[type] for type in self._readable)
        self._is_string = not self._readable
        self._held = []
        return self.key(key) + ('"' if self._is_string else "")

    def text(self, piece: str) -> str:
        """More of the value."""
        if self._is_string:
            return _escaped(piece)
        self._held.append(piece)
        begun = piece.lstrip(WHITE) if self._first else ""
        if begun and begun[0] not in self._first:  # so it can only be a string
            self._is_string = True
            return '"' + _escaped("".join(self._held))
        if begun:
            self._first = ""
        return ""

    def end(self) -> str:
        """The value is complete."""
        if self._is_string:
            return '"'
        text = "".join(self._held)
        type, written = _read(text)
        if type in self._readable:
            return written
        if self._types is not None and "string" not in self._types:
            return PYTHON.get(text.strip(WHITE)) or _string(text)
        return _string(text)

    def unfinished_key(self, key: str) -> str:
        """The beginning of a key, of which the rest will not come."""
        separator = ", " if self._keys else ""
        return f'{separator}"{_escaped(key)}'

    def unfinished(self) -> str:
        """What has been held back of a value that will not be completed, as the model wrote it."""
        return "" if self._is_string else "".join(self._held)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """The inside of a JSON string. Each character is escaped by itself, so that pieces can be joined."""
    return _string(text)[1:-1]


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(text: str) -> tuple[str | None, str]:
    """(type, JSON text) of a value that is JSON, else (None, ""). Numbers keep their digits."""
    try:
        value = json.loads(text, parse_int=lambda _: 0, parse_float=lambda _: 0.5, parse_constant=_refuse)
        return _type(value), text.strip(WHITE)
    except (ValueError, RecursionError):
        pass  # perhaps only for line breaks within strings, which models write as they are
    try:
        value = json.loads(text, strict=False)
        return _type(value), json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None, ""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON's")


def _type(value: Any) -> str:
    """JSON Schema's name for the type of a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names[type(value)]


# ── schemas ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _types(schema: Any, root: Any) -> Types:
    """The types that a schema allows a value to have. It is a client's: whatever is no schema allows all of them."""
    return _Reader(root).types(schema, MAX_DEPTH)


def _property(parameters: Any, key: str) -> Any:
    """The schema of one argument, wherever the schema of the arguments has it; None if it has none."""
    found = _Reader(parameters).properties(parameters, key, MAX_DEPTH)
    return {"anyOf": found} if found else None


class _Reader:
    """Walks a schema, each part of it once."""

    def __init__(self, root: Any):
        self._root = root
        self._known: dict[int, Types] = {}
        self._visited: set[int] = set()

    def types(self, schema: Any, depth: int) -> Types:
        if not isinstance(schema, dict) or not depth:
            return None
        if id(schema) not in self._known:
            self._known[id(schema)] = frozenset()  # to a reference back to here
            self._known[id(schema)] = self._own_types(schema, depth - 1)
        return self._known[id(schema)]

    def _own_types(self, schema: dict[str, Any], depth: int) -> Types:
        """What all of its keywords together allow."""
        allowed = [_named(schema["type"])] if "type" in schema else []
        if isinstance(schema.get("enum"), list):
            allowed.append(_of_values(schema["enum"]))
        if "const" in schema:
            allowed.append(_of_values([schema["const"]]))
        if "$ref" in schema:
            allowed.append(self.types(self._target(schema["$ref"]), depth))
        for keyword in ("anyOf", "oneOf"):
            if isinstance(schema.get(keyword), list) and schema[keyword]:
                allowed.append(reduce(_either, [self.types(part, depth) for part in schema[keyword]]))
        if isinstance(schema.get("allOf"), list):
            allowed += [self.types(part, depth) for part in schema["allOf"]]
        if not allowed and ("properties" in schema or "items" in schema):
            allowed.append(frozenset({"object" if "properties" in schema else "array"}))
        both = reduce(_both, allowed, None)
        return both | {"null"} if both and schema.get("nullable") is True else both

    def properties(self, schema: Any, key: str, depth: int) -> list[Any]:
        if not isinstance(schema, dict) or not depth or id(schema) in self._visited:
            return []
        self._visited.add(id(schema))
        own = schema.get("properties")
        found = [own[key]] if isinstance(own, dict) and key in own else []
        parts = [self._target(schema["$ref"])] if "$ref" in schema else []
        for keyword in ("anyOf", "oneOf", "allOf"):
            parts += schema[keyword] if isinstance(schema.get(keyword), list) else []
        for part in parts:
            found += self.properties(part, key, depth - 1)
        return found or ([schema["additionalProperties"]] if "additionalProperties" in schema else [])

    def _target(self, reference: Any) -> Any:
        """What a reference within the schema leads to, such as #/$defs/City; None if nothing is there."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found = self._root
        for step in reference[1:].split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and len(name) < 10 and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict):
                found = found.get(name)
            else:
                return None
        return found


def _named(type: Any) -> Types:
    """The types that "type" lists; None if one of them is none of JSON Schema's."""
    names = type if isinstance(type, list) else [type]
    found = frozenset(ALIASES.get(name, name) for name in names if isinstance(name, str))
    return found if found and found <= ALL and len(names) == len(found) else None


def _of_values(values: list[Any]) -> Types:
    try:
        return frozenset(map(_type, values)) or None
    except KeyError:  # values that are not of JSON
        return None


def _either(a: Types, b: Types) -> Types:
    return None if a is None or b is None else a | b


def _both(a: Types, b: Types) -> Types:
    """The types in both, where an integer is a number; any if the two exclude each other."""
    if a is None or b is None:
        return a if b is None else b
    return (_wide(a) & _wide(b)) or None


def _wide(types: frozenset[str]) -> frozenset[str]:
    """An integer is a number."""
    return types | {"integer"} if "number" in types else types
