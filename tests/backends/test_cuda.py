"""Triton's kernels without a GPU: every one of them builds for the GPUs that it is meant for, and a model runs on them.

What each computes is compared with its definition in test_ops.py, by Triton's interpreter.
"""

import itertools
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
