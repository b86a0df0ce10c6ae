"""Time llama.cpp on a GGUF as `glimmer bench` times glimmer, one JSON line. For the Python that has llama-cpp-python.

usage: time_llama_cpp.py FILE.gguf [--prefill N ...] [--decode B ...] [--steps N] [--repeat N] [--plain]

Decode is fed random tokens, which cost what chosen ones do. Peak memory counts the pages of the file that it maps.
"""

import argparse
import json
import os
import random
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import llama_cpp

PROMPT, WARM = 64, 4


class Engine:
    """A model and a context for `sequences` sequences of `tokens` tokens together."""

    def __init__(self, file: str, plain: bool, sequences: int, tokens: int, longest: int):
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = not plain
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = tokens, sequences, True
        params.n_batch = params.n_ubatch = max(longest, sequences)
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {tokens} tokens for {file}")
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.source = random.Random(1)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def compute(self, places: Iterable[tuple[int, int, bool]]) -> None:
        """One step of random tokens at (sequence, position, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = 0
        for i, (sequence, position, wanted) in enumerate(places):
            batch.token[i] = self.source.randrange(3, self.words)
            batch.pos[i], batch.logits[i] = position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.n_tokens = i + 1
        code = llama_cpp.llama_decode(self.context, batch)
        if code != 0:
            raise SystemExit(f"llama_decode of {batch.n_tokens} tokens gave {code}")
        llama_cpp.llama_synchronize(self.context)

    def prompt(self, length: int, sequence: int = 0) -> float:
        """Seconds of a prompt."""
        begin = time.perf_counter()
        self.compute((sequence, position, position == length - 1) for position in range(length))
        return time.perf_counter() - begin

    def steps(self, count: int, batch: int, position: int) -> float:
        """Seconds of `count` steps of the first `batch` sequences, from `position` on."""
        begin = time.perf_counter()
        for step in range(count):
            self.compute((sequence, position + step, True) for sequence in range(batch))
        return time.perf_counter() - begin


parser = argparse.ArgumentParser()
parser.add_argument("file")
parser.add_argument("--prefill", type=int, nargs="*", default=(512, 2048))
parser.add_argument("--decode", type=int, nargs="*", default=(1, 8, 32))
parser.add_argument("--steps", type=int, default=32)
parser.add_argument("--repeat", type=int, default=2, help="prefills of each length; the best counts")
parser.add_argument("--plain", action="store_true", help="matrices as in the file, not repacked for the processor")
args = parser.parse_args()

begin = time.perf_counter()
sequences, longest = max([*args.decode, 1]), max([*args.prefill, PROMPT])
tokens = max(longest, sequences * (PROMPT + WARM + args.steps)) + 256
engine = Engine(args.file, args.plain, sequences, tokens, longest)
name = f"llama.cpp {llama_cpp.__version__} {Path(args.file).stem.rpartition('-')[2]}"  # llama-cpp-python's version
figures = {"engine": name + (" plain" if args.plain else ""), "load_s": round(time.perf_counter() - begin, 2)}
engine.prompt(16)
engine.forget()
for length in args.prefill:
    seconds = []
    for _ in range(args.repeat):
        seconds.append(engine.prompt(length))
        engine.forget()
    figures[f"prefill_{length}"] = round(length / min(seconds), 1)
for batch in args.decode:
    for sequence in range(batch):
        engine.prompt(PROMPT, sequence)
    engine.steps(WARM, batch, PROMPT)
    figures[f"decode_b{batch}"] = round(batch * args.steps / engine.steps(args.steps, batch, PROMPT + WARM), 2)
    engine.forget()
figures["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
print(json.dumps(figures))
