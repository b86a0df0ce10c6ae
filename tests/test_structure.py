"""The rules of the package: which file may import and name what. Reads the source and runs none of it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "glimmer"
FILES = sorted(p.relative_to(ROOT) for p in PACKAGE.rglob("*.py"))

LEVELS = (
    ("errors",),
    ("foreign", "vllm_names"),
    ("model_config",),
    ("config", "weight", "batch", "group", "hub", "engine_load"),
    ("checkpoint", "backends", "parallel", "device", "text"),
    ("model",),
    ("engine",),
    ("outputs",),
    ("llm",),
    ("server",),
    ("cli", "mindformers", "__main__", "__init__"),
)
LEVEL = {package: number for number, level in enumerate(LEVELS) for package in level}

# Beyond the order of levels: what a package must not import even from below.
FORBIDDEN = {
    "errors": ("torch",),
    **dict.fromkeys(("foreign", "hub"), ("torch", "numpy", "tokenizers")),
    **dict.fromkeys(("config", "model_config"), ("torch", "transformers")),
    "checkpoint": ("glimmer.backends", "glimmer.parallel", "glimmer.group", "glimmer.device", "glimmer.text"),
    "backends": (
        "glimmer.config",
        "glimmer.checkpoint",
        "glimmer.parallel",
        "glimmer.group",
        "torch.distributed",
        "glimmer.text",
    ),
    "parallel": ("glimmer.config", "glimmer.backends", "glimmer.device", "glimmer.checkpoint", "glimmer.text"),
    "device": ("glimmer.backends", "glimmer.parallel", "glimmer.group", "glimmer.checkpoint", "glimmer.text"),
    "text": (
        "torch",
        "glimmer.backends",
        "glimmer.checkpoint",
        "glimmer.parallel",
        "glimmer.group",
        "glimmer.device",
        "numpy",
    ),
    "model": ("glimmer.text", "triton"),
    "engine": ("glimmer.text", "tokenizers", "omegaconf"),
    "llm": ("argparse", "http"),
    "cli": ("transformers",),
    "cli/options": ("torch", "argparse", "glimmer.llm"),
    **dict.fromkeys(
        ("cli/predict", "cli/results", "cli/bench", "cli/demo"),
        ("glimmer.model", "glimmer.backends", "glimmer.checkpoint", "glimmer.engine", "torch"),
    ),
    "mindformers/options": ("torch", "glimmer.llm"),
    **{
        f"server/{path.stem}": ("torch", "glimmer.llm", "glimmer.outputs", "glimmer.engine", "glimmer.parallel")
        for path in (PACKAGE / "server").glob("*.py")
        if path.stem != "engine_process"
    },
}


# What is the command line's to read: settings and ranks in the environment.
COMMAND_LINE = tuple(f"glimmer/{name}.py" for name in ("cli/options", "cli/exits", "cli/main", "mindformers/launch"))


def package(path: Path) -> str:
    return path.parts[1] if len(path.parts) > 2 else path.stem


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy":  # cli/lazy.py
            found += [(ast.literal_eval(node.args[0]), node.lineno)]
    return found


def begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    tree = ast.parse((ROOT / path).read_text())
    own = package(path)
    assert own in LEVEL, f"{path}: give {own!r} a level in this test"
    for name, line in imports(tree):
        for forbidden in (*FORBIDDEN.get(own, ()), *FORBIDDEN.get(f"{own}/{path.stem}", ())):
            allowed = name == "glimmer.engine.profile.Profile"  # the type of what LLM.profile returns
            assert allowed or not begins(name, forbidden), f"{path}:{line} imports {name}"
        if begins(name, "glimmer") and name.count(".") >= 1:
            other = name.split(".")[1]
            if other in LEVEL and other != own:
                assert LEVEL[other] < LEVEL[own] or LEVEL[own] == len(LEVELS) - 1, f"{path}:{line} imports up: {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_project_import_hides_in_a_function(path):
    tree = ast.parse((ROOT / path).read_text())
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hidden = [(n, line) for n, line in imports(function) if begins(n, "glimmer")]
            assert not hidden, f"{path}: {function.name} hides imports {hidden}"


def attributes(tree: ast.AST) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_words_that_belong_to_one_file(path):
    tree = ast.parse((ROOT / path).read_text())
    said = attributes(tree)
    if package(path) not in ("device", "backends"):
        assert not {a for a in said if a.startswith(("torch.cuda", "torch.npu"))}, f"{path} names a device"
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        kinds = {"cpu", "cuda", "npu", "gloo", "nccl", "hccl"} if path.stem != "options" else {"gloo", "nccl", "hccl"}
        assert not strings & kinds, f"{path} names a device"  # options.py lists what --device may be
    if str(path) not in ("glimmer/parallel.py", "glimmer/mindformers/launch.py"):
        assert not [n for n, _ in imports(tree) if begins(n, "torch.distributed")], f"{path} talks to other ranks"
    if str(path) not in ("glimmer/parallel.py", "glimmer/backends/selection.py", "glimmer/hub.py", *COMMAND_LINE):
        assert not {a for a in said if a.startswith(("os.environ", "os.getenv"))}, f"{path} reads the environment"
    assert not [n for n, _ in imports(tree) if begins(n, "transformers") or begins(n, "pickle")], f"{path}"
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & {"eval", "exec", "torch.load", "pickle.loads"}, f"{path} runs what it reads"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_open_with_what_they_do(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text())), f"{path} has no docstring"


# Names that the field has another word for (docs/glossary.md has most of those words), and so must not come back.
UNUSUAL = {
    *("Choice", "Entry", "FINE", "Lent", "MIDDLE", "MOST", "Meeting", "Part", "Piece", "Plan", "Recording", "Reply"),
    *("Room", "Shelf", "Turn", "_wait_again", "adopt", "burn_bf16", "centers", "choosable", "door", "enter", "grain"),
    *("grow", "house", "leaf", "leaves", "lend", "narrow", "play", "publish", "scribe", "settle", "shelf", "showcase"),
}
# Names that are usual elsewhere, and have a more telling one in these classes.
UNUSUAL_MEMBERS = {
    "Batch": {"blocks", "lengths", "rows", "slots", "starts"},
    "Blocks": {"shared"},
    "Glm4Moe": {"through"},
    "Group": {"finish", "least"},
    "Scheduler": {"commit", "plan"},
    "Sequence": {"answered", "computed", "limit", "reported"},
}


def defined(tree: ast.AST) -> set[str]:
    """The names of classes, functions, parameters, variables and attributes that this code defines."""
    found = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    found |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    return found | {
        n.id if isinstance(n, ast.Name) else n.attr for n in stored if isinstance(n, ast.Name | ast.Attribute)
    }


@pytest.mark.parametrize("directory", ["glimmer", "benchmarks", "tests", "tools"])
def test_things_have_their_usual_names(directory):
    for path in sorted((ROOT / directory).rglob("*.py")):
        tree = ast.parse(path.read_text())
        unusual = (defined(tree) | {path.stem}) & UNUSUAL
        assert not unusual, f"{path} defines {unusual}"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                unusual = defined(node) & UNUSUAL_MEMBERS.get(node.name, set())
                assert not unusual, f"{path}: {node.name} has {unusual}"


def test_kernels_have_their_usual_names():
    for path in sorted((ROOT / "csrc").iterdir()):
        code = re.sub(r"//.*|\"(\\\\.|[^\"])*\"", "", path.read_text())
        assert not set(re.findall(r"\w+", code)) & UNUSUAL, path


def test_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    public = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert ast.literal_eval(public) == ["LLM", "SamplingParams", "__version__"]


def test_the_model_can_be_read():
    """The import closure of the model file: what one must open to understand it. A sense of proportion, with slack."""
    todo, seen = [Path("glimmer/model/glm4_moe.py")], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name, _ in imports(ast.parse((ROOT / path).read_text())):
            parts = name.split(".")
            stems = [Path(*parts[:n]) for n in range(2, len(parts) + 1)] if parts[0] == "glimmer" else []
            files = [file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")]
            todo += [file for file in files if (ROOT / file).is_file()]
    lines = sum(len((ROOT / p).read_text().splitlines()) for p in seen)
    assert len(seen) <= 12 and lines <= 2000, f"{len(seen)} files, {lines} lines: {sorted(map(str, seen))}"


@pytest.mark.parametrize("document", ["README.md", "README.zh.md", "docs/reading.md"])
def test_documents_name_every_file_and_package(document):
    """The trees of the READMEs, and the levels of docs/reading.md, have each of them."""
    words = set(re.findall(r"\w+", (ROOT / document).read_text()))
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__", "__main__"} <= words
