"""What a config.json, an engine's settings and a request may say; every refusal names the key and what is accepted."""

import dataclasses
import json
import math
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from checkpoints import TINY

from glimmer.config import EngineConfig, SamplingParams, generation_defaults
from glimmer.errors import CheckpointError, ConfigError, RequestError, shown
from glimmer.model_config import ModelConfig

GLM_45 = {  # the published file of GLM-4.5
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}


def without(*keys: str) -> dict:
    return {key: value for key, value in TINY.items() if key not in keys}


# ---- config.json ---------------------------------------------------------------------------------------------------


def test_the_published_file():
    config = ModelConfig.from_dict(GLM_45)
    for field in dataclasses.fields(config):
        if field.name not in ("eos_token_id", "dtype", "quantization_config", "yarn"):
            assert getattr(config, field.name) == GLM_45[field.name], field.name
    assert config.eos_token_id == (151329, 151336, 151338)
    assert (config.dtype, config.quantization_config, config.rotary_dim) == ("bfloat16", None, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1


def test_both_spellings_are_one_configuration():
    """transformers 4 and 5: RoPE at the top or in rope_parameters, torch_dtype or dtype, two renamed counts."""
    new = dict(GLM_45)
    for key in (
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "torch_dtype",
        "n_routed_experts",
        "num_nextn_predict_layers",
    ):
        del new[key]
    new |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5},
        "dtype": "bfloat16",
        "num_local_experts": 160,
        "num_mtp_layers": 1,
    }
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(GLM_45)


def test_what_transformers_itself_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Glm4MoeConfig(**GLM_45).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.load(tmp_path) == ModelConfig.from_dict(GLM_45)


@pytest.mark.parametrize(
    "missing, default",
    [
        ("n_group", 1),
        ("topk_group", 1),
        ("use_qk_norm", False),
        ("attention_bias", False),
        ("num_nextn_predict_layers", 0),
        ("partial_rotary_factor", 0.5),
        ("eos_token_id", ()),
    ],
)
def test_keys_that_may_be_absent(missing, default):
    """Absent and null are the same; the defaults are those of the architecture, not of one of its members."""
    assert getattr(ModelConfig.from_dict(without(missing)), missing) == default
    assert getattr(ModelConfig.from_dict(TINY | {missing: None}), missing) == default


def test_absent_dtype_and_switches():
    for raw in (TINY, TINY | {"dtype": None, "torch_dtype": None, "tie_word_embeddings": None, "hidden_act": None}):
        assert ModelConfig.from_dict(raw).dtype == "bfloat16"
    assert ModelConfig.from_dict(TINY | {"dtype": None, "torch_dtype": "float32"}).dtype == "float32"
    assert ModelConfig.from_dict(TINY | {"dtype": "float16", "torch_dtype": "float32"}).dtype == "float16"


@pytest.mark.parametrize("eos, ids", [(5, (5,)), ([5], (5,)), ([3, 5], (3, 5)), (None, ()), (0, (0,))])
def test_eos_is_one_id_or_several(eos, ids):
    assert ModelConfig.from_dict(TINY | {"eos_token_id": eos}).eos_token_id == ids


REQUIRED = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "norm_topk_prob",
    "first_k_dense_replace",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
]


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("raw", [without, lambda key: TINY | {key: None}], ids=["absent", "null"])
def test_a_missing_key_is_named(key, raw):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(raw(key))
    assert repr(key) in error.value.found and error.value.expected and "config.json" in error.value.todo


