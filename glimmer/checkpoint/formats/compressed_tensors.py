"""compressed-tensors (llm-compressor, vLLM): the official FP8 checkpoints, int8, and int4 packed in words.

Its config.json has config_groups, each with a format, a scheme of the weights and one of the activations; a checkpoint
of ours that mixes formats ("mixed-precision") says the format of each group. `FAMILY` lists the formats that are read.
"""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats import packed
from glimmer.checkpoint.formats.base import (
    FLOATS,
    Config,
    Format,
    Matrix,
    Slice,
    Unsupported,
    check_order,
    group_scales,
    misfit,
    row_scales,
    sliced_groups,
    stored_group_size,
    table,
    want,
    want_all,
    want_group_size,
    want_one,
    want_tensor,
)
from glimmer.checkpoint.formats.block_float import check_block
from glimmer.checkpoint.formats.nvfp4 import GROUP, NVFP4
from glimmer.checkpoint.formats.schemes import scheme
from glimmer.checkpoint.formats.wide import wide_matrix, wide_weight
from glimmer.weight import Kind, Weight

FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
CHANNEL = {"strategy": "channel", "dynamic": False}  # how weights are quantised: a scale for each row
TOKEN = {"strategy": "token", "dynamic": True}  # how activations are: a scale for each token, as they come
MIXED = "mixed-precision"
BITS = (4, 8)  # of the codes of pack-quantized


class CompressedTensors(Format):
    """What the formats of the family share.

    names     formats of quantization_config that mean this one
    numbers   its weights' num_bits, type and symmetric
    """

    quant_method = "compressed-tensors"
    names: ClassVar[tuple[str, ...]]
    numbers: ClassVar[dict[str, Any]]

    def check_config(self, config: Config) -> None:
        names = tuple(dict.fromkeys(name for each in FAMILY for name in each.names))
        want_one("format", config.get("format"), (*names, MIXED))
        if config.get("quantization_status") is not None:
            want("quantization_status", config["quantization_status"], "compressed")
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if config.get(key):  # written as null or {} when there is none
                raise Unsupported(key, config[key], "null")
        groups = table("config_groups", config.get("config_groups"))
        if not groups:
            raise Unsupported("config_groups", groups, "at least one group")
        for name, group in groups.items():
            where = f"config_groups.{name}"
            group = table(where, group)
            targets = group.get("targets", [])
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise Unsupported(f"{where}.targets", targets, "a list of names and patterns")
            if group.get("output_activations") is not None:
                raise Unsupported(f"{where}.output_activations", group["output_activations"], "null")
            own = config["format"] if group.get("format") is None else group["format"]
            want_one(f"{where}.format", own, names if config["format"] == MIXED else (config["format"],))
            weights = table(f"{where}.weights", group.get("weights"))
            served = [each for each in FAMILY if own in each.names]
            # A name that float and integer formats share is told apart by the type of the weights.
            fitting = [each for each in served if each.numbers["type"] == weights.get("type")] or served
            fitting[0].check_scheme(where, weights, group.get("input_activations"))

    @abstractmethod
    def check_scheme(self, where: str, weights: dict[str, Any], inputs: Any) -> None:
        """Raise Unsupported when a config group, found at `where`, describes what `read` cannot follow."""

    def describe(self, group_size: int | None) -> dict[str, Any]:
        return {
            "format": self.names[0],
            "weights": self.numbers | CHANNEL,
            "input_activations": self.numbers | TOKEN,
            "output_activations": None,
        }


class PerChannel(CompressedTensors):
    """X.weight (out, in) of 8-bit codes and X.weight_scale (out, 1), or (out,): one scale for each row."""

    codes = "weight"
    kind: ClassVar[Kind]

    def check_scheme(self, where: str, weights: dict[str, Any], inputs: Any) -> None:
        want_all(f"{where}.weights", weights, self.numbers | CHANNEL)
        want_all(f"{where}.input_activations", inputs, self.numbers | TOKEN)

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        name, scale = f"{module}.weight", f"{module}.weight_scale"
        out, inner = checkpoint.shape(name)
        if scale not in checkpoint:
            misfit(checkpoint, name, f"a tensor {scale} with the scales of these codes")
        if checkpoint.shape(scale) not in ((out, 1), (out,)):
            misfit(checkpoint, scale, f"shape {(out, 1)}: one scale for each row of {name}")
        if checkpoint.dtype(scale) not in FLOATS:
            misfit(checkpoint, scale, "bfloat16, float16 or float32")
        return Matrix(self.kind, (out, inner), (name, scale))

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        name, scale = self.stored(checkpoint, module, config).tensors
        scales = row_scales(checkpoint, scale, rows)
        dtype = checkpoint.dtype(scale)
        return Weight(self.kind, checkpoint.tensor(name, rows, cols), scales, scales_dtype=dtype)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        assert weight.scales is not None
        return {"weight": weight.codes, "weight_scale": weight.scales}


