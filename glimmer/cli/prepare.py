"""`glimmer prepare MODEL`: a model's packed file, from which every command starts without reading the checkpoint.

It is written into MODEL, or into the cache directory where MODEL cannot be written, and found there by whatever loads
MODEL in the same dtype and quantisation. With --out it becomes a directory that is a model of its own.
Not here: what a packed file holds (model/packed.py, checkpoint/packed_file.py).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, Command, Option, path, pick
from glimmer.config import EngineConfig
from glimmer.errors import ConfigError
from glimmer.hub import model_directory
from glimmer.model_config import ModelConfig

if TYPE_CHECKING:
    from glimmer import device
    from glimmer.backends import selection
    from glimmer.checkpoint import packed_file
    from glimmer.engine import runner
    from glimmer.model import packed
else:
    packed, packed_file = lazy("glimmer.model.packed"), lazy("glimmer.checkpoint.packed_file")
    runner, selection = lazy("glimmer.engine.runner"), lazy("glimmer.backends.selection")
    device = lazy("glimmer.device")

COMMAND = Command(
    "prepare",
    "Writes the packed file of MODEL: its weights as the CPU's kernels read them. Every command that loads MODEL in\n"
    "the same dtype and quantisation finds it and starts at once.",
    "MODEL [--quantization int4 | int8 | fp8 | none] [--group-size N] [--out DIR]",
    {
        "directories": {
            "model": replace(ENGINE["model"], help="a Hugging Face directory, in any format that is read", default=""),
            "out": Option(
                path,
                "DIR",
                "make DIR a model of its own, which needs no checkpoint",
                "in MODEL, else in $GLIMMER_CACHE or ~/.cache/glimmer",
            ),
        },
        "matrices": {
            "quantization": replace(
                ENGINE["quantization"],
                help="int4, int8 or fp8: quantise as loading would; none: as they are stored",
                default="none",
                choices=("int4", "int8", "fp8", "none"),
            ),
            **pick(ENGINE, "group_size", "dtype"),
        },
        "machine": pick(ENGINE, "threads"),
    },
    positional=("model",),
)


def main(argv: list[str]) -> int:
    """Write the packed file; 0 when it is there."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    if "model" not in settings.given:
        raise ConfigError("no model is named", "a model to prepare", "e.g. glimmer prepare MODEL --quantization int4")
    given, out = settings.fields(ENGINE), settings.take("out")
    if given.get("quantization") == "none":
        del given["quantization"]
    model = model_directory(given["model"])
    config = settings.check(EngineConfig, given | {"model": str(model)})
    if packed_file.is_packed(model):
        raise ConfigError(f"{model} is a packed file", "a checkpoint, to be packed", "use it as it is")
    model_config = ModelConfig.load(str(model))
    dtype = str(runner.resolve_dtype(config.dtype, model_config.dtype)).removeprefix("torch.")
    form = packed_file.Form.of(dtype, config.quantization, config.group_size)
    backend = selection.choose(selection.HOST, device.share_cores(1, config.threads))
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        directory = packed.prepare(model, model_config, form, backend, Path(out) if out else None, report)
    with packed_file.PackedFile(directory) as made:
        print(f"{directory}: {tqdm.format_sizeof(made.nbytes, 'B')} of packed weights, {form.folder}")
    return 0
