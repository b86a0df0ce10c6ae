"""The switch against engines that are made up: what a step and a draft cost, and how many are right, is known here."""

import random

import pytest

from glimmer.engine.draft import RECENT
from glimmer.engine.switch import Switch, size_of


class Machine:
    """An engine's times. step(n, k): seconds of a step; draft(n, k): of drafting; right: by place, how often a draft is
    accepted if those before it are. `noise`: how far times scatter; now and then a step takes ten times as long."""

    def __init__(self, step, draft, right, seed=0, noise=0.1):
        self.step, self.draft, self.right, self.noise = step, draft, right, noise
        self.source, self.switch = random.Random(seed), Switch(4, RECENT)
        self.pending: int | None = None
        self.chosen: list[int | None] = []
        self.kept: list[bool] = []

    def run(self, sequences: int, steps: int) -> float:
        """Tokens per second, in parts of what the same steps without drafts bring."""
        seconds, tokens = 0.0, 0
        self.pending = self.switch.choose(sequences)
        for _ in range(steps):
            k = self.pending or 0
            drafts = [(k, self.accepted(k)) for _ in range(sequences)]
            took = self.step(sequences, k) * self.scatter()
            tokens += sequences + sum(accepted for _, accepted in drafts)
            if not self.switch.rests(sequences):
                for checked, accepted in drafts:
                    self.switch.checked(checked, accepted)
                self.switch.stepped(sequences, drafts, took)
                self.pending = self.switch.choose(sequences)
            self.chosen.append(self.pending)
            self.kept.append(self.switch.keeps)
            drafting = self.draft(sequences, self.pending) * self.scatter() if self.pending is not None else 0.0
            self.switch.drafted(self.pending or 0, drafting)
            # Interruptions would hide what is to be judged, so the true times count here.
            seconds += self.step(sequences, k) + (0 if self.pending is None else self.draft(sequences, self.pending))
        return tokens / seconds * self.step(sequences, 0) / sequences

    def accepted(self, drafts: int) -> int:
        for place in range(drafts):
            if self.source.random() >= self.right[place]:
                return place
        return drafts

    def scatter(self) -> float:
        late = 10.0 if self.source.random() < 0.05 else 1.0
        return late * (1 + self.noise * self.source.random())


def cpu(n: int, k: int) -> float:
    """A mixture of experts on a CPU: more rows read more experts."""
    return 0.010 * (1 + 0.35 * (n * (1 + k)) ** 0.75)


def drafting(n: int, k: int) -> float:
    return 0.001 * max(k, 1) * (1 + 0.1 * n)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_drafts_that_are_always_wrong_cost_next_to_nothing(sequences, seed):
    machine = Machine(cpu, drafting, [0.0] * 4, seed)
    assert machine.run(sequences, 1000) > 0.98, "what it takes to find out included"
    assert machine.run(sequences, 4000) > 0.985


@pytest.mark.parametrize("right", [0.0, 0.5])
def test_trials_whose_steps_take_much_longer_are_paid_in_full(right):
    """As on a small model, where a step with drafts for some of the sequences only is not captured."""
    machine = Machine(lambda n, k: 0.001 * (3.5 if k else 1), lambda n, k: 0.001 * (k > 0), [right] * 4)
    assert machine.run(8, 4000) > 0.98


@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_what_trials_need_is_kept_before_them_and_not_always(sequences):
    machine = Machine(cpu, drafting, [0.0] * 4)
    machine.scatter = lambda: 1.0
    machine.run(sequences, 2000)
    begins = [i for i in range(1, 2000) if machine.chosen[i] and not machine.chosen[i - 1]]
    assert len(begins) > 5 and all(all(machine.kept[max(0, i - RECENT) : i]) for i in begins)
    assert sum(machine.kept) < 0.5 * 2000


@pytest.mark.parametrize("seed", range(3))
def test_drafts_that_are_right_are_made(seed):
    machine = Machine(cpu, drafting, [0.99, 0.9, 0.9, 0.9], seed)
    machine.run(1, 300)
    ideal = max(gain(1, k, machine) for k in range(5))
    assert ideal > 1.5 and machine.run(1, 2000) > 0.95 * ideal


