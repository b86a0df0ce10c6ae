"""The keys of MindSpore Transformers (MindFormers), and what becomes of them.

A key is in one of three tables: TRANSLATED (other names for settings that exist here), IGNORED (what means nothing
here) and REFUSED (keys with one possible value). `glimmer predict` takes them all, on the command line and in YAML
files, beside its own options; run_mindformer.py is its name for those who come from there. What several keys mean
together (which directory, how many processes, how long an answer) is worked out at the end of this file.
Not here: how a command line or a YAML file is read (cli/options.py).
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from glimmer.cli.options import SAMPLING, Foreign, Given, Translation, path, prompts, size, text, truth, whole
from glimmer.errors import ConfigError


def device_target(value: Any) -> str:
    """Ascend, GPU or CPU"""
    return {"ascend": "npu", "gpu": "cuda", "cpu": "cpu"}[str(value).lower()]


GENERATION = {
    "do_sample": Translation("do_sample", truth, "False is --temperature 0"),
    "max_length": Translation("max_length", whole, "most tokens of prompt and answer together"),
    "max_decode_length": Translation("max_length", whole, "the same as max_length"),
    "max_new_tokens": Translation("max_tokens", whole, "--max-tokens; stronger than max_length"),
    "min_new_tokens": Translation("min_tokens", whole, "--min-tokens"),
}
TRANSLATED = {
    "pretrained_model_dir": Translation("model", path, "--model"),
    "load_checkpoint": Translation(
        "weights", path, "empty or the same directory: weights are read from there", may_be_empty=True
    ),
    "use_parallel": Translation("use_parallel", truth, "False: one process; True: model_parallel says how many"),
    "parallel_config.model_parallel": Translation("tensor_parallel_size", whole, "--tensor-parallel-size"),
    "predict_data": Translation(
        "prompts", prompts, "text, several texts, or a .txt file with a prompt a line", several=True
    ),
    "predict_batch_size": Translation("max_num_seqs", whole, "--max-num-seqs; the number of prompts may differ"),
    "device_target": Translation("device", device_target, "--device, as Ascend, GPU or CPU"),
    "context.device_target": Translation("device", device_target, "the same as device_target"),
    "context.max_device_memory": Translation("max_memory_bytes", size, "--max-memory-bytes"),
    "model.model_config.compute_dtype": Translation("dtype", text, "--dtype"),
    **GENERATION,
    **{f"model.model_config.{key}": row._replace(help=f"the same as {key}") for key, row in GENERATION.items()},
    **{
        f"model.model_config.{key}": Translation(key, SAMPLING[key].kind, "--" + key.replace("_", "-"))
        for key in ("temperature", "top_k", "top_p", "repetition_penalty")
    },
}

IGNORED = (
    "output_dir",
    "use_legacy",
    "mode",
    "device_id",
    "trainer.*",
    "context.*",
    "parallel.*",
    "recompute_config*",
    "parallel_config.vocab_emb_dp",
    "parallel_config.use_seq_parallel",
    "parallel_config.micro_batch_num",
    "parallel_config.gradient_aggregation_group",
    "micro_batch_interleave_num",
    "moe_config*",
    "swap_config*",
    "model.arch*",
    "model.model_config.*_dtype",
    "model.model_config.type",
    "model.model_config.batch_size",
    "model.model_config.seq_length",
    "model.model_config.use_past",
    "model.model_config.is_dynamic",
    "model.model_config.use_flash_attention",
    "model.model_config.block_size",
    "model.model_config.num_blocks",
    "processor.*",
    "infer.*",
    "auto_trans_ckpt",
    "transform_process_num",
    "src_strategy_path_or_dir",
    "only_save_strategy",
    "strategy_load_checkpoint",
    "resume_training",
    "remote_save_url",
    "do_eval",
    "eval_*",
    "train_*",
    "runner_config.*",
    "runner_wrapper.*",
    "optimizer.*",
    "lr_schedule.*",
    "metric*",
    "callbacks*",
    "profile*",
    "monitor_config.*",
    "auto_tune",
    "autotune_per_step",
    "filepath_prefix",
)

REFUSED = {  # key: (the only value, what to do)
    "run_mode": ("predict", "set run_mode predict; glimmer runs models and does not train them"),
    "load_ckpt_format": ("safetensors", "point pretrained_model_dir at the Hugging Face directory"),
    "parallel_config.data_parallel": (1, "set it to 1; for more prompts at once raise predict_batch_size"),
    "parallel_config.expert_parallel": (1, "set it to 1; model_parallel cuts the experts too"),
    "parallel_config.pipeline_stage": (1, "set it to 1; model_parallel may span machines"),
    "parallel_config.context_parallel": (1, "set it to 1; long prompts are computed in chunks"),
    "modal_type": (None, "leave it out; the family reads text only"),
    "adapter_id": (None, "leave it out; merge the adapter into the checkpoint"),
    "register_path": (None, "leave it out; glimmer runs no code that it is pointed at"),
}

KEYS = Foreign(TRANSLATED, IGNORED, REFUSED, "docs/mindformers.md")

# ---------------------------------------------------------------------- what the keys mean together


def one_directory(settings: dict[str, Given]) -> str | None:
    """The model's directory, if one is named: configuration, tokenizer and weights are in one place."""
    weights = settings.get("weights")
    model = settings.get("model") or weights
    if weights is not None and model is not None and os.path.realpath(weights.value) != os.path.realpath(model.value):
        raise ConfigError(
            f"{weights.key}={weights.value!r} ({weights.source}) beside {model.key}={model.value!r}",
            "weights, configuration and tokenizer in one Hugging Face directory",
            "set load_checkpoint to ''",
        )
    return None if model is None else str(model.value)


