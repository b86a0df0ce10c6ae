"""A checkpoint -> the layers of a model, with every name accounted for.

`WeightLoader` looks at headers only: what is missing, superfluous, misshapen, or of formats that cannot be computed
together is refused, and the bytes of this rank's share are known, before the first weight is read. `load` then walks
the layers; each takes its own slices, which are copied once into the form that the backend
packs, quantised on the way where that is asked for. What a layer needs (float32, plain values, no fewer bits than 8) it
says itself (layers.py; docs/numerics.md says why). Not here: names and cuts (names.py), formats (checkpoint/).
"""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from threading import Lock, Thread

import torch
from torch import Tensor

from glimmer.backends.base import Backend
from glimmer.backends.selection import HOST, host_quantizer
from glimmer.checkpoint import formats
from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats.base import FLOATS, Matrix, sliced_groups
from glimmer.checkpoint.packed_file import PackedFile
from glimmer.errors import CheckpointError, ConfigError
from glimmer.group import Group
from glimmer.model import names
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model.layers import Layer, LayerWeights
from glimmer.model.names import ParamSpec, Shard
from glimmer.model_config import ModelConfig
from glimmer.weight import GROUP_SIZE, Kind, Weight, layout

log = logging.getLogger("glimmer")

# Models with more layers, or more experts in all layers, need as many tensors: the largest of the family has 92 layers
# and 14,240 experts.
MAX_LAYERS, MAX_EXPERTS = 1000, 100_000
SHOWN = 8  # names in an error message; the rest is counted
MTP_ONLY = ("eh_proj.", "enorm.", "hnorm.", "embed_tokens.", "shared_head.")  # what an ordinary layer does not have
CACHE_SCALES = (".self_attn.k_proj.k_scale", ".self_attn.v_proj.v_scale")

Form = Callable[[ParamSpec, Shard], tuple[Kind, int | None]]  # what a matrix becomes: a kind and a group size
_counting = Lock()  # of the threads that compute alone
# All experts of a model are alike, and torch takes its time for each tensor.
_empty, _quantized = lru_cache(Weight.empty), lru_cache(Weight.quantized)
Progress = Callable[[int], object]  # is called with the bytes that have been loaded since the last call


def build_model(
    config: ModelConfig,
    checkpoint: Checkpoint | PackedFile,
    group: Group,
    backend: Backend,
    residual_dtype: torch.dtype,
    mtp: bool = False,
) -> Glm4Moe:
    """The model that config.json describes, without weights; mtp: with its MTP layer.

    Raises ConfigError when it has more layers or experts than the checkpoint can fill, before they are built, and
    CheckpointError when there is no MTP layer.
    """
    layers, experts, tensors = config.num_hidden_layers, config.n_routed_experts, len(checkpoint)
    if layers > max(tensors, MAX_LAYERS) or layers * experts > max(tensors, MAX_EXPERTS):
        raise ConfigError(
            f"config.json says num_hidden_layers={layers} and n_routed_experts={experts};"
            f" there are {tensors:,} tensors in {checkpoint.directory}",
            "tensors for all layers and experts",
            "use the config.json that belongs to these weights",
        )
    return Glm4Moe(config, group, backend, residual_dtype, _mtp_parts(config, checkpoint) if mtp else None)


def has_mtp(config: ModelConfig, checkpoint: Checkpoint | PackedFile) -> bool:
    """Whether a checkpoint has an MTP layer."""
    if isinstance(checkpoint, PackedFile):
        return "mtp.eh_proj" in checkpoint.layers
    return formats.holds(checkpoint, f"{names.mtp_prefix(config)}eh_proj")


def _mtp_parts(config: ModelConfig, checkpoint: Checkpoint | PackedFile) -> tuple[bool, bool]:
    """Whether the MTP layer has an embedding and a head of its own; CheckpointError if there is no such layer."""
    prefix = names.mtp_prefix(config)
    if not has_mtp(config, checkpoint):
        raise CheckpointError(
            f"no MTP layer in {checkpoint.directory} ({prefix}eh_proj.weight is not there)",
            "a checkpoint with its multi-token-prediction layer, for drafting",
            "run without drafting, or add the file that holds the layer (GLM-4.7: mtp.safetensors)",
        )
    if isinstance(checkpoint, PackedFile):
        return "mtp.embed_tokens" in checkpoint.layers, "mtp.head" in checkpoint.layers
    return formats.holds(checkpoint, f"{prefix}embed_tokens"), formats.holds(checkpoint, f"{prefix}shared_head.head")


