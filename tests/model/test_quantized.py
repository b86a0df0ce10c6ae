"""Whole models of quantised matrices: made while loading, or by others; on one process and on several.

Each layout of others is written here from its public definition. The judge is the same model with the values of its
codes stored in float32. In float32 both are one; in bfloat16 activations become int8 as they come.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import empty_checkpoint, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glimmer import LLM, SamplingParams
from glimmer.backends.base import ExpertSet
from glimmer.backends.reference import Reference
from glimmer.checkpoint import formats
from glimmer.checkpoint.files import Checkpoint
from glimmer.cli.main import main
from glimmer.errors import CheckpointError, ConfigError
from glimmer.group import Group
from glimmer.model.load import WeightLoader, build_model
from glimmer.model_config import ModelConfig
from glimmer.weight import Weight

CPU = torch.device("cpu")
TOKENS = [5, 60, 200, 7, 31, 90, 250, 3, 64, 128, 17, 99, 250, 251, 40, 8]
WIDE = dict(hidden_size=128, moe_intermediate_size=64, intermediate_size=192, head_dim=32)


def logprobs(directory: Path, dtype: str = "float32", **settings) -> Tensor:
    """(positions, vocabulary) log-probabilities of a prompt."""
    llm = LLM(str(directory), dtype=dtype, max_model_len=64, **settings)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=llm.model_config.vocab_size)
    (answer,) = llm.generate({"prompt_token_ids": TOKENS}, params)
    llm.close()
    rows = [[position[token].logprob for token in sorted(position)] for position in answer.prompt_logprobs[1:]]
    return torch.tensor(rows)


def loader_of(
    config: ModelConfig,
    checkpoint: Checkpoint,
    group: Group,
    dtype: torch.dtype,
    mtp: bool = False,
    quantization: str | None = None,
    group_size: int | None = None,
) -> WeightLoader:
    """The loader of a model of the reference's, whose packed form is a Weight."""
    model = build_model(config, checkpoint, group, Reference(CPU), torch.float32, mtp)
    return WeightLoader(model, checkpoint, dtype, quantization, group_size)


