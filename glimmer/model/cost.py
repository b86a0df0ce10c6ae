"""Cost: what a model holds and what its steps read and compute, from its shapes alone, and how long that should take.

`Shapes` is the model itself (glm4_moe.py) with matrices that have no values: its steps run on torch's meta device, and
the ops are counted as a profile counts real ones (backends/timed.py). `phases` turns such counts into time by the
limits of a machine; `glimmer plan` and the predictions of `glimmer bench` are both its. Not here: what a machine has
(cli/machine.py), how memory is divided (engine/runner.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from glimmer.backends.base import Backend, ExpertSet, KVCache, KVCacheSpec, Packed, RouteRule
from glimmer.backends.reference import Reference
from glimmer.backends.timed import Call, Cost, Timed
from glimmer.batch import Batch
from glimmer.errors import ConfigError
from glimmer.group import Group
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model.layers import Experts, Layer, LayerWeights
from glimmer.model.load import MAX_EXPERTS
from glimmer.model.names import param_specs
from glimmer.model_config import ModelConfig
from glimmer.weight import GROUP_SIZE, ExpertWeights, Kind, Weight, layout

FEW = 64  # rows up to which each layer draws experts of its own
META = torch.device("meta")

# What Python takes besides, in calls of the smallest op, which are measured: between two ops of a step that is not
# captured, for each step (scheduling, sampling), and for each sequence in it.
BETWEEN, STEP, SEQUENCE = 8, 160, 20

SMALLEST = Call.of("add_", torch.empty(1, 1), torch.empty(1, 1))

Kinds = Callable[[str, Layer, tuple[int, int]], tuple[Kind, int | None]]  # of a matrix: its name, layer, (out, in)


Times = Callable[[Call, int, bool], float]  # backends/op_times.py


def phases(
    cost: Cost, steps: int, limits: Mapping[str, float], weights: int, captured: bool, times: Times | None
) -> dict[str, float]:
    """Seconds that `steps` should take, by what takes them.

    limits: of the machine (Backend.limits). weights: bytes of all of them, which lie in the processor's cache if that
    is large enough. captured: no Python runs between the ops, as in decoding. times: of single ops, None where none can
    be measured: then reads and products take what they would at the limits.
    """
    reads, arithmetic = cost.at_best(dict(limits) | ({"read": limits["cached"]} if weights <= limits["cache"] else {}))
    if times is None:
        return {"memory bandwidth": reads, "arithmetic": arithmetic}
    ops = sum(count * times(call, weights, captured) for call, count in cost.calls.items())
    share, smallest = reads / (reads + arithmetic), times(SMALLEST, 0, False)
    between = 0 if captured else BETWEEN * cost.calls.total()
    python = (between + steps * (STEP + SEQUENCE * cost.sequences)) * smallest
    return {"memory bandwidth": share * ops, "arithmetic": (1 - share) * ops, "calls": python}


def reading(layers: float, chosen: float, hits: float, first: float, further: float) -> float:
    """Seconds in which so many layers read the experts that they lack: chosen and hits as in `with_disk`. first: until
    one is there that is read alone; further: that each other one takes which the layer reads at the same time."""
    some = 1 - float(hits**chosen)  # of the layers: those that lack any
    return layers * (some * first + (chosen * (1 - hits) - some) * further)


def with_disk(
    found: dict[str, float], routed: dict[str, float], disk: float, chosen: float, hits: float
) -> dict[str, float]:
    """`phases` of steps whose experts are read from the disk in so many seconds: while some of them are read, others
    are computed (routed: the phases of these), and nothing else is.

    chosen: distinct experts of a layer in a step; hits: the share of them that is in memory. In a layer where all are,
    nothing is read meanwhile; in others, the last one is computed when it has come.
    """
    whole = sum(routed.values())
    most = whole * (1 - 1 / max(chosen, 1)) * (1 - hits**chosen)
    hidden = min(disk, most) / whole if whole else 0.0
    return {name: value - hidden * routed[name] for name, value in found.items()} | {"disk": disk}


def as_quantized(kind: Kind, group_size: int | None = None) -> Kinds:
    """A model whose matrices are all of one kind, as far as their layers allow it: as loading would quantise it."""

    @cache
    def of(plain: bool, min_bits: int, width: int) -> tuple[Kind, int | None]:
        return (Kind.PLAIN, None) if plain else layout(kind.at_least(min_bits), width, group_size)

    return lambda name, layer, shape: of(layer.plain, layer.min_bits, shape[1])


@dataclass(frozen=True)
class Held:
    """Bytes of weights. record: of one routed expert; count: how many there are; each with the MTP layer's apart."""

    experts: int
    rest: int
    mtp: int
    mtp_experts: int  # of mtp
    count: int
    mtp_count: int

    @property
    def record(self) -> int:
        """Bytes of one expert."""
        return (self.experts + self.mtp_experts) // max(self.count + self.mtp_count, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all, the MTP layer included."""
        return self.experts + self.rest + self.mtp