@pytest.mark.parametrize(
    "key, value",
    [
        *(
            (key, value)
            for key in REQUIRED
            for value in ("64", [64], True, -1, float("nan"))
            if not (key == "norm_topk_prob" and value is True) and not (key == "routed_scaling_factor" and value == -1)
        ),
        *((key, 0) for key in REQUIRED if key not in ("first_k_dense_replace", "routed_scaling_factor")),
        *((key, 1.5) for key in REQUIRED if key not in ("routed_scaling_factor", "rms_norm_eps", "rope_theta")),
        ("use_qk_norm", 1),
        ("attention_bias", "yes"),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("mlp_bias", True),
        ("dtype", "int8"),
        ("torch_dtype", "float64"),
        ("rope_scaling", 3),
        ("rope_parameters", [1]),
        ("partial_rotary_factor", 0),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 0.19),
        ("rope_theta", 1),
        ("num_key_value_heads", 3),
        ("n_group", 3),
        ("topk_group", 2),
        ("num_experts_per_tok", 9),
        ("rms_norm_eps", 0),
        ("first_k_dense_replace", 5),
        ("num_nextn_predict_layers", 2),
        ("num_nextn_predict_layers", -1),
        ("eos_token_id", "end"),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", 1.0),
        ("max_position_embeddings", 0),
        ("hidden_size", 10.0),
    ],
    ids=str,
)
def test_an_impossible_value_is_named(key, value):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(TINY | {key: value})
    assert key.removeprefix("torch_") in error.value.found and str(value) in str(error.value.found)
    assert error.value.expected and error.value.todo


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_group=8), "8 groups of 1 experts"),
        (dict(n_group=4, topk_group=1), "num_experts_per_tok=4"),
        (dict(n_group=2, topk_group=3), "topk_group=3"),
        (dict(rope_scaling={"rope_type": "yarn"}), "no 'factor'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 0.5}), "factor=0.5"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4, "low_freq_factor": 1}), "low_freq_factor=1"),
        (dict(rope_scaling={"factor": 4}), "factor without a rope_type=4"),
        (dict(rope_parameters={"rope_theta": 1e6, "factor": 4}), "factor without a rope_type=4"),
        (dict(rope_scaling={"type": "default", "factor": 4}), "factor=4"),
        (dict(rope_scaling={"mrope_section": [8, 4]}), "mrope_section"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2}, rope_scaling={"type": "yarn"}), "rope_type twice"),
        (dict(rope_parameters={"factor": 2}, rope_scaling={"type": "yarn", "factor": 4}), "factor twice: 2 and 4"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope_type='linear'"),
        (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e6}), "rope_type='llama3'"),
    ],
)
def test_impossible_combinations(changes, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(TINY | changes)
    assert words in error.value.found


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_scaling={"rope_type": "yarn", "factor": 4}),
        dict(rope_scaling={"type": "yarn", "factor": 4.0}),
        dict(rope_parameters={"rope_type": "yarn", "factor": 4}),
        dict(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "yarn", "factor": 4}),
        dict(rope_parameters={"type": "yarn"}, rope_scaling={"type": "default", "factor": 4}),
        dict(rope_scaling={"type": "yarn"}, rope_parameters={"factor": 4, "attention_factor": None}),
    ],
)
def test_yarn_wherever_it_stands(changes):
    config = ModelConfig.from_dict(TINY | changes)
    length = TINY["max_position_embeddings"]
    assert config.yarn is not None and config.yarn.factor == 4 and config.context == 4 * length
    assert config.yarn.original_max_position_embeddings == length
    assert config.yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_partial_rotary_factor_wherever_it_stands(name):
    without = {key: value for key, value in TINY.items() if key != "partial_rotary_factor"}
    assert ModelConfig.from_dict(without | {name: {"partial_rotary_factor": 0.25}}).partial_rotary_factor == 0.25


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite"), "GLM-4.7-Flash"),
        (dict(architectures=["Glm4vMoeForConditionalGeneration"], model_type="glm4v_moe"), "GLM-4.5V"),
        (dict(quantization={"group_size": 64, "bits": 4}), "MLX"),
        (dict(quantization_config={"group_size": 64, "bits": 4}), "MLX"),
    ],
)
def test_what_lies_there_is_called_by_its_name(changes, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(TINY | changes)
    assert words in error.value.found


@pytest.mark.parametrize("value", [10**6, 10**18, 10**299])
@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts"])
def test_more_than_a_machine_can_hold(key, value):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(TINY | {key: value})
    assert key in error.value.found and "at most" in error.value.expected


@pytest.mark.parametrize(
    "changes",
    [
        dict(architectures=["LlamaForCausalLM"], model_type="llama"),
        dict(architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite"),  # GLM-4.7-Flash
        dict(architectures=["Glm4vMoeForConditionalGeneration"], model_type="glm4v_moe"),  # GLM-4.5V
        dict(architectures=["Glm4MoeForSequenceClassification"]),
        dict(model_type=None),
    ],
)
def test_another_architecture_is_named_and_ours_too(changes):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(TINY | changes)
    assert str(changes.get("architectures", "model_type=None")) in error.value.found
    assert "Glm4MoeForCausalLM" in error.value.expected and "GLM-4.6" in error.value.expected


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "config.json does not exist"),
        ("{", "cannot be read"),
        ("[]", "holds a JSON list"),
        ("\xff", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_broken_file(text, words, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as error:
        ModelConfig.load(tmp_path)
    assert words in error.value.found and str(tmp_path) in error.value.found


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelConfig.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        ModelConfig.load(tmp_path / "file")


# ---- generation_config.json ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, defaults, eos",
    [
        (None, {}, ()),
        ({"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}, {}, (151329, 151336, 151338)),  # GLM-4.5
        ({"temperature": 1.0, "top_p": 0.95, "eos_token_id": 7}, {"temperature": 1.0, "top_p": 0.95}, (7,)),
        ({"do_sample": True, "top_k": 40, "temperature": 0.6}, {"top_k": 40, "temperature": 0.6}, ()),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}, ()),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}, ()),
        ({"temperature": None, "max_new_tokens": 5, "min_p": 0.1}, {"min_p": 0.1}, ()),
    ],
)
def test_generation_defaults(raw, defaults, eos, tmp_path):
    if raw is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert generation_defaults(tmp_path) == (defaults, eos)
    SamplingParams(**defaults)


