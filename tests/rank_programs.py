"""Programs of users on several ranks, run by test_ranks.py: each writes what this rank got as JSON.

usage: rank_programs.py PROGRAM MODEL OUT, with RANK and WORLD_SIZE in the environment, or as one process alone
"""

import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from glimmer import LLM, SamplingParams
from glimmer.errors import GlimmerError


def params(i: int, **more: Any) -> SamplingParams:
    """Greedy, or drawn with a seed; short and long; sometimes several answers, or answers of a form."""
    drawn = {"temperature": 1.0, "seed": i} if i % 3 == 1 else {"temperature": 0}
    form = {"structured_outputs": {"regex": "[a-z]{9}"}} if i % 4 == 2 else {}
    return SamplingParams(max_tokens=2 + i % 7, ignore_eos=True, n=1 + (i % 5 == 0), **form | drawn | more)


def prompt(i: int) -> str:
    return f"prompt {i} " * (1 + i % 4)


def answers(llm: LLM, numbers: list[int], **more: Any) -> dict[str, list]:
    """What generate gives for the prompts with these numbers, in whatever order they are asked."""
    random.Random(llm.rank).shuffle(numbers)
    outputs = llm.generate([prompt(i) for i in numbers], [params(i, **more) for i in numbers])
    return {
        str(i): [[o.token_ids, o.text, o.finish_reason] for o in output.outputs] for i, output in zip(numbers, outputs)
    }


async def streamed(llm: LLM, i: int, until: int = 10**9, **more: Any) -> list:
    """The token ids of an answer in pieces; left after `until` pieces."""
    ids: list[int] = []
    async for piece in llm.astream(prompt(i), params(i, **more)):
        if piece.index == 0:
            ids += piece.token_ids
            if len(ids) >= until:
                break
    return ids


async def crowd(llm: LLM, count: int, width: int) -> dict[str, list]:
    """`count` coroutines, at most `width` at once, in an order of this rank's own; every fourth leaves early."""
    source, room = random.Random(llm.rank + 1), asyncio.Semaphore(width)
    order = list(range(count))
    if llm.size > 1:
        source.shuffle(order)
    found: dict[str, list] = {}

    async def one(i: int) -> None:
        async with room:
            await asyncio.sleep(source.random() * 0.01)
            found[str(i)] = await streamed(llm, i, until=2 if i % 4 == 3 else 10**9)

    await asyncio.gather(*map(one, order))
    return found


def everywhere(llm: LLM) -> dict[str, Any]:
    """The same program on every rank: sets of prompts, threads and coroutines in any order."""
    found: dict[str, Any] = {"sets": answers(llm, list(range(20)), logprobs=None)}
    found["streams"] = [[p.token_ids for p in llm.stream(prompt(i), params(i))] for i in range(3)]
    parts: dict[str, Any] = {}

    def caller(number: int) -> None:
        time.sleep(random.Random(7 * llm.rank + number).random() * 0.1)
        parts[str(number)] = [answers(llm, list(range(100 * number + k, 100 * number + k + 5))) for k in (0, 10)]

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["threads"] = parts
    found["coroutines"] = asyncio.run(crowd(llm, 80, 80))
    logprobs = llm.generate(prompt(1), params(1, logprobs=1, prompt_logprobs=1))[0]
    found["logprobs"] = [len(logprobs.outputs[0].logprobs or ()), len(logprobs.prompt_logprobs or ())]
    return found


def serve(llm: LLM) -> dict[str, Any]:
    """Rank 0 alone has requests: many come and go; then it is idle for some time, and is asked again."""
    if llm.rank > 0:
        llm.follow()
        return {}
    llm.follow()
    found = {"crowd": asyncio.run(crowd(llm, 300, 40))}
    time.sleep(2)
    try:
        llm.generate([prompt(i) for i in range(8)], params(5), on_finish=lambda i, output: 1 // 0)
    except ZeroDivisionError:
        found["again"] = answers(llm, list(range(8)))
    return found


def others(llm: LLM) -> dict[str, Any]:
    """Rank 1 asks for something else in its second call."""
    answers(llm, [1, 2, 3])
    answers(llm, [4, 5, 6 + llm.rank])
    return {}


def more(llm: LLM) -> dict[str, Any]:
    """Rank 1 makes a call that rank 0 does not make."""
    answers(llm, [1, 2, 3])
    if llm.rank == 1:
        answers(llm, [4])
    return {}


def slow(llm: LLM) -> dict[str, Any]:
    """Rank 1 asks for the last answers when rank 0 has closed."""
    found = answers(llm, [0, 1])
    if llm.rank == 1:
        time.sleep(4)
    found |= answers(llm, [2, 3])
    if llm.rank == 0:
        llm.close()
    return found


def hotter(llm: LLM) -> dict[str, Any]:
    """The prompts are the same, a parameter is not."""
    llm.generate(["a", "b"], SamplingParams(max_tokens=3, seed=1, temperature=0.5 + llm.rank))
    return {}


def raises(llm: LLM) -> dict[str, Any]:
    """Every rank ends by an exception in the middle of a stream."""
    for piece in llm.stream("a", SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)):
        if len(piece.token_ids):
            sys.exit(7)
    return {}


