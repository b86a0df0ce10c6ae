"""Triton's kernels without a GPU: every one of them builds for the GPUs that it is meant for, and a model runs on them.

What each computes is compared with its definition in test_ops.py, by Triton's interpreter.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glimmer import LLM, SamplingParams

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("compile_kernels.py")
KERNELS = {
    "add_rms_norm", "attend", "combine", "embed", "forbid", "merge", "multiply", "quantize", "rms_norm", "rope",
    "route", "store", "swiglu",
}  # fmt: skip
LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes of shared memory of one program


def test_every_kernel_builds(tmp_path):
    """For each GPU, and with no more shared memory than a program has there."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), *sys.path)),
    }
    done = subprocess.run([sys.executable, str(PROGRAM)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    assert {(target, kernel) for target, kernel, *_ in built} == set(itertools.product(LIMITS, KERNELS))
    assert all(int(shared) <= LIMITS[target] for target, _, shared, *_ in built), done.stdout


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about what it says without a GPU")
def test_the_benchmark_says_what_is_missing(gpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["no", "expected:", "to"]


def test_the_benchmark_goes_on_after_a_failure(gpu, tmp_path):
    out = tmp_path / "lines"
    report = gpu.Report(out, 1)
    report.part("op", lambda: 1 / 0, op="first")
    report.part("op", lambda: {"us": 2}, op="second")
    report.end = 0
    report.part("op", lambda: {"us": 3}, op="third")
    first, second, third = map(json.loads, out.read_text().splitlines())
    assert first["error"] == "division by zero" and report.failed == 1
    assert second == {"part": "op", "op": "second", "us": 2} and "left_out" in third


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about Triton's interpreter")
def test_a_model_answers_as_the_reference_does(checkpoint, monkeypatch):
    """Prompts read together and in chunks, then decoding, in float32: greedy tokens of both backends are equal."""
    directory = checkpoint(fp8=True, num_hidden_layers=2)
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (3, 12)]
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    answers = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("GLIMMER_BACKEND", backend)
        with LLM(str(directory), dtype="float32", max_model_len=128, max_num_batched_tokens=8) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert answers[0] == answers[1]
