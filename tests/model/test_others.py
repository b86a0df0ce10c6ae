"""Whole models in the formats of others, each written here from its public definition.

The judge is the same model with the values of its codes stored in float32, computed by this file alone. Widths are such
that groups of 128 and blocks of 128 do not divide them, and that other sizes would give as many groups.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from glimmer import LLM, SamplingParams
from glimmer.backends.reference import Reference
from glimmer.checkpoint.files import INDEX, Checkpoint
from glimmer.checkpoint.formats import check
from glimmer.cli.quantize import quantize
from glimmer.errors import CheckpointError, ConfigError
from glimmer.group import Group
from glimmer.model.load import WeightLoader, build_model
from glimmer.model_config import ModelConfig

# Every expert is chosen for every token: rounded activations do not change which.
ODD = dict(hidden_size=192, moe_intermediate_size=96, intermediate_size=320, head_dim=32, num_experts_per_tok=8)
Encoded = tuple[dict[str, Tensor], Tensor]  # tensors by the ends of their names, and the values that they stand for

TOKENS = [5, 60, 200, 7, 31, 90, 250, 3, 64, 128, 17, 99, 250, 251, 40, 8]


def logprobs(directory: Path) -> Tensor:
    """(positions, vocabulary) log-probabilities of a prompt, in float32."""
    with LLM(str(directory), dtype="float32", max_model_len=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=llm.model_config.vocab_size)
        (answer,) = llm.generate({"prompt_token_ids": TOKENS}, params)
    rows = [[position[token].logprob for token in sorted(position)] for position in answer.prompt_logprobs[1:]]
    return torch.tensor(rows)


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean Kullback-Leibler divergence."""
    return float((p.exp() * (p - q)).sum(1).mean())


def loader_of(directory: Path, checkpoint: Checkpoint, group: Group, mtp: bool = True) -> WeightLoader:
    """The loader of a model of the reference's in float32."""
    backend = Reference(torch.device("cpu"))
    model = build_model(ModelConfig.load(directory), checkpoint, group, backend, torch.float32, mtp)
    return WeightLoader(model, checkpoint, torch.float32)


