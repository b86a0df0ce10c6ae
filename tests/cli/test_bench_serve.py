"""`glimmer bench serve` against our own server, and against ones that fail."""

import json
import random
import re
import socket
import threading
import xml.etree.ElementTree

import pytest

from glimmer.cli import bench_serve
from glimmer.cli.main import main

pytestmark = pytest.mark.slow
SHORT = ["--input-len", "20", "--output-len", "4", "--num-prompts", "4"]


def report(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_figures_of_a_run(server, capsys, tmp_path):
    files = ["--json", str(tmp_path / "f.json"), "--picture", str(tmp_path / "f.svg")]
    assert main(["bench", "serve", server.url, "--concurrency", "1", "4", "--rate", "inf", "50", *SHORT, *files]) == 0
    found = report(capsys)
    assert [(run["concurrency"], run["rate"]) for run in found["runs"]] == [(1, "inf"), (1, 50), (4, "inf"), (4, 50)]
    for run in found["runs"]:
        assert run["requests"] == 4 and run["failed"] == 0 and run["seconds"] > 0
        assert run["output_tokens_per_s"] == pytest.approx(16 / run["seconds"], rel=0.03)  # seconds are rounded
        assert run["total_tokens_per_s"] > run["output_tokens_per_s"]
        assert 0 < run["first_token_ms"]["p50"] <= run["whole_ms"]["p99"]
    assert json.loads((tmp_path / "f.json").read_text()) == found
    assert xml.etree.ElementTree.parse(tmp_path / "f.svg").getroot().tag.endswith("svg")


def test_chat_and_token_ids(server, capsys):
    assert main(["bench", "serve", f"{server.url}/v1", "--concurrency", "2", "--endpoint", "chat", *SHORT]) == 0
    assert report(capsys)["endpoint"] == "chat"
    ids = ["--tokenizer", "glimmer/demo", "--shared-prefix", "8"]
    assert main(["bench", "serve", server.url, "--concurrency", "1", *SHORT, *ids]) == 0
    [run] = report(capsys)["runs"]
    assert run["total_tokens_per_s"] == pytest.approx(run["output_tokens_per_s"] * (20 + 4) / 4, rel=0.01)


def test_prompts_and_moments_are_those_of_the_seed():
    made = [bench_serve._content(random.Random(3), 50, None) for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 10
    assert bench_serve._content(random.Random(3), 50, 1000) != bench_serve._content(random.Random(4), 50, 1000)


@pytest.mark.parametrize(
    "values, wanted",
    [
        ([0.001], {"mean": 1, "p50": 1, "p90": 1, "p99": 1}),
        ([i / 1e3 for i in range(100, 0, -1)], {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99}),
        ([], {}),
    ],
)
def test_percentiles(values, wanted):
    assert bench_serve._percentiles(values) == wanted


def complete(request: bytes) -> bool:
    """Whether these are all bytes of a request: its head, and a body as long as the head says."""
    head, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    return bool(end) and len(body) >= int(length[1] if length else 0)


def canned(response: bytes):
    """A server that answers every request with these bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                request = b""
                # All of it: a connection that is closed with bytes unread is reset, which is another failure.
                while not complete(request) and (piece := connection.recv(1 << 16)):
                    request += piece
                connection.sendall(response)

    threading.Thread(target=serve, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    "response, said",
    [
        (b"HTTP/1.1 500 no\r\nContent-Length: 4\r\n\r\noops", "answers 500: oops"),
        (SSE + b'data: {"choices": [{"text": "a"}]}\n\n', "broke off"),
        (SSE + b"data: [DONE]\n\n", "without any text"),
        (SSE + b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n', "without usage"),
        (SSE + b'data: {"error": {"message": "lost"}}\n\n', "lost"),
        (SSE + b'data: {"choices": 5}\n\ndata: [DONE]\n\n', "no known form"),
        (SSE + b"data: 5\n\n", "no JSON object"),
        (SSE + b'data: {"choices": [{"delta": 5}]}\n\n', "no known form.*delta"),
        (SSE + b'data: {"choices": [{"delta": {"content": 5}}]}\n\n', "no known form.*content"),
        (SSE + b'data: {"usage": {"completion_tokens": "5"}}\n\n', "no known form.*completion_tokens"),
        (SSE + b'data: {"choices": [{"delta": {"tool_calls": [{"index": 1000000000}]}}]}\n\n', "no known form.*index"),
        (b"what", "BadStatusLine"),
        (b"", "RemoteDisconnected|reset"),
    ],
)
def test_servers_that_fail(response, said, capsys):
    listener, url = canned(response)
    with listener:
        assert main(["bench", "serve", url, "-m", "any", "--concurrency", "2", *SHORT]) == 1
    captured = capsys.readouterr()
    [run] = json.loads(captured.out.splitlines()[-1])["runs"]
    assert run["failed"] == 4 and run["output_tokens_per_s"] == 0
    assert re.search(said, captured.err) and "4 requests failed" in captured.err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--rate", "0"], "above 0"),
        (["--rate", "nan"], "above 0"),
        (["--rate", "1e-300"], "above 0"),
        (["--timeout", "0"], "above 0"),
        (["--timeout", "-1"], "above 0"),
        (["--timeout", "inf"], "above 0"),
        (["--json", "/nowhere/figures.json"], "/nowhere"),
        (["--picture", "/nowhere/figures.svg"], "/nowhere"),
        (["--concurrency", "0"], "from 1 on"),
        (["--endpoint", "embed"], "completions or chat"),
        (["--endpoint", "chat", "--tokenizer", "x"], "leave one of them out"),
        (["--shared-prefix", "600"], "at most the whole prompt"),
        (["ftp://x"], "http://HOST:PORT"),
        (["http://x:99999999"], "http://HOST:PORT"),
        (["http://127.0.0.1:9"], "Connection refused"),
        (["http://a b"], "http://HOST:PORT"),
        (["http://x/中"], "http://HOST:PORT"),
        (["--api-key", "a\nb"], "visible ASCII"),
        (["--api-key", "中"], "visible ASCII"),
        (["unix:/nowhere"], "No such file"),
    ],
)
def test_what_is_refused(words, said, capsys):
    assert main(["bench", "serve", *words]) in (1, 2)
    assert said in capsys.readouterr().err
