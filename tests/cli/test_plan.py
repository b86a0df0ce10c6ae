"""`glimmer plan`: what a model needs, what fits, and what is said where nothing does; nothing is loaded."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glimmer import LLM, SamplingParams
from glimmer.backends import op_times, selection
from glimmer.backends.base import KVCacheSpec
from glimmer.backends.timed import Call, Cost, Lengths
from glimmer.cli import machine, planning
from glimmer.cli.machine import Disk, Machine
from glimmer.cli.main import main
from glimmer.config import EngineConfig
from glimmer.device import Card
from glimmer.model.cost import BETWEEN, SEQUENCE, STEP, Shapes, as_quantized, phases, reading, with_disk
from glimmer.model_config import ModelConfig
from glimmer.weight import Kind

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "glimmer" / "demo"
GIB = 1 << 30
FAMILY = json.loads((DEMO / "config.json").read_text()) | {
    "max_position_embeddings": 131072,
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
AIR = FAMILY | {
    "hidden_size": 4096, "num_hidden_layers": 46, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "num_experts_per_tok": 8, "use_qk_norm": False,
}  # fmt: skip
BIG = FAMILY | {
    "hidden_size": 5120, "num_hidden_layers": 92, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "n_routed_experts": 160, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
}  # fmt: skip
LIMITS = {"read": 20e9, "cached": 80e9, "bfloat16": 1e12, "int8": 2e12, "cache": 32e6}


@pytest.fixture(scope="module", autouse=True)
def measured(tmp_path_factory):
    """What is measured here is kept for this file's tests, and for nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIMMER_CACHE", str(tmp_path_factory.mktemp("measured")))
        yield


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """described(config) -> a directory that holds this config.json and nothing else, the same for the same one."""
    made: dict[str, Path] = {}

    def write(config: dict) -> Path:
        text = json.dumps(config)
        if text not in made:
            made[text] = tmp_path_factory.mktemp("config")
            (made[text] / "config.json").write_text(text)
        return made[text]

    return write


def planner(directory: Path, **settings) -> planning.Planner:
    return planning.Planner(directory, EngineConfig(model=str(directory), **settings))


def a_machine(memory: float, disk: float | None = 1.5e9) -> Machine:
    """A CPU of which so many GiB may be taken."""
    size = int(memory * GIB)
    return Machine(1, 1, size, size, size, Disk(1 << 50, disk, "as given"), 2, "avx512", LIMITS)


