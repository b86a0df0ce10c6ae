"""Tokenizer and Detokenizer, on real files. The judge of decoding is the `tokenizers` library itself."""

import json
import shutil
import threading
import time

import pytest
import tokenizers
from checkpoints import write_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from protocol import GLM_ADDED_TOKENS

from glimmer.errors import CheckpointError, RequestError
from glimmer.text.tokenizer import Detokenizer, Tokenizer

SIZE = 256 + 2000 + 36
FIRST_ADDED = 256 + 2000
# Whole vocabulary, and again the bytes that begin and continue characters, so that broken and split ones are common.
IDS = st.one_of(st.integers(0, SIZE - 1), st.integers(0x80, 0xF8), st.sampled_from([0xEF, 0xBF, 0xBD, 0xF0, 0x9F]))
# Names of added tokens are text like any other, until they are encoded.
TEXTS = st.lists(st.one_of(st.text(), st.sampled_from(sorted(GLM_ADDED_TOKENS)))).map("".join)


def cut(items, sizes):
    """`items` in pieces of the given sizes, the last piece being what is left."""
    for size in sizes:
        yield items[:size]
        items = items[size:]
    yield items


# ── encode ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_vocabulary_ends_after_the_last_added_token(tokenizer):
    assert tokenizer.size == SIZE
    assert tokenizer.token_to_id("<|endoftext|>") == FIRST_ADDED
    assert tokenizer.token_to_id("<|video|>") == SIZE - 1
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(SIZE - 1) == "<|video|>"
    assert tokenizer.id_to_token(SIZE) is None and tokenizer.id_to_token(-1) is None


@pytest.mark.parametrize("name", GLM_ADDED_TOKENS)
def test_an_added_token_in_the_text_is_one_token(tokenizer, name):
    id = tokenizer.token_to_id(name)
    assert tokenizer.encode(f"a{name}b", add_special_tokens=False) == [ord("a"), id, ord("b")]
    assert (id in tokenizer.special_ids) == GLM_ADDED_TOKENS[name]


def test_a_rendered_prompt_is_encoded_token_by_token(tokenizer):
    names = ["[gMASK]", "<sop>", "<|user|>", "\n", "H", "i", "/nothink", "<|assistant|>", "\n", "<think>", "</think>"]
    assert tokenizer.encode("".join(names), add_special_tokens=False) == [
        tokenizer.token_to_id(name) if name in GLM_ADDED_TOKENS else ord(name) for name in names
    ]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("Hello, world!", ["Hello", ",", " world", "!"]),
        ("it's I'LL", ["it", "'s", " I", "'LL"]),
        ("12345 x", ["123", "45", " x"]),
        ("a\n\n  b", ["a", "\n\n", " ", " b"]),
        ("x  \n y", ["x", "  \n", " y"]),
    ],
)
def test_glm_s_pre_tokeniser_cuts_like_this(library, text, pieces):
    split = library.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


@settings(deadline=None)
@given(text=TEXTS)
def test_what_is_encoded_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True), skip_special_tokens=False) == text


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(RequestError, match=r"character 2 is U[+]D83D") as caught:
        tokenizer.encode("ab\ud83d", add_special_tokens=False)
    assert caught.value.field == "text"


def test_the_file_s_post_processor_runs_only_when_asked(directory, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    prefix = ["[gMASK]", "<sop>"]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join([*prefix, "$A"]), special_tokens=[(name, library.token_to_id(name)) for name in prefix]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a", add_special_tokens=True) == [*map(library.token_to_id, prefix), ord("a")]
    assert tokenizer.encode("a", add_special_tokens=False) == [ord("a")]


def test_truncation_and_padding_in_the_file_do_not_touch_prompts(directory, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=5)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(library.encode("12345678").ids) == 5
    tokenizer = Tokenizer.load(tmp_path)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in ("1", "1 3 5 7")] == [[49], list(b"1 3 5 7")]


# ── decode ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_special_tokens_are_skipped_and_tags_stay(tokenizer):
    ids = tokenizer.encode("<|assistant|>\n<think>x</think>/nothink<tool_call>f</tool_call><|user|>", False)
    assert tokenizer.decode(ids) == "\n<think>x</think><tool_call>f</tool_call>"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<|assistant|>\n<think>")


@settings(deadline=None)
@given(ids=st.lists(IDS), skip=st.booleans())
def test_decode_is_the_library_s_decode(library, tokenizer, ids, skip):
    assert tokenizer.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


def test_the_bytes_of_tokens(tokenizer):
    assert [tokenizer.token_bytes(id) for id in range(256)] == [bytes([value]) for value in range(256)]
    assert all(len(tokenizer.token_bytes(id)) == 2 for id in range(256, FIRST_ADDED))
    assert tokenizer.token_bytes(tokenizer.token_to_id("<think>")) == b"<think>"


@pytest.mark.parametrize("id", [-1, SIZE, 151364])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, id):
    for attempt in (
        tokenizer.token_bytes,
        lambda id: tokenizer.decode([65, id]),
        lambda id: Detokenizer(tokenizer).push([id]),
    ):
        with pytest.raises(RequestError, match=f"token id {id}") as caught:
            attempt(id)
        assert caught.value.field == "token_ids"


