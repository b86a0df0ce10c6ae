"""How a matrix lies on disk -> `Weight`, and back.

    format                                          tensors of a matrix X                                   Weight
    plain floats                                    X.weight                                                plain
    compressed-tensors float-quantized (official)   X.weight float8_e4m3fn, X.weight_scale (out, 1)         fp8
    compressed-tensors int-quantized                X.weight int8, X.weight_scale (out, 1)                  int8
    compressed-tensors pack-quantized               X.weight_packed, X.weight_scale (out, groups),
                                                    X.weight_shape, X.weight_zero_point or none             int4
    AWQ (gemm)                                      X.qweight, X.qzeros, X.scales (groups, out)             int4
    GPTQ                                            the same in another order, X.g_idx or none              int4

Which of them a matrix has is decided by what lies on disk, matrix by matrix, since every such checkpoint leaves some
of them plain; `check` refuses other formats by the words of config.json, before a tensor is looked at.

Not here: which tensors there should be and of what shape (model/load.py knows the model), the order of bits
(packed.py), packing (ops/). A further format is one branch of `stored`, one function here and one kind of Weight.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glimmer.checkpoint import packed
from glimmer.checkpoint.files import Checkpoint
from glimmer.errors import CheckpointError, ConfigError
from glimmer.weight import DEFAULT_ZERO_POINT, GROUP, Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ACCEPTED = (
    "no quantization_config (bf16, fp16, fp32); compressed-tensors: the official FP8 (float-quantized: 8-bit float "
    "weights per channel, activations per token as they come), int-quantized (the same in 8-bit integers) or "
    "pack-quantized (4-bit integers per group of 32, 64, 96, ... inputs or per channel); awq (4 bits, gemm); "
    "gptq (4 bits, without desc_act)"
)
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
WEIGHTS, ACTIVATIONS = {"strategy": "channel", "dynamic": False}, {"strategy": "token", "dynamic": True}
ENDS = ("weight", "weight_packed", "qweight")  # of the tensor with a matrix's codes


class Matrix(NamedTuple):
    """A matrix on disk, from headers only: what `read` will make of it, and the names of all its tensors."""

    kind: str
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    group: int | None = None
    zeros: bool = False


def check(quantization_config: dict[str, Any] | None) -> None:
    """Refuse a quantization_config (of config.json) that `read` cannot follow; ConfigError names what it found."""
    if quantization_config is None:
        return
    top = _table("quantization_config", quantization_config)
    match top.get("quant_method"):
        case "compressed-tensors":
            _check_compressed(top)
        case "awq":
            _want("bits", top.get("bits", top.get("w_bit")), 4)
            _want_one("version", str(top.get("version", "gemm")).lower(), ("gemm",))
            _want("zero_point", top.get("zero_point", True), True)
            _want_group("group_size", top.get("group_size", top.get("q_group_size")))
        case "gptq":
            _check_gptq("", top)
            _want_one("checkpoint_format", top.get("checkpoint_format"), (None, "gptq", "gptq_v2"))
            if top.get("is_marlin_format"):
                raise _refusal("is_marlin_format", True, "false")
            for rule, changes in _table("dynamic", top.get("dynamic") or {}).items():
                if not rule.startswith("-:"):  # these are left unquantised
                    _check_gptq(f"dynamic.{rule}.", top | _table(f"dynamic.{rule}", changes))
        case other:
            raise _refusal("quant_method", other, "'compressed-tensors', 'awq' or 'gptq'")


def _check_gptq(where: str, scheme: dict[str, Any]) -> None:
    _want(f"{where}bits", scheme.get("bits"), 4)
    _want_group(f"{where}group_size", scheme.get("group_size"))
    _want(f"{where}desc_act", scheme.get("desc_act", False), False)


def _check_compressed(top: dict[str, Any]) -> None:
    formats = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
    _want_one("format", top.get("format"), formats)
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
        if group.get("output_activations") is not None:
            raise _refusal(f"{where}.output_activations", group["output_activations"], "null")
        own = top["format"] if group.get("format") is None else group["format"]
        _want_one(f"{where}.format", own, formats[:-1] if top["format"] == formats[-1] else (top["format"],))
        weights, inputs = _table(f"{where}.weights", group.get("weights")), group.get("input_activations")
        if own == "pack-quantized":
            _check_packed(f"{where}.weights", weights)
            if inputs is not None:
                _want_all(f"{where}.input_activations", inputs, INT8 | ACTIVATIONS)
            continue
        integers = own == "int-quantized" or (own == "naive-quantized" and weights.get("type") == "int")
        _want_all(f"{where}.weights", weights, (INT8 if integers else FLOAT8) | WEIGHTS)
        _want_all(f"{where}.input_activations", inputs, (INT8 if integers else FLOAT8) | ACTIVATIONS)


def _check_packed(where: str, weights: dict[str, Any]) -> None:
    _want_all(where, weights, {"num_bits": 4, "type": "int", "dynamic": False})
    _want_one(f"{where}.strategy", weights.get("strategy"), ("group", "channel"))
    if weights["strategy"] == "group":
        _want_group(f"{where}.group_size", weights.get("group_size"))
    _want_one(f"{where}.actorder", weights.get("actorder"), (None, "static", "weight"))


def gptq_zeros(quantization_config: Mapping[str, Any] | None) -> str:
    """What GPTQ's qzeros hold: zeros "less one" (its first version), "plain" (its second), or nothing but the "middle".

    Symmetric checkpoints are told from their values: some call themselves the first version and are the second.
    """
    said = quantization_config or {}
    if said.get("sym") is True:
        return "middle"
    return "plain" if said.get("checkpoint_format") == "gptq_v2" else "less one"


def holds(checkpoint: Checkpoint, module: str) -> bool:
    """Whether there is a matrix of that name, in whatever format."""
    return any(f"{module}.{end}" in checkpoint for end in ENDS)


def stored(checkpoint: Checkpoint, module: str) -> Matrix:
    """What lies on disk as the matrix of `module`; headers only (and weight_shape, two numbers).

    Raises CheckpointError when its tensors are missing, do not fit together, or are none that a format explains.
    """
    ends = [end for end in ENDS if f"{module}.{end}" in checkpoint]
    if len(ends) != 1:
        others = sorted(other for other in checkpoint.names() if other.rpartition(".")[0] == module)
        raise CheckpointError(
            f"no tensor {module}.weight in {checkpoint.directory}" + (f", only {', '.join(others)}" if others else "")
            if not ends
            else f"{' and '.join(f'{module}.{end}' for end in ends)} in {checkpoint.directory}",
            f"{module}.weight, in bf16, fp16, fp32, or quantised with its scales; or one of its packed forms",
            "finish the download, or use a checkpoint in a format that glimmer reads (docs/numerics.md)",
        )
    name = f"{module}.{ends[0]}"
    if len(checkpoint.shape(name)) != 2:
        raise _misfit(checkpoint, name, "a matrix (out, in)")
    explain = {"weight": _stored_weight, "weight_packed": _stored_packed, "qweight": _stored_q}
    return explain[ends[0]](checkpoint, module)


def _stored_weight(checkpoint: Checkpoint, module: str) -> Matrix:
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    if dtype in FLOATS:
        if scale in checkpoint:
            raise _misfit(checkpoint, name, f"float8_e4m3fn or int8, because there is a {scale}")
        return Matrix("plain", shape, (name,))
    kinds = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
    if dtype not in kinds:
        raise _misfit(checkpoint, name, "bfloat16, float16, float32, or float8_e4m3fn or int8 with scales")
    if scale not in checkpoint:
        raise _misfit(checkpoint, name, f"a tensor {scale} with the scales of these codes")
    if checkpoint.shape(scale) not in ((shape[0], 1), (shape[0],)):
        raise _misfit(checkpoint, scale, f"shape {(shape[0], 1)}: one scale for each row of {name}")
    if checkpoint.dtype(scale) not in FLOATS:
        raise _misfit(checkpoint, scale, "bfloat16, float16 or float32")
    return Matrix(kinds[dtype], shape, (name, scale))


def _stored_packed(checkpoint: Checkpoint, module: str) -> Matrix:
    name, scale, zero, size, order = (
        f"{module}.weight_{end}" for end in ("packed", "scale", "zero_point", "shape", "g_idx")
    )
    out, inner = checkpoint.shape(name)[0], checkpoint.shape(name)[1] * 8
    if size in checkpoint:
        if checkpoint.shape(size) != (2,) or checkpoint.dtype(size) not in (torch.int64, torch.int32):
            raise _misfit(checkpoint, size, "two whole numbers: out and in")
        asked, inner = inner, int(checkpoint.tensor(size)[1])
        if checkpoint.tensor(size)[0] != out or -(-inner // 8) * 8 != asked:
            raise _misfit(checkpoint, name, f"shape (out, in / 8) for {size} = {checkpoint.tensor(size).tolist()}")
    group = _group(checkpoint, scale, (out, None), inner)
    _want_tensor(checkpoint, name, (out, -(-inner // 8)), torch.int32)
    has = [tensor for tensor in (size, zero, order) if tensor in checkpoint]
    if zero in has:
        _want_tensor(checkpoint, zero, (-(-out // 8), -(-inner // group)), torch.int32)
    if order in has:
        _want_tensor(checkpoint, order, (inner,), torch.int32)
    return Matrix("int4", (out, inner), (name, scale, *has), group, zero in has)


def _stored_q(checkpoint: Checkpoint, module: str) -> Matrix:
    name, zero, scale, order = (f"{module}.{end}" for end in ("qweight", "qzeros", "scales", "g_idx"))
    shape = checkpoint.shape(name)
    if scale not in checkpoint or len(checkpoint.shape(scale)) != 2:
        raise _misfit(checkpoint, name, f"a tensor {scale} (groups, out) with the scales of these codes")
    out = checkpoint.shape(scale)[1]
    awq = shape[1] != out
    inner = shape[0] if awq else 8 * shape[0]
    group = _group(checkpoint, scale, (None, out), inner)
    if out % 8 or inner % 8:
        raise _misfit(checkpoint, name, "inputs and outputs in eights")
    _want_tensor(checkpoint, name, (inner, out // 8) if awq else (inner // 8, out), torch.int32)
    if zero not in checkpoint:
        raise _misfit(checkpoint, name, f"a tensor {zero} with the zeros of these codes")
    _want_tensor(checkpoint, zero, (-(-inner // group), out // 8), torch.int32)
    if order in checkpoint:
        _want_tensor(checkpoint, order, (inner,), torch.int32)
    return Matrix("int4", (out, inner), (name, scale, zero, *[t for t in (order,) if t in checkpoint]), group, True)


def _group(checkpoint: Checkpoint, scale: str, shape: tuple[int | None, int | None], inner: int) -> int:
    """Inputs that share a scale, from the shape of the scales, whose side None counts the groups."""
    if scale not in checkpoint:
        raise CheckpointError(
            f"no tensor {scale} in {checkpoint.directory}",
            "the scales of a matrix beside its codes",
            "finish the download of the checkpoint",
        )
    found = checkpoint.shape(scale)
    if len(found) == 2 and checkpoint.dtype(scale) in FLOATS:
        groups = found[shape.index(None)]
        fits = found == tuple(groups if side is None else side for side in shape)
        if fits and groups == -(-inner // GROUP):
            return GROUP
        if fits and groups and inner % groups == 0 and (groups == 1 or inner // groups % GROUP == 0):
            return inner // groups
    sides = tuple("groups" if side is None else side for side in shape)
    expected = f"shape ({sides[0]}, {sides[1]}), groups of a multiple of {GROUP} of the {inner} inputs, or one of all"
    raise _misfit(checkpoint, scale, f"bfloat16, float16 or float32 of {expected}")


def read(
    checkpoint: Checkpoint,
    module: str,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    gptq_zeros: str = "less one",
) -> Weight:
    """Rows start:stop and columns start:stop (None: all) of the matrix of `module`.

    A plain matrix's values, and codes that lie on disk as Weight has them, are a read-only view into the file; scales
    are float32 copies. gptq_zeros: as the function of that name says.

    Raises CheckpointError as `stored` does, when a scale is no positive, finite number (int4: not finite), when g_idx
    gives a column to another group than its place does, when columns are cut within a group, and when zeros are not
    in the middle where config.json says that all are.
    """
    matrix = stored(checkpoint, module)
    name = matrix.tensors[0]
    if matrix.kind == "plain":
        return Weight("plain", checkpoint.tensor(name, rows, cols))
    if matrix.kind != "int4":
        scales = checkpoint.tensor(matrix.tensors[1], rows).reshape(-1, 1).to(torch.float32, copy=True)
        _check_scales(checkpoint, matrix.tensors[1], scales, scales > 0, rows)
        return Weight(matrix.kind, checkpoint.tensor(name, rows, cols), scales)
    (first, last), (start, stop) = rows or (0, matrix.shape[0]), cols or (0, matrix.shape[1])
    groups = _cut_groups(module, matrix, start, stop)
    _check_order(checkpoint, matrix)
    words = first // 8, -(-last // 8)  # that hold these outputs, where eight of them share one
    ours = slice(first % 8, first % 8 + last - first)
    zeros = None
    if name.endswith(".weight_packed"):
        scales = checkpoint.tensor(matrix.tensors[1], (first, last), groups)
        codes = checkpoint.tensor(name, (first, last), (start // 8, -(-stop // 8))).view(torch.uint8)
        codes = codes[:, start % 8 // 2 :][:, : (stop - start) // 2]
        if matrix.zeros:
            zeros = packed.nibbles(checkpoint.tensor(f"{module}.weight_zero_point", words, groups).T).T[ours]
    else:
        scales = checkpoint.tensor(matrix.tensors[1], groups, (first, last)).T
        zeros = checkpoint.tensor(matrix.tensors[2], groups, words)
        if checkpoint.shape(name)[0] == matrix.shape[1]:
            codes = packed.pairs(packed.from_awq(checkpoint.tensor(name, (start, stop), words))[ours])
            zeros = packed.from_awq(zeros)[ours]
        else:
            codes = packed.from_gptq(checkpoint.tensor(name, (start // 8, -(-stop // 8)), (first, last)))
            codes = codes[:, start % 8 // 2 :][:, : (stop - start) // 2]
            zeros = packed.nibbles(zeros).T[ours]
            if gptq_zeros == "middle":
                _check_middle(checkpoint, matrix.tensors[2], zeros)
                zeros = None
            elif gptq_zeros == "less one":
                zeros = (zeros + 1) & 15
    scales = scales.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _check_scales(checkpoint, matrix.tensors[1], scales, scales.isfinite(), rows)
    return Weight("int4", codes, scales, None if zeros is None else zeros.contiguous(), matrix.group)


def _cut_groups(module: str, matrix: Matrix, start: int, stop: int) -> tuple[int, int]:
    """The groups that columns start:stop of an int4 matrix belong to; they must begin with a group, or lie in one."""
    size = matrix.group
    within = stop > start and start // size == (stop - 1) // size
    if start % 2 or stop % 2 or (start % size and not within):
        raise CheckpointError(
            f"columns {start}:{stop} of {module} are wanted by one process; it is quantised in groups of {size}",
            f"cuts between columns that are multiples of {size}",
            "run fewer processes (tensor_parallel_size), or a checkpoint with smaller groups",
        )
    return start // size, -(-stop // size)


def _check_order(checkpoint: Checkpoint, matrix: Matrix) -> None:
    """A g_idx must say of each column what its place says already."""
    order = next((name for name in matrix.tensors if name.endswith("g_idx")), None)
    if order is None:
        return
    places = torch.arange(matrix.shape[1], dtype=torch.int32) // matrix.group
    if not torch.equal(checkpoint.tensor(order), places):
        raise CheckpointError(
            f"{checkpoint.file(order)} has a {order} that reorders its columns (desc_act, activation order)",
            "columns of a group side by side",
            "use a checkpoint quantised without activation order (desc_act: false)",
        )


def _check_middle(checkpoint: Checkpoint, name: str, zeros: Tensor) -> None:
    """Zeros of a symmetric GPTQ matrix: all are 8, kept as such or less one."""
    if not ((zeros == DEFAULT_ZERO_POINT).all() or (zeros == DEFAULT_ZERO_POINT - 1).all()):
        raise CheckpointError(
            f"{checkpoint.file(name)} has zeros from {zeros.min()} to {zeros.max()} in {name}; config.json says sym",
            f"{DEFAULT_ZERO_POINT - 1} or {DEFAULT_ZERO_POINT} everywhere, which symmetric GPTQ checkpoints have",
            "set sym to false in quantization_config if the checkpoint is asymmetric, or download it again",
        )


def _check_scales(
    checkpoint: Checkpoint, name: str, scales: Tensor, good: Tensor, rows: tuple[int, int] | None
) -> None:
    wrong = ~(good & scales.isfinite())
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise CheckpointError(
            f"{checkpoint.file(name)} has {int(wrong.sum())} scales in {name} that are no positive, finite numbers, "
            f"the first of them {scales[row, group]} in row {row + (rows[0] if rows else 0)}",
            "scales above zero",
            f"download {checkpoint.file(name).name} again; if it stays so, the checkpoint is broken",
        )


def encode(weight: Weight) -> dict[str, Tensor]:
    """The tensors by which a checkpoint keeps a matrix X, by the last part of their names: "weight" is X.weight.

    int4 becomes pack-quantized, its scales in bfloat16, which those of `Weight.quantize` fit exactly.
    """
    if weight.kind == "plain":
        return {"weight": weight.codes}
    if weight.kind != "int4":
        return {"weight": weight.codes, "weight_scale": weight.scales}
    tensors = {
        "weight_packed": packed.words(weight.codes),
        "weight_scale": weight.scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = packed.words(packed.pairs(weight.zeros.T)).T.contiguous()
    return tensors


def describe(matrices: Mapping[str, tuple[str, int | None]]) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose modules have these (kind, group), written by `encode`.

    The most frequent pair speaks for all linear layers; the modules of each other pair are listed, as patterns in which
    any number may stand for a layer or an expert.
    """
    formats = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
    pairs = Counter(pair for pair in matrices.values() if pair[0] != "plain")
    groups, used = {}, [formats[kind] for kind, _ in pairs]
    for i, (pair, _) in enumerate(pairs.most_common()):
        kind, group = pair
        base = {"fp8": FLOAT8, "int8": INT8, "int4": INT8 | {"num_bits": 4, "symmetric": False}}[kind]
        weights = base | WEIGHTS | ({"strategy": "group", "group_size": group} if kind == "int4" else {})
        inputs = None if kind == "int4" else base | ACTIVATIONS
        groups[f"group_{i}"] = {
            "targets": _patterns(matrices, pair) if i else ["Linear"],
            "format": formats[kind],
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": used[0] if len(set(used)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _patterns(matrices, ("plain", None)),
        "kv_cache_scheme": None,
    }


