"""What a model is: its architecture as config.json describes it, checked.

ModelConfig is frozen and complete: a value that glimmer cannot serve is refused here, by the name of its key, and no
other file reads config.json again. Not here: torch, other files, whether memory suffices, settings of the engine and of
requests (config.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimmer.errors import CheckpointError, ConfigError, shown
from glimmer.foreign import MAX_NUMBER, read_json

ARCHITECTURE = "Glm4MoeForCausalLM"
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
        directory = check_directory(directory)
        return ModelConfig.from_dict(read_json(directory / "config.json", "the model's configuration"))

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "ModelConfig":
        """Check the content of a config.json. ConfigError names the key, its value and what is accepted."""
        architectures, model_type = raw.get("architectures"), raw.get("model_type")
        if model_type != "glm4_moe" or (architectures is not None and architectures != [ARCHITECTURE]):
            relative = RELATIVES.get(model_type) if isinstance(model_type, str) else None
            raise ConfigError(
                f"config.json describes architectures={shown(architectures)}, model_type={shown(model_type)}"
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
            eos_token_id=token_ids(raw.get("eos_token_id"), "config.json eos_token_id"),
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
        return ConfigError(f"config.json: {key}={shown(value)}", accepted, "restore the checkpoint's own config.json")

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
                    found = f"{key} twice: {shown(said)} and {shown(setting)}"
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
                f"config.json: quantization={shown(mlx)}: these weights are in MLX's format",
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


def check_directory(directory: str | Path) -> Path:
    """The directory of a model, which must be one. CheckpointError if it is a file, or nothing."""
    directory = Path(directory)
    if not directory.is_dir():
        kind = "is a file in GGUF, llama.cpp's format" if directory.suffix == ".gguf" else "is a file"
        raise CheckpointError(
            f"model directory {str(directory)!r} {kind if directory.exists() else 'does not exist'}",
            "a Hugging Face model directory (config.json, tokenizer.json, *.safetensors)",
            "check the path; glimmer downloads nothing by itself",
        )
    return directory


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Token ids from a JSON value: one id, a list of ids, or null."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MAX_NUMBER for i in ids):
        raise ConfigError(
            f"{where}={shown(value)}", "a token id or a list of token ids", "restore the checkpoint's file"
        )
    return tuple(ids)
