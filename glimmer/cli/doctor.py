"""`glimmer doctor`: what this machine has, which libraries, and which operations will serve on each device.

With a model directory also what its files say: its shape, its format, its context and the tokens that end an answer.
"""

import importlib.metadata
import platform
from typing import TYPE_CHECKING

from glimmer import __version__
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, Command, pick
from glimmer.config import EngineConfig, generation_defaults
from glimmer.hub import model_directory
from glimmer.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from glimmer import device as devices
    from glimmer import llm
    from glimmer.backends import base, selection
    from glimmer.text import tokenizer
else:
    llm, tokenizer = lazy("glimmer.llm"), lazy("glimmer.text.tokenizer")
    torch, devices = lazy("torch"), lazy("glimmer.device")
    base, selection = lazy("glimmer.backends.base"), lazy("glimmer.backends.selection")

HEAD_DIM = 128  # of every published model of the family
LIBRARIES = ("torch", "tokenizers", "safetensors", "jinja2", "omegaconf", "torch-npu")

COMMAND = Command(
    "doctor",
    "What this machine has, which libraries, and which operations will serve on a device.",
    "[DIR] [options]",
    {"engine": pick(ENGINE, "model", "device", "backend", "threads", "block_size")},
    positional=("model",),
)


def main(argv: list[str]) -> int:
    """Print the findings; 0 always, for a finding is not a failure."""
    if COMMAND.asks_for_help(argv):
        return 0
    asked = COMMAND.read(argv)
    device = devices.resolve(asked.take("device", "auto"), 0)
    given = asked.fields(pick(ENGINE, "threads", "block_size"))
    config = asked.check(EngineConfig, given | {"model": ""})  # of the settings; the model is looked at below
    kind, threads = device.type, devices.share_cores(1, config.threads)
    cache = base.KVCacheSpec(1, config.block_size, 1, HEAD_DIM, torch.bfloat16)
    ops = selection.choose(device, threads, cache, asked.take("backend", "auto"))
    rows = [
        ("glimmer", f"{__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        *devices.describe(),
        *((name, _version(name)) for name in LIBRARIES),
        ("device", f"{kind} (of {', '.join(devices.available())}), collectives by {devices.COLLECTIVES[kind]}"),
        ("threads", f"{threads} unless --threads says otherwise"),
        ("kernels", ops.kernels or "none of our own"),
        *((f"op {op}", backend) for op, backend in ops.table()),
        *(_model(asked.take("model")) if "model" in asked.given else ()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, finding in rows:
        print(f"{name:<{width}}  {finding}")
    return 0


def _model(name: str) -> list[tuple[str, str]]:
    """What the small files of a model say. Raises CheckpointError and ConfigError for what cannot be served."""
    directory = model_directory(name)
    config = ModelConfig.load(directory)
    defaults, generation = generation_defaults(directory)
    tokens = tokenizer.Tokenizer.load(directory)
    method = (config.quantization_config or {}).get("quant_method", "none")
    ends = llm.end_of_sequence(config, generation, tokens)
    layers, experts = config.num_hidden_layers, config.n_routed_experts
    return [
        ("model", str(directory)),
        ("shape", f"{layers} layers, {experts} experts, {config.num_experts_per_tok} a token, {config.dtype}"),
        ("quantization", str(method)),
        ("context", f"{config.context} tokens" + (f", YaRN x {config.yarn.factor:g}" if config.yarn else "")),
        ("eos", ", ".join(f"{id} {tokens.id_to_token(id)}" for id in ends) or "none: answers end at max_tokens"),
        ("sampling", ", ".join(f"{key} {value}" for key, value in defaults.items()) or "as requests say"),
    ]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
