"""Nothing is lost or duplicated: whatever runs beside it, each request gets exactly the tokens that it gets alone."""

import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer.config import SamplingParams
from glimmer.engine.sequence import FinishReason, Request
from glimmer.errors import RequestError

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)


def alone(request: Request, max_model_len: int) -> list[int]:
    """The answer by definition: no cache, no batch."""
    history, limit = list(request.prompt_token_ids), max_model_len
    if request.params.max_tokens is not None:
        limit = min(limit, len(history) + request.params.max_tokens)
    while len(history) < limit:
        history.append(scripted.next_token(history))
        if history[-1] in request.stop_ids:
            break
    return history[len(request.prompt_token_ids) :]


def drain(engine, answers: dict, reasons: dict) -> None:
    for output in engine.step():
        assert reasons.get(output.request_id) is None, "words after the last word"
        answers.setdefault(output.request_id, []).extend(output.token_ids)
        reasons[output.request_id] = output.finish_reason
    engine.scheduler.blocks.check(engine.scheduler.running)


def request(id: str, prompt, **params) -> Request:
    return Request(id, tuple(prompt), SamplingParams(temperature=0, **params), id, eos_token_ids=(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(8, 24),
    block_size=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 40),
    max_num_seqs=st.integers(1, 12),
    reuse=st.booleans(),
)
def test_each_request_gets_the_tokens_it_gets_alone(
    seed, num_blocks, block_size, max_num_batched_tokens, max_num_seqs, reuse
):
    """Thousands of requests over all examples: shared beginnings, a tiny pool, random arrivals, random aborts."""
    source = random.Random(seed)
    max_model_len = min(num_blocks * block_size, 40)
    engine = scripted.scripted_engine(
        num_blocks,
        block_size,
        max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=reuse,
    )
    beginnings = [[source.randrange(50) for _ in range(max_model_len)] for _ in range(3)]
    requests, answers, reasons, aborted = {}, {}, {}, set()
    while len(requests) < 50 or engine.busy:
        while len(requests) < 50 and source.random() < 0.6:
            length = source.randrange(1, max_model_len)
            shared = source.randrange(length + 1)
            prompt = source.choice(beginnings)[:shared] + [source.randrange(50) for _ in range(length - shared)]
            new = request(
                str(len(requests)),
                prompt,
                max_tokens=source.choice([1, 2, 5, 20, None]),
                ignore_eos=source.random() < 0.5,
            )
            requests[new.id] = new
            engine.add(new)
        if requests and source.random() < 0.1:
            victim = source.choice(list(requests))
            if engine.abort(victim):
                aborted.add(victim)
        drain(engine, answers, reasons)
    assert engine.scheduler.blocks.free == num_blocks
    assert engine.runner.rows <= max_num_batched_tokens
    for id, asked in requests.items():
        whole = alone(asked, max_model_len)
        got = answers.get(id, [])
        if id in aborted:
            assert got == whole[: len(got)] and reasons.get(id) is None
        else:
            assert got == whole
            assert reasons[id] is (FinishReason.STOP if whole[-1] in asked.stop_ids else FinishReason.LENGTH)


def test_a_shared_beginning_is_computed_once():
    engine = scripted.scripted_engine(num_blocks=100, block_size=4, max_model_len=64, max_num_batched_tokens=64)
    prompt = list(range(33))
    answers, reasons = {}, {}
    engine.add(request("first", prompt, max_tokens=3, ignore_eos=True))
    for i in range(4):
        engine.add(request(f"other {i}", prompt, max_tokens=3, ignore_eos=True))
    computed = []
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: computed.append(len(batch.tokens)) or forward(batch)
    while engine.busy:
        drain(engine, answers, reasons)
    assert computed[0] == 33, "the first computes the prompt; its twins wait for it"
    assert computed[1] == 1 + 4 * 1, "then each twin computes the one token that is not in a full block"
    assert len({tuple(a) for a in answers.values()}) == 1 and len(answers) == 5


