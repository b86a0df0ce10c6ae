"""names x checkpoint -> a filled model, with every name accounted for.

`WeightLoader` looks at headers only: what is missing, superfluous or misshapen is refused, and the bytes of this
rank's share are known, before the first weight is read. `WeightLoader.fill` then walks the leaves; each asks for its
own slices, which are copied once from the memory-mapped files into the form that the backend wants, quantised on the
way where that is asked for. Norms, biases, the router and the embedding stay as they are; under int4 the matrices
that face the vocabulary, and eh_proj, become int8 (docs/numerics.md says why).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from glimmer.backends.selection import host_quantizer
from glimmer.checkpoint import formats
from glimmer.checkpoint.files import Checkpoint
from glimmer.config import ModelConfig
from glimmer.errors import CheckpointError, ConfigError
from glimmer.model import names
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.parallel import Group
from glimmer.weight import GROUP_SIZE, Weight, layout

SHOWN = 8  # names in an error message; the rest is counted
MTP_ONLY = ("eh_proj.", "enorm.", "hnorm.", "embed_tokens.", "shared_head.")  # what an ordinary layer does not have
INT8_PARAMS = ("lm_head", "mtp.head", "mtp.eh_proj")  # leaves that are int8 where the others are int4


class WeightLoader:
    """What this rank will read. Raises CheckpointError with the names when the checkpoint is not exactly the model.

    nbytes: bytes of this rank's weights once loaded in `dtype`, or as quantised on disk or by us (quantization: None,
    "int8" or "int4", the latter in groups of `group_size`, 32 if None). packed_bytes: as of Ops; by default, what a
    Weight takes.
    mtp: as Glm4Moe wants it, or None when not asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        group: Group,
        dtype: torch.dtype,
        mtp: bool = False,
        quantization: str | None = None,
        group_size: int | None = None,
        packed_bytes: Callable[[Weight], int] = lambda weight: weight.nbytes,
    ):
        formats.check(config.quantization_config)
        self.checkpoint, self.dtype, self._config, self._packed_bytes = checkpoint, dtype, config, packed_bytes
        self._asked = None if quantization is None else (quantization, group_size or GROUP_SIZE)
        self._read = partial(formats.read, checkpoint, quantization_config=config.quantization_config)
        self._prefix = names.mtp_prefix(config)
        self.mtp = self._copies() if mtp else None
        self.param_specs = list(names.param_specs(config, group, self.mtp, self._shard_alignment))
        self.nbytes = self._account()

    def _shard_alignment(self, module: str, width: int) -> int:
        """How many inputs of a matrix belong together, so that no process should get only some of them."""
        if self._asked is not None:
            group = layout(self._asked[0], width, self._asked[1])[1]
        else:
            held = formats.holds(self.checkpoint, module)
            group = formats.stored(self.checkpoint, module).group_size if held else None
        return group if group is not None and width % group == 0 else 1

    def _copies(self) -> tuple[bool, bool]:
        """Which copies the MTP layer brings along; CheckpointError if there is no such layer."""
        if not formats.holds(self.checkpoint, f"{self._prefix}eh_proj"):
            raise CheckpointError(
                f"no MTP layer in {self.checkpoint.directory} ({self._prefix}eh_proj.weight is not there)",
                "a checkpoint with its multi-token-prediction layer, for drafting",
                "run without drafting, or add the file that holds the layer (GLM-4.7: mtp.safetensors)",
            )
        own = ("embed_tokens", "shared_head.head")
        return tuple(formats.holds(self.checkpoint, self._prefix + name) for name in own)

    def _account(self) -> int:
        """Compare both sides, names and shapes; return the bytes of our cut."""
        missing, misshapen, wanted, total = [], [], set(), 0
        for spec in self.param_specs:
            width = 4 if spec.keep_float32 else self.dtype.itemsize
            for shard in (shard for group in spec.groups for shard in group):
                if not formats.holds(self.checkpoint, shard.name):
                    missing.append(f"{shard.name}.weight")
                    continue
                stored = formats.stored(self.checkpoint, shard.name)
                wanted.update(stored.tensors)
                if stored.shape != shard.shape:
                    misshapen.append(
                        f"{shard.name}.weight is {list(stored.shape)}, config.json says {list(shard.shape)}"
                    )
                total += self._nbytes(spec, shard)
            for name, length, cut in spec.vectors:
                wanted.add(name)
                if name not in self.checkpoint:
                    missing.append(name)
                elif self.checkpoint.shape(name) != (length,):
                    misshapen.append(f"{name} is {list(self.checkpoint.shape(name))}, config.json says {[length]}")
                elif self.checkpoint.dtype(name) not in formats.FLOATS:
                    dtype = str(self.checkpoint.dtype(name)).removeprefix("torch.")
                    misshapen.append(f"{name} is {dtype}, where bfloat16, float16 or float32 can be read")
                total += (length if cut is None else cut[1] - cut[0]) * width
        superfluous = sorted(self.checkpoint.names() - wanted - self._left_out())
        self._refuse("missing", missing, "download the checkpoint's missing files, or restore its own config.json")
        self._refuse("of another shape or type", misshapen, "use the config.json that belongs to these weights")
        self._refuse("superfluous", superfluous, "use the config.json that belongs to these weights")
        return total

    def _left_out(self) -> set[str]:
        """What we knowingly leave: the MTP layer, when nobody asked for it. An ordinary layer there is not it."""
        layer = {name for name in self.checkpoint.names() if name.startswith(self._prefix)}
        is_mtp = any(name.removeprefix(self._prefix).startswith(MTP_ONLY) for name in layer)
        return layer if self.mtp is None and is_mtp else set()

    def _refuse(self, what: str, found: list[str], todo: str) -> None:
        if found:
            listed = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
            raise CheckpointError(
                f"{len(found)} tensor{'s' * (len(found) > 1)} {what} in {self.checkpoint.directory}: {listed}",
                f"exactly the tensors of a glm4_moe with {self._config.num_hidden_layers} layers and"
                f" {self._config.n_routed_experts} experts, as config.json describes it",
                todo,
            )

    def fill(self, model: Glm4Moe, device: torch.device, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read our cuts into `model`. progress is told the bytes of nbytes that each group of matrices makes up."""
        threads = model.backend.threads
        with _one_thread():
            for spec in self.param_specs:
                leaf, dtype = model.get_submodule(spec.leaf), torch.float32 if spec.keep_float32 else self.dtype
                vectors = [formats.vector(self.checkpoint, name, cut) for name, _, cut in spec.vectors]
                matrices = self._matrices(spec, threads, progress)
                if not spec.groups:
                    leaf.fill(vectors[0], dtype, device)
                elif len(spec.groups) > 1 or ".experts." in spec.leaf:
                    leaf.fill(matrices, len(spec.groups), dtype, device)
                for weights in matrices:  # that nobody has taken: one group
                    if spec.leaf.endswith("embed_tokens"):
                        leaf.fill(weights[0].dequantize(dtype), dtype, device)
                    else:
                        leaf.fill(weights, torch.cat(vectors) if vectors else None, dtype, device)
                self.checkpoint.release()

    def tensors(self, progress: Callable[[int], None] = lambda nbytes: None) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a checkpoint that holds what `fill` would make of this one, matrix by matrix."""
        with _one_thread() as threads:
            for spec in self.param_specs:
                for weights, shards in zip(self._matrices(spec, threads, progress), spec.groups):
                    for shard, weight in zip(shards, weights):
                        yield from ((f"{shard.name}.{end}", tensor) for end, tensor in formats.encode(weight).items())
                for name, _, cut in spec.vectors:
                    yield name, formats.vector(self.checkpoint, name, cut)
                self.checkpoint.release()

    def outline(self) -> Iterator[tuple[str, Tensor]]:
        """What `tensors` will give, without values (torch's meta device)."""
        for spec in self.param_specs:
            for shard in (shard for group in spec.groups for shard in group):
                dtype = self.checkpoint.dtype(formats.stored(self.checkpoint, shard.name).tensors[0])
                blank = formats.encode(self._outline(spec, shard, dtype))
                yield from ((f"{shard.name}.{end}", tensor) for end, tensor in blank.items())
            for name, _, cut in spec.vectors:
                yield name, formats.vector(self.checkpoint, name, cut).to("meta")

    def kinds(self) -> dict[str, tuple[str, int | None]]:
        """(kind, group) that each matrix of the checkpoint becomes, by name."""
        shards = ((spec, shard) for spec in self.param_specs for group in spec.groups for shard in group)
        return {shard.name: self._target(spec, shard) for spec, shard in shards}

    def _matrices(self, spec: names.ParamSpec, threads: int, progress: Callable[[int], None]) -> Iterator[list[Weight]]:
        """Group after group: one at a time, or, where codes must be made, one for each thread.

        A group is taken to be done with, its pages are given back and its bytes reported, when the next is asked for.
        """
        quantised = spec.groups and self._target(spec, spec.groups[0][0])[0] not in ("plain", "fp8")
        width = threads if quantised else 1
        quantize = host_quantizer(threads) if self._quantises(spec) else Weight.quantize
        with ThreadPoolExecutor(width, initializer=lambda: torch.set_num_threads(1)) as workers:
            work = map if width == 1 or len(spec.groups) == 1 else workers.map
            for i in range(0, len(spec.groups), width):
                yield from work(partial(self._weights, spec, quantize=quantize), spec.groups[i : i + width])
                self.checkpoint.release()
                progress(sum(self._nbytes(spec, shard) for g in spec.groups[i : i + width] for shard in g))

    def _weights(
        self, spec: names.ParamSpec, shards: tuple[names.Shard, ...], quantize: Callable[..., Weight] = Weight.quantize
    ) -> list[Weight]:
        """Our cuts of matrices that are computed together, as they will be held; quantize: as the op of ops."""
        weights = [self._read(shard.name, shard.rows, shard.cols) for shard in shards]
        if self._quantises(spec):
            weights = [quantize(weight, *self._target(spec, shard)) for weight, shard in zip(weights, shards)]
        if len({(w.kind, w.group_size) for w in weights}) > 1:
            kind = lambda w: w.kind if w.group_size is None else f"{w.kind} in groups of {w.group_size}"
            kinds = ", ".join(f"{shard.name}: {kind(weight)}" for shard, weight in zip(shards, weights))
            raise CheckpointError(
                f"matrices that are computed together are stored in different formats ({kinds})",
                "one format for q, k and v, and one for gate and up",
                "use a checkpoint that quantises them alike",
            )
        return weights

    def _quantises(self, spec: names.ParamSpec) -> bool:
        """Whether we quantise this leaf's matrices while loading."""
        return self._asked is not None and not spec.keep_float32 and not spec.leaf.endswith("embed_tokens")

    def _target(self, spec: names.ParamSpec, shard: names.Shard) -> tuple[str, int | None]:
        """(kind, group) of the Weight that a shard becomes."""
        stored = formats.stored(self.checkpoint, shard.name)
        if spec.leaf.endswith("embed_tokens"):
            return "plain", None
        if not self._quantises(spec):
            return stored.kind, stored.group_size
        if stored.kind not in ("plain", "fp8"):
            raise ConfigError(
                f"quantization={self._asked[0]!r} for a checkpoint in which {shard.name} is {stored.kind} already",
                "a checkpoint in bf16, fp16, fp32 or FP8, to be quantised while loading",
                "leave quantization out: what is quantised on disk is used as it is",
            )
        kind, group = layout("int8" if spec.leaf in INT8_PARAMS else self._asked[0], shard.shape[1], self._asked[1])
        return layout(kind, shard.local_shape[1], group)  # as the whole is laid out, where the cut allows it

    def _nbytes(self, spec: names.ParamSpec, shard: names.Shard) -> int:
        """Bytes of our cut once loaded."""
        outline = self._outline(spec, shard, torch.float32 if spec.keep_float32 else self.dtype)
        return self._packed_bytes(outline)

    def _outline(self, spec: names.ParamSpec, shard: names.Shard, dtype: torch.dtype) -> Weight:
        """The Weight that a shard becomes, without values; dtype: if they are plain."""
        zeros = self._quantises(spec) or formats.stored(self.checkpoint, shard.name).zeros
        kind, group = self._target(spec, shard)
        scales_dtype = torch.bfloat16  # ours
        if kind == "int4" and not self._quantises(spec):
            scales_dtype = self.checkpoint.dtype(formats.stored(self.checkpoint, shard.name).tensors[1])
        return Weight.empty(kind, shard.local_shape, group, zeros, dtype, scales_dtype=scales_dtype)


@contextmanager
def _one_thread() -> Iterator[int]:
    """torch computes with one thread here; the number that it had before.

    Loading is thousands of small copies: a second thread gains a fifth on an idle machine, and on a busy one it waits
    at every one of them. Quantising an expert is work enough for a thread of its own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
