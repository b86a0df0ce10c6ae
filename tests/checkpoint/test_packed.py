"""Quantised checkpoints of others: each layout written here, code by code, from its public definition, then read."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats import check, describe, encode, read, stored
from glimmer.checkpoint.formats.gptq import gptq_zeros
from glimmer.errors import CheckpointError, ConfigError
from glimmer.weight import Weight


def pack(codes: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Rows of codes 0..15 -> int32 words of eight: bits 4i..4i+3 of a word hold its code number order[i]."""
    words = []
    for row in codes:
        row = row + [0] * (-len(row) % 8)
        eights = [row[i : i + 8] for i in range(0, len(row), 8)]
        words.append([sum(eight[order[i]] << 4 * i for i in range(8)) for eight in eights])
    return torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in words], dtype=torch.int32)


def draw(out: int, inner: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """codes (out, in), zeros and float16-exact scales (out, groups); every code and zero occurs."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inner // group)
    codes = torch.randint(0, 16, (out, inner), generator=generator)
    zeros = torch.randint(0, 16, (out, groups), generator=generator)
    return codes, zeros, (torch.rand(out, groups, generator=generator) / 50 + 0.01).half()


def values(codes: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """(q - z) * s, one column at a time."""
    columns = range(codes.shape[1])
    return torch.stack([(codes[:, i] - zeros[:, i // group]) * scales[:, i // group].float() for i in columns], 1)


def compressed(codes: Tensor, zeros: Tensor | None, scales: Tensor) -> dict[str, Tensor]:
    """Packed along inputs; zeros along outputs. Both hold signed numbers plus 8, which is what 0..15 are."""
    tensors = {
        "m.weight_packed": pack(codes.tolist()),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor(codes.shape),
    }
    return tensors if zeros is None else tensors | {"m.weight_zero_point": pack(zeros.T.tolist()).T.contiguous()}


def awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "m.qweight": pack(codes.T.tolist(), order),
        "m.qzeros": pack(zeros.T.tolist(), order),
        "m.scales": scales.T.contiguous(),
    }


def gptq(codes: Tensor, zeros: Tensor, scales: Tensor, less: int = 1) -> dict[str, Tensor]:
    inner = codes.shape[1]
    return {
        "m.qweight": pack(codes.tolist()).T.contiguous(),
        "m.qzeros": pack(((zeros - less) % 16).T.tolist()),
        "m.scales": scales.T.contiguous(),
        "m.g_idx": torch.arange(inner, dtype=torch.int32) // (inner // scales.shape[1]),
    }


def write(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory)


LAYOUTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "compressed": compressed, "awq": awq, "gptq": gptq, "gptq v2": lambda *args: gptq(*args, less=0)
}  # fmt: skip
SAID = {"gptq v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}  # in quantization_config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "out, inner, group",
    [
        (16, 64, 32),
        (8, 256, 128),
        (24, 192, 64),
        (40, 96, 96),
        (8, 1408, 128),
        (8, 352, 32),
        (8, 72, 72),
    ],
)
def test_every_layout_holds_its_values(layout, out, inner, group, tmp_path):
    codes, zeros, scales = draw(out, inner, group)
    checkpoint = write(tmp_path, LAYOUTS[layout](codes, zeros, scales))
    found = stored(checkpoint, "m")
    assert found[:2] == ("int4", (out, inner)) and found.group_size == group and found.zeros
    assert set(found.tensors) == checkpoint.names()
    weight = read(checkpoint, "m", quantization_config=SAID.get(layout))
    assert (weight.kind, weight.shape, weight.group_size) == ("int4", (out, inner), group)
    assert (weight.codes.dtype, weight.scales.dtype, weight.zeros.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert torch.equal(weight.zeros.long(), zeros) and torch.equal(weight.nibbles().long(), codes)
    assert torch.equal(weight.dequantize(), values(codes, zeros, scales, group))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out, inner, group", [(5, 64, 32), (7, 44, 32), (3, 20, 20), (9, 88, 32), (1, 256, 128)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_of_odd_sizes(symmetric, out, inner, group, scale, tmp_path):
    """Words are filled up where eight do not divide a side; without zeros, the codes are signed numbers plus 8."""
    codes, zeros, scales = draw(out, inner, group)
    zeros = torch.full_like(zeros, 8) if symmetric else zeros
    checkpoint = write(tmp_path, compressed(codes, None if symmetric else zeros, scales.to(scale)))
    assert stored(checkpoint, "m").zeros is not symmetric
    weight = read(checkpoint, "m")
    assert weight.shape == (out, inner) and (weight.zeros is None) == symmetric
    assert torch.equal(weight.dequantize(), values(codes, zeros, scales.to(scale), group))


@pytest.fixture(scope="module")
def sliced(tmp_path_factory) -> dict[str, tuple[Checkpoint, Tensor]]:
    codes, zeros, scales = draw(24, 320, 32)
    whole = values(codes, zeros, scales, 32)
    make = lambda layout: write(tmp_path_factory.mktemp("sliced"), LAYOUTS[layout](codes, zeros, scales))
    return {layout: (make(layout), whole) for layout in LAYOUTS}


@settings(max_examples=200, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    rows=st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted).filter(lambda r: r[0] < r[1]),
    first=st.integers(0, 9),
    width=st.integers(1, 160),
)
def test_slices(sliced, layout, rows, first, width):
    """Any rows; columns from the border of a group to any even one."""
    checkpoint, whole = sliced[layout]
    cols = (32 * first, min(32 * first + 2 * width, 320))
    found = read(checkpoint, "m", tuple(rows), cols, quantization_config=SAID.get(layout))
    assert found.shape == (rows[1] - rows[0], cols[1] - cols[0])
    assert torch.equal(found.dequantize(), whole[slice(*rows), slice(*cols)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cols", [(0, 44), (44, 88), (22, 30), (6, 88)])
def test_slices_within_one_group_may_begin_anywhere(layout, cols, tmp_path):
    codes, zeros, scales = draw(8, 88, 88)
    checkpoint = write(tmp_path, LAYOUTS[layout](codes, zeros, scales))
    found = read(checkpoint, "m", None, cols, quantization_config=SAID.get(layout))
    assert torch.equal(found.dequantize(), values(codes, zeros, scales, 88)[:, slice(*cols)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cols", [(16, 96), (0, 33), (33, 64), (48, 128)])
def test_cuts_within_groups_are_refused(layout, cols, tmp_path):
    codes, zeros, scales = draw(8, 128, 32)
    checkpoint = write(tmp_path, LAYOUTS[layout](codes, zeros, scales))
    with pytest.raises(CheckpointError) as caught:
        read(checkpoint, "m", None, cols)
    assert f"columns {cols[0]}:{cols[1]} of m" in caught.value.found and "groups of 32" in caught.value.found
    assert "tensor_parallel_size" in caught.value.todo


@pytest.mark.parametrize("less", [0, 1], ids=["v2", "v1"])
@pytest.mark.parametrize("format", ["gptq", "gptq_v2", None])
def test_symmetric_gptq_is_told_from_its_zeros(format, less, tmp_path):
    """Whatever version it calls itself, 7 and 8 both stand for the middle; anything else is no symmetric matrix."""
    codes, zeros, scales = draw(16, 64, 32)
    middle = torch.full_like(zeros, 8)
    said = {"quant_method": "gptq", "sym": True, "checkpoint_format": format}
    assert gptq_zeros(said) == "middle"
    checkpoint = write(tmp_path, gptq(codes, middle, scales, less))
    weight = read(checkpoint, "m", (8, 16), quantization_config=said)
    assert weight.zeros is None
    assert torch.equal(weight.dequantize(), values(codes, middle, scales, 32)[8:])
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="says sym"):
        read(write(tmp_path / "other", gptq(codes, zeros, scales, less)), "m", quantization_config=said)


@pytest.mark.parametrize(
    "config, expected",
    [
        (None, "less one"),
        ({}, "less one"),
        ({"sym": False}, "less one"),
        ({"checkpoint_format": "gptq"}, "less one"),
        ({"sym": False, "checkpoint_format": "gptq_v2"}, "plain"),
    ],
)
def test_what_gptq_says_of_its_zeros(config, expected):
    assert gptq_zeros(config) == expected


def test_reordered_columns_are_refused(tmp_path):
    tensors = gptq(*draw(8, 128, 32))
    tensors["m.g_idx"] = tensors["m.g_idx"].flip(0).contiguous()
    checkpoint = write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"m\.g_idx that reorders") as caught:
        read(checkpoint, "m")
    assert "desc_act: false" in caught.value.todo


def test_int8(tmp_path):
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(2, 128)
    scales = torch.tensor([[0.5], [3.0]], dtype=torch.bfloat16)
    checkpoint = write(tmp_path, {"m.weight": codes, "m.weight_scale": scales})
    assert stored(checkpoint, "m")[:2] == ("int8", (2, 128))
    weight = read(checkpoint, "m", (1, 2), (3, 8))
    assert (weight.kind, weight.codes.dtype, weight.scales.dtype) == ("int8", torch.int8, torch.float32)
    assert torch.equal(weight.dequantize(), codes[1:, 3:8].float() * 3)


def changed(layout: str, **changes) -> dict[str, Tensor]:
    """Tensors of a matrix, some of them replaced, or left out where None."""
    tensors = LAYOUTS[layout](*draw(16, 64, 32)) | {f"m.{name}": tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


INT = torch.int32


@pytest.mark.parametrize(
    "tensors, found, expected",
    [
        (changed("compressed", weight_scale=None), "no tensor m.weight_scale", "scales"),
        (changed("compressed", weight_scale=torch.ones(16, 3)), "of shape (16, 3)", "(16, groups)"),
        (changed("compressed", weight_scale=torch.ones(15, 2)), "of shape (15, 2)", "(16, groups)"),
        (changed("compressed", weight_scale=torch.ones(16, 4)), "of shape (16, 4)", "a multiple of 32"),
        (changed("compressed", weight_scale=torch.ones(16, 2, dtype=INT)), "as int32", "float16"),
        (changed("compressed", weight_shape=torch.tensor([16, 65])), "m.weight_packed", "[16, 65]"),
        (changed("compressed", weight_shape=torch.ones(3)), "m.weight_shape", "two whole numbers"),
        (changed("compressed", weight_zero_point=torch.ones(1, 2, dtype=INT)), "m.weight_zero_point", "(2, 2)"),
        (changed("compressed", weight_zero_point=torch.ones(16, 2, dtype=torch.int8)), "as int8", "int32"),
        (changed("compressed", weight_packed=torch.ones(16, 8, dtype=torch.int64)), "as int64", "int32"),
        (changed("compressed", weight=torch.ones(16, 64)), "m.weight and m.weight_packed", "m.weight, in"),
        (changed("awq", scales=None), "m.qweight", "m.scales"),
        (changed("awq", qzeros=None), "m.qweight", "m.qzeros"),
        (changed("awq", qzeros=torch.ones(2, 3, dtype=INT)), "m.qzeros", "(2, 2)"),
        (changed("awq", scales=torch.ones(2, 24)), "m.qweight", "(64, 3)"),
        (changed("gptq", g_idx=torch.ones(3, dtype=INT)), "m.g_idx", "(64,)"),
        (changed("gptq", qweight=torch.ones(16, 16, dtype=INT)), "m.g_idx", "(128,)"),
        (changed("gptq", scales=torch.full((2, 16), float("nan"))), "32 scales", "scales"),
    ],
)
def test_what_does_not_fit_together_is_refused(tensors, found, expected, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read(write(tmp_path, tensors), "m")
    assert found in caught.value.found and expected in caught.value.expected


# ---- what config.json may say --------------------------------------------------------------------------------------

PACK = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128,
                    "dynamic": False, "actorder": None, "observer": "minmax"},
    }},
}  # fmt: skip
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = PACK | {"format": "int-quantized", "config_groups": {"group_0": {
    "targets": ["Linear"], "weights": INT8 | {"strategy": "channel", "dynamic": False},
    "input_activations": INT8 | {"strategy": "token", "dynamic": True},
}}}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
       "modules_to_not_convert": ["lm_head"]}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq", "dynamic": {"-:.*gate.*": {}, "+:.*down_proj.*": {"group_size": 64}}}  # fmt: skip
GROUP, ROOT = "config_groups.group_0.weights", "config_groups.group_0"


@pytest.mark.parametrize("config", [
    PACK, W8A8, W8A8 | {"format": "naive-quantized"}, AWQ, GPTQ, GPTQ | {"checkpoint_format": "gptq_v2"},
    {key: value for key, value in GPTQ.items() if key not in ("checkpoint_format", "dynamic", "sym")},
    PACK | {"format": "mixed-precision", "config_groups": {
        "a": PACK["config_groups"]["group_0"] | {"format": "pack-quantized"},
        "b": W8A8["config_groups"]["group_0"] | {"format": "int-quantized"},
    }},
], ids=range(8))  # fmt: skip
def test_accepted(config):
    check(config)


@pytest.mark.parametrize(
    "config, key, value",
    [
        (PACK, f"{GROUP}.num_bits", 3),
        (PACK, f"{GROUP}.group_size", 16),
        (PACK, f"{GROUP}.strategy", "tensor"),
        (PACK, f"{GROUP}.actorder", "group"),
        (PACK, f"{GROUP}.type", "float"),
        (PACK, f"{GROUP}.dynamic", True),
        (PACK, f"{ROOT}.input_activations", INT8),
        (PACK, f"{ROOT}.format", "int-quantized"),
        (W8A8, f"{GROUP}.symmetric", False),
        (W8A8, f"{GROUP}.num_bits", 4),
        (W8A8, f"{GROUP}.strategy", "group"),
        (W8A8, f"{ROOT}.input_activations", None),
        (W8A8, f"{ROOT}.input_activations.dynamic", False),
        (AWQ, "bits", 8),
        (AWQ, "group_size", 48),
        (AWQ, "version", "gemv"),
        (AWQ, "zero_point", False),
        (GPTQ, "bits", 3),
        (GPTQ, "group_size", 0),
        (GPTQ, "desc_act", True),
        (GPTQ, "checkpoint_format", "marlin"),
        (GPTQ, "is_marlin_format", True),
        (GPTQ, "dynamic", {"+:.*q_proj": {"bits": 2}}),
    ],
)
def test_refused_by_name(config, key, value):
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    place = config
    for step in path:
        place = place[step]
    place[last] = value
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert key in caught.value.found or key.split(".")[-1] in caught.value.found


# ---- what we write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out, inner", [(16, 256), (5, 44), (24, 88), (3, 37)])
@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 32), ("int4", 128)])
def test_what_is_written_is_read_again(kind, group, out, inner, tmp_path):
    weight = Weight("plain", torch.randn(out, inner)).quantize(kind, group)
    checkpoint = write(tmp_path, {f"m.{end}": tensor for end, tensor in encode(weight).items()})
    found = read(checkpoint, "m")
    assert (found.kind, found.group_size) == (weight.kind, weight.group_size)
    for ours, theirs in ((weight.codes, found.codes), (weight.scales, found.scales), (weight.zeros, found.zeros)):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_what_is_described_is_accepted():
    experts = {f"model.layers.{i}.mlp.experts.{e}.up_proj": ("int4", 128) for i in range(3) for e in range(3)}
    matrices = experts | {"model.layers.0.mlp.up_proj": ("int4", 32), "lm_head": ("int8", None)}
    config = describe(matrices | {"model.layers.1.mlp.gate": ("plain", None)})
    check(config)
    assert config["format"] == "mixed-precision" and config["ignore"] == [r"re:^model\.layers\.\d+\.mlp\.gate$"]
    targets = {g["weights"].get("group_size", 0): g["targets"] for g in config["config_groups"].values()}
    assert targets == {128: ["Linear"], 32: [r"re:^model\.layers\.\d+\.mlp\.up_proj$"], 0: ["lm_head"]}
    assert describe({"a": ("int8", None)})["format"] == "int-quantized"