def test_waiting_for_a_twin_does_not_hold_up_others():
    engine = scripted.scripted_engine(num_blocks=100, block_size=4, max_model_len=64)
    engine.add(request("first", range(20)))
    engine.add(request("twin", range(20)))
    engine.add(request("stranger", range(20, 40)))
    engine.step()
    assert [s.request.id for s in engine.scheduler.running] == ["first", "stranger"]
    engine.step()
    assert [s.request.id for s in engine.scheduler.running] == ["first", "stranger", "twin"]


def test_preemption_recomputes_and_is_not_noticed():
    engine = scripted.scripted_engine(num_blocks=6, block_size=2, max_model_len=12, enable_prefix_caching=False)
    asked = [request(str(i), [i, i + 1], max_tokens=10, ignore_eos=True) for i in range(4)]
    for new in asked:
        engine.add(new)
    answers, reasons = {}, {}
    while engine.busy:
        drain(engine, answers, reasons)
    assert engine.scheduler.preemptions > 0
    assert answers == {new.id: alone(new, 12) for new in asked}


def test_prompt_logprobs_are_reported_once_even_after_preemption():
    engine = scripted.scripted_engine(num_blocks=10, block_size=2, max_model_len=20, max_num_batched_tokens=3)
    engine.add(request("a", [1, 2], max_tokens=12, ignore_eos=True))
    engine.add(request("b", list(range(9)), max_tokens=8, ignore_eos=True, prompt_logprobs=2))
    given = []
    while engine.busy:
        given += [p for output in engine.step() if output.request_id == "b" for p in output.prompt_logprobs]
    assert len(given) == 8, "one for each prompt token but the first"
    assert [next(iter(position)) for position in given] == list(range(1, 9)), "the prompt's own token comes first"


def test_abort_at_any_time():
    engine = scripted.scripted_engine()
    assert not engine.abort("nobody")
    for id in "abc":
        engine.add(request(id, range(5), ignore_eos=True))
    assert engine.abort("b"), "while waiting"
    engine.step()
    assert engine.abort("a"), "while running"
    assert not engine.abort("a"), "only once"
    assert {o.request_id for o in engine.step()} == {"c"}
    engine.abort("c")
    assert not engine.busy and engine.step() == []
    assert engine.scheduler.blocks.free == engine.scheduler.blocks.count


@pytest.mark.parametrize(
    ("field", "prompt", "params"),
    [
        ("prompt", [], {}),
        ("prompt", range(64), {}),
        ("prompt", [1, 50], {}),
        ("prompt", [-1], {}),
        ("logit_bias", [1], {"logit_bias": {50: 1.0}}),
        ("stop_token_ids", [1], {"stop_token_ids": [50]}),
    ],
)
def test_refusals_name_the_field_and_disturb_nobody(field, prompt, params):
    engine = scripted.scripted_engine()
    engine.add(request("good", [1, 2, 3], max_tokens=4, ignore_eos=True))
    with pytest.raises(RequestError) as refusal:
        engine.add(request("bad", [t % 50 if t >= 0 and len(prompt) > 2 else t for t in prompt], **params))
    assert refusal.value.field == field
    answers, reasons = {}, {}
    while engine.busy:
        drain(engine, answers, reasons)
    assert answers["good"] == alone(request("good", [1, 2, 3], max_tokens=4, ignore_eos=True), 64)


def test_not_a_number_ends_that_request_only():
    engine = scripted.scripted_engine()
    forward = engine.runner.forward

    def poisoned(batch):
        hidden, logits = forward(batch)
        if logits is not None and engine.runner.steps == 3:
            logits[1] = float("nan")
        return hidden, logits

    engine.runner.forward = poisoned
    asked = [request(id, [ord(id) - 97], max_tokens=6, ignore_eos=True) for id in "abc"]
    for new in asked:
        engine.add(new)
    answers, reasons = {}, {}
    while engine.busy:
        drain(engine, answers, reasons)
    assert reasons["b"] is FinishReason.ERROR and len(answers["b"]) == 2
    assert [answers[new.id] for new in asked if new.id != "b"] == [alone(new, 64) for new in asked if new.id != "b"]
