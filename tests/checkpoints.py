"""Checkpoints for tests, in place of downloaded ones: small files in the real formats, random weights from fixed seeds.

The tokenizer has GLM's added tokens and its pre-tokeniser but knows no language: it spells in bytes. Not here: the demo
model, which answers in words (glimmer/demo).
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from protocol import GLM_ADDED_TOKENS, GLM_SPLIT
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from glimmer.checkpoint.files import DTYPES, INDEX
from glimmer.text.tokenizer import byte_symbols

DEMO = Path(__file__).resolve().parents[1] / "glimmer" / "demo"


def write_tokenizer(directory: str | Path, vocab_extra: int = 0) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; return the added tokens' ids by name.

    Id b (0..255) is the byte b; ids 256.. are `vocab_extra` tokens of two bytes each (0..65,536 of them, in a fixed
    scattered order, so that many of them begin or end inside a UTF-8 character); then come GLM's 36 added tokens.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    # An odd multiplier permutes 0..65535: the pairs are all different and look random.
    codes = [i * 40503 % 65536 for i in range(vocab_extra)]
    pairs = [(symbols[code // 256], symbols[code % 256]) for code in codes]
    vocab = {token: i for i, token in enumerate(symbols + [a + b for a, b in pairs])}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(name, special=special, normalized=False) for name, special in GLM_ADDED_TOKENS.items()]
    )
    tokenizer.save(str(directory / "tokenizer.json"))

    ids = {name: tokenizer.token_to_id(name) for name in GLM_ADDED_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "added_tokens_decoder": {
            str(ids[name]): {"content": name, **flags, "special": special} for name, special in GLM_ADDED_TOKENS.items()
        },
        "additional_special_tokens": [name for name, special in GLM_ADDED_TOKENS.items() if special],
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 128000,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(DEMO / "chat_template.jinja", directory / "chat_template.jinja")
    return ids


TINY = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 320,  # the tokenizer has 292; the rest is padding, as in the real embedding
}


def tiny_checkpoint(
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    fp8: bool = False,
    mtp: str | None = None,
    shards: int = 1,
    index: bool = True,
    tokenizer: bool = True,
    rope: str = "top",
    dtype_key: str = "torch_dtype",
    **config_overrides: Any,
) -> Path:
    """Write a random GLM-4.5 of `TINY` size with the names, types and files of the official ones; return `directory`.

    dtype      "bfloat16", "float16" or "float32"; e_score_correction_bias is float32 always
    fp8        in the official FP8 format: codes and scales made of the values that the plain one of `dtype` has
    mtp        None, "full" (with its copies of embedding and head, as GLM-4.5), "without_copies" (GLM-4.6), or
               "separate_file" (full, in a mtp.safetensors that the index does not name, GLM-4.7)
    index      False: no index; the one file is model.safetensors
    rope       "top" (rope_theta, ... at the top of config.json) or "parameters" (transformers 5's rope_parameters)
    dtype_key  "torch_dtype" or "dtype" (GLM-4.7)

    A tensor's values depend on `seed`, its name and its shape only: variants share what they have in common.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory) if tokenizer else {name: 256 + i for i, name in enumerate(GLM_ADDED_TOKENS)}
    config = TINY | {
        dtype_key: dtype,
        "eos_token_id": [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "num_nextn_predict_layers": int(mtp is not None),
        **config_overrides,
    }
    weights: dict[str, Tensor] = {}
    for name, shape, kind in tensors(config, mtp):
        encoded = _encode(_random(_source(name), shape, kind, seed), kind, getattr(torch, dtype), fp8)
        weights |= {name + suffix: tensor for suffix, tensor in encoded.items()}
    if fp8:
        config.setdefault("quantization_config", _fp8_config(config, mtp))
    if rope == "parameters":
        del config["rope_scaling"]
        config["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": config.pop("rope_theta"),
            "partial_rotary_factor": config.pop("partial_rotary_factor"),
        }
    _write_configs(directory, config)
    _write_weights(directory, weights, config, mtp, shards, index, save_file)
    return directory


def empty_checkpoint(
    directory: str | Path,
    config: dict[str, Any],
    dtype: str = "bfloat16",
    *,
    fp8: bool = False,
    mtp: str | None = "full",
) -> Path:
    """Write a checkpoint of any size that takes no disk space: true headers, sparse files of about 5 GB, all values 0.

    `config` becomes config.json and decides names and shapes; the other parameters are those of `tiny_checkpoint`
    (config must agree with `mtp`). There is no tokenizer.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if fp8:
        config = config | {"quantization_config": _fp8_config(config, mtp)}

    @cache
    def encoded(shape: tuple[int, ...], kind: str) -> dict[str, Tensor]:
        return _encode(torch.empty(shape, device="meta"), kind, getattr(torch, dtype), fp8)

    weights = {
        name + suffix: tensor
        for name, shape, kind in tensors(config, mtp)
        for suffix, tensor in encoded(shape, kind).items()
    }
    _write_configs(directory, config)
    shards = math.ceil(sum(tensor.nbytes for tensor in weights.values()) / 5e9)
    _write_weights(directory, weights, config, mtp, shards, True, _save_sparse)
    return directory


def tensors(config: dict[str, Any], mtp: str | None) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind of every tensor of a plain checkpoint, in the order of the model.

    Kinds: "linear" (what FP8 checkpoints quantise), "matrix" (what they leave), "embedding", "norm", "bias", and
    "correction" (float32 in every checkpoint).
    """
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    yield "model.embed_tokens.weight", (vocab, hidden), "embedding"
    for layer in range(layers):
        yield from _block(config, layer)
    yield "model.norm.weight", (hidden,), "norm"
    yield "lm_head.weight", (vocab, hidden), "matrix"
    if mtp is None:
        return
    yield from _block(config, layers)
    prefix = f"model.layers.{layers}"
    yield f"{prefix}.enorm.weight", (hidden,), "norm"
    yield f"{prefix}.hnorm.weight", (hidden,), "norm"
    yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), "matrix"
    yield f"{prefix}.shared_head.norm.weight", (hidden,), "norm"
    if mtp != "without_copies":
        yield f"{prefix}.embed_tokens.weight", (vocab, hidden), "embedding"
        yield f"{prefix}.shared_head.head.weight", (vocab, hidden), "linear"  # unlike lm_head, of which it is a copy


def _block(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """One decoder layer: attention, then a dense MLP or experts."""
    prefix, hidden, dim = f"model.layers.{layer}", config["hidden_size"], config["head_dim"]
    yield f"{prefix}.input_layernorm.weight", (hidden,), "norm"
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for proj, rows in (("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim)):
        yield f"{prefix}.self_attn.{proj}.weight", (rows, hidden), "linear"
        if config["attention_bias"]:
            yield f"{prefix}.self_attn.{proj}.bias", (rows,), "bias"
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * dim), "linear"
    if config["use_qk_norm"]:
        yield f"{prefix}.self_attn.q_norm.weight", (dim,), "norm"
        yield f"{prefix}.self_attn.k_norm.weight", (dim,), "norm"
    if layer < config["first_k_dense_replace"]:
        yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        return
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    yield f"{prefix}.mlp.gate.weight", (experts, hidden), "matrix"
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), "correction"
    for expert in range(experts):
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, width)
    yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, width * config["n_shared_experts"])


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden), "linear"
    yield f"{prefix}.up_proj.weight", (width, hidden), "linear"
    yield f"{prefix}.down_proj.weight", (hidden, width), "linear"