def dies(llm: LLM) -> dict[str, Any]:
    """The rank that OUT ends with dies in the middle of a stream, the others wait for their answers in two threads."""
    long = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
    heard: list[GlimmerError] = []

    def caller() -> None:
        try:
            llm.generate("b", long)
        except GlimmerError as error:
            heard.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    try:
        for number, _ in enumerate(llm.stream("a", long)):
            if number == 3 and sys.argv[3].endswith(str(llm.rank)):
                os.kill(os.getpid(), signal.SIGKILL)
    finally:
        thread.join()
        assert len(heard) == 1, "the other thread has not heard of it"
    return {}


def stopped(llm: LLM) -> dict[str, Any]:
    """Rank 1 is stopped while nobody asks for anything; later rank 0 asks."""
    other = llm.group.broadcast(os.getpid(), 1)
    llm.follow()
    if llm.rank == 1:
        return {}
    answers(llm, [1])
    time.sleep(2)  # until both have nothing to do
    os.kill(other, signal.SIGSTOP)
    try:
        time.sleep(6)
        print("rank 0 asks", file=sys.stderr, flush=True)
        return answers(llm, [2])
    finally:
        os.kill(other, signal.SIGKILL)


def ends(llm: LLM) -> dict[str, Any]:
    """The end of the program is the end of the LLM."""
    return answers(llm, [1, 2])


def differs(llm: LLM) -> dict[str, Any]:
    """Rank 1 has been started on another model, MODEL.differs."""
    return answers(llm, [1, 2])


def drafts(llm: LLM) -> dict[str, Any]:
    """The same answers without drafts and with them; the model has an MTP layer."""
    with llm.without_drafts():
        plain = answers(llm, list(range(12)))
    return {"plain": plain, "drafted": answers(llm, list(range(12))), "accepted": llm.stats.num_accepted_tokens}


def paying(llm: LLM) -> dict[str, Any]:
    """The same where rank 0 finds out whether drafts pay, which takes some tokens."""
    prompts = [llm.render([{"role": "user", "content": text}]) for text in ("Introduce Paris.", "Introduce Rome.")]

    def ids() -> list[Any]:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100))
        return [output.outputs[0].token_ids for output in outputs]

    with llm.without_drafts():
        plain = ids()
    drafted = [ids()]
    while not llm.stats.num_accepted_tokens and len(drafted) < 40:
        drafted.append(ids())
    return {"plain": [plain] * len(drafted), "drafted": drafted, "accepted": llm.stats.num_accepted_tokens}


def disk(llm: LLM) -> dict[str, Any]:
    """KV blocks in a directory, OUT.kv: prompts that begin alike, and how many of their tokens were found."""
    prompts = [{"prompt_token_ids": [i % 200 for i in range(600)] + [last]} for last in (1, 2, 3)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    llm.close()
    stats = llm.disk
    assert stats is not None
    return {
        "answers": [output.outputs[0].token_ids for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "read": stats.hit_tokens,
        "damaged": stats.damaged_files,
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "disk": {"max_model_len": 1024},
    "drafts": {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}},
    "paying": {"speculative_config": "mtp"},
}
PROGRAMS: dict[str, Callable[[LLM], dict[str, Any]]] = {
    program.__name__: program
    for program in (
        everywhere,
        serve,
        others,
        more,
        slow,
        hotter,
        raises,
        dies,
        stopped,
        ends,
        differs,
        drafts,
        paying,
        disk,
    )
}

if __name__ == "__main__":
    name, model, out = sys.argv[1:]
    size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if name == "differs" and os.environ["RANK"] == "1":
            model = f"{model}.differs"
        llm = LLM(
            model,
            dtype="float32",
            tensor_parallel_size=size,
            max_num_seqs=16,
            kv_cache_dir=f"{out}.kv" if name == "disk" else None,
            **{"max_model_len": 256} | SETTINGS.get(name, {}),
        )
        result = PROGRAMS[name](llm)
    except GlimmerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    with open(f"{out}.{llm.rank}", "w") as file:
        json.dump(result, file)
