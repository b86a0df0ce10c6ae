"""Planning: in which forms a model fits a machine, where it lies there, how fast it should be, and what to choose.

From headers, or from config.json alone; no weight is read. Not here: how a plan is shown (plan.py), counting
(model/cost.py), measuring the machine (machine.py).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glimmer import device as devices
from glimmer.backends import selection
from glimmer.backends.base import Backend, KVCacheSpec
from glimmer.backends.reference import Reference
from glimmer.checkpoint import formats, packed_file
from glimmer.checkpoint.files import INDEX, Checkpoint
from glimmer.cli.machine import Machine
from glimmer.config import EngineConfig
from glimmer.engine.runner import activation_bytes, divide_paged, least_cache, resolve_dtype
from glimmer.errors import CheckpointError, ConfigError
from glimmer.model.cost import META, Kinds, Shapes, Work, as_quantized, phases, reading, with_disk
from glimmer.model.experts import STATS, counted
from glimmer.model.layers import Layer
from glimmer.model.names import mtp_prefix, tensor_parallel_sizes
from glimmer.model_config import ModelConfig
from glimmer.weight import GROUP_SIZE, Kind

PROMPT, CONTEXT = 512, 512  # tokens of the prompt, and before the decoding step, for which speeds are told
ROOM = 8192  # tokens of context below which nothing is recommended, unless --max-model-len asks for fewer
READING = 8.0  # tokens/s: about as fast as one reads. Below it speed counts more than bits
NAMES = {Kind.PLAIN: "bf16", Kind.FP8: "fp8", Kind.INT8: "int8", Kind.INT4: "int4"}
DISK = "disk"


@dataclass(frozen=True)
class Stored:
    """What a model's directory holds. kind: of its experts; kinds: of each matrix; mtp: as in Glm4Moe; complete:
    whether headers of all matrices are there; notes: what a reader should know."""

    kind: Kind
    kinds: Kinds
    mtp: tuple[bool, bool] | None
    complete: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """tokens/s, and what takes the time: {"memory bandwidth": seconds, "arithmetic": ..., "disk": ...} of one step or
    prompt."""

    rate: float
    seconds: dict[str, float]

    @property
    def limit(self) -> str:
        """What takes most of it."""
        return max(self.seconds, key=lambda name: self.seconds[name])


@dataclass(frozen=True)
class Candidate:
    """One form of a model on one machine. available: it can be made of what is stored; as_stored: it is that. needed:
    bytes of memory of one process with all of it in memory, and room for `least` tokens; paged: the same with its
    experts on the disk, None where they cannot be.

    where: "memory", "disk" (experts), or None where it does not fit; the rest is None or zero then. hits: the share of
    chosen experts that are in memory; counted: as earlier runs have counted choices, else choices are even.
    """

    kind: Kind
    available: bool
    as_stored: bool
    needed: int
    paged: int | None
    least: int
    where: str | None = None
    mtp: bool = False
    cache: int = 0
    context: int = 0
    slots: int = 0
    experts: int = 0
    hits: float = 1.0
    counted: bool = False
    prefill: Speed | None = None
    decode: Speed | None = None

    @property
    def name(self) -> str:
        """bf16, fp8, int8 or int4."""
        return NAMES[self.kind]


class Planner:
    """Plans one model. Raises what ModelConfig.load raises, and ConfigError for what no machine could hold."""

    def __init__(self, directory: Path, engine: EngineConfig):
        self.directory, self.engine, self.config = directory, engine, ModelConfig.load(directory)
        longest, asked = self.config.context, self.engine.max_model_len
        if asked is not None and asked > longest:
            raise ConfigError(f"max_model_len={asked}", f"at most {longest}", "ask for fewer tokens, or leave it out")
        self.least = asked or min(ROOM, longest)
        self._shapes: dict[tuple[Kind, bool, int, bool], Shapes] = {}
        self.dtype = resolve_dtype("auto", self.config.dtype)

    @cached_property
    def stored(self) -> Stored:
        """What the directory holds."""
        return stored(self.directory, self.config)

    def shapes(self, kind: Kind, machine: Machine | None, mtp: bool = True) -> Shapes:
        """The model in a form; machine: where it shall run, None for this one's CPU."""
        on_cpu, processes = machine is None or machine.accelerator is None, 1 if machine is None else machine.processes
        key = kind, on_cpu, processes, mtp
        if key not in self._shapes:
            self._shapes[key] = self._make_shapes(*key)
        return self._shapes[key]

    def _make_shapes(self, kind: Kind, on_cpu: bool, processes: int, mtp: bool) -> Shapes:
        made = self.stored.kinds if kind is self.stored.kind else as_quantized(kind, GROUP_SIZE)
        packing: Backend = selection.choose(selection.HOST) if on_cpu else Reference(META)
        residual = torch.float32 if on_cpu else self.dtype
        return Shapes(self.config, made, packing, residual, self.stored.mtp if mtp else None, processes)

    def cache_spec(self, processes: int, mtp: bool) -> KVCacheSpec:
        """What the KV cache of one process holds."""
        return KVCacheSpec(
            num_layers=self.config.num_hidden_layers + mtp,
            block_size=self.engine.block_size,
            num_kv_heads=self.config.key_value_heads(processes),
            head_dim=self.config.head_dim,
            dtype=torch.int8 if self.engine.kv_cache_dtype == "int8" else self.dtype,
        )

    def token_bytes(self, processes: int = 1, mtp: bool = True) -> int:
        """Bytes of KV cache for a token, in each process."""
        spec = self.cache_spec(processes, mtp and self.stored.mtp is not None)
        return Reference(META).kv_block_bytes(spec) // spec.block_size

    def room(self, processes: int, mtp: bool) -> int:
        """Bytes of KV cache that each process shall have at least: what was asked for, else for `least` tokens."""
        return self.engine.kv_cache_memory_bytes or self.least * self.token_bytes(processes, mtp)

    def available(self, kind: Kind) -> bool:
        """Whether loading what is stored can lead to this form."""
        return kind is self.stored.kind or (self.stored.kind.floating and kind.scaled)

    def candidates(self, machine: Machine) -> list[Candidate]:
        """The model in each form, the most bits first."""
        sizes = tensor_parallel_sizes(self.config)
        if machine.processes not in sizes:
            fewer = max(n for n in sizes if n < machine.processes)
            more = min((n for n in sizes if n > machine.processes), default=None)
            raise ConfigError(
                f"{machine.processes} cards for {self.config.num_attention_heads} query heads and"
                f" {self.config.num_key_value_heads} key-value heads",
                "a number of cards that divides them: " + ", ".join(map(str, sizes)),
                f"take {fewer}" + (f" or {more}" if more else "") + " of them (--gpu NAME:NUMBER, --nodes)",
            )
        least_cache(self.engine, Reference(META), self.cache_spec(machine.processes, mtp=False))
        return [self._candidate(kind, machine) for kind in NAMES]

    def _candidate(self, kind: Kind, machine: Machine) -> Candidate:
        """With the MTP layer if it fits, then without it, then with experts on the disk."""
        shapes = self.shapes(kind, machine)
        held, activations = shapes.held, activation_bytes(self.engine, self.config)
        on_cpu = machine.accelerator is None
        room = self.room(machine.processes, mtp=False)
        base = held.rest + activations + room
        fewest = base + 2 * self.config.num_experts_per_tok * held.record * 65 // 64
        made = Candidate(
            kind=kind,
            available=self.available(kind),
            as_stored=kind is self.stored.kind,
            needed=base + held.experts,
            paged=fewest if on_cpu else None,
            least=self._context(room // self.token_bytes(machine.processes, mtp=False)),
        )
        for mtp in (True, False) if self.stored.mtp is not None else (False,):
            token = self.token_bytes(machine.processes, mtp)
            shared = machine.usable - held.rest - activations - (held.mtp if mtp else 0)
            left = shared - held.experts
            if left >= self.room(machine.processes, mtp):
                default = devices.default_cache(selection.HOST) if on_cpu else None
                asked = self.engine.kv_cache_memory_bytes
                cache = asked or min(left, max(default or left, self.least * token))
                found = replace(made, where="memory", mtp=mtp, cache=cache, context=self._context(cache // token))
                return self._timed(found, shapes, machine)
        token = self.token_bytes(machine.processes, mtp=False)
        shared = machine.usable - held.rest - activations
        default = devices.default_cache(selection.HOST)
        asked = self.engine.kv_cache_memory_bytes
        cache, slots = divide_paged(shared, asked, self.least * token, default, held.record)
        if not on_cpu or slots < 2 * self.config.num_experts_per_tok:
            return made
        context = self._context(cache // token)
        hits, even = self.hits(kind, slots), slots / held.count
        found = replace(
            made,
            where=DISK,
            cache=cache,
            context=context,
            slots=slots,
            experts=held.count,
            hits=even if hits is None else hits,
            counted=hits is not None,
        )
        return self._timed(found, shapes, machine)

    def hits(self, kind: Kind, slots: int) -> float | None:
        """The share of choices that the most chosen experts get, one for each slot, as earlier runs have counted; None
        where nothing has been counted."""
        asked = None if kind is self.stored.kind else str(kind)
        form = packed_file.Form.of(str(self.dtype).removeprefix("torch."), asked, self.engine.group_size)
        for directory in (*packed_file.places(self.directory, form), self.directory):
            shares = sorted((share for layer in counted(directory / STATS).values() for share in layer), reverse=True)
            if sum(shares) > 0:
                return sum(shares[:slots]) / sum(shares)
        return None

    def _context(self, tokens: int) -> int:
        return min(tokens, self.engine.max_model_len or self.config.context)

    def _timed(self, candidate: Candidate, shapes: Shapes, machine: Machine) -> Candidate:
        if machine.limits is None or (candidate.where == DISK and machine.disk.speed is None):
            return candidate
        spec = self.cache_spec(machine.processes, mtp=False)
        before = min(CONTEXT, self.config.context - 1)
        prompt = shapes.work(spec, min(PROMPT, self.config.context), 0, chunk=self.engine.max_num_batched_tokens)
        step = shapes.work(spec, 1, before)
        return replace(
            candidate,
            prefill=_speed(candidate, shapes, machine, prompt, min(PROMPT, self.config.context)),
            decode=_speed(candidate, shapes, machine, step, 1),
        )


def _speed(candidate: Candidate, shapes: Shapes, machine: Machine, work: Work, tokens: int) -> Speed:
    """Of some work. Experts that are read from the disk are computed while others are read, and nothing else is."""
    assert machine.limits is not None
    held, captured = shapes.held, tokens == 1
    if machine.accelerator is not None:  # a bound, which nothing but data sheets stands behind: all overlaps
        best = dict(zip(("memory bandwidth", "arithmetic"), work.cost.at_best(machine.limits)))
        name = max(best, key=lambda name: best[name])
        return Speed(tokens / best[name], {name: best[name]})
    weights = held.nbytes - held.mtp
    found = phases(work.cost, work.steps, machine.limits, weights, captured, machine.times)
    if candidate.where == DISK:
        layers = work.routed.calls.total()
        reads, chosen = machine.disk.reads(held.record), work.experts / layers
        assert reads is not None, "else no time is told"
        beside = phases(work.routed, 0, machine.limits, weights, captured, machine.times)
        disk = reading(layers, chosen, candidate.hits, *reads)
        found = with_disk(found, beside, disk, chosen, candidate.hits)
    return Speed(tokens / sum(found.values()), found)


def recommended(candidates: list[Candidate]) -> Candidate | None:
    """Of what is in memory and can be made of what is stored, the most exact form that decodes as fast as one reads;
    else the fastest of these; else the fastest with experts on the disk; None where nothing fits."""
    possible = [found for found in candidates if found.available and found.where is not None]
    for where in ("memory", DISK):
        here = [found for found in possible if found.where == where]
        enough = [found for found in here if where == "memory" and (found.decode is None or _rate(found) >= READING)]
        if here:
            return min(enough, key=_loss) if enough else max(here, key=_rate)
    return None


def _loss(candidate: Candidate) -> int:
    """In order of what quantising loses: what is stored loses nothing, and int8 less than fp8 (docs/numerics.md)."""
    return 0 if candidate.as_stored else (Kind.INT8, Kind.FP8, Kind.INT4).index(candidate.kind) + 1


def _rate(candidate: Candidate) -> float:
    return -candidate.kind.bits * 1e-9 if candidate.decode is None else candidate.decode.rate


def cards_for(planner: Planner, machine: Machine, kind: Kind) -> int | None:
    """The fewest cards like these on which a form fits, None where no number does that the model can be divided by."""
    whole = planner.shapes(kind, replace(machine, processes=1, nodes=1), mtp=False).held.nbytes
    activations = activation_bytes(planner.engine, planner.config)
    for count in tensor_parallel_sizes(planner.config):
        if whole // count > machine.usable:
            continue
        held = planner.shapes(kind, replace(machine, processes=count, nodes=1), mtp=False).held
        if held.nbytes + activations + planner.room(count, mtp=False) <= machine.usable:
            return count
    return None


def stored(directory: Path, config: ModelConfig) -> Stored:
    """What lies in a directory: by the headers of its files, as far as they are there, else by config.json."""
    formats.check(config.quantization_config)
    kind, group = declared(config.quantization_config)
    assumed = as_quantized(kind, group)
    has_mtp = (True, True) if config.num_nextn_predict_layers else None
    if packed_file.is_packed(directory):
        with packed_file.PackedFile(directory) as packed:
            asked = Kind(packed.form.quantization) if packed.form.quantization else kind
            mtp = ("mtp.embed_tokens" in packed.layers, "mtp.head" in packed.layers)
            has_mtp = mtp if "mtp.eh_proj" in packed.layers else None
            return Stored(asked, as_quantized(asked, packed.form.group_size or group), has_mtp, True, ())
    if not any(directory.glob("*.safetensors")):
        notes = ["no weights are there: sizes are those of config.json"]
        if kind is Kind.PLAIN and config.quantization_config:
            notes.append("its quantised matrices are computed as bf16, since no kernel multiplies them as they are")
        return Stored(kind, assumed, has_mtp, False, tuple(notes))
    with Checkpoint(directory, whole=False) as checkpoint:
        found: dict[str, tuple[Kind, int | None]] = {}
        widened: Counter[str] = Counter()
        modules = {name.rpartition(".")[0] for name in checkpoint.names()}
        for module in modules:
            if formats.holds(checkpoint, module):
                try:
                    matrix = formats.stored(checkpoint, module, config.quantization_config)
                except CheckpointError:  # what belongs to the matrix lies in a file, or part of one, that is not there
                    continue
                found[module] = matrix.kind, matrix.group_size
                widened[matrix.widened or ""] += 1
        prefix = mtp_prefix(config)
        if formats.holds(checkpoint, f"{prefix}eh_proj"):
            own = (formats.holds(checkpoint, f"{prefix}{name}") for name in ("embed_tokens", "shared_head.head"))
            has_mtp = next(own), next(own)
        elif checkpoint.index_fault is None:
            has_mtp = None
        fault = checkpoint.index_fault
    experts = Counter(found[module] for module in found if ".mlp.experts." in module)
    if experts:
        (kind, size), _ = experts.most_common(1)[0]
        assumed = as_quantized(kind, size or GROUP_SIZE)

    def kinds(name: str, layer: Layer, shape: tuple[int, int]) -> tuple[Kind, int | None]:
        return assumed(name, layer, shape) if layer.plain or name not in found else found[name]

    notes = [] if fault is None else [f"{fault.found}; the sizes of what is missing are those of config.json"]
    notes += [f"{count} matrices are stored in {name} and computed as bf16" for name, count in widened.items() if name]
    return Stored(kind, kinds, has_mtp, fault is None, tuple(notes))


def declared(quantization_config: Any) -> tuple[Kind, int]:
    """The kind of most matrices, and columns that share a scale, as config.json's quantization_config has them."""
    config = dict(quantization_config or {})
    groups = [group.get("weights") for group in (config.get("config_groups") or {}).values() if isinstance(group, dict)]
    weights = next((group for group in groups if isinstance(group, dict)), None)
    if weights is not None:
        bits, floating = weights.get("num_bits"), weights.get("type") == "float"
        group = weights.get("group_size")
        if floating:
            return (Kind.FP8 if bits == 8 and weights.get("strategy") == "channel" else Kind.PLAIN), GROUP_SIZE
    else:
        bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    size = group if isinstance(group, int) and group > 0 else GROUP_SIZE
    return {4: Kind.INT4, 8: Kind.INT8}.get(bits or 16, Kind.PLAIN), size


def source_files(directory: Path) -> str:
    """What a plan was made from, in words."""
    headers = math.fsum(1 for _ in directory.glob("*.safetensors"))
    if headers:
        return f"config.json and the headers of {headers:.0f} file{'s' * (headers != 1)}"
    return "config.json" + (f" and {INDEX}" if (directory / INDEX).is_file() else "")
