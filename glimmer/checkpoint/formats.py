"""How a matrix lies on disk -> `Weight`.

Two formats are read: plain floats, and the official FP8 one (compressed-tensors "float-quantized": float8_e4m3fn codes
`X.weight` and one scale per output row `X.weight_scale`). Which of them a matrix has is decided by what lies on disk,
matrix by matrix, since every FP8 checkpoint leaves some of them plain; `check` refuses other formats by the words of
config.json, before a tensor is looked at.

Not here: which tensors there should be and of what shape (model/load.py knows the model), packing (ops/).
A further format is one function here and one kind of Weight.
"""

from typing import Any

import torch
from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.errors import CheckpointError, ConfigError
from glimmer.weight import Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ACCEPTED = (
    "no quantization_config (bf16, fp16, fp32), or the official FP8 one: quant_method 'compressed-tensors', format "
    "'float-quantized', 8-bit float weights per channel, 8-bit float activations quantised per token as they come"
)
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def check(quantization_config: dict[str, Any] | None) -> None:
    """Refuse a quantization_config (of config.json) that `read` cannot follow; ConfigError names what it found."""
    if quantization_config is None:
        return
    top = _table("quantization_config", quantization_config)
    _want("quant_method", top.get("quant_method"), "compressed-tensors")
    _want("format", top.get("format"), "float-quantized")
    if top.get("quantization_status") is not None:
        _want("quantization_status", top["quantization_status"], "compressed")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if top.get(key):  # written as null or {} when there is none
            raise _refusal(key, top[key], "null")
    groups = _table("config_groups", top.get("config_groups"))
    if not groups:
        raise _refusal("config_groups", groups, "at least one group")
    for name, group in groups.items():
        where = f"config_groups.{name}"
        group = _table(where, group)
        if group.get("format") is not None:
            _want(f"{where}.format", group["format"], "float-quantized")
        if group.get("output_activations") is not None:
            raise _refusal(f"{where}.output_activations", group["output_activations"], "null")
        for part, wanted in (("weights", WEIGHTS), ("input_activations", ACTIVATIONS)):
            scheme = _table(f"{where}.{part}", group.get(part))
            for key, value in wanted.items():
                _want(f"{where}.{part}.{key}", scheme.get(key), value)


def stored(checkpoint: Checkpoint, module: str) -> tuple[str, tuple[int, int]]:
    """Kind of Weight ("plain" or "fp8") and (out, in) of `module`.weight; headers only, no data.

    Raises CheckpointError when the tensor is missing, is no matrix, or has a type or a scale that no format explains.
    """
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    if name not in checkpoint:
        others = sorted(other for other in checkpoint.names() if other.rpartition(".")[0] == module)
        raise CheckpointError(
            f"no tensor {name} in {checkpoint.directory}" + (f", only {', '.join(others)}" if others else ""),
            f"{name}, in bf16, fp16, fp32, or in float8_e4m3fn with {scale}",
            "finish the download, or use a checkpoint in bf16 or in the official FP8 format",
        )
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    if len(shape) != 2:
        raise _misfit(checkpoint, name, "a matrix (out, in)")
    if dtype in FLOATS:
        if scale in checkpoint:
            raise _misfit(checkpoint, name, f"float8_e4m3fn, because there is a {scale}")
        return "plain", shape
    if dtype != torch.float8_e4m3fn:
        raise _misfit(checkpoint, name, "bfloat16, float16, float32, or float8_e4m3fn with scales")
    if scale not in checkpoint:
        raise _misfit(checkpoint, name, f"a tensor {scale} with the scales of these codes")
    if checkpoint.shape(scale) not in ((shape[0], 1), (shape[0],)):
        raise _misfit(checkpoint, scale, f"shape {(shape[0], 1)}: one scale for each row of {name}")
    if checkpoint.dtype(scale) not in FLOATS:
        raise _misfit(checkpoint, scale, "bfloat16, float16 or float32")
    return "fp8", shape


def read(
    checkpoint: Checkpoint, module: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
) -> Weight:
    """Rows start:stop and columns start:stop (None: all) of the matrix of `module`.

    The codes, and a plain matrix's values, are a read-only view into the file; scales are float32 copies (rows, 1).
    Raises CheckpointError as `stored` does, and when a scale is not a positive, finite number.
    """
    kind, _ = stored(checkpoint, module)
    codes = checkpoint.tensor(f"{module}.weight", rows, cols)
    if kind == "plain":
        return Weight(kind, codes)
    name = f"{module}.weight_scale"
    scales = checkpoint.tensor(name, rows).reshape(-1, 1).to(torch.float32, copy=True)
    wrong = ~(torch.isfinite(scales) & (scales > 0))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise CheckpointError(
            f"{checkpoint.file(name)} has {int(wrong.sum())} scales in {name} that are no positive, finite numbers, "
            f"the first of them {scales[row, 0]} in row {row + (rows[0] if rows else 0)}",
            "scales above zero",
            f"download {checkpoint.file(name).name} again; if it stays so, the checkpoint is broken",
        )
    return Weight(kind, codes, scales)


def vector(checkpoint: Checkpoint, name: str, rows: tuple[int, int] | None = None) -> Tensor:
    """Elements start:stop (None: all) of a norm's weight or a bias, as stored: a read-only view into the file.

    Raises CheckpointError when it is missing, not one-dimensional, or not bf16, fp16 or fp32.
    """
    if len(checkpoint.shape(name)) != 1 or checkpoint.dtype(name) not in FLOATS:
        raise _misfit(checkpoint, name, "a vector of bfloat16, float16 or float32")
    return checkpoint.tensor(name, rows)


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refusal(key, value, "a table")
    return value


def _want(key: str, value: Any, wanted: Any) -> None:
    if value != wanted or type(value) is not type(wanted):
        raise _refusal(key, value, repr(wanted))


def _refusal(key: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"config.json has a quantization_config with {key} = {value!r}, where {wanted} can be read",
        ACCEPTED,
        "use the bf16 checkpoint or the one whose name ends in -FP8",
    )


def _misfit(checkpoint: Checkpoint, name: str, expected: str) -> CheckpointError:
    dtype = str(checkpoint.dtype(name)).removeprefix("torch.")
    return CheckpointError(
        f"{checkpoint.file(name)} has {name} as {dtype} of shape {checkpoint.shape(name)}",
        expected,
        "use a checkpoint in bf16 or in the official FP8 format",
    )
