"""HFTokenizer: what `LLM.get_tokenizer` returns, a tokenizer with the methods that scripts know from transformers.

It has what scripts for vLLM call: encoding and decoding, names of tokens, special tokens, the chat template. Names,
defaults and results are those of transformers' fast tokenizers, but that results are plain lists and dictionaries.
Not here: padding, truncation, tensors, and any change of the vocabulary, which are refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from glimmer.errors import RequestError, shown
from glimmer.text.chat import ChatTemplate, check_turn
from glimmer.text.tokenizer import Tokenizer


class HFTokenizer:
    """A checkpoint's tokenizer (`tokenizer`) and chat template under the names of transformers."""

    is_fast = True
    padding_side = "left"

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, model_max_length: int, name_or_path: str):
        self.tokenizer, self._template = tokenizer, template
        self.model_max_length, self.name_or_path = model_max_length, name_or_path

    # ------------------------------------------------------------------ the vocabulary

    def __len__(self) -> int:
        """Tokens, those included that were added to the vocabulary."""
        return len(self.get_vocab())

    @property
    def vocab_size(self) -> int:
        """Tokens without those that were added to the vocabulary."""
        return self.tokenizer.base_size

    def get_vocab(self) -> dict[str, int]:
        """{name: id} of all tokens."""
        return self.tokenizer.vocabulary()

    def get_added_vocab(self) -> dict[str, int]:
        """{name: id} of the tokens that were added to the vocabulary."""
        return {name: id for name, id in self.get_vocab().items() if name in self.tokenizer.added_names}

    @property
    def eos_token_id(self) -> int | None:
        """The end of a sequence, as tokenizer_config.json names it."""
        return self.tokenizer.eos_token_id

    @property
    def eos_token(self) -> str | None:
        """Its name."""
        id = self.eos_token_id
        return None if id is None else self.tokenizer.id_to_token(id)

    @property
    def pad_token_id(self) -> int | None:
        """The end of a sequence: nothing is padded here, and this family pads with it."""
        return self.eos_token_id

    @property
    def pad_token(self) -> str | None:
        """Its name."""
        return self.eos_token

    bos_token_id: None = None  # this family has none
    bos_token: None = None

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the control tokens, which decode leaves out on request."""
        return sorted(self.tokenizer.special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """Their names."""
        return [str(self.tokenizer.id_to_token(id)) for id in self.all_special_ids]

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str | None]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str | None] | None:
        """Names of tokens, bytes spelt as in tokenizer.json; None for an id that stands for nothing."""
        if isinstance(ids, Iterable):
            return [self.tokenizer.id_to_token(id) for id in ids]
        return self.tokenizer.id_to_token(ids)

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """Ids of tokens by their names; None for a name that there is not."""
        if isinstance(tokens, str):
            return self.tokenizer.token_to_id(tokens)
        return [self.tokenizer.token_to_id(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens given by their names."""
        return self.decode([id for id in self.convert_tokens_to_ids([*tokens]) if id is not None])

    # ------------------------------------------------------------------ text and ids

    def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """Token ids of a text. RequestError if it cannot be encoded."""
        _refuse("encode", options)
        if not isinstance(text, str):
            raise RequestError("text", f"a text of type {type(text).__name__}", "a text", "pass a str")
        return self.tokenizer.encode(text, add_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        """Names of the tokens of a text."""
        return [str(token) for token in self.convert_ids_to_tokens(self.encode(text, add_special_tokens=False))]

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, **options: Any
    ) -> dict[str, list[int] | list[list[int]]]:
        """{"input_ids", "attention_mask"} of a text, or lists of them for several."""
        _refuse("a call of the tokenizer", options)
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        every = [self.encode(one, add_special_tokens) for one in text]
        return {"input_ids": every, "attention_mask": [[1] * len(ids) for ids in every]}

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of token ids. RequestError for an id that the vocabulary does not have."""
        _refuse("decode", {k: v for k, v in options.items() if k != "clean_up_tokenization_spaces"})
        ids = token_ids if isinstance(token_ids, Iterable) else [token_ids]
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """`decode` of each sequence."""
        return [self.decode(ids, skip_special_tokens, **options) for ids in sequences]

    # ------------------------------------------------------------------ conversations

    @property
    def chat_template(self) -> str | None:
        """The source of the checkpoint's chat template."""
        return self._template.source

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **variables: Any,
    ) -> str | list[int] | dict[str, list[int]]:
        """A conversation as token ids, or as text with tokenize=False; as `LLM.render`, whose errors it raises.

        variables: of the template's own, such as enable_thinking=False.
        """
        given = {name: variables.pop(name) for name in _NEUTRAL if name in variables}
        _refuse("apply_chat_template", given)
        template = self._template if chat_template is None else ChatTemplate(chat_template, "chat_template")
        check_turn(conversation, add_generation_prompt, continue_final_message)
        text = template.render(
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
        if not tokenize:
            return text
        ids = self.encode(text, add_special_tokens=False)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} if return_dict else ids


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # options of transformers with the values that change nothing
    "padding": (False, "do_not_pad", None),
    "truncation": (False, "do_not_truncate", None),
    "max_length": (None,),
    "return_tensors": (None,),
    "return_dict": (True, None),
    "return_attention_mask": (True, None),
    "verbose": (True, False),
    "tokenizer_kwargs": (None, {}),
}


def _refuse(method: str, options: Mapping[str, Any]) -> None:
    """RequestError for an option that would change something."""
    for name, value in options.items():
        if not any(type(value) is type(one) and value == one for one in _NEUTRAL.get(name, ())):
            raise RequestError(
                name,
                f"{name}={shown(value)}, which {method} does not have here",
                "lists of token ids, neither padded nor cut",
                f"leave {name} out; a tensor is torch.tensor(ids)",
            )
