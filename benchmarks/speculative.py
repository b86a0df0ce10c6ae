"""What speculation brings, or costs, beside an engine without it: the same requests to both in turn, in one process.

usage: speculative.py [--model DIR] [--batch N ...] [--tokens N] [--pairs N] [--fresh] [--settings JSON]

Greedy answers of --tokens tokens, prompts included in the time. For each batch size the median and the best of the
pairs' ratios, and the ratio of the best times, which noise hits least. --fresh: both engines are new for each pair, so
that what it takes to find out whether drafts pay counts in full. A checkpoint whose drafts are always wrong is
written by make_checkpoint.py --mtp; the default is the demo model. `glimmer bench --speculative` shows one engine's
steady state.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import glimmer
from glimmer import LLM, SamplingParams

DEMO = Path(glimmer.__file__).parent / "demo"
CITIES = ("Paris", "Berlin", "Tokyo", "Rome", "Madrid", "London", "Cairo", "Vienna", "Prague", "Lisbon")
PROMPT = 64  # tokens of a random prompt


def prompts_for(model: LLM, source: random.Random, batch: int) -> list[Any]:
    """Questions where there is a tokenizer, else random tokens."""
    if model.tokenizer is not None:
        asked = [
            source.choice(("Introduce {}.", "Tell me about {}.")).format(c) for c in source.choices(CITIES, k=batch)
        ]
        return [model.render([{"role": "user", "content": text}]) for text in asked]
    ids = range(3, model.model_config.vocab_size)
    return [{"prompt_token_ids": source.choices(ids, k=PROMPT)} for _ in range(batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={}, help="speculative_config of the one that drafts")
    args = parser.parse_args()

    def engine(config: Any) -> LLM:
        return LLM(str(args.model), max_model_len=PROMPT + args.tokens + 64, max_num_seqs=max(args.batch), device="cpu",
                   kv_cache_memory_bytes=1 << 28, speculative_config=config, enable_prefix_caching=False,
                   skip_tokenizer_init=not (args.model / "tokenizer.json").exists())  # fmt: skip

    engines: list[LLM] = []
    for batch in args.batch:
        source = random.Random(batch)
        times: list[tuple[float, float]] = []
        counted = [0, 0]
        for pair in range(-1, args.pairs):
            if args.fresh or not engines:
                for llm in engines:
                    llm.close()
                engines = [engine("off"), engine(args.settings)]
            asks = engines[0].tokenizer is not None
            params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=not asks)
            prompts = prompts_for(engines[0], source, batch)
            took = [0.0, 0.0]
            answers = {}
            stats = engines[1].stats
            before = stats.num_tokens, stats.num_steps
            for i in (0, 1) if pair % 2 else (1, 0):
                begin = time.perf_counter()
                answers[i] = [out.outputs[0].token_ids for out in engines[i].generate(prompts, params)]
                took[i] = time.perf_counter() - begin
            assert answers[0] == answers[1], "drafts have changed an answer"
            if pair >= 0:
                times.append((took[0], took[1]))
                counted = [counted[0] + stats.num_tokens - before[0], counted[1] + stats.num_steps - before[1]]
        ratios = [plain / drafting for plain, drafting in times]
        best = min(plain for plain, _ in times) / min(drafting for _, drafting in times)
        print(
            f"batch {batch:2}: median {statistics.median(ratios):.3f}x  of best times {best:.3f}x"
            f"  ({min(ratios):.2f} to {max(ratios):.2f}), {counted[0] / counted[1]:.2f} tokens a step,"
            f" without {args.tokens * batch / min(plain for plain, _ in times):.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
