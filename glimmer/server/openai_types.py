"""What a request of OpenAI's APIs may hold: fields with their types, and the fields that are refused by name.

Further fields are ignored: clients send many that change nothing. REFUSED lists those that would change the answer. Not
here: what becomes of a request (openai.py).
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from glimmer import vllm_names
from glimmer.errors import RequestError
from glimmer.vllm_names import NONE, Only

Json = dict[str, Any]


class StreamOptions(msgspec.Struct):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Thinking(msgspec.Struct):
    """Whether the model thinks, in the words of GLM's own API."""

    type: str | None = None
    clear_thinking: bool | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """The fields that chat and completions share. None: the model's default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    response_format: Json | None = None
    structured_outputs: Json | None = None
    guided_json: Json | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatBody(Sampling, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: Json | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    special_tokens_in_content: str | None = None


class CompletionBody(Sampling, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[Any]  # a text, token ids, or a list of either
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(Sampling, kw_only=True):
    """POST /tokenize: a text, or a conversation."""

    prompt: str | None = None
    messages: list[Json] | None = None
    tools: list[Json] | None = None
    chat_template_kwargs: Json | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    tokens: list[int]
    model: str | None = None


_SAMPLERS = {
    name: Only((*NONE, *neutral), "leave it out: there is no such sampler here")
    for name, neutral in {
        "typical_p": (1, 1.0), "typ_p": (1, 1.0), "tfs_z": (1, 1.0), "top_a": (0, 0.0), "mirostat": (0,),
        "dry_multiplier": (0, 0.0), "xtc_probability": (0, 0.0), "dynatemp_range": (0, 0.0),
        "smoothing_factor": (0, 0.0), "no_repeat_ngram_size": (0,), "top_n_sigma": (-1, -1.0),
    }.items()
}  # fmt: skip

REFUSED: dict[str, Only] = {
    **{name: vllm_names.SAMPLING[name] for name in ("use_beam_search", "length_penalty", "early_stopping")},
    **{name: vllm_names.SAMPLING[name] for name in ("logits_processors", "extra_args")},
    **_SAMPLERS,
    "best_of": Only((None, 1), "ask for n answers with logprobs, and choose among them"),
    "suffix": Only((None, ""), "leave it out: the models continue a text, and fill no gaps"),
    "chat_template": Only((None,), "use chat_template_kwargs: a request brings no program"),
    "documents": Only(NONE, "put the documents into a message"),
    "functions": Only(NONE, "use tools"),
    "function_call": Only((None, "none", "auto"), "use tool_choice"),
    "audio": Only(NONE, "leave it out: the models write text"),
    "modalities": Only((None, ["text"]), "leave it out: the models write text"),
    "web_search_options": Only(NONE, "offer a tool that searches"),
    "kv_transfer_params": Only(NONE, "leave it out"),
    "vllm_xargs": Only(NONE, "leave it out"),
    "prompt_embeds": Only(NONE, "send the prompt as text or as token ids"),
    "lora_request": Only(NONE, "merge the adapter into the weights"),
    "guided_whitespace_pattern": Only((None,), "leave it out"),
    "json_schema": Only(NONE, "use response_format"),
    "grammar": Only((None, ""), "use structured_outputs: {\"grammar\": ...}"),
    "prompt_logprobs": Only((None,), "use echo with logprobs in /v1/completions"),
    "return_token_ids": Only((None, False), "leave it out: /tokenize gives the ids of a text"),
    "return_tokens_as_token_ids": Only((None, False), "leave it out: /tokenize gives the ids of a text"),
    "return_hidden_states": Only((None, False), "leave it out"),
    "include_reasoning": Only((None, True), "leave it out: reasoning has a field of its own"),
    "separate_reasoning": Only((None, True), "leave it out: reasoning has a field of its own"),
    "n_predict": Only((None,), "use max_tokens"),
    "n_probs": Only((None, 0), "use logprobs"),
    "regex": Only((None,), "use structured_outputs: {\"regex\": ...}"),
    "ebnf": Only((None,), "use structured_outputs: {\"grammar\": ...}"),
}  # fmt: skip
CHAT_REFUSED: Mapping[str, Only] = REFUSED | {
    "echo": Only((None, False), "leave it out: the client has the message that the answer goes on with"),
}


def refuse_unsupported(body: Mapping[str, Any], api: str, refused: Mapping[str, Only] = REFUSED) -> None:
    """RequestError for a field that would change the answer, and that is not served."""
    unsupported = {name: body[name] for name in body if name in refused}
    vllm_names.check(api, unsupported, refused, (), RequestError)
