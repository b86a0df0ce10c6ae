"""Switch: how many drafts pay, found out while the engine runs, down to none.

With k drafts for each of n sequences, a step takes T(n, k) seconds, drafting D(n, k), and it brings each sequence
E(k) = 1 + p1 + p1 p2 + ... + p1 ... pk tokens, where pi is the share of drafts at place i that are accepted when those
before them are. The k with the most tokens per second is used; E(k) / (T + D) must exceed 1 / T(n, 0) by MARGIN.

All of it is measured. Of the latest few times of each kind the low quartile counts: where other programs take the CPU
away now and then, steps that were not interrupted are compared. What is not in use is probed: beside k, its neighbours
once in PROBE steps. Where no drafts pay, trials of TRIAL drafts find out whether that has changed; they are paid from a
budget, a share BUDGET of the time of all steps, so that engines whose drafts are always wrong lose no more than that.
Times decide how fast answers come, never what they are.
Not here: who guesses (draft.py), several ranks (speculation.py: rank 0 asks here, and tells the others).
"""

import math
from collections import defaultdict, deque

WINDOW = 12  # times of each kind of step that count
MEMORY = 128  # drafts at each place that count, about
ACCEPTED, SEEN = 2.0, 2.5  # what is believed of drafts that have not been tried
MARGIN = 1.1  # drafts must gain that much: what is measured of two parts of a step is a little less than the whole
PROBE = 32  # steps between two probes
KNOWN = 3  # times that suffice to compare one kind of step with another
REST = 7  # steps without drafts between two decisions
BUDGET = 0.005  # share of the time that trials may take
TRIAL = 8  # drafts of a trial
TRIAL_STEPS = 40  # steps that it lasts at most: guesses may have to wait for the beginning of a block
PARTLY = 0.25  # share of the sequences that must have drafts in a step whose time counts
DOUBT = 4.0  # drafts that earlier ones count for when a trial begins