def run(capsys, *argv: str) -> dict:
    """The plan as JSON."""
    assert main(["plan", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------- what is counted


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_bytes_and_work_are_those_of_the_engine(quantization):
    """Of the demo model: weights as loaded, reads and operations as a profile counts them."""
    directory = DEMO
    config = ModelConfig.load(directory)
    llm = LLM(str(directory), dtype="bfloat16", quantization=quantization, max_model_len=64, max_num_seqs=4)
    found = planning.stored(directory, config)
    assert found.complete and found.kind is Kind.PLAIN and found.mtp is not None
    kind = Kind(quantization) if quantization else Kind.PLAIN
    shapes = Shapes(config, as_quantized(kind, 32), selection.choose(torch.device("cpu")), mtp=found.mtp)
    model = llm._runner.model
    packed = [m.packed for _, m in model.named_modules() if getattr(m, "packed", None) is not None]
    tensors = [
        t for _, m in model.named_modules() for name in getattr(m, "HELD", ())
        if isinstance(t := getattr(m, name), torch.Tensor)
    ]  # fmt: skip
    loaded = sum(one.nbytes for one in packed) + sum(t.nbytes for t in tensors)
    assert shapes.held.nbytes == pytest.approx(loaded, rel=0.08)  # rows so short are padded
    prompt = {"prompt_token_ids": list(range(20))}
    with llm.without_drafts(), llm.profile() as profile:
        llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    seen = profile.total
    spec = KVCacheSpec(config.num_hidden_layers, 16, config.num_key_value_heads, config.head_dim, torch.bfloat16)
    work = shapes.work(spec, 20, 0)
    assert work.steps == profile.steps == 1 and work.cost.calls.total() == seen.calls.total()
    planned, made = ({call: n for call, n in cost.calls.items() if call.op != "experts"} for cost in (work.cost, seen))
    assert planned == made and len(made) > 10  # of experts it is even choices that are planned
    assert dict(work.cost.operations) == dict(seen.operations)
    assert work.cost.nbytes == pytest.approx(seen.nbytes, rel=0.1)
    assert profile.expected(LIMITS, captured=False) > 0
    llm.close()


def test_time_is_that_of_the_ops_and_of_python():
    """Ops as measured, their time divided as reads and products would take it; a step's Python on top."""
    cost = Cost(nbytes=10**9, operations={"bfloat16": 10**12}, calls=Counter({Call("swiglu", ()): 30}))
    cost.calls[Call("attention", (Lengths((1, 1, 1), (64, 64, 64)),))] = 10
    limits = {"read": 1e9, "cached": 1e10, "bfloat16": 1e12, "int8": 1e12, "cache": 1e6}
    assert phases(cost, 1, limits, 10**9, True, None) == {"memory bandwidth": 1, "arithmetic": 1}
    assert phases(cost, 1, limits, 10**5, True, None)["memory bandwidth"] == pytest.approx(0.1)  # from the cache
    times = lambda call, weights, captured: 1e-6 if call.op == "add_" else 1e-3
    found = phases(cost, 2, limits, 10**9, True, times)
    assert found["memory bandwidth"] == found["arithmetic"] == pytest.approx(0.02)
    assert found["calls"] == pytest.approx(2e-6 * (STEP + 3 * SEQUENCE))
    assert phases(cost, 2, limits, 10**9, False, times)["calls"] == pytest.approx(found["calls"] + 40e-6 * BETWEEN)


def test_reading_is_hidden_behind_experts_that_are_there():
    """Only in layers that miss one, and never behind the last that comes; never more than there is to hide."""
    found, routed = {"memory bandwidth": 3.0, "arithmetic": 1.0}, {"memory bandwidth": 1.5, "arithmetic": 0.5}
    total = lambda disk, hits: sum(with_disk(found, routed, disk, 8, hits).values())
    assert total(0.0, 1.0) == 4.0
    assert total(10.0, 0.0) == pytest.approx(14.0 - 2 * 7 / 8)
    assert total(10.0, 0.5) == pytest.approx(14.0 - 2 * 7 / 8 * (1 - 0.5**8))
    assert total(0.1, 0.5) == pytest.approx(4.0)


def test_the_first_expert_that_a_layer_reads_takes_longer_than_further_ones():
    assert reading(10, 8, 1.0, 3.0, 1.0) == 0
    assert reading(10, 8, 0.0, 3.0, 1.0) == 10 * (3 + 7)
    assert reading(10, 1, 0.5, 3.0, 1.0) == 10 * 0.5 * 3
    assert reading(1, 2, 0.5, 3.0, 1.0) == pytest.approx(0.5 * 3 + 0.25 * (3 + 1))
    assert reading(10, 8, 0.7, 1.0, 1.0) == pytest.approx(10 * 8 * 0.3)


@pytest.mark.slow
def test_sizes_of_the_family(described):
    """Parameters as published: 106.85 B without the MTP layer for Air, 352.8 B for GLM-4.5; 184 and 368 KiB a token."""
    for config, billions, kib in ((AIR, 106.8, 46 * 4), (BIG, 352.8, 92 * 4)):
        one = planner(described(config))
        held = one.shapes(Kind.PLAIN, None).held
        assert (held.experts + held.rest) / 2e9 == pytest.approx(billions, rel=0.003)
        assert held.mtp > 0 and one.token_bytes(mtp=False) == kib * 1024
        int4 = one.shapes(Kind.INT4, None).held
        assert int4.experts / held.experts == pytest.approx(0.28, abs=0.01)


def test_pruned_models_and_community_quantisations(described):
    """REAP's fewer experts; what config.json declares, where no headers are there."""
    whole = planner(described(AIR)).shapes(Kind.INT4, None).held
    pruned = planner(described(AIR | {"n_routed_experts": 96})).shapes(Kind.INT4, None).held
    assert pruned.experts == whole.experts * 96 // 128 and pruned.record == whole.record
    for declared, kind in (
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}, Kind.INT4),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, Kind.INT4),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, Kind.PLAIN),
    ):
        assert planning.declared(declared)[0] is kind


# ---------------------------------------------------------------------- what fits


