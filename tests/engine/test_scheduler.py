"""Who gets how much of a step: a short request does not wait until the long prompts before it have been read."""

import importlib.util
from pathlib import Path

import pytest

from glimmer.config import SamplingParams
from glimmer.engine.sequence import Request

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

STEP = 64  # tokens of a step


def request(id: str, length: int, most: int = 4) -> Request:
    prompt = tuple((len(id) * 7 + place * 5) % 45 + 2 for place in range(length))
    return Request(
        id, prompt, SamplingParams(temperature=0, max_tokens=most, ignore_eos=True), id, eos_token_ids=(0, 1)
    )


@pytest.fixture
def engine():
    """With room for everything, but for the tokens of a step; without reuse, so that each token is computed once."""
    return scripted.scripted_engine(
        num_blocks=1000,
        block_size=4,
        max_model_len=1000,
        max_num_batched_tokens=STEP,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )


@pytest.mark.parametrize("longs", [1, 4, 10])
def test_a_short_request_has_its_first_token_within_two_steps(engine, longs):
    for number in range(longs):
        engine.add(request(f"long {number}", 500))
    for round in range(5):
        engine.step()
        engine.add(request(f"short {round}", 10))
        told = {output.request_id for _ in range(2) for output in engine.step() if output.token_ids}
        assert f"short {round}" in told


def test_long_prompts_are_read_in_their_order_and_with_half_of_each_step(engine):
    """However many short requests come."""
    for number in range(2):
        engine.add(request(f"long {number}", 256))
    first: dict[str, int] = {}
    for step in range(40):
        for number in range(4):
            engine.add(request(f"short {step}.{number}", 16, most=1))
        for output in engine.step():
            first.setdefault(output.request_id, step)
        if "long 1" in first:
            break
    assert first["long 0"] < first["long 1"] <= 2 * 2 * 256 // STEP + 2
    assert first["short 0.0"] <= 1


def test_a_step_is_full_while_there_is_enough_to_do(engine):
    """Nothing is kept for sequences that need less than what is kept, and nothing for those that cannot begin."""
    computed = []
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: computed.append(len(batch.tokens)) or forward(batch)
    engine.add(request("long", 600))
    for number in range(3):
        engine.add(request(f"short {number}", 15))
    for _ in range(9):
        engine.step()
    assert computed == [STEP] * 9
