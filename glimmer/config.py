"""The settings: of the engine (EngineConfig) and of one request (SamplingParams).

Both come from the caller and are complete: a value that glimmer cannot serve is refused here, by the name of its
field. EngineConfig is frozen; SamplingParams may be assigned to, and a call takes a copy. Not here: torch, files other
than generation_config.json, the model (model_config.py), whether memory suffices.
"""

import functools
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

from glimmer import vllm_names
from glimmer.errors import ConfigError, RequestError, shown
from glimmer.foreign import is_unicode, read_optional_json
from glimmer.model_config import token_ids

MAX_WHOLE = 2**31 - 1  # of a number that counts something
MAX_BYTES = 2**62  # of memory


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
    kv_cache_dir                a directory where KV blocks of prompts and answers are kept, also for later processes:
                                it holds what users have said; None: in memory only
    kv_cache_size_bytes         the most that the files in kv_cache_dir may have together
    enable_prefix_caching       reuse the KV blocks of equal prompt beginnings
    skip_tokenizer_init         need no tokenizer.json: prompts are token ids, answers have no text
    threads                     CPU threads of each process; None: its share of the CPUs that it may use
    quantization                "fp8", "int8" or "int4": quantise matrices while loading; None: as they are stored
    group_size                  with int4: columns that share a scale, a multiple of 32; None: 32
    speculative_config          how drafts are made, as SpeculativeConfig's fields or a method's name; None: "auto"
    prepare                     write the packed file of the model first, where there is none (glimmer prepare)
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
    kv_cache_dir: str | None = None
    kv_cache_size_bytes: int = 16 << 30
    enable_prefix_caching: bool = True
    skip_tokenizer_init: bool = False
    threads: int | None = None
    quantization: str | None = None
    group_size: int | None = None
    speculative_config: Mapping[str, Any] | str | None = None
    prepare: bool = False

    def __post_init__(self) -> None:
        for key in ("model", "dtype", "device", "backend", "kv_cache_dtype"):
            if not isinstance(getattr(self, key), str):
                raise ConfigError(f"{key}={shown(getattr(self, key))}", "a text", f"pass a text as {key}")
        for key, number in ENGINE_NUMBERS.items():
            try:
                object.__setattr__(self, key, number.plain(getattr(self, key)))
            except ValueError:
                raise ConfigError(f"{key}={shown(getattr(self, key))}", str(number), f"pass another {key}") from None
        check_quantization(self.quantization, self.group_size)
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ConfigError(
                f"dtype={shown(self.dtype)}",
                "'auto', 'bfloat16' or 'float32'",
                "choose one of these; float16 overflows in this family's residual stream",
            )
        if self.kv_cache_dtype not in ("auto", "int8"):
            raise ConfigError(f"kv_cache_dtype={shown(self.kv_cache_dtype)}", "'auto' or 'int8'", "choose one of these")
        for key in ("enable_prefix_caching", "skip_tokenizer_init", "prepare"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key}={shown(getattr(self, key))}", "True or False", "pass one of these")
        folder = self.kv_cache_dir
        if folder is not None and not (isinstance(folder, str) and folder and "\0" not in folder):
            raise ConfigError(f"kv_cache_dir={shown(folder)}", "a path", "pass another one, or leave it out")
        if folder is not None and not self.enable_prefix_caching:
            raise ConfigError(
                "kv_cache_dir with enable_prefix_caching=False",
                "one of the two: blocks on disk are for equal beginnings of prompts",
                "leave one of them out",
            )
        SpeculativeConfig.of(self.speculative_config)

    @property
    def speculation(self) -> "SpeculativeConfig":
        """speculative_config, every field of it."""
        return SpeculativeConfig.of(self.speculative_config)