@pytest.mark.slow
def test_the_most_bits_that_fit_and_are_fast_enough(described):
    one = planner(described(AIR))
    places = {}
    for memory in (4, 8, 24, 64, 256):
        candidates = one.candidates(a_machine(memory))
        chosen = planning.recommended(candidates)
        places[memory] = chosen and (chosen.name, chosen.where)
        for found in candidates:
            if found.where == "memory":
                assert found.needed <= memory * GIB and found.context >= one.least
            if found.where == "disk":
                assert found.slots >= 16 and found.decode.limit == "disk" and found.decode.rate > 0
    assert places == {
        4: None, 8: ("int4", "disk"), 24: ("int4", "disk"), 64: ("int4", "memory"), 256: ("int4", "memory"),
    }  # fmt: skip
    assert all(found.available for found in one.candidates(a_machine(256)))  # of bf16 any other form can be made
    middling = replace(a_machine(256), limits={name: 7 * value for name, value in LIMITS.items()} | {"cache": 0})
    rates = {found.name: found.decode.rate for found in one.candidates(middling)}
    assert rates["bf16"] < planning.READING < min(rates["fp8"], rates["int8"])
    assert planning.recommended(one.candidates(middling)).name == "int8"  # which loses less than fp8
    fast = replace(a_machine(256), limits={name: 20 * value for name, value in LIMITS.items()} | {"cache": 0})
    assert planning.recommended(one.candidates(fast)).name == "bf16"


@pytest.mark.slow
def test_more_memory_is_never_slower(described):
    one = planner(described(AIR))
    rates = [planning.recommended(one.candidates(a_machine(memory))).decode.rate for memory in (20, 30, 50, 70)]
    assert rates == sorted(rates) and rates[0] < rates[-1]


@pytest.mark.slow
def test_of_paged_experts_the_disk_is_waited_for(described):
    """Every second expert is read: half of 8 x 45 of them, each once, at the disk's speed."""
    one = planner(described(AIR))
    int4 = next(found for found in one.candidates(a_machine(40)) if found.name == "int4")
    record = one.shapes(Kind.INT4, None).held.record
    missing = 8 * 45 * (1 - int4.slots / int4.experts)
    assert int4.where == "disk" and int4.experts == 45 * 128
    assert int4.decode.seconds["disk"] == pytest.approx(missing * record / 1.5e9)
    assert sum(int4.decode.seconds.values()) > int4.decode.seconds["disk"]


def test_counted_choices_say_what_is_read(tmp_path, described):
    """Half of the experts get nine tenths of the choices: with slots for half of all, one in ten is read."""
    (tmp_path / "config.json").write_text((described(AIR) / "config.json").read_text())
    one = planner(tmp_path)
    assert one.hits(Kind.INT4, 64 * 45) is None
    (tmp_path / "packed-bfloat16-int4-32").mkdir()
    table = {f"layers.{i}.mlp.experts": [0.09] * 64 + [0.01] * 64 for i in range(1, 46)}
    (tmp_path / "packed-bfloat16-int4-32" / "expert_stats.json").write_text(json.dumps(table))
    assert one.hits(Kind.INT4, 64 * 45) == pytest.approx(0.9) and one.hits(Kind.INT8, 64) is None
    found = next(found for found in one.candidates(a_machine(40)) if found.name == "int4")
    assert found.counted and found.hits > found.slots / found.experts


@pytest.mark.slow
def test_the_engine_divides_as_planned(capsys, described, monkeypatch):
    """The command that is printed leads to the slots and the cache of the plan."""
    monkeypatch.setattr(machine, "this_machine", lambda *_: a_machine(24))
    plan = run(capsys, str(described(AIR)), "--memory", "24GB")
    assert plan["commands"][0].startswith("glimmer prepare") and "--quantization int4" in plan["commands"][0]
    asked = int(re.search(r"--max-model-len (\d+)", plan["commands"][-1])[1])
    again = run(capsys, str(described(AIR)), "--memory", "24GB", "--max-model-len", str(asked))
    first, second = (next(one for one in each["candidates"] if one["form"] == "int4") for each in (plan, again))
    assert second["slots"] == first["slots"] and second["context"] == first["context"] == asked


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_demo_on_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(op_times, "ROUND_SECONDS", 1e-4)
    monkeypatch.setenv("GLIMMER_CACHE", str(tmp_path))
    plan = run(capsys, str(DEMO), "--threads", "1")
    assert plan["recommended"] and plan["headers"] and plan["machine"]["memory"]["usable"] > 0
    assert plan["needs"]["bf16"]["all"] > plan["needs"]["int8"]["all"] > 0
    assert plan["commands"][-1].startswith("glimmer serve")
    if plan["machine"]["limits"] is not None:
        chosen = next(one for one in plan["candidates"] if one["form"] == plan["recommended"])
        assert chosen["decode"]["tokens_per_second"] > 0 and chosen["prefill"]["limited_by"]
        (kept,) = (tmp_path / "measured").iterdir()
        never = lambda *_: pytest.fail("measured again")
        monkeypatch.setattr(op_times.OpTimes, "_measure", never)
        monkeypatch.setattr(type(selection.choose(selection.HOST)), "limits", never)
        again = run(capsys, str(DEMO), "--threads", "1")
        assert again["machine"]["limits"] == plan["machine"]["limits"]
        assert main(["plan", str(DEMO), "--threads", "1"]) == 0 and "--remeasure" in capsys.readouterr().out
        monkeypatch.setattr(op_times.OpTimes, "_measure", lambda *_: 0.125)
        monkeypatch.setattr(type(selection.choose(selection.HOST)), "limits", lambda _: LIMITS)
        run(capsys, str(DEMO), "--threads", "1", "--remeasure")
        assert {0.125} < {number for number, _ in json.loads(kept.read_text())["measured"].values()}
        assert run(capsys, str(DEMO), "--threads", "1")["machine"]["limits"] == LIMITS


