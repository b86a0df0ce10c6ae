"""Checkpoints, engines and reference models for all tests: small, from fixed seeds, made once a session."""

import functools
import json
import os
import signal
from pathlib import Path

import pytest
from servers import Server

# Before torch is imported: small matrices gain nothing from a second thread, and lose much where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():  # before Triton is imported: without a GPU its kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
# A shell without job control starts what runs in the background with SIGINT ignored, which every child would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers, with which some tests compare, finds everything on this disk
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

SMALL = {"max_model_len": 512, "max_num_seqs": 16}  # a cache of megabytes, not of the machine's free memory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(**variant) -> directory of a tiny_checkpoint, the same one for the same variant. Not to be changed."""
    from checkpoints import tiny_checkpoint

    written: dict[str, Path] = {}

    def write(**variant) -> Path:
        key = json.dumps(variant, sort_keys=True)
        if key not in written:
            written[key] = tiny_checkpoint(tmp_path_factory.mktemp("tiny"), **variant)
        return written[key]

    return write


@pytest.fixture(scope="session")
def engine():
    """engine(directory, **settings) -> LLM in float32 with a small cache, the same one for the same arguments."""
    from glimmer import LLM

    @functools.cache
    def load(directory: Path, **settings) -> LLM:
        return LLM(str(directory), **SMALL | {"dtype": "float32"} | settings)

    return load


@pytest.fixture(scope="session")
def reference():
    """reference(directory, **options) -> transformers' Glm4MoeForCausalLM, from the same files in float32."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    @functools.cache
    def load(directory: Path, **options):
        options = {"dtype": "float32", "attn_implementation": "eager", "experts_implementation": "eager"} | options
        return transformers.Glm4MoeForCausalLM.from_pretrained(str(directory), **options).eval()

    return load


@pytest.fixture(scope="session")
def server():
    """`glimmer serve` with the demo model, for all tests that leave it as it is: nobody may stop or overload it."""
    with Server() as started:
        yield started
