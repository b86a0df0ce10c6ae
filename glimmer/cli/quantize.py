"""`glimmer quantize MODEL OUT --quantization fp8 | int8 | int4`: a checkpoint with such matrices, made once.

OUT is a Hugging Face directory in the vocabulary of compressed-tensors; glimmer loads from it exactly what
`--quantization` would have made of MODEL, without the work. It is written beside its place, file by file with the
memory of a few matrices, and gets its name when it is complete: whatever stops the command leaves no OUT.
Not here: how codes are chosen (weight.py), which matrix becomes what (model/load.py), how they are laid out
(checkpoint/formats).
"""

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from glimmer.checkpoint.disk import check_space
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, Command, Option, path, pick
from glimmer.config import check_quantization
from glimmer.errors import CheckpointError, ConfigError
from glimmer.foreign import read_json
from glimmer.hub import model_directory
from glimmer.model_config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from glimmer import group
    from glimmer.backends import selection
    from glimmer.checkpoint import files, formats
    from glimmer.model import load
else:
    torch, group = lazy("torch"), lazy("glimmer.group")
    files, formats = lazy("glimmer.checkpoint.files"), lazy("glimmer.checkpoint.formats")
    load, selection = lazy("glimmer.model.load"), lazy("glimmer.backends.selection")

SHARD = 4 << 30  # bytes of tensors in a file
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # not copied
COMMAND = Command(
    "quantize",
    "Writes a checkpoint with fp8, int8 or int4 matrices, made once: OUT is a Hugging Face directory in the\n"
    "vocabulary of compressed-tensors, from which glimmer loads what --quantization would have made of MODEL.",
    "MODEL OUT --quantization fp8 | int8 | int4 [--group-size N]",
    {
        "directories": {
            "model": replace(ENGINE["model"], help="a Hugging Face directory in bf16, fp16, fp32 or FP8", default=""),
            "out": Option(path, "DIR", "the directory to make; there must be none of that name"),
        },
        "matrices": {
            "quantization": replace(ENGINE["quantization"], help="fp8, int8 or int4", default=""),
            **pick(ENGINE, "group_size"),
        },
    },
    positional=("model", "out"),
)


def main(argv: list[str]) -> int:
    """Write OUT; 0 when it is there."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    for name in ("model", "out", "quantization"):
        if name not in settings.given:
            raise ConfigError(
                f"no {name} is named",
                "a model, a directory to make, and fp8, int8 or int4",
                "e.g. glimmer quantize MODEL OUT --quantization int8",
            )
    model, out, quantization = (settings.take(name) for name in ("model", "out", "quantization"))
    group_size = settings.take("group_size")
    check_quantization(quantization, group_size)
    nbytes = quantize(model_directory(model), Path(out), quantization, group_size)
    print(f"{out}: {tqdm.format_sizeof(nbytes, 'B')} of weights in {quantization}")
    return 0


def quantize(model: Path, out: Path, quantization: str, group_size: int | None) -> int:
    """Write the directory `out`, all of it or nothing; returns the bytes of its tensors.

    Raises ConfigError and CheckpointError: `out` exists or cannot be written, or `model` cannot be quantised.
    """
    config = ModelConfig.load(model)
    if os.path.lexists(out):  # False for what no path can be: mkdir says what is wrong with it
        raise ConfigError(f"{out} exists", "a directory that is yet to be made", "choose another name, or remove it")
    place = out.absolute().parent
    try:
        there = stat.S_ISDIR(os.stat(place).st_mode)
    except PermissionError:  # os.path.isdir would take it for absence
        raise
    except (OSError, ValueError):
        there = False
    if not there:
        raise ConfigError(
            f"{out} cannot be written: there is no directory {place}",
            "a place that is there",
            "make it, or name another",
        )
    partial = place / f".{out.name}.{os.getpid()}.partial"
    formats.check(config.quantization_config)
    with files.Checkpoint(model) as checkpoint:
        backend = selection.choose(selection.HOST, torch.get_num_threads())
        mtp = load.has_mtp(config, checkpoint)
        empty = load.build_model(config, checkpoint, group.Group(), backend, torch.bfloat16, mtp)
        loader = load.WeightLoader(empty, checkpoint, torch.bfloat16, quantization, group_size)
        try:
            partial.mkdir()
            try:
                nbytes = _write(loader, model, partial)
                partial.rename(out)
            except BaseException:
                shutil.rmtree(partial)
                raise
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or partial} cannot be written: {error.strerror or error}",
                f"a place for {loader.nbytes / 1e9:.2f} GB beside {out}",
                "free some space or choose another place; nothing was left behind",
            ) from error
    return nbytes


def _write(loader: "load.WeightLoader", model: Path, directory: Path) -> int:
    """Everything into `directory`; returns the bytes of the tensors. config.json, a checkpoint's mark, comes last."""
    shards = _divide(loader.outline())
    nbytes = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    todo = "free some space or choose another place; nothing was left behind"
    check_space(directory.parent, nbytes, "quantised", todo)
    weight_map: dict[str, str] = {}
    with (
        tqdm(total=loader.nbytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar,
        closing(loader.tensors(bar.update)) as tensors,
    ):
        for i, shard in enumerate(shards, start=1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write_shard(directory / name, shard, tensors)
            weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        _write_json(directory / files.INDEX, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    for file in sorted(model.iterdir()):
        ours = file.name in ("config.json", files.INDEX) or file.suffix in WEIGHTS
        if file.is_file() and not ours and not file.name.startswith("."):
            shutil.copyfile(file, directory / file.name)
    config = read_json(model / "config.json", "the model's configuration")
    _write_json(directory / "config.json", config | {"quantization_config": formats.describe(loader.kinds())})
    return nbytes


def _divide(tensors: "Iterable[tuple[str, Tensor]]") -> "list[dict[str, Tensor]]":
    """Into files of at most SHARD bytes, or of one tensor."""
    shards: list[dict[str, Tensor]] = []
    left = 0
    for name, tensor in tensors:
        if not shards or tensor.nbytes > left:
            shards.append({})
            left = SHARD
        shards[-1][name] = tensor
        left -= tensor.nbytes
    return shards


def _write_shard(path: Path, shard: "dict[str, Tensor]", tensors: "Iterator[tuple[str, Tensor]]") -> None:
    """One safetensors file with the next of `tensors`, which `shard` announces."""
    codes = {dtype: code for code, dtype in files.DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, like in shard.items():
            found, tensor = next(tensors)
            assert (found, tensor.dtype, tensor.shape) == (name, like.dtype, like.shape), f"{found} in place of {name}"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
