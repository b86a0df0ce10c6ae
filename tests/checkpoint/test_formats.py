"""Disk formats: which are accepted, and that a Weight holds exactly the values that lie on disk."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from glimmer.checkpoint import formats
from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats import check, holds, read, stored, vector
from glimmer.checkpoint.formats.base import Config, Format, Matrix, Slice, row_scales, want
from glimmer.errors import CheckpointError, ConfigError
from glimmer.weight import Kind, Weight

OFFICIAL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False,
                "group_size": None, "block_structure": None, "actorder": None, "observer": "minmax",
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True,
                "group_size": None, "block_structure": None, "actorder": None, "observer": None,
            },
            "output_activations": None,
        }
    },
}  # fmt: skip


def write(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory)


def fp8(out: int, into: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a random matrix."""
    values = torch.randn(out, into, generator=torch.Generator().manual_seed(seed))
    scales = values.abs().amax(1, keepdim=True) / 448
    return (values / scales).to(torch.float8_e4m3fn), scales


# ---- what config.json may say --------------------------------------------------------------------------------------


def test_accepted():
    check(None)
    check(OFFICIAL)
    several = copy.deepcopy(OFFICIAL)
    several["config_groups"]["group_1"] = several["config_groups"]["group_0"] | {"format": "float-quantized"}
    check(several)


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    "key, value, found",
    [
        ("quant_method", "bitsandbytes", "quant_method = 'bitsandbytes'"),
        ("quant_method", None, "quant_method = None"),
        ("format", "marlin-24", "format = 'marlin-24'"),
        ("format", "mxfp4-pack-quantized", "format = 'mxfp4-pack-quantized'"),
        ("format", ["float-quantized"], "format = "),
        ("quantization_status", "initialized", "quantization_status = 'initialized'"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme = "),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config = "),
        ("config_groups", {}, "config_groups = {}"),
        ("config_groups", None, "config_groups = None"),
        ("config_groups", [], "config_groups = []"),
        (GROUP, "FP8_DYNAMIC", f"{GROUP} = 'FP8_DYNAMIC'"),
        (f"{GROUP}.format", "int-quantized", f"{GROUP}.format = 'int-quantized'"),
        (f"{GROUP}.output_activations", {"num_bits": 8}, f"{GROUP}.output_activations = "),
        (f"{GROUP}.weights", None, f"{GROUP}.weights = None"),
        (f"{GROUP}.weights.num_bits", 4, f"{GROUP}.weights.num_bits = 4"),
        (f"{GROUP}.weights.type", "int", f"{GROUP}.weights.type = 'int'"),
        (f"{GROUP}.weights.symmetric", False, f"{GROUP}.weights.symmetric = False"),
        (f"{GROUP}.weights.symmetric", 1, f"{GROUP}.weights.symmetric = 1"),
        (f"{GROUP}.weights.strategy", "block", f"{GROUP}.weights.block_structure = None"),
        (f"{GROUP}.weights.strategy", "tensor", f"{GROUP}.weights.strategy = 'tensor'"),
        (f"{GROUP}.weights.dynamic", True, f"{GROUP}.weights.dynamic = True"),
        (f"{GROUP}.input_activations", None, f"{GROUP}.input_activations = None"),
        (f"{GROUP}.input_activations.dynamic", False, f"{GROUP}.input_activations.dynamic = False"),
        (f"{GROUP}.input_activations.strategy", "tensor", f"{GROUP}.input_activations.strategy = 'tensor'"),
    ],
)
def test_refused_by_name(key, value, found):
    config = copy.deepcopy(OFFICIAL)
    *path, last = key.split(".")
    place = config
    for step in path:
        place = place[step]
    place[last] = value
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert found in caught.value.found
    assert "official FP8" in caught.value.expected and "per channel" in caught.value.expected


def test_one_wrong_group_among_several():
    config = copy.deepcopy(OFFICIAL)
    config["config_groups"]["experts"] = copy.deepcopy(config["config_groups"]["group_0"])
    config["config_groups"]["experts"]["weights"]["num_bits"] = 4
    with pytest.raises(ConfigError, match=r"config_groups\.experts\.weights\.num_bits = 4"):
        check(config)


