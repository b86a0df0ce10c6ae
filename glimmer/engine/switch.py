"""Switch: how many drafts pay, found out while the engine runs, down to none.

With k drafts for each of n sequences, a step takes T(n, k) seconds, drafting D(n, k), and it brings each sequence
E(k) = 1 + p1 + p1 p2 + ... + p1 ... pk tokens, where pi is the share of drafts at place i that are accepted when those
before it are. The k with the most tokens per second is used; E(k) / (T + D) must exceed 1 / T(n, 0) by MARGIN, and by
what the drafter takes for prompts.

All of it is measured. Of the latest few times of each kind the low quartile counts: where other programs take the CPU
away now and then, steps that were not interrupted are compared. A size of batch that has not been measured goes by the
nearest one that has, if that is not far. What is not in use is probed: beside k, its neighbours once in PROBE steps.

Where no drafts pay, or nothing is known yet, trials find out: one draft for each sequence, and as long as all of them
are accepted, twice as many in the next step. What they lose, drafting and slower steps less the tokens that they bring,
is paid from a budget that all sizes share: the time of START steps, and a share BUDGET of the time of all steps. A
trial ends when the budget is used up and a draft is wrong, and the next one begins when there is enough for another
step whose drafts are all wrong; so engines whose drafts are always wrong lose no more than the budget. Where all are
accepted, it goes on until enough is known. Times decide how fast answers come, never what they are.
Not here: who guesses (draft.py), several ranks (speculation.py: rank 0 asks here, and tells the others).
"""

import math
from bisect import bisect_left
from collections import defaultdict, deque

WINDOW = 12  # times of each kind of step that count
MEMORY = 128  # drafts at each place that count, about
ACCEPTED, SEEN = 2.0, 2.5  # what is believed of drafts that have not been tried
MARGIN = 1.1  # drafts must gain that much: what is measured of two parts of a step is a little less than the whole
PROBE = 32  # steps between two probes
KNOWN = 3  # times that suffice to compare one kind of step with another
NEAR = 2.0  # how many times as many sequences a batch may have that another one goes by
SETTLED = 8  # steps for which the best number stays decided
REST = 7  # steps without drafts between two decisions
START, BUDGET = 1.0, 0.005  # what trials may take: steps, and a share of the time
# Steps that one of a trial loses at most, beside one for each draft of a sequence: beyond, it is disturbed. A step in
# which only some sequences have drafts is not captured, and may take three times as long as another one.
MAX_LOSS = 3.0
TRIAL = 8  # drafts of a trial that tell enough
TRIAL_STEPS = 40  # steps that it lasts at most: guesses may have to wait for the beginning of a block
PARTLY = 0.25  # share of the sequences that must have drafts in a step whose time counts
LATE = 512  # steps that count where prompts are compared with what follows them, about
DOUBT = 4.0  # drafts that earlier ones count for when a trial begins


