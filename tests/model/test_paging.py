"""Experts that are read from the packed file: the bits of a model that is all in memory, and no wrong numbers."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from glimmer import LLM, SamplingParams
from glimmer.backends import selection
from glimmer.backends.files import PackedFiles
from glimmer.checkpoint.packed_file import Form, PackedFile
from glimmer.config import EngineConfig
from glimmer.engine.runner import activation_bytes
from glimmer.errors import NotEnoughMemory
from glimmer.model import experts
from glimmer.model.packed import prepare
from glimmer.model_config import ModelConfig

PROMPTS = [[5, 60, 200, 7, 31, 90, 250, 3, 64], [15, 60, 20, 7, 31, 9, 25, 3] * 5, [7], list(range(40, 100))]
PARAMS = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=3, logprobs=3, ignore_eos=True)
CACHE = 1 << 20
SETTINGS = {"dtype": "bfloat16", "max_model_len": 96, "max_num_seqs": 4, "kv_cache_memory_bytes": CACHE}

pytestmark = pytest.mark.skipif(
    not isinstance(selection.choose(selection.HOST), PackedFiles), reason="packed files are the kernels'"
)


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """packed(quantization, **variant) -> a model with its packed file, the same one for the same arguments."""
    made: dict[str, Path] = {}

    def make(quantization: str | None, **variant) -> Path:
        key = json.dumps([quantization, variant])
        if key not in made:
            made[key] = shutil.copytree(checkpoint(**variant), tmp_path_factory.mktemp("paged") / "model")
            config = ModelConfig.load(str(made[key]))
            form = Form.of("bfloat16", quantization, None)
            prepare(made[key], config, form, selection.choose(selection.HOST, 2))
        return made[key]

    return make


def file_of(model: Path) -> PackedFile:
    (folder,) = model.glob("packed-*")
    return PackedFile(folder)


def paged(model: Path, slots: int, **settings) -> LLM:
    """An engine whose memory suffices for so many experts."""
    settings = SETTINGS | settings
    with file_of(model) as packed:
        experts = [
            p for layer, sections in packed.layers.items() for p in sections.values() if layer.endswith(".experts")
        ]
        slot = max(section.nbytes for section in experts)
        dense = sum(section.nbytes for section in packed.sections() if section not in experts)
    engine = EngineConfig(model=str(model), **settings)
    beside = dense + activation_bytes(engine, ModelConfig.load(str(model)))
    memory = beside + -(-(CACHE + slots * slot) * 64 // 63) + 64
    return LLM(str(model), max_memory_bytes=memory, **settings)


def pager_of(llm: LLM) -> experts.Pager:
    pager = llm._runner._mapped.pager
    assert pager is not None, "all experts are in memory"
    return pager


def answers(llm: LLM, prompts=PROMPTS) -> str:
    """Tokens and log-probabilities, to the last bit."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], PARAMS)
    assert [output.error for output in outputs] == [None] * len(prompts)
    return repr([(o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs])


@pytest.fixture(scope="module")
def resident(packed):
    """resident(quantization, **variant) -> the answers of the same model, all of it in memory."""
    known: dict[str, str] = {}

    def compute(quantization: str | None, **variant) -> str:
        key = json.dumps([quantization, variant])
        if key not in known:
            with LLM(str(packed(quantization, **variant)), **SETTINGS | {"quantization": quantization}) as llm:
                assert llm.paging is None
                known[key] = answers(llm)
        return known[key]

    return compute


@pytest.mark.parametrize("slots, threads, chunk", [(8, 1, 96), (11, 2, 7), (20, 2, 96)])
@pytest.mark.parametrize(
    "quantization, variant",
    [(None, {}), (None, {"fp8": True}), ("int8", {}), ("int4", {"moe_intermediate_size": 40, "hidden_size": 96})],
    ids=str,
)
def test_the_same_bits_as_in_memory(quantization, variant, slots, threads, chunk, packed, resident):
    settings = {"quantization": quantization, "threads": threads, "max_num_batched_tokens": chunk}
    with paged(packed(quantization, **variant), slots, **settings) as llm:
        stats = pager_of(llm).stats()
        assert (stats.slots, stats.experts) == (slots, 24)
        assert answers(llm) == resident(quantization, **variant)
        alone = one_by_one(llm)
        assert alone == resident(quantization, **variant)
        assert llm.paging is not None and llm.paging.missed > 0


def one_by_one(llm: LLM) -> str:
    """`answers`, one prompt at a time."""
    return "[" + ", ".join(answers(llm, [prompt])[1:-1] for prompt in PROMPTS) + "]"


def damage(model: Path, byte: int) -> None:
    """Changes a byte of every expert, or changes it back."""
    with file_of(model) as packed, open(packed.file, "r+b") as file:
        for layer, sections in packed.layers.items():
            for section in sections.values() if layer.endswith(".experts") else ():
                for i in range(section.num_records):
                    at = section.begin + i * section.nbytes + byte % section.nbytes
                    file.seek(at)
                    old = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([old ^ 1]))