def spread(parts: Tensor, size: int, width: int) -> Tensor:
    """(out, groups) -> (out, width): column i has what group i // size has."""
    return torch.stack([parts[:, i // size] for i in range(width)], 1)


def rounded(w: Tensor, bits: int, size: int, middle: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (out, in), zeros and float16 scales (out, groups), and (codes - zeros) * scales; the last group may be
    short."""
    size = w.shape[1] if size == -1 else size
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    groups = [w[:, i : i + size] for i in range(0, w.shape[1], size)]
    low = torch.stack([g.amin(1).clamp(max=0) for g in groups], 1)
    high = torch.stack([g.amax(1).clamp(min=0) for g in groups], 1)
    scales = (torch.maximum(-low, high) / (half - 1) if middle else (high - low) / top).half()
    zeros = torch.full_like(low, half) if middle else (-low / scales.float()).round().clamp(1, top)
    each = spread(scales.float(), size, w.shape[1]), spread(zeros, size, w.shape[1])
    codes = (w / each[0] + each[1]).round().clamp(0, top)
    return codes.long(), zeros.long(), scales, (codes - each[1]) * each[0]


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(n, m) codes -> int32 words along m, filled up with zeros: bits i * bits.. of a word hold code order[i] of it."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    word = sum(codes[..., place] << bits * i for i, place in enumerate(order or range(each)))
    return (word - (word >= 1 << 31) * (1 << 32)).to(torch.int32)


def gptq(w: Tensor, bits: int, size: int, middle: bool, less: int = 1, empty: bool = False) -> Encoded:
    codes, zeros, scales, values = rounded(w, bits, size, middle)
    qzeros = torch.empty(0, dtype=torch.int32) if empty else words((zeros - less).T, bits)
    order = torch.arange(w.shape[1], dtype=torch.int32) // (w.shape[1] if size == -1 else size)
    return {"qweight": words(codes, bits).T, "qzeros": qzeros,
            "scales": scales.T, "g_idx": order}, values  # fmt: skip


def awq(w: Tensor, bits: int, size: int, middle: bool) -> Encoded:
    codes, zeros, scales, values = rounded(w, bits, size, middle)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scales.T}, values


def packed(w: Tensor, bits: int, size: int, middle: bool, shape: bool = True) -> Encoded:
    codes, zeros, scales, values = rounded(w, bits, size, middle)
    made = {"weight_packed": words(codes, bits), "weight_scale": scales}
    made |= {} if middle else {"weight_zero_point": words(zeros.T, bits).T}
    return made | ({"weight_shape": torch.tensor(w.shape)} if shape else {}), values


def blocks(w: Tensor, name: str) -> Encoded:
    codes, values = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty_like(w)
    rows, cols = range(0, w.shape[0], 128), range(0, w.shape[1], 128)
    scales = torch.empty(len(rows), len(cols))
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            place = slice(row, row + 128), slice(col, col + 128)
            scales[i, j] = w[place].abs().amax() / 448
            codes[place] = (w[place] / scales[i, j]).to(torch.float8_e4m3fn)
            values[place] = codes[place].float() * scales[i, j]
    return {"weight": codes, name: scales}, values


def nvfp4(w: Tensor, modelopt: bool) -> Encoded:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    overall = w.abs().amax() / (6 * 448)
    groups = w.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6 / overall).to(torch.float8_e4m3fn)
    unit = groups / (scales.float()[..., None] * overall)
    codes = (unit[..., None] - table).abs().argmin(-1)
    values = (table[codes] * scales.float()[..., None] * overall).flatten(1)
    pairs = codes.flatten(1)
    bytes = (pairs[:, 0::2] | pairs[:, 1::2] << 4).to(torch.uint8)
    if modelopt:
        return {
            "weight": bytes,
            "weight_scale": scales,
            "weight_scale_2": overall,
            "input_scale": torch.ones(()),
        }, values
    return {"weight_packed": bytes, "weight_scale": scales, "weight_global_scale": 1 / overall.reshape(1),
            "input_global_scale": torch.ones(1)}, values  # fmt: skip


def groups(*schemes: dict) -> dict:
    """The quantization_config of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "format": schemes[0]["format"], "config_groups": {
        f"group_{i}": {"targets": ["Linear"]} | scheme for i, scheme in enumerate(schemes)}}  # fmt: skip


def pack(bits: int, size: int, symmetric: bool, **changes) -> dict:
    whole = {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False} | whole
    return {"format": "pack-quantized", "weights": weights, "input_activations": None} | changes


# fmt: off
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
BLOCK = {"format": "float-quantized", "weights": FLOAT8 | {"strategy": "block", "block_structure": [128, 128],
         "dynamic": False}, "input_activations": FLOAT8 | {"strategy": "group", "group_size": 128, "dynamic": True}}
FOUR = {"format": "nvfp4-pack-quantized", "weights": {"num_bits": 4, "type": "float", "symmetric": True,
        "strategy": "tensor_group", "group_size": 16, "dynamic": False}}
# fmt: on
ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
EIGHT = ".*mlp\\.experts.*down_proj|.*self_attn.*"  # what has 8 bits in the mixed ones


def mixed(encode: Callable[..., Encoded], size: int = 128, middle: bool = False, **more) -> Callable[..., Encoded]:
    def each(w: Tensor, module: str) -> Encoded:
        return encode(w, 8, 64, middle, **more) if re.match(EIGHT, module) else encode(w, 4, size, middle, **more)

    return each


def alike(encode: Callable[..., Encoded], *settings, **more) -> Callable[..., Encoded]:
    return lambda w, module: encode(w, *settings, **more)


# name -> how a matrix is encoded, what config.json says, whether the activations are quantised by the kernels
FORMATS: dict[str, tuple[Callable[..., Encoded], dict | None]] = {
    "fp8 blocks": (alike(blocks, "weight_scale_inv"), {"quant_method": "fp8", "fmt": "e4m3",
                   "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
    "fp8 blocks, compressed": (alike(blocks, "weight_scale"), groups(BLOCK)),
    "nvfp4": (alike(nvfp4, False), groups(FOUR)),
    "nvfp4, modelopt": (alike(nvfp4, True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4, modelopt, only in hf_quant_config.json": (alike(nvfp4, True), None),
    "gptq, short last group": (alike(gptq, 4, 128, False), GPTQ | {"checkpoint_format": "gptq"}),
    "gptq, format": (alike(gptq, 4, 64, False, 0), GPTQ | {"group_size": 64, "format": "gptq_v2"}),
    "gptq, one group": (alike(gptq, 4, -1, False), GPTQ | {"group_size": -1}),
    "gptq, empty zeros": (alike(gptq, 4, 128, True, empty=True), GPTQ | {"sym": True}),
    "gptq 8": (alike(gptq, 8, 128, False), GPTQ | {"bits": 8}),
    "gptq 8 v2": (alike(gptq, 8, 128, False, 0), GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}),
    "gptq 8, symmetric": (alike(gptq, 8, 128, True), GPTQ | {"bits": 8, "sym": True}),
    "gptq 8, one group": (alike(gptq, 8, -1, True, 0), GPTQ | {"bits": 8, "sym": True, "group_size": -1}),
    "gptq, dynamic": (mixed(gptq), GPTQ | {"dynamic": {
        "-:.*\\.gate$": {}, f"+:{EIGHT}": {"bits": 8, "group_size": 64}}}),
    "auto-round": (alike(gptq, 4, 128, True), ROUND),
    "auto-round, asymmetric": (alike(gptq, 4, 128, False), ROUND | {"sym": False}),
    "auto-round, awq": (alike(awq, 4, 128, False), ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"}),
    "auto-round, mixed": (mixed(gptq, middle=True), ROUND | {"extra_config": {
        ".*mlp\\.gate$": {"bits": 16}, EIGHT: {"bits": 8, "group_size": 64}}}),
    "awq, short last group": (alike(awq, 4, 128, False), {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "w4a16, short last group": (alike(packed, 4, 128, True), groups(pack(4, 128, True))),
    "w8a16 channel": (alike(packed, 8, -1, True), groups(pack(8, -1, True))),
    "w8a16 channel, zeros": (alike(packed, 8, -1, False), groups(pack(8, -1, False))),
    "w8a16 group": (alike(packed, 8, 128, True), groups(pack(8, 128, True))),
    "w8a16 group, no shape": (alike(packed, 8, 32, False, shape=False), groups(pack(8, 32, False))),
    "w4a16 and w8a16": (mixed(packed), groups(pack(4, 128, False), pack(8, 64, False, targets=[f"re:{EIGHT}"]))),
}  # fmt: skip


@pytest.fixture
def twins(checkpoint, tmp_path):
    """twins(name) -> (a tiny model in that format, its router too, the same values in float32)."""

    def write(name: str) -> tuple[Path, Path]:
        source = checkpoint(index=False, dtype="float32", mtp="full", **ODD)
        encode, said = FORMATS[name]
        config = json.loads((source / "config.json").read_text())
        linears = {n for n, _, kind in tensors(config, "full") if kind == "linear"}
        if said is None or not said.keys() & {"dynamic", "extra_config"}:  # these leave the router as it is
            linears |= {n for n, *_ in tensors(config, "full") if n.endswith(".mlp.gate.weight")}
        coded, plain = {}, {}
        for tensor, values in load_file(source / "model.safetensors").items():
            if tensor not in linears:
                coded[tensor] = plain[tensor] = values
                continue
            module = tensor.removesuffix(".weight")
            made, plain[tensor] = encode(values, module)
            coded |= {f"{module}.{end}": part.contiguous() for end, part in made.items()}
        directories = []
        for kind, held, changes in (("coded", coded, {"quantization_config": said}), ("plain", plain, {})):
            directories.append(shutil.copytree(source, tmp_path / kind))
            save_file(held, directories[-1] / "model.safetensors")
            (directories[-1] / "config.json").write_text(json.dumps(config | changes))
        return tuple(directories)

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_models_of_others_compute_what_their_values_say(name, twins):
    coded, plain = twins(name)
    assert divergence(logprobs(plain), logprobs(coded)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_values_of_others_are_exact_on_every_rank(name, twins):
    """Rows and columns of each rank's cut, decoded, are the plain twin's; where a cut falls into a group of 4-bit
    codes it is refused before anything is loaded."""
    coded, plain = twins(name)
    for size in (1, 2):
        for rank in range(size):
            with Checkpoint(coded) as ours, Checkpoint(plain) as theirs:
                try:
                    there = loader_of(coded, ours, Group(rank, size))
                except CheckpointError as error:
                    assert size > 1 and "quantised in groups of" in error.found
                    continue
                here = loader_of(plain, theirs, Group(rank, size))
                here.param_specs = there.param_specs
                for spec in there.param_specs:
                    for unit in spec.units:
                        for a, b in zip(there._weights(spec, unit), here._weights(spec, unit)):
                            a, b = a.dequantize(), b.dequantize()
                            assert a.shape == b.shape and (a - b).abs().max() <= 1e-6 * b.abs().max(), spec.layer


# ---- experts of a layer in one tensor, and what an index says ------------------------------------------------------


def stack(held: dict[str, Tensor], layers: range, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Experts in one tensor, as transformers 5 saves them."""
    held = dict(held)
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        for name, ends in (("gate_up", ("gate", "up")), ("down", ("down",))):
            if name in parts:
                each = [torch.cat([held.pop(f"{prefix}.{e}.{end}_proj.weight") for end in ends]) for e in range(8)]
                held[f"{prefix}.{name}_proj"] = torch.stack(each)
    return held


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint(index=False, mtp="full"), tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [range(1, 5), range(2, 4)], ids=["all, and the MTP layer's", "some"])
@pytest.mark.parametrize("parts", [("gate_up", "down"), ("gate_up",), ("down",)])
def test_experts_in_one_tensor(layers, parts, source, checkpoint):
    file = source / "model.safetensors"
    save_file(stack(load_file(file), layers, parts), file)
    for rank, size in ((0, 1), (1, 2)):
        with Checkpoint(source) as ours, Checkpoint(checkpoint(index=False, mtp="full")) as theirs:
            stacked, single = (loader_of(source, each, Group(rank, size)) for each in (ours, theirs))
            for spec in single.param_specs:
                for unit in spec.units:
                    for a, b in zip(stacked._weights(spec, unit), single._weights(spec, unit), strict=True):
                        assert torch.equal(a.codes, b.codes), spec.layer
    assert torch.equal(logprobs(source), logprobs(checkpoint(index=False, mtp="full")))


def test_experts_in_one_tensor_are_read_once(source):
    """Each matrix by itself: gate and up lie in one tensor, and neither is read with the other."""
    file = source / "model.safetensors"
    save_file(stack(load_file(file), range(1, 5), ("gate_up", "down")), file)
    with Checkpoint(source) as checkpoint:
        loader = loader_of(source, checkpoint, Group())
        spec = next(spec for spec in loader.param_specs if spec.layer.endswith(".experts"))
        found, pread = [], checkpoint.pread

        def counted(descriptor: int, memory: Tensor, offset: int) -> int:
            found.append((offset, len(memory)))
            return pread(descriptor, memory, offset)

        checkpoint.pread = counted
        for unit in spec.units:
            loader._weights(spec, unit)
    found.sort()
    assert len(found) == 3 * len(spec.units)
    assert all(at + count <= following for (at, count), (following, _) in pairwise(found))


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda t: torch.cat((t, t[:1])), "holds 9 experts, config.json says 8"),
        (lambda t: t[:7], r"gate_up_proj as bfloat16 of shape \(7, 64, 64\)"),
        (lambda t: t[:, :63], r"of shape \(8, 63, 64\)"),
        (lambda t: t.to(torch.int8), "as int8"),
        (lambda t: t[0], r"of shape \(64, 64\)"),
        (lambda t: t.transpose(1, 2)[:, :, :48], r"is \[32, 48\], config.json says \[32, 64\]"),
    ],
)
def test_experts_in_one_tensor_that_do_not_fit(change, found, source):
    file, name = source / "model.safetensors", "model.layers.2.mlp.experts.gate_up_proj"
    held = stack(load_file(file), range(2, 3), ("gate_up",))
    save_file(held | {name: change(held[name]).contiguous()}, file)
    with Checkpoint(source) as checkpoint, pytest.raises(CheckpointError, match=found):
        loader_of(source, checkpoint, Group())


@pytest.mark.parametrize("stale", ["a name too many", "a whole file too many", "other files", "an unused MTP layer"])
def test_a_stale_index_is_a_warning_when_every_tensor_is_there(stale, checkpoint, tmp_path, caplog):
    source = shutil.copytree(checkpoint(shards=2, mtp="full"), tmp_path / "model")
    files = sorted(source.glob("*.safetensors"))
    table = json.loads((source / INDEX).read_text())
    names = table["weight_map"]
    if stale == "a name too many":
        names["model.layers.1.mlp.ghost.weight"] = files[0].name
    elif stale == "a whole file too many":
        names |= {f"model.layers.{i}.ghost": "model-00003-of-00002.safetensors" for i in range(9)}
    elif stale == "other files":
        table["weight_map"] = dict.fromkeys(names, files[0].name)
    else:
        held = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for file in files:
            file.unlink()
        save_file({name: t for name, t in held.items() if not name.startswith("model.layers.4.")}, files[0])
        table["weight_map"] = {n: "mtp.safetensors" if n.startswith("model.layers.4.") else files[0].name for n in held}
    (source / INDEX).write_text(json.dumps(table))
    with caplog.at_level(logging.WARNING), Checkpoint(source) as opened:
        loader_of(source, opened, Group(), mtp=False)
    assert INDEX in caplog.text and "all tensors of the model are there" in caplog.text


def test_a_file_of_the_index_whose_tensors_are_wanted_is_missed(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint(shards=2), tmp_path / "model")
    sorted(source.glob("*.safetensors"))[1].unlink()
    with Checkpoint(source) as opened, pytest.raises(CheckpointError, match="lacks 1 of the 2 files"):
        loader_of(source, opened, Group(), mtp=False)


# ---- words at the start, and refusals ------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_widened_is_said(twins, caplog):
    coded, _ = twins("fp8 blocks")
    with caplog.at_level(logging.WARNING), LLM(str(coded), max_model_len=64):
        pass
    assert re.search(r"matrices are stored in FP8 in blocks of 128 x 128 and computed as float32: .* GB", caplog.text)


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "bfloat16"])
def test_float32_weights_are_not_computed_in_bfloat16_in_silence(key, checkpoint, tmp_path, caplog):
    source = shutil.copytree(checkpoint(dtype="float32"), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "torch_dtype"}
    (source / "config.json").write_text(json.dumps(config | ({} if key is None else {"torch_dtype": key})))
    for dtype, said in (("auto", True), ("float32", False), ("bfloat16", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), LLM(str(source), dtype=dtype, max_model_len=64):
            pass
        assert ("stored in float32 and computed in bfloat16" in caplog.text) == said


@pytest.mark.slow
def test_scales_of_a_cache_are_left_out(twins):
    """ModelOpt writes them beside k and v for an FP8 cache; keys and values are kept in more bits here."""
    coded, plain = twins("nvfp4, modelopt")
    held = load_file(coded / "model.safetensors")
    held |= {f"model.layers.{i}.self_attn.{x}_proj.{x}_scale": torch.ones(()) for i in range(4) for x in "kv"}
    save_file(held, coded / "model.safetensors")
    assert divergence(logprobs(plain), logprobs(coded)) < 3e-4


@pytest.mark.parametrize("format", ["w4a16, short last group", "gptq 8", "fp8 blocks"])
def test_experts_of_several_kinds_are_refused_before_loading(format, twins):
    """One expert in int8 of one scale for a row, among others."""
    coded, _ = twins(format)
    held = load_file(coded / "model.safetensors")
    prefix = "model.layers.2.mlp.experts.3."
    held = {name: tensor for name, tensor in held.items() if not name.startswith(prefix)}
    for end, shape in (("gate_proj", (96, 192)), ("up_proj", (96, 192)), ("down_proj", (192, 96))):
        held[f"{prefix}{end}.weight"] = torch.ones(shape, dtype=torch.int8)
        held[f"{prefix}{end}.weight_scale"] = torch.ones(shape[0], 1)
    save_file(held, coded / "model.safetensors")
    with Checkpoint(coded) as checkpoint, pytest.raises(CheckpointError, match=r"different formats.*experts\.3\."):
        loader_of(coded, checkpoint, Group())


def test_a_scale_too_few_is_refused(twins):
    """The shape contradicts what config.json says, and several sizes of groups would give it."""
    coded, _ = twins("w8a16 group")
    held = load_file(coded / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    held[name] = held[name][:, :2].contiguous()
    save_file(held, coded / "model.safetensors")
    with Checkpoint(coded) as checkpoint, pytest.raises(CheckpointError, match="weight_scale as float16 of shape"):
        loader_of(coded, checkpoint, Group())


@pytest.mark.parametrize(
    "config, found",
    [
        ({"quant_method": "mxfp4"}, "MXFP4"),
        (groups(FOUR | {"format": "mxfp4-pack-quantized"}), "MXFP4"),
        (ROUND | {"data_type": "mx_fp"}, "MXFP4"),
        (ROUND | {"bits": 2}, "bits = 2"),
        (ROUND | {"packing_format": "auto_round:llm_compressor"}, "packing_format = 'auto_round:llm_compressor'"),
        (ROUND | {"extra_config": {"lm_head": {"bits": 3}}}, "extra_config.lm_head.bits = 3"),
        (ROUND | {"extra_config": {"(": {"bits": 8}}}, "extra_config = '('"),
        (ROUND | {"extra_config": ["lm_head"]}, "extra_config = ['lm_head']"),
        (GPTQ | {"dynamic": {"+:[": {"bits": 8}}}, "dynamic = '['"),
        (GPTQ | {"dynamic": {"x": None}}, "dynamic.x = None"),
        (GPTQ | {"format": "marlin"}, "format = 'marlin'"),
        (GPTQ | {"format": "gptq_v2", "checkpoint_format": "gptq"}, "checkpoint_format beside format = 'gptq'"),
        (GPTQ | {"meta": {"quantizer": ["gptqmodel:5.0.0"]}}, "checkpoint_format = None"),
        (GPTQ | {"meta": 5}, "meta = 5"),
        (groups(pack(8, 128, True, targets=5)), "targets = 5"),
        (groups(pack(8, 128, True, targets=["re:("])), "targets = '('"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size = None"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, "weight_block_size = [64, 128]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "'static'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo = 'FP8'"),
        ({"quant_method": "modelopt", "quantization": 3}, "quantization = 3"),
    ],
)
def test_refused_by_name(config, found):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert found in caught.value.found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4", "experts in one tensor"])
def test_quantize_takes_what_is_widened(name, twins, source, tmp_path):
    """`glimmer quantize` writes what the outline has promised; its result computes what the engine quantises itself."""
    if name == "experts in one tensor":
        save_file(stack(load_file(source / "model.safetensors"), range(1, 5), ("gate_up", "down")),
                  source / "model.safetensors")  # fmt: skip
    else:
        source, _ = twins(name)
    quantize(source, tmp_path / "int8", "int8", None)
    with LLM(str(source), dtype="float32", max_model_len=64, quantization="int8") as llm:
        (there,) = llm.generate({"prompt_token_ids": TOKENS}, SamplingParams(temperature=0, max_tokens=8))
    with LLM(str(tmp_path / "int8"), dtype="float32", max_model_len=64) as llm:
        (here,) = llm.generate({"prompt_token_ids": TOKENS}, SamplingParams(temperature=0, max_tokens=8))
    assert here.outputs[0].token_ids == there.outputs[0].token_ids
