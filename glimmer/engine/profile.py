"""Profile: where the time of steps goes, what they must read, and what they compute.

While one is open, the model computes with a backend that measures the ops (backends/timed.py) and with a group that
measures the collectives, and the engine's clock measures the rest of each step. Nothing of this exists when no profile
is open. Not here: how any of it is shown (cli/bench.py).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from glimmer import device as devices
from glimmer.backends.op_times import OpTimes
from glimmer.backends.timed import Cost, Timed
from glimmer.engine.engine import Clock, Engine
from glimmer.engine.runner import Runner
from glimmer.group import Group
from glimmer.model.cost import phases, reading, with_disk


class Profile:
    """with Profile(engine) as profile: ... then profile.steps, profile.seconds and profile.parts.

    parts: {name: Cost}, linear layers by their own names, layers added up; they sum up to `seconds`, all of the steps.
    Opened and closed between two steps of the engine.
    """

    def __init__(self, engine: Engine):
        runner = engine.runner
        assert isinstance(runner, Runner), "a profile needs a runner that has a model"
        self._engine, self._runner = engine, runner
        names = {
            id(module.packed): ".".join(part for part in name.split(".") if part != "layers" and not part.isdigit())
            for name, module in runner.model.named_modules()
            if getattr(module, "packed", None) is not None
        }
        packed = (getattr(module, "packed", None) for module in runner.model.modules())
        self._weights = sum(one.nbytes for one in packed if one is not None)
        self.wanted = self.missed = 0  # experts that steps have wanted; and that were on the disk
        self._timed = Timed(runner.backend, names, partial(devices.synchronize, runner.device))
        self._clock = StepClock(self._timed)

    def __enter__(self) -> "Profile":
        engine = self._engine
        self._before = engine.clock
        self._paged_before = self._paged()
        engine.clock = self._clock
        self._runner.model.use(self._timed, timed_group(engine.group, self._timed))
        return self

    def __exit__(self, *_: object) -> None:
        engine = self._engine
        engine.clock = self._before
        wanted, missed = self._paged()
        self.wanted, self.missed = wanted - self._paged_before[0], missed - self._paged_before[1]
        self._runner.model.use(self._runner.backend, engine.group)

    def _paged(self) -> tuple[int, int]:
        paging = self._runner.paging
        return (0, 0) if paging is None else (paging.wanted, paging.missed)

    @property
    def expert_bytes(self) -> int:
        """Of an expert that is read from the disk; 0: none is."""
        paging = self._runner.paging
        return 0 if paging is None else paging.slot_bytes

    @property
    def _layers(self) -> int:
        """Layers with experts that all steps have had."""
        return sum(count for call, count in self.total.calls.items() if call.op == "experts")

    @property
    def steps(self) -> int:
        """How many there were."""
        return self._clock.steps

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(self._clock.seconds.values())

    @property
    def total(self) -> Cost:
        """All parts in one."""
        total = Cost(self.seconds)
        for part in self.parts.values():
            total.include(part)
        return total

    def expected(self, limits: Mapping[str, float], captured: bool) -> float:
        """Seconds that the steps should take on this machine, by the cost model of `glimmer plan`: their ops are
        measured, with values of their own. limits: Backend.limits; where experts were read from the disk,
        limits["first_read"] is how many seconds one takes alone, limits["further_read"] each other one of the same
        layer. captured: if the steps are repeated ones, without Python between their ops."""
        times = OpTimes.of(self._runner.backend, limits)
        found = phases(self.total, self.steps, limits, self._weights, captured, times)
        if self.missed:
            routed = phases(self._timed.parts()["experts"], 0, limits, self._weights, captured, times)
            chosen, hits = self.wanted / self._layers, 1 - self.missed / self.wanted
            disk = reading(self._layers, chosen, hits, limits["first_read"], limits["further_read"])
            found = with_disk(found, routed, disk, chosen, hits)
        return sum(found.values())

    @property
    def parts(self) -> dict[str, Cost]:
        """What each part took, the longest first."""
        parts = {name: part for name, part in self._timed.parts().items() if part.seconds}
        seconds = dict(self._clock.seconds)
        between = seconds.pop("model", 0.0) - sum(part.seconds for part in parts.values())
        parts |= {"between operations": Cost(between)} | {name: Cost(value) for name, value in seconds.items()}
        return dict(sorted(parts.items(), key=lambda item: -item[1].seconds))


class StepClock(Clock):
    """Adds up the seconds of each part of the engine's steps."""

    def __init__(self, timed: Timed):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._timed = timed
        self._last = 0.0

    def begin(self) -> None:
        self._timed.synchronize()
        self._last = perf_counter()

    def lap(self, part: str) -> None:
        self._timed.synchronize()
        now = perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def end(self) -> None:
        self.steps += 1


class _TimedGroup(Group):
    """A group whose collectives are measured."""

    timed: Timed

    def all_reduce(self, x: Tensor) -> Tensor:
        with self.timed.measure("collectives"):
            return super().all_reduce(x)

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        with self.timed.measure("collectives"):
            return super().all_gather(x, n)


def timed_group(group: Group, timed: Timed) -> Group:
    """The same ranks; a group of one has no collectives to measure."""
    if group.size == 1:
        return group
    own: dict[str, Any] = {field.name: getattr(group, field.name) for field in fields(group)}
    made = _TimedGroup(**own)
    object.__setattr__(made, "timed", timed)
    return made