@pytest.mark.parametrize(
    "raw, word",
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": "x"}, "top_p"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"do_sample": "false"}, "do_sample"),
        ({"do_sample": 0}, "do_sample"),
    ],
)
def test_impossible_generation_defaults(raw, word, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as error:
        generation_defaults(tmp_path)
    assert word in error.value.found and "generation_config.json" in error.value.found


# ---- settings and requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        *(
            (key, value)
            for key in (
                "tensor_parallel_size",
                "block_size",
                "max_num_seqs",
                "max_num_batched_tokens",
                "max_model_len",
                "kv_cache_memory_bytes",
                "kv_cache_size_bytes",
            )
            for value in (0, -1, 1.5, "8", True)
        ),
        ("dtype", "float16"),
        ("dtype", "int8"),
        ("seed", "x"),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", "0.9"),
        ("gpu_memory_utilization", True),
        ("kv_cache_dtype", "int4"),
        ("kv_cache_dtype", None),
        ("kv_cache_dtype", "fp8"),
        ("kv_cache_dir", ""),
        ("kv_cache_dir", "a\0b"),
        ("kv_cache_dir", 5),
        ("enable_prefix_caching", "no"),
        ("skip_tokenizer_init", 1),
    ],
    ids=str,
)
def test_engine_settings_are_refused_by_name(key, value):
    with pytest.raises(ConfigError) as error:
        EngineConfig(model="x", **{key: value})
    assert f"{key}={value!r}" in error.value.found and error.value.expected and error.value.todo


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 0),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", 1e-39),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e300),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 1.5),
        ("seed", True),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", [5]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1}),
        ("logit_bias", {5: "x"}),
        ("logit_bias", {5: float("inf")}),
        ("logit_bias", {-5: 1}),
        ("logit_bias", {5: 1e39}),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("logprobs", True),
        *(
            (field, value)
            for field in ("top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
            for value in (2**31, 10**400, -(10**400), float("nan"), "5")
        ),
        *((field, 10**5000) for field in ("n", "seed", "temperature", "top_p", "min_p", "repetition_penalty")),
        *((field, -(10**400)) for field in ("presence_penalty", "frequency_penalty", "seed")),
        ("n", 4097),
        ("seed", 2**128 + 1),
        ("top_p", 1e-300),
        ("logit_bias", {10**5000: 1}),
        ("logit_bias", {5: 10**5000}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {True: 1}),
        ("stop_token_ids", [10**400]),
        ("stop_token_ids", [5] * 5000),
        ("stop", ["a" * 20_000]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [10**5000]),
        ("allowed_token_ids", 5),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", [b"word"]),
        ("detokenize", 1),
        ("ignore_eos", "yes"),
        ("skip_special_tokens", None),
    ],
    ids=shown,
)
def test_sampling_parameters_are_refused_by_field(field, value):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert error.value.field == field and error.value.found.startswith(f"{field}=")
    assert error.value.expected and error.value.todo and len(str(error.value)) < 600


def test_parameters_of_vllm_that_change_nothing_are_accepted():
    same = dict(best_of=1, use_beam_search=False, guided_decoding=None, logits_processors=[], output_kind=2)
    assert SamplingParams(**same) == SamplingParams()
    for name, value in (("best_of", 2), ("guided_decoding", {"json": {}}), ("use_beam_search", True)):
        with pytest.raises(RequestError) as error:
            SamplingParams(**{name: value})
        assert error.value.field == name and error.value.found.startswith(f"{name}=") and error.value.todo
    with pytest.raises(RequestError, match="no parameter 'temprature'") as error:
        SamplingParams(temprature=1)
    assert "did you mean 'temperature'" in error.value.todo
    with pytest.raises(RequestError, match="without a name"):
        SamplingParams(0.5)
    with pytest.raises(RequestError, match="detokenize=False"):
        SamplingParams(stop="a", detokenize=False)
    assert dataclasses.replace(SamplingParams(), n=2).n == 2


def test_sampling_parameters_that_contradict_each_other():
    with pytest.raises(RequestError) as error:
        SamplingParams(min_tokens=17)
    assert error.value.field == "min_tokens" and "max_tokens=16" in error.value.found
    assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17


