"""Drafts change when tokens come, never which: a drafter that is right at random, against the same engine without."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer.config import SamplingParams
from glimmer.engine.sequence import FinishReason, Output, Request
from glimmer.errors import EngineError

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)


class Guesser:
    """Proposes up to `most` tokens of the answers that it has been shown; each is wrong with probability `wrong`."""

    def __init__(self, answers: dict[str, list[int]], source: random.Random, most: int, wrong: float):
        self.answers, self.source, self.most, self.wrong = answers, source, most, wrong

    def choose(self, outputs, step, seconds):
        return self.most

    def propose(self, hidden, outputs, step, count):
        assert count == self.most
        assert len(hidden) == sum(chunk.n for chunk in step.chunks)
        assert hidden[:, 0].tolist() == [token for chunk in step.chunks for token in chunk.token_ids]
        for chunk, output in zip(step.chunks, outputs, strict=True):
            sequence = chunk.sequence
            known = sequence.num_output_tokens + len(output.tokens)
            # Beyond the answer's end too: a drafter does not know where it is.
            following = [*self.answers[sequence.request.id][known:], 7, 7, 7][: self.source.randint(0, self.most)]
            spoilt = [t if self.source.random() > self.wrong else self.source.randrange(50) for t in following]
            sequence.drafts = spoilt


class EveryThird:
    """The sum of answer and next token must not be divisible by three. Insists on being told the answer exactly."""

    def __init__(self):
        self.answer: list[int] = []

    def allows(self, token):
        return (token + sum(self.answer)) % 3 != 0

    def mask(self):
        return np.packbits([self.allows(i) for i in range(scripted.VOCABULARY)], bitorder="little").tobytes()

    def accept(self, token):
        assert self.allows(token)
        self.answer.append(token)

    def rollback(self, count):
        assert 0 < count <= len(self.answer)
        del self.answer[-count:]


def served(requests, constrained, drafter=None, aborts=frozenset(), seed=0, **options) -> tuple[dict, object]:
    """All outputs of each request, joined, and the engine. `aborts`: ids that are aborted at some time."""
    engine, source = scripted.scripted_engine(**options), random.Random(seed)
    engine.drafter = drafter
    waiting, joined = list(requests), {}
    while waiting or engine.busy:
        while waiting and source.random() < 0.7:
            new = waiting.pop(0)
            joined[new.id] = Output(new.id)
            engine.add(new, EveryThird() if new.id in constrained else None)
        for id in aborts & joined.keys():
            if source.random() < 0.1:
                engine.abort(id)
        for output in engine.step():
            before = joined[output.request_id]
            assert before.finish_reason is None, "words after the last word"
            joined[output.request_id] = Output(
                output.request_id,
                before.token_ids + output.token_ids,
                before.logprobs + output.logprobs,
                before.prompt_logprobs + output.prompt_logprobs,
                output.finish_reason,
                output.problem,
            )
        engine.scheduler.blocks.check(engine.scheduler.running)
        for sequence in engine.scheduler.running:
            if sequence.constraint is not None:
                assert sequence.constraint.answer == sequence.tokens[sequence.prompt_length :], "rolled back too little"
    assert engine.scheduler.blocks.free == engine.scheduler.blocks.count
    return joined, engine


def some_request(id: str, source: random.Random, max_model_len: int, beginnings: list[list[int]]) -> Request:
    length = source.randrange(1, max_model_len)
    shared = source.randrange(length + 1)
    prompt = source.choice(beginnings)[:shared] + [source.randrange(50) for _ in range(length - shared)]
    max_tokens = source.choice([1, 2, 5, 20, None])
    maybe = lambda value, otherwise: value if source.random() < 0.3 else otherwise
    params = SamplingParams(
        temperature=source.choice([0, 0, 1.0, 4.0]),
        top_p=maybe(0.8, 1.0),
        top_k=maybe(20, 0),
        repetition_penalty=maybe(1.5, 1.0),
        presence_penalty=maybe(1.0, 0.0),
        frequency_penalty=maybe(-1.0, 0.0),
        logit_bias=maybe({3: 12.0, 4: 11.0}, None),
        min_tokens=maybe(min(3, max_tokens or 3), 0),
        max_tokens=max_tokens,
        ignore_eos=source.random() < 0.5,
        stop_token_ids=maybe([5, 6], None),
        logprobs=maybe(2, None),
        prompt_logprobs=maybe(1, None),
    )
    return Request(id, tuple(prompt), params, id, eos_token_ids=(0, 1, 2))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(8, 24),
    block_size=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 40),
    max_num_seqs=st.integers(1, 12),
    reuse=st.booleans(),
    most=st.integers(1, 6),
    wrong=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_the_same_answers_with_and_without_drafts(
    seed, num_blocks, block_size, max_num_batched_tokens, max_num_seqs, reuse, most, wrong
):
    source = random.Random(seed)
    max_model_len = min(num_blocks * block_size, 40)
    options = dict(num_blocks=num_blocks, block_size=block_size, max_model_len=max_model_len)
    options |= dict(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
    options |= dict(enable_prefix_caching=reuse, seed=seed)
    beginnings = [[source.randrange(50) for _ in range(max_model_len)] for _ in range(3)]
    requests = [some_request(str(i), source, max_model_len, beginnings) for i in range(30)]
    constrained = {request.id for request in requests if source.random() < 0.3}
    aborts = frozenset(request.id for request in requests if source.random() < 0.1)
    plain, _ = served(requests, constrained, **options)
    guesser = Guesser({id: list(output.token_ids) for id, output in plain.items()}, source, most, wrong)
    drafted, engine = served(requests, constrained, guesser, aborts, **options)
    assert engine.runner.rows <= max_num_batched_tokens
    for id, output in drafted.items():
        if id in aborts and output.finish_reason is None:
            assert output.token_ids == plain[id].token_ids[: len(output.token_ids)]
        else:
            assert output == plain[id]


def test_right_drafts_save_steps():
    request = Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), "a")
    plain, slow = served([request], ())
    guesser = Guesser({"a": list(plain["a"].token_ids)}, random.Random(0), 0, 0.0)
    guesser.source.randint = lambda low, high: 4
    drafted, fast = served([request], (), guesser)
    assert drafted == plain
    assert slow.runner.steps == 30 and fast.runner.steps == 7, "the prompt's step brings 1, the others 5 each"
    found = slow.stats, fast.stats
    assert [(s.num_steps, s.num_tokens, s.num_drafts) for s in found] == [(30, 30, 0), (7, 30, 6)]
    drafted = [4 * 5 + 3]  # the last step has room for three
    assert [fast.stats.num_draft_tokens] == [fast.stats.num_accepted_tokens] == drafted
    assert fast.stats.num_draft_tokens_per_pos == fast.stats.num_accepted_tokens_per_pos == [6, 6, 6, 5]


@pytest.mark.parametrize("place", ["mask", "accept"])
def test_a_constraint_that_fails_ends_its_own_request(place):
    class Failing(EveryThird):
        def mask(self):
            if place == "mask" and len(self.answer) == 2:
                raise KeyError("no such rule")
            return super().mask()

        def accept(self, token):
            if place == "accept" and len(self.answer) == 1:
                raise KeyError("no such rule")
            super().accept(token)

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    requests = [Request(id, (1, 2, 3), params, id) for id in "abc"]
    engine, found = scripted.scripted_engine(), {}
    for new in requests:
        engine.add(new, Failing() if new.id == "b" else None)
    while engine.busy:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    plain, _ = served(requests, ())
    for id in "ac":
        assert [t for output in found[id] for t in output.token_ids] == list(plain[id].token_ids)
    assert found["b"][-1].finish_reason is FinishReason.ERROR and "no such rule" in found["b"][-1].problem.found
    assert sum(len(output.token_ids) for output in found["b"]) == 2


def test_parameters_that_cannot_be_computed_end_their_own_request():
    params = [SamplingParams(temperature=1, max_tokens=6, ignore_eos=True) for _ in range(3)]
    params[1].logit_bias[5] = "heavy"  # past every check
    engine, found = scripted.scripted_engine(), {}
    for id, own in zip("abc", params):
        engine.add(Request(id, (1, 2, 3), own, id))
    while engine.busy:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    assert [output.finish_reason for output in found["b"]] == [FinishReason.ERROR]
    assert all(found[id][-1].finish_reason is FinishReason.LENGTH for id in "ac")


def test_a_step_that_fails_ends_its_own_sequences_with_the_reason():
    engine, found = scripted.scripted_engine(max_num_seqs=2), {}
    forward, params = engine.runner.forward, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    def failing(batch):
        if engine.runner.steps == 2:
            engine.runner.steps += 1
            raise MemoryError("std::bad_alloc")
        return forward(batch)

    engine.runner.forward = failing
    for id in "abc":
        engine.add(Request(id, (ord(id) - 97, 2, 3, 4, 5), params, id))
    while engine.busy:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    for id in "ab":
        assert found[id][-1].finish_reason is FinishReason.ERROR and isinstance(found[id][-1].problem, EngineError)
        assert "MemoryError: std::bad_alloc" in found[id][-1].problem.found
    plain, _ = served([Request("c", (2, 2, 3, 4, 5), params, "c")], ())
    assert [t for output in found["c"] for t in output.token_ids] == list(plain["c"].token_ids)
    assert engine.scheduler.blocks.free == engine.scheduler.blocks.count
