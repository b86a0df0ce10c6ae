"""`glimmer run-batch`: the requests of a file, answered into another file, in the format of OpenAI's batches.

    in    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}         one a line
    out   {"id": ..., "custom_id": "1", "response": {"status_code": 200, "body": {...}}, "error": null}

A server answers them: one of its own that nobody else can reach, or the one at --url. A row is on disk before the next
one counts; rows come in the order in which they are done. The whole input is checked before anything is answered. With
--resume, the requests that have a good row already are not asked again. A request that is refused or fails gets a row
with its error, and disturbs no other.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from glimmer.cli import exits
from glimmer.cli.api import Api, ServerRefusal, own_server, serve_words
from glimmer.cli.options import ENGINE, Command, Option, count, path, text, truth, without
from glimmer.cli.results import MAX_PROMPT_FILE
from glimmer.cli.row_file import RowFile
from glimmer.errors import ConfigError, EngineError
from glimmer.foreign import parse_json, read_text

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
AT_ONCE = 64
ENGINE_OPTIONS = without(ENGINE, "skip_tokenizer_init")
COMMAND = Command(
    "run-batch",
    "Answers the requests of a file, in OpenAI's batch format, into another file.",
    "[MODEL] -i FILE -o FILE [options]",
    {
        "files": {
            "input_file": Option(path, "FILE", "requests, one a line", flags=("-i",)),
            "output_file": Option(path, "FILE", "rows, one a line", flags=("-o", "--output")),
            "resume": Option(truth, "", "go on with an output file: ask only what has no good row in it"),
            "concurrency": Option(count, "N", "most requests at once", str(AT_ONCE)),
        },
        "the server": {
            "url": Option(text, "URL", "ask this server", "one of its own"),
            "api_key": Option(text, "KEY", "sent as Bearer, with --url"),
        },
        "engine of its own server": ENGINE_OPTIONS,
    },
    positional=("model",),
)


def main(argv: list[str]) -> int:
    """Answer everything; ends with 1 if a row has an error."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    for name in ("input_file", "output_file"):
        if name not in settings.given:
            raise ConfigError(f"no {name}", "both -i FILE and -o FILE", f"add --{name.replace('_', '-')}")
    engine = settings.fields(ENGINE_OPTIONS)
    if "url" in settings.given and engine:
        raise ConfigError(
            f"--url with {', '.join(engine)}", "settings of the engine only without a server", "leave out one"
        )
    source, target = Path(settings.take("input_file")), Path(settings.take("output_file"))
    requests = read_requests(source)
    with closing(RowFile(target, settings.take("resume", False), "--output-file")) as file:
        answered = _answered(file, target)
        todo = [request for request in requests if request["custom_id"] not in answered]
        if len(todo) < len(requests):
            exits.say(COMMAND.name, f"{len(requests) - len(todo)} of {len(requests)} requests have their rows already")
        if not todo:
            return 0
        failed = 0
        with _server(settings.take("url"), settings.take("api_key"), engine) as api:
            for number, row in enumerate(_answers(api, todo, settings.take("concurrency", AT_ONCE)), 1):
                file.add(row)
                failed += row["error"] is not None or row["response"]["status_code"] != 200
                if exits.is_terminal(sys.stderr) or number == len(todo):
                    exits.say(COMMAND.name, f"{number} of {len(todo)} done, {failed} with an error")
    return EngineError.exit_code if failed else 0


def _server(url: str | None, key: str | None, engine: dict[str, Any]) -> Any:
    """The server to ask, as a context."""
    if url is not None:
        return nullcontext(Api(url, key))
    return own_server(serve_words(engine))


# ---------------------------------------------------------------------- requests


def read_requests(source: Path) -> list[dict[str, Any]]:
    """All requests of a file. ConfigError, with the line, for what is no request, and for two of one custom_id."""
    try:
        content = read_text(source, MAX_PROMPT_FILE, lambda *parts: ConfigError(*parts), "utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}", "a file of requests", "check the path") from None
    requests: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        request = _request(line)
        if isinstance(request, str):
            raise ConfigError(
                f"{source} line {number}: {request}",
                '{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}',
                "correct the line; nothing has been answered yet",
            )
        if (before := seen.setdefault(request["custom_id"], number)) != number:
            raise ConfigError(
                f"{source} lines {before} and {number} have one custom_id, {request['custom_id']!r:.80}",
                "a custom_id of its own for each request",
                "change one of them",
            )
        requests.append(request)
    if not requests:
        raise ConfigError(f"{source} holds no request", "one request a line", "write some")
    return requests


def _request(line: str) -> dict[str, Any] | str:
    """The request in a line, or what is wrong with it."""
    try:
        request = parse_json(line)
    except ValueError as error:
        return f"{error!s:.200}"
    if not isinstance(request, dict):
        return "no JSON object"
    if not isinstance(request.get("custom_id"), str) or not request["custom_id"]:
        return "custom_id is no text"
    if request.get("method", "POST") != "POST":
        return f"method is {request['method']!r:.40}"
    if request.get("url") not in URLS:
        return f"url is {request.get('url')!r:.80}, where {', '.join(URLS)} are served"
    if not isinstance(request.get("body"), dict):
        return "body is no JSON object"
    if request["body"].get("stream"):
        return "body asks for a stream, which a row cannot hold"
    return request


# ---------------------------------------------------------------------- answers


def _answers(api: Api, requests: Sequence[dict[str, Any]], at_once: int) -> Iterator[dict[str, Any]]:
    """A row for each request, as they are done. EngineError if there is no server any more."""
    todo: SimpleQueue[dict[str, Any]] = SimpleQueue()
    rows: SimpleQueue[dict[str, Any] | BaseException] = SimpleQueue()
    stop = threading.Event()
    for request in requests:
        todo.put(request)

    def work() -> None:
        try:
            while not stop.is_set():
                rows.put(_answer(api, todo.get_nowait(), stop))
        except Empty:
            return
        except BaseException as error:  # raised where the rows are taken
            rows.put(error)

    # Nothing waits for these threads: when the process ends, their connections and so their requests end with it.
    for _ in range(min(at_once, len(requests))):
        threading.Thread(target=work, name="glimmer-batch", daemon=True).start()
    try:
        for _ in requests:
            row = rows.get()
            if isinstance(row, BaseException):
                raise row
            yield row
    finally:
        stop.set()


def _answer(api: Api, request: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
    """The row of one request. Where the server is full it is asked again, as it wishes."""
    row = {"id": f"batch_req_{uuid4().hex}", "custom_id": request["custom_id"], "response": None, "error": None}
    while True:
        try:
            status, body = 200, api.ask(request["url"], request["body"])
        except ServerRefusal as refusal:
            if refusal.status == 503 and not stop.wait(1.0):
                continue  # full, or starting its engine again; a server that is gone is an EngineError
            status, body = refusal.status, refusal.body
        return row | {"response": {"status_code": status, "request_id": uuid4().hex, "body": body}}


def _answered(file: RowFile, target: Path) -> set[str]:
    """custom_ids of good rows; others are left out of the file, so that their requests are asked again."""
    lines, last = file.read()
    good: dict[str, bytes] = {}
    for number, line in enumerate([*lines, last] if last else lines, 1):
        try:
            row = parse_json(line)
            if row["error"] is None and row["response"]["status_code"] == 200:
                good[row["custom_id"]] = line
        except (ValueError, KeyError, TypeError):
            if number <= len(lines):
                found = f"{target} line {number} is no row"
                raise ConfigError(found, "rows of this command", "choose another file") from None
    if last or len(good) < len(lines):
        file.replace(list(good.values()))
    return set(good)