def test_sampling_parameters_take_one_form():
    given = SamplingParams(stop="a", stop_token_ids=[3], logit_bias={5: 1})
    assert (given.stop, given.stop_token_ids, given.logit_bias) == (("a",), (3,), {5: 1})
    assert SamplingParams().stop == () and SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    ids = [3]
    given = SamplingParams(stop_token_ids=ids)
    ids.append(4)
    assert given.stop_token_ids == (3,), "the caller's list is the caller's"


def test_defaults_are_vllm_s():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.max_tokens, p.min_tokens) == (1, 1.0, 1.0, 0, 0.0, 16, 0)
    assert (p.logprobs, p.prompt_logprobs, p.seed) == (None, None, None)
    assert (p.ignore_eos, p.skip_special_tokens, p.include_stop_str_in_output) == (False, True, False)


STRANGE = [10**5000, -(10**5000), [10**5000], float("nan"), object()]


@pytest.mark.parametrize("value", STRANGE, ids=["huge", "-huge", "list", "nan", "object"])
@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig)])
def test_no_value_of_a_setting_is_too_strange_for_a_refusal(name, value):
    try:
        EngineConfig(**{"model": "m", name: value})
    except ConfigError as error:
        assert len(str(error)) < 500


@pytest.mark.parametrize("make", [np.int64, np.uint8, np.int16], ids=["int64", "uint8", "int16"])
def test_whole_numbers_of_numpy_are_numbers(make):
    params = SamplingParams(
        n=make(2),
        max_tokens=make(9),
        seed=make(3),
        logit_bias={make(5): np.float32(0.5)},
        stop_token_ids=[make(7)],
        allowed_token_ids=(make(1), 2),
        temperature=make(1),
        top_p=np.float32(0.5),
        min_p=np.float16(0.25),
        presence_penalty=Fraction(1, 2),
    )
    plain = SamplingParams(
        n=2,
        max_tokens=9,
        seed=3,
        logit_bias={5: 0.5},
        stop_token_ids=[7],
        allowed_token_ids=[1, 2],
        temperature=1.0,
        top_p=0.5,
        min_p=0.25,
        presence_penalty=0.5,
    )
    assert params == plain and json.dumps(dataclasses.asdict(params)) == json.dumps(dataclasses.asdict(plain))
    config = EngineConfig(model="m", max_num_seqs=make(4), seed=make(1), gpu_memory_utilization=np.float64(0.5))
    assert config == EngineConfig(model="m", max_num_seqs=4, seed=1, gpu_memory_utilization=0.5)
    assert [type(v) for v in (config.max_num_seqs, config.seed, config.gpu_memory_utilization)] == [int, int, float]


@pytest.mark.parametrize(
    "value", [np.bool_(True), np.float32(2), np.float64("nan"), np.array([1]), "1", Decimal(1), 1j]
)
def test_what_is_no_whole_number_is_refused_whosever_it_is(value):
    with pytest.raises(RequestError):
        SamplingParams(top_k=value)
    with pytest.raises(RequestError):
        SamplingParams(stop_token_ids=[value])
    with pytest.raises(ConfigError):
        EngineConfig(model="m", max_num_seqs=value)


@pytest.mark.parametrize(
    "value", [np.float64("nan"), np.float32("inf"), np.bool_(0), Fraction(10**400), np.array(1.0), True]
)
def test_what_is_no_number_is_refused_whosever_it_is(value):
    with pytest.raises(RequestError):
        SamplingParams(temperature=value)
    with pytest.raises(ConfigError):
        EngineConfig(model="m", gpu_memory_utilization=value)


@pytest.mark.parametrize(
    "given",
    [
        "eagle", 3, ["mtp"], {"method": ["mtp"]}, {"method": "mtp", "model": "x"}, {"num_speculative_tokens": 0},
        {"num_speculative_tokens": 17}, {"num_speculative_tokens": 1.5}, {"num_speculative_tokens": True},
        {"prompt_lookup_min": 9, "prompt_lookup_max": 8}, {"prompt_lookup_max": 65}, {10**5000: 1},
    ],
)  # fmt: skip
def test_speculation_that_glimmer_has_not_is_refused(given):
    with pytest.raises(ConfigError, match="speculative_config") as caught:
        EngineConfig(model="m", speculative_config=given)
    assert caught.value.expected and caught.value.todo and len(str(caught.value)) < 500


def test_speculation_under_vllms_names():
    config = EngineConfig(model="m", speculative_config={"method": "glm4_moe_mtp", "num_speculative_tokens": 2})
    assert (config.speculation.method, config.speculation.max_drafts) == ("mtp", 2)
    assert EngineConfig(model="m", speculative_config="none").speculation.method == "off"
    assert EngineConfig(model="m").speculation.method == "auto"
