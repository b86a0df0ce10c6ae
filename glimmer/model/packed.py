"""A packed file and the layers of a model: `PackedLoader` fills the layers from it, `prepare` writes it.

A packed file holds what `WeightLoader.load` makes, attribute by attribute, so both ways lead to the same bits. What is
loaded is mapped: its pages are those of the page cache, nothing is copied, and all processes of a machine share them.
Checksums are compared before anything is computed. Not here: the file's own form (checkpoint/packed_file.py), layouts
(backends/), quantising (load.py).
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from glimmer.backends.base import Backend, ExpertSet, Packed
from glimmer.backends.files import MappedFile, PackedFiles
from glimmer.checkpoint import packed_file
from glimmer.checkpoint.disk import check_space
from glimmer.checkpoint.files import INDEX, Checkpoint
from glimmer.checkpoint.packed_file import (
    Form,
    PackedFile,
    PackedWriter,
    Section,
    damaged,
    head,
    places,
    source_of,
)
from glimmer.errors import CheckpointError, ConfigError
from glimmer.group import Group
from glimmer.model import names
from glimmer.model.experts import Pager
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model.layers import Experts, Layer
from glimmer.model.load import Progress, WeightLoader, build_model, has_mtp
from glimmer.model.names import ParamSpec
from glimmer.model_config import ModelConfig

log = logging.getLogger("glimmer")

MORE_SPACE = "free some space, or choose another place (--out, or GLIMMER_CACHE)"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # not copied
ROUNDED_UP = 1.05  # a packed file in relation to its weights: panels and records are padded
AT_ONCE = 512 << 20  # bytes whose checksums are compared between two reports of progress: all threads wait for the last


def open_weights(
    model: Path, config: ModelConfig, form: Form, backend: Backend, size: int, make: bool = False
) -> Checkpoint | PackedFile:
    """The packed file of a model in this form, where there is one that can be used; else its checkpoint.

    size: processes that share the model: each wants a part of the matrices, and so reads the checkpoint. make: write
    the packed file first where there is none. A packed file that is there and not used is named in a warning, with the
    reason. Raises ConfigError and CheckpointError.
    """
    if packed_file.is_packed(model):
        if size > 1:
            raise ConfigError(
                f"{size} processes for {model}, which holds weights packed for one",
                "one process, or the checkpoint of which it was made",
                "leave tensor_parallel_size out, or name the checkpoint",
            )
        layout = backend.packed_layout if isinstance(backend, PackedFiles) else None
        return packed_file.open_standalone(model, form, layout)
    if size == 1 and isinstance(backend, PackedFiles):
        found = packed_file.find(model, form, backend.packed_layout, config.quantization_config)
        if found is None and make:
            prepare(model, config, form, backend)
            found = packed_file.find(model, form, backend.packed_layout, config.quantization_config)
        if found is not None:
            log.info("weights are those of the packed file %s", found.directory)
            return found
        others = packed_file.in_other_forms(model, form)
        if others:
            them = f"{others[0]}{' and others' * (len(others) > 1)}"
            log.warning("the packed file %s is not used: %s is asked for; the checkpoint is read", them, form.folder)
    else:
        holds_whole = f"it holds whole matrices, of which each of {size} processes computes with a part"
        reason = holds_whole if size > 1 else f"backend {backend.name!r} has another layout"
        there = next((place for place in places(model, form) if packed_file.is_packed(place)), None)
        if there is not None:
            log.warning("the packed file %s is not used: %s; the checkpoint is read", there, reason)
        elif make:
            log.warning("no packed file is made: %s", reason)
    return Checkpoint(model)


class PackedLoader:
    """What a packed file has for the layers of `model`; in place of a WeightLoader.

    expert_bytes, slot_bytes: of all routed experts, and of the largest of them; dense_bytes: of all other weights.
    Raises CheckpointError when the file is not exactly the model.
    """

    def __init__(self, model: Glm4Moe, packed: PackedFile, dtype: torch.dtype):
        assert isinstance(model.backend, PackedFiles), "open_weights has seen to it"
        self.model, self._packed, self._dtype, self._backend = model, packed, dtype, model.backend
        self.widened: dict[str, tuple[int, int]] = {}  # `prepare` has said it
        self._file: MappedFile | None = None
        self._specs = list(names.param_specs(model.config, Group(), model.mtp_parts, lambda module, width: 1))
        lacking = [spec.layer for spec in self._specs if spec.layer not in packed.layers]
        if lacking:
            raise damaged(packed.manifest, f"lacks {lacking[0]}{' and others' * (len(lacking) > 1)}")
        sections = [(spec.layer, section) for spec in self._specs for section in packed.layers[spec.layer].values()]
        is_expert = {spec.layer: isinstance(model.get_submodule(spec.layer), Experts) for spec in self._specs}
        self._is_expert = is_expert
        experts = [section for layer, section in sections if is_expert[layer]]
        self.expert_bytes = sum(section.num_records * section.nbytes for section in experts)
        self.slot_bytes = max((section.nbytes for section in experts), default=0)
        self.dense_bytes = sum(p.num_records * p.nbytes for layer, p in sections if not is_expert[layer])
        self._slots: int | None = None
        self.pager: Pager | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weights take: all of them, or those that are no experts, and the slots."""
        return self.dense_bytes + (self.expert_bytes if self._slots is None else self._slots * self.slot_bytes)

    def page(self, slots: int | None) -> None:
        """Before `load`: keep routed experts in so many slots, and read the others when chosen. None: keep all."""
        self._slots = slots

    def stores(self, dtype: torch.dtype) -> bool:
        """Whether a matrix lies on disk as plain values of `dtype` that another dtype holds: no, in a packed file."""
        return False

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Map the file, compare its checksums and place its sections in the layers. progress: see WeightLoader.load."""
        backend, packed = self._backend, self._packed
        try:
            self._file = file = backend.map_file(packed.descriptor, packed.nbytes)
        except OSError as error:
            raise CheckpointError(
                f"{packed.file} cannot be mapped: {error}",
                f"addresses for {packed.nbytes / 1e9:.2f} GB",
                f"raise the limit (ulimit -v unlimited), or remove {packed.directory}, so that the checkpoint is read",
            ) from error
        if self._slots is not None:
            try:
                self.pager = Pager(backend, packed, self._slots, self.slot_bytes, self.dense_bytes)
            except OSError as error:
                raise damaged(packed.file, f"cannot be read: {error}") from error
        paged = {spec.layer for spec in self._specs if self.pager is not None and self._is_expert[spec.layer]}
        self._verify([spec.layer for spec in self._specs if spec.layer not in paged], file, progress)
        for spec in self._specs:
            layer, sections = self.model.get_submodule(spec.layer), packed.layers[spec.layer]
            assert isinstance(layer, Layer)
            pager = self.pager if spec.layer in paged else None
            try:
                held = {
                    name: _placed(backend, file, sections[name])
                    if pager is None
                    else pager.add(spec.layer, sections[name])
                    for name in layer.HELD
                    if name in sections
                }
                _check_shapes(spec, layer, held, torch.float32 if layer.keep_float32 else self._dtype)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise damaged(packed.manifest, f"describes {spec.layer} as something else: {error}") from None
            layer.hold(held)
        if self.pager is not None:
            self.pager.start()
            stats, per = self.pager.stats(), self.slot_bytes / 1e9
            log.info(
                "experts: slots for %d of %d (%.2f of %.2f GB), the others are read from %s when they are chosen",
                stats.slots, stats.experts, stats.slots * per, stats.experts * per, packed.file,
            )  # fmt: skip
            if not stats.direct:
                log.warning(
                    "slow: the file system of %s refuses direct reads, so they go through the page cache", packed.file
                )

    def _verify(self, layers: Sequence[str], file: MappedFile, progress: Progress) -> None:
        """Compare the checksums of all sections of some layers, of several layers at once: so threads wait for each
        other seldom, however large one section is."""
        batch: list[tuple[str, Tensor, str]] = []
        nbytes = 0
        for layer in layers:
            for section in self._packed.layers[layer].values():
                held = file.tensor(section.begin, section.num_records * section.nbytes).view(section.num_records, -1)
                for record, checksum in zip(held.unbind(), section.checksums, strict=True):
                    batch.append((layer, record, checksum))
                    nbytes += section.nbytes
                    if nbytes >= AT_ONCE:
                        self._compare(batch)
                        progress(nbytes)
                        batch, nbytes = [], 0
        self._compare(batch)
        progress(nbytes)

    def _compare(self, batch: Sequence[tuple[str, Tensor, str]]) -> None:
        """CheckpointError unless these records of these layers have these checksums."""
        found = self._backend.checksums([record for _, record, _ in batch])
        for (layer, _, checksum), actual in zip(batch, found, strict=True):
            if actual != checksum:
                self.check()
                raise damaged(self._packed.file, f"has other bytes in {layer} than were written")

    def unread(self, error: OSError) -> CheckpointError:
        """What a step failed with that wanted an expert which cannot be read."""
        return damaged(self._packed.file, str(error))

    def check(self) -> None:
        """CheckpointError if the mapped file has shrunk, or could not be read, so far."""
        if self._file is not None and self._file.damaged:
            raise damaged(self._packed.file, "has shrunk, or a part of it cannot be read")


Loader = WeightLoader | PackedLoader


def loader_of(model: Glm4Moe, weights: Checkpoint | PackedFile, dtype: torch.dtype, form: Form) -> Loader:
    """What fills the layers of `model` from what `open_weights` has opened."""
    if isinstance(weights, PackedFile):
        return PackedLoader(model, weights, dtype)
    return WeightLoader(model, weights, dtype, form.quantization, form.group_size)


def _placed(backend: PackedFiles, file: MappedFile, section: Section) -> Packed | ExpertSet | Tensor:
    """The weights of a section, where they lie in the file."""
    if "matrices" in section.description:
        return backend.map_packed(section.description, file, section.begin)
    dtype, shape = DTYPES[section.description["dtype"]], section.description["shape"]
    return file.tensor(section.begin, section.nbytes).view(dtype).view(shape)


def _check_shapes(
    spec: ParamSpec, layer: Layer, held: dict[str, Packed | ExpertSet | Tensor], dtype: torch.dtype
) -> None:
    """ValueError unless the sections of a layer have the sizes that the model's configuration calls for."""
    outs = [[shard.local_shape for shard in unit] for unit in spec.units]
    vector = sum(length for _, length, _ in spec.vectors)
    for name, value in held.items():
        found: object
        wanted: object
        if isinstance(value, ExpertSet):
            (gate, up, down), count = outs[0], len(spec.units)
            wanted = ((count, gate[0] + up[0], gate[1]), (count, *down))
            found = tuple((each.count, each.n, each.k) for each in (value.gate_up, value.down))
        elif isinstance(value, Tensor):
            wanted = (dtype, tuple(outs[0][0]) if spec.units and name != "bias" else (vector,))
            found = (value.dtype, tuple(value.shape))
        else:
            wanted = (1, sum(out for out, _ in outs[0]), outs[0][0][1])
            found = (value.count, value.n, value.k)
        if found != wanted:
            raise ValueError(f"{name} is {found}, where {wanted} is wanted")
    optional = {"bias"} if not spec.vectors else set()
    if set(held) | optional != set(layer.HELD) | optional:
        raise ValueError(f"{sorted(held)} of {sorted(layer.HELD)}")


