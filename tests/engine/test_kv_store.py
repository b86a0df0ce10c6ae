"""KV blocks on disk: what is read is what was written, whatever happened in between; answers are those computed."""

import os
import resource
import stat
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import pytest
from checkpoints import DEMO, tiny_checkpoint
from engine.scripted import next_token, scripted_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from glimmer import LLM, SamplingParams
from glimmer.engine import disk_cache
from glimmer.engine.kv_store import HEADER, KVStore
from glimmer.engine.sequence import Request
from glimmer.errors import ConfigError

BLOCKS, BYTES = 2, 48
PAGE = HEADER + BLOCKS * BYTES


def checksum(data: memoryview) -> bytes:
    return blake2b(data, digest_size=32).digest()


def store(directory: Path, pages: int = 4, identity: str = "a model") -> KVStore:
    return KVStore(directory, identity, BLOCKS, BYTES, pages * PAGE, checksum)


def name(key: int) -> bytes:
    return blake2b(bytes([key]), digest_size=16).digest()


def content(key: int) -> memoryview:
    return memoryview(blake2b(b"content%d" % key, digest_size=BYTES).digest() * BLOCKS)


def put(kv: KVStore, key: int) -> bool:
    return kv.put(name(key), [key, 65535], content(key), lambda: True)


def get(kv: KVStore, key: int) -> bool:
    """Whether the page is there; if it is, it must be right."""
    memory = kv.memory()
    rows = kv.get(name(key), memory)
    assert rows in (None, [key, 65535])
    assert rows is None or memory[HEADER:PAGE] == content(key)
    return rows is not None


# ---- the store -----------------------------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1 << place % 8
    file.write_bytes(data)


def exchange(file: Path, place: int) -> None:
    """The page of another prefix under this name."""
    others = [other for other in sorted(file.parent.glob("*.kv")) if other != file and other.is_file()]
    file.write_bytes(others[place % len(others)].read_bytes() if others else b"")


def replace_by(make):
    def damage(file: Path, place: int) -> None:
        file.unlink()
        make(file)

    return damage


DAMAGE = {
    "flipped": flip,
    "exchanged": exchange,
    "short": lambda file, place: os.truncate(file, place % PAGE),
    "long": lambda file, place: os.truncate(file, PAGE + 1 + place),
    "zeros": lambda file, place: file.write_bytes(bytes(PAGE)),
    "pipe": replace_by(os.mkfifo),
    "link": replace_by(lambda file: file.symlink_to("/dev/zero")),
}
KEYS = st.integers(0, 7)
ACTIONS = st.one_of(
    st.tuples(st.just("put"), KEYS),
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("open"), KEYS),
    st.tuples(st.sampled_from(sorted(DAMAGE)), KEYS, st.integers(0, 4 * PAGE)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=30), st.integers(1, 8))
def test_what_is_read_is_what_was_written(tmp_path_factory, actions, limit):
    """Two processes' stores in one directory, one of them opened again and again; pages evicted and damaged."""
    directory = tmp_path_factory.mktemp("kv") / "pages"
    stores = [store(directory, limit), store(directory, limit)]
    foreign = stores[0].folder / "notes.txt"
    foreign.write_text("not ours")
    good: set[int] = set()  # may be there; what is not in here must not be
    for turn, (action, key, *place) in enumerate(actions):
        kv = stores[turn % 2]
        if action == "put":
            assert put(kv, key)
            good.add(key)
        elif action == "get":
            assert not get(kv, key) or key in good
        elif action == "open":
            stores[0] = store(directory, limit)
        elif kv.path(name(key)).is_file():
            before = kv.stats.damaged_files
            DAMAGE[action](kv.path(name(key)), *place)
            assert not get(kv, key) and kv.stats.damaged_files == before + 1
            assert not os.path.lexists(kv.path(name(key))), "a damaged page would keep a good one from being written"
            good.discard(key)
        there = list(kv.folder.glob("*.kv"))
        assert len(there) <= limit
    assert foreign.read_text() == "not ours"
    assert not list(stores[0].folder.glob("*.part"))


def test_the_longest_unused_goes_first(tmp_path):
    kv = store(tmp_path, pages=4)
    for key in range(4):
        assert put(kv, key)
    now = time.time_ns()
    for key in range(4):
        assert kv.use(name(key), now - 1000 * (key ^ 1))  # 1 is the latest, then 0, 3, 2
    assert put(kv, 4)
    assert [key for key in range(5) if get(kv, key)] == [0, 1, 4], "and some room is made at once"
    assert kv.stats.removed_files == 2 and not kv.use(name(2), now)


