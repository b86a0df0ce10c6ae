"""A recorded step gives the bits that the model itself gives, whatever has grown, come or gone since then."""

import pytest
import torch
from checkpoints import tiny_checkpoint

from glimmer import LLM, SamplingParams
from glimmer.backends import selection
from glimmer.engine import capture
from glimmer.engine.capture import StepCapture

PROMPTS = [{"prompt_token_ids": [3 + (7 * i + j) % 90 for j in range(1 + 5 * i)]} for i in range(12)]

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not selection.choose(CPU).captures, reason="no backend here captures steps")


@pytest.fixture(scope="module", params=["bfloat16", "float32", "int8", "int8 cache", "blocks of 5"])
def llm(request, tmp_path_factory) -> LLM:
    directory = tmp_path_factory.mktemp("model")
    tiny_checkpoint(directory)
    special = {"int8": {"quantization": "int8"}, "int8 cache": {"kv_cache_dtype": "int8"}}
    special["blocks of 5"] = {"block_size": 5, "kv_cache_dtype": "int8"}  # this is the reference's
    how = special.get(request.param, {"dtype": request.param})
    return LLM(str(directory), max_model_len=128, device="cpu", **how)


def answers(llm: LLM, prompts: list[dict], params: SamplingParams | list[SamplingParams]) -> list:
    found = [output.outputs[0] for output in llm.generate(prompts, params)]
    return [(o.token_ids, [step[token].logprob for token, step in zip(o.token_ids, o.logprobs)]) for o in found]


@pytest.mark.slow
@pytest.mark.parametrize("count, most", [(1, 64), (3, 64), (12, 64), (12, 8)])
def test_the_same_bits(llm, count, most, monkeypatch):
    monkeypatch.setattr(capture, "MAX_BATCH", most)
    monkeypatch.setattr(llm._runner.capture, "_steps", {})
    # Answers of different lengths, so that the number of sequences falls while they grow past several blocks of cache.
    params = [SamplingParams(temperature=0, max_tokens=20 + 9 * i, logprobs=1, ignore_eos=True) for i in range(count)]
    found = [answers(llm, PROMPTS[:count], params) for _ in range(2)]
    recorded = llm._runner.capture._steps.keys()
    assert recorded == {(sequences, 1) for sequences in range(1, min(count, most) + 1)}
    monkeypatch.setattr(StepCapture, "serves", lambda self, batch: False)
    plain = answers(llm, PROMPTS[:count], params)
    assert found[0] == plain and found[1] == plain


def test_what_cannot_be_repeated_is_refused():
    ops = selection.choose(CPU)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        ops.capture(lambda: ops.swiglu(torch.randn(8, 4).T))
    ops.swiglu(torch.randn(8, 4).T)  # and nothing is being captured any more
