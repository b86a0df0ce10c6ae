"""Keys: every name that `glimmer predict` understands, ours and MindFormers', and what they ask for together.

A key, from the command line or from a YAML file, is in one of four tables: OPTIONS (our names), TRANSLATED
(MindFormers' names for the same things), IGNORED (what means nothing here) and REFUSED (keys with one possible value).
What is in none of them is an error that names the nearest. The command line is stronger than the YAML file; what
neither says is left to generation_config.json and to the defaults of EngineConfig and SamplingParams. Not here: prompt
files, models.
"""

import difflib
import fnmatch
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError

MAX_TOKENS = 512  # of an answer, where nobody says otherwise

# ---------------------------------------------------------------------- kinds of values: text or YAML in, value out


def text(value: Any) -> str:
    """text"""
    if not isinstance(value, str):
        raise ValueError
    return value


def path(value: Any) -> str:
    """a path"""
    return str(Path(text(value)).expanduser())


def whole(value: Any) -> int:
    """a whole number"""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return int(value)


def number(value: Any) -> float:
    """a number"""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value)


def truth(value: Any) -> bool:
    """True or False"""
    return {"true": True, "false": False}[str(value).lower()]


def flag(value: Any) -> bool:
    """True or False"""
    return truth(value)


def size(value: Any) -> int:
    """a number of bytes, or e.g. 512MB or 59GB"""
    amount, unit = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(?:i?B)?)?", str(value), re.IGNORECASE).groups()
    return int(float(amount) * 1024 ** " KMGT".index((unit or " ").upper()))


def texts(value: Any) -> list[str]:
    """a text or a list of texts"""
    return [text(item) for item in ([value] if isinstance(value, str) else list(value))]


def device_target(value: Any) -> str:
    """Ascend, GPU or CPU"""
    return {"ascend": "npu", "gpu": "cuda", "cpu": "cpu"}[str(value).lower()]


# ---------------------------------------------------------------------- the four tables


class Option(NamedTuple):
    """A name of our own: the kind of its value, how --help writes the value, and what it does."""

    kind: Callable[[Any], Any]
    value: str
    help: str


INPUT = {
    "chat": Option(flag, "", "put each prompt through the checkpoint's chat template; raw otherwise"),
    "system": Option(text, "TEXT", "with --chat: the system message"),
    "no_think": Option(flag, "", "with --chat: ask for an answer without thinking"),
    "config": Option(path, "FILE.yaml", "read keys from this file; the command line is stronger"),
}
OUTPUT = {
    "output": Option(path, "FILE.jsonl", "one JSON object a prompt, added as each one is done"),
    "resume": Option(flag, "", "with --output: keep the rows that are there, answer the rest"),
}
SAMPLING = {
    "max_tokens": Option(whole, "N", f"most tokens of an answer ({MAX_TOKENS})"),
    "min_tokens": Option(whole, "N", "no end before that many tokens (0)"),
    "temperature": Option(number, "X", "0 is greedy"),
    "top_p": Option(number, "X", "keep the likeliest tokens that sum to X"),
    "top_k": Option(whole, "N", "keep the N likeliest tokens; 0 is all"),
    "min_p": Option(number, "X", "drop tokens less likely than X times the likeliest"),
    "repetition_penalty": Option(number, "X", "divide the logits of tokens that were there; 1 is none"),
    "presence_penalty": Option(number, "X", "subtract from the logits of tokens in the answer"),
    "frequency_penalty": Option(number, "X", "the same, once for each occurrence"),
    "stop": Option(texts, "TEXT", "end the answer before this text"),
    "ignore_eos": Option(flag, "", "the model's own end of sequence does not end the answer"),
}
ENGINE = {
    "model": Option(path, "DIR", "a Hugging Face directory of the GLM-4.5 family (the demo model)"),
    "dtype": Option(text, "NAME", "auto, bfloat16 or float32 (auto: as stored)"),
    "quantization": Option(text, "NAME", "int8 or int4: quantise while loading (as stored)"),
    "group_size": Option(whole, "N", "with int4: inputs that share a scale, a multiple of 32 (32)"),
    "threads": Option(whole, "N", "CPU threads of each process (its part of the CPUs it may use)"),
    "device": Option(text, "NAME", "auto, cpu, cuda or npu (auto: the fastest there is)"),
    "seed": Option(whole, "N", "the same seed, the same answers (0)"),
    "tensor_parallel_size": Option(whole, "N", "processes that share the model (as many as were started)"),
    "max_model_len": Option(whole, "N", "most tokens of prompt and answer together (what model and memory allow)"),
    "max_num_seqs": Option(whole, "N", "most prompts computed together (256)"),
    "max_num_batched_tokens": Option(whole, "N", "most tokens computed in one step (2048)"),
    "gpu_memory_utilization": Option(number, "X", "share of the device's free memory to take (0.9)"),
    "max_memory_bytes": Option(size, "SIZE", "the most to take on each device, e.g. 59GB (only that share)"),
    "kv_cache_memory_bytes": Option(size, "SIZE", "memory for the KV cache, e.g. 4GB (what is left)"),
    "kv_cache_dtype": Option(text, "NAME", "auto, or int8: half the memory for each token (auto: the model's dtype)"),
    "enable_prefix_caching": Option(truth, "BOOL", "compute equal beginnings of prompts once (True)"),
}
OPTIONS = INPUT | OUTPUT | SAMPLING | ENGINE


