"""What a chat template may do: Jinja's sandbox, and bounds of time and memory.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files, modules and private
attributes of Python objects; here its time is bounded by a deadline that loops, calls and operators look at, and its
memory by what every text and container that it makes may hold, and by what all of them may hold together. Not here:
messages and what a template is given (chat.py).
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 24  # of a prompt or any text; the longest context, 202,752 tokens, holds far less
MAX_TOTAL = 1 << 28  # characters of all texts and containers that one rendering makes
MAX_SOURCE = 1 << 18  # characters of a template; GLM's have 5,000
MAX_SECONDS = 10.0  # for one rendering; GLM's take milliseconds
MAX_ARGUMENT = 100_000  # the largest whole number that a filter or a method of a text is given
ELEMENT = 8  # what an element of a container counts, in characters

# Filters for web pages and debugging, whose time or output nothing here bounds.
REMOVED_FILTERS = ("urlize", "pprint", "xmlattr", "wordwrap", "filesizeformat", "random")
_WIDTH = re.compile(r"%[-+ #0]*(\d{6}|\*|\d*\.(\d{6}|\*))")  # of "%...": too wide, or given as an argument
_FORMAT_WIDTH = re.compile(r":[^{}]*(\d{6}|\{)")  # of "{...}".format


class Refusal(jinja2.TemplateError):
    """The template called raise_exception()."""


@dataclass
class _Spending:
    """What one rendering has used so far."""

    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)
    characters: int = 0

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def take(self, characters: int) -> None:
        self.tick()
        if characters > MAX_CHARACTERS:
            raise SecurityError(f"a text or list of more than {MAX_CHARACTERS} characters would be too big")
        self.characters += characters
        if self.characters > MAX_TOTAL:
            raise SecurityError(f"its texts and lists together have more than {MAX_TOTAL} characters")


_SPENDING: ContextVar[_Spending] = ContextVar("spending")


@contextmanager
def bounded() -> Iterator[None]:
    """Within it one template may be rendered; what it uses is counted from zero."""
    token = _SPENDING.set(_Spending())
    try:
        yield
    finally:
        _SPENDING.reset(token)


def _size(value: Any) -> int:
    """Characters of a text; of a container with all that it holds, as often as it holds it; counted to the limit."""
    total, rest = 0, [value]
    while rest and total <= MAX_CHARACTERS:
        each = rest.pop()
        if isinstance(each, str | bytes):
            total += len(each)
        elif isinstance(each, dict):
            total += ELEMENT * len(each)
            rest += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            total += ELEMENT * len(each)
            rest += each
        else:
            total += 1
    return total


def _made(value: Any) -> Any:
    """A value that the template has made, counted."""
    _SPENDING.get().take(_size(value))
    return value


def _loop(values: Iterable[Any]) -> Iterator[Any]:
    """The values of a for loop; each looks at the deadline."""
    spending = _SPENDING.get()
    for value in values:
        spending.tick()
        yield value


def _join(parts: Iterable[Any]) -> str:
    texts = list(map(str, parts))
    _SPENDING.get().take(sum(map(len, texts)))
    return "".join(texts)


class _Bounds(NodeTransformer):
    """Rewrites a parsed template so that its loops, `~` and literals of containers go through the functions above."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _through("bounded_loop", cast(nodes.Expr, node.iter))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _through("bounded_join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _through("bounded", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _through("bounded", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx == "store" else _through("bounded", node)


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks what a model is trained on: here, what is inside."""

    tags = {"generation"}  # noqa: RUF012  # as Extension declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace; its representation does not show what it holds, which may be namespaces again."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds; filters, functions and settings are those that transformers gives to templates."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        for name in REMOVED_FILTERS:
            del self.filters[name]
        self.filters |= {name: _filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _filter("tojson", _to_json)
        self.filters |= {"bounded": _made, "bounded_loop": _loop, "bounded_join": _join}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    concat = staticmethod(_join)  # of macros and {% set %} blocks

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Bounds().visit(tree)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _SPENDING.get().tick()
        if operator in ("+", "%") and isinstance(left, str | bytes | list | tuple):
            if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
                raise SecurityError("a width of '%' would be too big")
            _SPENDING.get().take(_size(left) + _size(right) * (1 if operator == "+" else str(left).count("%")))
        elif isinstance(left, int) and isinstance(right, int):
            if max(abs(left), abs(right)) >= 1 << 63 or (operator == "**" and right > 64):
                raise SecurityError(f"the result of {operator!r} would be too big")
        elif operator in ("*", "**"):
            sizes = [max(x, 0) if isinstance(x, int) else _size(x) for x in (left, right) if not isinstance(x, float)]
            if len(sizes) == 2:
                if sizes[0] * sizes[1] > MAX_CHARACTERS:
                    raise SecurityError(f"the result of {operator!r} would be too big")
                _SPENDING.get().take(sizes[0] * sizes[1])
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """text.format and text.format_map, which Jinja replaces by functions of its own."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def call(*args: Any, **kwargs: Any) -> str:
            _check_method(value.__self__, value.__name__, args, kwargs)
            return wrapped(*args, **kwargs)

        return call

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _SPENDING.get().tick()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str | bytes):
            _check_method(owner, getattr(obj, "__name__", ""), args, kwargs)
        return _made(super().call(context, obj, *args, **kwargs))


def _check_method(text: str | bytes, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """SecurityError if a method of a text would make one that is far longer."""
    if name not in ("format", "format_map"):
        _check_arguments((*args, *kwargs.values()), MAX_CHARACTERS)
    size = _size((args, kwargs))
    match name:
        case "replace":
            size *= _count(text, args) + 1
        case "translate":
            size *= len(text)
        case "join":  # the texts, and this one between each two
            size = _size(args) + len(text) * (_size(args) // ELEMENT + 1)
        case "expandtabs":
            width = next((x for x in (*args, *kwargs.values()) if isinstance(x, int)), 8)
            size = len(text) * max(width, 0)
        case "format" | "format_map":
            shape = text if isinstance(text, str) else ""
            if _FORMAT_WIDTH.search(shape):
                raise SecurityError("a width of a format would be too big")
            size *= shape.count("{")
        case "split" | "rsplit" | "splitlines" | "partition" | "rpartition":
            size = ELEMENT * (_count(text, args) + 1)
    _SPENDING.get().take(len(text) + size)


def _count(text: str | bytes, args: tuple[Any, ...]) -> int:
    """How often the first argument, a text, is in `text`; without such an argument, how often anything can be."""
    if isinstance(text, str) and args and isinstance(args[0], str):
        return text.count(args[0])
    return len(text)


def _check_arguments(values: Iterable[Any], longest: int) -> None:
    if any(isinstance(value, int) and abs(value) > longest for value in values):
        raise SecurityError(f"an argument above {longest} would be too big")


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are bounded."""
    passed = int(hasattr(function, "jinja_pass_arg"))  # Jinja gives such a filter its context first

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        spending = _SPENDING.get()
        spending.tick()
        value, rest = args[passed] if len(args) > passed else None, (*args[passed + 1 :], *kwargs.values())
        if name not in ("default", "d"):
            _check_arguments(rest, MAX_ARGUMENT)
        if name in ("join", "sum"):
            value = list(value or ())
            args = (*args[:passed], value, *args[passed + 1 :])
            spending.take(_size(value) + len(value) * _size(rest))
        elif name == "replace" and len(rest) >= 2:
            spending.take(len(str(value)) + str(value).count(str(rest[0])) * len(str(rest[1])))
        elif name == "format":
            if _WIDTH.search(str(value)):
                raise SecurityError("a width of '%' would be too big")
            spending.take(len(str(value)) + str(value).count("%") * _size(rest))
        elif name == "indent":
            width = next((x if isinstance(x, int) else len(x) for x in rest if isinstance(x, int | str)), 4)
            spending.take(len(str(value)) + (str(value).count("\n") + 1) * width)
        return _made(function(*args, **kwargs))

    return call


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes for HTML; a prompt wants plain JSON."""
    if (indent if isinstance(indent, int) else len(indent or "")) > 16:
        raise SecurityError("an indent of more than 16 would be too big")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:1000])
