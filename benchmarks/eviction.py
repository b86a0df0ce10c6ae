"""Which experts should stay in memory: hit rates of ways to choose them, on recorded and on drawn routing.

usage: eviction.py [--share X ...]

Recorded: what the router of the demo model that comes with glimmer chooses while it answers. Drawn: 12 layers of 128
experts, 8 a token, by Zipf's law in another order for each layer, and by one whose order changes every 400 tokens. The
ways: frequency with ageing, as csrc/store.h has it, for several half-lives; least recently used; random.
"""

import argparse
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import glimmer
from glimmer import LLM, SamplingParams
from glimmer.backends import cpu

Trace = list[list[list[int]]]  # steps, layers, experts that the step wants

PROMPTS = ["北京是", "17 + 25 =", "Paris is", "The capital of", "上海"]


def recorded() -> Trace:
    """The choices of the demo model."""
    found: list[list[int]] = []
    original = cpu.Cpu.route

    def route(self: cpu.Cpu, *given: Tensor) -> tuple[Tensor, Tensor]:
        ids, scores = original(self, *given)
        found.append(ids.unique().tolist())
        return ids, scores

    cpu.Cpu.route, cpu.Cpu.captures = route, False  # every step goes through Python
    try:
        demo = Path(glimmer.__file__).parent / "demo"
        with LLM(str(demo), max_model_len=512, max_num_seqs=1, speculative_config="off") as llm:
            llm.generate(PROMPTS * 2, SamplingParams(max_tokens=80, temperature=1.0, seed=1, ignore_eos=True))
            config = llm.model_config
            layers = config.num_hidden_layers - config.first_k_dense_replace
    finally:
        cpu.Cpu.route, cpu.Cpu.captures = original, True
    return [found[i : i + layers] for i in range(0, len(found), layers)]


def drawn(
    skew: float, steps: int = 1200, layers: int = 12, experts: int = 128, top_k: int = 8, change: int = 0
) -> Trace:
    """Choices by Zipf's law; change: steps after which other experts are the frequent ones, 0: never."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.arange(1, experts + 1, dtype=torch.float64) ** -skew
    trace: Trace = []
    orders: list[Tensor] = []
    for step in range(steps):
        if not orders or (change and step % change == 0):
            orders = [torch.randperm(experts, generator=generator) for _ in range(layers)]
        ranks = torch.multinomial(weights.expand(layers, -1), top_k, generator=generator)
        trace.append([order[chosen].tolist() for order, chosen in zip(orders, ranks, strict=True)])
    return trace


def wanted(trace: Trace) -> Iterator[tuple[int, tuple[int, int]]]:
    """(step, (layer, expert)) in the order in which they are wanted."""
    for step, layers in enumerate(trace):
        for layer, experts in enumerate(layers):
            for expert in experts:
                yield step, (layer, expert)


def frequency(half_life: float) -> Callable[[Trace, int], float]:
    """The least frequent goes; a choice counts half after half_life steps."""

    def hits(trace: Trace, slots: int) -> float:
        count: dict[tuple[int, int], float] = {}
        present: set[tuple[int, int]] = set()
        found = total = 0
        for step, expert in wanted(trace):
            if step >= len(trace) // 4:
                total, found = total + 1, found + (expert in present)
            if expert not in present:
                if len(present) == slots:
                    present.remove(min(present, key=count.__getitem__))
                present.add(expert)
            count[expert] = count.get(expert, 0.0) + 2.0 ** (step / half_life)
        return found / total

    return hits


def least_recent(trace: Trace, slots: int) -> float:
    """The one that was wanted longest ago goes."""
    present: OrderedDict[tuple[int, int], None] = OrderedDict()
    found = total = 0
    for step, expert in wanted(trace):
        if step >= len(trace) // 4:
            total, found = total + 1, found + (expert in present)
        if expert in present:
            present.move_to_end(expert)
            continue
        if len(present) == slots:
            present.popitem(last=False)
        present[expert] = None
    return found / total


def at_random(trace: Trace, slots: int) -> float:
    """Any goes."""
    places: list[tuple[int, int]] = []
    present: set[tuple[int, int]] = set()
    choose = random.Random(3)
    found = total = 0
    for step, expert in wanted(trace):
        if step >= len(trace) // 4:
            total, found = total + 1, found + (expert in present)
        if expert in present:
            continue
        present.add(expert)
        if len(places) < slots:
            places.append(expert)
        else:
            at = choose.randrange(slots)
            present.remove(places[at])
            places[at] = expert
    return found / total


WAYS: dict[str, Callable[[Trace, int], float]] = {
    "frequency, 4": frequency(4),
    "frequency, 16": frequency(16),
    "frequency, 64": frequency(64),
    "frequency, 2048": frequency(2048),
    "least recently used": least_recent,
    "random": at_random,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5], help="of the experts that have a slot")
    traces = {
        "demo model": recorded(),
        "even": drawn(0.0),
        "Zipf 0.8": drawn(0.8),
        "Zipf 1.2": drawn(1.2),
        "Zipf 0.8, changing": drawn(0.8, change=400),
    }
    shares = parser.parse_args().share
    print("| routing | slots | " + " | ".join(WAYS) + " |\n|---|---:" + "|---:" * len(WAYS) + "|")
    for name, trace in traces.items():
        experts = len({expert for _, expert in wanted(trace)})
        for share in shares:
            cells = [f"{way(trace, max(1, int(share * experts))):.1%}" for way in WAYS.values()]
            print(f"| {name} | {share:.0%} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
