"""benchmarks/gate.py with figures made up: ratios, the verdict, the order of runs, and one build for each commit."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LINE = {
    "engine": "glimmer",
    "quantization": None,
    "load_s": 2.0,
    "load_peak_memory_gib": 1.0,
    "peak_memory_gib": 1.5,
    "prefill_512": 1000.0,
    "decode_b1": 100.0,
    "percent": {"decode_b1": {"bandwidth": 88.0}},
}


def module(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # gate.py imports peers.py, which lies beside it
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def gate(monkeypatch):
    return module("gate", monkeypatch)


@pytest.fixture
def judge(gate, monkeypatch, tmp_path, capsys):
    """judge(base, head, *options) -> (exit code, output, commands); base and head give each run's figures in turn."""

    def command(base, head, *options: str):
        commands = []
        figures = {"base": iter(base), "head": iter(head)}

        def run(words, timeout, env, cwd):
            which = Path(env["PYTHONPATH"].split(":")[0]).name
            commands.append((which, [str(word) for word in words]))
            return next(figures[which])

        monkeypatch.setattr(gate, "git", lambda *words: words[-1].removesuffix("^{commit}"))
        monkeypatch.setattr(gate, "build", lambda commit, cache: cache / commit)
        monkeypatch.setattr(gate, "check_builds", lambda packages, cache: None)
        monkeypatch.setattr(gate, "checkpoints", lambda cache, forms: {form: cache / form for form in forms})
        monkeypatch.setattr(gate, "run", run)
        monkeypatch.setattr(sys, "argv", ["gate.py", "base", "head", "--cache", str(tmp_path), *options])
        return gate.main(), capsys.readouterr().out, commands

    return command


def test_the_median_of_the_pairs_ratios_counts(judge):
    """Ratios of neighbours, not of medians: the machine was half as fast in the second pair."""
    base = [LINE | {"decode_b1": rate} for rate in (100.0, 50.0, 100.0)]
    head = [LINE | {"decode_b1": rate} for rate in (97.0, 49.5, 120.0)]
    code, out, commands = judge(base, head, "--rounds", "3", "--forms", "bfloat16")
    assert [which for which, _ in commands] == ["base", "head", "head", "base", "base", "head"]
    assert code == 0 and "nothing is below 0.98x" in out
    assert "| decode, batch 1, tokens/s | 100.00 | 97.00 | **0.990x** | 0.970x | 1.200x |  |" in out
    last = json.loads(out.splitlines()[-1])
    assert last["base"] == "base" and len(last["pairs"]["bfloat16"]) == 3


def test_what_is_slower_is_named_whichever_way_the_figure_counts(judge):
    """Of tokens per second more is better, of seconds and memory less."""
    worse = LINE | {"decode_b1": 97.9, "load_s": 2.1, "peak_memory_gib": 1.4}
    code, out, _ = judge([LINE] * 4, [worse, LINE] * 2, "--rounds", "2", "--forms", "int8,int4", "--threshold", "0.99")
    assert code == 1
    assert out.splitlines()[-2] == (
        "below 0.99x: load, s, int8; decode, batch 1, tokens/s, int8; load, s, int4; decode, batch 1, tokens/s, int4"
    )
    assert "| load, s | 2.00 | 2.05 | **0.976x** | 0.952x | 1.000x | slower |" in out
    code, out, _ = judge([LINE] * 2, [worse, LINE], "--rounds", "2", "--forms", "int8", "--threshold", "0.95")
    assert code == 0


def test_forms_choose_the_checkpoint_and_the_quantisation(judge, tmp_path):
    _, _, commands = judge([LINE] * 4, [LINE] * 4, "--rounds", "1")
    words = [words for which, words in commands if which == "head"]
    assert [w[w.index("bench") + 1] for w in words] == [str(tmp_path / f) for f in ("bfloat16", "int8", "int4", "fp8")]
    assert [w[w.index("--quantization") + 1] if "--quantization" in w else None for w in words] == [
        None,
        "int8",
        "int4",
        None,
    ]


def test_figures_that_only_one_commit_has_are_left_out(gate):
    """A figure that is new in one commit has nothing to be compared with."""
    ratios = gate.compare([(LINE, LINE | {"decode_b64": 1.0, "prefill_512": 2000.0})])
    assert ratios == {"load_s": [1.0], "peak_memory_gib": [1.0], "prefill_512": [2.0], "decode_b1": [1.0]}


def test_a_run_without_figures_ends_with_2(judge, gate, monkeypatch, capsys):
    def failing():
        raise gate.Failed("exit code 1: glimmer: no such thing")
        yield

    code, out, _ = judge(failing(), failing(), "--rounds", "1")
    assert code == 2 and out == ""


def test_an_unknown_commit_is_named(gate):
    with pytest.raises(gate.Failed, match="git rev-parse --verify no-such-commit"):
        gate.git("rev-parse", "--verify", "no-such-commit")


def test_builds_without_kernels_are_not_compared_with_builds_that_have_them(gate, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "glimmer").mkdir(parents=True)
        (tmp_path / name / "glimmer/__init__.py").touch()
    packages = [tmp_path / "a", tmp_path / "b"]
    gate.check_builds(packages, tmp_path)
    (tmp_path / "b/glimmer/_native.cpython-311-x86_64-linux-gnu.so").touch()
    with pytest.raises(gate.Failed, match="only b was built with kernels"):
        gate.check_builds(packages, tmp_path)
    with pytest.raises(gate.Failed, match="instead of"):
        gate.check_builds([tmp_path / "c"], tmp_path)


def test_the_checkpoint_of_the_benchmarks(monkeypatch, tmp_path):
    """The names and shapes of the family, in small."""
    maker = module("make_checkpoint", monkeypatch)
    small = {"hidden_size": 8, "num_hidden_layers": 2, "n_routed_experts": 3, "vocab_size": 16, "intermediate_size": 6}
    maker.main(tmp_path / "out", maker.CONFIG | small)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == 2 * (2 + 6 + 1) + 3 + 2 + 3 * 3 + 3 + 3
    with safe_open(tmp_path / "out" / index["model.layers.1.mlp.experts.2.down_proj.weight"], "pt") as file:
        assert list(file.get_slice("model.layers.1.mlp.experts.2.down_proj.weight").get_shape()) == [8, 352]