@pytest.mark.slow
def test_sizes_are_found_without_what_torch_compiles_with(described):
    """Importing that takes as long as a plan: no op on tensors without values may ask for it."""
    program = "import sys, pathlib; from glimmer.cli.planning import *; from glimmer.weight import Kind\n"
    program += "one = Planner(pathlib.Path(sys.argv[1]), EngineConfig(model=sys.argv[1]))\n"
    program += "one.shapes(Kind.INT4, None).work(one.cache_spec(1, False), 40, 0)\n"
    program += "assert not {'torch._dynamo', 'sympy'} & sys.modules.keys()"
    subprocess.run(
        [sys.executable, "-c", program, str(described(AIR | {"num_hidden_layers": 2}))], check=True, timeout=120
    )


def test_headers_are_enough(capsys, tmp_path, checkpoint):
    """Files that end behind their header, and one that is not there at all, are planned for as if whole."""
    whole = checkpoint(shards=3)
    for file in whole.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            data = data[: 8 + int.from_bytes(data[:8], "little")]
        (tmp_path / file.name).write_bytes(data)
    expected = run(capsys, str(whole), "--gpu", "H100")
    assert run(capsys, str(tmp_path), "--gpu", "H100")["needs"] == expected["needs"]
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    fewer = run(capsys, str(tmp_path), "--gpu", "H100")
    assert fewer["needs"] == expected["needs"] and not fewer["headers"] and "lacks 1 of" in fewer["notes"][0]


@pytest.mark.slow
@pytest.mark.parametrize("config, gpu, nodes, cards", [(BIG, "ascend910b:8", 2, 16), (AIR, "Ascend910B:8", 1, 8)])
def test_the_parallel_configuration_of_the_guide(capsys, described, config, gpu, nodes, cards):
    directory = str(described(config))
    assert main(["plan", directory, "--gpu", gpu, "--nodes", str(nodes)]) == 0
    text = capsys.readouterr().out
    assert f"data_parallel: 1\n  model_parallel: {cards}\n" in text and 'max_device_memory: "59GB"' in text
    assert "preliminary" in text and f"--tensor-parallel-size {cards}" in text and "recommended: bf16" in text
    assert "--nproc-per-node 8" in text and ("--nnodes 2" in text) == (nodes == 2)


@pytest.mark.slow
def test_what_would_be_enough(capsys, described):
    directory = str(described(AIR))
    assert main(["plan", directory, "--memory", "3GB", "--disk-speed", "2GB"]) == 0
    text = capsys.readouterr().out
    assert "nothing fits" in text and re.search(r"int4 with experts on disk: [\d.]+ GiB, [\d.]+ GiB more", text)
    assert main(["plan", directory, "--gpu", "L40S"]) == 0
    text = capsys.readouterr().out
    assert "nothing fits" in text and "int4 fits on 2 cards" in text and "bf16 fits on 8 cards" in text


