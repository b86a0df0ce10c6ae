"""Whole models of quantised matrices: made while loading, or by others; on one process and on several.

Each layout of others is written here from its public definition. The judge is the same model with the values of its
codes stored in float32: what remains between the two is that activations become int8 as they come.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import empty_checkpoint, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from glimmer import LLM, SamplingParams
from glimmer.backends import selection
from glimmer.checkpoint.files import Checkpoint
from glimmer.config import ModelConfig
from glimmer.errors import CheckpointError, ConfigError
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model.load import WeightLoader
from glimmer.parallel import Group
from glimmer.weight import Weight

CPU = torch.device("cpu")
TOKENS = [5, 60, 200, 7, 31, 90, 250, 3, 64, 128, 17, 99, 250, 251, 40, 8]
WIDE = dict(hidden_size=128, moe_intermediate_size=64, intermediate_size=192, head_dim=32)


def logprobs(directory: Path, **settings) -> Tensor:
    """(positions, vocabulary) log-probabilities of a prompt."""
    llm = LLM(str(directory), dtype="float32", max_model_len=64, **settings)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=llm.model_config.vocab_size)
    (answer,) = llm.generate({"prompt_token_ids": TOKENS}, params)
    llm.close()
    rows = [[position[token].logprob for token in sorted(position)] for position in answer.prompt_logprobs[1:]]
    return torch.tensor(rows)


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
    found, expected = logprobs(coded), logprobs(plain)
    difference = divergence(expected, found)
    assert 1e-7 < difference < 2e-3, "int8 activations cost something, and not more"
    with pytest.raises(ConfigError, match="is int4 already"):
        LLM(str(coded), max_model_len=64, quantization="int4")


@pytest.mark.parametrize("name", FORMATS)
def test_values_of_others_are_exact_on_every_rank(name, twins):
    """Rows and columns of each rank's cut, decoded, are the plain twin's; with more ranks than groups it is refused."""
    coded, plain = twins(name)
    config = ModelConfig.load(plain)
    for size in (1, 2):
        for rank in range(size):
            group = Group(rank, size)
            with Checkpoint(coded) as ours, Checkpoint(plain) as theirs:
                there = WeightLoader(ModelConfig.load(coded), ours, group, torch.float32, True)
                here = WeightLoader(config, theirs, group, torch.float32, True)
                here.param_specs = there.param_specs  # cuts between groups, which a plain matrix does not have
                for entry in there.param_specs:
                    for parts in entry.groups:
                        for a, b in zip(there._weights(entry, parts), here._weights(entry, parts)):
                            assert torch.equal(a.dequantize(), b.dequantize()), entry.leaf
    with Checkpoint(coded) as ours, pytest.raises(CheckpointError, match="groups of 32"):
        loader = WeightLoader(ModelConfig.load(coded), ours, Group(1, 8), torch.float32)  # 2 groups for 8 ranks
        loader.fill(Glm4Moe(config, Group(1, 8), selection.choose(torch.device("cpu")), torch.float32, None), CPU)


# ---- quantised while loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind, group, most", [("int8", None, 0.06), ("int4", 32, 0.4), ("int4", 64, 0.5)])
def test_quality(kind, group, most, fp8, checkpoint):
    """Random weights are a hard case: scores of experts lie close, and others are chosen for little."""
    directory = checkpoint(fp8=fp8, **WIDE)
    exact = logprobs(directory)
    difference = divergence(exact, logprobs(directory, quantization=kind, group_size=group))
    assert 0 < difference < most, difference


@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 32), ("int4", 128)])
@pytest.mark.parametrize("variant", [dict(mtp="full"), dict(moe_intermediate_size=37, intermediate_size=101)], ids=str)
def test_nbytes_and_kinds_are_those_of_what_is_held(variant, kind, group, checkpoint, monkeypatch):
    monkeypatch.setenv("GLIMMER_BACKEND", "reference")  # whose packed form is a Weight
    directory = checkpoint(**variant)
    config = ModelConfig.load(directory)
    for size, rank in ((1, 0), (2, 1)):
        with Checkpoint(directory) as opened:
            loader = WeightLoader(config, opened, Group(rank, size), torch.bfloat16, "mtp" in variant, kind, group)
            model = Glm4Moe(config, Group(rank, size), selection.choose(torch.device("cpu")), torch.float32, loader.mtp)
            done = []
            loader.fill(model, CPU, done.append)
        held, kinds = 0, {}
        for name, leaf in model.named_modules():
            packed = getattr(leaf, "packed", None)
            weights = packed if isinstance(packed, list) else [packed] if packed is not None else []
            kinds |= {name: {w.kind for w in weights}} if weights else {}
            held += sum(w.nbytes for w in weights)
            vectors = (getattr(leaf, key, None) for key in ("bias", "weight", "table", "value"))
            held += sum(v.nbytes for v in vectors if isinstance(v, Tensor))
        assert held == loader.nbytes
        assert 0.9 * held < sum(done) <= held, "progress counts matrices, which are nearly everything"
        odd = kind == "int4" and "mtp" not in variant
        for name, found in kinds.items():
            down = odd and name.endswith("down_proj") and size == 1  # of an odd width
            fine = name in ("lm_head", "mtp.head", "mtp.eh_proj") or down
            expected = "plain" if name.endswith("gate.proj") else "int8" if fine else kind
            assert found == {expected} or (odd and size == 2 and name.endswith("down_proj")), name


def test_the_router_stays_as_it_is(checkpoint, monkeypatch):
    monkeypatch.setenv("GLIMMER_BACKEND", "reference")
    directory = checkpoint()
    models = []
    for kind in (None, "int4"):
        with Checkpoint(directory) as opened:
            config = ModelConfig.load(directory)
            loader = WeightLoader(config, opened, Group(), torch.bfloat16, quantization=kind)
            models.append(Glm4Moe(config, Group(), selection.choose(torch.device("cpu")), torch.float32, None))
            loader.fill(models[-1], CPU)
    exact, coded = models
    for a, b in zip(exact.layers[1:], coded.layers[1:]):
        (plain,), (same,) = (layer.mlp.gate.proj.packed.weights for layer in (a, b))
        assert torch.equal(plain.codes, same.codes)
        assert same.codes.dtype == torch.float32
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
            WeightLoader(config, opened, Group(rank, size), torch.bfloat16, False, "int4", group)
            for rank in range(size)
        ]
        whole = WeightLoader(config, opened, Group(), torch.bfloat16, False, "int4", group)
        for entries in zip(whole.param_specs, *(loader.param_specs for loader in plans)):
            if not entries[0].leaf.endswith("mlp.down_proj") and "experts.down_proj" not in entries[0].leaf:
                continue
            for i, parts in enumerate(entries[0].groups):
                (expected,) = whole._weights(entries[0], parts)
                cuts = [loader._weights(entry, entry.groups[i])[0] for loader, entry in zip(plans, entries[1:])]
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
        loader = WeightLoader(ModelConfig.from_dict(config), opened, Group(), torch.bfloat16, False, kind, group)
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