def test_only_its_owner_reads_it(tmp_path):
    before = os.umask(0)
    try:
        kv = store(tmp_path / "new" / "kv")
        assert put(kv, 1)
    finally:
        os.umask(before)
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert mode(kv.root) == mode(kv.folder) == 0o700 and mode(kv.path(name(1))) == 0o600


@pytest.mark.parametrize("kind", ["file", "written by others", "below a file"])
def test_a_directory_that_cannot_be_trusted_is_refused(tmp_path, kind):
    path = tmp_path / "kv"
    if kind == "written by others":
        path.mkdir()
        path.chmod(0o777)
    else:
        path.write_text("")
    with pytest.raises(ConfigError) as error:
        store(path / "kv" if kind == "below a file" else path)
    assert "kv_cache_dir" in error.value.found and str(tmp_path) in error.value.found


def test_a_limit_below_one_page_is_refused(tmp_path):
    with pytest.raises(ConfigError) as error:
        KVStore(tmp_path, "a model", BLOCKS, BYTES, PAGE - 1, checksum)
    assert f"at least {PAGE}" in error.value.expected


def test_other_models_pages_are_apart_but_count(tmp_path):
    one, other = store(tmp_path, 4), store(tmp_path, 4, "another model")
    assert put(one, 1) and not get(other, 1)
    os.rename(one.path(name(1)), other.path(name(1)))
    assert not get(other, 1) and other.stats.damaged_files == 1
    for key in range(4):
        assert put(one, key)
    assert put(other, 5) and len(list(tmp_path.glob("*/*.kv"))) <= 4


def test_what_changes_while_it_is_written_gets_no_name(tmp_path):
    kv = store(tmp_path)
    assert not kv.put(name(1), [1, 65535], content(1), lambda: False)
    assert list(kv.folder.iterdir()) == [] and not get(kv, 1) and kv.full is None


def test_what_killed_processes_have_left_is_removed_in_time(tmp_path):
    kv = store(tmp_path)
    old, new = (kv.folder / f".{name(key).hex()}.{key}.0.part" for key in (1, 2))
    for part in (old, new):
        part.write_text("half")
    os.utime(old, (0, 0))
    store(tmp_path)
    assert not old.exists() and new.exists()


def test_a_full_disk_is_said_once_and_ends_the_writing(tmp_path, caplog):
    kv = store(tmp_path)
    assert put(kv, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE - 1, hard))
    try:
        assert not put(kv, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not put(kv, 3) and len(caplog.records) == 1 and "no further KV blocks" in caplog.text
    assert get(kv, 1) and not get(kv, 2) and kv.full and len(list(kv.folder.iterdir())) == 1


# ---- the engine, over the scripted model ---------------------------------------------------------------------------


def drained(engine) -> None:
    """All that was to be written is written, as at the end of a process."""
    engine.close()
    engine.scheduler.blocks.check([])


def answers(engine, prompts, salts=None, tokens=6):
    """The answers, and how many tokens of each prompt were found."""
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=tokens)
        salt = salts[i] if salts else ""
        engine.add(Request(f"r{i}", tuple(prompt), params, "s", cache_salt=salt))
    found, cached, end = {i: [] for i in range(len(prompts))}, {}, time.monotonic() + 60
    while engine.busy:
        assert time.monotonic() < end
        for output in engine.step():
            i = int(output.request_id[1:])
            found[i] += output.token_ids
            cached[i] = output.num_cached_tokens
    return [found[i] for i in range(len(prompts))], [cached[i] for i in range(len(prompts))]


def expected(prompt, tokens=6):
    history = list(prompt)
    for _ in range(tokens):
        history.append(next_token(history))
    return history[len(prompt) :]


@pytest.fixture
def pages_of_two_blocks(monkeypatch):
    monkeypatch.setattr(disk_cache, "PAGE_TOKENS", 8)


def test_a_prompt_that_was_there_is_found_after_a_restart(tmp_path, pages_of_two_blocks):
    prompt = list(range(30))
    first = scripted_engine(kv_cache_dir=str(tmp_path))
    assert answers(first, [prompt]) == ([expected(prompt)], [0])
    drained(first)
    second = scripted_engine(kv_cache_dir=str(tmp_path))
    assert answers(second, [prompt, [*prompt, 3, 4]]) == ([expected(prompt), expected([*prompt, 3, 4])], [24, 28])
    assert second.runner.rows < 30 and second.disk.stats.hit_tokens == 24
    longer = prompt + expected(prompt) + [7, 8]  # the next turn of the conversation: the answer is there as well
    assert answers(second, [longer])[1][0] == 32, "from memory"
    third = scripted_engine(kv_cache_dir=str(tmp_path))
    drained(second)
    assert answers(third, [longer]) == ([expected(longer)], [32])
    drained(third)


