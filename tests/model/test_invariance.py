"""On the CPU, the log-probabilities of a token have the same bits whatever is computed beside it: alone, in a batch of
32, its prompt whole or in chunks, by one thread or two. Whole models, in every kind.
Single ops: tests/backends/test_cpu.py.
"""

import math
import random

import pytest

from glimmer import LLM, SamplingParams

pytestmark = pytest.mark.slow

pytest.importorskip("glimmer.backends.cpu", reason="the reference promises no such thing")

# Wide enough for groups of 32 on both sides of every matrix, and for several panels.
SHAPE = dict(hidden_size=128, moe_intermediate_size=64, intermediate_size=192, head_dim=32, use_qk_norm=True)
KINDS = {
    "bfloat16": ({}, dict(dtype="bfloat16")),
    "float32": ({}, dict(dtype="float32")),
    "int8": ({}, dict(dtype="bfloat16", quantization="int8")),
    "int4": ({}, dict(dtype="bfloat16", quantization="int4")),
    "int8 cache": ({}, dict(dtype="bfloat16", kv_cache_dtype="int8")),
    "fp8": (dict(fp8=True), dict(dtype="bfloat16")),
}
PROMPT = [random.Random(1).randrange(250) for _ in range(150)]


def logprobs(directory, crowd: int, **settings) -> list[float]:
    """Of every token of PROMPT and of 12 that follow it; `crowd` other requests, of all lengths, run beside."""
    llm = LLM(str(directory), max_model_len=256, enable_prefix_caching=False, **settings)
    source = random.Random(2)
    prompts = [[source.randrange(250) for _ in range(source.randrange(1, 200))] for _ in range(crowd)]
    asked = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=3)
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)] * crowd
    prompts.insert(crowd // 2, PROMPT)
    params.insert(crowd // 2, asked)
    answer = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)[crowd // 2]
    llm.close()
    places = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    assert len(places) == len(PROMPT) - 1 + 12
    return [(token, place[token].logprob) for place in places for token in sorted(place)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_the_same_in_any_company(kind, checkpoint):
    variant, settings = KINDS[kind]
    directory = checkpoint(**SHAPE, **variant)
    alone = logprobs(directory, 0, threads=1, **settings)
    assert all(math.isfinite(value) for _, value in alone)
    assert alone == logprobs(directory, 0, threads=2, **settings)
    assert alone == logprobs(directory, 0, threads=1, max_num_batched_tokens=7, **settings)
    assert alone == logprobs(directory, 31, threads=2, max_num_seqs=32, **settings)
    assert alone == logprobs(directory, 31, threads=1, max_num_seqs=32, max_num_batched_tokens=40, **settings)
