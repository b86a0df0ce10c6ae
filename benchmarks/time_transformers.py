"""Time transformers on a checkpoint as `glimmer bench` times glimmer: same lengths, same batches, one JSON line.

usage: time_transformers.py MODEL [--prefill N ...] [--decode B ...] [--steps N] [--repeat N] [--experts NAME]
"""

import argparse
import json
import resource
import time

import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--prefill", type=int, nargs="*", default=(512, 2048))
parser.add_argument("--decode", type=int, nargs="*", default=(1, 8, 32))
parser.add_argument("--steps", type=int, default=32)
parser.add_argument("--repeat", type=int, default=2, help="prefills of each length; the best counts")
parser.add_argument("--experts", default="grouped_mm", help="grouped_mm, batched_mm or eager")
args = parser.parse_args()

begin = time.perf_counter()
options = {"dtype": "auto", "experts_implementation": args.experts}
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, **options).eval()
figures = {"engine": f"transformers {transformers.__version__} {args.experts}"}
figures["load_s"] = round(time.perf_counter() - begin, 2)
source = torch.Generator().manual_seed(1)


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=source)


with torch.inference_mode():
    model(prompt(1, 16))
    for length in args.prefill:
        seconds = []
        for _ in range(args.repeat):
            tokens = prompt(1, length)
            begin = time.perf_counter()
            model(tokens, use_cache=True, logits_to_keep=1)
            seconds.append(time.perf_counter() - begin)
        figures[f"prefill_{length}"] = round(length / min(seconds), 1)
    for batch in args.decode:
        out = model(prompt(batch, 64), use_cache=True, logits_to_keep=1)
        for step in range(4 + args.steps):
            if step == 4:
                begin = time.perf_counter()
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        figures[f"decode_b{batch}"] = round(batch * args.steps / (time.perf_counter() - begin), 2)
figures["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
print(json.dumps(figures))