@pytest.mark.parametrize("config", ["fp8", 8, [], {}, {"quant_method": "compressed-tensors"}])
def test_refused_whatever_it_is(config):
    with pytest.raises(ConfigError):
        check(config)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain(tmp_path, dtype):
    matrix = torch.randn(6, 4).to(dtype)
    checkpoint = write(tmp_path, {"m.weight": matrix})
    assert stored(checkpoint, "m")[:5] == ("plain", (6, 4), ("m.weight",), None, False)
    weight = read(checkpoint, "m", rows=(1, 5), cols=(2, 4))
    assert (weight.kind, weight.scales, weight.codes.dtype) == ("plain", None, dtype)
    assert torch.equal(weight.codes, matrix[1:5, 2:4])
    assert torch.equal(read(checkpoint, "m").dequantize(), matrix.float())


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("flat", [False, True])
def test_fp8_is_codes_times_scale(tmp_path, scale_dtype, flat):
    codes, scales = fp8(16, 8)
    scales = scales.to(scale_dtype)
    checkpoint = write(tmp_path, {"m.weight": codes, "m.weight_scale": scales.flatten() if flat else scales})
    assert stored(checkpoint, "m")[:5] == ("fp8", (16, 8), ("m.weight", "m.weight_scale"), None, False)
    weight = read(checkpoint, "m")
    assert (weight.kind, weight.shape, weight.codes.dtype) == ("fp8", (16, 8), torch.float8_e4m3fn)
    assert (weight.scales.shape, weight.scales.dtype) == ((16, 1), torch.float32)
    assert torch.equal(weight.dequantize(), codes.float() * scales.float())


def test_every_fp8_code(tmp_path):
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = codes.where(codes & 127 != 127, 0).view(torch.float8_e4m3fn)  # without the two codes that mean NaN
    checkpoint = write(tmp_path, {"m.weight": codes, "m.weight_scale": torch.tensor([0.5, 3.0])})
    assert torch.equal(read(checkpoint, "m").dequantize(), codes.float() * torch.tensor([[0.5], [3.0]]))


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Checkpoint:
    codes, scales = fp8(12, 10)
    return write(
        tmp_path_factory.mktemp("both"), {"p.weight": torch.randn(12, 10), "q.weight": codes, "q.weight_scale": scales}
    )


def span(most: int):
    return st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted).map(tuple)


@settings(max_examples=100, deadline=None)
@given(module=st.sampled_from("pq"), rows=span(12), cols=span(10))
def test_slices(both, module, rows, cols):
    whole = read(both, module).dequantize()
    assert torch.equal(read(both, module, rows, cols).dequantize(), whole[slice(*rows), slice(*cols)])


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_qkv_in_one(tmp_path, kind):
    tensors = {}
    for seed, (name, rows) in enumerate((("q_proj", 8), ("k_proj", 4), ("v_proj", 4))):
        codes, scales = fp8(rows, 6, seed)
        tensors |= (
            {f"{name}.weight": codes, f"{name}.weight_scale": scales}
            if kind == "fp8"
            else {f"{name}.weight": codes.float() * scales}
        )
    checkpoint = write(tmp_path, tensors)
    cuts = {"q_proj": (4, 8), "k_proj": (2, 4), "v_proj": (2, 4)}
    parts = [read(checkpoint, name, rows) for name, rows in cuts.items()]
    joined = Weight.join(parts, torch.float32, torch.device("cpu"))
    assert (joined.kind, joined.shape) == (kind, (8, 6))
    assert torch.equal(
        joined.dequantize(),
        torch.cat([read(checkpoint, name).dequantize()[slice(*rows)] for name, rows in cuts.items()]),
    )


def test_vector(tmp_path):
    norm, bias = torch.randn(5), torch.randn(6).bfloat16()
    checkpoint = write(
        tmp_path, {"norm.weight": norm, "bias": bias, "ids": torch.arange(3), "m.weight": torch.randn(2, 2)}
    )
    assert torch.equal(vector(checkpoint, "norm.weight"), norm)
    assert torch.equal(vector(checkpoint, "bias", (2, 4)), bias[2:4])
    with pytest.raises(CheckpointError, match="has ids as int64") as caught:
        vector(checkpoint, "ids")
    assert caught.value.expected == "a vector of bfloat16, float16 or float32"
    with pytest.raises(CheckpointError, match=r"has m\.weight as float32 of shape \(2, 2\)"):
        vector(checkpoint, "m.weight")
    with pytest.raises(CheckpointError, match="no tensor 'gone'"):
        vector(checkpoint, "gone")


# ---- what no format explains ---------------------------------------------------------------------------------------

CODES, SCALES = fp8(4, 4)
MATRIX = torch.randn(4, 4)


