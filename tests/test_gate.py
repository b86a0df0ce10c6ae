"""benchmarks/gate.py with figures made up: ratios, the verdict, the order of bursts, and one build for each commit; its
resident process with a small model."""

import argparse
import importlib.util
import json
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import glimmer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FIGURES = {"load_s": 2.0, "peak": 1.5, "prefill 512": 1000.0, "decode 1": 100.0}


def module(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # gate.py imports peers.py, which lies beside it
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def gate(monkeypatch):
    return module("gate", monkeypatch)


class Scripted:
    """A resident process whose figures are made up: each a number, or one number after the other."""

    def __init__(self, figures: dict, heard: list, name: str):
        self.figures, self.heard, self.name = figures, heard, name
        self.load_s = self.figure("load_s")

    def figure(self, key: str) -> float:
        value = self.figures[key]
        return value if isinstance(value, float) else next(value)

    def ask(self, *words) -> float:
        self.heard.append((self.name, *words))
        return self.figure(" ".join(map(str, words[:2])))

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.heard.append((self.name, "close"))


@pytest.fixture
def judge(gate, monkeypatch, tmp_path, capsys):
    """judge(base, head, *options) -> (exit code, output, what the processes were asked, their models and forms)."""

    def command(base, head, *options: str):
        heard, started = [], []
        figures = {"base": base, "head": head}

        def child(package, model, form, args):
            started.append((package.name, model.name, form))
            return Scripted(figures[package.name], heard, package.name)

        monkeypatch.setattr(gate, "git", lambda *words: words[-1].removesuffix("^{commit}"))
        monkeypatch.setattr(gate, "build", lambda commit, cache: cache / commit)
        monkeypatch.setattr(gate, "check_builds", lambda packages, cache: None)
        monkeypatch.setattr(gate, "checkpoints", lambda cache, forms: {form: cache / form for form in forms})
        monkeypatch.setattr(gate, "Child", child)
        monkeypatch.setattr(gate, "PAUSE", 0)
        words = ["gate.py", "base", "head", "--cache", str(tmp_path), "--starts", "1", "--processes", "1"]
        monkeypatch.setattr(sys, "argv", [*words, "--decode", "1", *options])
        return gate.main(), capsys.readouterr().out, heard, started

    return command


def test_the_median_of_the_pairs_ratios_counts(judge):
    """Ratios of neighbours, not of medians: the machine was half as fast in the second pair."""
    base = FIGURES | {"decode 1": iter([1.0, 100.0, 100.0, 50.0, 100.0])}  # of the start, to warm up, three pairs
    head = FIGURES | {"decode 1": iter([1.0, 100.0, 97.0, 49.5, 120.0])}
    code, out, heard, _ = judge(base, head, "--pairs", "3", "--forms", "bfloat16")
    bursts = [which for which, *words in heard if words[0] == "decode"][4:]
    assert bursts == ["base", "head", "head", "base", "base", "head"]
    assert code == 0 and "nothing is below 0.98x" in out
    assert "| decode, batch 1, tokens/s | 100.00 | 97.00 | **0.990x** | 0.980x | 1.095x | 3 |  |" in out
    last = json.loads(out.splitlines()[-1])
    assert last["base"] == "base"
    assert last["pairs"]["bfloat16"]["decode_b1"] == [[100.0, 97.0], [50.0, 49.5], [100.0, 120.0]]


def test_what_is_slower_is_named_whichever_way_the_figure_counts(judge):
    """Of tokens per second more is better, of seconds and memory less."""
    worse = FIGURES | {"decode 1": 98.9, "load_s": 2.1, "peak": 1.4}
    code, out, *_ = judge(FIGURES, worse, "--pairs", "2", "--forms", "int8,int4", "--threshold", "0.99")
    assert code == 1
    assert out.splitlines()[-2] == (
        "below 0.99x: load, s, int8; decode, batch 1, tokens/s, int8; load, s, int4; decode, batch 1, tokens/s, int4"
    )
    assert "| load, s | 2.00 | 2.10 | **0.952x** | 0.952x | 0.952x | 1 | worse |" in out
    code, out, *_ = judge(FIGURES, worse, "--pairs", "2", "--forms", "int8", "--threshold", "0.95")
    assert code == 0


@pytest.mark.parametrize("peak, code", [(1.529, 0), (1.531, 1)])
def test_peak_memory_may_grow_by_2_percent_whatever_the_threshold(judge, peak, code):
    found, out, *_ = judge(FIGURES, FIGURES | {"peak": peak}, "--pairs", "1", "--forms", "fp8", "--threshold", "0.5")
    assert found == code
    assert ("below 0.5x: peak memory, GiB, fp8" in out) == bool(code)


def test_bursts_last_as_long_as_the_slower_build_needs(judge):
    base, head = FIGURES | {"decode 1": 500.0}, FIGURES | {"decode 1": 100.0, "prefill 512": 5.0}
    _, _, heard, _ = judge(base, head, "--pairs", "1", "--forms", "bfloat16", "--threshold", "0.1", "--seconds", "0.4")
    assert heard == [
        *(("base", "prefill", 512, 1), ("base", "decode", 1, 8), ("base", "peak"), ("base", "close")),
        *(("head", "prefill", 512, 1), ("head", "decode", 1, 8), ("head", "peak"), ("head", "close")),
        *(("base", "prefill", 512, 1), ("head", "prefill", 512, 1)),  # to warm up
        *(("base", "prefill", 512, 1), ("head", "prefill", 512, 1)),
        *(("base", "decode", 1, 8), ("head", "decode", 1, 8)),
        *(("base", "decode", 1, 40), ("head", "decode", 1, 40)),
        *(("head", "close"), ("base", "close")),
    ]


def test_starts_alternate(judge):
    _, _, _, started = judge(FIGURES, FIGURES, "--starts", "3", "--pairs", "1", "--forms", "int8")
    assert [name for name, *_ in started] == ["base", "head", "head", "base", "base", "head", "base", "head"]


def test_the_pairs_of_several_processes_count_together(judge):
    """The second pair of processes begins in reverse order, and its figures are not taken for each other's."""
    head = FIGURES | {"decode 1": 125.0}
    options = ("--processes", "3", "--pairs", "2", "--forms", "int8")
    _, out, _, started = judge(FIGURES | {"decode 1": 100.0}, head, *options)
    assert [name for name, *_ in started[2:]] == ["base", "head", "head", "base", "base", "head"]
    assert json.loads(out.splitlines()[-1])["pairs"]["int8"]["decode_b1"] == [[100.0, 125.0]] * 6


def test_forms_choose_the_checkpoint(judge):
    _, _, _, started = judge(FIGURES, FIGURES, "--pairs", "1")
    assert [words for words in started if words[0] == "head"] == [
        ("head", form, form) for form in ("bfloat16", "int8", "int4", "fp8") for _ in range(2)
    ]


def test_both_models_must_fit_into_memory(judge, gate, monkeypatch, capsys):
    monkeypatch.setattr(gate.devices, "free_memory", lambda device: 2.9 * 2**30)
    monkeypatch.setattr(gate.sys, "stderr", sys.stdout)
    code, out, heard, _ = judge(FIGURES, FIGURES, "--pairs", "1", "--forms", "int8")
    assert code == 2 and "both models at once take 3.0 GiB of memory, 2.9 GiB are free" in out
    assert not [words for words in heard if words[1:] == ("decode", 1, 40)]


def test_a_process_without_figures_ends_with_2(judge, gate):
    class Ended(dict):
        def __getitem__(self, key):
            raise gate.Failed("exit code 1: glimmer: no such thing")

    code, out, *_ = judge(Ended(), Ended(), "--pairs", "1")
    assert code == 2 and out == ""


@pytest.fixture
def child(gate, checkpoint, tmp_path):
    """child(timeout) -> (the resident process of this very package, with a small model)."""
    args = argparse.Namespace(prefill=[20], decode=[2], timeout=60, cache=tmp_path)
    package = Path(glimmer.__file__).resolve().parents[1]

    def start(form: str = "int8", model: Path | None = None, **options):
        return gate.Child(package, model or checkpoint(), form, argparse.Namespace(**vars(args) | options))

    return start


@pytest.mark.slow
def test_a_resident_process_answers_and_sleeps(child):
    with child() as resident:
        assert resident.load_s > 0
        assert resident.ask("prefill", 20, 2) > 0 and resident.ask("decode", 2, 8) > 0
        assert 0.01 < resident.ask("peak") < 8

        def ticks() -> int:
            return sum(
                map(int, Path(f"/proc/{resident.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
            )

        time.sleep(0.1)
        before = ticks()
        time.sleep(0.5)
        assert ticks() - before <= 5, "it computes though nobody asks"
    assert resident.process.returncode == 0


@pytest.mark.slow
def test_a_resident_process_that_ends_says_why(child, gate, tmp_path):
    with pytest.raises(gate.Failed, match=r"exit code 1: .*nowhere"):
        child(model=tmp_path / "nowhere")
    with child() as resident, pytest.raises(gate.Failed, match="exit code 1: KeyError"):
        resident.ask("dance", 1, 1)


@pytest.mark.slow
def test_a_resident_process_that_does_not_answer_is_ended(child, gate):
    with child() as resident:
        resident.timeout = 0.5
        resident.process.send_signal(signal.SIGSTOP)
        with pytest.raises(gate.Failed, match=r"killed: by this program after 0\.5 s"):
            resident.ask("peak")


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
    maker.main(tmp_path / "mtp", maker.CONFIG | small | {"num_nextn_predict_layers": 1})
    more = json.loads((tmp_path / "mtp/model.safetensors.index.json").read_text())["weight_map"]
    layer = {name.replace("layers.1.", "layers.2.") for name in index if "layers.1." in name}
    own = {f"model.layers.2.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    assert more.keys() - index.keys() == layer | own
    for file in set(index.values()):
        assert (tmp_path / "mtp" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