def test_a_page_that_is_lost_ends_what_is_found(tmp_path, pages_of_two_blocks):
    prompt = list(range(40))
    first = scripted_engine(kv_cache_dir=str(tmp_path))
    answers(first, [prompt])
    drained(first)
    pages = sorted(tmp_path.glob("*/*.kv"), key=lambda path: -path.stat().st_mtime_ns)  # the beginning is the latest
    flip(pages[2], PAGE)
    second = scripted_engine(kv_cache_dir=str(tmp_path))
    assert answers(second, [prompt]) == ([expected(prompt)], [16])
    drained(second)
    assert second.disk.store.stats.damaged_files == 1
    third = scripted_engine(kv_cache_dir=str(tmp_path))
    assert answers(third, [prompt])[1] == [32], "what was damaged has been computed and written again"
    drained(third)


def test_salts_keep_prefixes_apart(tmp_path, pages_of_two_blocks):
    prompt = list(range(30))
    first = scripted_engine(kv_cache_dir=str(tmp_path))
    answers(first, [prompt], ["one tenant"])
    drained(first)
    second = scripted_engine(kv_cache_dir=str(tmp_path))
    assert answers(second, [prompt] * 3, ["", "another", "one tenant"])[1] == [0, 0, 24]
    drained(second)


def test_an_aborted_request_leaves_no_blocks_behind(tmp_path, pages_of_two_blocks):
    prompt = list(range(40))
    first = scripted_engine(kv_cache_dir=str(tmp_path))
    answers(first, [prompt])
    drained(first)
    second = scripted_engine(kv_cache_dir=str(tmp_path))
    params = SamplingParams(temperature=0, max_tokens=4)
    second.add(Request("r0", tuple(prompt), params, "s"))
    assert second.step() == [] and second.scheduler.reading
    assert second.abort("r0") and second.busy, "the readers may still write to its blocks"
    end = time.monotonic() + 60
    while second.busy:
        assert second.step() == [] and time.monotonic() < end
    drained(second)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_answers_are_the_same_whatever_is_on_disk(tmp_path_factory, data):
    """Restarts, small caches with preemption, a small directory, damage: each answer is that of the whole history."""
    directory = tmp_path_factory.mktemp("kv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_cache, "PAGE_TOKENS", data.draw(st.sampled_from([4, 8, 16])))
        seen: list[list[int]] = []
        for _ in range(data.draw(st.integers(2, 4))):
            settings = dict(kv_cache_size_bytes=data.draw(st.sampled_from([2000, 20_000, 1 << 20])))
            blocks = data.draw(st.integers(16, 40))
            engine = scripted_engine(num_blocks=blocks, kv_cache_dir=str(directory), **settings)
            prompts = []
            for _ in range(data.draw(st.integers(1, 5))):
                start = data.draw(st.sampled_from([[], *seen]))
                prompts.append((start + data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=30)))[:56])
            found, _ = answers(engine, prompts)
            assert found == [expected(prompt) for prompt in prompts]
            seen += [prompt + answer for prompt, answer in zip(prompts, found)]
            drained(engine)
            for page in data.draw(st.sets(st.sampled_from(sorted(directory.glob("*/*.kv")) or [None]), max_size=2)):
                if page is not None:
                    flip(page, data.draw(st.integers(0, 600)))


# ---- real models ---------------------------------------------------------------------------------------------------

