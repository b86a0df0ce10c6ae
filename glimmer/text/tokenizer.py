"""Tokenizer: a checkpoint's tokenizer.json, text to ids and ids to text; Detokenizer: the same, a few ids at a time.

Encoding is the work of the `tokenizers` library. Decoding is done here, over the bytes of each token: GLM's vocabulary
is byte-level, so one token may end in the middle of a character, and the only exact way to turn ids into text is to
join bytes first and read UTF-8 afterwards. Bytes that are not UTF-8 become U+FFFD, one per maximal broken piece.
Not here: chat templates (chat.py), stop strings (incremental.py), and any clean-up of spaces.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from glimmer.errors import CheckpointError, GlimmerError, RequestError, shown
from glimmer.foreign import MAX_TOKENIZER, is_unicode, read_bytes, read_optional_json

LONG = 1 << 14  # characters; the library takes some 30 ms for as many
MAX_CHARACTERS = 1 << 24  # of a text to encode; the longest context, 202,752 tokens, holds far less


def byte_symbols() -> list[str]:
    """The alphabet of byte-level BPE: a printable character for each byte value.

    Bytes that print in Latin-1 stand for themselves; the 68 others take U+0100, U+0101, ... in order.
    """
    symbols, spare = [], 0x100
    for value in range(256):
        if 0x21 <= value <= 0x7E or (0xA1 <= value <= 0xFF and value != 0xAD):
            symbols.append(chr(value))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols


class Tokenizer:
    """Text to ids and back.

    size:        the last id + 1. The model's embedding may have more rows; they mean nothing and must not be sampled.
    special_ids: ids of the control tokens, which are no part of an answer's text, such as <|user|>. Tags
                 such as <think> and <tool_call> are single tokens too, but not special: decoding keeps them.
    eos_token_id: the end-of-sequence token that tokenizer_config.json names, or None.
    """

    def __init__(self, library: tokenizers.Tokenizer, special_ids: Iterable[int], eos_token_id: int | None = None):
        # tokenizer.json may ask for truncation or padding, as in training; a prompt must be encoded as it is
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._bytes = _bytes_by_id(library)
        self.special_ids = frozenset(special_ids)
        self.eos_token_id = eos_token_id
        self.size = max(self._bytes, default=-1) + 1
        self._longest = max(map(len, self._bytes.values()), default=0)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read tokenizer.json in `directory`. In tokenizer_config.json, if it is there, the list of added tokens
        matters: it must agree about their ids, and says which of them are special; and the end-of-sequence token.

        Raises CheckpointError if a file is missing, unreadable or not byte-level, or if the two disagree.
        """
        path = Path(directory) / "tokenizer.json"
        try:
            content = read_bytes(path, MAX_TOKENIZER)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist",
                "a checkpoint directory with the tokenizer of its model, in Hugging Face's format",
                f"copy tokenizer.json from the model's repository into {directory}",
            ) from None
        with _problems_of_the_library(
            lambda problem: CheckpointError(
                f"{path} cannot be read: {problem}",
                "a tokenizer.json as the `tokenizers` library writes it",
                "download the file again; compare its size with the one in the model's repository",
            )
        ):
            library = tokenizers.Tokenizer.from_buffer(content)
        special = {id for id, token in library.get_added_tokens_decoder().items() if token.special}
        configured = Path(directory) / "tokenizer_config.json"
        config = read_optional_json(configured, "the tokenizer's configuration")
        for id, name, is_special in _configured_tokens(config, configured):
            _agree(library, id, name, path)
            (special.add if is_special else special.discard)(id)
        return cls(library, special, _eos(library, config.get("eos_token"), configured))

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Ids of `text`; names of added tokens inside it (<|user|>, <think>, /nothink, ...) become those tokens.

        `add_special_tokens`: let the file's post-processor add what it adds. A rendered chat template already has it.
        `max_tokens`: a text of more bytes than so many of the longest tokens have is refused before it is encoded.
        Raises RequestError if the text holds half a surrogate pair, which no UTF-8 can express; if it has more than
        MAX_CHARACTERS; or if the library fails on it: long runs of spaces make its regular expressions give up.
        """
        self._check_text(text, max_tokens)
        return self._encode(self._library, text, add_special_tokens)

    def _check_text(self, text: str, max_tokens: int | None) -> None:
        """RequestError as `encode`, before the library sees the text."""
        if len(text) > MAX_CHARACTERS or (max_tokens is not None and len(text) > max_tokens * self._longest):
            most = MAX_CHARACTERS if max_tokens is None else min(MAX_CHARACTERS, max_tokens * self._longest)
            tokens = "" if max_tokens is None else f", and of {max_tokens} tokens"
            raise RequestError(
                "prompt",
                f"a prompt of {len(text)} characters",
                f"at most {most} characters{tokens}",
                "shorten the prompt",
            )
        if not is_unicode(text):
            place = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise RequestError(
                "text",
                f"character {place} is U+{ord(text[place]):04X}, half of a surrogate pair",
                "Unicode text",
                "send the whole character; in JSON both halves, such as \\ud83d\\ude00",
            )

    def _encode(self, library: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        """What the library makes of a text that has been checked; RequestError if it fails."""
        with _problems_of_the_library(
            lambda problem: RequestError(
                "text",
                f"the tokenizer fails on a text of {len(text)} characters: {problem}",
                "a text that the tokenizer can encode",
                "shorten the text, above all runs of millions of equal characters",
            )
        ):
            if len(text) > LONG:  # only this call lets other threads of the interpreter run meanwhile
                [encoding] = library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                encoding = library.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
            return ids

    @property
    def base_size(self) -> int:
        """How many tokens the vocabulary has without added ones."""
        return self._library.get_vocab_size(with_added_tokens=False)

    def vocabulary(self) -> dict[str, int]:
        """{name: id} of all tokens, under the names that tokenizer.json gives them."""
        return self._library.get_vocab(with_added_tokens=True)

    @cached_property
    def added_names(self) -> frozenset[str]:
        """Names of the added tokens, which `encode` takes for these tokens wherever they stand."""
        return frozenset(token.content for token in self._library.get_added_tokens_decoder().values())

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of the added tokens, which no text is encoded to by chance."""
        return frozenset(self._library.get_added_tokens_decoder())

    def encode_plain(self, text: str) -> list[int]:
        """`encode` where names of added tokens are text, and nothing is added."""
        return self._encode(self._plain, text, False)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same without added tokens: their names are letters."""
        content = json.loads(self._library.to_str()) | {"added_tokens": [], "post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def encode_marked(self, text: str, mark: str, max_tokens: int | None = None) -> list[int]:
        """`encode` of a text in which `mark` stands within the names that are text; the marks are left out."""
        self._check_text(text, max_tokens)
        names = re.compile("|".join(map(re.escape, sorted(self.added_names, key=len, reverse=True))) or "(?!)")
        ids: list[int] = []
        at = 0
        for name in names.finditer(text):
            ids += self._encode(self._plain, text[at : name.start()].replace(mark, ""), False)
            ids += self._encode(self._library, name[0], False)
            at = name.end()
        return ids + self._encode(self._plain, text[at:].replace(mark, ""), False)

    def spellings(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Ids of each word at the beginning of a text; and after a space, where its first token is another then.

        These are the sequences that vLLM forbids for bad_words.
        """
        found: list[tuple[int, ...]] = []
        for word in words:
            begins, follows = (tuple(self.encode(space + (word.lstrip() or word), False)) for space in ("", " "))
            found.append(begins)
            if len(follows) == len(begins) and follows[0] != begins[0]:
                found.append(follows)
        return tuple(dict.fromkeys(found))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Raises RequestError for an id that the vocabulary does not have."""
        return self.join(ids, skip_special_tokens).decode(errors="replace")

    def join(self, ids: Iterable[int], skip_special_tokens: bool) -> bytes:
        """The bytes of `ids`, one after another. Raises RequestError for an id that the vocabulary does not have."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(id) for id in ids if id not in skipped)

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for; none for a gap in the vocabulary. RequestError if `id` is not below size."""
        if 0 <= id < self.size:
            return self._bytes.get(id, b"")
        raise RequestError(
            "token_ids",
            f"token id {id}",
            f"ids of the vocabulary, 0 to {self.size - 1}",
            "encode the text with this model's own tokenizer",
        )

    def token_to_id(self, token: str) -> int | None:
        """Id of a token under the name that tokenizer.json gives it, or None."""
        return self._library.token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        """Name of a token in tokenizer.json (bytes spelt in its own alphabet), or None."""
        return self._library.id_to_token(id) if 0 <= id < self.size else None


class Detokenizer:
    """Ids to text as they arrive. What push() and flush() return, joined, is decode() of all the ids.

    A character split over tokens is held until its last byte is here; bytes that cannot become a character are returned
    as U+FFFD. At most three bytes are held. Each token costs its own bytes and nothing of what came before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete. Raises RequestError for an id that the vocabulary does not have."""
        return self._utf8.decode(self._tokenizer.join(ids, self._skip_special_tokens))

    def flush(self) -> str:
        """No more ids will come: U+FFFD if a character was left unfinished, else nothing."""
        return self._utf8.decode(b"", final=True)


@contextmanager
def _problems_of_the_library(error: Callable[[str], GlimmerError]) -> Iterator[None]:
    """Whatever the library raises becomes error(message). A panic of its Rust code is no Exception, only a
    BaseException, and it has no class that could be imported."""
    try:
        yield
    except Exception as problem:
        raise error(f"{problem}"[:500]) from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise error(f"{problem}"[:500]) from problem


def _eos(library: tokenizers.Tokenizer, token: Any, path: Path) -> int | None:
    """Id of "eos_token" in tokenizer_config.json: null, a text, or an object with its content."""
    name = token.get("content") if isinstance(token, dict) else token
    if name is None:
        return None
    id = library.token_to_id(name) if isinstance(name, str) else None
    if id is None:
        raise CheckpointError(
            f"eos_token in {path} is {shown(token)}, which is no token of tokenizer.json",
            'the name of a token, or {"content": its name}',
            "use the tokenizer.json and tokenizer_config.json of one model",
        )
    return id


def _bytes_by_id(library: tokenizers.Tokenizer) -> dict[int, bytes]:
    """What each token stands for. Raises CheckpointError if the vocabulary is not byte-level."""
    byte_of = {symbol: value for value, symbol in enumerate(byte_symbols())}
    table = {}
    for token, id in library.get_vocab(with_added_tokens=False).items():
        try:
            table[id] = bytes(map(byte_of.__getitem__, token))
        except KeyError as error:
            raise CheckpointError(
                f"tokenizer.json has token {token!r} (id {id}), and {error.args[0]!r} stands for no byte",
                "a byte-level BPE vocabulary, which every GLM-4.5, 4.6 and 4.7 checkpoint has",
                "use the tokenizer.json of the model itself",
            ) from error
    # Added tokens are matched as plain text, so plain text is what they stand for.
    table.update((id, token.content.encode()) for id, token in library.get_added_tokens_decoder().items())
    return table


def _configured_tokens(config: dict[str, Any], path: Path) -> list[tuple[int, str, bool]]:
    """(id, name, special) of the added tokens that tokenizer_config.json lists, by id."""
    try:
        listed = config.get("added_tokens_decoder") or {}
        return sorted(
            (int(id), str(token["content"]), bool(token.get("special", False))) for id, token in listed.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            'a JSON object whose "added_tokens_decoder" maps ids to {"content": ..., "special": ...}',
            "download the file again, or remove it: tokenizer.json alone is enough",
        ) from error


def _agree(library: tokenizers.Tokenizer, id: int, name: str, path: Path) -> None:
    """Raise CheckpointError unless token `name` has the id that tokenizer_config.json gives it."""
    found = library.token_to_id(name)
    if found != id:
        raise CheckpointError(
            f"{path} has {name!r} as {'no token' if found is None else f'id {found}'}, tokenizer_config.json as {id}",
            "two files from the same model",
            "download both files again; if tokenizer.json is known to be right, remove tokenizer_config.json",
        )
