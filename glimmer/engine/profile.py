"""Profile: where the time of steps goes, what they must read, and what they compute.

While one is open, the ops of Ops, the collectives, the sampler and the steps themselves are timed, and the arguments
of each call tell its work: bytes of weights and cache that it cannot do without (of experts, those that a token has
chosen), and operations, a multiplication and an addition being two. Steps are not recorded meanwhile (capture.py): what
Python does between the ops is in sight. Nothing of this exists when no profile is open.
Not here: what the machine could do at best (Ops.limits), and how any of it is shown (bench.py).
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch

from glimmer import device as devices
from glimmer.batch import Batch
from glimmer.engine.engine import Engine

# Which of Ops.limits() holds for products of a kind. float32 has no limit of its own there: it is not counted.
ARITHMETIC = {"bfloat16": "bfloat16", "fp8": "bfloat16", "int8": "int8", "int4": "int8"}


@dataclass
class Part:
    """What one part of the steps took: seconds, bytes read at least, operations by the limit that holds for them."""

    seconds: float = 0.0
    nbytes: int = 0
    operations: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, nbytes: int, kind: str, operations: int) -> None:
        self.nbytes += nbytes
        if kind in ARITHMETIC:
            self.operations[ARITHMETIC[kind]] += operations

    def at_best(self, limits: dict[str, float]) -> tuple[float, float]:
        """Seconds that its reads, and that its operations would take alone at the machine's limits (Ops.limits)."""
        return self.nbytes / limits["read"], sum(n / limits[kind] for kind, n in self.operations.items())


class Profile:
    """with Profile(engine) as profile: ... then profile.steps, profile.seconds and profile.parts.

    parts: {name: Part}, linear layers by their own names, layers added up; they sum up to `seconds`, all of the steps.
    """

    def __init__(self, engine: Engine):
        self._engine, self._undo = engine, ExitStack()
        self._timed: defaultdict[str, Part] = defaultdict(Part)
        self._chosen: list[tuple[torch.Tensor, Any, Any]] = []  # by experts, of which only the distinct ones are read
        self.steps = 0

    def __enter__(self) -> "Profile":
        engine, runner = self._engine, self._engine.runner
        modules = list(runner.model.named_modules())
        self._names = {
            id(module.packed): ".".join(part for part in name.split(".") if part != "layers" and not part.isdigit())
            for name, module in modules
            if getattr(module, "packed", None) is not None
        }
        ops = {op: self._op(op, getattr(runner.ops, op)) for op, _ in runner.ops.table()}
        metered = replace(runner.ops, **ops, record=None)  # a recorded step would pass by the ops
        for _, module in modules:
            if getattr(module, "ops", None) is runner.ops:
                self._set(module, "ops", metered)
        if engine.group.size > 1:
            for name in ("all_reduce", "all_gather"):
                self._set(engine.group, name, self._watched("collectives", getattr(engine.group, name)))
        self._set(runner, "forward", self._watched("model", runner.forward))
        self._set(engine.sampler, "sample", self._watched("sampler", engine.sampler.sample))
        self._set(engine, "step", self._watched("step", self._counted(engine.step)))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self._timed["step"].seconds

    @property
    def total(self) -> Part:
        """All parts in one."""
        total = Part(self.seconds)
        for part in self.parts.values():
            total.nbytes += part.nbytes
            for kind, operations in part.operations.items():
                total.operations[kind] += operations
        return total

    @property
    def parts(self) -> dict[str, Part]:
        """What each part took, the longest first."""
        for ids, *matrices in self._chosen:
            for packed in matrices:
                share = len(ids.unique()) / _matrix(packed)[0]
                self._timed["experts"].nbytes += int(share * _matrix(packed)[3])
        self._chosen.clear()
        parts = {name: part for name, part in self._timed.items() if part.seconds}
        step, model, sampler = (parts.pop(name, Part()) for name in ("step", "model", "sampler"))
        parts["between operations"] = Part(model.seconds - sum(part.seconds for part in parts.values()))
        parts["sampler"] = sampler
        parts["scheduler, batch"] = Part(step.seconds - model.seconds - sampler.seconds)
        return dict(sorted(parts.items(), key=lambda item: -item[1].seconds))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Until the profile is closed. `vars`: some owners are frozen, and modules have ideas of their own."""
        vars_, before = vars(owner), vars(owner).get(name)
        self._undo.callback(lambda: vars_.pop(name) if before is None else vars_.update({name: before}))
        vars_[name] = value

    def _counted(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def counted() -> Any:
            self.steps += 1
            return step()

        return counted

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        part, device = self._timed[name], self._engine.runner.device

        def watched(*args: Any) -> Any:
            devices.synchronize(device)
            begin = perf_counter()
            result = call(*args)
            devices.synchronize(device)
            part.seconds += perf_counter() - begin
            return result

        return watched

    def _op(self, op: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if op != "linear":
            timed = self._watched(op, call)
            count = {"attention": self._attention, "experts": self._experts}.get(op)
        else:
            by_name: dict[str, Callable[..., Any]] = {}

            def timed(x: Any, packed: Any, *rest: Any) -> Any:
                name = self._names[id(packed)]
                if name not in by_name:
                    by_name[name] = self._watched(name, call)
                return by_name[name](x, packed, *rest)

            count = self._linear
        if count is None:
            return timed

        def both(*args: Any) -> Any:
            result = timed(*args)
            count(result, *args)
            return result

        return both

    def _linear(self, y: torch.Tensor, x: torch.Tensor, packed: Any, *_: Any) -> None:
        _, n, k, nbytes, kind = _matrix(packed)  # y is float32 where the weights are
        self._timed[self._names[id(packed)]].add(nbytes, _kind(kind, y), 2 * len(x) * n * k)

    def _experts(self, _: Any, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, *matrices: Any) -> None:
        for packed in matrices:
            _, n, k, _, kind = _matrix(packed)
            self._timed["experts"].add(0, _kind(kind, x), 2 * ids.numel() * n * k)
        self._chosen.append((ids.clone(), *matrices))

    def _attention(self, _: Any, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, *__: Any):
        a_key = (keys.nbytes + values.nbytes) // (keys.shape[0] * keys.shape[1])
        rows = [stop - start for start, stop in zip(batch.query_start_loc, batch.query_start_loc[1:])]
        pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(rows, batch.seq_lens))
        kind = str(q.dtype).removeprefix("torch.")
        self._timed["attention"].add(sum(batch.seq_lens) * a_key, kind, 4 * q.shape[1] * q.shape[2] * pairs)


def _matrix(packed: Any) -> tuple[int, int, int, int, str]:
    """(count, n, k, bytes of all, kind) of what pack_linear or pack_experts of any backend has made."""
    if isinstance(packed, list):
        (n, k), nbytes = packed[0].shape, sum(weight.nbytes for weight in packed)
        return len(packed), n, k, nbytes, packed[0].kind
    n, k = packed.shape if hasattr(packed, "shape") else (packed.n, packed.k)
    return getattr(packed, "count", 1), n, k, packed.nbytes, packed.kind


def _kind(kind: str, values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.") if kind == "plain" else kind