@pytest.mark.parametrize(
    "tensors, found, expected",
    [
        ({"other.weight": MATRIX}, "no tensor m.weight in", "m.weight, in bf16"),
        ({"m.scales": SCALES, "m.bias": MATRIX}, "only m.bias, m.scales", "m.weight, in bf16"),
        ({"m.weight": CODES}, "m.weight as float8_e4m3fn", "a tensor m.weight_scale"),
        ({"m.weight": MATRIX, "m.weight_scale": SCALES}, "m.weight as float32", "there is a m.weight_scale"),
        ({"m.weight": MATRIX.to(torch.float8_e5m2), "m.weight_scale": SCALES}, "m.weight as float8_e5m2", "e4m3fn"),
        ({"m.weight": MATRIX.to(torch.int16), "m.weight_scale": SCALES}, "m.weight as int16", "float8_e4m3fn"),
        ({"m.weight": MATRIX.double()}, "m.weight as float64", "bfloat16, float16, float32"),
        ({"m.weight": MATRIX[0]}, "m.weight as float32 of shape (4,)", "a matrix"),
        ({"m.weight": CODES, "m.weight_scale": torch.ones(1)}, "_scale as float32 of shape (1,)", "shape (4, 1)"),
        ({"m.weight": CODES, "m.weight_scale": torch.ones(1, 4)}, "of shape (1, 4)", "one scale for each row"),
        ({"m.weight": CODES, "m.weight_scale": torch.ones(4, 2)}, "of shape (4, 2)", "one scale for each row"),
        ({"m.weight": CODES, "m.weight_scale": torch.ones(4).double()}, "m.weight_scale as float64", "float16 or"),
    ],
)  # fmt: skip
def test_unexplained(tmp_path, tensors, found, expected):
    checkpoint = write(tmp_path, {name: tensor.contiguous() for name, tensor in tensors.items()})
    for ask in (stored, read):
        with pytest.raises(CheckpointError) as caught:
            ask(checkpoint, "m")
        assert found in caught.value.found and expected in caught.value.expected


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_scale(tmp_path, bad):
    scales = SCALES.clone()
    scales[2] = bad
    checkpoint = write(tmp_path, {"m.weight": CODES, "m.weight_scale": scales})
    with pytest.raises(CheckpointError) as caught:
        read(checkpoint, "m", rows=(1, 4))
    assert "1 scales in m.weight_scale" in caught.value.found and "in row 2" in caught.value.found
    read(checkpoint, "m", rows=(0, 2))


# ---- a further format ----------------------------------------------------------------------------------------------


class Signs(Format):
    """X.signs (out, in) bool, True for +1 and False for -1, and X.size (out,): all that a format of one bit is."""

    accepts = "signs (1 bit)"
    codes, codes_dtypes = "signs", (torch.bool,)
    quant_method = "signs"

    def check_config(self, config: Config) -> None:
        want("bits", config.get("bits"), 1)

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        out, inner = checkpoint.shape(f"{module}.signs")
        return Matrix(Kind.INT8, (out, inner), (f"{module}.signs", f"{module}.size"))

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        codes = 2 * checkpoint.tensor(f"{module}.signs", rows, cols).to(torch.int8) - 1
        return Weight(Kind.INT8, codes, row_scales(checkpoint, f"{module}.size", rows))


def test_a_format_is_one_class(tmp_path, monkeypatch):
    signs, size = torch.rand(6, 4) > 0.5, torch.rand(6) + 1
    checkpoint = write(tmp_path, {"m.signs": signs, "m.size": size, "other.weight": MATRIX})
    with pytest.raises(CheckpointError, match=r"no tensor m\.weight in .*, only m\.signs, m\.size"):
        stored(checkpoint, "m")
    with pytest.raises(ConfigError, match=r"quant_method = 'signs', where .* 'auto-round' or 'gptq' can be read"):
        check({"quant_method": "signs", "bits": 1})
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Signs()))
    assert holds(checkpoint, "m") and not holds(checkpoint, "n")
    assert stored(checkpoint, "m")[:5] == ("int8", (6, 4), ("m.signs", "m.size"), None, False)
    expected = torch.where(signs, 1, -1) * size[:, None]
    assert torch.equal(read(checkpoint, "m").dequantize(), expected)
    assert torch.equal(read(checkpoint, "m", (1, 5), (1, 3)).dequantize(), expected[1:5, 1:3])
    assert stored(checkpoint, "other").kind == "plain"
    check({"quant_method": "signs", "bits": 1})
    with pytest.raises(ConfigError, match="bits = 2") as caught:
        check({"quant_method": "signs", "bits": 2})
    assert "signs (1 bit)" in caught.value.expected and "official FP8" in caught.value.expected


def test_every_kind_of_weight_is_written_by_one_format():
    writers = [each.writes for each in formats.FORMATS if each.writes is not None]
    assert sorted(writers) == sorted(Kind)
