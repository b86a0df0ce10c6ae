"""Calls of another rank find the answers to rank 0's equal calls, whichever comes first, and others are refused."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer.config import SamplingParams
from glimmer.engine import ranks
from glimmer.engine.ranks import Abort, Arrival, Call, CallMatcher, ParentRequest, Stop, from_json, to_json
from glimmer.engine.sequence import Output
from glimmer.errors import RequestError


class Asker:
    def __init__(self):
        self.got: dict[tuple[int, int], list[int]] = {}
        self.new, self.error = 0, None

    def put(self, prompt, answer, output):
        self.got.setdefault((prompt, answer), []).extend(output.token_ids)
        return False

    def after_step(self, new):
        self.new += new

    def end(self, error):
        assert self.error is None
        self.error = error


def parent(id: str, prompt: tuple[int, ...], **params) -> ParentRequest:
    return ParentRequest(id, prompt, SamplingParams(temperature=0, **params), f"seed {id}", (1,))


def arrivals(call: Call, number: int) -> list[Arrival]:
    size = len(call.requests)
    return [Arrival(number, size, call.digest, call.ordinal, i, q, call) for i, q in enumerate(call.requests)]


def received(arrival: Arrival) -> Arrival:
    """As it arrives on another rank."""
    return from_json(json.loads(json.dumps(to_json(arrival))))


def test_records_survive_the_journey():
    params = dict(logit_bias={7: 1.5, 3: -2.0}, stop=["x", "y"], stop_token_ids=[4], seed=2**100, n=3, top_p=0.9)
    asked = Arrival(5, 2, "digest", None, 1, parent("8", (1, 2, 3), **params))
    assert received(asked) == asked and received(asked).parent.content == asked.parent.content
    assert [from_json(to_json(record)) for record in (Abort("3.1"), Stop())] == [Abort("3.1"), Stop()]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), calls=st.integers(1, 12), kinds=st.integers(1, 4))
def test_every_call_gets_the_answers_to_its_own_prompts(seed, calls, kinds):
    """Equal prompts and equal calls included: of those, all get answers, and each answer goes to one of them."""
    source = random.Random(seed)
    leading = []
    for number in range(calls):
        prompts = [(source.randrange(kinds),) * source.randrange(1, 3) for _ in range(source.randrange(1, 4))]
        asked = [parent(f"{number}{i}", p, n=1 + sum(p) % 2) for i, p in enumerate(prompts)]
        leading.append(Call(asked, Asker()))
    following = [Call(source.sample(call.requests, len(call.requests)), Asker()) for call in leading]
    events: list = source.sample(following, len(following))
    for number in range(len(leading)):
        events.insert(source.randrange(len(events) + 1), number)
    matcher, work = CallMatcher(1), []  # work: outputs that are still to come, for arrivals already made
    for event in events:
        if isinstance(event, Call):
            matcher.claim(event)
        else:
            for arrival in arrivals(leading[event], event):
                work.append((matcher.arrive(received(arrival)), arrival))
                if source.random() < 0.5:
                    bring(*work.pop(source.randrange(len(work))))
    for call, arrival in work:
        bring(call, arrival)
    taken = []
    for call in following:
        assert call.ended.is_set() and call.client.error is None
        for position, asked in enumerate(call.requests):
            answers = [call.client.got[position, answer] for answer in range(asked.params.n)]
            assert all(answer[:-1] == list(asked.prompt_token_ids) for answer in answers), "somebody else's answer"
            taken += [answer[-1] for answer in answers]
        assert call.client.new == sum(len(answer) for answer in call.client.got.values())
    assert sorted(taken) == sorted(
        10 * int(q.id) + a for call in leading for q in call.requests for a in range(q.params.n)
    )
    assert matcher.num_held == 0


def bring(call: Call, arrival: Arrival) -> None:
    """The answers to one request: its prompt, and a token that no other answer has."""
    for answer in range(arrival.parent.params.n):
        tokens = (*arrival.parent.prompt_token_ids, 10 * int(arrival.parent.id) + answer)
        call.client.put(arrival.position, answer, Output("", tokens))
        call.client.after_step(len(tokens))
    call.open -= 1
    if call.open == 0:
        call.finish()


def refused(matcher: CallMatcher, mine: Call, theirs: Call, theirs_first: bool) -> str:
    if theirs_first:
        for arrival in arrivals(theirs, 0):
            matcher.arrive(received(arrival))
        matcher.claim(mine)
    else:
        matcher.claim(mine)
        for arrival in arrivals(theirs, 0):
            matcher.arrive(received(arrival))
    matcher.refuse_overdue()
    if mine.client.error is None:
        return ""
    assert isinstance(mine.client.error, RequestError) and mine.ended.is_set()
    return mine.client.error.found


@pytest.mark.parametrize("theirs_first", [True, False])
def test_the_first_difference_of_counted_calls_is_named(theirs_first):
    def call(*requests: ParentRequest, ordinal: int | None = 4) -> Call:
        made = Call(requests, Asker())
        made.ordinal = ordinal
        return made

    a, b, c = parent("0", (1, 2)), parent("1", (3,)), parent("2", (5, 6, 7, 8, 9, 10, 11, 12, 13, 14))
    hot = parent("3", (3,), max_tokens=7)
    differ = lambda mine, theirs: refused(CallMatcher(1), mine, theirs, theirs_first)
    assert differ(call(a, b), call(b, a)) == ""
    assert "call 4 of generate and chat on rank 1 that rank 0 does not make" in differ(call(a), call(b))
    assert "it has 1 prompts here, 2 on rank 0" in differ(call(a), call(a, b))
    assert "prompt 1 of rank 0 is a prompt of 10 tokens (5, 6, 7, 8, 9, 10, 11, 12, ...)" in differ(
        call(a, b), call(a, c)
    )
    assert "prompt 0 of rank 0 is asked with max_tokens=16, here with max_tokens=7" in differ(call(a, hot), call(b, a))
    assert differ(call(a), call(b, ordinal=5)) == "" and differ(call(a, ordinal=None), call(b, ordinal=None)) == ""


def test_calls_that_are_not_counted_are_refused_after_a_time():
    a, b = Call([parent("0", (1,))], Asker()), Call([parent("1", (2,))], Asker())
    impatient = CallMatcher(1, mismatch=-1.0)
    assert "rank 0 asks for something else: a prompt of 1 tokens (2)" in refused(impatient, a, b, True)
    alone, matcher = Call([parent("0", (1,))], Asker()), CallMatcher(1, timeout=-1.0)
    matcher.claim(alone)
    matcher.refuse_overdue()
    assert "rank 0 has not asked for it" in alone.client.error.found


def test_what_nobody_asks_for_is_let_go(monkeypatch):
    monkeypatch.setattr(ranks, "MAX_HELD", 5)
    matcher, calls = CallMatcher(1), [Call([parent(str(i), (i,))], Asker()) for i in range(4)]
    for number, call in enumerate(calls):
        (arrival,) = arrivals(call, number)
        mine = matcher.arrive(received(arrival))
        for _ in range(2):
            mine.client.put(0, 0, Output("", (1,)))
    assert matcher.num_held <= 5
    last = Call(calls[3].requests, Asker())
    matcher.claim(last)
    assert last.client.got == {(0, 0): [1, 1]}
    matcher.release()
    assert matcher.num_held == 0
    (arrival,) = arrivals(Call([parent("9", (9,))], Asker()), 9)
    matcher.arrive(received(arrival)).client.put(0, 0, Output("", (1,)))
    assert matcher.num_held == 0


def test_a_caller_that_leaves_gets_nothing_more():
    matcher, theirs = CallMatcher(1), Call([parent("0", (1,))], Asker())
    for first in (True, False):
        mine = Call(theirs.requests, Asker())
        matcher.claim(mine)
        if first:
            matcher.withdraw(mine)
        (arrival,) = arrivals(theirs, int(first))
        call = matcher.arrive(received(arrival))
        matcher.withdraw(mine)
        call.client.put(0, 0, Output("", (1,)))
        assert mine.client is not None and mine.ended.is_set() and matcher.num_held == int(first)
        matcher.release() if first else None
        matcher.hold = True
