"""The settings: of a model (ModelConfig), of the engine (EngineConfig), of one request (SamplingParams).

ModelConfig comes from a checkpoint's config.json; EngineConfig and SamplingParams come from the caller. All three are
frozen and complete: a value that glimmer cannot serve is refused here, by the name of its key, and no other file reads
the JSON files again. Not here: torch, files other than config.json and generation_config.json, whether memory suffices.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from glimmer import vllm_names
from glimmer.errors import CheckpointError, ConfigError, RequestError, shown
from glimmer.foreign import MAX_NUMBER, quote, read_json, read_optional_json

ARCHITECTURE = "Glm4MoeForCausalLM"
MAX_WHOLE = 2**31 - 1  # of a number that counts something
MAX_BYTES = 2**62  # of memory
FAMILY = "GLM-4.5, GLM-4.5-Air, GLM-4.6 or GLM-4.7 (model_type glm4_moe)"
RELATIVES = {  # other architectures whose names are close enough to be taken for the family, by model_type
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v_moe": "GLM-4.5V or GLM-4.6V",
    "glm4v": "GLM-4.1V",
    "glm4": "GLM-4-0414",
    "chatglm": "ChatGLM or GLM-4-9B",
    "glm_moe_dsa": "GLM-5",
}
MAX_LAYERS = 10_000  # the largest member of the family has 92
MAX_EXPERTS = 100_000  # of one layer; the family has 128 or 160
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
YARN_KEYS = {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
}


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN: slow rotations are interpolated for a context `factor` times as long, fast ones stay as they are.

    beta_fast, beta_slow: rotations within the original context above which a dimension stays, below which it is
    interpolated; truncate: whether the dimensions between them are rounded to whole ones. attention_factor multiplies
    cosines and sines.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, under the names of config.json's keys. `from_dict` has checked every value."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    first_k_dense_replace: int
    use_qk_norm: bool
    attention_bias: bool
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    num_nextn_predict_layers: int
    eos_token_id: tuple[int, ...]
    dtype: str
    quantization_config: Mapping[str, Any] | None = None
    yarn: Yarn | None = None

    @property
    def context(self) -> int:
        """The longest sequence, in tokens: max_position_embeddings, or what YaRN extends the original context to."""
        if self.yarn is None:
            return self.max_position_embeddings
        extended = int(self.yarn.original_max_position_embeddings * self.yarn.factor)
        return max(self.max_position_embeddings, extended)

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def key_value_heads(self, processes: int) -> int:
        """Key-value heads of each of so many processes; with more processes than heads, several hold the same head."""
        return max(1, self.num_key_value_heads // processes)

    @staticmethod
    def load(directory: str | Path) -> "ModelConfig":
        """Read `directory`/config.json. CheckpointError: it is missing or not JSON; ConfigError: a value is refused."""
        directory = Path(directory)
        if not directory.is_dir():
            kind = "is a file in GGUF, llama.cpp's format" if directory.suffix == ".gguf" else "is a file"
            raise CheckpointError(
                f"model directory {str(directory)!r} {kind if directory.exists() else 'does not exist'}",
                "a Hugging Face model directory (config.json, tokenizer.json, *.safetensors)",
                "check the path; glimmer downloads nothing by itself",
            )
        return ModelConfig.from_dict(read_json(directory / "config.json", "the model's configuration"))

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "ModelConfig":
        """Check the content of a config.json. ConfigError names the key, its value and what is accepted."""
        architectures, model_type = raw.get("architectures"), raw.get("model_type")
        if model_type != "glm4_moe" or (architectures is not None and architectures != [ARCHITECTURE]):
            relative = RELATIVES.get(model_type) if isinstance(model_type, str) else None
            raise ConfigError(
                f"config.json describes architectures={quote(architectures)}, model_type={quote(model_type)}"
                + (f": this is {relative}" if relative else ""),
                f"{ARCHITECTURE}: {FAMILY}",
                "point at a checkpoint of that family; glimmer runs no other",
            )
        read = _Reader(raw)
        for key, only in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("mlp_bias", False)):
            read.only(key, only)
        theta, partial, yarn = read.rope()
        config = ModelConfig(
            hidden_size=read.count("hidden_size"),
            num_hidden_layers=read.count("num_hidden_layers", most=MAX_LAYERS),
            num_attention_heads=read.count("num_attention_heads"),
            num_key_value_heads=read.count("num_key_value_heads"),
            head_dim=read.count("head_dim"),
            intermediate_size=read.count("intermediate_size"),
            moe_intermediate_size=read.count("moe_intermediate_size"),
            n_routed_experts=read.count("n_routed_experts", alias="num_local_experts", most=MAX_EXPERTS),
            n_shared_experts=read.count("n_shared_experts"),
            num_experts_per_tok=read.count("num_experts_per_tok"),
            routed_scaling_factor=read.number("routed_scaling_factor"),
            n_group=read.count("n_group", default=1),
            topk_group=read.count("topk_group", default=1),
            norm_topk_prob=read.flag("norm_topk_prob"),
            first_k_dense_replace=read.count("first_k_dense_replace", least=0),
            use_qk_norm=read.flag("use_qk_norm", default=False),
            attention_bias=read.flag("attention_bias", default=False),
            vocab_size=read.count("vocab_size"),
            rms_norm_eps=read.number("rms_norm_eps"),
            rope_theta=theta,
            partial_rotary_factor=partial,
            max_position_embeddings=read.count("max_position_embeddings"),
            num_nextn_predict_layers=read.count("num_nextn_predict_layers", alias="num_mtp_layers", default=0, least=0),
            eos_token_id=_token_ids(raw.get("eos_token_id"), "config.json eos_token_id"),
            dtype=read.dtype(),
            quantization_config=read.quantization(),
            yarn=yarn,
        )
        config._check()
        return config

    def _check(self) -> None:
        """ConfigError for combinations of values that no forward pass could compute."""
        for broken, found, expected in (
            (
                self.num_attention_heads % self.num_key_value_heads,
                f"num_attention_heads={self.num_attention_heads} over num_key_value_heads={self.num_key_value_heads}",
                "a whole number of query heads for each key-value head",
            ),
            (
                not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2 or self.rotary_dim == 0,
                f"partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim}",
                "a factor in (0, 1] that rotates an even number of dimensions",
            ),
            (
                self.n_routed_experts % self.n_group or self.topk_group > self.n_group,
                f"n_routed_experts={self.n_routed_experts}, n_group={self.n_group}, topk_group={self.topk_group}",
                "experts that divide into n_group groups, and topk_group at most n_group",
            ),
            (
                self.n_group > 1 and self.n_routed_experts // self.n_group < 2,
                f"{self.n_group} groups of {self.n_routed_experts // self.n_group} experts",
                "groups of at least two experts (a group's score is the sum of its best two)",
            ),
            (
                self.num_experts_per_tok > self.topk_group * (self.n_routed_experts // self.n_group),
                f"num_experts_per_tok={self.num_experts_per_tok}",
                f"at most the {self.topk_group * (self.n_routed_experts // self.n_group)} experts that can be chosen",
            ),
            (
                self.first_k_dense_replace > self.num_hidden_layers,
                f"first_k_dense_replace={self.first_k_dense_replace}",
                f"at most num_hidden_layers={self.num_hidden_layers}",
            ),
            (
                self.num_nextn_predict_layers > 1,
                f"num_nextn_predict_layers={self.num_nextn_predict_layers}",
                "0 or 1: the family has at most one MTP layer",
            ),
            (
                self.rms_norm_eps <= 0 or self.rope_theta <= 1,
                f"rms_norm_eps={self.rms_norm_eps}, rope_theta={self.rope_theta}",
                "a positive rms_norm_eps and a rope_theta above 1",
            ),
        ):
            if broken:
                raise ConfigError(f"config.json: {found}", expected, "restore the checkpoint's own config.json")


class _Reader:
    """Typed look-ups in a config.json; each refusal names the key."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    def _get(self, key: str, alias: str | None, default: Any, accepted: str) -> Any:
        for name in (key, alias):
            if name is not None and self.raw.get(name) is not None:
                return self.raw[name]
        if default is None:
            raise ConfigError(
                f"config.json has no {key!r}", accepted, "restore the checkpoint's own config.json: no value is guessed"
            )
        return default

    def _refuse(self, key: str, value: Any, accepted: str) -> ConfigError:
        return ConfigError(f"config.json: {key}={quote(value)}", accepted, "restore the checkpoint's own config.json")

    def count(
        self, key: str, alias: str | None = None, default: int | None = None, least: int = 1, most: int = MAX_NUMBER
    ) -> int:
        accepted = f"a whole number of at least {least} and at most {most}"
        value = self._get(key, alias, default, accepted)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._refuse(key, value, accepted)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, None, default, "a number")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._refuse(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, None, default, "true or false")
        if not isinstance(value, bool):
            raise self._refuse(key, value, "true or false")
        return value

    def only(self, key: str, accepted: Any) -> None:
        """ConfigError if a key is present with another value than `accepted`, the only one that glimmer computes."""
        if self.raw.get(key) not in (None, accepted):
            raise self._refuse(key, self.raw[key], f"{accepted!r}, as in every member of the family")

    def rope(self) -> tuple[float, float, Yarn | None]:
        """rope_theta, partial_rotary_factor and YaRN: from the top level or `rope_scaling` (transformers 4), or from
        `rope_parameters` (transformers 5); of all these places the nested ones are the stronger.

        ConfigError where the two nested ones disagree, or ask for what is not served.
        """
        nested: dict[str, Any] = {}
        for name in ("rope_parameters", "rope_scaling"):
            value = self.raw.get(name)
            if value is not None and not isinstance(value, Mapping):
                raise self._refuse(name, value, "an object or null")
            for key, setting in (value or {}).items():
                key = "rope_type" if key == "type" else key
                said = nested.get(key)
                if setting is None or ((key, setting) == ("rope_type", "default") and said is not None):
                    continue
                if said not in (None, setting) and (key, said) != ("rope_type", "default"):
                    found = f"{key} twice: {quote(said)} and {quote(setting)}"
                    raise self._refuse(name, found, "one value in rope_parameters and rope_scaling together")
                nested[key] = setting
        kind = nested.get("rope_type", "default")
        if kind not in ("default", "yarn"):
            raise self._refuse("rope_type", kind, "'default' or 'yarn'")
        superfluous = sorted(nested.keys() - ROPE_KEYS - (YARN_KEYS if kind == "yarn" else set()))
        if superfluous:
            key = "factor" if "factor" in superfluous else superfluous[0]
            said = "" if "rope_type" in nested else " without a rope_type"
            accepted = (
                f"no {key}{said}: 'yarn' is the only scaling that is served" if key in YARN_KEYS else "no such key"
            )
            raise self._refuse(f"{key}{said}", nested[key], accepted)
        read = _Reader({**self.raw, **nested})
        theta, partial = read.number("rope_theta"), read.number("partial_rotary_factor", default=0.5)
        return theta, partial, self._yarn(_Reader(nested)) if kind == "yarn" else None

    def _yarn(self, read: "_Reader") -> Yarn:
        """YaRN's settings, with transformers' defaults; `read` has the nested keys."""
        most, original = self.count("max_position_embeddings"), "original_max_position_embeddings"
        length = (self if self.raw.get(original) is not None else read).count(original, default=most)
        factor = read.number("factor", default=most / length if length != most else None)
        beta_fast, beta_slow = (
            read.number("beta_fast", default=32.0) or 32.0,
            read.number("beta_slow", default=1.0) or 1.0,
        )
        mscale, all_dim = read.number("mscale", default=0.0), read.number("mscale_all_dim", default=0.0)
        for key, value, fine, accepted in (
            ("factor", factor, 1 <= factor <= MAX_NUMBER, "a number of at least 1"),
            ("beta_slow", beta_slow, 0 < beta_slow <= beta_fast, f"a positive number, at most beta_fast={beta_fast}"),
            ("mscale", mscale, mscale >= 0, "a number that is not negative"),
            ("mscale_all_dim", all_dim, all_dim >= 0, "a number that is not negative"),
        ):
            if not fine:
                raise self._refuse(key, value, accepted)
        attention = 0.1 * math.log(factor) + 1
        if mscale and all_dim:
            attention = (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
        attention = read.number("attention_factor", default=attention)
        if attention <= 0:
            raise self._refuse("attention_factor", attention, "a positive number")
        return Yarn(
            factor=factor,
            original_max_position_embeddings=length,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            attention_factor=attention,
            truncate=read.flag("truncate", default=True),
        )

    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config` as it is; ConfigError for MLX's, which has another form and another layout."""
        value = self.raw.get("quantization_config")
        mlx = self.raw.get("quantization") or value
        if isinstance(mlx, Mapping) and "quant_method" not in mlx and {"group_size", "bits"} <= mlx.keys():
            raise ConfigError(
                f"config.json: quantization={quote(mlx)}: these weights are in MLX's format",
                "weights in a format that is read: bf16, FP8, int8 or int4 as in README",
                "use the checkpoint of the model's publisher, such as zai-org/GLM-4.5-Air-FP8",
            )
        if value is not None and not isinstance(value, Mapping):
            raise self._refuse("quantization_config", value, "an object or null")
        return value

    def dtype(self) -> str:
        value = self._get("dtype", "torch_dtype", "bfloat16", "the name of a type")
        if value not in ("bfloat16", "float16", "float32"):
            raise self._refuse("dtype", value, "'bfloat16', 'float16' or 'float32'")
        return str(value)


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Token ids from a JSON value: one id, a list of ids, or null."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MAX_NUMBER for i in ids):
        raise ConfigError(
            f"{where}={quote(value)}", "a token id or a list of token ids", "restore the checkpoint's file"
        )
    return tuple(ids)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to run a model, under vLLM's names. Every default is written here and in no other file.

    backend                     the code that computes: "cpu" (our kernels), "reference" (plain torch, the definition);
                                "auto": what GLIMMER_BACKEND names, else the fastest that serves the device
    max_model_len               tokens of prompt and answer together; None: as many as the model and the cache allow
    block_size                  tokens in one block of the KV cache
    max_num_seqs                requests computed in one step, at most
    max_num_batched_tokens      tokens computed in one step, at most; longer prompts are cut into chunks
    gpu_memory_utilization      the share of the device's free memory (a CPU's too) that weights and cache may take
    max_memory_bytes            the most that weights, a step and cache of each process may take; None: only that share
    kv_cache_memory_bytes       memory for the KV cache of each rank; None: what is left, on a CPU at most 4 GiB
    kv_cache_dtype              "int8": keys and values as codes in half the memory; "auto": in the model's dtype
    enable_prefix_caching       reuse the KV blocks of equal prompt beginnings
    skip_tokenizer_init         need no tokenizer.json: prompts are token ids, answers have no text
    threads                     CPU threads of each process; None: its share of the CPUs that it may use
    quantization                "int8" or "int4": quantise matrices while loading; None: as they are stored
    group_size                  with int4: columns that share a scale, a multiple of 32; None: 32
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    seed: int = 0
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    gpu_memory_utilization: float = 0.9
    max_memory_bytes: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    skip_tokenizer_init: bool = False
    threads: int | None = None
    quantization: str | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        for key in ("model", "dtype", "device", "backend", "kv_cache_dtype"):
            if not isinstance(getattr(self, key), str):
                raise ConfigError(f"{key}={shown(getattr(self, key))}", "a text", f"pass a text as {key}")
        check_quantization(self.quantization, self.group_size)
        for key in ("tensor_parallel_size", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            _check_count(key, getattr(self, key), ConfigError)
        for key in ("max_model_len", "max_memory_bytes", "kv_cache_memory_bytes", "threads"):
            if getattr(self, key) is not None:
                _check_count(key, getattr(self, key), ConfigError)
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ConfigError(
                f"dtype={shown(self.dtype)}",
                "'auto', 'bfloat16' or 'float32'",
                "choose one of these; float16 overflows in this family's residual stream",
            )
        if self.kv_cache_dtype not in ("auto", "int8"):
            raise ConfigError(f"kv_cache_dtype={shown(self.kv_cache_dtype)}", "'auto' or 'int8'", "choose one of these")
        if not ENGINE_SEED.holds(self.seed):
            raise ConfigError(f"seed={shown(self.seed)}", str(ENGINE_SEED), "pass another")
        for key in ("enable_prefix_caching", "skip_tokenizer_init"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key}={shown(getattr(self, key))}", "True or False", "pass one of these")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={shown(self.gpu_memory_utilization)}", "a share in (0, 1]", "try 0.9"
            )


def check_quantization(quantization: str | None, group_size: int | None) -> None:
    """ConfigError unless glimmer has this quantisation, with this group size."""
    if quantization not in (None, "int8", "int4"):
        raise ConfigError(f"quantization={shown(quantization)}", "'int8', 'int4' or None", "choose one of these")
    fits = type(group_size) is int and group_size > 0 and group_size % 32 == 0 and quantization == "int4"
    if group_size is not None and not fits:
        raise ConfigError(
            f"group_size={shown(group_size)} with quantization={shown(quantization)}",
            "a multiple of 32, with int4 only",
            "leave group_size out, or try 32 or 128",
        )


def _check_count(key: str, value: Any, error: type[ConfigError]) -> None:
    most = MAX_BYTES if key.endswith("_bytes") else MAX_WHOLE
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise error(f"{key}={shown(value)}", f"a whole number from 1 to {most}", f"pass another {key}")


MAX_SEED = 2**128  # in magnitude
MAX_ANSWERS = 4096  # the largest n of one request
MAX_STOP = 1 << 14  # characters of all stop strings together; bad words likewise
MAX_IDS = 1 << 20  # token ids in one list
MAX_STOP_IDS = 4096


@dataclass(frozen=True)
class Number:
    """The numbers that a parameter may be: from `low` to `high`, whole ones only if `whole`; None too if `optional`.

    also: a number outside of these limits that is accepted; meaning: what the special ones stand for.
    """

    low: float
    high: float
    whole: bool = False
    optional: bool = False
    also: float | None = None
    meaning: str = ""

    def holds(self, value: Any) -> bool:
        """Whether the value is such a number. Python compares numbers of any size exactly, and NaN with none."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return self.low <= value <= self.high or value == self.also

    def __str__(self) -> str:
        """For error messages."""
        kind = "a whole number" if self.whole else "a number"
        other = ("" if self.also is None else f", or {self.also:g}") + (", or None" if self.optional else "")
        return f"{kind} from {_plain(self.low)} to {_plain(self.high)}{other}{self.meaning}"


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) and abs(value) <= MAX_WHOLE else f"{value:g}"


MODERATE = (1e-12, 1e15)
COUNT = Number(1, MAX_WHOLE, whole=True, optional=True)
LOGPROBS = Number(0, MAX_WHOLE, whole=True, optional=True, also=-1, meaning=" (-1: the whole vocabulary)")
ENGINE_SEED = Number(-(2**64), 2**64, whole=True)
TOKEN_ID = Number(0, MAX_WHOLE, whole=True)
BIAS = Number(-1e15, 1e15)

NUMBERS = {
    "n": Number(1, MAX_ANSWERS, whole=True),
    "temperature": Number(*MODERATE, also=0, meaning=" (greedy)"),
    "top_p": Number(1e-12, 1),
    "top_k": Number(-1, MAX_WHOLE, whole=True, meaning=" (0 or -1: no limit)"),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(*MODERATE, meaning=" (1 is none)"),
    "presence_penalty": Number(-2, 2),
    "frequency_penalty": Number(-2, 2),
    "seed": Number(-MAX_SEED, MAX_SEED, whole=True, optional=True),
    "min_tokens": Number(0, MAX_WHOLE, whole=True),
    "max_tokens": COUNT,
    "logprobs": LOGPROBS,
    "prompt_logprobs": LOGPROBS,
    "truncate_prompt_tokens": Number(1, MAX_WHOLE, True, True, also=-1, meaning=" (-1: to the context)"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the answer to one request is sampled, and when it ends. Names, meanings and defaults are vLLM's.

    n                            answers to the same prompt, each with its own randomness
    temperature                  0 is greedy; above, logits are divided by it
    top_k, top_p, min_p          keep the k likeliest (0 or -1: all) · the likeliest that sum to p · those at least
                                 min_p times as likely as the likeliest; applied in this order after the temperature
    repetition_penalty           divides positive and multiplies negative logits of tokens in prompt or answer
    presence_, frequency_penalty subtracted once · once per occurrence, for tokens in the answer
    logit_bias                   {token id: added to its logit}, before the penalties
    allowed_token_ids, bad_words the only tokens that may come · texts that must not come in the answer
    seed                         makes the answer a function of (prompt, params, seed), whatever runs beside it
    stop, stop_token_ids         strings and ids that end the answer; ids count as part of it, strings do not
    min_tokens                   neither end-of-sequence nor stop ids nor stop strings before that many tokens
    max_tokens                   None: up to the context's end
    ignore_eos                   the model's own end-of-sequence ids do not end the answer
    logprobs, prompt_logprobs    log-probabilities of that many likeliest tokens (-1: all) and of the one chosen
    truncate_prompt_tokens       keep the last so many tokens of the prompt; -1: as many as the context holds
    detokenize                   False: token ids only, no text
    spaces_between_special_tokens  without effect, as for every byte-level vocabulary: nothing is put between tokens

    Parameters of vLLM that glimmer has not are accepted where they change nothing, and refused by name otherwise.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for field, kinds, accepted in (
            ("stop", (str, list, tuple), "a non-empty string or a list of them"),
            ("bad_words", (list, tuple), "a list of non-empty strings"),
            ("stop_token_ids", (list, tuple), "a list of token ids"),
            ("allowed_token_ids", (list, tuple), "a list of token ids"),
            ("logit_bias", (Mapping,), "{token id: number}"),
        ):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kinds):
                raise _refused(field, value, accepted)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        for field, number in NUMBERS.items():
            if not number.holds(getattr(self, field)):
                raise _refused(field, getattr(self, field), str(number))
        texts: Callable[[Any], bool] = lambda v: (
            all(isinstance(s, str) and s for s in v) and sum(map(len, v)) <= MAX_STOP
        )
        ids: Callable[[Any, int], bool] = lambda v, most: len(v) <= most and all(map(TOKEN_ID.holds, v))
        biases: Callable[[Any], bool] = lambda v: all(TOKEN_ID.holds(i) and BIAS.holds(b) for i, b in v.items())
        switch: Callable[[Any], bool] = lambda v: isinstance(v, bool)
        characters = f"at most {MAX_STOP} characters together"
        checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("stop", texts, f"a non-empty string or a list of them, {characters}"),
            ("bad_words", texts, f"a list of non-empty strings, {characters}"),
            ("stop_token_ids", lambda v: ids(v, MAX_STOP_IDS), f"a list of at most {MAX_STOP_IDS} token ids"),
            (
                "allowed_token_ids",
                lambda v: v is None or (len(v) > 0 and ids(v, MAX_IDS)),
                "a list of token ids, not an empty one",
            ),
            ("logit_bias", biases, f"{{token id: {BIAS}}}"),
            ("include_stop_str_in_output", switch, "True or False"),
            ("skip_special_tokens", switch, "True or False"),
            ("spaces_between_special_tokens", switch, "True or False"),
            ("detokenize", switch, "True or False"),
            ("ignore_eos", switch, "True or False"),
        )
        for field, good, accepted in checks:
            if not good(getattr(self, field)):
                raise _refused(field, getattr(self, field), accepted)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            found = f"min_tokens={self.min_tokens} above max_tokens={self.max_tokens}"
            raise RequestError("min_tokens", found, "min_tokens at most max_tokens", "change one of them")
        if self.stop and not self.detokenize:
            found = f"stop={shown(self.stop)} with detokenize=False"
            raise RequestError("stop", found, "stop strings in answers that have text", "use stop_token_ids instead")


def _refused(field: str, value: Any, accepted: str) -> RequestError:
    return RequestError(field, f"{field}={shown(value)}", accepted, f"change {field}")


def _named(made: Callable[..., None]) -> Callable[..., None]:
    """SamplingParams.__init__, for which parameters that it does not have are a RequestError and no TypeError."""
    names = [field.name for field in fields(SamplingParams)]

    @functools.wraps(made)
    def init(self: SamplingParams, *args: Any, **given: Any) -> None:
        if args:
            found = f"SamplingParams({shown(args[0])}), a parameter without a name"
            raise RequestError("sampling_params", found, "names and values", "write e.g. SamplingParams(temperature=0)")
        others = {name: value for name, value in given.items() if name not in names}
        vllm_names.settle("SamplingParams", others, vllm_names.SAMPLING, names, RequestError)
        made(self, **{name: value for name, value in given.items() if name not in others})

    return init


SamplingParams.__init__ = _named(SamplingParams.__init__)  # type: ignore[method-assign]


def generation_defaults(directory: str | Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """From `directory`/generation_config.json: sampling defaults under SamplingParams' names, and eos ids.

    Both are empty where the file or its key is absent. `do_sample: false` means temperature 0. Raises CheckpointError
    (unreadable) or ConfigError (an impossible value, which would otherwise surface at the first request).
    """
    path = Path(directory) / "generation_config.json"
    raw = read_optional_json(path, "generation defaults")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {k: raw[k] for k in names if raw.get(k) is not None}
    if raw.get("do_sample") is False:
        defaults = {k: v for k, v in defaults.items() if k == "repetition_penalty"} | {"temperature": 0.0}
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ConfigError(f"{path}: {error.found}", error.expected, "correct the file") from None
    return defaults, _token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")
