"""What the server does not let in: strangers, bodies and heads beyond its limits, more than it can hold."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from servers import Server
from starlette.responses import Response
from uvicorn.server import ServerState

from glimmer.server import protocol

pytestmark = pytest.mark.slow
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
LONG = {"prompt": "hello", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with keys, small limits and a second model's name."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("# of the team\nalpha\n\nbeta\n")
    words = [
        "--api-key",
        f"@{file}",
        "--api-key",
        "gamma",
        "--api-key",
        "clé",
        "--max-body-bytes",
        "20000",
        "--max-queue-requests",
        "2",
    ]
    words += ["--max-num-seqs", "1", "--max-model-len", "1024", "--threads", "1", "--kv-cache-memory-bytes", "64MB"]
    with Server(
        *words, "--served-model-name", "glm", "--allowed-origins", "https://page.example", small=False
    ) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/ready", "/version", "/openapi.json", "/v1/nothing"])
def test_a_key_is_needed(guarded, path):
    refused = guarded.get(path)
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    assert guarded.get(path, headers={"Authorization": "Bearer alph"}).status_code == 401
    assert guarded.get("/health").status_code == 200 and "alpha" not in refused.text


@pytest.mark.parametrize("key", ["alpha", "beta", "gamma", "clé"])
def test_each_key_opens(guarded, key):
    assert (
        guarded.post("/v1/chat/completions", HELLO, headers={"Authorization": f"Bearer {key}".encode()}).status_code
        == 200
    )
    assert guarded.get("/v1/models", headers={"x-api-key": key.encode()}).json()["data"][0]["id"] == "glm"


def test_web_pages_of_others(guarded, server):
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{guarded.url}/v1/chat/completions", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in httpx.options(f"{server.url}/v1/models", headers=ask).headers


@pytest.mark.parametrize(
    "origin, host, status",
    [
        ("https://page.example", None, 200),
        ("https://evil.example", None, 403),
        ("http://evil.example", "evil.example", 200),  # a key protects it
        ("app://desktop", None, 200),
        ("http://[::1", None, 403),
    ],
)
def test_which_pages_may_ask_for_what_needs_a_key(guarded, origin, host, status):
    headers = {"Origin": origin, "Authorization": "Bearer alpha"} | ({"Host": host} if host else {})
    assert guarded.post("/v1/chat/completions", HELLO, headers=headers).status_code == status


@pytest.mark.parametrize(
    "origin, host, status",
    [
        ("http://localhost:8000", "localhost:8000", 200),
        ("http://127.0.0.1", "127.0.0.1", 200),
        ("http://evil.example:8000", "evil.example:8000", 403),  # its name points to this machine
        ("http://localhost:8000", "evil.example:8000", 403),
    ],
)
def test_which_pages_may_ask_without_a_key(server, origin, host, status):
    headers = {"Origin": origin, "Host": host}
    assert server.post("/v1/chat/completions", HELLO, headers=headers).status_code == status
    assert server.get("/health", headers=headers).status_code == 200 == httpx.head(f"{server.url}/ready").status_code


def test_more_than_the_queue_holds(guarded):
    key = {"Authorization": "Bearer beta"}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(guarded.post, "/v1/completions", LONG, headers=key) for _ in range(8)]
        answers = [one.result() for one in asked]
    states = sorted(answer.status_code for answer in answers)
    assert states[0] == 200 and states[-1] == 503 and set(states) == {200, 503}
    full = next(answer for answer in answers if answer.status_code == 503)
    assert int(full.headers["retry-after"]) > 0 and full.json()["error"]["type"] == "service_unavailable_error"


@pytest.mark.parametrize(
    "body, status",
    [
        (b'{"messages": "' + b"x" * 30000 + b'"}', 413),
        (b"", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"[" * 10000, 400),
        (b'{"messages": [{"role": "user", "content": ' + b'[' * 100 + b"]" * 100 + b"}]}", 400),
        (b'{"messages": [], "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "hi"}], "n": 1, "n": 2}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'\xff\xfe{"messages"', 400),
        (b'{"messages": [{"role": "king", "content": "hi"}]}', 400),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}', 400),
    ],
    ids=range(14),
)  # fmt: skip
def test_bodies_that_are_none(guarded, body, status):
    refused = guarded.post("/v1/chat/completions", body, headers={"Authorization": "Bearer alpha"})
    assert refused.status_code == status and refused.json()["error"]["message"], refused.text


def test_a_prompt_beyond_the_context(server):
    refused = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}]})
    error = refused.json()["error"]
    assert refused.status_code == 400 and (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_a_head_without_end(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):  # the server closes
            for number in range(3000):
                connection.sendall(b"X-%d: %s\r\n" % (number, b"y" * 100))
    assert server.health() == 200


@pytest.mark.parametrize(
    "head",
    [b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
     b"GET /health?" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
     b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000 + b"\r\n\r\n"],
    ids=["many", "a long path", "a long one"],
)  # fmt: skip
def test_a_head_that_is_too_long_comes_at_once(server, head):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")


def test_long_bodies_do_not_count_as_heads(server):
    """Requests that follow each other at once come in pieces that hold the end of one and the beginning of the next."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "max_tokens": 1, "user": "u" * 90_000}).encode()
    one = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA: %s\r\nContent-Length: %d\r\n\r\n%s"
    one %= (b"a" * 40_000, len(body), body)
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(one + one + one[:30_000])
        time.sleep(0.05)
        connection.sendall(one[30_000:])
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 3:
            piece = connection.recv(1 << 16)
            assert piece, "the server has closed the connection"
            answers += piece
    assert answers.count(b"HTTP/1.1 200 ") == 3


def test_every_head_has_its_time(monkeypatch):
    """Also one that follows an answered request."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)

    async def app(scope, receive, send):
        await Response("here")(scope, receive, send)

    async def life() -> list[bytes]:
        config = uvicorn.Config(app, lifespan="off", ws="none", http=protocol.Protocol, log_config=None)
        config.load()
        make = lambda: protocol.Protocol(config, ServerState(), {})
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        answers = []
        async with server:
            for end in (b"", b"G", b"GET / HTTP/1.1\r\nHost: x"):
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                for _ in range(2):
                    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    answers.append(await asyncio.wait_for(reader.readuntil(b"here"), 10))
                if end:
                    writer.write(end)
                    answers.append(await asyncio.wait_for(reader.read(), 10))
                writer.close()
        return answers

    good = [b"HTTP/1.1 200 OK"] * 2
    assert [answer[:15] for answer in asyncio.run(life())] == [*good, *good, b"", *good, b""]


def test_its_own_description(server):
    described = server.get("/openapi.json").json()
    body = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in described["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    assert server.post("/v1/models", {}).json()["error"]["code"] == "method_not_allowed"
