"""Triton's kernels without a GPU: every one of them builds for the GPUs that it is meant for, and a model runs on them.

What each computes is compared with its definition in test_ops.py, by Triton's interpreter.
"""

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
    "add_rms_norm", "attend", "combine", "embed", "forbid", "multiply", "quantize", "rms_norm", "rope", "route",
    "store", "swiglu",
}  # fmt: skip


@pytest.mark.parametrize(
    "target, kinds, rows", [("sm_90", "plain,fp8,int8,int4", "100"), ("sm_80", "fp8,int4", "1"), ("gfx942", "fp8", "1")]
)
def test_every_kernel_builds(target, kinds, rows, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), target, kinds, rows], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    built = {line.split()[0] for line in done.stdout.splitlines()}
    assert built == KERNELS | ({"merge"} if "1" in rows.split(",") else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about Triton's interpreter")
@pytest.mark.parametrize("variant", [{}, {"fp8": True}], ids=["plain", "fp8"])
def test_a_model_answers_as_the_reference_does(variant, checkpoint, monkeypatch):
    """Prompts read together and in chunks, then decoding, in float32: greedy tokens of both backends are equal."""
    directory = checkpoint(**variant)
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (5, 40)]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    answers = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("GLIMMER_BACKEND", backend)
        with LLM(str(directory), dtype="float32", max_model_len=128, max_num_batched_tokens=32) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert answers[0] == answers[1]
