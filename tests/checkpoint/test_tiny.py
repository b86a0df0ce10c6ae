"""The stand-in checkpoints: names and counts of the official ones, and a model that transformers itself can run."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, empty_checkpoint, tiny_checkpoint
from protocol import GLM_ADDED_TOKENS
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from glimmer.checkpoint import formats
from glimmer.checkpoint.files import INDEX, Checkpoint
from glimmer.model_config import ModelConfig

AIR = TINY | {
    "hidden_size": 4096, "num_hidden_layers": 46, "first_k_dense_replace": 1, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151552, "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16", "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
}  # fmt: skip
GLM_45 = AIR | {
    "hidden_size": 5120, "num_hidden_layers": 92, "first_k_dense_replace": 3, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "n_routed_experts": 160, "routed_scaling_factor": 2.5, "use_qk_norm": True,
}  # fmt: skip


def load(directory: Path) -> tuple[torch.nn.Module, dict]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    return model, info


def kind_of(name: str) -> str:
    return re.sub(r"\d+", "#", name)


# ---- against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"dtype": "float32", "use_qk_norm": True, "attention_bias": False, "n_group": 2, "topk_group": 1},
        {"dtype": "float16", "first_k_dense_replace": 3, "shards": 3, "routed_scaling_factor": 2.5},
        {"rope": "parameters", "dtype_key": "dtype", "mtp": "separate_file"},
        {"index": False, "n_shared_experts": 2},
        {"mtp": "full"},
        {"mtp": "without_copies", "shards": 2},
    ],
    ids=str,
)
def test_transformers_loads_it(tmp_path, variant):
    model, info = load(tiny_checkpoint(tmp_path, **variant))
    # transformers knows the MTP layer only by the numbers of the official models; of ours it may leave just this layer.
    assert all(name.startswith("model.layers.4.") for name in info["unexpected_keys"])
    assert bool(info["unexpected_keys"]) == (variant.get("mtp") in ("full", "without_copies"))
    assert model.dtype == getattr(torch, variant.get("dtype", "bfloat16"))
    assert (model.config.rope_parameters["rope_theta"], model.config.rope_parameters["partial_rotary_factor"]) == (
        1e6,
        0.5,
    )
    checkpoint = Checkpoint(tmp_path)
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert checkpoint.dtype(bias) == torch.float32
    assert torch.equal(model.get_buffer(bias), checkpoint.tensor(bias))
    up = checkpoint.tensor("model.layers.3.mlp.experts.7.up_proj.weight")
    assert torch.equal(model.model.layers[3].mlp.experts.gate_up_proj[7, 32:], up)


def test_answers_are_not_degenerate(tmp_path):
    model, _ = load(tiny_checkpoint(tmp_path, dtype="float32"))
    prompts = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(prompts).logits
        answers = model.generate(prompts, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 24:]
        last = model(prompts[:, -1:]).logits[:, -1]
    assert 1.5 < logits.std() < 3
    assert min(len(set(answer.tolist())) for answer in answers) >= 10
    assert len({tuple(answer.tolist()) for answer in answers}) == 4
    assert (last - logits[:, -1]).std() > 0.5 * logits.std()  # the prompt matters, not just its last token


# ---- what lies on disk ---------------------------------------------------------------------------------------------


def test_seed_decides_everything(tmp_path):
    first, again, other = (
        {path.name: path.read_bytes() for path in tiny_checkpoint(tmp_path / name, seed=seed, mtp="full").iterdir()}
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert first["config.json"] == other["config.json"]
    assert first["model-00001-of-00001.safetensors"] != other["model-00001-of-00001.safetensors"]


def test_variants_share_their_values(tmp_path):
    plain = Checkpoint(tiny_checkpoint(tmp_path / "plain", tokenizer=False))
    other = Checkpoint(tiny_checkpoint(tmp_path / "other", tokenizer=False, mtp="full", shards=3, dtype="float32"))
    assert plain.names() < other.names()
    for name in plain.names():
        assert torch.equal(plain.tensor(name), other.tensor(name).to(plain.dtype(name)))
    assert torch.equal(other.tensor("model.layers.4.embed_tokens.weight"), other.tensor("model.embed_tokens.weight"))
    assert torch.equal(other.tensor("model.layers.4.shared_head.head.weight"), other.tensor("lm_head.weight"))


def test_files_and_index(tmp_path):
    def files(**how):
        directory = tiny_checkpoint(tmp_path / str(how), tokenizer=False, **how)
        index = directory / INDEX
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
        return sorted(path.name for path in directory.glob("*.safetensors")), named

    one, two = (
        "model-00001-of-00001.safetensors",
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    )
    assert files() == ([one], {one})
    assert files(index=False) == (["model.safetensors"], None)
    assert files(shards=2) == (two, set(two))
    assert files(shards=2, index=False) == (two, None)
    assert files(mtp="separate_file") == ([one, "mtp.safetensors"], {one})
    checkpoint = Checkpoint(tiny_checkpoint(tmp_path / "mtp", mtp="separate_file"))
    apart = {name for name in checkpoint.names() if checkpoint.file(name).name == "mtp.safetensors"}
    assert apart == {name for name in checkpoint.names() if name.startswith("model.layers.4.")}
    assert "model.layers.4.shared_head.head.weight" in apart


@pytest.mark.parametrize("rope", ["top", "parameters"])
@pytest.mark.parametrize("dtype_key", ["torch_dtype", "dtype"])
def test_configurations(tmp_path, rope, dtype_key):
    tiny_checkpoint(
        tmp_path, rope=rope, dtype_key=dtype_key, dtype="float16", mtp="full", vocab_size=400, rope_theta=5000
    )
    config = ModelConfig.load(tmp_path)
    assert (config.dtype, config.vocab_size, config.num_nextn_predict_layers) == ("float16", 400, 1)
    assert (config.rope_theta, config.partial_rotary_factor, config.rotary_dim) == (5000, 0.5, 8)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert ("rope_theta" in raw, "rope_parameters" in raw) == ((True, False) if rope == "top" else (False, True))
    assert ("torch_dtype" in raw, "dtype" in raw) == (dtype_key == "torch_dtype", dtype_key == "dtype")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ends = [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert raw["eos_token_id"] == json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == ends
    assert tokenizer.get_vocab_size() == 256 + len(GLM_ADDED_TOKENS) < TINY["vocab_size"]


def test_without_a_tokenizer_the_ids_are_the_same(tmp_path):
    texts = [
        (tiny_checkpoint(tmp_path / str(tokenizer), tokenizer=tokenizer) / "config.json").read_text()
        for tokenizer in (True, False)
    ]
    assert texts[0] == texts[1]
    assert not (tmp_path / "False" / "tokenizer.json").exists()


# ---- FP8 -----------------------------------------------------------------------------------------------------------

QUANTISED = {
    "model.layers.#.self_attn.q_proj", "model.layers.#.self_attn.k_proj", "model.layers.#.self_attn.v_proj",
    "model.layers.#.self_attn.o_proj", "model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj",
    "model.layers.#.mlp.down_proj", "model.layers.#.mlp.experts.#.gate_proj", "model.layers.#.mlp.experts.#.up_proj",
    "model.layers.#.mlp.experts.#.down_proj", "model.layers.#.mlp.shared_experts.gate_proj",
    "model.layers.#.mlp.shared_experts.up_proj", "model.layers.#.mlp.shared_experts.down_proj",
    "model.layers.#.shared_head.head",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_is_the_official_layout(tmp_path, dtype):
    plain = Checkpoint(tiny_checkpoint(tmp_path / "plain", mtp="full", dtype=dtype))
    coded = Checkpoint(tiny_checkpoint(tmp_path / "fp8", mtp="full", dtype=dtype, fp8=True))
    formats.check(ModelConfig.load(tmp_path / "fp8").quantization_config)
    scales = {name for name in coded.names() if name.endswith(".weight_scale")}
    assert coded.names() - scales == plain.names()
    assert {kind_of(name.removesuffix(".weight_scale")) for name in scales} == QUANTISED
    for name in plain.names():
        if f"{name}_scale" not in scales:
            assert coded.dtype(name) == plain.dtype(name) and torch.equal(coded.tensor(name), plain.tensor(name))
            continue
        module = name.removesuffix(".weight")
        assert formats.stored(coded, module)[:2] == ("fp8", plain.shape(name))
        assert coded.shape(f"{name}_scale") == (plain.shape(name)[0], 1)
        values, back = plain.tensor(name).float(), formats.read(coded, module).dequantize()
        # Half a step of e4m3 (2**-4 of the value, or of the smallest normal code 2**-6) and the rounding of the scale.
        step = values.abs().clamp(min=values.abs().amax(1, keepdim=True) / 448 * 2**-6)
        assert ((back - values).abs() <= step * (2**-4 + 2**-8)).all()


def test_fp8_ignores_by_name(tmp_path):
    tiny_checkpoint(tmp_path, mtp="full", fp8=True)
    ignored = set(ModelConfig.load(tmp_path).quantization_config["ignore"])
    assert {"lm_head", "model.embed_tokens", "model.norm", "model.layers.0.self_attn.q_proj.bias"} <= ignored
    assert {"model.layers.1.mlp.gate", "model.layers.4.eh_proj", "model.layers.4.embed_tokens"} <= ignored
    assert "model.layers.4.shared_head.head" not in ignored and "model.layers.0.mlp.up_proj" not in ignored


# ---- official sizes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, mtp, tensors, parameters",
    [
        (AIR, "full", 18_329, 110_468_824_832),
        (AIR, "without_copies", 18_327, 109_227_310_848),
        (AIR, None, 17_925, 106_852_251_264),
        (GLM_45, "full", 44_691, 358_337_791_296),
        (GLM_45, "separate_file", 44_691, 358_337_791_296),
    ],
    ids=["Air", "Air-without-copies", "Air-without-MTP", "355B", "355B-separate"],
)
def test_empty_checkpoints_have_official_counts(tmp_path, config, mtp, tensors, parameters):
    empty_checkpoint(tmp_path, config | {"num_nextn_predict_layers": int(mtp is not None)}, mtp=mtp)
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.names()) == tensors
    corrections = sum(checkpoint.shape(name)[0] for name in checkpoint.names() if name.endswith("correction_bias"))
    assert sum(checkpoint.nbytes(name) for name in checkpoint.names()) == 2 * parameters + 2 * corrections
    assert not checkpoint.tensor("lm_head.weight", (151551, 151552)).any()
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 30e6
    assert max(path.stat().st_size for path in tmp_path.glob("model-*.safetensors")) < 9e9
    assert ModelConfig.load(tmp_path).num_nextn_predict_layers == int(mtp is not None)


@pytest.mark.slow
def test_empty_fp8_checkpoint(tmp_path):
    checkpoint = Checkpoint(empty_checkpoint(tmp_path, AIR, fp8=True))
    formats.check(ModelConfig.load(tmp_path).quantization_config)
    assert len(checkpoint.names()) == 18_329 + sum(name.endswith("_scale") for name in checkpoint.names())
    assert formats.stored(checkpoint, "model.layers.46.shared_head.head")[:2] == ("fp8", (151552, 4096))
    assert formats.stored(checkpoint, "lm_head")[:2] == ("plain", (151552, 4096))
    nbytes = sum(checkpoint.nbytes(name) for name in checkpoint.names() if not name.startswith("model.layers.46."))
    assert 107.5e9 < nbytes < 108.7e9
