"""Write a glm4_moe checkpoint as GGUF, so that llama.cpp can be timed on the same weights. The file has no vocabulary.

usage: make_gguf.py DIRECTORY OUT.gguf          matrices as bfloat16; vectors and the router as float32
       make_gguf.py IN.gguf OUT.gguf TYPE       quantised by llama.cpp itself: Q8_0, Q4_0, Q4_K_M

For the Python that has llama-cpp-python, gguf, torch and safetensors. An MTP layer is left out.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import torch
from safetensors import safe_open

# Names of the checkpoint, without model.layers.N. in front and .weight or .bias behind, and what GGUF calls them.
ONCE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def describe(writer: gguf.GGUFWriter, config: dict) -> None:
    """The configuration as GGUF metadata."""
    heads, width = config["num_attention_heads"], config["head_dim"]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    for add, value in (
        (writer.add_vocab_size, config["vocab_size"]),
        (writer.add_block_count, config["num_hidden_layers"]),
        (writer.add_leading_dense_block_count, config["first_k_dense_replace"]),
        (writer.add_context_length, config["max_position_embeddings"]),
        (writer.add_embedding_length, config["hidden_size"]),
        (writer.add_feed_forward_length, config["intermediate_size"]),
        (writer.add_layer_norm_rms_eps, config["rms_norm_eps"]),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, config["num_key_value_heads"]),
        (writer.add_key_length, width),
        (writer.add_value_length, width),
        (writer.add_rope_freq_base, config["rope_theta"]),
        (writer.add_rope_dimension_count, int(width * config["partial_rotary_factor"])),
        (writer.add_expert_count, config["n_routed_experts"]),
        (writer.add_expert_used_count, config["num_experts_per_tok"]),
        (writer.add_expert_shared_count, config["n_shared_experts"]),
        (writer.add_expert_feed_forward_length, config["moe_intermediate_size"]),
        (writer.add_expert_weights_scale, config["routed_scaling_factor"]),
        (writer.add_expert_weights_norm, config["norm_topk_prob"]),
    ):
        add(value)


def renamed(name: str, layers: int) -> str | None:
    """GGUF's name of a tensor (one for all experts of a layer), or None for a tensor that GGUF does not store."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if found is None:
        stem, _, part = name.rpartition(".")
        return f"{ONCE[stem]}.{part}"
    if int(found[1]) >= layers:
        return None
    rest = re.sub(r"\.experts\.\d+\.", ".experts.", found[2])
    if rest == "mlp.gate.e_score_correction_bias":
        return f"blk.{found[1]}.exp_probs_b.bias"
    stem, _, part = rest.rpartition(".")
    return f"blk.{found[1]}.{LAYER[stem]}.{part}"


def add(writer: gguf.GGUFWriter, name: str, values: torch.Tensor) -> None:
    """One tensor in the type that llama.cpp wants for it."""
    if values.ndim == 1 or ".ffn_gate_inp." in name:
        writer.add_tensor(name, values.float().numpy())
    else:
        data = values.bfloat16().contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)


def write(directory: Path, out: Path) -> None:
    """The checkpoint of a directory as one file."""
    config = json.loads((directory / "config.json").read_text())
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        opened = safe_open(file, "pt")
        for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
            tensors[name] = lambda opened=opened, name=name: opened.get_tensor(name)
    number = lambda name: [int(n) for n in re.findall(r"\.(\d+)\.", name)]
    together: dict[str, list[str]] = {}
    for name in sorted(tensors, key=number):
        if (to := renamed(name, config["num_hidden_layers"])) is not None:
            together.setdefault(to, []).append(name)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GLM4_MOE])
    describe(writer, config)
    for to, names in together.items():
        add(writer, to, torch.stack([tensors[name]() for name in names]) if "_exps." in to else tensors[names[0]]())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, kind: str) -> None:
    """Quantise a GGUF file with llama.cpp's own quantiser."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    if code != 0:
        raise SystemExit(f"llama.cpp could not quantise {source} as {kind}: {code}")


source, out = map(Path, sys.argv[1:3])
part = out.with_suffix(".part")  # renamed at the end, so that a file under its final name is complete
if source.is_dir():
    write(source, part)
else:
    quantize(source, part, sys.argv[3])
part.replace(out)
