"""Whether `glimmer serve` stays as it is for hours: many clients of every kind, and what is left of them at the end.

usage: soak.py [MODEL] [--minutes 1] [--clients 8] [--seed 0] [--growth 32] [-- further words for `glimmer serve`]

The answers to a set of requests are computed first, by an LLM in a process of its own. Then a server is started, and
clients ask it in an order drawn from the seed: texts and conversations of many lengths, greedy and with seeds,
streaming and not, tools, schemas, conversations that grow; and among them requests that are refused, clients that leave
before, while and after they are answered, or that read slowly. At the end nothing of that may be left: every block of
the cache is free, and the server's processes hold as many file descriptors and threads as after a first round, and
about as much memory as half-way. Every whole answer must have been the one that was computed first. The last line is
JSON; the exit code is 1 if anything was found. Linux only. Not here: how fast it is (`glimmer bench serve`).
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "glimmer/demo"
SETTINGS = ("--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "64MB", "--threads", "1")
SETTLE = 30.0  # seconds within which nothing may be left of requests that have ended
# What may be more at the end than after the first round: pools start their threads when they first need them.
ALLOWED = {"processes": 0, "descriptors": 4, "threads": 8}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PLACE}}
FORM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
    "additionalProperties": False,
}
QUESTIONS = ("请介绍一下北京", "What is 347 + 586?", "How are you?", "What is 12 + 7?", "你好")
REFUSED: tuple[tuple[str, bytes, int], ...] = (
    (CHAT, b"{", 400),
    (CHAT, b"[]", 400),
    (CHAT, b'{"messages": []}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "tools": [5]}', 400),
    (TEXT, json.dumps({"prompt": "word " * 5000}).encode(), 400),
    (TEXT, json.dumps({"prompt": [10**9]}).encode(), 400),
    (TEXT, json.dumps({"prompt": "x", "guided_regex": "("}).encode(), 400),
    ("/v1/nothing", b"{}", 404),
)


@dataclass(frozen=True)
class Case:
    """A request, and what each of its answers must be. group: the conversation that it continues, if any."""

    path: str
    body: dict[str, Any]
    expected: list[dict[str, Any]]
    group: int = -1


@dataclass(frozen=True)
class Held:
    """What the server's processes hold when nobody asks anything. memory: MiB, of all of them."""

    processes: int
    descriptors: int
    threads: int
    memory: float


@dataclass
class Report:
    """What happened: how often each kind of client came; what was found, which should be nothing."""

    seconds: float = 0.0
    clients: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    cached_tokens: float = 0.0
    held: list[Held] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- the answers, computed before


