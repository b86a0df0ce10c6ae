"""How long a short request waits for its first token while others' long prompts are read, counted in steps.

A real server, whose engine process writes down in which step a request came to it, and in which it had its first
token. No clock decides.
"""

import contextlib
import json
import random
import sys
import threading

import httpx
import pytest
from jobs import until
from servers import Server

LONG, CONTEXT, AT_ONCE = 15_000, 16_384, 128
# The engine process with two lines in a file for each request: (name of the event, tokens of the prompt, steps so far).
ENGINE = """
import json, os, sys
from glimmer.engine.engine import Engine
from glimmer.server import engine_process

file, steps, begun = open(os.environ["STEPS_OF_A_TEST"], "w", buffering=1), 0, {}
add, step = Engine.add, Engine.step

def adding(engine, request, constraint=None):
    begun[request.id] = len(request.prompt_token_ids)
    print(json.dumps(["came", begun[request.id], steps]), file=file)
    add(engine, request, constraint)

def stepping(engine):
    global steps
    outputs = step(engine)
    steps += 1
    for output in outputs:
        if output.token_ids and output.request_id in begun:
            print(json.dumps(["first token", begun.pop(output.request_id), steps]), file=file)
    return outputs

Engine.add, Engine.step = adding, stepping
sys.exit(engine_process.main(sys.argv[1:]))
"""
SERVER = f"""
import json, sys
from glimmer.cli import main, serve
serve.command_for = lambda engine: [sys.executable, "-c", {ENGINE!r}, "{{socket}}", json.dumps(engine)]
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_short_request_has_its_first_token_within_two_steps(checkpoint, tmp_path):
    model, file = checkpoint(max_position_embeddings=CONTEXT), tmp_path / "steps"
    words = ["--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(AT_ONCE), "--max-num-seqs", "16"]
    words += ["--threads", "1", "--kv-cache-memory-bytes", "256MB", "--shutdown-timeout", "0"]
    launcher = (sys.executable, "-c", SERVER)
    with Server(str(model), *words, launcher=launcher, small=False, STEPS_OF_A_TEST=str(file)) as server:
        draw = random.Random(1)
        long = [[draw.randrange(256) for _ in range(LONG)] for _ in range(6)]

        def ask(prompt) -> None:
            with contextlib.suppress(httpx.TransportError):  # the server ends before these have been read
                server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in long]
        for thread in threads:
            thread.start()
        until(lambda: seen(file).count(("came", LONG)) == len(long))
        for length in (1, 20):
            answer = server.post("/v1/completions", {"prompt": long[0][-length:], "max_tokens": 4, "ignore_eos": True})
            assert answer.json()["usage"]["completion_tokens"] == 4
        found = [tuple(json.loads(line)) for line in file.read_text().splitlines()]
        server.stop(timeout=60)
        for thread in threads:
            thread.join(30)
    came = {length: steps for what, length, steps in found if what == "came"}
    first = {length: steps for what, length, steps in found if what == "first token"}
    assert LONG not in first  # while it was read
    assert came[1] > came[LONG] and all(1 <= first[length] - came[length] <= 2 for length in (1, 20)), found


def seen(file) -> list[tuple[str, int]]:
    """The events so far, and the tokens of their prompts."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [tuple(json.loads(line)[:2]) for line in lines]
