"""The owner of an engine: any number of threads ask it, and what fails is heard of by whom it concerns, and at once."""

import gc
import importlib.util
import queue
import random
import threading
import time
import weakref
from pathlib import Path

import pytest

from glimmer.config import SamplingParams
from glimmer.engine import loop as loops
from glimmer.engine.loop import Loop
from glimmer.engine.ranks import Call, ParentRequest
from glimmer.engine.sequence import FinishReason
from glimmer.errors import EngineError

spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("scripted.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

SECONDS = 20  # longer than anything here takes


class Asker:
    """A client that collects tokens. `fail`: a method that raises. `enough`: tokens after which no more are wanted."""

    def __init__(self, fail: str = "", enough: int = 10**9):
        self.fail, self.enough = fail, enough
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.reasons: dict[tuple[int, int], FinishReason] = {}
        self.steps: list[int] = []
        self.events: queue.SimpleQueue = queue.SimpleQueue()

    def put(self, prompt, answer, output):
        if self.fail == "put":
            raise ZeroDivisionError
        found = self.tokens.setdefault((prompt, answer), [])
        found += output.token_ids
        if output.finish_reason is not None:
            self.reasons[prompt, answer] = output.finish_reason
        return len(found) >= self.enough

    def after_step(self, new):
        if self.fail == "after_step":
            raise KeyboardInterrupt
        self.steps.append(new)
        self.events.put(None)

    def end(self, error):
        if self.fail == "end":
            raise ZeroDivisionError
        self.events.put(error)


def parent(id: str, prompt, n: int = 1, **params) -> ParentRequest:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, "n": n, **params})
    return ParentRequest(id, tuple(prompt), params, id, ())


def alone(prompt, count: int = 8) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(scripted.next_token(history))
    return history[len(prompt) :]


@pytest.fixture
def loop():
    """A loop over the scripted model. Afterwards, whatever happened: nothing is left in it, or it is closed."""
    loop = Loop(scripted.scripted_engine(num_blocks=200, block_size=4, max_model_len=64, max_num_seqs=8))
    yield loop
    deadline = time.monotonic() + SECONDS
    while loop._thread is not None:
        assert time.monotonic() < deadline, "the thread does not end"
        time.sleep(0.01)
    assert loop.idle or loop._end is not None
    if loop._end is None:
        blocks = loop.engine.scheduler.blocks
        assert blocks.free == blocks.count
    loop.close()


def ask(loop: Loop, *requests: ParentRequest, **options) -> tuple[Asker, Call]:
    asker = Asker(**options)
    call = Call(requests, asker)
    loop.submit(call)
    return asker, call


def test_calls_of_many_threads(loop):
    found: dict[int, dict] = {}

    def caller(number: int) -> None:
        source = random.Random(number)
        for i in range(20):
            prompts = [[source.randrange(50) for _ in range(source.randrange(1, 9))] for _ in range(3)]
            asker, call = ask(loop, *(parent(f"{number}-{i}-{j}", p, n=2) for j, p in enumerate(prompts)))
            if i % 5 == 4:
                loop.cancel(call)
                assert call.ended.is_set()
                continue
            assert call.ended.wait(SECONDS)
            found[number, i] = {(j, a): alone(p) == asker.tokens[j, a] for j, p in enumerate(prompts) for a in (0, 1)}

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(found) == 8 * 16 and all(all(right.values()) and len(right) == 6 for right in found.values())


@pytest.mark.parametrize("fail", ["put", "after_step"])
def test_a_client_that_fails_loses_its_own_requests_only(loop, fail):
    good, first = ask(loop, parent("good", [1, 2]))
    bad, second = ask(loop, parent("bad 1", [3]), parent("bad 2", [4], max_tokens=40), fail=fail)
    assert first.ended.wait(SECONDS) and second.ended.wait(SECONDS)
    assert good.tokens[0, 0] == alone([1, 2])
    assert isinstance(bad.events.get(timeout=SECONDS), ZeroDivisionError if fail == "put" else KeyboardInterrupt)