def _patterns(matrices: Mapping[str, tuple[str, int | None]], pair: tuple[str, int | None]) -> list[str]:
    """Modules of one pair; those that differ in numbers only become one pattern, unless it matches another pair's."""
    form = lambda name: re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
    others = {form(name) for name, its in matrices.items() if its != pair}
    found = []
    for name in (name for name, its in matrices.items() if its == pair):
        shared = form(name)
        one = "#" not in shared or shared in others
        found.append(name if one else "re:^" + re.escape(shared).replace(r"\#", r"\d+") + "$")
    return list(dict.fromkeys(found))


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


def _want_all(where: str, value: Any, wanted: dict[str, Any]) -> None:
    scheme = _table(where, value)
    for key, each in wanted.items():
        _want(f"{where}.{key}", scheme.get(key), each)


def _want_one(key: str, value: Any, wanted: tuple[Any, ...]) -> None:
    if value not in wanted:
        raise _refusal(key, value, " or ".join(map(repr, wanted)))


def _want_group(key: str, value: Any) -> None:
    if type(value) is not int or not (value == -1 or (value > 0 and value % GROUP == 0)):
        raise _refusal(key, value, f"a multiple of {GROUP}, or -1 for whole rows,")


def _want_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if checkpoint.shape(name) != shape or checkpoint.dtype(name) != dtype:
        raise _misfit(checkpoint, name, f"{str(dtype).removeprefix('torch.')} of shape {shape}")


def _refusal(key: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"config.json has a quantization_config with {key} = {value!r}, where {wanted} can be read",
        ACCEPTED,
        "use the bf16 checkpoint, the one whose name ends in -FP8, or one in a format above",
    )


def _misfit(checkpoint: Checkpoint, name: str, expected: str) -> CheckpointError:
    dtype = str(checkpoint.dtype(name)).removeprefix("torch.")
    return CheckpointError(
        f"{checkpoint.file(name)} has {name} as {dtype} of shape {checkpoint.shape(name)}",
        expected,
        "finish or repeat the download; if it stays so, use a checkpoint in bf16 or in the official FP8 format",
    )
