"""IncrementalText and its stop strings, against a definition that looks at the whole text after every character."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer.errors import RequestError
from glimmer.text.incremental import IncrementalText, StopSearch
from glimmer.text.tokenizer import Detokenizer

# Few characters, of one to four bytes, so that stop strings overlap, repeat themselves and split characters.
ALPHABET = "ab北🙂\ufffd"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)
BYTES = st.sampled_from(sorted(set(ALPHABET.encode())))


def first_stop(text, stop):
    """(end, stop string) of the first one to be complete, the longest if several are; None if there is none."""
    for end in range(len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return end, max(complete, key=len)
    return None


def beginning_of_a_stop(text, stop):
    """The longest end of `text` that is a beginning, and not the whole, of a stop string."""
    ends = [text[i:] for i in range(len(text) + 1)]
    return next(end for end in ends if not end or any(word.startswith(end) and word != end for word in stop))


def run(tokenizer, pieces, stop=(), **options):
    """Push all pieces: (everything that was returned, the IncrementalText)."""
    reply = IncrementalText(tokenizer, list(stop), **options)
    shown = "".join([reply.push(piece) for piece in pieces])
    return shown + reply.finish(), reply


def bytewise(text):
    return [[byte] for byte in text.encode()]


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, stop, shown, stopped",
    [
        ("hello", [], "hello", None),
        ("", ["x"], "", None),
        ("hello", ["x"], "hello", None),
        ("hello", ["l"], "he", "l"),
        ("hello", ["hello"], "", "hello"),
        ("hello", ["hellooo"], "hello", None),
        ("aab", ["ab"], "a", "ab"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcd", ["abcd", "bc"], "a", "bc"),
        ("abcd", ["bc", "abc", "c"], "", "abc"),
        ("abx", ["abc", "bx"], "a", "bx"),
        ("xyab", ["ab", "xy"], "", "xy"),
        ("ababac", ["abac"], "ab", "abac"),
        ("今日は北京", ["北"], "今日は", "北"),
        ("今日は北京", ["日は"], "今", "日は"),
        ("a\n\nb", ["\n\n"], "a", "\n\n"),
        ("🙂🙃", ["🙃"], "🙂", "🙃"),
    ],
)
def test_the_first_stop_string_to_be_complete_cuts_the_text(tokenizer, text, stop, shown, stopped):
    for pieces in (bytewise(text), [list(text.encode())]):
        got, reply = run(tokenizer, pieces, stop)
        assert (got, reply.text, reply.stopped) == (shown, shown, stopped)
        got, reply = run(tokenizer, pieces, stop, include_stop_str_in_output=True)
        assert (got, reply.stopped) == (shown + (stopped or ""), stopped)


def test_text_is_held_only_while_it_may_become_a_stop_string(tokenizer):
    reply = IncrementalText(tokenizer, ["</s>", "stop"])
    shown = [reply.push([ord(c)]) for c in "a<b</ss</stx"]
    assert shown == ["a", "", "<b", "", "", "", "</s", "s", "", "", "</", "stx"]


def test_a_stop_string_that_is_shown_anyway_delays_nothing(tokenizer):
    reply = IncrementalText(tokenizer, ["stop"], include_stop_str_in_output=True)
    assert [reply.push([ord(c)]) for c in "a stop!"] == ["a", " ", "s", "t", "o", "p", ""]
    assert reply.text == "a stop"


def test_after_a_stop_string_nothing_more_is_taken_in(tokenizer):
    reply = IncrementalText(tokenizer, ["b"])
    assert reply.push(list(b"abcabc")) == "a"
    assert (reply.used, reply.stopped) == (2, "b")
    assert reply.push(list(b"more")) == "" and reply.finish() == "" and reply.finish() == ""
    assert reply.push(list(b"late")) == ""
    assert (reply.used, reply.text) == (2, "a")


def test_ids_are_counted_up_to_the_one_that_completes_the_stop_string(tokenizer):
    assert [run(tokenizer, [list(b"abcdef")], stop)[1].used for stop in ([], ["a"], ["cd"], ["x"])] == [6, 1, 4, 6]


def test_a_broken_character_at_the_end_may_complete_a_stop_string(tokenizer):
    broken = [ord("a"), 0xE5, 0x8C]
    assert run(tokenizer, [broken])[0] == "a\ufffd"
    shown, reply = run(tokenizer, [broken], ["\ufffd"])
    assert (shown, reply.stopped) == ("a", "\ufffd")


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    "minimum, shown, used",
    [(0, "ab", 4), (3, "ab", 4), (4, "abxyab", 8), (7, "abxyab", 8), (8, "abxyabxyz", 9)],
)
def test_stop_strings_count_after_min_tokens(tokenizer, minimum, shown, used, include):
    """One whose last character comes later counts, though it begins earlier."""
    ids = list(b"abxyabxyz")
    for cutting in ([[id] for id in ids], [ids], [ids[:5], ids[5:]]):
        text, reply = run(tokenizer, cutting, ["xy"], include_stop_str_in_output=include, min_tokens=minimum)
        assert text == reply.text == shown + ("xy" if include and used < 9 else "")
        assert (reply.used, reply.stopped) == (used, "xy" if used < 9 else None)


def test_a_prefix_is_shown_first_and_never_searched(tokenizer):
    reply = IncrementalText(tokenizer, ["ab"], prefix="ab a")
    assert reply.text == ""
    assert [reply.push([]), reply.push([]), reply.push(list(b"bcab"))] == ["ab a", "", "bc"]
    assert (reply.text, reply.stopped) == ("ab abc", "ab")
    assert run(tokenizer, [], prefix="alone")[0] == "alone"


def test_special_tokens_are_text_only_when_asked(tokenizer):
    ids = tokenizer.encode("a<|user|>b<think>", add_special_tokens=False)
    assert run(tokenizer, [ids])[0] == "ab<think>"
    assert run(tokenizer, [ids], ["<|user|>"])[1].stopped is None
    assert run(tokenizer, [ids], ["<|user|>"], skip_special_tokens=False)[0] == "a"
    assert run(tokenizer, [ids], ["<think>"])[0] == "ab"


@pytest.mark.parametrize("stop", ["ab", [""], ["a", ""], [1], None, [None], [["a"]], {"a": 1}])
def test_stop_must_be_a_list_of_texts(tokenizer, stop):
    with pytest.raises(RequestError) as caught:
        IncrementalText(tokenizer, stop)
    assert caught.value.field == "stop" and repr(stop) in caught.value.found


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(BYTES | st.integers(0, 2291), max_size=30),
    stop=STOPS,
    include=st.booleans(),
    sizes=st.lists(st.integers(0, 5)),
)
def test_any_cutting_of_the_ids_gives_the_defined_answer(tokenizer, ids, stop, include, sizes):
    whole = tokenizer.decode(ids)
    hit = first_stop(whole, stop)
    expected = whole if hit is None else whole[: hit[0] if include else hit[0] - len(hit[1])]

    pieces = [ids[start:end] for start, end in pairwise([0, *accumulate(sizes), None])]
    runs = [
        run(tokenizer, cutting, stop, include_stop_str_in_output=include)
        for cutting in ([[id] for id in ids], pieces, [ids])
    ]
    for shown, reply in runs:
        assert (shown, reply.text) == (expected, expected)
        assert reply.stopped == (hit and hit[1])
        assert reply.used == runs[0][1].used


@settings(max_examples=150, deadline=None)
@given(text=st.text(ALPHABET, max_size=20), stop=STOPS)
def test_all_is_shown_but_a_beginning_of_a_stop_string(tokenizer, text, stop):
    reply = IncrementalText(tokenizer, stop)
    for n, character in enumerate(text, start=1):
        reply.push(list(character.encode()))
        if reply.stopped is not None:
            break
        assert reply.text + beginning_of_a_stop(text[:n], stop) == text[:n]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(BYTES | st.integers(0, 2291), max_size=30),
    stop=STOPS,
    include=st.booleans(),
    minimum=st.integers(0, 12),
    sizes=st.lists(st.integers(0, 5)),
)
def test_stop_strings_that_end_within_min_tokens_do_not_count(tokenizer, ids, stop, include, minimum, sizes):
    detokenizer = Detokenizer(tokenizer)
    texts = [detokenizer.push([id]) for id in ids]
    last = detokenizer.flush()
    whole = "".join(texts) + last
    start = len(whole) if len(ids) <= minimum else len("".join(texts[:minimum]))  # stop strings count that end after it
    hits = [(end, word) for end in range(start + 1, len(whole) + 1) for word in stop if whole[:end].endswith(word)]
    end, word = min(hits, key=lambda hit: (hit[0], -len(hit[1]))) if hits else (len(whole), None)
    expected = whole[: end if include or word is None else end - len(word)]

    pieces = [ids[start:end] for start, end in pairwise([0, *accumulate(sizes), None])]
    for cutting in ([[id] for id in ids], pieces, [ids]):
        options = {"include_stop_str_in_output": include, "min_tokens": minimum}
        reply = IncrementalText(tokenizer, stop, **options)
        for piece in cutting:
            reply.push(piece)
            assert expected.startswith(reply.text)  # what is shown is never taken back
        reply.finish()
        assert (reply.text, reply.stopped) == (expected, word)


@settings(max_examples=150, deadline=None)
@given(text=st.text(ALPHABET, max_size=20), stop=STOPS)
def test_only_a_beginning_of_a_stop_string_is_held_back_before_min_tokens(tokenizer, text, stop):
    reply = IncrementalText(tokenizer, stop, min_tokens=100)
    for n, character in enumerate(text, start=1):
        reply.push(list(character.encode()))
        assert reply.text + beginning_of_a_stop(text[:n], stop) == text[:n]


def test_answers_to_one_prompt_share_the_states_of_their_search():
    words = ["a" * 8000, "b" * 8000]
    one, other = StopSearch(words), StopSearch(list(words))
    assert one._automaton is other._automaton
    assert one.advance("a" * 7999, 0) is None and other.advance("b", 0) is None
    assert (one.depth, other.depth) == (7999, 1) and one.advance("a", 0) == (1, words[0])


def test_the_search_takes_time_in_proportion_to_the_text():
    class Counting(str):
        looked_at = 0

        def __getitem__(self, index):
            Counting.looked_at += 1
            return super().__getitem__(index)

    # After each run of a's the search must find out that no shorter run will do either.
    text = Counting(("a" * 49 + "c") * 20)
    assert StopSearch(["a" * 50 + "b"]).advance(text, 0) is None
    assert Counting.looked_at <= 4 * len(text)