def cases(model: str) -> list[Case]:
    """All requests with their answers, from an LLM in this process."""
    from glimmer import LLM, SamplingParams
    from glimmer.text.chat import ChatTemplate
    from glimmer.text.parse import AnswerFormat, AnswerParser, answer_format, collect, thinking_open
    from glimmer.text.tokenizer import Tokenizer

    llm = LLM(model, max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=1 << 26, threads=1)
    form = answer_format(ChatTemplate.load(model).source, Tokenizer.load(model).added_names) or AnswerFormat(None, None)
    found: list[Case] = []

    def text(prompt: str | list[int], **params: Any) -> None:
        given = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
        [output] = llm.generate(given, SamplingParams(**params))
        expected = [{"text": one.text, "finish_reason": one.finish_reason} for one in output.outputs]
        found.append(Case(TEXT, {"prompt": prompt, **params}, expected))

    def chat(messages: list[Any], tools: Any = None, schema: Any = None, group: int = -1, **params: Any) -> str:
        body = {"messages": messages, **params} | ({"tools": tools} if tools else {})
        if schema:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
            params["structured_outputs"] = {"json": schema}
        [output] = llm.chat(messages, SamplingParams(**params), tools=tools)
        expected = []
        for one in output.outputs:
            parser = AnswerParser(form, tools, thinking_open(output.prompt or "", form))
            answer = collect([*parser.push(one.text), *parser.finish()])
            calls = [[call.name, call.arguments] for call in answer.tool_calls]
            reason = "tool_calls" if calls and one.finish_reason == "stop" else one.finish_reason
            told = {"reasoning": answer.reasoning or "", "content": answer.content or "", "calls": calls}
            expected.append(told | {"finish_reason": reason})
        found.append(Case(CHAT, body, expected, group))
        return str(expected[0]["content"])

    greedy = {"temperature": 0.0}
    drawn = {"temperature": 0.9, "top_p": 0.95, "top_k": 40}
    for number, question in enumerate(QUESTIONS):
        text(question, max_tokens=12 + 9 * number, **greedy)
        text(f"{question} " * (3 + 25 * number), max_tokens=8, ignore_eos=True, **greedy)
        text([3 + number, 5, 7] * (5 + 60 * number), max_tokens=16, seed=number, n=1 + number % 3, **drawn)
        chat([{"role": "user", "content": question}], max_tokens=64, **greedy)
        chat([{"role": "user", "content": question}], max_tokens=24, seed=7 + number, n=2, **drawn)
        history: list[Any] = [{"role": "system", "content": "Be brief. " * (2 + 5 * number)}]
        for follow in (question, *QUESTIONS[:3]):
            history.append({"role": "user", "content": follow})
            said = chat(list(history), group=number, max_tokens=48, **greedy)
            history.append({"role": "assistant", "content": said})
    chat([{"role": "user", "content": "巴黎的天气怎么样?"}], tools=[WEATHER], max_tokens=100, **greedy)
    chat([{"role": "user", "content": "请介绍一下北京"}], schema=FORM, max_tokens=300, **greedy)
    text("Is it?", max_tokens=60, stop=["e"], **greedy)
    llm.close()
    return found


# ---------------------------------------------------------------------- the server and what it holds