def test_several_drafts_are_tried_where_one_does_not_pay():
    step = lambda n, k: 0.01 * (1.0 if k == 0 else 1.8 + 0.1 * k)
    machine = Machine(step, lambda n, k: 0.002 + 0.0005 * k, [0.98] * 4)
    assert gain(1, 1, machine) < 1 and gain(1, 4, machine) > 1.8
    machine.run(1, 300)
    assert machine.run(1, 1000) > 0.9 * gain(1, 4, machine)


def gain(n: int, k: int, machine: Machine) -> float:
    """What always k drafts would bring, in parts of none."""
    tokens, chain = 1.0, 1.0
    for place in range(k):
        chain *= machine.right[place]
        tokens += chain
    seconds = machine.step(n, k) + (machine.draft(n, k) if k else 0)
    return tokens / seconds * machine.step(n, 0)


def test_each_size_of_batch_has_its_own_number():
    """Here a second row is free for few sequences, and costs as much as the first for many."""
    step = lambda n, k: 0.01 * (1 + max(0, n * (1 + k) - 8) / 8)
    machine = Machine(step, lambda n, k: 0.0005 * max(k, 1), [0.8] * 4)
    for _ in range(30):
        for sequences in (1, 32):
            machine.run(sequences, 40)
    assert gain(1, 4, machine) > 2.5 and max(gain(32, k, machine) for k in (1, 2, 3, 4)) < 1
    machine.chosen.clear()
    assert machine.run(1, 200) > 0.95 * gain(1, 4, machine)
    machine.chosen.clear()
    assert machine.run(32, 200) > 0.97 and machine.chosen.count(None) > 180


def test_a_change_is_noticed():
    machine = Machine(cpu, drafting, [0.0] * 4)
    machine.run(1, 1000)
    machine.right = [0.95, 0.9, 0.9, 0.9]
    machine.run(1, 4000)
    assert machine.run(1, 500) > 0.9 * max(gain(1, k, machine) for k in range(5))
    machine.right = [0.0] * 4
    machine.run(1, 300)
    assert machine.run(1, 1000) > 0.97


def test_what_is_never_measured_is_not_trusted():
    """Drafts that cost more than they bring are found out, and further ones are not tried for long."""
    machine = Machine(lambda n, k: 0.01 * (1 + k), drafting, [0.9] * 4)
    assert machine.run(1, 1000) > 0.97
    assert sum(k is not None and k > 1 for k in machine.chosen) < 30


def test_sizes_are_told_apart_finely_where_they_are_small():
    sizes = [size_of(n) for n in range(1, 300)]
    assert sizes[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9] and sizes == sorted(sizes) and sizes[-1] < 30


def test_prompts_are_prepared_for_where_drafts_pay():
    """With many sequences drafts do not pay, and their prompts' part of the drafter's work is left out."""
    step = lambda n, k: 0.01 * (1 + max(0, n * (1 + k) - 8) / 8)
    machine = Machine(step, lambda n, k: 0.0005 * max(k, 1), [0.8] * 4)
    machine.run(1, 100)
    machine.run(32, 100)
    assert machine.switch.choose(32, prompts=True) is None and machine.switch.choose(1, prompts=True)
    wrong = Machine(step, lambda n, k: 0.0005 * max(k, 1), [0.0] * 4)
    wrong.run(1, 100)
    assert wrong.switch.choose(1, prompts=True) is None and wrong.switch.choose(32, prompts=True) is None


def test_prompts_are_compared_with_answers_as_long_as_they_would_be_without_drafts():
    """What the drafter takes for prompts is less than what drafts save; that the rest is short because of drafts does
    not count against them."""
    machine = Machine(lambda n, k: 0.01 * (1 + 0.01 * k), lambda n, k: 0.002 * k, [0.95] * 4)
    machine.scatter = lambda: 1.0
    machine.run(1, 50)
    for _ in range(40):
        machine.switch.prompted(0.6)
        machine.switch.choose(1, prompts=True)
        machine.switch.drafted(4, 0.15, prompts=True)
        machine.run(1, 8)
    saved = 8 * 4.5 * 0.01 * (1 - 1 / gain(1, 4, machine))
    assert saved > 1.3 * 0.15 and machine.switch.best(1) == 4


def test_the_gain_is_told():
    machine = Machine(cpu, drafting, [0.9] * 4)
    assert machine.switch.gain == 1.0
    machine.run(1, 500)
    assert machine.switch.gain == pytest.approx(gain(1, machine.switch.drafts, machine), rel=0.3)
