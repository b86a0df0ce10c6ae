"""`glimmer bench serve`: a server under load, ours or another with OpenAI's API: a table, a JSON line, a picture.

Prompts are random words (or, with --tokenizer, random token ids) of a seed, so that two servers get the same ones;
answers are greedy, of one length, and ignore the end of sequence. For each concurrency and each rate a run: requests
begin at random moments of that mean rate (a Poisson process; "inf": at once), and no more than so many are open.

    first token     from the request to the first text                      inter-token   between two pieces of text
    per token       (whole - first token) / (tokens - 1)                    whole         from the request to the end

The client measures by its own clock, and shares the machine with a server beside it. Tokens are those that the server
counts (`usage`); words are roughly tokens. Figures of different machines or hours are not comparable: run the servers
that you compare in turn, on one machine. Not here: the engine without a server (bench.py).
"""

import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glimmer.cli import exits
from glimmer.cli.api import Api
from glimmer.cli.lazy import lazy
from glimmer.cli.options import Command, Option, count, counts, number, path, text, whole
from glimmer.cli.results import save
from glimmer.errors import ConfigError, EngineError, GlimmerError

if TYPE_CHECKING:
    from glimmer.text import tokenizer
else:
    tokenizer = lazy("glimmer.text.tokenizer")

PERCENTILES = (50, 90, 99)
WORDS = re.findall(
    r"\w+",
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend",
)


def rates(value: Any) -> list[float]:
    """requests a second, above 0 (0.000001 is the least); inf: all at once"""
    found = [number(item) for item in (value if isinstance(value, list) else [value])]
    if not all(rate >= 1e-6 for rate in found):
        raise ValueError
    return found


def patience(value: Any) -> float:
    """seconds, above 0 (0.001 is the least, a million the most)"""
    if not 1e-3 <= number(value) <= 1e6:
        raise ValueError
    return number(value)


COMMAND = Command(
    "bench serve",
    "A server under load: throughput and latencies, as a table, as one JSON line and as a picture.",
    "[URL] [options]",
    {
        "the server": {
            "url": Option(text, "URL", "its address, or unix:PATH", "http://127.0.0.1:8000", ("--base-url",)),
            "api_key": Option(text, "KEY", "sent as Bearer"),
            "model": Option(text, "NAME", "the model's name", "the first that it serves", ("-m",)),
            "endpoint": Option(
                text, "NAME", "completions or chat", "completions", ("--backend",), choices=("completions", "chat")
            ),
        },
        "the load": {
            "concurrency": Option(
                counts, "N ...", "most requests at once", "1 8 32", ("--max-concurrency",), several=True
            ),
            "rate": Option(rates, "R ...", "requests a second", "inf", ("--request-rate",), several=True),
            "num_prompts": Option(count, "N", "requests of each run", "4 for each at once, at least 16"),
            "input_len": Option(
                count, "N", "words of a prompt, or tokens with --tokenizer", "512", ("--random-input-len",)
            ),
            "output_len": Option(count, "N", "tokens of an answer", "64", ("--random-output-len",)),
            "shared_prefix": Option(count, "N", "of these, so many that all prompts begin with", "none"),
            "tokenizer": Option(path, "DIR", "make prompts of this checkpoint's token ids", "words"),
            "seed": Option(whole, "N", "the same seed, the same prompts and moments", "0"),
            "timeout": Option(patience, "SECONDS", "of silence, after which a request has failed", "600"),
        },
        "the report": {
            "json": Option(path, "FILE", "keep the figures there as well", flags=("--result-file",)),
            "picture": Option(path, "FILE.svg", "a picture of throughput and latencies"),
        },
    },
    positional=("url",),
)