MAX_DRAFTS = 16  # tokens guessed at once, at most
MAX_LOOKUP = 64  # tokens compared in a look-up, at most
AUTO_DRAFTS = 8  # and where the number is left to measurement
METHODS = ("auto", "mtp", "ngram", "off")
# vLLM's names for the same layer, by model.
SAME_METHODS = {"glm4_moe_mtp": "mtp", "deepseek_mtp": "mtp", "none": "off"}


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How the tokens that come next are guessed, under vLLM's names. Guesses change when tokens come, never which.

    method                  "mtp": by the checkpoint's multi-token-prediction layer; "ngram": by looking up the last
                            tokens in prompt and answer; "off": not at all; "auto": "mtp" where the checkpoint has the
                            layer and memory suffices for it, else "off"
    num_speculative_tokens  tokens guessed in each step; None: as many as pay, measured as the engine runs, down to none
    prompt_lookup_max       with "ngram": the most last tokens that are compared
    prompt_lookup_min       with "ngram": the fewest that must agree
    """

    method: str = "auto"
    num_speculative_tokens: int | None = None
    prompt_lookup_max: int = 8
    prompt_lookup_min: int = 3

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"speculative_config with method={shown(self.method)}",
                f"one of {', '.join(METHODS)}",
                "choose one of these: glimmer drafts without a second model",
            )
        for name, number in SPECULATIVE_NUMBERS.items():
            try:
                object.__setattr__(self, name, number.plain(getattr(self, name)))
            except ValueError:
                raise ConfigError(
                    f"speculative_config with {name}={shown(getattr(self, name))}",
                    str(number),
                    "change it, or leave it out (method=off drafts nothing)",
                ) from None
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"speculative_config with prompt_lookup_min={self.prompt_lookup_min} above"
                f" prompt_lookup_max={self.prompt_lookup_max}",
                "prompt_lookup_min at most prompt_lookup_max",
                "change one of them",
            )

    @property
    def max_drafts(self) -> int:
        """The most tokens guessed in a step."""
        return self.num_speculative_tokens or AUTO_DRAFTS

    @staticmethod
    def of(given: Mapping[str, Any] | str | None) -> "SpeculativeConfig":
        """What EngineConfig.speculative_config says. ConfigError for a key or a value that glimmer has not."""
        if given is None:
            return SpeculativeConfig()
        if isinstance(given, str):
            given = {"method": given}
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"speculative_config={shown(given)}",
                f"a method ({', '.join(METHODS)}), or a mapping such as "
                '{"method": "mtp", "num_speculative_tokens": 1}',
                "pass one of these, or leave speculative_config out",
            )
        names = [field.name for field in fields(SpeculativeConfig)]
        if unknown := [key for key in given if key not in names]:
            raise ConfigError(
                f"speculative_config with {shown(unknown[0])}",
                f"keys among {', '.join(names)}",
                "leave it out: glimmer drafts without a second model",
            )
        method = given.get("method", "auto")
        if isinstance(method, str):
            method = SAME_METHODS.get(method, method)
        return SpeculativeConfig(**dict(given) | {"method": method})


def check_quantization(quantization: str | None, group_size: int | None) -> None:
    """ConfigError unless glimmer has this quantisation, with this group size."""
    if quantization not in (None, "fp8", "int8", "int4"):
        raise ConfigError(f"quantization={shown(quantization)}", "'fp8', 'int8', 'int4' or None", "choose one of these")
    fits = type(group_size) is int and group_size > 0 and group_size % 32 == 0 and quantization == "int4"
    if group_size is not None and not fits:
        raise ConfigError(
            f"group_size={shown(group_size)} with quantization={shown(quantization)}",
            "a multiple of 32, with int4 only",
            "leave group_size out, or try 32 or 128",
        )


MAX_SEED = 2**128  # in magnitude
MAX_ANSWERS = 4096  # the largest n of one request
MAX_STOP = 1 << 14  # characters of all stop strings together; bad words likewise
MAX_IDS = 1 << 20  # token ids in one list
MAX_STOP_IDS = 4096
MAX_FORM = 1 << 19  # characters of a schema, an expression, a grammar, or all choices together


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

    def plain(self, value: Any) -> int | float | None:
        """The value as Python's own int or float, whosever number it is (numpy's, ...); ValueError if it is not one
        of these numbers. Python compares numbers of any size exactly, and NaN with none."""
        if value is None and self.optional:
            return None
        kind: Any = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError
        if not isinstance(value, int):
            try:
                value = int(value) if self.whole else float(value)
            except OverflowError:
                raise ValueError from None
        if not (self.low <= value <= self.high or value == self.also):
            raise ValueError
        return int(value) if self.whole else float(value)

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
TOKEN_ID = Number(0, MAX_WHOLE, whole=True)
BIAS = Number(-1e15, 1e15)

BYTES = Number(1, MAX_BYTES, whole=True, optional=True)

ENGINE_NUMBERS = {
    **dict.fromkeys(
        ("tensor_parallel_size", "block_size", "max_num_seqs", "max_num_batched_tokens"),
        Number(1, MAX_WHOLE, whole=True),
    ),
    **dict.fromkeys(("max_model_len", "threads"), COUNT),
    **dict.fromkeys(("max_memory_bytes", "kv_cache_memory_bytes"), BYTES),
    "kv_cache_size_bytes": Number(1, MAX_BYTES, whole=True),
    "seed": Number(-(2**64), 2**64, whole=True),
    "gpu_memory_utilization": Number(1e-6, 1),
    "group_size": COUNT,
}
SPECULATIVE_NUMBERS = {
    "num_speculative_tokens": Number(1, MAX_DRAFTS, whole=True, optional=True),
    **dict.fromkeys(("prompt_lookup_max", "prompt_lookup_min"), Number(1, MAX_LOOKUP, whole=True)),
}
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
class StructuredOutputs:
    """The form that an answer must have, under vLLM's names. One of the first five, and what goes with it:

    json                  a JSON schema, as an object or as its text
    json_object           True: any JSON object
    regex                 a regular expression that the whole answer matches
    choice                texts of which the answer is one
    grammar               a grammar in llguidance's form of Lark, or in llama.cpp's of EBNF
    disable_any_whitespace, whitespace_pattern  of JSON: none between its parts · what matches this expression
    disable_additional_properties               of JSON: objects with `properties` have no others

    structural_tag is refused: tools, with `strict`, are the way to have calls of a given form.
    """

    json: str | Mapping[str, Any] | bool | None = None  # in the object, its text
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    structural_tag: None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", _json_text(self.json))
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            if (text := getattr(self, name)) is not None and not (isinstance(text, str) and is_unicode(text)):
                raise _refused(f"structured_outputs.{name}", text, "a text")
        if self.choice is not None:
            texts = isinstance(self.choice, (list, tuple)) and all(isinstance(one, str) for one in self.choice)
            if not (texts and self.choice and is_unicode("".join(self.choice))):
                raise _refused("structured_outputs.choice", self.choice, "a list of texts")
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise _refused(f"structured_outputs.{name}", getattr(self, name), "True or False")
        if self.json_object not in (None, False, True):
            raise _refused("structured_outputs.json_object", self.json_object, "True or None")
        if self.structural_tag is not None:
            raise _refused("structured_outputs.structural_tag", self.structural_tag, "None: it is not served")
        kinds = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        kinds += ["json_object"] if self.json_object else []
        if len(kinds) != 1:
            raise RequestError(
                "structured_outputs",
                f"structured_outputs with {' and '.join(kinds) or 'none of its kinds'}",
                "exactly one of json, json_object, regex, choice and grammar",
                "leave one of them",
            )
        size = sum(map(len, self.choice)) if self.choice else len(getattr(self, kinds[0]) if kinds[0] in TEXTS else "")
        if size + len(self.whitespace_pattern or "") > MAX_FORM:
            found = f"structured_outputs.{kinds[0]} of {size} characters"
            raise RequestError(
                f"structured_outputs.{kinds[0]}", found, f"at most {MAX_FORM} characters", "ask for a simpler form"
            )


TEXTS = ("json", "regex", "grammar")


def _json_text(schema: Any) -> str:
    """A JSON schema as its text. RequestError if it is none."""
    if not isinstance(schema, (Mapping, bool)):
        raise _refused("structured_outputs.json", schema, "a JSON schema: an object, or its text")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        found = f"structured_outputs.json is no JSON: {error}"[:300]
        raise RequestError(
            "structured_outputs.json", found, "a JSON schema", "change structured_outputs.json"
        ) from None


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How the answer to one request is sampled, and when it ends. Names, meanings and defaults are vLLM's.

    Fields may be assigned to, as in vLLM. Whoever asks for an answer gives away a copy, whose values are checked again.

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
    structured_outputs           the form that the answer must have: StructuredOutputs, or a dict of its fields
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
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.structured_outputs = _structured_outputs(self.structured_outputs)
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
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        self.bad_words = tuple(self.bad_words or ())
        plain: dict[str, tuple[Callable[[Any], Any], str]] = {
            field: (number.plain, str(number)) for field, number in NUMBERS.items()
        }
        plain["stop_token_ids"] = partial(_ids, most=MAX_STOP_IDS), f"a list of at most {MAX_STOP_IDS} token ids"
        plain["allowed_token_ids"] = _allowed, "a list of token ids, not an empty one"
        plain["logit_bias"] = _biases, f"{{token id: {BIAS}}}"
        for field, (make, accepted) in plain.items():
            try:
                setattr(self, field, make(getattr(self, field)))
            except ValueError:
                raise _refused(field, getattr(self, field), accepted) from None
        texts: Callable[[Any], bool] = lambda v: (
            all(isinstance(s, str) and s for s in v) and sum(map(len, v)) <= MAX_STOP
        )
        switch: Callable[[Any], bool] = lambda v: isinstance(v, bool)
        characters = f"at most {MAX_STOP} characters together"
        checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("stop", texts, f"a non-empty string or a list of them, {characters}"),
            ("bad_words", texts, f"a list of non-empty strings, {characters}"),
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


def _ids(value: Sequence[Any] | None, most: int = MAX_IDS) -> tuple[int, ...]:
    """Token ids; ValueError if they are none, or too many."""
    if len(value or ()) > most:
        raise ValueError
    return tuple(cast(int, TOKEN_ID.plain(id)) for id in value or ())


def _allowed(value: Sequence[Any] | None) -> tuple[int, ...] | None:
    """As `_ids`, or None. An empty list would allow nothing."""
    if value is not None and not len(value):
        raise ValueError
    return None if value is None else _ids(value)


def _biases(value: Mapping[Any, Any] | None) -> dict[int, float]:
    """{token id: bias}; ValueError if anything else is in it."""
    return {cast(int, TOKEN_ID.plain(id)): cast(float, BIAS.plain(bias)) for id, bias in (value or {}).items()}


def _structured_outputs(given: Any) -> StructuredOutputs | None:
    """What is given, as StructuredOutputs: one, None, or the fields of one. RequestError if it is anything else."""
    if given is None or isinstance(given, StructuredOutputs):
        return given
    names = [field.name for field in fields(StructuredOutputs)]
    if not isinstance(given, Mapping):
        raise _refused("structured_outputs", given, "{name: value}, with names among " + ", ".join(names))
    if others := [name for name in given if name not in names]:
        raise RequestError(
            "structured_outputs",
            f"structured_outputs with {shown(others[0])}",
            "names among " + ", ".join(names),
            "leave it out",
        )
    return StructuredOutputs(**given)


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
        vllm_names.check("SamplingParams", others, vllm_names.SAMPLING, names, RequestError)
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
    samples = raw.get("do_sample")
    if not (samples is None or isinstance(samples, bool)):
        raise ConfigError(f"{path}: do_sample={shown(samples)}", "true, false or null", "correct the file")
    if samples is False:
        defaults = {k: v for k, v in defaults.items() if k == "repetition_penalty"} | {"temperature": 0.0}
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ConfigError(f"{path}: {error.found}", error.expected, "correct the file") from None
    return defaults, token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")