@pytest.mark.parametrize(
    "argv, found, accepted",
    [
        (["--gpu", "H1000"], "--gpu 'H1000'", "H100"),
        (["--gpu", "H100:0"], "--gpu 'H100:0'", "H100:2"),
        (["--gpu", "H100:"], "--gpu 'H100:'", "H100:2"),
        (["--nodes", "2"], "--nodes 2 without --gpu", "cards"),
        (["--gpu", "H100:3"], "3 cards", "divides"),
        (["--memory", "much"], "memory='much'", "59GB"),
        (["--memory", "0"], "memory=0", "more than nothing"),
        (["--memory", "0.4", "--gpu", "H100"], "memory=0", "more than nothing"),
        (["--memory", "9" * 30], "memory=", "at most"),
        (["--memory", "80.1GB", "--gpu", "H100"], "memory=80.1 GiB for a card of 80 GiB (H100)", "at most"),
        (["--disk-speed", "1XB"], "disk_speed='1XB'", "59GB"),
        (["--threads", "0"], "threads=0", "whole number"),
        (["--gpu", "H100", "--nodes", "0"], "nodes='0'", "from 1 on"),
        (["--json=maybe"], "json='maybe'", "True or False"),
        (
            ["--gpu", "H100", "--max-model-len", "4096", "--kv-cache-memory-bytes", "5MB"],
            "kv_cache_memory_bytes",
            "at least",
        ),
        (["--disk-speed", "-1"], "disk_speed", "bytes"),
        (["--max-model-len", "999999999"], "max_model_len=999999999", "at most"),
    ],
)
def test_bad_input_is_said_at_once(capsys, monkeypatch, argv, found, accepted):
    monkeypatch.setattr(machine, "this_machine", lambda *_: pytest.fail("measured before refusing"))
    assert main(["plan", str(DEMO), *argv]) == 2
    error = capsys.readouterr().err
    assert found in error and accepted in error and "Traceback" not in error


def test_what_is_asked_for_beyond_what_is_there(capsys):
    """A cache that does not fit, and memory beyond the share that the engine takes, are said and not cut down."""
    directory = str(DEMO)
    plan = run(capsys, directory, "--gpu", "H200", "--kv-cache-memory-bytes", "999TB")
    assert plan["recommended"] is None and all(one["where"] is None for one in plan["candidates"])
    plan = run(capsys, directory, "--gpu", "H200", "--kv-cache-memory-bytes", "1GB")
    assert plan["recommended"] and all(one["kv_cache"] == GIB for one in plan["candidates"])
    assert not plan["machine"]["notes"]
    (note,) = run(capsys, directory, "--gpu", "H200", "--memory", "140GB")["machine"]["notes"]
    assert note.startswith("140.0 GiB are asked for; 126.9 are")


def test_cards_of_this_machine(capsys, monkeypatch):
    """They are listed, with what their makers say of those that are known; commands keep to the CPU planned for."""
    cards = tuple(
        Card(f"cuda:{i}", name, 80 * GIB, 70 * GIB) for i, name in enumerate(("NVIDIA H100 80GB HBM3", "NVIDIA X9"))
    )
    monkeypatch.setattr(machine, "this_machine", lambda *_: replace(a_machine(256), cards=cards))
    assert main(["plan", str(DEMO)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"cuda:0 .* 80.0 GiB, 70.0 GiB free; 3,350 GB/s, 989 TFLOP/s in bfloat16.*--gpu H100", text)
    assert re.search(r"cuda:1 .*NVIDIA X9, 80.0 GiB, 70.0 GiB free; bandwidth and arithmetic unknown", text)
    assert "glimmer serve" in text and "--device cpu" in text
    reported = [name for card in machine.ACCELERATORS.values() for name in card.reported]
    assert len(reported) == len(set(reported)) >= len(machine.ACCELERATORS)
    found = run(capsys, str(DEMO))["machine"]["accelerators"]
    assert [one["bandwidth"] for one in found] == [3350e9, None] and found[1]["free"] == 70 * GIB


def test_models_that_are_none(capsys, tmp_path, described):
    assert main(["plan", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    huge = described(AIR | {"n_routed_experts": 99_999, "num_hidden_layers": 9_999})
    assert main(["plan", str(huge), "--gpu", "H100"]) == 2
    assert "num_hidden_layers=9999" in capsys.readouterr().err
    other = described(AIR | {"model_type": "llama"})
    assert main(["plan", str(other)]) == 2
    assert "glm4_moe" in capsys.readouterr().err


def test_the_probe_reads_what_is_there(tmp_path):
    solid, hollow = tmp_path / "solid", tmp_path / "hollow"
    for directory in (solid, hollow):
        directory.mkdir()
    (solid / "model.safetensors").write_bytes(bytes(1) * machine.MIN_PROBE)
    with open(hollow / "model.safetensors", "wb") as file:
        file.truncate(machine.MIN_PROBE)
    found = machine.disk_of(solid, None)
    assert (found.speed is None) == ("refuses" in found.how) and (found.speed is None or found.speed > 0)
    if found.speed is not None:
        first, further = found.reads(1 << 20)
        assert first >= further == (1 << 20) / found.speed
    assert machine.disk_of(hollow, 5).reads(1 << 20) == ((1 << 20) / 5, (1 << 20) / 5)
    unknown = machine.disk_of(hollow, None)
    assert unknown.speed is None and unknown.reads(1 << 20) is None
    shutil.rmtree(solid)