class Served:
    """A `glimmer serve` of its own process, and the figures that it and the kernel give about it."""

    def __init__(self, words: list[str], log: Path):
        command = [sys.executable, "-m", "glimmer", "serve", *words, "--port", "0"]
        self._log = log
        with log.open("wb") as said:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        self.url = self._wait(r"listening on (http\S+?);")
        self._wait(r"(ready) on")

    def _wait(self, pattern: str, seconds: float = 600.0) -> str:
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server does not begin:\n{self.said()}")
            time.sleep(0.05)
        return found[1]

    def said(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def figure(self, name: str) -> float:
        """A figure of /metrics."""
        for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if re.split("[ {]", line, maxsplit=1)[0] == name:
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def idle(self) -> bool:
        """Whether nothing is left of any request."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "glimmer:requests_without_token")
        busy = sum(map(self.figure, names))
        return busy == 0 and self.figure("glimmer:free_blocks") == self.figure("glimmer:blocks")

    def held(self) -> Held:
        """What its processes hold."""
        tree = [Path(f"/proc/{pid}") for pid in _tree(self.process.pid)]
        pages = sum(int((one / "statm").read_text().split()[1]) for one in tree)
        return Held(
            len(tree),
            sum(len(os.listdir(one / "fd")) for one in tree),
            sum(len(os.listdir(one / "task")) for one in tree),
            round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        )


def _tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(file.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


@contextmanager
def served(words: list[str]) -> Iterator[Served]:
    """A server, as long as it is needed."""
    with tempfile.TemporaryDirectory() as directory:
        server = Served(words, Path(directory) / "log")
        try:
            yield server
        finally:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(60)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


# ---------------------------------------------------------------------- clients


class Clients:
    """Clients of every kind. Each kind is a method; what goes wrong is a line of the report."""

    def __init__(self, url: str, known: list[Case], report: Report):
        self._url, self._known, self._report = url, known, report
        self._guard = threading.Lock()
        groups = {case.group for case in known} - {-1}
        self._groups = [[case for case in known if case.group == group] for group in sorted(groups)]
        whole, rude = (self.answer, self.stream, self.slow, self.conversation), (self.leave, self.impatient, self.torn)
        self.kinds: list[Callable[[random.Random, httpx.Client], None]] = [*whole, *whole, *rude, self.refused]

    def work(self, seed: int, until: float) -> None:
        """One client after the other, until then."""
        draw = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=120) as http:
            while time.monotonic() < until:
                kind = draw.choice(self.kinds)
                try:
                    kind(draw, http)
                except Exception as error:
                    self._fault(f"{kind.__name__}: {type(error).__name__}: {error}")
                with self._guard:
                    self._report.clients[kind.__name__] = self._report.clients.get(kind.__name__, 0) + 1

    def answer(self, draw: random.Random, http: httpx.Client) -> None:
        """A whole answer at once."""
        self._whole(http, draw.choice(self._known))

    def conversation(self, draw: random.Random, http: httpx.Client) -> None:
        """A conversation that grows."""
        for case in draw.choice(self._groups):
            self._whole(http, case)

    def stream(self, draw: random.Random, http: httpx.Client) -> None:
        """A whole answer in pieces."""
        case = draw.choice(self._known)
        with http.stream("POST", case.path, json=case.body | {"stream": True}) as response:
            self._compare(case, _joined(case, response.iter_lines()))

    def slow(self, draw: random.Random, http: httpx.Client) -> None:
        """The same for somebody who reads with pauses."""
        case = draw.choice(self._known)
        with http.stream("POST", case.path, json=case.body | {"stream": True}) as response:
            self._compare(case, _joined(case, _with_pauses(response.iter_lines(), draw)))

    def leave(self, draw: random.Random, http: httpx.Client) -> None:
        """A client that leaves while it is being answered."""
        body = {
            "prompt": "hello " * draw.randint(1, 150),
            "max_tokens": 800,
            "ignore_eos": True,
            "n": draw.randint(1, 4),
        }
        with http.stream("POST", TEXT, json=body | {"stream": True}) as response:
            for _ in zip(range(draw.randint(0, 12)), response.iter_lines()):
                pass

    def impatient(self, draw: random.Random, http: httpx.Client) -> None:
        """A client that does not wait for its answer."""
        body = {"messages": [{"role": "user", "content": "hi " * draw.randint(1, 200)}], "ignore_eos": True}
        try:
            response = http.post(CHAT, json=body | {"max_tokens": 700}, timeout=draw.uniform(0.001, 0.3))
        except httpx.TimeoutException:
            return
        if response.status_code >= 500:
            self._fault(f"impatient: {response.status_code}: {response.text[:200]}")

    def torn(self, draw: random.Random, http: httpx.Client) -> None:
        """A connection that ends within its request."""
        place = urlsplit(self._url)
        request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\n\r\n" + b'{"prompt": "x"'
        with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
            connection.sendall(request[: draw.randint(1, len(request))])

    def refused(self, draw: random.Random, http: httpx.Client) -> None:
        """A request that cannot be served."""
        path, body, status = draw.choice(REFUSED)
        response = http.post(path, content=body)
        if response.status_code != status or not response.json()["error"]["message"]:
            self._fault(f"{body[:80]!r}: {response.status_code} in place of {status}: {response.text[:200]}")

    def _whole(self, http: httpx.Client, case: Case) -> None:
        response = http.post(case.path, json=case.body)
        if response.status_code != 200:
            self._fault(f"{case.body}: {response.status_code}: {response.text[:200]}")
        else:
            self._compare(case, [_told(case, choice) for choice in response.json()["choices"]])

    def _compare(self, case: Case, found: list[dict[str, Any]]) -> None:
        with self._guard:
            self._report.answers += len(found)
        if found != case.expected:
            self._fault(f"{json.dumps(case.body)[:200]}: {found}, offline {case.expected}")

    def _fault(self, line: str) -> None:
        with self._guard:
            self._report.faults.append(line[:1000])


def _told(case: Case, choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a response, as `cases` writes it."""
    reason = {"finish_reason": choice["finish_reason"]}
    if case.path == TEXT:
        return {"text": choice["text"]} | reason
    message = choice["message"]
    calls = [[one["function"]["name"], one["function"]["arguments"]] for one in message.get("tool_calls") or ()]
    return {"reasoning": message["reasoning"] or "", "content": message["content"] or "", "calls": calls} | reason


def _joined(case: Case, lines: Iterator[str]) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    empty = {"text": ""} if case.path == TEXT else {"reasoning": "", "content": ""}
    found: list[dict[str, Any]] = [
        dict(empty) | ({} if case.path == TEXT else {"calls": []}) | {"finish_reason": None} for _ in case.expected
    ]
    ended = False
    for line in lines:
        content = line.removeprefix("data: ")
        ended = ended or content == "[DONE]"
        if content == line or ended:
            continue
        for choice in json.loads(content)["choices"]:
            one, piece = found[choice["index"]], choice.get("delta", choice)
            for name in empty:
                one[name] += piece.get(name) or ""
            for call in piece.get("tool_calls") or ():
                if call["index"] == len(one["calls"]):
                    one["calls"].append([call["function"]["name"], ""])
                one["calls"][call["index"]][1] += call["function"]["arguments"]
            one["finish_reason"] = choice["finish_reason"] or one["finish_reason"]
    return found if ended else [{"a stream without its end": found}]


def _with_pauses(lines: Iterator[str], draw: random.Random) -> Iterator[str]:
    for line in lines:
        if draw.random() < 0.05:
            time.sleep(0.1)
        yield line


# ---------------------------------------------------------------------- the whole


def soak(model: str, seconds: float, clients: int, seed: int, growth: float, words: list[str]) -> Report:
    """Ask for so many seconds; what was found. growth: MiB that the processes may hold more at the end."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        known = pool.apply(cases, (model,))
    report = Report()
    with served([model, *(words or SETTINGS)]) as server:
        asking = Clients(server.url, known, report)
        begin = time.monotonic()
        rounds = 2 if seconds < 60 else 8
        for number in range(rounds):
            until = begin + seconds * (number + 1) / rounds
            threads = [
                threading.Thread(target=asking.work, args=((seed * rounds + number) * 1000 + client, until))
                for client in range(clients)
            ]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
            _settle(server, report)
            report.held.append(server.held())
        report.seconds = round(time.monotonic() - begin, 1)
        report.cached_tokens = server.figure("vllm:prefix_cache_hits_total")
        _judge(report, growth)
        if "Traceback" in (said := server.said()):
            report.faults.append(f"the server has printed: {said[-2000:]}")
    return report


def _settle(server: Served, report: Report) -> None:
    """Wait until nothing is left of any request."""
    deadline = time.monotonic() + SETTLE
    while not server.idle():
        if time.monotonic() > deadline:
            free, blocks = server.figure("glimmer:free_blocks"), server.figure("glimmer:blocks")
            report.faults.append(f"{SETTLE:g} s after the last client {free:g} of {blocks:g} blocks are free")
            return
        time.sleep(0.2)


def _judge(report: Report, growth: float) -> None:
    """Compare what is held at the end with what was held after the first round, but memory with what was held half-way:
    blocks of the cache take memory when they are first used.
    """
    first, half, last = report.held[0], report.held[len(report.held) // 2 - 1], report.held[-1]
    for name, more in ALLOWED.items():
        before, after = getattr(first, name), getattr(last, name)
        if after > before + more:
            report.faults.append(f"{after} {name} at the end, {before} after the first round")
    if last.memory > half.memory + growth:
        report.faults.append(f"{last.memory} MiB at the end, {half.memory} half-way")
    if not report.cached_tokens:
        report.faults.append("no prompt has found its beginning in the cache")


def main() -> int:
    """As a program: see the top."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("model", nargs="?", default=str(DEMO))
    options.add_argument("--minutes", type=float, default=1.0)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--growth", type=float, default=32.0, help="MiB")
    own, words = sys.argv[1:], []
    if "--" in own:
        own, words = own[: own.index("--")], own[own.index("--") + 1 :]
    given = options.parse_args(own)
    report = soak(given.model, given.minutes * 60, given.clients, given.seed, given.growth, words)
    for fault in report.faults:
        print(fault)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.clients.items()))
    print(f"{report.seconds:g} s, {report.answers} answers compared; clients: {kinds}; {len(report.faults)} faults")
    print(json.dumps(asdict(report)))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