def processes(settings: dict[str, Given], running: int, argv: list[str], home: Path | None) -> int:
    """How many processes shall share the model: as many as run, or ConfigError with the command that starts them."""
    use, wanted = settings.get("use_parallel"), settings.get("tensor_parallel_size")
    if use is not None and not use.value and (wanted is None or use.strength > wanted.strength):
        n, said = 1, use
    elif wanted is not None:
        n, said = wanted.value, wanted
    elif use is not None and use.value and running == 1:
        n, said = 2, use  # two at least
    else:
        return running
    if n == running:
        return n
    if home is None:
        start = f"torchrun --nproc-per-node {n} -m glimmer predict {shlex.join(argv)}"
    else:
        quoted = re.sub(r'([\\"$`])', r"\\\1", f"run_mindformer.py {shlex.join(argv)}")
        start = f'bash scripts/msrun_launcher.sh "{quoted}" {n}'
    instead = "--use_parallel False" if running == 1 else f"--parallel_config.model_parallel {running}"
    runs = "1 process runs" if running == 1 else f"{running} processes run"
    raise ConfigError(
        f"{said.key}={said.value} ({said.source}), but {runs}",
        "one process for each part of the model",
        f"start {n} with\n      {start}\n    or add {instead}" if n > 1 else "start one process, without a launcher",
    )


def greedy(settings: dict[str, Given]) -> bool:
    """Whether `do_sample: False` decides: it is as strong as any temperature that is given."""
    do_sample, temperature = settings.get("do_sample"), settings.get("temperature")
    if do_sample is None or do_sample.value:
        return False
    return temperature is None or temperature.strength <= do_sample.strength


def speaks(settings: dict[str, Given]) -> bool:
    """Whether a key that only MindSpore Transformers has was given: such a command answers as that would."""
    return any(one.key in TRANSLATED and one.key not in GENERATION for one in settings.values())


def max_length(settings: dict[str, Given]) -> int | None:
    """Tokens of prompt and answer together, where that decides how long an answer may be; else None."""
    length, tokens = settings.get("max_length"), settings.get("max_tokens")
    if length is None or (tokens is not None and tokens.strength >= length.strength):
        return None
    whole_length: int = length.value
    return whole_length