class Times:
    """The latest few times of one kind of step. `known`: they are enough to be compared."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._begun = self._exact = False

    def add(self, seconds: float) -> None:
        """One more; the very first is left out, in which more than the step itself may be done."""
        if self._begun and not self._exact:
            self._exact = True
            self._latest.clear()
        if self._begun:
            self._latest.append(seconds)
        self._begun = True

    def estimate(self, seconds: float) -> None:
        """One that was not measured itself: it counts as long as none is that was."""
        if not self._exact:
            self._latest.append(seconds)

    @property
    def known(self) -> bool:
        return len(self._latest) >= KNOWN

    @property
    def seconds(self) -> float:
        """The low quartile; 0 if there is none yet."""
        return sorted(self._latest)[len(self._latest) // 4] if self._latest else 0.0


class Switch:
    """most: the largest number of drafts. recent: of so many steps before drafts the drafter keeps something.

    `drafts` is what was chosen last: that many for each sequence; 0: none, but what the next ones need is kept up to
    date; None: none. `keeps`: where there are none, whether they may be wanted within `recent` steps.
    """

    def __init__(self, most: int, recent: int = 0):
        self.most, self.recent = most, recent
        self.drafts: int | None = None
        self.keeps = True
        self._accepted, self._seen = [ACCEPTED] * most, [SEEN] * most
        self._steps: defaultdict[tuple[int, int], Times] = defaultdict(Times)  # by (size of the batch, drafts)
        self._drafting: defaultdict[tuple[int, int], Times] = defaultdict(Times)
        self._rest = self._rested = 0  # steps for which it stays decided that no drafts are made, and that have been
        self._sequences = self._size = 0  # of the batch for which `drafts` were chosen
        self._turns: defaultdict[int, int] = defaultdict(int)  # by size: steps since drafts pay
        self._best: dict[int, int] = {}  # by size, as it was found latest
        self._budget = -math.inf  # seconds; as long as no time is known, none
        self._loss = 1.0  # steps that are lost by one whose drafts are all wrong, as far as is known
        self._spent = 0.0  # seconds of drafting for the next step of a trial
        self._tries = 1  # drafts for each sequence in the next step of a trial
        self._trial, self._trial_steps = 0, 0  # drafts that have been checked in a trial, steps that are left of it
        # Seconds of late steps with prompts, and those that the other tokens would have taken without drafts.
        self._prompting, self._decoding = 0.0, 0.0
        self._prompt = 0.0  # seconds of the latest step with prompts
        self._prompt_share = 0.0  # what drafting takes of a step with prompts, in parts of it

    def rests(self, sequences: int) -> bool:
        """Whether no drafts are made, and it stays so for a step: it needs not be told of the latest one."""
        if self.drafts is not None or self._trial_steps or not self._rest or sequences != self._sequences:
            return False
        self._rest -= 1
        self._rested += 1
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
            times.estimate(plain.seconds + max(0.0, seconds - plain.seconds) / covered)
        if self._budget == -math.inf and plain.known:
            self._budget = START * plain.seconds
        tokens = 1 + sum(n for _, n in drafts) / sequences + self._rested
        self._passed(seconds * (1 + self._rested), 0.0, tokens * (plain.seconds if plain.known else seconds))
        self._rested = 0
        if self._trial_steps:
            self._tried(drafts, seconds, plain)

    def prompted(self, seconds: float) -> None:
        """A step with tokens of prompts."""
        self._passed(seconds, seconds, 0.0)
        self._prompt = seconds

    def checked(self, drafts: int, accepted: int) -> None:
        """So many drafts of a sequence were checked, and so many of them accepted."""
        for i in range(min(drafts, accepted + 1)):
            self._accepted[i] = self._accepted[i] * (1 - 1 / MEMORY) + (i < accepted)
            self._seen[i] = self._seen[i] * (1 - 1 / MEMORY) + 1

    def drafted(self, made: float, seconds: float, prompts: bool = False) -> None:
        """Drafting, as was chosen last, has made so many drafts for each sequence on average, and has taken so long.
        prompts: after a step with tokens of prompts. It counts only on rank 0, where something is chosen."""
        if self.drafts is None:
            return
        if prompts:
            self._prompt_share += 0.25 * (seconds / self._prompt - self._prompt_share)
        elif self.drafts and made >= 0.5 * self.drafts:
            self._drafting[self._size, self.drafts].add(seconds)
        self._spent = seconds

    def choose(self, sequences: int, prompts: bool = False) -> int | None:
        """How many drafts to make for each of so many sequences: see `drafts`. prompts: some have just been computed;
        what drafts need of them costs time too, which trials do not spend."""
        size = size_of(sequences)
        self._sequences, self._size = sequences, size
        self._rest = REST if self._steps[size, 0].known else 0
        self.drafts = self._choose(size, prompts)
        self.keeps = self._trial_steps > 0 or any(self._best.values()) or self._expects_trial(size)
        return self.drafts

    def _choose(self, size: int, prompts: bool) -> int | None:
        best = self._best.get(size)
        if not best or self._turns[size] % SETTLED == 0:
            best = self._best[size] = self.best(size)
        if self._trial_steps:
            return None if prompts else self._tries
        if best == 0:
            return 1 if not prompts and self._begins_trial(size) else None
        self._turns[size] += 1
        for k in (best, 0):
            if not self._steps[size, k].known:
                return k
        probe, late = divmod(self._turns[size], PROBE)
        around = [k for k in (best - 1, best + 1) if k <= self.most]
        return best if late else around[probe % len(around)]

    @property
    def gain(self) -> float:
        """Tokens per second with what was chosen last, in parts of those without drafts, as far as is known."""
        measured = self._measured(self._size)
        if not self.drafts or measured is None:
            return 1.0
        rates = self._rates(measured, self.drafts)
        return rates[self.drafts] / rates[0]

    def best(self, size: int) -> int:
        """The number of drafts with the most tokens per second, as far as is known; 0 if nothing is."""
        measured = self._measured(size)
        if measured is None:
            return 0
        rates = self._rates(measured, min(self.most, self._known(measured)[-1] + 1))
        best = max(range(len(rates)), key=lambda k: rates[k])
        prompts = self._prompt_share * self._prompting / self._decoding if self._decoding else 0.0
        return best if rates[best] >= (MARGIN + prompts) * rates[0] else 0

    def share(self, place: int) -> float:
        """Of the drafts at a place (from 0) before which all were accepted, the share that is accepted."""
        return self._accepted[place] / self._seen[place]

    def _known(self, size: int) -> list[int]:
        """The numbers of drafts, 0 among them, that have been measured with batches of a size; none without any."""
        if not self._steps[size, 0].known:
            return []
        drafts = range(1, self.most + 1)
        some = [k for k in drafts if self._steps[size, k].known and self._drafting[size, k].known]
        return [0, *some] if some else []

    def _measured(self, size: int) -> int | None:
        """The size, or the nearest one, with which steps with drafts and without have been measured."""
        near = [other for other in {n for n, _ in self._steps} if _ratio(size, other) <= NEAR and self._known(other)]
        return min(near, key=lambda other: _ratio(size, other), default=None)

    def _rates(self, size: int, last: int) -> list[float]:
        """Tokens per second with 0, 1, ..., last drafts. A step with more drafts takes no less time; what one has taken
        that was never measured lies on a line through its neighbours."""
        known = self._known(size)
        steps = [self._steps[size, k].seconds for k in known]
        drafting = [self._drafting[size, k].seconds if k else 0.0 for k in known]
        rates, tokens, chain, slowest = [], 1.0, 1.0, 0.0
        for k in range(last + 1):
            if k > 0:
                chain *= self.share(k - 1)
                tokens += chain
            slowest = max(slowest, _line(known, steps, k) + _line(known, drafting, k))
            rates.append(tokens / slowest)
        return rates

    def _passed(self, seconds: float, prompting: float, decoding: float) -> None:
        """Time that counts: as a source of the budget while drafts do not pay, and to compare prompts with the rest."""
        if self.drafts is None or self._trial_steps:
            self._budget += BUDGET * seconds
        self._prompting += prompting - self._prompting / LATE
        self._decoding += decoding - self._decoding / LATE

    def _cost(self, plain: float) -> float:
        """Seconds that a step of a trial may lose, where one without drafts takes `plain`."""
        return max(0.1, self._loss - self.share(0)) * plain

    def _expects_trial(self, size: int) -> bool:
        """Whether a trial may begin within `recent` steps after the next decision."""
        plain = self._steps[size, 0]
        soon = BUDGET * (self.recent + REST + 1) * plain.seconds
        return not plain.known or self._budget + soon >= self._cost(plain.seconds)

    def _begins_trial(self, size: int) -> bool:
        """Begin a trial if the budget lasts for a step of it; earlier drafts count little from then on, so that a few
        tell whether they pay again."""
        plain = self._steps[size, 0]
        cost = self._cost(plain.seconds)
        if not plain.known or self._budget < cost:
            return False
        self._budget = min(self._budget, max(cost, START * plain.seconds))
        self._trial, self._trial_steps, self._tries = 0, TRIAL_STEPS, 1
        scale = min(1.0, DOUBT / self._seen[0])
        self._accepted[0], self._seen[0] = self._accepted[0] * scale, self._seen[0] * scale
        return True

    def _tried(self, drafts: list[tuple[int, int]], seconds: float, plain: Times) -> None:
        """See `stepped`; a step of a trial, where steps without drafts take `plain`."""
        checked, accepted = sum(n for n, _ in drafts), sum(n for _, n in drafts)
        self._trial_steps -= 1
        if not checked:  # the drafter has computed what its first drafts need
            self._budget -= self._spent
            return
        if not plain.known:  # the size of the batch has changed
            self._budget, self._trial_steps = self._budget - seconds, 0
            return
        loss = min(MAX_LOSS + checked / len(drafts), (seconds + self._spent) / plain.seconds - 1)
        if checked <= len(drafts):
            self._loss += 0.5 * (loss - self._loss)
        self._budget -= (loss - accepted / len(drafts)) * plain.seconds
        self._trial += checked
        self._tries = min(self.most, 2 * self._tries) if accepted == checked else max(1, round(accepted / len(drafts)))
        enough = self._trial >= TRIAL and self._measured(self._size) is not None
        if (self._budget <= 0 and accepted < checked) or enough:
            self._trial_steps = 0
            self._best.clear()


def _line(known: list[int], seconds: list[float], k: int) -> float:
    """The value at k of the line through the points (known, seconds) next to it."""
    i = max(1, min(bisect_left(known, k), len(known) - 1))
    (a, b), (first, second) = known[i - 1 : i + 1], seconds[i - 1 : i + 1]
    return first + (second - first) * (k - a) / (b - a)


def size_of(sequences: int) -> int:
    """Batches that are told apart: each up to 8 sequences, and beyond in steps of a quarter."""
    return sequences if sequences <= 8 else 8 + math.ceil(math.log(sequences / 8, 1.25))


def _ratio(one: int, other: int) -> float:
    """How many times as many sequences the larger one of two sizes has."""
    few, many = sorted(size if size <= 8 else 8 * 1.25 ** (size - 8) for size in (one, other))
    return many / few
