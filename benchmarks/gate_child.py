"""One build of glimmer with a model in memory, which computes a burst when it is asked: a part of gate.py.

usage: gate_child.py MODEL [--quantization int8] --prefill N ... --decode B ... --steps MAX

When the model is loaded it writes a line of JSON: {"load_s"}. Then each line of its standard input is answered by one:

    prefill N COUNT     COUNT prompts of N tokens, one after the other: {"rate": prompt tokens a second}
    decode B STEPS      STEPS steps, at most MAX, of B sequences: {"rate": tokens a second}
    peak                {"peak_memory_gib"} of this process until now

Until it is asked it sleeps. Of glimmer it uses the public API of `LLM` only, so that old commits can be measured.
"""

import argparse
import json
import random
import sys
import time

from glimmer import LLM, SamplingParams

CONTEXT, WARM = 64, 3  # tokens before decoding; decode steps that pass by before the clock starts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("--quantization")
parser.add_argument("--prefill", nargs="*", type=int, default=[], metavar="N")
parser.add_argument("--decode", nargs="*", type=int, default=[], metavar="B")
parser.add_argument("--steps", type=int, required=True)
args = parser.parse_args()

begin = time.perf_counter()
llm = LLM(
    args.model,
    quantization=args.quantization,
    max_model_len=max([*args.prefill, CONTEXT + WARM + args.steps]) + 1,
    max_num_batched_tokens=max(2048, CONTEXT * max([*args.decode, 1])),  # all prompts of a batch in one step
    max_num_seqs=max([*args.decode, 1]),
    enable_prefix_caching=False,
    skip_tokenizer_init=True,
)
load = time.perf_counter() - begin
source = random.Random(1)


def prompt(length: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [source.randrange(3, llm.model_config.vocab_size) for _ in range(length)]}


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def prefill(length: int, count: int) -> float:
    prompts = [prompt(length) for _ in range(count)]
    begin = time.perf_counter()
    for one in prompts:
        llm.generate(one, greedy(1))
    return count * length / (time.perf_counter() - begin)


def decode(batch: int, steps: int) -> float:
    marks: list[float] = []  # the ends of the steps

    def mark(new: int) -> None:
        if new == batch:
            marks.append(time.perf_counter())

    llm.generate([prompt(CONTEXT) for _ in range(batch)], greedy(1 + WARM + steps), on_step=mark)
    return steps * batch / (marks[WARM + steps] - marks[WARM])


print(json.dumps({"load_s": load}), flush=True)
for line in sys.stdin:
    what, *numbers = line.split()
    if what == "peak":
        answer = {"peak_memory_gib": llm.peak_memory() / 2**30}
    else:
        answer = {"rate": {"prefill": prefill, "decode": decode}[what](*map(int, numbers))}
    print(json.dumps(answer), flush=True)
llm.close()