@pytest.fixture
def own(packed, tmp_path):
    """A packed model that may be damaged."""
    return shutil.copytree(packed("int4"), tmp_path / "model")


@pytest.mark.parametrize("byte", [0, 3000, -1])
def test_other_bytes_end_the_request_and_not_the_engine(byte, own, resident):
    with paged(own, 8, quantization="int4") as llm:
        damage(own, byte)
        (output,) = llm.generate([{"prompt_token_ids": PROMPTS[1]}], PARAMS)
        assert output.outputs[0].finish_reason == "error"
        assert "has other bytes than were written" in str(output.error) and "glimmer prepare" in str(output.error)
        damage(own, byte)
        assert answers(llm) == resident("int4")


def test_a_file_that_was_cut_off_ends_the_request(own):
    with paged(own, 8, quantization="int4") as llm, file_of(own) as packed:
        at = min(p.begin for layer, ps in packed.layers.items() if layer.endswith(".experts") for p in ps.values())
        os.truncate(packed.file, at)
        (output,) = llm.generate([{"prompt_token_ids": PROMPTS[1]}], PARAMS)
        assert output.outputs[0].finish_reason == "error"
        assert "ends before byte" in str(output.error) or "has shrunk" in str(output.error)


def test_a_file_that_was_replaced_is_the_one_that_was_opened(own, resident):
    with paged(own, 8, quantization="int4") as llm, file_of(own) as packed:
        copy = packed.file.with_suffix(".copy")
        shutil.copyfile(packed.file, copy)
        os.truncate(copy, 4096)
        copy.rename(packed.file)
        assert answers(llm) == resident("int4")


def test_what_was_in_use_is_read_at_the_next_start(own, resident, caplog):
    counted = next(own.glob("packed-*")) / experts.STATS
    with paged(own, 12, quantization="int4") as llm:
        answers(llm, PROMPTS[:1] * 3)
        pager_of(llm).close()
    table = json.loads(counted.read_text())
    assert len(table) == 3 and max(max(values) for values in table.values()) == 1
    with paged(own, 12, quantization="int4") as llm:
        pager = pager_of(llm)
        deadline = time.monotonic() + 20
        while pager.stats().bytes_read < 12 * 4096:
            assert time.monotonic() < deadline, "slots are filled without being asked for"
            time.sleep(0.01)
        assert pager.stats().wanted == 0
        assert [max(pager.store.frequencies(i)) for i in range(3)] == pytest.approx(
            [max(v) for v in table.values()], rel=0.01
        )
    counted.write_text("[1, 2")
    with caplog.at_level(logging.WARNING, "glimmer"), paged(own, 12, quantization="int4") as llm:
        assert answers(llm) == resident("int4")
    assert any(experts.STATS in record.getMessage() for record in caplog.records)


def test_slots_shrink_when_memory_runs_short_and_grow_again(own, resident, monkeypatch, caplog):
    with paged(own, 16, quantization="int4") as llm:
        pager = pager_of(llm)
        assert answers(llm) == resident("int4")
        with caplog.at_level(logging.WARNING, "glimmer"):
            monkeypatch.setattr(experts, "free_memory", lambda device: pager._mapped + experts.RESERVE - 8 * 4096)
            pager.fit()
        assert pager.stats().slots == 8 and "8 slots in place of 16" in caplog.text
        monkeypatch.setattr(experts, "free_memory", lambda device: pager._mapped + experts.RESERVE)
        assert answers(llm) == resident("int4")
        monkeypatch.setattr(experts, "free_memory", lambda device: 64 << 30)
        pager.fit()
        assert pager.stats().slots == 16
        assert answers(llm) == resident("int4")


def test_too_little_memory_says_how_much_there_must_be(packed):
    with pytest.raises(NotEnoughMemory, match="experts are read from disk"):
        paged(packed("int4"), 3, quantization="int4")