def test_an_interrupted_caller_does_not_wait_for_a_long_step(loop, monkeypatch):
    """A signal ends a process at once, also where a step takes minutes; and the engine is none the worse."""
    monkeypatch.setattr(loops, "LEAVE", 0.05)
    begun, over, step = threading.Event(), threading.Event(), loop.engine.step

    def long():
        begun.set()
        assert over.wait(SECONDS)
        return step()

    monkeypatch.setattr(loop.engine, "step", long)
    _, call = ask(loop, parent("a", [1], max_tokens=40))
    assert begun.wait(SECONDS)
    with pytest.raises(KeyboardInterrupt):
        try:
            raise KeyboardInterrupt
        finally:
            loop.cancel(call)
            assert not call.ended.is_set()
    over.set()
    asker, later = ask(loop, parent("b", [2]))
    assert later.ended.wait(SECONDS) and asker.tokens[0, 0] == alone([2]) and call.ended.is_set()


def test_enough_ends_an_answer_early(loop):
    asker, call = ask(loop, parent("a", [1], max_tokens=60), parent("b", [2]), enough=5)
    assert call.ended.wait(SECONDS)
    assert asker.tokens == {(0, 0): alone([1], 5), (1, 0): alone([2], 5)}
    assert set(asker.reasons.values()) == {FinishReason.ABORT}


def test_a_cancelled_call_is_gone_when_cancel_returns(loop):
    for wait in (0, 0.002, 0.01):
        _, call = ask(loop, *(parent(f"{wait}-{i}", [i], max_tokens=60) for i in range(20)))
        time.sleep(wait)
        loop.cancel(call)
        assert call.ended.is_set() and not loop.engine.busy and not loop._answers and not loop._queue
        loop.cancel(call)
    never = Call([parent("never", [1])], Asker())
    loop.cancel(never)
    assert never.ended.is_set()


def test_answers_begin_as_there_is_room_for_them(loop):
    most = []
    loop.engine.runner.forward = lambda batch, forward=loop.engine.runner.forward: (
        most.append(len(loop.engine.scheduler.waiting) + len(loop.engine.scheduler.running)) or forward(batch)
    )
    asker, call = ask(loop, *(parent(str(i), [i], n=50, max_tokens=2) for i in range(3)))
    assert call.ended.wait(SECONDS)
    assert all(asker.tokens[i, a] == alone([i], 2) for i in range(3) for a in range(50))
    assert max(most) <= 16, "8 at work and 8 that wait"


def test_run_is_between_two_steps(loop):
    _, call = ask(loop, parent("a", [1], max_tokens=60))
    assert loop.run(lambda: threading.current_thread().name) == "glimmer-engine"
    with pytest.raises(ZeroDivisionError):
        loop.run(lambda: 1 // 0)
    assert call.ended.wait(SECONDS)
    assert loop.run(lambda: loop.run(lambda: 5)) == 5


def test_a_dead_engine_is_heard_of_by_everyone_at_once(loop):
    schedule, entered = loop.engine.scheduler.schedule, threading.Event()

    def failing():
        if entered.wait(SECONDS) and len(loop._open_requests) == 3:
            raise AssertionError("a bug")
        return schedule()

    loop.engine.scheduler.schedule = failing
    askers = [ask(loop, parent(str(i), [i], max_tokens=60)) for i in range(3)]
    entered.set()
    for asker, call in askers:
        assert call.ended.wait(SECONDS)
        while not isinstance(error := asker.events.get(timeout=SECONDS), EngineError):
            pass
        assert "AssertionError: a bug" in error.found
    with pytest.raises(EngineError, match="a bug"):
        ask(loop, parent("late", [1]))
    late = Call([parent("later", [1])], Asker())
    loop.cancel(late)
    assert late.ended.is_set()


def test_closing_tells_whoever_waits(loop):
    asker, call = ask(loop, *(parent(str(i), [i], max_tokens=60) for i in range(30)))
    loop.close()
    assert call.ended.is_set()
    while not isinstance(error := asker.events.get(timeout=SECONDS), EngineError):
        pass
    assert "closed" in error.found
    with pytest.raises(EngineError, match="closed"):
        ask(loop, parent("late", [1]))
    loop.close()


def test_an_engine_that_nobody_needs_is_forgotten(loop):
    other = Loop(scripted.scripted_engine())
    _, call = ask(other, parent("a", [1]))
    assert call.ended.wait(SECONDS)
    (thread := other._thread) and thread.join(SECONDS)
    del thread
    gone = weakref.ref(other.engine)
    del other
    gc.collect()
    assert gone() is None


def test_a_finalizer_in_the_loop_s_thread_may_cancel(loop):
    """The garbage collector may run the end of a forgotten stream anywhere: also in the engine's own thread."""
    _, call = ask(loop, parent("a", [1], max_tokens=60))
    loop.run(lambda: loop.cancel(call))
    assert call.ended.wait(SECONDS)
