"""The MTP layer and the look-up as drafters of real models: the same answers as without, in fewer steps."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from glimmer import LLM, SamplingParams
from glimmer.backends.base import KVCacheSpec
from glimmer.batch import Batch
from glimmer.engine import runner
from glimmer.engine.draft import KEEP, RECENT, TokenIndex
from glimmer.errors import CheckpointError, NotEnoughMemory

DEMO = Path(__file__).resolve().parents[2] / "glimmer/demo"
SMALL = {"max_model_len": 160, "max_num_seqs": 8, "dtype": "float32", "device": "cpu"}
HOW: dict[str, dict[str, str | int]] = {
    "auto": {},
    "off": {"method": "off"},
    "mtp 1": {"method": "mtp", "num_speculative_tokens": 1},
    "mtp 3": {"method": "mtp", "num_speculative_tokens": 3},
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2},
}


@pytest.fixture(scope="module")
def demo():
    """demo(how, **settings) -> LLM of the demo model."""
    made: dict[str, LLM] = {}

    def make(how: str, **settings) -> LLM:
        key = f"{how} {settings}"
        if key not in made:
            made[key] = LLM(str(DEMO), speculative_config=HOW[how], **SMALL | settings)
        return made[key]

    yield make
    for llm in made.values():
        llm.close()


def shown(outputs) -> list:
    return [[(o.token_ids, o.finish_reason, o.logprobs, o.text) for o in output.outputs] for output in outputs]


def asked(llm: LLM) -> tuple[list, list[SamplingParams]]:
    """Prompts and parameters of many kinds."""
    source = random.Random(3)
    user = lambda text: llm.render([{"role": "user", "content": text}])
    prompts = [user("What is 12 + 30?"), user("What is the capital of Japan?"), user("Say it again: one two one two")]
    prompts += [{"prompt_token_ids": [source.randrange(250) for _ in range(n)]} for n in (1, 40, 90, 20)]
    params = [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=1, seed=5, max_tokens=40, logprobs=2, n=2),
        SamplingParams(temperature=0, max_tokens=60, repetition_penalty=1.2, stop=["two"]),
        SamplingParams(temperature=1.5, seed=1, max_tokens=30, ignore_eos=True, top_p=0.9, presence_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=50, min_tokens=10, logit_bias={65: 3.0}, stop_token_ids=[32]),
        SamplingParams(temperature=0, max_tokens=None, ignore_eos=True),
        SamplingParams(temperature=1, seed=2, max_tokens=30, structured_outputs={"regex": "[0-9]{3}-(ab)*[a-z]{12}"}),
    ]
    return prompts, params


PLACES = {
    "alone": {},
    "chunks": {"max_num_batched_tokens": 24, "enable_prefix_caching": False},
    "preempted": {"kv_cache_memory_bytes": 1_000_000},  # too small for all
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, place",
    [
        ("mtp 1", "alone"), ("mtp 3", "alone"), ("ngram", "alone"), ("auto", "alone"), ("mtp 3", "chunks"),
        ("mtp 3", "preempted"), ("ngram", "preempted"),
    ],
)  # fmt: skip
def test_the_same_answers(how, place, demo):
    settings = PLACES[place]
    plain, drafting = demo("off", **settings), demo(how, **settings)
    prompts, params = asked(plain)
    for _ in range(2):  # the second time with prefixes from the first
        assert shown(drafting.generate(prompts, params)) == shown(plain.generate(prompts, params))
    stats = drafting._engine.stats
    assert stats.num_accepted_tokens > 0 and stats.num_tokens == stats.num_steps + stats.num_accepted_tokens
    if place == "preempted":
        assert drafting._engine.scheduler.preemptions > 0
    drafting._engine.scheduler.blocks.check([])


@pytest.mark.slow
def test_the_mtp_layer_guesses_well(demo):
    """The demo model's first guess is right nearly always, also where a prompt's beginning is in the cache, where it
    comes in chunks, and where several sequences share a step."""
    questions = ["What is 12 + 30?", "What is the capital of Japan?", "What is 7 + 85?"]
    for settings in ({}, {"max_num_batched_tokens": 7}):
        llm = demo("mtp 1", **settings)
        prompts = [llm.render([{"role": "user", "content": text}]) for text in questions]
        for together in (prompts[:1], prompts, prompts):
            before = llm._engine.stats.num_accepted_tokens, llm._engine.stats.num_draft_tokens
            llm.generate(together, SamplingParams(temperature=0, max_tokens=60))
            accepted, drafted = llm._engine.stats.num_accepted_tokens, llm._engine.stats.num_draft_tokens
            assert drafted - before[1] >= 10 and accepted - before[0] >= 0.95 * (drafted - before[1])


class Watched:
    """A model that notes what the MTP layer is given."""

    def __init__(self, runner):
        self.runner, self.seen = runner, []

    def draft(self, hidden, batch):
        self.seen.append((hidden.clone(), batch))
        return self.runner.draft(hidden, batch)

    def draft_chain(self, hidden, batch, vocab_size):
        return self.runner.draft_chain(hidden, batch, vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0, 5, 30])
def test_each_row_pairs_a_hidden_state_with_the_next_token(pause, demo, monkeypatch):
    """What the cache of the layer holds at the end is what the whole answer at once would give it; also where no drafts
    are made until so many steps are over: rows are missing only in blocks before those of the latest steps."""
    llm = demo("mtp 3", max_num_batched_tokens=11, enable_prefix_caching=False)
    drafter, computing = llm._engine.drafter, llm._runner
    source, steps = drafter.source, itertools.count()
    monkeypatch.setattr(drafter, "choose", lambda *_: 3 if next(steps) >= pause else KEEP)
    source.model = watched = Watched(computing)
    try:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        [output] = llm.generate(llm.render([{"role": "user", "content": "What is 31 + 15?"}]), params)
    finally:
        source.model = computing
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    pairs: dict[int, tuple] = {}
    for hidden, batch in watched.seen:
        for position, token, state in zip(batch.positions.tolist(), batch.tokens.tolist(), hidden):
            pairs[position] = token, state  # the true row is written after those of guesses
    last, begin = len(tokens) - 2, min(pairs)
    first = len(watched.seen[0][0])  # rows that the layer began with
    assert begin % 16 == 0 and (RECENT - 15 <= first <= 2 * RECENT if pause else begin == 0)
    assert [pairs[p][0] for p in range(begin, last)] == tokens[begin + 1 : last + 1]
    c, blocks = llm.model_config, len(tokens) // 16 + 1
    spec = KVCacheSpec(c.num_hidden_layers + 1, 16, c.num_key_value_heads, c.head_dim, torch.float32)
    kv = computing.backend.allocate_kv(spec, blocks)
    batch = Batch.of(tokens[:last], range(last), range(last), [range(blocks)], [0], [last], [last])
    with torch.inference_mode(), computing.running():
        whole = computing.model(batch, kv)
    assert all(torch.equal(pairs[p][1], whole[p]) for p in range(begin, last))


def test_the_index_finds_what_a_search_finds():
    for seed in range(200):
        source = random.Random(seed)
        shortest = source.randint(1, 4)
        longest = shortest + source.randint(0, 4)
        index, tokens = TokenIndex(longest, shortest), []
        for _ in range(40):
            new = [source.randint(0, 2) for _ in range(source.randint(1, 4))]
            index.extend(tokens, tuple(new))
            tokens += new
            count = source.randint(1, 5)
            if source.random() < 0.7:
                assert index.following(count) == searched(tokens, longest, shortest, count)


def searched(tokens: list[int], longest: int, shortest: int, count: int) -> list[int]:
    """The definition of TokenIndex.following, in time that grows with the tokens."""
    size = len(tokens)
    ends = [end for end in range(size - 1, shortest - 1, -1) if tokens[end - shortest : end] == tokens[-shortest:]]
    same = lambda end: next(
        (n for n in range(longest) if n >= end or tokens[end - 1 - n] != tokens[size - 1 - n]), longest
    )
    best = max(ends[: TokenIndex.MAX_COMPARED], key=same, default=None)
    if best is None:
        return []
    found = tokens[best : best + count]
    while len(found) < count:
        found.append(found[len(found) - (size - best)])
    return found


def test_a_look_up_saves_steps(demo):
    """A text that repeats itself is copied many tokens at a time."""
    llm = demo("ngram")
    prompt = llm.render([{"role": "user", "content": "What is the weather in Paris?"}])
    params = SamplingParams(temperature=0, max_tokens=60, logit_bias={65: 100.0}, ignore_eos=True)
    before = llm._engine.stats.num_steps
    [output] = llm.generate(prompt, params)
    assert output.outputs[0].token_ids == [65] * 60
    assert llm._engine.stats.num_steps - before <= 20


@pytest.mark.slow
def test_a_random_model_with_its_layer(checkpoint):
    """Drafts that are nearly always wrong, and a layer with an embedding and a head of its own, quantised too."""
    for stored, settings in (("full", {}), ("without_copies", {"quantization": "int4", "dtype": "bfloat16"})):
        directory = str(checkpoint(mtp=stored))
        prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (1, 17, 60)]
        params = [SamplingParams(temperature=t, seed=4, max_tokens=30, ignore_eos=True, logprobs=1) for t in (0, 1, 2)]
        found = {}
        for how in ("off", "mtp 3"):
            with LLM(directory, speculative_config=HOW[how], **SMALL | settings) as llm:
                found[how] = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(prompts, params)]
                drafted = llm.stats.num_draft_tokens
        assert found["off"] == found["mtp 3"] and drafted > 60


@pytest.mark.slow
def test_the_layer_is_left_out_where_memory_is_short(checkpoint, caplog):
    """By itself, with a word; where drafts are asked for, it is an error. The plan counts the layer and its cache."""
    directory, small = str(checkpoint(mtp="full")), {**SMALL, "max_num_batched_tokens": 64}
    with LLM(directory, **small) as whole, LLM(directory, speculative_config="off", **small) as plain:
        assert whole.drafts and len(whole._runner.kv) == len(plain._runner.kv) + 1
    caplog.clear()
    needed = {}
    for how in ("off", "mtp 1"):
        told: list[tuple[int, int]] = []
        with LLM(
            directory, speculative_config=HOW[how], on_load=lambda *now, told=told: told.append(now), **small
        ) as llm:
            spec = KVCacheSpec(len(llm._runner.kv), 16, llm.model_config.num_key_value_heads, 16, torch.float32)
            cache = runner.least_cache(llm.config, llm._runner.backend, spec)
            needed[how] = told[-1][1] + runner.activation_bytes(llm.config, llm.model_config) + cache
    between = (needed["off"] + needed["mtp 1"]) // 2
    assert needed["off"] < between
    with LLM(directory, max_memory_bytes=between, **small) as llm:
        assert not llm.drafts and llm._runner.model.mtp is None
    assert "MTP layer is left out" in caplog.text and "GiB needed" in caplog.text
    with pytest.raises(NotEnoughMemory):
        LLM(directory, speculative_config=HOW["mtp 1"], max_memory_bytes=between, **small)


def test_drafts_by_a_layer_that_is_not_there(checkpoint):
    with pytest.raises(CheckpointError, match="no MTP layer"):
        LLM(str(checkpoint()), speculative_config="mtp", **SMALL)
    with LLM(str(checkpoint()), **SMALL) as llm:
        assert not llm.drafts
