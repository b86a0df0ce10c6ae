"""Write the benchmarks' checkpoint: random weights of GLM-4.5-Air's shape at a quarter of its width and depth.

usage: make_checkpoint.py [--mtp] [--layers N] OUT

`air-quarter`: 3.2 GiB in bfloat16, the same bytes on every machine with the same version of torch. No tokenizer is
written: `glimmer bench` sends token ids. --mtp adds a multi-token-prediction layer, whose drafts are wrong nearly
always since all weights are random: what drafts cost where they bring nothing. --layers: fewer than 12.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_act": "silu",
    "attention_bias": True,
    "use_qk_norm": False,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "first_k_dense_replace": 1,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 2816,
    "moe_intermediate_size": 352,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": [2],
    "pad_token_id": 0,
}


def main(out: Path, config: dict) -> None:
    """Write config.json, the index, and one file for each layer, the MTP layer included, and for the rest."""
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    index: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, *shape: int, std: float | None = None, mean: float = 0.0, dtype: torch.dtype = torch.bfloat16):
        std = 1 / math.sqrt(shape[-1]) if std is None else std
        tensors[name] = (torch.randn(shape, generator=generator) * std + mean).to(dtype)

    def mlp(prefix: str, width: int) -> None:
        put(prefix + "gate_proj.weight", width, hidden)
        put(prefix + "up_proj.weight", width, hidden)
        put(prefix + "down_proj.weight", hidden, width)

    def write(file: str) -> None:
        save_file(tensors, out / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        tensors.clear()

    def decoder_layer(i: int) -> None:
        layer = f"model.layers.{i}."
        put(layer + "input_layernorm.weight", hidden, std=0.1, mean=1.0)
        put(layer + "post_attention_layernorm.weight", hidden, std=0.1, mean=1.0)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            put(layer + f"self_attn.{name}_proj.weight", width, hidden)
            put(layer + f"self_attn.{name}_proj.bias", width, std=0.1)
        put(layer + "self_attn.o_proj.weight", hidden, queries)
        if i < config["first_k_dense_replace"]:
            mlp(layer + "mlp.", config["intermediate_size"])
        else:
            experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
            put(layer + "mlp.gate.weight", experts, hidden)
            put(layer + "mlp.gate.e_score_correction_bias", experts, std=0.05, dtype=torch.float32)
            for expert in range(experts):
                mlp(layer + f"mlp.experts.{expert}.", width)
            mlp(layer + "mlp.shared_experts.", width)

    for i in range(config["num_hidden_layers"]):
        decoder_layer(i)
        write(f"layer-{i:02d}.safetensors")
    put("model.embed_tokens.weight", config["vocab_size"], hidden, std=1.0)
    put("model.norm.weight", hidden, std=0.1, mean=1.0)
    put("lm_head.weight", config["vocab_size"], hidden)
    write("rest.safetensors")
    if config["num_nextn_predict_layers"]:  # last, so that it changes no byte of the others
        last = config["num_hidden_layers"]
        decoder_layer(last)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            put(f"model.layers.{last}.{name}.weight", hidden, std=0.1, mean=1.0)
        put(f"model.layers.{last}.eh_proj.weight", hidden, 2 * hidden)
        write(f"layer-{last:02d}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtp", action="store_true", help="with a multi-token-prediction layer")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], metavar="N")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    own = {"num_hidden_layers": given.layers, "num_nextn_predict_layers": int(given.mtp)}
    main(given.out, CONFIG | own)
