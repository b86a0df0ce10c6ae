"""Prompts answered from `--kv-cache-dir`: how fast, beside what the disk itself reads.

usage: kv_disk.py [--tokens 30000] [--rounds 5] [--directory DIR]

Two models: one of random weights that is written first (8 layers, 16 KiB of KV cache for a token, so that the default
prompt takes 0.5 GB), with a prompt of --tokens tokens; and the demo model with the longest prompt that it takes. A
first engine computes the prompt and writes its blocks. Then, in each round, the files are dropped from the page cache,
a new engine answers the prompt with one token, and the disk is measured just before and after: direct reads of the same
files, by as many threads. Then a prompt is answered that shares with it what has been read, now from memory, and ends
in as many other tokens: what this takes (computing the last tokens, which fill no page, and the answer's token) is no
reading, and the rest of the first answer's time is: looking up, reading, comparing checksums, filling the cache. All
files are removed in the end. Prints a table of medians and one line of JSON. Needs 1 GB of disk, and a file system with
direct reads.
"""

import argparse
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import make_checkpoint

from glimmer import LLM, SamplingParams
from glimmer.checkpoint.buffers import large_pages
from glimmer.cli.demo import default_model
from glimmer.engine.disk_cache import READERS

CONFIG = make_checkpoint.CONFIG | {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
}
CHUNK = 2048
PAGE = mmap.PAGESIZE


def disk_speed(files: list[Path]) -> float:
    """Bytes a second of direct reads of these files, READERS at a time, into large pages."""
    left, done = iter(files), [0] * READERS
    guard = threading.Lock()
    longest = -(-max(file.stat().st_size for file in files) // PAGE) * PAGE
    memories = [large_pages(longest) for _ in range(READERS)]

    def read(number: int) -> None:
        while True:
            with guard:
                file = next(left, None)
            if file is None:
                return
            descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
            done[number] += os.preadv(descriptor, [memories[number]], 0)
            os.close(descriptor)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    assert sum(done) == sum(file.stat().st_size for file in files), "whole files"
    return sum(done) / seconds


def drop(files: list[Path]) -> None:
    """Have the page cache forget these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(model: Path, kv: Path, tokens: int | None, rounds: int) -> dict[str, float]:
    """Of a prompt of so many tokens, None: as many as the model takes."""

    def engine() -> LLM:
        return LLM(
            str(model), kv_cache_dir=kv, kv_cache_size_bytes=64 << 30, skip_tokenizer_init=True, max_num_seqs=1,
            max_model_len=None if tokens is None else tokens + 2, max_num_batched_tokens=CHUNK,
            speculative_config="off",
        )  # fmt: skip

    def answer(llm: LLM, prompt: list[int]) -> tuple[float, int, list[int]]:
        """(seconds, tokens from the cache, the answer)."""
        begin = time.perf_counter()
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        return time.perf_counter() - begin, output.num_cached_tokens, output.outputs[0].token_ids

    with engine() as llm:
        length = llm.max_model_len - 1 if tokens is None else tokens
        prompt = [3 + i * 7919 % 1000 for i in range(length)]
        computed, cached, wanted = answer(llm, prompt)
        assert cached == 0, "nothing was there"
        until_written(llm)
    files = sorted(kv.glob("*/*.kv"))
    rows = []
    for _ in range(rounds):
        with engine() as llm:
            answer(llm, [5] * 128)  # what a first step takes
            drop(files)
            before = disk_speed(files)
            drop(files)
            took, cached, found = answer(llm, prompt)
            nbytes = llm.disk.read_bytes
            again, shared, _ = answer(llm, prompt[:cached] + [4] * (length - cached))
            assert shared == cached, "as much is computed"
        drop(files)
        speed = statistics.mean((before, disk_speed(files)))
        assert found == wanted and cached > length - 2 * 128, "the same answer, from disk"
        row = {"answered_s": took, "from_memory_s": again, "disk_GBps": speed / 1e9}
        row |= {"answered_of_disk": nbytes / speed / took, "read_of_disk": nbytes / speed / (took - again)}
        rows.append(row)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {"tokens": length, "from_disk": cached, "MB": nbytes / 1e6, "computed_s": computed} | medians


def until_written(llm: LLM) -> None:
    """Wait until the writer has nothing more to do."""
    last = -1
    while llm.disk.written_bytes != last:
        last = llm.disk.written_bytes
        time.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured"
    )
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        model = Path(directory) / "model"
        make_checkpoint.main(model, CONFIG)
        demo = Path(default_model("this benchmark"))
        for name, one, tokens in (("long context", model, given.tokens), ("demo model", demo, None)):
            found[name] = measure(one, Path(directory) / f"kv of the {name}", tokens, given.rounds)
            print(name + "".join(f"\n  {key:16} {value:12,.3f}" for key, value in found[name].items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