@dataclass(frozen=True)
class Work:
    """What some steps take on one device: their cost, that of routed experts within it, and how many distinct experts
    their tokens choose, layer by layer, added up."""

    cost: Cost
    routed: Cost
    steps: int
    experts: int


class Shapes:
    """A model without values. kinds: how its matrices are stored; packing: the backend whose layouts they would have;
    mtp as in Glm4Moe; processes: one of so many that share it. Raises ConfigError for more experts than there can be.
    """

    def __init__(
        self,
        config: ModelConfig,
        kinds: Kinds,
        packing: Backend,
        residual: torch.dtype = torch.float32,
        mtp: tuple[bool, bool] | None = None,
        processes: int = 1,
    ):
        layers, experts = config.num_hidden_layers, config.n_routed_experts
        if layers * experts > MAX_EXPERTS:
            raise ConfigError(
                f"config.json: num_hidden_layers={layers} of n_routed_experts={experts}",
                f"at most {MAX_EXPERTS:,} experts in all; the largest model of the family has 14,880",
                "restore the checkpoint's own config.json",
            )
        self.config, self.dtype = config, getattr(torch, config.dtype if config.dtype != "float16" else "bfloat16")
        group, self._outline = _Group(size=processes), Outline(packing)
        self.model = Glm4Moe(config, group, self._outline, residual, mtp).eval()
        held = dict.fromkeys(("experts", "rest", "mtp", "mtp_experts"), 0)
        count = {"experts": 0, "mtp_experts": 0}
        for spec in param_specs(config, group, mtp):
            layer = self.model.get_submodule(spec.layer)
            assert isinstance(layer, Layer)
            dtype = torch.float32 if layer.keep_float32 else self.dtype
            units = [
                [_outline(*kinds(s.name, layer, s.shape), s.local_shape, dtype) for s in unit] for unit in spec.units
            ]
            vectors = [
                torch.empty(length if cut is None else cut[1] - cut[0], dtype=dtype) for _, length, cut in spec.vectors
            ]
            layer.load(LayerWeights(vectors, iter(units), len(units), dtype))
            nbytes = sum(vector.nbytes for vector in vectors)
            nbytes += sum(self._outline.packed_bytes(weight) for unit in units for weight in unit)
            if spec.layer.startswith("mtp."):
                held["mtp"] += nbytes
            else:
                held["experts" if isinstance(layer, Experts) else "rest"] += nbytes
            if isinstance(layer, Experts) and spec.layer.startswith("mtp."):
                held["mtp_experts"], count["mtp_experts"] = nbytes, len(units)
            elif isinstance(layer, Experts):
                count["experts"] += len(units)
        self.held = Held(**held, count=count["experts"], mtp_count=count["mtp_experts"])

    def work(self, spec: KVCacheSpec, tokens: int, context: int, sequences: int = 1, chunk: int = 2048) -> Work:
        """Of `tokens` more of each of some sequences that have `context` already, in steps of at most `chunk` tokens
        of one sequence; the last row of each step gets logits. Experts are chosen evenly."""
        timed = Timed(self._outline, _Names(), lambda: None)
        group = self.model.group
        self.model.use(timed, group)
        steps, self._outline.chosen = 0, 0
        with torch.inference_mode():
            for start in range(context, context + tokens, chunk):
                n = min(chunk, context + tokens - start)
                batch, kv = _batch(spec, start, n, sequences)
                hidden = self.model(batch, kv)
                self.model.logits(hidden[: len(batch.logits_indices)])
                steps += 1
        self.model.use(self._outline, group)
        parts, total, routed = timed.parts(), Cost(), Cost()
        for part in parts.values():
            total.include(part)
        if "experts" in parts:
            routed.include(parts["experts"])
        return Work(total, routed, steps, self._outline.chosen)


