"""glimmer/_native.pyi says what the built extension has: `make stub` writes it anew."""

import ast
from pathlib import Path

import pytest

STUB = Path(__file__).resolve().parents[1] / "glimmer/_native.pyi"


def signatures(tree: ast.Module) -> dict[str, list[str]]:
    """Qualified name of each class and function -> names of its parameters."""
    found: dict[str, list[str]] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = []
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]

    walk(tree.body, "")
    return found


def test_the_stub_is_what_the_extension_has():
    """Names and parameters: how types and texts are laid out differs between versions of nanobind."""
    native = pytest.importorskip("glimmer._native")
    stubgen = pytest.importorskip("nanobind.stubgen")
    generator = stubgen.StubGen(native)
    generator.put(native)
    made, kept = signatures(ast.parse(generator.get())), signatures(ast.parse(STUB.read_text()))
    assert made == kept, "make stub"
    assert len(kept) > 20