def prepare(
    model: Path,
    config: ModelConfig,
    form: Form,
    backend: Backend,
    out: Path | None = None,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Write the packed file of a checkpoint, with its MTP layer if it has one; returns its directory.

    out: a directory that becomes a model of its own; None: one of `places`. report(done, total) gets bytes of weights.
    Peak memory is that of one layer. An interrupted one is gone on with. Raises ConfigError and CheckpointError.
    """
    if not isinstance(backend, PackedFiles):
        raise ConfigError(
            f"backend {backend.name!r} on {backend.device.type}",
            "a backend whose weights can be packed into a file: the CPU's kernels",
            "use device='cpu', and install with a C++ compiler",
        )
    source = source_of(model, config.quantization_config)
    directory = out.absolute() if out is not None else _place(model, form)
    others = [] if out is None else _others(model)
    _check_out(directory, others)
    dtype = DTYPES[form.dtype]
    with Checkpoint(model) as checkpoint:
        mtp = has_mtp(config, checkpoint)
        empty = build_model(config, checkpoint, Group(), backend, torch.float32, mtp)
        loader = WeightLoader(empty, checkpoint, dtype, form.quantization, form.group_size)
        total = int(loader.nbytes * ROUNDED_UP)
        if not os.path.exists(directory):  # and none is made for nothing
            check_space(directory, total, "packed", MORE_SPACE)
        with PackedWriter(directory, head(form, backend.packed_layout, source), backend.checksums) as writer:
            check_space(directory, total - writer.end, "packed", MORE_SPACE)
            done = 0

            def progress(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                report(done, loader.nbytes)

            for spec in loader.param_specs:
                if spec.layer in writer.done:
                    progress(sum(section.num_records * section.nbytes for section in writer.done[spec.layer].values()))
                    continue
                with torch.inference_mode():
                    loader.load_layer(spec, progress)
                layer = empty.get_submodule(spec.layer)
                assert isinstance(layer, Layer)
                for name, value in layer.held().items():
                    _add(writer, backend, spec.layer, name, value)
                layer.hold({})
                writer.finish_layer()
            for file in others:
                try:
                    shutil.copyfile(file, directory / file.name)
                except OSError as error:
                    writer.refused(directory / file.name, error)
            if source != source_of(model, config.quantization_config):
                raise CheckpointError(
                    f"{model} has been changed while it was being prepared",
                    "files that stay as they are until the packed file is written",
                    "wait until the download or copy has finished, then start again",
                )
            writer.finish()
    return directory


def _place(model: Path, form: Form) -> Path:
    """The first of the places that can be written."""
    beside, cached = places(model, form)
    return beside if os.access(beside if beside.is_dir() else model, os.W_OK) else cached


def _add(writer: PackedWriter, backend: PackedFiles, layer: str, name: str, value: Packed | ExpertSet | Tensor) -> None:
    if isinstance(value, Tensor):
        description = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        flat = value.contiguous().view(-1).view(torch.uint8)
        return writer.add(layer, name, description, lambda i: flat, 1)
    records = backend.records(value)
    buffer = torch.zeros(records.nbytes, dtype=torch.uint8)

    def record(i: int) -> Tensor:
        records.copy(i, buffer)
        return buffer

    writer.add(layer, name, records.description, record, records.count)


def _others(model: Path) -> list[Path]:
    """Everything that a model's directory needs besides weights."""
    files = (file for file in sorted(model.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.suffix not in WEIGHTS and file.name != INDEX]


def _check_out(directory: Path, others: Sequence[Path]) -> None:
    """ConfigError if files of a directory would be overwritten that is no packed file, such as another model's."""
    if any(os.path.isfile(directory / name) for name in (packed_file.MANIFEST, packed_file.JOURNAL)):
        same = [file for file in others if file.parent.resolve() == directory.resolve()]
    else:
        same = [file for file in others if os.path.lexists(directory / file.name)]
    if same:
        raise ConfigError(
            f"{directory} has files of its own, such as {same[0].name}",
            "a new directory, an empty one, or one that glimmer prepare has written",
            "choose another place with --out, or leave it out: the packed file then lies beside the checkpoint",
        )