class WeightLoader:
    """What this rank will read into the layers of `model`.

    nbytes: bytes of this rank's weights once its backend has packed them, plain values in `dtype`. widened: how many
    matrices are held as plain values although their codes are smaller, and their bytes, by how they are stored: no
    kernel multiplies them as they are, or dtype is float32, where the kernels of integer codes would round activations
    to int8. quantization: None, "fp8", "int8" or "int4", to quantise while loading, int4 in groups of group_size
    columns (None: 32); what is stored in fp8 stays so where fp8 is asked for. Raises CheckpointError with the names
    when the checkpoint is not exactly the model, and ConfigError when it is quantised already.
    """

    def __init__(
        self,
        model: Glm4Moe,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantization: str | None = None,
        group_size: int | None = None,
    ):
        self._config = config = model.config
        formats.check(config.quantization_config)
        self.model, self.checkpoint, self.dtype, self._backend = model, checkpoint, dtype, model.backend
        checkpoint.pread = model.backend.pread
        self._asked = None if quantization is None else (Kind(quantization), group_size or GROUP_SIZE)
        self._look = partial(formats.stored, checkpoint, quantization_config=config.quantization_config)
        self._read = partial(formats.read, checkpoint, quantization_config=config.quantization_config)
        self.param_specs = list(names.param_specs(config, model.group, model.mtp_parts, self._shard_alignment))
        self._layers = {spec.layer: _layer(model, spec) for spec in self.param_specs}
        self._stored: dict[str, Matrix] = {}  # by the name of the matrix
        self._account()
        self._scales_dtypes = {spec.layer: self._scales_dtype(spec) for spec in self.param_specs}
        for spec in self.param_specs:
            self._check_packed_together(spec)
            self._check_cuts(spec)
        self.nbytes = sum(self._nbytes(spec, spec.units) + self._vector_bytes(spec) for spec in self.param_specs)
        self.widened = self._widened()

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Read our cuts into the layers. progress is called with the share of nbytes of each unit of matrices."""
        for spec in self.param_specs:
            self.load_layer(spec, progress)

    def load_layer(self, spec: ParamSpec, progress: Progress = lambda nbytes: None) -> None:
        """Read our cuts into one layer."""
        layer = self._layers[spec.layer]
        with _one_thread(), closing(self._units(spec, progress, self._held)) as units:
            layer.load(LayerWeights(self._vectors(spec), units, len(spec.units), self._dtype(layer)))
            assert next(units, None) is None, f"{spec.layer} has not taken all of its matrices"

    def tensors(self, progress: Progress = lambda nbytes: None) -> Generator[tuple[str, Tensor]]:
        """Names and tensors of a checkpoint that holds what `load` would make of this one, matrix by matrix."""
        with _one_thread():
            for spec in self.param_specs:
                with closing(self._units(spec, progress, self._target)) as units:
                    for weights, shards in zip(units, spec.units, strict=True):
                        for shard, weight in zip(shards, weights, strict=True):
                            for end, tensor in formats.encode(weight).items():
                                yield f"{shard.name}.{end}", tensor
                yield from zip((name for name, *_ in spec.vectors), self._vectors(spec), strict=True)

    def outline(self) -> Iterator[tuple[str, Tensor]]:
        """What `tensors` will give, without values (torch's meta device)."""
        for spec in self.param_specs:
            for shard in spec.shards:
                stored = self._stored[shard.name]
                dtype = self._dtype(self._layers[spec.layer])
                dtype = stored.dtype or dtype
                for end, tensor in formats.encode(self._outline(spec, shard, dtype, self._target)).items():
                    yield f"{shard.name}.{end}", tensor
            for name, _, cut in spec.vectors:
                yield name, formats.vector(self.checkpoint, name, cut).to("meta")

    def kinds(self) -> dict[str, tuple[Kind, int | None]]:
        """(kind, group_size) that each matrix of the checkpoint becomes, by name."""
        return {shard.name: self._target(spec, shard) for spec in self.param_specs for shard in spec.shards}

    def stores(self, dtype: torch.dtype) -> bool:
        """Whether a matrix lies on disk as plain values of `dtype`, and is held in the dtype of the model."""
        return any(
            stored.dtype is dtype and not stored.widened and not self._layers[spec.layer].keep_float32
            for spec in self.param_specs
            for stored in (self._stored[shard.name] for shard in spec.shards)
        )

    # ---- accounting, from headers ----------------------------------------------------------------------------------

    def _account(self) -> None:
        """Compare the names and shapes of both sides; an index that disagrees with the files tells what is missing."""
        config = self._config
        missing: list[str] = []
        misshapen: list[str] = []
        wanted: set[str] = set()
        for spec in self.param_specs:
            for shard in spec.shards:
                if not formats.holds(self.checkpoint, shard.name):
                    missing.append(f"{shard.name}.weight")
                    continue
                stored = self._stored[shard.name] = self._look(shard.name)
                wanted.update(stored.tensors)
                if stored.experts not in (None, config.n_routed_experts):
                    said = f"config.json says {config.n_routed_experts}"
                    misshapen.append(f"{stored.tensors[0]} holds {stored.experts} experts, {said}")
                if stored.shape != shard.shape:
                    said = f"config.json says {list(shard.shape)}"
                    misshapen.append(f"{shard.name}.weight is {list(stored.shape)}, {said}")
            for name, length, _ in spec.vectors:
                wanted.add(name)
                if name not in self.checkpoint:
                    missing.append(name)
                elif self.checkpoint.shape(name) != (length,):
                    misshapen.append(f"{name} is {list(self.checkpoint.shape(name))}, config.json says {[length]}")
                elif self.checkpoint.dtype(name) not in FLOATS:
                    dtype = str(self.checkpoint.dtype(name)).removeprefix("torch.")
                    misshapen.append(f"{name} is {dtype}, where bfloat16, float16 or float32 can be read")
        superfluous = sorted(self.checkpoint.names() - wanted - self._left_out())
        fault = self.checkpoint.index_fault
        if fault is not None and missing:
            raise fault
        if fault is not None:
            log.warning("%s; all tensors of the model are there, and are used", fault.found)
        self._refuse("missing", missing, "download the checkpoint's missing files, or restore its own config.json")
        self._refuse("of another shape or type", misshapen, "use the config.json that belongs to these weights")
        self._refuse("superfluous", superfluous, "use the config.json that belongs to these weights")

    def _left_out(self) -> set[str]:
        """What we knowingly leave: the MTP layer, when nobody asked for it (an ordinary layer there is not it), and the
        scales of a cache in FP8, since keys and values are kept in more bits."""
        prefix = names.mtp_prefix(self._config)
        layer = {name for name in self.checkpoint.names() if name.startswith(prefix)}
        is_mtp = any(name.removeprefix(prefix).startswith(MTP_ONLY) for name in layer)
        left = layer if is_mtp and self.model.mtp_parts is None else set()
        return left | {name for name in self.checkpoint.names() if name.endswith(CACHE_SCALES)}

    def _refuse(self, what: str, found: list[str], todo: str) -> None:
        if found:
            raise CheckpointError(
                f"{len(found)} tensor{'s' * (len(found) > 1)} {what} in {self.checkpoint.directory}: {_some(found)}",
                f"exactly the tensors of a glm4_moe with {self._config.num_hidden_layers} layers and"
                f" {self._config.n_routed_experts} experts, as config.json describes it",
                todo,
            )

    def _check_packed_together(self, spec: ParamSpec) -> None:
        """Refuse matrices of different kinds or group sizes of which a backend makes one."""
        layer = self._layers[spec.layer]
        for units in zip(*(layer.packed_together(unit) for unit in spec.units), strict=True):
            targets = {shard.name: self._target(spec, shard) for unit in units for shard in unit}
            if len(set(targets.values())) > 1:
                usual, _ = Counter(targets.values()).most_common(1)[0]
                one = next(name for name, target in targets.items() if target == usual)
                shown = [one, *(name for name, target in targets.items() if target != usual)]
                raise CheckpointError(
                    "matrices that are computed together are stored in different formats"
                    f" ({_some([f'{name}: {_format(*targets[name])}' for name in shown])})",
                    "one format for q, k and v, one for gate and up of all experts of a layer, and one for their down",
                    "use a checkpoint that quantises them alike",
                )

    def _check_cuts(self, spec: ParamSpec) -> None:
        """Refuse cuts within a group of columns that share a scale."""
        for shard in spec.shards:
            size = self._stored[shard.name].group_size
            if size is not None and shard.cols is not None:
                sliced_groups(shard.name, size, *shard.cols)

    def _shard_alignment(self, module: str, width: int) -> int:
        """How many inputs of a matrix belong together, so that no process should get only some of them."""
        if self._asked is not None:
            size = layout(self._asked[0], width, self._asked[1])[1]
        else:
            size = self._look(module).group_size if formats.holds(self.checkpoint, module) else None
        return size if size is not None and width % size == 0 else 1

    def _nbytes(self, spec: ParamSpec, units: Sequence[Sequence[Shard]]) -> int:
        """Bytes of our cut of some units, once packed."""
        dtype = self._dtype(self._layers[spec.layer])
        shards = [shard for unit in units for shard in unit]
        return sum(self._backend.packed_bytes(self._outline(spec, shard, dtype, self._held)) for shard in shards)

    def _vector_bytes(self, spec: ParamSpec) -> int:
        lengths = (length if cut is None else cut[1] - cut[0] for _, length, cut in spec.vectors)
        return sum(lengths) * self._dtype(self._layers[spec.layer]).itemsize

    def _widened(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for spec in self.param_specs:
            dtype = self._dtype(self._layers[spec.layer])
            for shard in spec.shards:
                stored = self._stored[shard.name]
                target = self._target(spec, shard)[0]
                name = stored.widened if target is Kind.PLAIN else str(target)
                if name and self._held(spec, shard)[0] is Kind.PLAIN:
                    count, nbytes = found.get(name, (0, 0))
                    nbytes += self._backend.packed_bytes(self._outline(spec, shard, dtype, self._held))
                    found[name] = count + 1, nbytes
        return found

    # ---- what a matrix becomes -------------------------------------------------------------------------------------

    def _dtype(self, layer: Layer) -> torch.dtype:
        """In what a layer keeps plain values and vectors."""
        return torch.float32 if layer.keep_float32 else self.dtype

    def _target(self, spec: ParamSpec, shard: Shard) -> tuple[Kind, int | None]:
        """(kind, group_size) of the Weight that a shard becomes."""
        layer, stored = self._layers[spec.layer], self._stored[shard.name]
        if layer.plain:
            return Kind.PLAIN, None
        if self._asked is None or stored.kind is Kind.FP8 is self._asked[0]:
            return stored.kind, stored.group_size
        asked, group_size = self._asked
        if not stored.kind.floating:
            raise ConfigError(
                f"quantization={str(asked)!r} for a checkpoint in which {shard.name} is {stored.kind} already",
                "a checkpoint in bf16, fp16, fp32 or FP8, to be quantised while loading",
                "leave quantization out: what is quantised on disk is used as it is",
            )
        whole = layout(asked.at_least(layer.min_bits), shard.shape[1], group_size)
        return layout(whole[0], shard.local_shape[1], whole[1])  # as the whole is laid out, where the cut allows it

    def _held(self, spec: ParamSpec, shard: Shard) -> tuple[Kind, int | None]:
        """The same, as a layer holds it: values in place of integer codes where everything is computed in float32."""
        target = self._target(spec, shard)
        return target if target[0].floating or self.dtype is not torch.float32 else (Kind.PLAIN, None)

    def _scales_dtype(self, spec: ParamSpec) -> torch.dtype:
        """A type that holds every stored scale of a layer, whose matrices share one layout."""
        matrices = [self._stored[shard.name] for shard in spec.shards]
        dtypes = {self.checkpoint.dtype(matrix.tensors[1]) for matrix in matrices if matrix.kind.scaled}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _outline(self, spec: ParamSpec, shard: Shard, dtype: torch.dtype, form: Form) -> Weight:
        """The Weight that a shard becomes, without values; dtype: if they are plain."""
        (kind, group_size), stored = form(spec, shard), self._stored[shard.name]
        if kind is not stored.kind and kind.scaled:
            return _quantized(kind, shard.local_shape, group_size)
        scales_dtype = self._scales_dtypes[spec.layer]
        return _empty(kind, shard.local_shape, group_size, stored.zeros, dtype, scales_dtype=scales_dtype)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _vectors(self, spec: ParamSpec) -> list[Tensor]:
        vectors = [formats.vector(self.checkpoint, name, cut) for name, _, cut in spec.vectors]
        for (name, *_), vector in zip(spec.vectors, vectors, strict=True):
            if name.endswith(".e_score_correction_bias") and vector.isnan().any():  # it chooses experts, and so hides
                raise CheckpointError(
                    f"{name} in {self.checkpoint.directory} holds NaN",
                    "a number for each expert",
                    f"download {self.checkpoint.file(name).name} again",
                )
        return vectors

    def _units(self, spec: ParamSpec, progress: Progress, form: Form) -> Generator[Sequence[Weight]]:
        """Unit after unit: one at a time, or, where codes must be made or unpacked, one for each thread.

        A unit is taken to be done with, its pages are given back and its bytes reported, when the next is asked for.
        """
        if not spec.units:
            return
        first = spec.units[0][0]
        target, stored = self._target(spec, first)[0], self._stored[first.name]
        copied = target.floating and target in (Kind.PLAIN, stored.kind) and not stored.widened
        width = 1 if copied else self._backend.threads
        read = partial(self._weights, spec, form=form)
        with ThreadPoolExecutor(width, initializer=_compute_alone) as workers:
            work = map if width == 1 or len(spec.units) == 1 else workers.map
            for i in range(0, len(spec.units), width):
                units = spec.units[i : i + width]
                yield from work(read, units)
                progress(self._nbytes(spec, units))

    @cached_property
    def _quantize(self) -> Callable[[Weight, str, int | None], Weight]:
        """The op for matrices in the host's memory, where all are read: that of the backend, if it computes there."""
        here = self._backend.device.type == HOST.type
        return self._backend.quantize if here else host_quantizer(self._backend.threads)

    def _weights(self, spec: ParamSpec, unit: Sequence[Shard], form: Form | None = None) -> list[Weight]:
        """Our cuts of the matrices of a unit, in a form: `_target`, or as they will be held."""
        dtype, scales_dtype = self._dtype(self._layers[spec.layer]), self._scales_dtypes[spec.layer]
        weights = []
        for shard in unit:
            weight, (kind, group_size) = self._read(shard.name, shard.rows, shard.cols), self._target(spec, shard)
            if kind is self._stored[shard.name].kind:
                weight = replace(weight, scales_dtype=scales_dtype) if kind.scaled else weight
            elif kind is Kind.PLAIN:
                weight = Weight(kind, weight.dequantize(dtype))
            else:
                weight = self._quantize(weight, kind, group_size)
            if (form or self._held)(spec, shard)[0] is not kind:
                weight = Weight(Kind.PLAIN, weight.dequantize(dtype))
            weights.append(weight)
        return weights


def _layer(model: Glm4Moe, spec: ParamSpec) -> Layer:
    layer = model.get_submodule(spec.layer)
    assert isinstance(layer, Layer), f"{spec.layer} is a {type(layer).__name__}"
    return layer


def _format(kind: Kind, group_size: int | None) -> str:
    return str(kind) if group_size is None else f"{kind} in groups of {group_size}"


def _some(found: Sequence[str]) -> str:
    """The first of several, and how many more there are."""
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


@contextmanager
def _one_thread() -> Iterator[None]:
    """In this thread torch computes with one thread here, and afterwards with as many as before.

    Loading is thousands of small copies: a second thread gains a fifth on an idle machine, and on a busy one it waits
    at every one of them. Quantising an expert is work enough for a thread of its own.
    """
    threads = _compute_alone()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compute_alone() -> int:
    """From now on torch computes with one thread in the calling thread, and in new ones with as many as before: these.

    torch counts for each thread apart, but the first count of a thread is what was set last, by whomever: a thread of
    another engine may begin at any time.
    """
    with _counting:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        other = Thread(target=torch.set_num_threads, args=(threads,))
        other.start()
        other.join()
    return threads