SMALL = dict(max_model_len=1024, max_num_seqs=4, threads=1, kv_cache_memory_bytes=32 << 20)
TEXT = "Ben and Lily went to the park. They saw a big dog and a small cat, and they all played with a red ball. " * 20
PARAMS = dict(temperature=0, max_tokens=24, logprobs=2)
PROGRAM = f"""
import os, pathlib, signal, sys, time
from glimmer import LLM, SamplingParams
directory, how = sys.argv[1:]
llm = LLM({str(DEMO)!r}, kv_cache_dir=directory, **{SMALL!r})
(answer,) = llm.generate([{TEXT!r}], SamplingParams(**{PARAMS!r}))
print(answer.num_cached_tokens, answer.outputs[0].token_ids, answer.outputs[0].logprobs, sep="|", flush=True)
while how == "killed" and not list(pathlib.Path(directory).glob("*/*.kv")):
    time.sleep(0.001)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def said(answer) -> str:
    return f"{answer.outputs[0].token_ids}|{answer.outputs[0].logprobs}"


@pytest.mark.slow
def test_processes_find_what_others_have_written(tmp_path):
    """One is killed while it writes; the next answers from what there is, and writes the rest at its end."""
    with LLM(str(DEMO), **SMALL) as llm:
        (computed,) = llm.generate([TEXT], SamplingParams(**PARAMS))
    cached = []
    for how in ("killed", "ends", "ends"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == (-9 if how == "killed" else 0), done.stderr
        found, _, answer = done.stdout.strip().partition("|")
        assert answer == said(computed), "the same tokens, and every bit of their log-probabilities"
        cached.append(int(found))
    length = len(computed.prompt_token_ids)
    assert cached[0] == 0 and 128 <= cached[1] <= cached[2] == (length - 1) // 128 * 128


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [16, 5], ids=["kernels", "blocks of 5"])
def test_the_demo_models_longest_context(tmp_path, block_size):
    """The same answers from disk as computed; an int8 cache needs half as much of it.

    The same bits with our kernels. With blocks of 5 torch multiplies, whose last bits may depend on the number of rows.
    """
    written = {}
    for dtype in ("auto", "int8"):
        how = SMALL | dict(kv_cache_dir=tmp_path / dtype, kv_cache_dtype=dtype, block_size=block_size)
        ids = list(range(300, 1300))
        answers = []
        for _ in range(2):
            with LLM(str(DEMO), **how) as llm:
                answers += llm.generate([{"prompt_token_ids": ids}], SamplingParams(**PARAMS))
                page = llm.disk.page_tokens
        if block_size == 16:
            assert said(answers[0]) == said(answers[1])
        computed, found = (answer.outputs[0] for answer in answers)
        assert computed.token_ids == found.token_ids
        for one, other, i in zip(computed.logprobs, found.logprobs, computed.token_ids, strict=True):
            assert one[i].logprob == pytest.approx(other[i].logprob, abs=0.25)  # two units of a bf16 logit
        assert [answer.num_cached_tokens for answer in answers] == [0, 999 // page * page]
        assert llm.disk.hit_tokens == 999 // page * page and llm.disk.damaged_files == 0
        written[dtype] = llm.disk.stored_bytes
    assert 0.5 <= written["int8"] / written["auto"] < 0.6  # codes, and a scale for each head


def test_rows_of_the_mtp_layer_come_back(tmp_path):
    """Drafts after a restart are those that there would have been: their rows are kept with the blocks."""
    model = tiny_checkpoint(tmp_path / "model", dtype="float32", mtp="full")
    how = dict(max_model_len=512, max_num_seqs=2, threads=1, kv_cache_memory_bytes=8 << 20)
    how |= dict(speculative_config={"method": "mtp", "num_speculative_tokens": 2})
    prompt = {"prompt_token_ids": [i * 7 % 250 for i in range(400)]}
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    counts, answers = [], []
    for kind in ("computed", "memory", "disk"):
        with LLM(str(model), kv_cache_dir=None if kind == "computed" else tmp_path / "kv", **how) as llm:
            if kind == "memory":
                llm.generate([prompt], params)
            before = llm.stats.num_accepted_tokens, llm.stats.num_draft_tokens
            answers += llm.generate([prompt], params)
            counts.append((llm.stats.num_accepted_tokens - before[0], llm.stats.num_draft_tokens - before[1]))
    assert [answer.num_cached_tokens for answer in answers] == [0, 384, 384]
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) == 1
    assert counts[1] == counts[2]


@pytest.mark.slow
def test_what_another_model_or_setting_has_computed_is_not_found(tmp_path):
    """The bits of a block depend on weights, configuration, dtypes and quantisation, not on how many run beside it."""
    one = tiny_checkpoint(tmp_path / "one")
    how = dict(max_model_len=512, threads=1, kv_cache_memory_bytes=8 << 20, skip_tokenizer_init=True)
    prompt = {"prompt_token_ids": [i * 7 % 250 for i in range(300)]}

    def cached(model: Path, **settings) -> int:
        with LLM(model, kv_cache_dir=tmp_path / "kv", **how | settings) as llm:
            (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        return answer.num_cached_tokens

    assert cached(one) == 0
    for other in (dict(seed=1), dict(rope_theta=10_000), dict(dtype="float32")):
        assert cached(tiny_checkpoint(tmp_path / str(other), **other)) == 0, other
    for setting in (dict(quantization="int8"), dict(kv_cache_dtype="int8"), dict(dtype="float32"), dict(block_size=32)):
        assert cached(one, **setting) == 0, setting
    for setting in (dict(), dict(max_num_seqs=2, threads=2, max_num_batched_tokens=64, seed=5)):
        assert cached(one, **setting) == 256, setting