def _source(name: str) -> str:
    """The tensor of which this one is a copy (the MTP layer's embedding and head), or itself."""
    if name.endswith(".shared_head.head.weight"):
        return "lm_head.weight"
    return "model.embed_tokens.weight" if name.endswith(".embed_tokens.weight") else name


def _random(name: str, shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """float32 values of a scale at which every part of the model has a say in its logits.

    Queries and keys are doubled, else attention is an average that hides mistakes in positions; so is the head, for
    logits with a standard deviation of 2.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    noise = torch.randn(shape, generator=generator)
    match kind:
        case "norm":
            return 1 + 0.1 * noise
        case "bias" | "correction":
            return 0.1 * noise
        case "embedding":
            return noise
        case _:
            doubled = name.endswith(("q_proj.weight", "k_proj.weight", "lm_head.weight"))
            return noise * ((2 if doubled else 1) / math.sqrt(shape[1]))


def _encode(values: Tensor, kind: str, dtype: torch.dtype, fp8: bool) -> dict[str, Tensor]:
    """What stands for a parameter on disk: the ends of the tensors' names -> the tensors."""
    if kind == "correction":
        return {"": values}
    values = values.to(dtype)
    if not (fp8 and kind == "linear"):
        return {"": values}
    scale = (values.float().abs().amax(1, keepdim=True) / 448).to(dtype)  # 448: the largest float8_e4m3fn
    codes = (values.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}


def _fp8_config(config: dict[str, Any], mtp: str | None) -> dict[str, Any]:
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme | {"strategy": "channel", "dynamic": False, "observer": "minmax"},
                "input_activations": scheme | {"strategy": "token", "dynamic": True, "observer": None},
                "output_activations": None,
            }
        },
        "ignore": [name.removesuffix(".weight") for name, _, kind in tensors(config, mtp) if kind != "linear"],
        "kv_cache_scheme": None,
    }


def _write_configs(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"_from_model_config": True, "transformers_version": "4.54.0"}
    generation |= {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    directory: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    mtp: str | None,
    shards: int,
    index: bool,
    save: Callable[[dict[str, Tensor], Path], None],
) -> None:
    """Write `shards` files with equally many tensors, in their order, and the index."""
    if mtp == "separate_file":
        prefix = f"model.layers.{config['num_hidden_layers']}."
        apart = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        save(apart, directory / "mtp.safetensors")
        weights = {name: tensor for name, tensor in weights.items() if name not in apart}
    names = list(weights)
    files: dict[str, str] = {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if index or shards > 1 else "model.safetensors"
        save({name: weights[name] for name in part}, directory / file)
        files |= dict.fromkeys(part, file)
    if index:
        total = sum(tensor.nbytes for tensor in weights.values())
        table = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / INDEX).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _save_sparse(weights: dict[str, Tensor], file: Path) -> None:
    """A safetensors file whose data is one hole."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
