"""OpTimes: how long single ops take on this machine, measured with made-up values at the sizes that a model gives them.

A call of an op is described by what decides its time (timed.py:Call): shapes, dtypes, kinds of weights, lengths. Here
such a call is made again, with as many matrices in turn as the model has, up to some times what the processor's cache
holds, so that they come from where the model's come from. Large ones are measured in part and multiplied. Not here:
which calls a model makes (model/cost.py), limits of the machine (Backend.limits).
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import cycle, islice
from time import perf_counter

import torch
from torch import Tensor

from glimmer.backends.base import Backend, ExpertSet, KVCacheSpec
from glimmer.backends.measurements import Measurements
from glimmer.backends.timed import Cache, Call, Lengths, Matrix, Values
from glimmer.batch import Batch
from glimmer.errors import ConfigError
from glimmer.weight import ExpertWeights, Kind, Weight

ROUNDS, LEAST = 5, 2  # measurements, of which the median counts: LEAST where one lasts long
ROUND_SECONDS = 4e-3  # what one lasts: as long as a step, so that what else the machine does delays both alike
MAX_BYTES, MAX_OPERATIONS = 64 << 20, 8e9  # of the weights of one call; what exceeds this is measured in part
COLD = (
    4  # caches full of matrices, in turn, of which none is found there again: of two, a quarter is on some processors
)
FILLING = 10  # rounds that it may last to work with so many copies once: longer, and arithmetic decides, not memory
MAX_CALLS = 4096  # in a round
MAX_OPERAND_BYTES = 4 << 30  # bytes that a call, or what is measured of it, may work with
MAX_ROWS = 4096  # of an embedding's table
PANEL = 32  # rows of a matrix that are never divided

Run = Callable[[], object]


class OpTimes:
    """times(call, weights, captured) -> seconds; ConfigError for sizes that no model has. cache: bytes of the
    processor's cache. kept: what was measured before, by a backend like this one; None: nothing."""

    def __init__(self, backend: Backend, cache: int, kept: Measurements | None = None):
        self._backend, self._cache, self._kept = backend, cache, kept or Measurements()

    @classmethod
    def of(
        cls, backend: Backend, limits: Mapping[str, float] | None, kept: Measurements | None = None
    ) -> "OpTimes | None":
        """Of a backend with these limits (Backend.limits); None where there are none."""
        return None if limits is None else cls(backend, int(limits["cache"]), kept)

    def __call__(self, call: Call, weights: int, captured: bool) -> float:
        """weights: bytes of all of the model's; captured: repeated without Python, as in decoding."""
        key = call, min(weights, COLD * self._cache or 2 * MAX_BYTES), captured and self._backend.captures

        def measure() -> float:
            with torch.inference_mode(), self._backend.running():
                return self._measure(*key)

        return self._kept.get(repr(key), measure)

    def _measure(self, call: Call, working_set: int, captured: bool) -> float:
        part, share = partly(call)
        if (nbytes := operand_bytes(part)) > MAX_OPERAND_BYTES:
            raise ConfigError(
                f"{call.op} on {nbytes / 1e9:,.1f} GB of operands, which shall be measured",
                f"at most {MAX_OPERAND_BYTES / 1e9:.1f} GB: no model of the family needs as much at once",
                "restore the checkpoint's own config.json, or lower max_num_batched_tokens",
            )
        runs: list[Run] = []
        filled = once = 0.0
        while len(runs) < MAX_CALLS and filled <= working_set and once * len(runs) < FILLING * ROUND_SECONDS:
            run, nbytes = self._one(part)
            if not runs:
                run()
                begin = perf_counter()
                run()
                once = perf_counter() - begin
            runs.append(run)
            filled += nbytes or working_set
        calls = len(runs) * max(1, min(MAX_CALLS // len(runs), round(ROUND_SECONDS / once / len(runs))))
        all_of_them = _repeated(self._backend, list(islice(cycle(runs), calls)), captured)
        if calls > 1:
            all_of_them()
        seconds: list[float] = []
        while len(seconds) < ROUNDS and (len(seconds) < LEAST or sum(seconds) < ROUNDS * ROUND_SECONDS):
            begin = perf_counter()
            all_of_them()
            seconds.append(perf_counter() - begin)
        return statistics.median(seconds) / calls / share

    def _one(self, call: Call) -> tuple[Run, int]:
        """The call with operands of its own, and bytes of those that are read from memory."""
        op = getattr(self._backend, call.op)
        if call.op == "experts":
            x, chosen, gate_up, down = call.arguments
            assert isinstance(x, Values) and isinstance(chosen, Values)
            assert isinstance(gate_up, Matrix) and isinstance(down, Matrix)
            ids = (torch.arange(chosen.numel) % gate_up.number).view(chosen.shape)
            experts = self._experts(gate_up, down)
            arguments = (_values(x), ids, torch.rand(chosen.shape), experts)
            return lambda: op(*arguments), experts.nbytes
        if call.op in ("store_kv_", "attention"):
            return self._on_cache(call)
        made = [self._argument(argument) for argument in call.arguments]
        nbytes = sum(each.nbytes for each in made if not isinstance(each, Tensor) and hasattr(each, "nbytes"))
        return lambda: op(*made), nbytes

    def _on_cache(self, call: Call) -> tuple[Run, int]:
        """store_kv_ and attention: with a cache of as many blocks as they need."""
        (spec,) = (each for each in call.arguments if isinstance(each, Cache))
        lengths = next((each for each in call.arguments if isinstance(each, Lengths)), None)
        first = call.arguments[0]
        assert isinstance(first, Values)
        blocks = [-(-n // spec.block_size) for n in ([first.shape[0]] if lengths is None else lengths.seq)]
        wanted = KVCacheSpec(1, spec.block_size, spec.heads, spec.head_dim, spec.dtype)
        (kv,) = self._backend.allocate_kv(wanted, sum(blocks))
        kv.keys.view(torch.uint8).fill_(1), kv.values.view(torch.uint8).fill_(1)
        made: list[object] = []
        for argument in call.arguments:
            if isinstance(argument, Lengths):
                made.append(self._backend.prepare(_batch(argument, blocks)))
            elif isinstance(argument, Cache):
                made.append(kv)
            elif isinstance(argument, Values) and argument.dtype == torch.int64:
                made.append(torch.arange(argument.numel))
            else:
                made.append(self._argument(argument))
        op = getattr(self._backend, call.op)
        return lambda: op(*made), kv.keys.nbytes + kv.values.nbytes

    def _argument(self, argument: object) -> object:
        if isinstance(argument, Values):
            return _values(argument)
        if isinstance(argument, Matrix):
            return self._backend.pack_linear([_weight(argument)], _dtype(argument))
        return argument

    def _experts(self, gate_up: Matrix, down: Matrix) -> ExpertSet:
        half, low = _weight(gate_up._replace(n=gate_up.n // 2)), _weight(down)
        each = (ExpertWeights([half, half], low) for _ in range(gate_up.number))
        return self._backend.pack_experts(each, gate_up.number, _dtype(gate_up))


def partly(call: Call) -> tuple[Call, float]:
    """A call that is no larger than what is measured, and the share of the other one's work that it does."""
    if call.op == "embed":
        tokens, table, first = call.arguments
        assert isinstance(table, Values)
        rows, width = table.shape
        return replace(call, arguments=(tokens, table._replace(shape=(min(rows, MAX_ROWS), width)), first)), 1.0
    if call.op == "linear":
        x, matrix, bias = call.arguments
        assert isinstance(x, Values) and isinstance(matrix, Matrix)
        most = min(MAX_BYTES / matrix.row_bytes, MAX_OPERATIONS / (2 * x.shape[0] * matrix.k))
        n = min(matrix.n, max(PANEL, int(most) // PANEL * PANEL))
        bias = bias._replace(shape=(n,)) if isinstance(bias, Values) else None
        return replace(call, arguments=(x, matrix._replace(n=n), bias)), n / matrix.n
    if call.op == "experts":
        x, chosen, gate_up, down = call.arguments
        assert isinstance(x, Values) and isinstance(chosen, Values)
        assert isinstance(gate_up, Matrix) and isinstance(down, Matrix)
        distinct, record = gate_up.number, gate_up.n * gate_up.row_bytes + down.n * down.row_bytes
        rows_of_each = chosen.numel / distinct
        operations = 2 * rows_of_each * (gate_up.n * gate_up.k + down.n * down.k)
        count = min(distinct, max(1, int(min(MAX_BYTES / record, MAX_OPERATIONS / operations))))
        top_k = min(chosen.shape[1], count)
        rows = max(1, round(rows_of_each * count / top_k))
        made = (
            x._replace(shape=(rows, x.shape[1])), chosen._replace(shape=(rows, top_k)),
            gate_up._replace(number=count), down._replace(number=count),
        )  # fmt: skip
        return replace(call, arguments=made), rows * top_k / chosen.numel
    return call, 1.0


def operand_bytes(call: Call) -> float:
    """Bytes of tensors and matrices among the arguments."""
    tensors = sum(each.numel * each.dtype.itemsize for each in call.arguments if isinstance(each, Values))
    return tensors + sum(each.number * each.n * each.row_bytes for each in call.arguments if isinstance(each, Matrix))


def _repeated(backend: Backend, runs: list[Run], captured: bool) -> Run:
    def all_of_them() -> Tensor:
        for run in runs:
            run()
        return torch.empty(0)

    return backend.capture(all_of_them).replay if captured else all_of_them


def _values(values: Values) -> Tensor:
    if values.dtype == torch.int64:
        return torch.arange(values.numel).view(values.shape) % MAX_ROWS
    return torch.rand(values.shape).to(values.dtype)


def _dtype(matrix: Matrix) -> torch.dtype:
    """In which a matrix is packed."""
    return torch.float32 if matrix.wide else torch.bfloat16


@lru_cache(maxsize=2)  # of a call, of which many copies are packed
def _weight(matrix: Matrix) -> Weight:
    """A matrix with values."""
    made = Weight.empty(
        matrix.kind, (matrix.n, matrix.k), matrix.group_size, dtype=matrix.stored, device="cpu",
        scales_dtype=torch.bfloat16 if Kind(matrix.kind).grouped else torch.float32,
    )  # fmt: skip
    made.codes.view(torch.uint8).fill_(17)
    if made.scales is not None:
        made.scales.fill_(1 / 64)
    if made.zeros is not None:
        made.zeros.fill_(8)
    return made


def _batch(lengths: Lengths, blocks: list[int]) -> Batch:
    tables, first = [], 0
    for count in blocks:
        tables.append(list(range(first, first + count)))
        first += count
    rows = sum(lengths.query)
    return Batch.of(
        tokens=[0] * rows,
        positions=[0] * rows,
        slot_mapping=[0] * rows,
        block_tables=tables,
        logits_indices=[0],
        query_lens=lengths.query,
        seq_lens=lengths.seq,
    )
