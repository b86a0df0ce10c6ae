"""Parameters that vLLM has and glimmer has not: which of their values change nothing here, and why others are refused.

A script that was written for vLLM runs unchanged where it asks for nothing that would change an answer. Not here:
parameters that both have (config.py).
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from glimmer.errors import ConfigError, GlimmerError, shown

Error = Callable[[str, str, str, str], GlimmerError]  # name, found, expected, to do


class Only(NamedTuple):
    """The values of a parameter that change nothing here, and what to do about another one. No values: all of them."""

    values: tuple[Any, ...] = ()
    todo: str = ""


ANY = Only()
NONE: tuple[Any, ...] = (None, (), [], {})

# Of vLLM's LLM.
ENGINE: Mapping[str, Only] = {
    **dict.fromkeys(
        (
            "trust_remote_code", "enforce_eager", "disable_log_stats", "disable_log_requests", "use_tqdm_on_load",
            "download_dir", "hf_token", "swap_space", "disable_custom_all_reduce", "max_seq_len_to_capture",
            "enable_chunked_prefill", "long_prefill_token_threshold", "max_num_partial_prefills",
            "max_parallel_loading_workers", "served_model_name", "compilation_config", "cudagraph_capture_sizes",
            "async_scheduling", "disable_cascade_attn", "ignore_patterns", "max_logprobs", "attention_backend",
            "guided_decoding_backend", "structured_outputs_config", "prefix_caching_hash_algo", "show_hidden_metrics",
            "otlp_traces_endpoint", "collect_detailed_traces", "enable_prompt_tokens_details",
            "safetensors_load_strategy", "optimization_level", "profiler_config",
            "limit_mm_per_prompt", "mm_processor_kwargs", "media_io_kwargs", "interleave_mm_strings",
            "allowed_local_media_path", "allowed_media_domains", "mm_processor_cache_gb", "skip_mm_profiling",
            "disable_mm_preprocessor_cache", "language_model_only", "reasoning_parser", "use_v2_block_manager",
            "disable_hybrid_kv_cache_manager", "preemption_mode", "max_cudagraph_capture_size", "cuda_graph_sizes",
            "num_scheduler_steps", "scheduler_delay_factor", "max_long_partial_prefills", "stream_interval",
            "ray_workers_use_nsight", "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype",
            "pt_load_map_location", "show_hidden_metrics_for_version", "aggregate_engine_logging", "kv_cache_metrics",
            "attention_config", "all2all_backend", "disable_sliding_window", "allow_deprecated_quantization",
            "safetensors_prefetch_num_threads", "safetensors_prefetch_block_size", "moe_backend", "linear_backend",
            "kernel_config", "enable_flashinfer_autotune", "performance_mode", "jit_monitor_mode", "numa_bind",
            "disable_nccl_for_dp_synchronization", "mm_processor_cache_type", "mm_encoder_tp_mode",
            "mm_encoder_attn_backend", "mm_encoder_only", "disable_chunked_mm_input", "renderer_num_workers",
            "log_level", "logging_config", "log_config_file", "cudagraph_metrics", "kv_cache_metrics_sample",
            "enable_mfu_metrics", "enable_layerwise_nvtx_tracing", "enable_logging_iteration_details",
            "reasoning_parser_plugin", "reasoning_config", "fail_on_environ_validation", "shutdown_timeout",
        ),
        ANY,
    ),
    **dict.fromkeys(
        ("enable_prompt_embeds", "enable_dbo", "enable_eplb", "kv_sharing_fast_prefill", "return_routed_experts"),
        Only((False, None), "leave it out"),
    ),
    **dict.fromkeys(
        ("scheduler_cls", "pooler_config", "override_pooler_config", "kv_events_config", "ec_transfer_config"),
        Only((None,), "leave it out"),
    ),
    **dict.fromkeys(
        ("decode_context_parallel_size", "prefill_context_parallel_size"), Only((1, None), "use tensor_parallel_size")
    ),
    "nnodes": Only((1, None), "start the script with torchrun on each machine"),
    "worker_cls": Only(("auto", None), "leave it out"),
    "worker_extension_cls": Only(("", None), "leave it out"),
    "speculative_model": Only((None,), "use speculative_config"),
    "num_speculative_tokens": Only((None,), "use speculative_config"),
    "kv_offloading_size": Only((None,), "use kv_cache_dir, which keeps what has been read on disk"),
    "pipeline_parallel_size": Only((1, None), "use tensor_parallel_size"),
    "data_parallel_size": Only((1, None), "start a process for each replica"),
    "enable_expert_parallel": Only((False, None), "use tensor_parallel_size, which cuts the experts too"),
    "distributed_executor_backend": Only((None, "mp", "uni", "external_launcher"), "start the script with torchrun"),
    "cpu_offload_gb": Only((0, None), "quantise (quantization='fp8', 'int8' or 'int4'), or use more processes"),
    "num_gpu_blocks_override": Only((None,), "set kv_cache_memory_bytes"),
    "hf_overrides": Only(NONE, "edit a copy of config.json"),
    "hf_config_path": Only((None,), "put config.json into the model's directory"),
    "revision": Only((None, "main"), "download that revision, and pass its directory as model"),
    "code_revision": ANY,
    "tokenizer_revision": Only((None, "main"), "put that tokenizer.json into the model's directory"),
    "tokenizer_mode": Only(("auto", "hf", None), "use the tokenizer.json of the model"),
    "load_format": Only(("auto", "safetensors", "hf", None), "use a directory of safetensors files"),
    "model_loader_extra_config": Only(NONE, "leave it out"),
    "config_format": Only(("auto", "hf", None), "use a Hugging Face directory"),
    "model_impl": Only(("auto", "vllm", None), "leave it out: glimmer has one implementation"),
    "task": Only(("auto", "generate", None), "leave it out: glimmer generates text and does nothing else"),
    "runner": Only(("auto", "generate", None), "leave it out: glimmer generates text and does nothing else"),
    "convert": Only(("auto", "none", None), "leave it out: glimmer generates text and does nothing else"),
    "generation_config": Only(("auto", None), "pass SamplingParams, which generation_config.json does not change"),
    "override_generation_config": Only(NONE, "pass SamplingParams"),
    "enable_lora": Only((False, None), "merge the adapter into the weights"),
    "enable_sleep_mode": Only((False, None), "close the LLM, and make a new one later"),
    "chat_template": Only((None,), "pass chat_template to chat"),
    "quantization_config": Only((None,), "quantise with quantization='fp8', 'int8' or 'int4'"),
    "logprobs_mode": Only(("raw_logprobs", None), "leave it out"),
    **dict.fromkeys(("spec_method", "spec_model", "spec_tokens"), Only((None,), "use speculative_config")),
    **dict.fromkeys(("enable_return_routed_experts", "return_sampling_mask"), Only((False, None), "leave it out")),
    "scheduling_policy": Only(("fcfs", None), "leave it out: requests are served in their order"),
    "calculate_kv_scales": Only((False, None), "leave it out"),
    "logits_processors": Only(NONE, "use logit_bias, allowed_token_ids or bad_words"),
    "kv_transfer_config": Only((None,), "leave it out"),
    "additional_config": Only(NONE, "leave it out"),
    "rope_scaling": Only(NONE, "edit a copy of config.json"),
    "rope_theta": Only((None,), "edit a copy of config.json"),
}  # fmt: skip

# Of vLLM's SamplingParams.
SAMPLING: Mapping[str, Only] = {
    "best_of": Only((None, 1), "ask for n answers with logprobs, and choose by cumulative_logprob"),
    "use_beam_search": Only((False, None), "sample n answers"),
    "length_penalty": Only((1.0, None), "leave it out: there is no beam search"),
    "early_stopping": Only((False, None), "leave it out: there is no beam search"),
    "logits_processors": Only(NONE, "use logit_bias, allowed_token_ids or bad_words"),
    "guided_decoding": Only((None,), "use structured_outputs"),
    "response_format": Only((None,), "use structured_outputs"),
    "extra_args": Only(NONE, "leave it out"),
    "flat_logprobs": Only((False, None), "leave it out: log-probabilities are dictionaries"),
    "skip_clone": ANY,
    "stream_interval": ANY,
    **dict.fromkeys(("skip_reading_prefix_cache", "watermarking"), Only((False, None), "leave it out")),
    **dict.fromkeys(
        ("thinking_token_budget", "repetition_detection", "trace_decode_token_ids", "prompt_logprob_start"),
        Only((None,), "leave it out"),
    ),
    **dict.fromkeys(
        ("logprob_token_ids", "prompt_logprob_token_ids"), Only((None,), "ask for logprobs, and choose among them")
    ),
    "routed_experts_prompt_start": Only((0,), "leave it out"),
    "output_kind": ANY,  # LLM.generate returns answers that are done, LLM.stream returns pieces
}

# Of vLLM's LLM.generate and LLM.chat.
CALL: Mapping[str, Only] = {
    "lora_request": Only(NONE, "merge the adapter into the weights"),
    "priority": Only(NONE, "leave it out: requests are served in their order"),
    "tokenization_kwargs": Only(NONE, "encode the prompt yourself and pass {'prompt_token_ids': [ids]}"),
    "mm_processor_kwargs": Only(NONE, "leave it out: the models read text only"),
    "chat_template_content_format": Only(("auto", "string", "openai", None), "leave it out"),
    "prompt_token_ids": Only((None,), "pass {'prompt_token_ids': [ids]} as a prompt"),
    "guided_options_request": Only((None,), "use structured_outputs of SamplingParams"),
    "reasoning_effort": Only((None,), "pass chat_template_kwargs={'enable_thinking': False} to switch thinking off"),
}

# Attributes and methods of vLLM's LLM: what to do in place of each.
MEMBERS: Mapping[str, str] = {
    **dict.fromkeys(
        ("encode", "embed", "classify", "reward", "score"), "use an engine for such models: glimmer generates text"
    ),
    "beam_search": "sample n answers with logprobs, and choose by cumulative_logprob",
    **dict.fromkeys(("sleep", "wake_up"), "close the LLM, and make a new one later"),
    **dict.fromkeys(("reset_prefix_cache", "reset_mm_cache"), "make the LLM with enable_prefix_caching=False"),
    **dict.fromkeys(("start_profile", "stop_profile"), "write `with llm.profile() as profile:`"),
    **dict.fromkeys(
        ("get_metrics", "llm_engine", "request_counter"), "read llm.stats, llm.config and llm.model_config"
    ),
    **dict.fromkeys(
        ("enqueue", "enqueue_chat", "wait_for_completion"), "use stream or astream, or call generate in a thread"
    ),
    **dict.fromkeys(
        (
            "init_weight_transfer_engine",
            "shutdown_weight_transfer_engine",
            "start_weight_update",
            "update_weights",
            "start_draft_weight_update",
            "finish_weight_update",
            "update_weight_version",
            "get_weight_version",
        ),
        "make a new LLM with the other weights",
    ),
    "from_engine_args": "pass the parameters to LLM",
    "get_world_size": "read llm.size",
    "release_kv_cache_memory": "close the LLM, and make a new one later",
    **dict.fromkeys(("collective_rpc", "apply_model"), "start the script with torchrun: each process runs all of it"),
    "set_tokenizer": "put that tokenizer.json into a copy of the model's directory",
}


class MissingMember(ConfigError, AttributeError):
    """An attribute that vLLM's LLM has and ours has not; hasattr is False of it."""


def missing_member(name: str) -> MissingMember | None:
    """The error of an attribute of vLLM's; None if that has none of this name either."""
    todo = MEMBERS.get(name)
    return None if todo is None else MissingMember(f"LLM has no {name}", "generate, chat, stream and others", todo)


def check(
    what: str, given: Mapping[str, Any], known: Mapping[str, Only], own: Iterable[str], error: Error
) -> list[str]:
    """The names of the parameters in `given`, all of which are without effect; the error for any other.

    what: whose parameters they are; own: the names that it has itself, for errors.
    """
    for name, value in given.items():
        only = known.get(name)
        if only is None:
            names = [*own]
            near = difflib.get_close_matches(name, [*names, *known], 1)
            todo = f"did you mean {near[0]!r}?" if near else f"leave {name} out"
            raise error(name, f"{what} has no parameter {name!r}", "one of " + ", ".join(names), todo)
        if only.values and not any(type(value) is type(one) and value == one for one in only.values):
            accepted = " or ".join(dict.fromkeys(repr(one) for one in only.values[:2]))
            raise error(name, f"{name}={shown(value)}, which {what} cannot honour", accepted, only.todo)
    return sorted(given)
