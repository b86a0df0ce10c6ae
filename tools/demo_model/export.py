"""The trained model as a Hugging Face checkpoint: official names, bf16, the correction bias in float32.

    python tools/demo_model/export.py --data build/demo_model --out build/demo_model/checkpoint

With --between EARLIER LATER SHARE, two checkpoints of one training, not the trained state is written but weights that
share of the way from the first to the second: what the later stage learnt, with less of what it forgot.

The MTP layer is `model.layers.N` with N = num_hidden_layers, and brings no copies of the embedding and the head.
"""

import argparse
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from dialogue import TEMPLATE
from model import DemoModel, Shape
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def official(model: DemoModel) -> dict[str, Tensor]:
    """Every tensor under its official name, as it is stored."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.float()
        elif name.endswith("experts.gate_up_proj"):
            for e, stacked in enumerate(tensor.bfloat16()):
                gate, up = stacked.chunk(2)
                prefix = name.removesuffix("gate_up_proj")
                tensors[f"{prefix}{e}.gate_proj.weight"], tensors[f"{prefix}{e}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor.bfloat16()):
                tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        else:
            tensors[name] = tensor.bfloat16()
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def load(directory: Path) -> DemoModel:
    """The model of a checkpoint that `export` wrote, in float32: the way back."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model = DemoModel(Shape(**{f.name: settings[f.name] for f in fields(Shape)}))
    stored, state = load_file(directory / "model.safetensors"), model.state_dict()
    for name, tensor in state.items():
        prefix = name.rpartition(".")[0]
        experts = range(model.shape.n_routed_experts)
        if name.endswith("experts.gate_up_proj"):
            parts = [
                torch.cat([stored[f"{prefix}.{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in experts
            ]
        elif name.endswith("experts.down_proj"):
            parts = [stored[f"{prefix}.{e}.down_proj.weight"] for e in experts]
        else:
            parts = None
        tensor.copy_(stored[name] if parts is None else torch.stack(parts))
    return model


def config(shape: Shape, tokenizer: Tokenizer) -> dict:
    numbers = asdict(shape)
    return {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True,
        "eos_token_id": [tokenizer.token_to_id(tag) for tag in STOPS], "pad_token_id": tokenizer.token_to_id(STOPS[0]),
        **numbers, "rope_theta": int(shape.rope_theta),
    }  # fmt: skip


def export(model: DemoModel, data: Path, out: Path) -> None:
    """Write config, generation config, tokenizer (from `data`), chat template and weights into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    settings = config(model.shape, tokenizer)
    generation = {key: settings[key] for key in ("eos_token_id", "pad_token_id")} | {"do_sample": False}
    for name, content in (("config.json", settings), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for source in (data / "tokenizer.json", data / "tokenizer_config.json", TEMPLATE):
        if source.resolve() != (out / source.name).resolve():
            shutil.copyfile(source, out / source.name)
    save_file(official(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner


def between(earlier: DemoModel, later: DemoModel, share: float) -> DemoModel:
    """`earlier`, each of its weights moved by `share` of the way to that of `later`."""
    mine, theirs = earlier.state_dict(), later.state_dict()
    earlier.load_state_dict({name: (1 - share) * mine[name] + share * theirs[name] for name in mine})
    return earlier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--out", type=Path, default=Path("build/demo_model/checkpoint"))
    parser.add_argument("--between", nargs=3, metavar=("EARLIER", "LATER", "SHARE"))
    args = parser.parse_args()
    if args.between:
        earlier, later, share = args.between
        model = between(load(Path(earlier)), load(Path(later)), float(share))
    else:
        model = DemoModel(Shape())
        model.load_state_dict(torch.load(args.data / "state.pt", map_location="cpu")["model"])
    export(model, args.data, args.out)


if __name__ == "__main__":
    main()