# ── Detokenizer ─────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(IDS), sizes=st.lists(st.integers(0, 4)), skip=st.booleans())
def test_any_cutting_of_the_ids_gives_the_same_text(tokenizer, ids, sizes, skip):
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(piece) for piece in cut(ids, sizes)]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@example([0xED, 0xA0])
@given(ids=st.lists(IDS))
def test_only_an_unfinished_character_is_held_back(tokenizer, ids):
    detokenizer, shown = Detokenizer(tokenizer), ""
    for n, id in enumerate(ids, start=1):
        shown += detokenizer.push([id])
        known = tokenizer.decode(ids[:n])
        # Decoding now would show the character whose last byte may be in the next token as one U+FFFD; as two, if its
        # two bytes so far are half of a surrogate pair, which Python's decoder only refuses at the third.
        assert known in (shown, shown + "\ufffd", shown + "\ufffd\ufffd")


def test_a_character_split_over_tokens_appears_with_its_last_byte(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([byte]) for byte in "北🙂".encode()] == ["", "", "北", "", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_a_genuine_replacement_character_is_text_like_any_other(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(list("a\ufffd".encode())) == "a\ufffd"
    assert detokenizer.push(list("\ufffdb".encode())) == "\ufffdb"


def test_bytes_that_cannot_become_a_character_are_let_go(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([0xFF]) == "\ufffd"
    assert detokenizer.push([0xE5]) == ""
    assert detokenizer.push([ord("x")]) == "\ufffdx"
    assert detokenizer.push([0xED, 0xA0, 0x80]) == "\ufffd\ufffd\ufffd"
    assert detokenizer.push([0xF0, 0x9F]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_every_id_is_looked_at_once():
    class Counting:
        looked_at = 0

        def join(self, ids, skip_special_tokens):
            self.looked_at += len(ids)
            return bytes(ids)

    counting = Counting()
    detokenizer = Detokenizer(counting)
    for byte in "北".encode() * 1000:
        detokenizer.push([byte])
    assert counting.looked_at == 3000


# ── load ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(directory):
    """The CheckpointError that loading `directory` raises, once it has been seen to have three parts."""
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(directory)
    assert caught.value.found and caught.value.expected and caught.value.todo
    return str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    assert str(tmp_path / "tokenizer.json") in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "BPE"'])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert f"{tmp_path / 'tokenizer.json'} cannot be read" in refused(tmp_path)


def test_a_vocabulary_that_is_not_byte_level_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0}, unk_token="▁a")).save(str(tmp_path / "tokenizer.json"))
    assert "'▁' stands for no byte" in refused(tmp_path)


def test_a_gap_in_the_vocabulary_stands_for_nothing(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 9}, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.size == 10
    assert tokenizer.decode([0, 1, 9]) == "ab"


def test_tokenizer_json_alone_is_enough(directory, tokenizer, tmp_path):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    assert Tokenizer.load(tmp_path).special_ids == tokenizer.special_ids


def edit_config(directory, edit):
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_tokenizer_config_decides_which_tokens_are_special(tmp_path):
    ids = write_tokenizer(tmp_path)

    def swap(config):
        config["added_tokens_decoder"][str(ids["<think>"])]["special"] = True
        config["added_tokens_decoder"][str(ids["/nothink"])]["special"] = False

    edit_config(tmp_path, swap)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("<think>a/nothink", False)) == "a/nothink"


@pytest.mark.parametrize(
    "name, message",
    [
        ("<|unheard of|>", "no token, tokenizer_config.json as 256"),
        ("<sop>", "id 260, tokenizer_config.json as 256"),
    ],
)
def test_two_files_that_disagree_are_refused(tmp_path, name, message):
    write_tokenizer(tmp_path)
    edit_config(tmp_path, lambda config: config["added_tokens_decoder"]["256"].update(content=name))
    assert repr(name) in refused(tmp_path) and message in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"added_tokens_decoder": [1]}',
        '{"added_tokens_decoder": {"1": {}}}',
        '{"added_tokens_decoder": {"x": {"content": "y"}}}',
        "[" * 100_000,
    ],
)
def test_a_broken_tokenizer_config_is_named(tmp_path, content):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert f"{tmp_path / 'tokenizer_config.json'} cannot be read" in refused(tmp_path)


@pytest.mark.slow
def test_long_texts_do_not_stop_other_threads(tokenizer):
    """They are encoded by another call of the library, with the same ids."""
    words = "hello <|user|> 世界  \n\n12345 " * 20_000
    gaps, done = [], threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not done.is_set():
            time.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    ids = tokenizer.encode(words, add_special_tokens=False)
    took = time.monotonic() - begin
    done.set()
    thread.join(10)
    assert ids == tokenizer._library.encode(words, add_special_tokens=False).ids
    assert max(gaps) < max(0.5, took / 2)


def test_texts_that_cannot_fit_are_refused_before_they_are_encoded(tokenizer):
    longest = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.size))
    assert len(tokenizer.encode("x" * 10 * longest, False, max_tokens=10)) > 0
    for text, most in (("x" * (10 * longest + 1), 10), ("x" * (2**24 + 1), None)):
        with pytest.raises(RequestError) as caught:
            tokenizer.encode(text, False, max_tokens=most)
        assert caught.value.field == "prompt" and f"{len(text)} characters" in caught.value.found


def test_spellings_of_a_word_are_those_that_vllm_forbids(tokenizer):
    begins, follows = (tuple(tokenizer.encode(text, False)) for text in ("word", " word"))
    expected = {begins} | ({follows} if len(follows) == len(begins) and follows[0] != begins[0] else set())
    assert set(tokenizer.spellings(["word", " word"])) == expected
    assert tokenizer.spellings([" "]) == (tuple(tokenizer.encode(" ", False)), *tokenizer.spellings([" "])[1:])
    assert tokenizer.spellings([]) == ()
