"""Write a bfloat16 checkpoint once more in the official FP8 format, to time glimmer on FP8 as stored.

usage: make_fp8.py DIRECTORY OUT

The matrices of attention and of all experts become float8_e4m3fn with a scale for each row (compressed-tensors,
float-quantized); embedding, head, router and vectors stay. An MTP layer's own matrices are treated alike.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn|mlp(\.shared_experts|\.experts\.\d+)?)\.\w+_proj\.weight")
LARGEST = 448.0  # of float8_e4m3fn


def encode(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) and scales (out, 1) of a matrix."""
    scale = (values.float().abs().amax(1, keepdim=True) / LARGEST).bfloat16()
    return (values.float() / scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


source, out = map(Path, sys.argv[1:3])
out.mkdir(parents=True)
index, ignored, total = {}, [], 0
for file in sorted(source.glob("*.safetensors")):
    stored = {}
    for name, values in load_file(file).items():
        if MATRIX.fullmatch(name):
            stored[name], stored[f"{name}_scale"] = encode(values)
        else:
            stored[name] = values
            if values.ndim == 2:
                ignored.append(name.removesuffix(".weight"))
    save_file(stored, out / file.name, metadata={"format": "pt"})
    index |= dict.fromkeys(stored, file.name)
    total += sum(tensor.nbytes for tensor in stored.values())
config = json.loads((source / "config.json").read_text())
scheme = {"num_bits": 8, "type": "float", "symmetric": True}
config["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": scheme | {"strategy": "channel", "dynamic": False},
            "input_activations": scheme | {"strategy": "token", "dynamic": True},
        }
    },
    "ignore": ignored,
}
(out / "config.json").write_text(json.dumps(config, indent=2))
whole = {"metadata": {"total_size": total}, "weight_map": index}
(out / "model.safetensors.index.json").write_text(json.dumps(whole, indent=1))
for file in source.glob("*token*"):
    shutil.copy(file, out)
