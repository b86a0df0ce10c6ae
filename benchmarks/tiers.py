"""Experts on disk: a packed model of GLM-4.5-Air's shapes that does not fit into memory, and how fast it runs.

usage: tiers.py [--layers N] [--share X] [--directory DIR] [--tokens N] [--keep]

It writes the packed file directly, with synthetic int4 values (all 46 layers: 60 GB; --layers N writes N of them, and
memory is lowered in proportion), and removes it in the end. Routing is not the model's: ids are drawn, evenly or by
Zipf's law (the weight of rank r is 1 / r, in another order for every layer), so that hit rates are known.

Measured: the disk (threads with O_DIRECT, blocks of an expert, the same depth), reads of the store, decode beside what
hit rate and disk allow (*_of_disk: the time that the disk needs for the experts that had no slot, in relation to the
time that was taken), a prompt of 512 tokens beside one pass over all experts, and, with a model of which all experts
have slots, paged decode beside resident. Prints a table and one line of JSON.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from make_checkpoint import CONFIG
from torch import Tensor

from glimmer import LLM, SamplingParams
from glimmer.backends import cpu, selection
from glimmer.backends.base import RouteRule
from glimmer.checkpoint.buffers import large_pages
from glimmer.checkpoint.disk import check_space
from glimmer.checkpoint.packed_file import MANIFEST, Form, PackedFile, PackedWriter, head
from glimmer.engine import runner
from glimmer.group import Group
from glimmer.model import names
from glimmer.model.cost import Shapes, as_quantized
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model.layers import Experts, Layer, LayerWeights
from glimmer.model.packed import ROUNDED_UP, _add
from glimmer.model_config import ModelConfig
from glimmer.weight import GROUP_SIZE, Kind, Weight

AIR = CONFIG | {
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "vocab_size": 151552,
}
DISTINCT = 4  # experts of a layer whose values differ; the others are copies of them
PROMPT = 512
READERS = 8  # as the store has


def weight(shape: tuple[int, int], layer: Layer, dtype: torch.dtype, generator: torch.Generator) -> Weight:
    """Random values of unit gain, in the kind that int4 gives this layer."""
    out, inner = shape
    if layer.plain:
        return Weight(Kind.PLAIN, (torch.randn(shape, generator=generator) / math.sqrt(inner)).to(dtype))
    kind = Kind.INT8 if layer.min_bits == 8 else Kind.INT4
    made = Weight.empty(kind, shape, 32, zeros=False, device="cpu", scales_dtype=torch.bfloat16)
    width = made.codes.shape[1]
    codes = torch.randint(0, 256, (out, width), generator=generator, dtype=torch.uint8)
    made.codes.copy_(codes if kind is Kind.INT4 else codes.view(torch.int8).clamp(-127, 127))
    made.scales.fill_(2.0 ** round(math.log2(1 / (4.6 if kind is Kind.INT4 else 74) / math.sqrt(inner))))
    return made


def write_model(directory: Path, config: dict) -> None:
    """A packed model that needs no checkpoint, its values made up."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    backend = selection.choose(selection.HOST, os.cpu_count() or 1)
    model = Glm4Moe(ModelConfig.load(str(directory)), Group(), backend, torch.float32)
    generator = torch.Generator().manual_seed(0)
    form = Form.of("bfloat16", "int4", 32)
    with PackedWriter(directory, head(form, backend.packed_layout, {}), backend.checksums) as writer:
        for spec in names.param_specs(model.config, Group(), None, lambda module, width: 1):
            layer = model.get_submodule(spec.layer)
            dtype = torch.float32 if layer.keep_float32 else torch.bfloat16
            units = spec.units[:DISTINCT] if isinstance(layer, Experts) else spec.units

            def made(units=units, layer=layer, dtype=dtype) -> Iterator[list[Weight]]:
                for unit in units:
                    yield [weight(shard.shape, layer, dtype, generator) for shard in unit]

            vectors = [torch.ones(n) if "norm" in name else torch.zeros(n) for name, n, _ in spec.vectors]
            layer.load(LayerWeights(vectors, made(), len(units), dtype))
            if isinstance(layer, Experts):
                records = backend.records(layer.packed)
                buffers = [torch.zeros(records.nbytes, dtype=torch.uint8) for _ in range(records.count)]
                for i, buffer in enumerate(buffers):
                    records.copy(i, buffer)
                for matrix in records.description["matrices"]:
                    matrix["count"] = len(spec.units)
                writer.add(
                    spec.layer, "packed", records.description, lambda i, b=buffers: b[i % len(b)], len(spec.units)
                )
            else:
                for name, value in layer.held().items():
                    _add(writer, backend, spec.layer, name, value)
            layer.hold({})
            writer.finish_layer()
        writer.finish()
    with PackedFile(directory) as packed:  # what was written shall not take memory from what is measured
        os.posix_fadvise(packed.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(file: Path, block: int, depth: int, seconds: float = 4.0) -> float:
    """Bytes a second of direct reads of `block` bytes at random places, `depth` at a time, into large pages."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    blocks, done = os.fstat(descriptor).st_size // block, [0] * depth
    end = time.perf_counter() + seconds

    def read(number: int) -> None:
        memory, places = large_pages(block), random.Random(number)
        while time.perf_counter() < end:
            done[number] += os.preadv(descriptor, [memory], places.randrange(blocks) * block)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(depth)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    return sum(done) / (time.perf_counter() - begin)


class Draw:
    """In place of the router: experts drawn with given weights, in another order for every layer."""

    def __init__(self) -> None:
        self.skew = 0.0
        self._generator = torch.Generator().manual_seed(1)
        self._orders: dict[int, Tensor] = {}

    def route(self, ops: cpu.Cpu, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        """As Backend.route; the draw is repeated where a captured step is."""
        rows, experts = logits.shape
        ids, scores = (ops._new(rows, rule.top_k, dtype=dtype) for dtype in (torch.int64, torch.float32))
        order = self._orders.setdefault(id(bias), torch.randperm(experts, generator=self._generator))

        def draw() -> None:
            weights = torch.arange(1, experts + 1, dtype=torch.float64) ** -self.skew
            ranks = torch.multinomial(weights.expand(rows, -1), rule.top_k, generator=self._generator)
            ids.copy_(order[ranks])
            scores.fill_(1 / rule.top_k)

        if ops._capture is not None:
            ops._capture.add_torch(draw)
        draw()
        return ids, scores


@dataclass(frozen=True)
class Decoded:
    """For each of some decoded tokens: seconds, CPU seconds, and where experts are paged, how many it wanted, and how
    many of them had no slot."""

    seconds: float
    cpu_seconds: float
    wanted: float
    missed: float


def decode(llm: LLM, tokens: int) -> Decoded:
    """`tokens` tokens after the first one, whose step has the prompt too."""
    params = SamplingParams(max_tokens=1 + tokens, ignore_eos=True, temperature=0, detokenize=False)
    marks = []
    for _ in llm.stream({"prompt_token_ids": [1, 2]}, params):
        paging = llm.paging
        counts = (0, 0) if paging is None else (paging.wanted, paging.missed)
        marks.append((time.perf_counter(), time.process_time(), *counts))
    return Decoded(*((last - first) / tokens for first, last in zip(marks[0], marks[-1], strict=True)))


def prefill(llm: LLM, first: int) -> float:
    """Seconds for a prompt of PROMPT tokens, no other's beginning."""
    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    begin = time.perf_counter()
    llm.generate({"prompt_token_ids": list(range(first, first + PROMPT))}, params)
    return time.perf_counter() - begin


def fill(llm: LLM, slot: int) -> float:
    """Bytes a second with which the store fills its slots, all empty at first."""
    store = llm._runner._mapped.pager.store
    until(lambda: store.counts[2] >= store.slots * slot)  # the first filling
    store.resize(2)
    before, slots = store.counts[2], store.slots
    store.resize(slots)
    begin = time.perf_counter()
    store.warm()
    until(lambda: store.counts[2] - before >= (slots - 2) * slot)
    return (store.counts[2] - before) / (time.perf_counter() - begin)


def until(done: Callable[[], bool], seconds: float = 600) -> None:
    """Waits; AssertionError after so many seconds."""
    deadline = time.perf_counter() + seconds
    while not done():
        assert time.perf_counter() < deadline, "it takes too long"
        time.sleep(0.002)


def engine(directory: Path, **settings) -> LLM:
    return LLM(
        str(directory), skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=1, max_num_batched_tokens=PROMPT,
        speculative_config="off", enable_prefix_caching=False, **settings,
    )  # fmt: skip


def measure_paged(directory: Path, share: float, tokens: int) -> dict[str, float]:
    """Disk, store, prefill and decode of a model whose experts have slots for `share` of them."""
    with PackedFile(directory) as packed:
        experts = [p for layer, ps in packed.layers.items() if layer.endswith(".experts") for p in ps.values()]
        slot, count, file = experts[0].nbytes, sum(piece.num_records for piece in experts), packed.file
    found: dict[str, float] = {"experts": count, "expert_MB": slot / 1e6}
    draw = Draw()
    original, slots = cpu.Cpu.route, runner.expert_slots
    cpu.Cpu.route = lambda self, logits, bias, rule: draw.route(self, logits, bias, rule)
    runner.expert_slots = lambda *given: int(share * count)
    try:
        probes = [disk_speed(file, slot, READERS)]
        begin = time.perf_counter()
        llm = engine(directory)
        found["start_s"] = time.perf_counter() - begin
        found["store_GBps"] = fill(llm, slot) / 1e9
        probes.append(disk_speed(file, slot, READERS))
        for name, skew in (("even", 0.0), ("zipf", 1.0)):
            draw.skew = skew
            decode(llm, max(tokens, 24))  # until the slots hold what this routing wants
            one = decode(llm, tokens)
            probes.append(disk_speed(file, slot, READERS))
            allowed = one.missed * slot / statistics.mean(probes[-2:])
            found |= {f"{name}_hit_rate": 1 - one.missed / one.wanted, f"{name}_tokens_per_s": 1 / one.seconds}
            found |= {f"{name}_of_disk": allowed / one.seconds, f"{name}_cpu_s_per_token": one.cpu_seconds}
        draw.skew = 0.0
        before, spent, seconds = llm.paging, time.process_time(), prefill(llm, 1000)
        found["prefill_cpu_s"] = time.process_time() - spent
        probes.append(disk_speed(file, slot, READERS))
        found["prefill_s"] = seconds
        found["prefill_of_a_pass"] = seconds / (count * slot / statistics.mean(probes[-2:]))
        found["prefill_read"] = (llm.paging.bytes_read - before.bytes_read) / (count * slot)
        found["disk_GBps"] = statistics.median(probes) / 1e9
        found["store_of_disk"] = found["store_GBps"] * 1e9 / statistics.mean(probes[:2])
        llm.close()
    finally:
        cpu.Cpu.route, runner.expert_slots = original, slots
    return found


def measure_overhead(directory: Path, tokens: int, rounds: int = 5) -> dict[str, float]:
    """Paged decode beside resident, all experts in their slots: median ratios of time and of CPU time."""
    with PackedFile(directory) as packed:
        count = sum(
            p.num_records for layer, ps in packed.layers.items() if layer.endswith(".experts") for p in ps.values()
        )
    original = runner.expert_slots
    try:
        runner.expert_slots = lambda *given: None
        resident = engine(directory)
        runner.expert_slots = lambda *given: count
        paged = engine(directory)
        decode(resident, tokens), decode(paged, tokens)
        ratios = []
        for _ in range(rounds):
            a, b = decode(resident, tokens), decode(paged, tokens)
            ratios.append((b.seconds / a.seconds, b.cpu_seconds / a.cpu_seconds))
        resident.close(), paged.close()
    finally:
        runner.expert_slots = original
    times, spent = zip(*ratios, strict=True)
    return {"warm_time_ratio": statistics.median(times), "warm_cpu_ratio": statistics.median(spent)}


def temporary(
    directory: Path, config: dict, measure: Callable[[Path], dict[str, float]], keep: bool
) -> dict[str, float]:
    """`measure` of a model that is written first and removed afterwards."""
    try:
        if not (directory / MANIFEST).is_file():
            wanted, kinds = ModelConfig.from_dict(config), as_quantized(Kind.INT4, GROUP_SIZE)
            nbytes = int(Shapes(wanted, kinds, selection.choose(selection.HOST)).held.nbytes * ROUNDED_UP)
            print(f"{directory}: {nbytes / 1e9:.1f} GB of disk are needed, until the measurements are done", flush=True)
            check_space(
                directory, nbytes, "packed", "free some space, name another --directory, or ask for fewer --layers"
            )
            begin = time.perf_counter()
            write_model(directory, config)
            size = sum(file.stat().st_size for file in directory.iterdir()) / 1e9
            print(f"{directory}: {size:.1f} GB written in {time.perf_counter() - begin:.0f} s", flush=True)
        return measure(directory)
    finally:
        if not keep and directory.exists():
            shutil.rmtree(directory)
            print(f"{directory}: removed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=AIR["num_hidden_layers"], help="of them the first is dense")
    parser.add_argument("--share", type=float, default=0.28, help="of the experts that have a slot")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "glimmer-tiers")
    parser.add_argument("--tokens", type=int, default=32, help="to decode in each measurement")
    parser.add_argument("--keep", action="store_true", help="leave the model there, for the next time")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was written is removed then too
    found: dict[str, float] = {"layers": given.layers, "share": given.share}
    small = AIR | {"num_hidden_layers": 3, "vocab_size": 32768}
    large = AIR | {"num_hidden_layers": given.layers}
    paged = lambda directory: measure_paged(directory, given.share, given.tokens)
    warm = lambda directory: measure_overhead(directory, 4 * given.tokens)
    found |= temporary(given.directory / f"air-{given.layers}", large, paged, given.keep)
    found |= temporary(given.directory / "warm", small, warm, given.keep)
    for name, value in found.items():
        print(f"{name:24} {value:10.3f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