@dataclass
class Sample:
    """One request. Moments are seconds of one clock; pieces: of each text that came; tokens: as the server counts."""

    begin: float
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: GlimmerError | None = None

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first."""
        return (self.end - self.pieces[0]) / (self.tokens - 1)


@dataclass
class Run:
    """The figures of one load."""

    concurrency: int
    rate: float
    seconds: float
    samples: list[Sample]

    @property
    def done(self) -> list[Sample]:
        """Requests that were answered."""
        return [one for one in self.samples if one.error is None]

    def figures(self) -> dict[str, Any]:
        """As JSON: throughput in tokens and requests a second, latencies in milliseconds."""
        done = self.done
        series = {
            "first_token_ms": [one.pieces[0] - one.begin for one in done],
            "per_token_ms": [one.per_token for one in done if one.tokens > 1],
            "inter_token_ms": [later - one for each in done for one, later in zip(each.pieces, each.pieces[1:])],
            "whole_ms": [one.end - one.begin for one in done],
        }
        return {
            "concurrency": self.concurrency,
            "rate": "inf" if math.isinf(self.rate) else self.rate,
            "requests": len(self.samples),
            "failed": len(self.samples) - len(done),
            "seconds": round(self.seconds, 3),
            "requests_per_s": round(len(done) / self.seconds, 3),
            "output_tokens_per_s": round(sum(one.tokens for one in done) / self.seconds, 2),
            "total_tokens_per_s": round(sum(one.tokens + one.prompt_tokens for one in done) / self.seconds, 2),
            **{name: _percentiles(values) for name, values in series.items()},
        }


def main(argv: list[str]) -> int:
    """Measure and print. Ends with 1 if a request failed."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    endpoint = settings.take("endpoint", "completions")
    if endpoint not in ("completions", "chat"):
        raise ConfigError(f"endpoint={endpoint!r}", "completions or chat", "choose one of these")
    if endpoint == "chat" and "tokenizer" in settings.given:
        raise ConfigError("--tokenizer with --endpoint chat", "token ids only for completions", "leave one of them out")
    for name in ("json", "picture"):
        if name in settings.given and not os.access(Path(settings.take(name)).parent, os.W_OK):
            raise ConfigError(f"{name}: no file can be made at {settings.take(name)}", "a directory", "choose another")
    url = settings.take("url", "http://127.0.0.1:8000")
    api = Api(url, settings.take("api_key"), settings.take("timeout", 600.0))
    source = random.Random(settings.take("seed", 0))
    length, answer = settings.take("input_len", 512), settings.take("output_len", 64)
    prefix = settings.take("shared_prefix", 0)
    if prefix > length:
        raise ConfigError(f"shared_prefix={prefix} of input_len={length}", "at most the whole prompt", "lower it")
    size = tokenizer.Tokenizer.load(settings.take("tokenizer")).size if "tokenizer" in settings.given else None
    model = settings.take("model") or api.model()
    beginning = _content(source, prefix, size)
    runs = []
    print(f"{model} at {url}: prompts of {length}, answers of {answer}, {endpoint}")
    print(_row(HEAD))
    for concurrency in settings.take("concurrency", [1, 8, 32]):
        for rate in settings.take("rate", [math.inf]):
            number_of = settings.take("num_prompts", max(16, 4 * concurrency))
            bodies = [
                _body(model, endpoint, beginning + _content(source, length - prefix, size), answer)
                for _ in range(number_of)
            ]
            run = _load(api, bodies, endpoint, concurrency, rate, source)
            runs.append(run)
            print(_row(_cells(run.figures())), flush=True)
    report = {"server": url, "model": model, "endpoint": endpoint, "input_len": length, "output_len": answer}
    report |= {"runs": [run.figures() for run in runs]}
    print(json.dumps(report))
    if "json" in settings.given:
        save(Path(settings.take("json")), json.dumps(report, indent=1) + "\n")
    if "picture" in settings.given:
        save(Path(settings.take("picture")), picture(report))
    failed = [one.error for run in runs for one in run.samples if one.error is not None]
    if failed:
        exits.say(COMMAND.name, f"{len(failed)} requests failed, the first with: {failed[0].found}")
    return EngineError.exit_code if failed else 0


# ---------------------------------------------------------------------- the load