class Translation(NamedTuple):
    """A key of MindFormers: the setting it stands for, the kind of its value, and what is to be known about it."""

    setting: str
    kind: Callable[[Any], Any]
    help: str


GENERATION = {
    "do_sample": Translation("do_sample", truth, "False is --temperature 0"),
    "max_length": Translation("max_length", whole, "most tokens of prompt and answer together"),
    "max_decode_length": Translation("max_length", whole, "the same as max_length"),
    "max_new_tokens": Translation("max_tokens", whole, "--max-tokens; stronger than max_length"),
    "min_new_tokens": Translation("min_tokens", whole, "--min-tokens"),
}
TRANSLATED = {
    "pretrained_model_dir": Translation("model", path, "--model"),
    "load_checkpoint": Translation("weights", path, "empty or the same directory: weights are read from there"),
    "use_parallel": Translation("use_parallel", truth, "False: one process; True: model_parallel says how many"),
    "parallel_config.model_parallel": Translation("tensor_parallel_size", whole, "--tensor-parallel-size"),
    "predict_data": Translation("prompts", texts, "text, several texts, or a .txt file with a prompt a line"),
    "predict_batch_size": Translation("max_num_seqs", whole, "--max-num-seqs; the number of prompts may differ"),
    "device_target": Translation("device", device_target, "--device, as Ascend, GPU or CPU"),
    "context.device_target": Translation("device", device_target, "the same as device_target"),
    "context.max_device_memory": Translation("max_memory_bytes", size, "--max-memory-bytes"),
    "model.model_config.compute_dtype": Translation("dtype", text, "--dtype"),
    **GENERATION,
    **{f"model.model_config.{key}": row._replace(help=f"the same as {key}") for key, row in GENERATION.items()},
    **{
        f"model.model_config.{key}": Translation(key, OPTIONS[key].kind, "--" + key.replace("_", "-"))
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


def kind_of(key: str) -> Callable[[Any], Any] | None:
    """The kind of a key's value; None if the key is in no table."""
    if key in OPTIONS:
        return OPTIONS[key].kind
    if key in TRANSLATED:
        return TRANSLATED[key].kind
    return text if key in REFUSED or is_ignored(key) else None


def is_ignored(key: str) -> bool:
    """Whether a key means nothing here."""
    return key not in TRANSLATED and any(fnmatch.fnmatchcase(key, pattern) for pattern in IGNORED)


def unknown(key: str, source: str) -> ConfigError:
    """The refusal of a key that is in no table, with the nearest one that is."""
    known = [*OPTIONS, *TRANSLATED, *REFUSED]
    tail = key.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == tail] or difflib.get_close_matches(key, known, 1, 0.6)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    return ConfigError(
        f"no key {key!r} ({source})",
        f"a key that glimmer or MindFormers has{nearest}",
        "see --help and docs/mindformers.md",
    )


# ---------------------------------------------------------------------- reading


def read_command_line(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """({key: value}, plain prompts) of `--key value`, `--key=value`, flags alone and everything else.

    predict_data takes all words up to the next `--`. Raises ConfigError: unknown key, value missing.
    """
    given: dict[str, Any] = {}
    prompts: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return given, prompts + words
        if not word.startswith("--"):
            if word.startswith("-") and kind_of(word[1:].partition("=")[0].replace("-", "_")) is not None:
                raise ConfigError(
                    f"{word!r}",
                    f"-{word}, with two dashes",
                    "correct it; a prompt of that kind is written after a lone --",
                )
            prompts.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        key = name if "." in name else name.replace("-", "_")
        kind = kind_of(key)
        if kind is None:
            raise unknown(key, "command line")
        if equals:
            given[key] = value
        elif kind is flag:
            given[key] = True
        elif not words or words[0].startswith("--"):
            raise ConfigError(f"--{name} has no value", kind.__doc__, f"write --{name} VALUE, or --{name}=VALUE")
        elif key == "predict_data":
            given[key] = []
            while words and not words[0].startswith("--"):
                given[key].append(words.pop(0))
        else:
            given[key] = words.pop(0)
    return given, prompts


def read_yaml(file: Path, command: dict[str, Any]) -> dict[str, Any]:
    """The file as {dotted key: value}, with the command line's values merged in and ${...} resolved.

    ConfigError: no such file, or not a YAML of keys.
    """
    try:
        tree = OmegaConf.load(file)
        for key, value in command.items():
            if isinstance(value, str) and "${" not in value:  # what is typed is meant literally
                OmegaConf.update(tree, key, value)
        content = OmegaConf.to_container(tree, resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--config {file}: {reason}",
            "a YAML file such as configs/glm4_moe/predict_glm4_moe.yaml",
            "check the path and the line",
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no keys", "keys with values, a line each", "see configs/glm4_moe")
    return dict(leaves(content))


def leaves(tree: dict[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def locate(name: str, home: Path | None) -> Path:
    """A path as given, or below `home` if it is only there."""
    found = Path(name).expanduser()
    return home / name if home is not None and not found.exists() and (home / name).exists() else found


# ---------------------------------------------------------------------- settling


class Given(NamedTuple):
    """A value and where it comes from. strength: 1 the YAML file, 2 the command line."""

    value: Any
    key: str
    source: str
    strength: int


def resolve(command: dict[str, Any], file: dict[str, Any], source: str) -> tuple[dict[str, Given], list[str]]:
    """One value for each setting, the stronger where there are two; and the keys that mean nothing here.

    Raises ConfigError: unknown key, wrong kind, the other value of a REFUSED key, two keys that contradict each other.
    """
    found: dict[str, Given] = {}
    idle: list[str] = []
    weaker = {key: value for key, value in file.items() if key not in command}
    sections = {key[:i] for key in (*TRANSLATED, *REFUSED, *IGNORED) for i, c in enumerate(key) if c == "."}
    for strength, where, values in ((1, source, weaker), (2, "command line", command)):
        for key, value in values.items():
            empty = value in (None, "", [], {})
            if empty and key in sections:
                continue
            if kind_of(key) is None:
                raise unknown(key, where)
            if is_ignored(key):
                idle.append(key)
            elif key in REFUSED:
                only, todo = REFUSED[key]
                if not empty and str(value) != str(only):
                    raise ConfigError(f"{key}={value!r} ({where})", "no value" if only is None else f"{only!r}", todo)
            elif not empty:
                setting = TRANSLATED[key].setting if key in TRANSLATED else key
                given = Given(_convert(key, value, where), key, where, strength)
                rival = found.get(setting, given)
                if rival.strength == strength and rival.value != given.value:
                    raise ConfigError(
                        f"{rival.key}={rival.value!r} and {key}={given.value!r} ({where})",
                        f"values that agree, since both mean {setting}",
                        "leave one of them out",
                    )
                found[setting] = given
    return found, sorted(idle)


def _convert(key: str, value: Any, where: str) -> Any:
    kind = kind_of(key)
    try:
        return kind(value)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{key}={value!r} ({where})", kind.__doc__, f"correct {key}") from None


@dataclass(frozen=True)
class Plan:
    """What the keys ask for together.

    engine, sampling   fields of EngineConfig and SamplingParams that somebody has set
    do_sample          None: nobody has said; True: not greedy, even if generation_config.json is
    data, prompts      texts in which \\n is a new line, and texts as they are; either may name .txt files
    ignored            keys that mean nothing here
    """

    engine: dict[str, Any]
    sampling: dict[str, Any]
    do_sample: bool | None
    data: list[str]
    prompts: list[str]
    chat: bool
    system: str | None
    think: bool
    output: Path | None
    resume: bool
    ignored: list[str]


def plan(argv: list[str], running: int, default_model: Callable[[], Path], home: Path | None = None) -> Plan:
    """What a command line, and the YAML file that it may name, ask for in a group of `running` processes.

    home: where relative paths are looked for if they are not in the current directory. Raises ConfigError or
    RequestError for everything that can be refused before a model is opened.
    """
    command, prompts = read_command_line(argv)
    file = locate(command.pop("config"), home) if "config" in command else None
    settings, ignored = resolve(command, read_yaml(file, command) if file else {}, str(file))

    def take(name: str, default: Any = None) -> Any:
        return settings[name].value if name in settings else default

    engine = {name: take(name) for name in ENGINE if name in settings}
    engine["model"] = one_directory(settings) or str(default_model())
    engine["tensor_parallel_size"] = processes(settings, running, argv, home)
    sampling = {"max_tokens": MAX_TOKENS} | {name: take(name) for name in SAMPLING if name in settings}
    do_sample, heat = settings.get("do_sample"), settings.get("temperature")
    if do_sample is not None and not do_sample.value and (heat is None or heat.strength <= do_sample.strength):
        sampling["temperature"] = 0.0
    length, tokens = settings.get("max_length"), settings.get("max_tokens")
    if length is not None and (tokens is None or tokens.strength < length.strength):
        engine["max_model_len"] = min(length.value, engine.get("max_model_len", length.value))
        sampling["max_tokens"] = None
    EngineConfig(**engine)
    SamplingParams(**sampling)
    for name, needed in (("system", "chat"), ("no_think", "chat"), ("resume", "output")):
        if take(name) and not take(needed):
            raise ConfigError(f"--{name.replace('_', '-')} without --{needed}", "both or none", f"add --{needed}")
    return Plan(
        engine=engine,
        sampling=sampling,
        do_sample=take("do_sample"),
        data=take("prompts", []),
        prompts=prompts,
        chat=take("chat", False),
        system=take("system"),
        think=not take("no_think", False),
        output=Path(take("output")) if take("output") else None,
        resume=take("resume", False),
        ignored=ignored,
    )


def one_directory(settings: dict[str, Given]) -> str | None:
    """The model's directory, if one is named: configuration, tokenizer and weights are in one place."""
    weights = settings.get("weights")
    model = settings.get("model", weights)
    if weights is not None and os.path.realpath(weights.value) != os.path.realpath(model.value):
        raise ConfigError(
            f"{weights.key}={weights.value!r} ({weights.source}) beside {model.key}={model.value!r}",
            "weights, configuration and tokenizer in one Hugging Face directory",
            "set load_checkpoint to ''",
        )
    return None if model is None else model.value


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