class FloatQuantized(PerChannel):
    """The official FP8 checkpoints: 8-bit floats. Those in blocks are read by BlockFloat."""

    accepts = (
        "compressed-tensors: the official FP8 (float-quantized: 8-bit float weights per channel, activations per token "
        "as they come; or weights in blocks of 128 x 128)"
    )
    codes_dtypes = (torch.float8_e4m3fn,)
    names, numbers = ("float-quantized", "naive-quantized"), FLOAT8
    writes = kind = Kind.FP8

    def check_scheme(self, where: str, weights: dict[str, Any], inputs: Any) -> None:
        if weights.get("strategy") != "block":
            return super().check_scheme(where, weights, inputs)
        want_all(f"{where}.weights", weights, self.numbers | {"dynamic": False})
        check_block(f"{where}.weights.block_structure", weights.get("block_structure"))
        want_all(f"{where}.input_activations", inputs, self.numbers | {"dynamic": True})


class IntQuantized(PerChannel):
    """The same in 8-bit integers."""

    accepts = "int-quantized (the same in 8-bit integers)"
    codes_dtypes = (torch.int8,)
    names, numbers = ("int-quantized", "naive-quantized"), INT8
    writes = kind = Kind.INT8


class PackQuantized(CompressedTensors):
    """X.weight_packed (out, in * bits / 32) of int32, eight 4-bit or four 8-bit codes of one row in each;
    X.weight_scale (out, groups); and where they are there X.weight_shape (out, in), X.weight_zero_point
    (out * bits / 32, groups), X.weight_g_idx (in,). Codes are signed numbers plus 8 or 128.
    """

    accepts = "pack-quantized (4- or 8-bit integers per group of 32, 64, 96, ... inputs or per channel)"
    codes, codes_dtypes = "weight_packed", (torch.int32,)
    names, numbers = ("pack-quantized",), INT8 | {"num_bits": 4, "symmetric": False}
    writes = Kind.INT4

    def check_scheme(self, where: str, weights: dict[str, Any], inputs: Any) -> None:
        where, at = f"{where}.weights", f"{where}.input_activations"
        want_all(where, weights, {"type": "int", "dynamic": False})
        want_one(f"{where}.num_bits", weights.get("num_bits"), BITS)
        want_one(f"{where}.strategy", weights.get("strategy"), ("group", "channel"))
        if weights["strategy"] == "group":
            want_group_size(f"{where}.group_size", weights.get("group_size"))
        want_one(f"{where}.actorder", weights.get("actorder"), (None, "static", "weight"))
        if inputs is not None:
            want_all(at, inputs, INT8 | TOKEN)

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        ends = ("packed", "scale", "zero_point", "shape", "g_idx")
        name, scale, zero, size, order = (f"{module}.weight_{end}" for end in ends)
        bits, inner = self._bits(checkpoint, module, config)
        (out, words), said = checkpoint.shape(name), scheme(config, module)
        group_size = stored_group_size(checkpoint, scale, (out, None), inner, said.group_size)
        groups = -(-inner // group_size)
        want_tensor(checkpoint, name, (out, words), torch.int32)
        has = [tensor for tensor in (size, zero, order) if tensor in checkpoint]
        if zero in has:
            want_tensor(checkpoint, zero, (-(-out * bits // 32), groups), torch.int32)
        if order in has:
            want_tensor(checkpoint, order, (inner,), torch.int32)
        if bits == 4 and inner % 2:
            misfit(checkpoint, name, f"an even number of inputs, and not {inner}")
        tensors = (name, scale, *has)
        if bits == 4:
            return Matrix(Kind.INT4, (out, inner), tensors, group_size, zero in has)
        return wide_matrix((out, inner), tensors, groups, zero in has)

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        matrix, (bits, _) = self.stored(checkpoint, module, config), self._bits(checkpoint, module, config)
        (out, inner), (name, scale, *_) = matrix.shape, matrix.tensors
        size = stored_group_size(checkpoint, scale, (out, None), inner, scheme(config, module).group_size)
        each = 32 // bits  # codes in a word
        (first, last), (start, stop) = rows or (0, out), cols or (0, inner)
        groups = (start // size, -(-stop // size)) if bits == 8 else sliced_groups(module, size, start, stop)
        check_order(checkpoint, f"{module}.weight_g_idx", inner, size)
        codes = checkpoint.tensor(name, (first, last), (start // each, -(-stop // each))).view(torch.uint8)
        codes = codes[:, start % each * bits // 8 :][:, : (stop - start) * bits // 8]
        zeros, zero = None, f"{module}.weight_zero_point"
        if zero in matrix.tensors:  # several rows share a word
            words = checkpoint.tensor(zero, (first // each, -(-last // each)), groups)
            zeros = packed.unpack(words.T, bits).T[first % each : first % each + last - first].contiguous()
        scales = group_scales(checkpoint, scale, checkpoint.tensor(scale, (first, last), groups), rows)
        if bits == 8:
            return wide_weight(matrix, codes, scales, zeros, size, (start, stop), checkpoint.dtype(scale))
        return Weight(Kind.INT4, codes, scales, zeros, size, checkpoint.dtype(scale))

    def _bits(self, checkpoint: Checkpoint, module: str, config: Config) -> tuple[int, int]:
        """Bits of a code, and inputs: weight_shape tells both; without it, config.json the first."""
        name, size, said = self.codes_of(module), f"{module}.weight_shape", scheme(config, module).bits
        out, words = checkpoint.shape(name)
        if size not in checkpoint:
            bits = said if said in BITS else 4
            return bits, words * 32 // bits
        if checkpoint.shape(size) != (2,) or checkpoint.dtype(size) not in (torch.int64, torch.int32):
            misfit(checkpoint, size, "two whole numbers: out and in")
        rows, inner = checkpoint.tensor(size).tolist()
        fitting = [bits for bits in BITS if rows == out and inner > 0 and -(-inner * bits // 32) == words]
        if not fitting:
            misfit(checkpoint, name, f"shape (out, in / 8) or (out, in / 4) for {size} = {[rows, inner]}")
        return (said if said in fitting else fitting[0]), inner

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Scales are written in bfloat16, which those of `Weight.quantize` fit exactly."""
        assert weight.scales is not None
        tensors = {
            "weight_packed": packed.words(weight.codes),
            "weight_scale": weight.scales.bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if weight.zeros is not None:
            tensors["weight_zero_point"] = packed.words(packed.pairs(weight.zeros.T)).T.contiguous()
        return tensors

    def describe(self, group_size: int | None) -> dict[str, Any]:
        weights = self.numbers | CHANNEL | {"strategy": "group", "group_size": group_size}
        return super().describe(group_size) | {"weights": weights, "input_activations": None}


class PackedNVFP4(NVFP4, CompressedTensors):
    """nvfp4-pack-quantized: X.weight_packed, X.weight_global_scale, which is a divisor."""

    accepts = "nvfp4-pack-quantized (4-bit floats in groups of 16)"
    codes, overall, inputs, divides = "weight_packed", "weight_global_scale", "input_global_scale", True
    names, numbers = ("nvfp4-pack-quantized",), {"num_bits": 4, "type": "float", "symmetric": True}

    def check_scheme(self, where: str, weights: dict[str, Any], inputs: Any) -> None:
        scheme = {"strategy": "tensor_group", "group_size": GROUP}
        want_all(f"{where}.weights", weights, self.numbers | scheme)


FAMILY: tuple[CompressedTensors, ...] = (FloatQuantized(), IntQuantized(), PackQuantized(), PackedNVFP4())


def quantization_config(
    matrices: Mapping[str, tuple[Kind, int | None]], formats: Mapping[Kind, Format]
) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose modules have these (kind, group_size); formats: who writes a kind.

    The most frequent pair is written for all linear layers; the modules of each other pair are listed, as patterns in
    which any number may stand for a layer or an expert.
    """
    pairs = Counter(pair for pair in matrices.values() if pair[0] != Kind.PLAIN)
    groups: dict[str, dict[str, Any]] = {}
    for i, (pair, _) in enumerate(pairs.most_common()):
        targets = _patterns(matrices, pair) if i else ["Linear"]
        groups[f"group_{i}"] = {"targets": targets} | formats[pair[0]].describe(pair[1])
    used = {group["format"] for group in groups.values()}
    return {
        "quant_method": CompressedTensors.quant_method,
        "format": used.pop() if len(used) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _patterns(matrices, (Kind.PLAIN, None)),
        "kv_cache_scheme": None,
    }


def _patterns(matrices: Mapping[str, tuple[Kind, int | None]], pair: tuple[Kind, int | None]) -> list[str]:
    """Modules of one pair; those that differ in numbers only become one pattern, unless it matches another pair's."""

    def form(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)

    others = {form(name) for name, its in matrices.items() if its != pair}
    found = []
    for name in (name for name, its in matrices.items() if its == pair):
        shared = form(name)
        one = "#" not in shared or shared in others
        found.append(name if one else "re:^" + re.escape(shared).replace(r"\#", r"\d+") + "$")
    return list(dict.fromkeys(found))
