"""A conversation as a prompt: the chat template and the tokenizer together, and what control tokens in messages are.

Not here: what a message may hold (chat.py), how text becomes ids (tokenizer.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from glimmer.errors import RequestError, shown
from glimmer.text.chat import ChatTemplate, check_turn, choose_mark, mark_content
from glimmer.text.tokenizer import Tokenizer

OPTIONS = (
    "tools",
    "chat_template_kwargs",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "special_tokens_in_content",
)


def render(
    template: ChatTemplate,
    tokenizer: Tokenizer | None,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    special_tokens_in_content: str = "control",
) -> tuple[str, str]:
    """(the prompt, the mark in it that tells letters from control tokens, or nothing).

    continue_final_message: the last message is the beginning of the answer (with add_generation_prompt=False).
    special_tokens_in_content: what names of control tokens in the messages of users and tools are, such as
        <|assistant|> or /nothink: "control" tokens, as in transformers and vLLM; or "text", the letters that they are,
        where these messages are not to be trusted. `encode` takes the prompt with its mark.
    Raises RequestError, or CheckpointError if the template is at fault.
    """
    if chat_template_kwargs is not None and not (
        isinstance(chat_template_kwargs, Mapping) and all(isinstance(key, str) for key in chat_template_kwargs)
    ):
        name = "chat_template_kwargs"
        raise RequestError(
            name, f"{name}={shown(chat_template_kwargs)}", "{name: value}", "pass names and values, or None"
        )
    kwargs = dict(chat_template_kwargs or {})
    if own := sorted({"messages", *OPTIONS} & set(kwargs)):
        raise RequestError(
            "chat_template_kwargs",
            f"{own} among chat_template_kwargs",
            "variables of the template's own, such as enable_thinking",
            "pass messages, tools and the others as arguments",
        )
    if special_tokens_in_content not in ("control", "text"):
        found = f"special_tokens_in_content={shown(special_tokens_in_content)}"
        raise RequestError("special_tokens_in_content", found, "'control' or 'text'", "choose one of these")
    check_turn(messages, add_generation_prompt, continue_final_message)
    kwargs |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    text = template.render(messages, tools=tools, **kwargs)
    if special_tokens_in_content == "control" or tokenizer is None:
        return text, ""
    mark = choose_mark(text)
    return template.render(mark_content(messages, tokenizer.added_names, mark), tools=tools, **kwargs), mark


def encode(tokenizer: Tokenizer, prompt: str, mark: str, max_tokens: int) -> list[int]:
    """The token ids of what `render` has made. RequestError if they are certainly more than max_tokens."""
    if mark:
        return tokenizer.encode_marked(prompt, mark, max_tokens)
    return tokenizer.encode(prompt, add_special_tokens=False, max_tokens=max_tokens)