def _content(source: random.Random, length: int, vocab_size: int | None) -> list[Any]:
    """Random token ids, or random words where no vocabulary is known."""
    if vocab_size is not None:
        return [source.randrange(vocab_size // 10, vocab_size // 2) for _ in range(length)]
    return source.choices(WORDS, k=length)


def _body(model: str, endpoint: str, content: list[Any], answer: int) -> dict[str, Any]:
    """A request with these words or ids, in a form that all servers know."""
    prompt = content if content and isinstance(content[0], int) else " ".join(content)
    asked = {"messages": [{"role": "user", "content": prompt}]} if endpoint == "chat" else {"prompt": prompt}
    return {"model": model, **asked, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True} | {
        "stream_options": {"include_usage": True}
    }


def _load(
    api: Api, bodies: Sequence[dict[str, Any]], endpoint: str, concurrency: int, rate: float, source: random.Random
) -> Run:
    """Send the requests, as many at once and as often as said."""
    delays = [0.0 if math.isinf(rate) else source.expovariate(rate) for _ in bodies]
    free = threading.Semaphore(concurrency)
    samples: list[Sample] = []
    threads = []

    def send(body: dict[str, Any], sample: Sample) -> None:
        try:
            _measure(api, "/v1/chat/completions" if endpoint == "chat" else "/v1/completions", body, sample)
        finally:
            free.release()

    begin = due = time.perf_counter()
    for body, delay in zip(bodies, delays):
        due += delay
        time.sleep(max(0.0, due - time.perf_counter()))
        free.acquire()
        samples.append(Sample(time.perf_counter()))
        threads.append(threading.Thread(target=send, args=(body, samples[-1]), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return Run(concurrency, rate, max(one.end for one in samples) - begin, samples)


def _measure(api: Api, place: str, body: dict[str, Any], sample: Sample) -> None:
    """One request; what went wrong is the sample's error."""
    try:
        with closing(api.events(place, body)) as events:
            for event in events:
                now = time.perf_counter()
                if usage := event.get("usage"):
                    sample.prompt_tokens = usage.get("prompt_tokens", 0)
                    sample.tokens = usage.get("completion_tokens", 0)
                if any(_has_text(choice) for choice in event.get("choices") or ()):
                    sample.pieces.append(now)
        if not sample.pieces:
            raise EngineError("an answer without any text", "a text", "ask for longer answers")
        if not sample.tokens:
            raise EngineError("an answer without usage", "a server that counts tokens", "use one with include_usage")
    except GlimmerError as error:
        sample.error = error
    sample.end = time.perf_counter()


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or choice
    return any(delta.get(name) for name in ("text", "content", "reasoning_content", "reasoning"))


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds; nothing of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}
    found = {"mean": sum(ordered) / len(ordered)}
    found |= {f"p{p}": ordered[min(len(ordered) - 1, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}
    return {name: round(1e3 * value, 2) for name, value in found.items()}


# ---------------------------------------------------------------------- the report

HEAD = ["at once", "rate", "failed", "requests/s", "output tok/s", "all tok/s"]
HEAD += [f"{what} {p}" for what in ("first ms", "inter ms", "whole ms") for p in ("p50", "p99")]


def _cells(figures: dict[str, Any]) -> list[str]:
    cells = [str(figures[name]) for name in ("concurrency", "rate", "failed")]
    cells += [f"{figures[name]:,.2f}" for name in ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")]
    for name in ("first_token_ms", "inter_token_ms", "whole_ms"):
        cells += [f"{figures[name][p]:,.1f}" if figures[name] else "-" for p in ("p50", "p99")]
    return cells


def _row(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{max(len(head), 9) + 2}}" for cell, head in zip(cells, HEAD))


def picture(report: dict[str, Any]) -> str:
    """The report as SVG: for each run a bar of throughput, and its latencies at p50 and p99."""
    panels: tuple[tuple[str, Callable[[dict[str, Any]], list[float]]], ...] = (
        ("output tokens/s", lambda run: [run["output_tokens_per_s"]]),
        ("first token, ms (p50, p99)", lambda run: [run["first_token_ms"].get(p, 0) for p in ("p50", "p99")]),
        ("between tokens, ms (p50, p99)", lambda run: [run["inter_token_ms"].get(p, 0) for p in ("p50", "p99")]),
    )
    runs = report["runs"]
    width, step, top = 760, 26, 64
    parts = [f'<text x="16" y="26" class="title">{escape(report["model"])}</text>']
    about = f"prompts of {report['input_len']}, answers of {report['output_len']}, {report['endpoint']}"
    parts.append(f'<text x="16" y="46">{escape(about)}</text>')
    y = top
    for title, values in panels:
        y += 24
        parts.append(f'<text x="16" y="{y}" class="title">{title}</text>')
        most = max((value for run in runs for value in values(run)), default=0) or 1
        for run in runs:
            rate = "" if run["rate"] == "inf" else f", {run['rate']}/s"
            parts.append(f'<text x="16" y="{y + 20}">{run["concurrency"]} at once{rate}</text>')
            for number_of, value in reversed(list(enumerate(values(run)))):
                kind = ("first", "second")[number_of]
                parts.append(f'<rect x="160" y="{y + 8}" width="{480 * value / most:.1f}" height="16" class="{kind}"/>')
            said = " / ".join(f"{value:,.1f}" for value in values(run))
            parts.append(f'<text x="{168 + 480 * max(values(run)) / most:.1f}" y="{y + 20}">{said}</text>')
            y += step
        y += 12
    style = (
        "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.first{fill:#2f6feb}"
        ".second{fill:#b6cdf8}@media(prefers-color-scheme:dark){text{fill:#d0d7de}.second{fill:#274a86}}"
    )
    size = f'width="{width}" height="{y + 8}" viewBox="0 0 {width} {y + 8}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'