@dataclass(frozen=True)
class Shape:
    """Packed matrices without values; dtype: of plain ones."""

    kind: str
    count: int
    n: int
    k: int
    nbytes: int
    dtype: torch.dtype
    group_size: int | None

    @property
    def float32(self) -> bool:
        """Whether results are."""
        return self.kind == Kind.PLAIN and self.dtype == torch.float32


class Outline(Reference):
    """Computes nothing: results have their shapes and no values. Routing draws experts evenly, from a fixed seed, and
    `chosen` counts the distinct ones of each layer."""

    name = "outline"

    def __init__(self, packing: Backend):
        super().__init__(META)
        self.packing, self.chosen = packing, 0
        self._sizes: dict[int, tuple[Weight, int]] = {}  # by id; most Weights are one and the same
        self._draws: dict[int, Tensor] = {}  # by rows: where these are many, one draw is as good as another
        self._generator = torch.Generator().manual_seed(0)

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        return table.new_empty(len(tokens), table.shape[1])

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.new_empty(x.shape, dtype=weight.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.rms_norm(x, weight, eps), residual

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Nothing is added."""

    def swiglu(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), x.shape[1] // 2)

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Nothing is rotated."""

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, Shape)
        return x.new_empty(len(x), weight.n, dtype=weight.dtype if weight.kind == Kind.PLAIN else x.dtype)

    def route(self, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        rows, experts = logits.shape
        ids = self._draws.get(rows)
        if ids is None or rows <= FEW:
            ids = torch.rand(rows, experts, generator=self._generator).topk(rule.top_k).indices
            self._draws[rows] = ids
        self.chosen += len(ids.unique())
        return ids, logits.new_empty(ids.shape)

    def experts(self, x: Tensor, ids: Tensor, scores: Tensor, experts: ExpertSet) -> Tensor:
        return x.new_empty(len(x), experts.down.n, dtype=torch.float32)

    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        """Nothing is stored."""

    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        return q.new_empty(len(q), q.shape[1] * q.shape[2])

    def pack_linear(self, parts: Sequence[Weight], dtype: torch.dtype) -> Packed:
        return self._shape(1, parts, dtype)

    def pack_experts(self, experts: Iterable[ExpertWeights], count: int, dtype: torch.dtype) -> ExpertSet:
        first = next(iter(experts))
        return ExpertSet(self._shape(count, first.gate_up, dtype), self._shape(count, [first.down], dtype))

    def packed_bytes(self, weight: Weight) -> int:
        if id(weight) not in self._sizes:
            self._sizes[id(weight)] = weight, self.packing.packed_bytes(weight)
        return self._sizes[id(weight)][1]

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def _shape(self, count: int, parts: Sequence[Weight], dtype: torch.dtype) -> Shape:
        rows, inner = sum(part.shape[0] for part in parts), parts[0].shape[1]
        nbytes = count * sum(map(self.packed_bytes, parts))
        return Shape(parts[0].kind, count, rows, inner, nbytes, dtype, parts[0].group_size)


@dataclass(frozen=True)
class _Group(Group):
    """Several processes of which only the shapes matter."""

    device: torch.device | None = field(default=META)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        return x.new_empty(len(x), n)


class _Names(dict[int, str]):
    """One name for all matrices."""

    def __missing__(self, key: int) -> str:
        return "linear"


@cache
def _outline(kind: Kind, group_size: int | None, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    if kind is Kind.PLAIN or kind is Kind.FP8:
        return Weight.empty(kind, shape, dtype=dtype)
    return Weight.quantized(kind, shape, group_size or GROUP_SIZE if kind.grouped else None)


def _batch(spec: KVCacheSpec, start: int, n: int, sequences: int) -> tuple[Batch, list[KVCache]]:
    """A step in which each of some sequences computes n tokens from `start` on, and a cache that would hold them."""
    size = spec.block_size
    blocks = -(-(start + n) // size)
    shape = (blocks, size, spec.num_kv_heads, spec.head_dim + (4 if spec.dtype == torch.int8 else 0))
    empty = torch.empty(shape, dtype=spec.dtype, device=META)
    rows = n * sequences
    batch = Batch.of(
        tokens=[0] * rows,
        positions=[0] * rows,
        slot_mapping=[0] * rows,
        block_tables=[[0]] * sequences,
        logits_indices=[n * (s + 1) - 1 for s in range(sequences)],
        query_lens=[n] * sequences,
        seq_lens=[start + n] * sequences,
    )
    return batch, [KVCache(empty, empty, spec.head_dim)] * spec.num_layers