def weights_of(layer: nn.Module) -> dict[str, Sequence[Weight]]:
    """What the reference has packed for a layer; of experts, gate and up apart from down."""
    packed = getattr(layer, "packed", None)
    if isinstance(packed, ExpertSet):
        return {"gate_up_proj": packed.gate_up.weights, "down_proj": packed.down.weights}
    return {} if packed is None else {"": packed.weights}


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean Kullback-Leibler divergence."""
    return float((p.exp() * (p - q)).sum(1).mean())


# ---- quantised by others -------------------------------------------------------------------------------------------


def pack(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """(n, m) codes -> (n, m / 8) words, whose bits 4i..4i+3 are code number order[i] of their eight."""
    eights = codes.long().unflatten(1, (-1, 8))
    word = sum(eights[..., place] << 4 * i for i, place in enumerate(order))
    return (word - (word >= 1 << 31) * (1 << 32)).to(torch.int32)


def compressed(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {"weight_packed": pack(codes), "weight_scale": scales, "weight_shape": torch.tensor(codes.shape),
            "weight_zero_point": pack(zeros.T).T}  # fmt: skip


def symmetric(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {"weight_packed": pack(codes), "weight_scale": scales}


def awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack(codes.T, order), "qzeros": pack(zeros.T, order), "scales": scales.T}


def gptq(codes: Tensor, zeros: Tensor, scales: Tensor, less: int = 1) -> dict[str, Tensor]:
    group = codes.shape[1] // scales.shape[1]
    order = torch.arange(codes.shape[1], dtype=torch.int32) // group
    return {"qweight": pack(codes).T, "qzeros": pack((zeros - less).T % 16), "scales": scales.T, "g_idx": order}


PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "dynamic": False}
FORMATS: dict[str, tuple[Callable, dict]] = {
    "compressed": (compressed, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": PACKED | {"symmetric": False}}}}),
    "symmetric": (symmetric, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": PACKED | {"symmetric": True}}}}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "gptq symmetric": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    "gptq v2": (lambda *args: gptq(*args, less=0), {"quant_method": "gptq", "bits": 4, "group_size": 32,
                                                    "desc_act": False, "checkpoint_format": "gptq_v2"}),
}  # fmt: skip


def nearest(w: Tensor, middle: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Plain rounding in groups of 32: codes (out, in), zeros and float16 scales (out, groups)."""
    groups = w.unflatten(1, (-1, 32))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (groups.abs().amax(-1) / 7 if middle else (high - low) / 15).half()
    zeros = torch.full_like(low, 8) if middle else (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.flatten(1), zeros, scales


@pytest.fixture
def twins(checkpoint, tmp_path):
    """twins(name) -> (a tiny model in that format, the same values in float32)."""

    def write(name: str) -> tuple[Path, Path]:
        source = checkpoint(index=False, dtype="float32", mtp="full", **WIDE)
        encode, said = FORMATS[name]
        config = json.loads((source / "config.json").read_text())
        linears = {n for n, _, kind in tensors(config, "full") if kind == "linear"}
        coded, plain = {}, {}
        for tensor, values in load_file(source / "model.safetensors").items():
            if tensor not in linears:
                coded[tensor] = plain[tensor] = values
                continue
            codes, zeros, scales = nearest(values, middle="symmetric" in name)
            spread = lambda each: each.float().repeat_interleave(32, 1)
            plain[tensor] = (codes - spread(zeros)) * spread(scales)
            module = tensor.removesuffix("weight")
            coded |= {module + end: part.contiguous() for end, part in encode(codes, zeros, scales).items()}
        directories = []
        for kind, held, changes in (("coded", coded, {"quantization_config": said}), ("plain", plain, {})):
            directories.append(shutil.copytree(source, tmp_path / kind))
            save_file(held, directories[-1] / "model.safetensors")
            (directories[-1] / "config.json").write_text(json.dumps(config | changes))
        return tuple(directories)

    return write


@pytest.mark.parametrize("name", FORMATS)
def test_models_of_others_compute_what_their_values_say(name, twins):
    coded, plain = twins(name)
    expected = logprobs(plain)
    assert divergence(expected, logprobs(coded)) < 1e-6, "float32 is exact"
    difference = divergence(expected, logprobs(coded, "bfloat16"))
    assert 1e-7 < difference < 1e-2, "int8 activations cost something, and not more"
    with pytest.raises(ConfigError, match="is int4 already"):
        LLM(str(coded), max_model_len=64, quantization="int4")


@pytest.mark.parametrize("name", ["compressed", "awq", "gptq symmetric"])
def test_models_of_others_can_be_prepared(name, twins, monkeypatch):
    """From the packed file, to the last bit what the directory itself gives."""
    coded, _ = twins(name)
    expected = logprobs(coded)
    assert main(["prepare", str(coded), "--dtype", "float32"]) == 0
    assert (coded / "packed-float32" / "packed.json").is_file()
    monkeypatch.setattr(WeightLoader, "load", None)  # nothing is loaded from the directory any more
    assert torch.equal(logprobs(coded), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_values_of_others_are_exact_on_every_rank(name, twins):
    """Rows and columns of each rank's cut, decoded, are the plain twin's; with more ranks than groups it is refused."""
    coded, plain = twins(name)
    config = ModelConfig.load(plain)
    for size in (1, 2):
        for rank in range(size):
            group = Group(rank, size)
            with Checkpoint(coded) as ours, Checkpoint(plain) as theirs:
                there = loader_of(ModelConfig.load(coded), ours, group, torch.float32, True)
                here = loader_of(config, theirs, group, torch.float32, True)
                here.param_specs = there.param_specs  # cuts between groups, which a plain matrix does not have
                for spec in there.param_specs:
                    for unit in spec.units:
                        for a, b in zip(there._weights(spec, unit), here._weights(spec, unit)):
                            assert torch.equal(a.dequantize(), b.dequantize()), spec.layer
    with Checkpoint(coded) as ours, pytest.raises(CheckpointError, match="groups of 32"):
        loader_of(ModelConfig.load(coded), ours, Group(1, 8), torch.float32).load()  # 2 groups for 8 ranks


# ---- quantised while loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    "kind, group, most", [("fp8", None, 0.2), ("int8", None, 0.06), ("int4", 32, 0.4), ("int4", 64, 0.5)]
)
def test_quality(kind, group, most, fp8, checkpoint):
    """Random weights are a hard case: scores of experts lie close, and others are chosen for little."""
    directory = checkpoint(fp8=fp8, **WIDE)
    exact = logprobs(directory)
    difference = divergence(exact, logprobs(directory, quantization=kind, group_size=group))
    as_stored = fp8 and kind == "fp8"
    assert difference == 0 if as_stored else 0 < difference < most, difference


@pytest.mark.parametrize("kind, group", [("fp8", None), ("int8", None), ("int4", 32), ("int4", 128)])
@pytest.mark.parametrize("variant", [dict(mtp="full"), dict(moe_intermediate_size=37, intermediate_size=101)], ids=str)
def test_nbytes_and_kinds_are_those_of_what_is_held(variant, kind, group, checkpoint, monkeypatch):
    monkeypatch.setenv("GLIMMER_BACKEND", "reference")  # whose packed form is a Weight
    directory = checkpoint(**variant)
    config = ModelConfig.load(directory)
    for size, rank in ((1, 0), (2, 1)):
        with Checkpoint(directory) as opened:
            loader = loader_of(config, opened, Group(rank, size), torch.bfloat16, "mtp" in variant, kind, group)
            done = []
            loader.load(done.append)
        held, kinds = 0, {}
        for name, layer in loader.model.named_modules():
            for part, weights in weights_of(layer).items():
                kinds[f"{name}.{part}" if part else name] = {w.kind for w in weights}
                held += sum(w.nbytes for w in weights)
            vectors = (getattr(layer, key, None) for key in ("bias", "weight", "table", "value"))
            held += sum(v.nbytes for v in vectors if isinstance(v, Tensor))
        assert held == loader.nbytes
        assert 0.9 * held < sum(done) <= held, "progress counts matrices, which are nearly everything"
        odd = kind == "int4" and "mtp" not in variant
        for name, found in kinds.items():
            down = odd and name.endswith("down_proj") and size == 1  # of an odd width
            fine = name in ("lm_head", "mtp.head", "mtp.eh_proj") or down
            finer = "plain" if kind == "fp8" else "int8"
            expected = "plain" if name.endswith("gate.proj") else finer if fine else kind
            assert found == {expected} or (odd and size == 2 and name.endswith("down_proj")), name


def test_the_router_stays_as_it_is(checkpoint, monkeypatch):
    monkeypatch.setenv("GLIMMER_BACKEND", "reference")
    directory = checkpoint()
    models = []
    for kind in (None, "int4"):
        with Checkpoint(directory) as opened:
            config = ModelConfig.load(directory)
            loader = loader_of(config, opened, Group(), torch.bfloat16, quantization=kind)
            loader.load()
            models.append(loader.model)
    exact, coded = models
    for a, b in zip(exact.layers[1:], coded.layers[1:]):
        (exactly,), (found,) = a.mlp.gate.proj.packed.weights, b.mlp.gate.proj.packed.weights
        assert torch.equal(exactly.codes, found.codes)
        assert found.codes.dtype == torch.float32
        assert torch.equal(a.mlp.gate.e_score_correction_bias.value, b.mlp.gate.e_score_correction_bias.value)
        assert torch.equal(a.input_layernorm.weight, b.input_layernorm.weight)
    assert torch.equal(exact.embed_tokens.table, coded.embed_tokens.table)


@pytest.mark.parametrize("group, size", [(32, 2), (32, 4), (64, 2), (128, 3)])
def test_ranks_cut_between_groups(group, size, checkpoint):
    """Each rank quantises what it would have had of the whole: the same codes, whatever the number of ranks."""
    heads = dict(num_attention_heads=12, num_key_value_heads=3) if size == 3 else {}
    directory = checkpoint(hidden_size=128, moe_intermediate_size=416, intermediate_size=640, **heads)
    config = ModelConfig.load(directory)
    with Checkpoint(directory) as opened:
        plans = [
            loader_of(config, opened, Group(rank, size), torch.bfloat16, False, "int4", group) for rank in range(size)
        ]
        whole = loader_of(config, opened, Group(), torch.bfloat16, False, "int4", group)
        for specs in zip(whole.param_specs, *(loader.param_specs for loader in plans)):
            if not specs[0].layer.endswith(("mlp.down_proj", "experts.down_proj", "experts")):
                continue
            for i, unit in enumerate(specs[0].units):
                expected = whole._weights(specs[0], unit)[-1]  # down, after gate and up of an expert
                cuts = [loader._weights(spec, spec.units[i])[-1] for loader, spec in zip(plans, specs[1:])]
                found = torch.cat([cut.dequantize() for cut in cuts], 1)
                assert torch.equal(found, expected.dequantize()) and all(cut.shape[1] for cut in cuts)


@pytest.mark.parametrize("kind, group, bits", [("int8", None, 8.02), ("int4", 32, 5.26), ("int4", 128, 4.33)])
def test_a_published_size(kind, group, bits, tmp_path):
    """GLM-4.5-Air's proportions, few layers: bits a weight, everything counted but the embedding."""
    config = {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
        "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "head_dim": 128,
        "num_hidden_layers": 3, "num_attention_heads": 96, "num_key_value_heads": 8, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1, "use_qk_norm": False, "vocab_size": 1000, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000, "tie_word_embeddings": False, "eos_token_id": [1],
        "pad_token_id": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
    with Checkpoint(empty_checkpoint(tmp_path, config, mtp=None)) as opened:
        loader = loader_of(ModelConfig.from_dict(config), opened, Group(), torch.bfloat16, False, kind, group)
        weights = sum(math.prod(opened.shape(name)) for name in opened.names()) - 1000 * 4096
        assert 8 * (loader.nbytes - 2 * 1000 * 4096) / weights == pytest.approx(bits, rel=0.002)


def test_formats_that_differ_within_one_product_are_refused(twins):
    """q in int4 and k plain: nobody can join them."""
    coded, plain = twins("compressed")
    held, values = load_file(coded / "model.safetensors"), load_file(plain / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj"
    for end in ("packed", "scale", "shape", "zero_point"):
        del held[f"{name}.weight_{end}"]
    save_file(held | {f"{name}.weight": values[f"{name}.weight"]}, coded / "model.safetensors")
    with pytest.raises(CheckpointError, match="different formats") as caught:
        LLM(str(coded), max_model_len=64)
    assert f"{name}: plain" in caught.value.found and "int4 in groups of 32" in caught.value.found


def test_an_empty_weight_is_all_there_is():
    assert Weight.empty("fp8", (3, 8)).nbytes == 3 * 8 + 3 * 4


# ---- formats that differ within one layer --------------------------------------------------------------------------


def changed(directory: Path, changes: Callable[[dict[str, Tensor]], None]) -> Path:
    """The same directory, with other tensors."""
    held = load_file(directory / "model.safetensors")
    changes(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, directory / "model.safetensors")
    return directory


def stored_by_us(directory: Path, name: str, kind: str, group_size: int | None = None) -> dict[str, Tensor]:
    """The tensors of one matrix of a checkpoint, quantised and written as `glimmer quantize` writes them."""
    with Checkpoint(directory) as opened:
        weight = formats.read(opened, name).quantize(kind, group_size)
    return {f"{name}.{end}": tensor for end, tensor in formats.encode(weight).items()}


@pytest.fixture
def of_experts(checkpoint, tmp_path):
    """of_experts(how, odd, theirs) -> a checkpoint with all experts quantised as `how`, but matrix `odd` of layer 2 as
    `theirs` says."""

    def write(how: tuple, odd: str, theirs: tuple) -> Path:
        source = checkpoint(index=False, dtype="float32", **WIDE)
        held = load_file(source / "model.safetensors")
        for name in [name for name in held if ".mlp.experts." in name]:
            module = name.removesuffix(".weight")
            kind = theirs if module == f"model.layers.2.mlp.experts.{odd}" else how
            if kind[0] != "plain":
                del held[name]
                held |= stored_by_us(source, module, *kind)
        directory = shutil.copytree(source, tmp_path / "mixed")
        save_file(held, directory / "model.safetensors")
        return directory

    return write


INT8, INT4, WIDER = ("int8",), ("int4", 32), ("int4", 64)


@pytest.mark.parametrize("odd", ["0.gate_proj", "3.up_proj", "7.down_proj", "0.down_proj"])
@pytest.mark.parametrize(
    "how, theirs, found",
    [
        (INT4, INT8, "int8"),
        (INT8, INT4, "int4 in groups of 32"),
        (INT8, ("plain",), "plain"),
        (INT4, WIDER, "int4 in groups of 64"),
        (WIDER, INT4, "int4 in groups of 32"),
    ],
)
def test_experts_of_different_formats_are_refused_before_loading(how, theirs, found, odd, of_experts, monkeypatch):
    directory = of_experts(how, odd, theirs)
    monkeypatch.setattr(Checkpoint, "tensor", tensor_of_headers(Checkpoint.tensor))
    with pytest.raises(CheckpointError, match="different formats") as caught:
        LLM(str(directory), max_model_len=64)
    assert f"model.layers.2.mlp.experts.{odd}: {found}" in caught.value.found
    assert caught.value.found.count(": ") == 2, "one of the usual format, and the one that differs"
    assert "gate and up of all experts" in caught.value.expected and "alike" in caught.value.todo


def tensor_of_headers(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Checkpoint.tensor, refusing to read anything but the two numbers of a weight_shape."""

    def tensor(self: Checkpoint, name: str, *cuts: object) -> Tensor:
        assert name.endswith("_shape"), f"{name} is read"
        return read(self, name, *cuts)

    return tensor


def test_down_may_differ_from_gate_and_up(checkpoint, tmp_path):
    """One format for every gate and up, another for every down: both are packed as they are."""
    source = checkpoint(index=False, dtype="float32", **WIDE)
    held = load_file(source / "model.safetensors")
    plain = dict(held)
    for name in [name for name in held if ".mlp.experts." in name]:
        del held[name]
        module = name.removesuffix(".weight")
        tensors = stored_by_us(source, module, *(INT8 if module.endswith("down_proj") else INT4))
        held |= tensors
        end = {tensor.removeprefix(f"{module}."): values for tensor, values in tensors.items()}
        if "weight" in end:
            plain[name] = end["weight"].float() * end["weight_scale"]
    directory, twin = (shutil.copytree(source, tmp_path / kind) for kind in ("coded", "plain"))
    save_file(held, directory / "model.safetensors")
    save_file(plain, twin / "model.safetensors")
    assert divergence(logprobs(twin), logprobs(directory)) < 0.3


def test_scales_of_several_types_within_one_layer_are_all_kept(twins):
    """float16 scales are packed in bfloat16 only where they are bfloat16 numbers: those of expert 0, not the others."""
    coded, _ = twins("symmetric")

    def some_in_bfloat16(held: dict[str, Tensor]) -> None:
        for name in [name for name in held if name.endswith("weight_scale") and ".mlp.experts.0." in name]:
            held[name] = held[name].bfloat16()

    mixed = logprobs(changed(coded, some_in_bfloat16))
    wide = logprobs(changed(coded, lambda held: held.update({k: v.float() for k, v in held.items() if "_scale" in k})))
    assert torch.equal(mixed, wide)


def test_what_must_be_plain_is_dequantised(checkpoint, tmp_path):
    """A router and an embedding that somebody has quantised: the values of their codes, as the plain twin has them."""
    source = checkpoint(index=False, dtype="float32", **WIDE)
    names = ["model.embed_tokens", *(f"model.layers.{i}.mlp.gate" for i in (1, 2, 3))]
    directories = coded, plain = [shutil.copytree(source, tmp_path / kind) for kind in ("coded", "plain")]

    def quantised(held: dict[str, Tensor]) -> None:
        for name in names:
            del held[f"{name}.weight"]
            held |= stored_by_us(source, name, "int4", 32)

    def dequantised(held: dict[str, Tensor]) -> None:
        with Checkpoint(source) as opened:
            for name in names:
                held[f"{name}.weight"] = formats.read(opened, name).quantize("int4", 32).dequantize()

    for directory, change in zip(directories, (quantised, dequantised)):
        changed(directory, change)
    found, expected = logprobs(coded), logprobs(plain)
    assert torch.equal(found, expected)
