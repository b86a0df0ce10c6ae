"""What is sampled: limits are kept exactly, frequencies follow the distribution, and neighbours do not matter."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer.backends.reference import Reference
from glimmer.config import SamplingParams
from glimmer.engine.sampler import CANDIDATES, Sampler
from glimmer.engine.sequence import Chunk, Request, Sequence, Step


def chunk(prompt=(1, 2), answer=(), seed="s", eos=(), **params) -> Chunk:
    """A sequence that has computed all but its last token."""
    sequence = Sequence(Request("r", tuple(prompt), SamplingParams(**params), seed, tuple(eos)), 1000)
    sequence.tokens += answer
    return Chunk(sequence, len(sequence.tokens) - 1, 1, 1)


def choose(logits, *chunks, sampling_vocab_size=None):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    forbid = Reference(torch.device("cpu")).forbid_
    return Sampler(sampling_vocab_size or logits.shape[-1], forbid).sample(logits, Step(chunks))


def draws(logits, count, **params) -> Counter:
    """Tokens of `count` requests that differ in their seed only."""
    chunks = [chunk(seed=f"{i}", **params) for i in range(count)]
    return Counter(c.tokens[0] for c in choose(torch.as_tensor(logits).expand(count, -1), *chunks))


def test_greedy_takes_the_likeliest_and_padding_is_never_chosen():
    logits = [[0.0, 3.0, 1.0, 9.0, 9.0]]
    assert choose(logits, chunk(temperature=0), sampling_vocab_size=3)[0].tokens[0] == 1
    assert set(draws(logits[0], 200, temperature=5)) == {0, 1, 2, 3, 4}
    chunks = [chunk(temperature=5, seed=str(i)) for i in range(200)]
    assert {c.tokens[0] for c in choose(torch.tensor(logits).expand(200, -1), *chunks, sampling_vocab_size=3)} == {
        0,
        1,
        2,
    }


@pytest.mark.parametrize("seed", range(20))
def test_greedy_sequences_among_themselves_get_what_they_get_beside_others(seed):
    """Drafts are right, wrong or beyond what may be sampled; one sequence is not yet up to date."""
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 6, generator=source)
    best = logits[:, :5].argmax(-1).tolist()
    counts = [0, 3, 1, 3]
    chunks, end = [], 0
    for count in counts:
        wrong = torch.randint(6, (count,), generator=source).tolist()
        right = torch.rand(count, generator=source).tolist()
        drafts = tuple(best[end + i] if right[i] < 0.7 else wrong[i] for i in range(count))
        one = chunk(temperature=0)
        chunks.append(Chunk(one.sequence, one.start, 1 + count, 1 + count, drafts))
        end += 1 + count
    chunks.insert(2, Chunk(chunk(prompt=(1, 2, 3), temperature=0).sequence, 0, 1, 0))
    alone = choose(logits[:end], *chunks, sampling_vocab_size=5)
    beside = choose(logits, *chunks, chunk(temperature=1.0), sampling_vocab_size=5)
    assert alone == beside[:-1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])
    expected = (logits / temperature).softmax(-1)
    count = 4000
    found = draws(logits, count, temperature=temperature)
    for token, p in enumerate(expected.tolist()):
        assert abs(found[token] - count * p) < 5 * math.sqrt(count * p * (1 - p)) + 1


def test_top_k_top_p_min_p_keep_exactly_what_they_say():
    logits = torch.log(torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1]))
    assert set(draws(logits, 500, top_k=2)) == {1, 2}
    assert set(draws(logits, 500, top_p=0.69)) == {1, 2}
    assert set(draws(logits, 500, top_p=0.71)) == {1, 2, 3}
    assert set(draws(logits, 500, min_p=0.3)) == {1, 2, 3}
    assert set(draws(logits, 500, top_k=3, top_p=0.5)) == {1, 2}, "top_p speaks of the mass that top_k left"
    assert set(draws(logits, 500, top_p=1e-9)) == {1}, "the likeliest is always kept"


def test_a_flat_distribution_wider_than_the_first_candidates():
    logits = torch.zeros(3 * CANDIDATES)
    found = draws(logits, 3000, top_p=0.9)
    assert len(found) > CANDIDATES, "tokens beyond the first candidates must be reachable"
    assert max(found) < 3 * CANDIDATES and sum(found.values()) == 3000


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=40), st.floats(0.05, 1.0), st.integers(0, 10), st.floats(0, 1))
def test_limits_against_the_definition(values, top_p, top_k, min_p):
    logits = torch.tensor(values)
    probs = logits.double().softmax(-1)
    order = sorted(range(len(values)), key=lambda i: -probs[i])
    allowed = order[: top_k or None]
    mass, before, kept = float(probs[allowed].sum()), 0.0, set()
    for i in allowed:
        if before < top_p * mass + 1e-6 and probs[i] >= min_p * probs[order[0]] - 1e-6:
            kept.add(i)
        before += float(probs[i])
    tied = {i for i in range(len(values)) if any(abs(probs[i] - probs[j]) < 1e-6 for j in kept)}
    assert set(draws(logits, 60, top_p=top_p, top_k=top_k, min_p=min_p)) <= kept | tied


def test_a_draw_depends_on_seed_and_length_only():
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    one = chunk(seed="mine", temperature=1.0)
    alone = choose(logits, one)[0].tokens[0]
    crowd = [chunk(seed=f"{i}", temperature=0.7, top_k=5) for i in range(9)]
    beside = choose(logits.expand(10, -1), *crowd[:4], one, *crowd[4:])[4].tokens[0]
    assert alone == beside
    later = {choose(logits, chunk(seed="mine", answer=[7] * n))[0].tokens[0] for n in range(20)}
    assert len(later) > 3, "each position draws anew"


def test_penalties_follow_their_formulas():
    logits = [[1.0, 2.0, -1.0, 0.0]]
    given = chunk(
        prompt=[1],
        answer=[2, 2],
        temperature=0,
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logprobs=0,
    )
    # token 1: 2 / 2 = 1; token 2: -1 * 2 - 2 * 0.5 - 0.25; token 0 unseen: 1 -> a tie of 0 and 1, the first wins
    assert choose(logits, given)[0].tokens[0] == 0
    assert choose([[0.99, 2.0, -1.0, 0.0]], given)[0].tokens[0] == 1


def test_presence_penalty_is_about_the_answer_only():
    def token(likely: float, **sequence) -> int:
        return choose([[likely, 3.0, 0.0]], chunk(temperature=0, presence_penalty=2.0, **sequence))[0].tokens[0]

    assert token(0.0, prompt=[0], answer=[1]) == 1
    assert token(2.0, prompt=[0], answer=[1]) == 0
    assert token(2.0, prompt=[1], answer=[]) == 1


def test_bias_and_min_tokens():
    logits = [[5.0, 4.0, 0.0]]
    assert choose(logits, chunk(temperature=0, logit_bias={2: 6.0}))[0].tokens[0] == 2
    assert choose(logits, chunk(temperature=0, eos=[0], min_tokens=1))[0].tokens[0] == 1
    assert choose(logits, chunk(temperature=0, eos=[0], answer=[2], min_tokens=1))[0].tokens[0] == 0
    assert choose(logits, chunk(temperature=0, stop_token_ids=[0], min_tokens=1))[0].tokens[0] == 1
    assert choose(logits, chunk(temperature=0, eos=[0], ignore_eos=True, min_tokens=1))[0].tokens[0] == 0


def test_biases_come_before_penalties():
    """As in vLLM: the penalty divides the biased logit."""
    given = chunk(prompt=[0], temperature=0, repetition_penalty=2.0, logit_bias={0: 6.0})
    assert choose([[1.0, 3.4, 0.0]], given)[0].tokens[0] == 0  # (1 + 6) / 2 = 3.5; the other order gives 6.5
    assert choose([[1.0, 3.6, 0.0]], given)[0].tokens[0] == 1


def test_the_largest_parameters_together_leave_a_distribution():
    huge = dict(temperature=1e-12, repetition_penalty=1e-12, logit_bias={1: 1e15, 2: -1e15})
    for more in ({}, {"top_k": 2}, {"top_p": 0.5}):
        assert choose([[1.0, 3.0, 2.0]], chunk(prompt=[0, 1, 2], **huge, **more))[0].tokens == (1,)


def test_allowed_token_ids():
    logits = [5.0, 4.0, 3.0, 2.0]
    assert choose([logits], chunk(temperature=0, allowed_token_ids=[3, 2, 3]))[0].tokens == (2,)
    assert set(draws(logits, 200, temperature=5, allowed_token_ids=[1, 3])) == {1, 3}
    beside = choose([logits, logits], chunk(temperature=0, allowed_token_ids=[1]), chunk(temperature=0))
    assert [o.tokens for o in beside] == [(1,), (0,)]


def with_bad_words(*words: tuple[int, ...], **sequence) -> Chunk:
    made = chunk(temperature=0, **sequence)
    object.__setattr__(made.sequence.request, "bad_words", words)
    return made


def test_bad_words_are_forbidden_where_they_would_be_complete():
    logits = [[5.0, 4.0, 3.0]]
    assert choose(logits, with_bad_words((0,)))[0].tokens == (1,)
    assert choose(logits, with_bad_words((1, 0)))[0].tokens == (0,)
    assert choose(logits, with_bad_words((1, 0), answer=[1]))[0].tokens == (1,)
    assert choose(logits, with_bad_words((2, 1, 0), (0, 1), answer=[2, 1]))[0].tokens == (1,)
    assert choose(logits, with_bad_words((2, 0), prompt=[2]))[0].tokens == (0,), "the prompt is no part of the answer"


def test_where_nothing_may_come_the_request_fails_alone():
    chunks = [chunk(temperature=0), chunk(allowed_token_ids=[1], eos=[1], min_tokens=3), chunk(temperature=0)]
    first, none, last = choose([[1.0, 0.0]] * 3, *chunks)
    assert (first.tokens, last.tokens) == ((0,), (0,)) and none.tokens == ()
    assert "no token may come after 0 tokens" in none.problem.found


def test_logprobs_of_the_whole_vocabulary():
    made = choose([[1.0, 3.0, 2.0]], chunk(temperature=0, logprobs=-1))[0].logprobs[0]
    assert {id: found.rank for id, found in made.items()} == {1: 1, 2: 2, 0: 3}


def test_logprobs_are_of_the_raw_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    made = choose(logits, chunk(temperature=0, logprobs=2, logit_bias={3: 100.0}), sampling_vocab_size=4)[0]
    raw = logits[0].log_softmax(-1)
    assert made.tokens[0] == 3
    assert {i: (round(p.logprob, 5), p.rank) for i, p in made.logprobs[0].items()} == {
        i: (round(float(raw[i]), 5), rank) for i, rank in ((3, 4), (1, 1), (2, 2))
    }


def test_infinity_is_a_problem_of_its_row():
    bad = choose([[1.0, 0.0], [float("inf"), 0.0], [0.0, 1.0]], *(chunk(temperature=0) for _ in range(3)))
    assert [c.tokens for c in bad] == [(0,), (), (1,)] and bad[1].problem and not bad[0].problem
