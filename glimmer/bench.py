"""`glimmer bench MODEL`: loading, prefill and decode on this machine, as a table and as one JSON line.

Prompts are random token ids, so that any checkpoint will do; answers are greedy and ignore the end of sequence. Prefill
is timed as one prompt to its first token, the best of a few; decode as steps of B sequences after prompts of 64 tokens.
Figures of different machines, or of different hours on a shared one, are not comparable: quote ratios within one run.
"""

import argparse
import json
import random
import sys
import time

from glimmer.config import SamplingParams
from glimmer.llm import LLM
from glimmer.testing import default_model

PREFILL = (512, 2048)
DECODE = (1, 8, 32)
PROMPT, WARM, STEPS = 64, 4, 32  # tokens before decoding is timed, steps not timed, steps timed


def main(argv: list[str]) -> int:
    """Measure and print; rank 0 speaks."""
    parser = argparse.ArgumentParser("glimmer bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="a Hugging Face directory (the demo model)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="quantise while loading (as stored)")
    parser.add_argument("--group-size", type=int, help="with int4: inputs that share a scale (32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or npu")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="processes that torchrun started")
    parser.add_argument("--prefill", type=int, nargs="*", default=PREFILL, metavar="N", help="prompt lengths")
    parser.add_argument("--decode", type=int, nargs="*", default=DECODE, metavar="B", help="batch sizes")
    parser.add_argument("--steps", type=int, default=STEPS, help="decode steps to time")
    parser.add_argument("--repeat", type=int, default=2, help="prefills of each length; the best counts")
    args = parser.parse_args(argv)
    longest = max([*args.prefill, PROMPT + WARM + args.steps + 1])
    begin = time.perf_counter()
    llm = LLM(
        args.model or str(default_model()),
        dtype=args.dtype,
        quantization=args.quantization,
        group_size=args.group_size,
        device=args.device,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=longest + 1,
        max_num_batched_tokens=max(2048, longest),
        max_num_seqs=max([*args.decode, 1]),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    figures = {"load_s": round(time.perf_counter() - begin, 2)}
    prompts = random.Random(1)
    _prefill(llm, prompts, 16)
    for length in args.prefill:
        seconds = min(_prefill(llm, prompts, length) for _ in range(args.repeat))
        figures[f"prefill_{length}"] = round(length / seconds, 1)
    for batch in args.decode:
        figures[f"decode_b{batch}"] = round(batch * args.steps / _decode(llm, prompts, batch, args.steps), 2)
    figures["peak_memory_gib"] = round(llm.peak_memory() / 2**30, 2)
    if llm.rank == 0:
        _print(llm, figures)
    llm.close()
    return 0


def _prompt(llm: LLM, source: random.Random, length: int) -> dict:
    return {"prompt_token_ids": [source.randrange(3, llm.model_config.vocab_size) for _ in range(length)]}


def _prefill(llm: LLM, source: random.Random, length: int) -> float:
    """Seconds from one prompt to its first token."""
    prompt = _prompt(llm, source, length)
    begin = time.perf_counter()
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return time.perf_counter() - begin


def _decode(llm: LLM, source: random.Random, batch: int, steps: int) -> float:
    """Seconds of `steps` steps in which all `batch` sequences decode."""
    times = []
    llm.generate(
        [_prompt(llm, source, PROMPT) for _ in range(batch)],
        SamplingParams(temperature=0, max_tokens=1 + WARM + steps, ignore_eos=True),
        on_step=lambda new: times.append((time.perf_counter(), new)),
    )
    # The last steps + 1 marks bound `steps` whole steps: all of them with every sequence decoding.
    assert all(new == batch for _, new in times[-steps:]), "a step without every sequence"
    return times[-1][0] - times[-1 - steps][0]


def _print(llm: LLM, figures: dict[str, float]) -> None:
    rows = [("load", figures["load_s"], "s")]
    for key, value in figures.items():
        what, _, number = key.partition("_")
        if what == "prefill":
            rows.append((f"prefill {number} tokens", value, "tokens/s"))
        elif what == "decode":
            rows.append((f"decode, batch {number[1:]}", value, "tokens/s"))
    rows += [("peak memory of a process", figures["peak_memory_gib"], "GiB")]
    print(f"{llm.config.model} on {llm.group.device}, {llm.size} process{'es' * (llm.size > 1)}")
    for what, value, unit in rows:
        print(f"  {what:<26}{value:>12,.2f} {unit}")
    sys.stdout.flush()
    print(json.dumps({"engine": "glimmer", "model": llm.config.model, "quantization": llm.config.quantization,
                      "processes": llm.size, **figures}))
