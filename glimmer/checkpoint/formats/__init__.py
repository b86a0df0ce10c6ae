"""How a matrix is stored on disk -> `Weight`, and back: `FORMATS` lists the ways, each of them one class.

    format                                          tensors of a matrix X                                   Weight
    plain values                                    X.weight                                                plain
    compressed-tensors float-quantized (official)   X.weight float8_e4m3fn, X.weight_scale (out, 1)         fp8
    compressed-tensors int-quantized                X.weight int8, X.weight_scale (out, 1)                  int8
    compressed-tensors pack-quantized               X.weight_packed, X.weight_scale (out, groups),
                                                    X.weight_shape, X.weight_zero_point or none             int4, 8 bits
    AWQ (gemm)                                      X.qweight, X.qzeros, X.scales (groups, out)             int4
    GPTQ, AutoRound                                 the same in another order, X.g_idx or none              int4, 8 bits
    8-bit floats in blocks of 128 x 128             X.weight float8_e4m3fn, X.weight_scale_inv or
                                                    X.weight_scale (out / 128, in / 128)                    plain
    NVFP4 (compressed-tensors, ModelOpt)            4-bit floats, scales of 16 inputs, one of all           plain
    experts of a layer in one tensor                mlp.experts.gate_up_proj, mlp.experts.down_proj         plain

8-bit integers are of kind int8 where they are symmetric with one scale for a row, else plain. What becomes plain
although its codes are smaller is *widened*: Matrix.widened names it, and the start of a model says so.

Which of them a matrix has is decided by the tensors, matrix by matrix, since every such checkpoint leaves some of them
plain; `check` refuses other formats by the words of config.json, before a tensor is looked at. A further format is a
class of base.Format in a file of its own, and its name in FORMATS.
Not here: which matrices there should be and of what shape (model/names.py), and packing (backends/).
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats import compressed_tensors
from glimmer.checkpoint.formats.awq import AWQ
from glimmer.checkpoint.formats.base import FLOATS, Config, Format, Matrix, Slice, Unsupported, misfit, table
from glimmer.checkpoint.formats.block_float import BlockFloat
from glimmer.checkpoint.formats.gptq import GPTQ, AutoRound
from glimmer.checkpoint.formats.nvfp4 import ModelOptNVFP4
from glimmer.checkpoint.formats.plain import Plain
from glimmer.checkpoint.formats.schemes import patterns
from glimmer.checkpoint.formats.stacked import Stacked
from glimmer.errors import CheckpointError, ConfigError
from glimmer.weight import Kind, Weight

# A matrix is of the first format that matches it.
FORMATS: tuple[Format, ...] = (
    Plain(), BlockFloat(), ModelOptNVFP4(), *compressed_tensors.FAMILY, AWQ(), AutoRound(), GPTQ(), Stacked(),
)  # fmt: skip

KNOWN = {"mxfp4": "MXFP4", "mx_fp": "MXFP4"}  # what is refused by its name, by a word in the value that says it


def check(quantization_config: Any) -> None:
    """Refuse a quantization_config (of config.json) that `read` cannot follow; ConfigError names what it found."""
    if quantization_config is None:
        return
    try:
        config = table("quantization_config", quantization_config)
        method = config.get("quant_method")
        for each in FORMATS:
            if each.quant_method is not None and each.quant_method == method:
                each.check_config(config)
                return _check_patterns(config)
        *methods, last = dict.fromkeys(repr(each.quant_method) for each in FORMATS if each.quant_method is not None)
        raise Unsupported("quant_method", method, f"{', '.join(methods)} or {last}")
    except Unsupported as error:
        found = f"{error.key} = {error.value!r}, where {error.wanted} can be read"
        found += next((f" ({name} is not read)" for word, name in KNOWN.items() if word in repr(error.value)), "")
        raise ConfigError(
            f"config.json has a quantization_config with {found}",
            "; ".join(each.accepts for each in FORMATS),
            "use the bf16 checkpoint, the one whose name ends in -FP8, or one in a format above",
        ) from None


def _check_patterns(config: Config) -> None:
    for where, pattern in patterns(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise Unsupported(where, pattern, "a regular expression") from None


def holds(checkpoint: Checkpoint, module: str) -> bool:
    """Whether there is a matrix of that name, in whatever format."""
    return any(name in checkpoint for name in _names_of_codes(module))


def _names_of_codes(module: str) -> dict[str, None]:
    """The names that the tensor with the codes of a matrix may have, each once."""
    return dict.fromkeys(each.codes_of(module) for each in _one_of_each_name(FORMATS))


@lru_cache(maxsize=1)
def _one_of_each_name(formats: tuple[Format, ...]) -> tuple[Format, ...]:
    """The first of all formats that give this tensor the same name: it is asked for thousands of matrices."""
    return tuple({(type(each).codes_of, each.codes): each for each in reversed(formats)}.values())[::-1]


def find(checkpoint: Checkpoint, module: str, config: Config) -> Format:
    """The format of the matrix of `module`. Raises CheckpointError when there is no matrix, or none that we explain."""
    found = [name for name in _names_of_codes(module) if name in checkpoint]
    if len(found) != 1:
        others = sorted(other for other in checkpoint.names() if other.rpartition(".")[0] == module)
        raise CheckpointError(
            f"no tensor {module}.weight in {checkpoint.directory}" + (f", only {', '.join(others)}" if others else "")
            if not found
            else f"{' and '.join(found)} in {checkpoint.directory}",
            f"{module}.weight, in bf16, fp16, fp32, or quantised with its scales; or one of its packed forms",
            "finish the download, or use a checkpoint in a format that glimmer reads (docs/numerics.md)",
        )
    (name,) = found
    refused: list[Format] = []
    for each in FORMATS:
        if each.codes_of(module) == name:
            if not refused and len(checkpoint.shape(name)) != each.dimensions:
                misfit(checkpoint, name, "a matrix (out, in)")
            if each.matches(checkpoint, module, config):
                return each
            refused.append(each)
    dtypes = [str(dtype).removeprefix("torch.") for each in refused for dtype in each.codes_dtypes]
    misfit(checkpoint, name, f"{', '.join(dtypes)}, codes of 8 bits with their scales")


def stored(checkpoint: Checkpoint, module: str, quantization_config: Config | None = None) -> Matrix:
    """What is on disk as the matrix of `module`; headers only (and weight_shape, two numbers).

    quantization_config: of config.json, which tells formats apart whose tensors look alike. Raises CheckpointError
    when tensors are missing, do not fit together, or are none that a format explains.
    """
    config = quantization_config or {}
    return find(checkpoint, module, config).stored(checkpoint, module, config)


def read(
    checkpoint: Checkpoint,
    module: str,
    rows: Slice = None,
    cols: Slice = None,
    quantization_config: Config | None = None,
) -> Weight:
    """Rows start:stop and columns start:stop (None: all) of the matrix of `module`.

    Plain values, and codes that are on disk as Weight has them, come in their type on disk; scales are float32
    copies, and scales_dtype is their type on disk. Raises CheckpointError as `stored` does, when a scale is no
    positive, finite number (int4: not finite), when g_idx gives a column to another group than its place does, when
    columns are cut within a group, and when zero points are not in the middle where config.json says that all are.
    """
    config = quantization_config or {}
    return find(checkpoint, module, config).read(checkpoint, module, rows, cols, config)


def encode(weight: Weight) -> dict[str, Tensor]:
    """The tensors by which a checkpoint keeps a matrix X, by the last part of their names: "weight" is X.weight."""
    return _writers()[Kind(weight.kind)].encode(weight)


def describe(matrices: Mapping[str, tuple[Kind, int | None]]) -> dict[str, Any]:
    """The quantization_config of a checkpoint, written by `encode`, whose modules have these (kind, group_size)."""
    return compressed_tensors.quantization_config(matrices, _writers())


def _writers() -> dict[Kind, Format]:
    return {each.writes: each for each in FORMATS if each.writes is not None}


def vector(checkpoint: Checkpoint, name: str, rows: Slice = None) -> Tensor:
    """Elements start:stop (None: all) of the weight of a norm or of a bias, in its type on disk.

    Raises CheckpointError when it is missing, not one-dimensional, or not bf16, fp16 or fp32.
    """
    if len(checkpoint.shape(name)) != 1 or checkpoint.dtype(name) not in FLOATS:
        misfit(checkpoint, name, "a vector of bfloat16, float16 or float32")
    return checkpoint.tensor(name, rows)