class Times:
    """The latest few times of one kind of step. `known`: they are enough to be compared."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._count = 0

    def add(self, seconds: float) -> None:
        """One more; the very first is left out, in which more than the step itself may be done."""
        self._count += 1
        if self._count > 1:
            self._latest.append(seconds)

    @property
    def known(self) -> bool:
        return len(self._latest) >= KNOWN

    @property
    def seconds(self) -> float:
        """The low quartile; 0 if there is none yet."""
        return sorted(self._latest)[len(self._latest) // 4] if self._latest else 0.0


class Switch:
    """most: the largest number of drafts.

    `drafts` is what was chosen last: that many for each sequence; 0: none, but what the next ones need is kept up to
    date; None: none, and nothing is kept.
    """

    def __init__(self, most: int):
        self.most = most
        self.drafts: int | None = None
        self._accepted, self._seen = [ACCEPTED] * most, [SEEN] * most
        self._steps: defaultdict[tuple[int, int], Times] = defaultdict(Times)  # by (size of the batch, drafts)
        self._drafting: defaultdict[tuple[int, int], Times] = defaultdict(Times)
        self._rest = 0  # steps for which it stays decided that no drafts are made
        self._sequences = self._size = 0  # of the batch for which `drafts` were chosen
        self._turns: defaultdict[int, int] = defaultdict(int)  # by size: steps since drafts pay
        self._budget = 0.0  # seconds
        self._trial, self._trial_steps = 0, 0  # drafts and steps that are left of a trial

    def rests(self, sequences: int) -> bool:
        """Whether no drafts are made, and it stays so for a step: it needs not be told of the latest one."""
        if self.drafts is not None or not self._rest or sequences != self._sequences:
            return False
        self._rest -= 1
        return True

    def stepped(self, sequences: int, drafts: list[tuple[int, int]], seconds: float) -> None:
        """A step in which each sequence had one known token. drafts: (checked, accepted) of each."""
        size, checked = size_of(sequences), sum(n for n, _ in drafts)
        used = min(self.most, -(-checked // sequences))
        plain, times = self._steps[size, 0], self._steps[size, used]
        covered = checked / (used * sequences) if used else 1.0
        if covered == 1:
            times.add(seconds)
        elif covered >= PARTLY and plain.known:  # as if all of them had had drafts
            times.add(plain.seconds + max(0.0, seconds - plain.seconds) / covered)
        self._budget += BUDGET * seconds * (1 if self.drafts is not None else 1 + REST)
        if self._trial_steps:
            self._trial -= checked
            self._trial_steps = 0 if self._trial <= 0 else self._trial_steps - 1
            gained = sum(accepted for _, accepted in drafts) / sequences * plain.seconds
            self._budget -= max(0.0, seconds - plain.seconds - gained) if used else 0.0

    def checked(self, drafts: int, accepted: int) -> None:
        """So many drafts of a sequence were checked, and so many of them accepted."""
        for i in range(min(drafts, accepted + 1)):
            self._accepted[i] = self._accepted[i] * (1 - 1 / MEMORY) + (i < accepted)
            self._seen[i] = self._seen[i] * (1 - 1 / MEMORY) + 1

    def drafted(self, made: int, seconds: float) -> None:
        """Drafting, as was chosen last, has made so many drafts for each sequence, and has taken so long."""
        if self.drafts is not None:
            if made == self.drafts:
                self._drafting[self._size, made].add(seconds)
            if self._trial_steps:
                self._budget -= seconds

    def choose(self, sequences: int, prompts: bool = False) -> int | None:
        """How many drafts to make for each of so many sequences: see `drafts`. prompts: some have just been computed;
        what drafts need of them is kept where drafts would pay for one sequence alone."""
        size = size_of(sequences)
        self._sequences, self._size, self._rest = sequences, size, REST
        self.drafts = self._choose(size, sequences)
        if self.drafts is None and prompts and self.best(1) > 0:
            self.drafts = 0
        return self.drafts

    def _choose(self, size: int, sequences: int) -> int | None:
        if self._trial_steps:
            return 1
        best = self.best(size)
        if best == 0:
            cost = self._trial_cost(size, sequences)
            if self._steps[size, 0].known and self._budget >= cost:
                self._begin_trial()
                return 1
            self._budget = min(self._budget, cost)
            return None
        around = [k for k in (best, best - 1, best + 1) if k <= self.most]
        for k in around:
            if not self._steps[size, k].known:
                return k
        self._turns[size] += 1
        probe, late = divmod(self._turns[size], PROBE)
        return best if late else around[1 + probe % (len(around) - 1)]

    @property
    def gain(self) -> float:
        """Tokens per second with what was chosen last, in parts of those without drafts, as far as is known."""
        known = [k for k in range(self.most + 1) if self._steps[self._size, k].known]
        if not self.drafts or not known:
            return 1.0
        rates = self._rates(self._size, known, self.drafts)
        return rates[self.drafts] / rates[0]

    def best(self, size: int) -> int:
        """The number of drafts with the most tokens per second, as far as is known."""
        known = [k for k in range(self.most + 1) if self._steps[size, k].known]
        if not known:
            return int(self.share(0) >= 0.5)
        rates = self._rates(size, known, min(self.most, known[-1] + 1))
        best = max(range(len(rates)), key=lambda k: rates[k])
        return best if rates[best] >= MARGIN * rates[0] else 0

    def share(self, place: int) -> float:
        """Of the drafts at a place (from 0) before which all were accepted, the share that is accepted."""
        return self._accepted[place] / self._seen[place]

    def _rates(self, size: int, known: list[int], last: int) -> list[float]:
        """Tokens per second with 0, 1, ..., last drafts. A step with more drafts takes no less time, and what one has
        taken that was never measured is estimated from those with fewer."""
        rates, tokens, chain = [], 1.0, 1.0
        step, more, drafting = self._steps[size, known[0]].seconds, 0.0, 0.0
        for k in range(last + 1):
            if k in known:
                seconds = max(step, self._steps[size, k].seconds)
                more, step = (seconds - step if k > known[0] else 0.0), seconds
            elif k > known[-1]:
                step += more
            if k > 0:
                chain *= self.share(k - 1)
                tokens += chain
                times = self._drafting[size, k]
                drafting = max(drafting, times.seconds) if times.known else drafting * k / max(1, k - 1)
            rates.append(tokens / (step + drafting))
        return rates

    def _trial_cost(self, size: int, sequences: int) -> float:
        """Seconds that a trial loses if all of its drafts are wrong."""
        plain, one = self._steps[size, 0].seconds, self._steps[size, 1]
        extra = one.seconds - plain if one.known else 0.5 * plain
        return max(1.0, TRIAL / sequences) * max(extra + self._drafting[size, 1].seconds, 0.1 * plain)

    def _begin_trial(self) -> None:
        """Earlier drafts count little from now on, so that a few tell whether they pay again."""
        self._trial, self._trial_steps = TRIAL, TRIAL_STEPS
        scale = min(1.0, DOUBT / self._seen[0])
        self._accepted[0], self._seen[0] = self._accepted[0] * scale, self._seen[0] * scale


def size_of(sequences: int) -> int:
    """Batches that are told apart: each up to 8 sequences, and beyond in steps of a quarter."""
    return sequences if sequences <= 8 else 8 + math.ceil(math.log(sequences / 8, 1.25))
