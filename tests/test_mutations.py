"""Directories with random faults: each is served, or refused with exit code 2, in bounded time and memory.

A few hundred mutated copies of one small checkpoint are opened in one child process, whose address space and time are
limited. What counts as a refusal is one of our errors in three parts; anything else that is raised is reported with the
seed of the mutation, which makes it again.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHILD = """
import json, os, random, resource, shutil, signal, sys, time
from pathlib import Path

import torch

from glimmer import LLM, SamplingParams
from glimmer.errors import GlimmerError

torch.set_num_threads(1)
source, work, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))

NUMBERS = [0, -1, 1, 2, 3, 10**6, 2**31, 2**31 - 1, 2**62, 2**63, 10**18, 10**400, -(10**400), 0.5, 1e308, 1e-320]
VALUES = [*NUMBERS, None, True, False, "", "x", "\\ud800", "1" * 5000, [], {}, [[]], [None] * 3, {"a": {"b": []}},
          float("nan"), float("inf"), "default", "yarn", {"rope_type": "yarn", "factor": 10**300}, {"content": 5},
          "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10**9 }}", "{%"]
NESTED = "[" * 2000 + "]" * 2000


def places(value, path=()):
    if isinstance(value, dict):
        for key in list(value):
            yield (*path, key)
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 20)):
            yield (*path, i)
            yield from places(value[i], (*path, i))


def mutate_json(text, rng):
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        path = rng.choice([place for place in places(value)] or [()])
        if not path:
            break
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if rng.random() < 0.15:
            del inner[path[-1]]
        elif rng.random() < 0.1:
            inner[path[-1]] = "\\0NESTED"
        else:
            inner[path[-1]] = rng.choice(VALUES)
    sys.set_int_max_str_digits(0)
    changed = json.dumps(value).replace('"\\\\u0000NESTED"', NESTED).encode()
    sys.set_int_max_str_digits(4300)
    return changed


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 3, 10))):
        where = rng.randrange(max(len(data), 1))
        match rng.randrange(4):
            case 0:
                data[where : where + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[where : where + rng.choice((1, 8, 1000))]
            case 2:
                data[where:where] = rng.choice((b"\\xff", b'"', b"{", b"\\0" * 9, b"1" * 5000))
            case 3:
                data = data[:where]
    return bytes(data)


def mutate(directory, rng):
    name = rng.choice(["config.json"] * 6 + ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] * 2
                      + ["model.safetensors.index.json", "chat_template.jinja"]
                      + sorted(path.name for path in directory.glob("*.safetensors")) * 2)
    file = directory / name
    data = file.read_bytes() if file.exists() else b"{}"
    kind = rng.random()
    if kind < 0.04:
        file.unlink(missing_ok=True)
        rng.choice((lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.mkdir(),
                    lambda: file.symlink_to("/nowhere"), lambda: None, lambda: file.symlink_to(file)))()
        return name, "kind of file"
    if name.endswith(".safetensors") and kind < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = mutate_json(data[8 : 8 + length], rng)
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    elif name.endswith(".json") and kind < 0.85:
        data = mutate_json(data, rng)
    else:
        data = mutate_bytes(data, rng)
    file.unlink(missing_ok=True)
    file.write_bytes(data)
    return name, "content"


def late(*_):
    raise TimeoutError("more than 20 seconds")


signal.signal(signal.SIGALRM, late)
faults, served, refused = [], 0, 0
ask = [{"role": "user", "content": "hi"}]
for seed in range(count):
    rng = random.Random(seed)
    directory = work / str(seed)
    shutil.copytree(source, directory)
    what = mutate(directory, rng)
    signal.alarm(20)
    begun = time.monotonic()
    try:
        with LLM(str(directory), max_model_len=32, max_num_seqs=2, kv_cache_memory_bytes=1 << 22, threads=1) as llm:
            for output in (llm.generate("a prompt", SamplingParams(temperature=0, max_tokens=2), errors="return"),
                           llm.chat(ask, SamplingParams(temperature=0, max_tokens=2), errors="return")):
                assert output[0].error is None or isinstance(output[0].error, GlimmerError)
        served += 1
    except GlimmerError as error:
        if error.exit_code != 2 or not (error.found and error.expected and error.todo):
            faults.append(f"{seed} {what}: {error!r}")
        str(error).encode()
        if len(str(error)) > 20_000:
            faults.append(f"{seed} {what}: a message of {len(str(error))} characters")
        refused += 1
    except BaseException as error:
        faults.append(f"{seed} {what}: {type(error).__name__}: {str(error)[:200]!a}")
    finally:
        signal.alarm(0)
        shutil.rmtree(directory)
    if time.monotonic() - begun > 15:
        faults.append(f"{seed} {what}: {time.monotonic() - begun:.0f} s")
status = open("/proc/self/status").read()  # getrusage would count what the parent had before the fork
peak = int(status.partition("VmHWM:")[2].split()[0]) >> 10
print(json.dumps({"served": served, "refused": refused, "peak": peak, "faults": faults}))
"""


def test_every_fault_is_served_or_refused(checkpoint, tmp_path):
    count = 300
    source = checkpoint(shards=2, num_hidden_layers=2, vocab_size=300)
    command = [sys.executable, "-c", CHILD, str(source), str(tmp_path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["faults"], "\n".join(found["faults"])
    assert found["served"] > 20 and found["refused"] > count // 2 and found["peak"] < 3 << 10, found
