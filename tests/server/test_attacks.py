"""What clients do that mean no good, or know no better: on the wire, and in bodies that are large or ask for much.

Whatever comes, it is answered or refused, and other clients are answered meanwhile.
"""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from jobs import until

pytestmark = pytest.mark.slow
SHORT = {"prompt": "hello", "max_tokens": 2, "temperature": 0}


def connect(server) -> socket.socket:
    place = urlsplit(server.url)
    return socket.create_connection((place.hostname, place.port), timeout=20)


def request(body: bytes, *headers: str, length: int | None = None) -> bytes:
    head = ["POST /v1/completions HTTP/1.1", "Host: x", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body


def read(connection: socket.socket, responses: int = 1) -> list[tuple[int, dict]]:
    """Statuses and bodies of so many responses."""
    stream, found = connection.makefile("rb"), []
    while len(found) < responses:
        status, length = int(stream.readline().split()[1]), 0
        while line := stream.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        if status != 100:
            found.append((status, json.loads(stream.read(length))))
    return found


def answers(server) -> bool:
    return server.post("/v1/completions", SHORT).status_code == 200


def waiting(server) -> float:
    """Requests whose first token has not come."""
    [line] = [one for one in server.get("/metrics").text.splitlines() if one.startswith("glimmer:requests_without")]
    return float(line.split()[1])


def test_requests_that_do_not_wait_for_each_other(server):
    """Pipelining; and a connection that is used again after a refusal."""
    good, bad = request(json.dumps(SHORT).encode()), request(b'{"prompt": 5}')
    with connect(server) as connection:
        connection.sendall(good + bad + good)
        assert [status for status, _ in read(connection, 3)] == [200, 400, 200]
        connection.sendall(good)
        assert read(connection)[0][0] == 200


def test_a_client_that_asks_whether_it_may_send(server):
    body = json.dumps(SHORT).encode()
    with connect(server) as connection:
        connection.sendall(request(b"", "Expect: 100-continue", length=len(body)))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert read(connection)[0][0] == 200


def test_bodies_that_stop_on_their_way(server):
    """In pieces, of a length, in good form and not; then the client goes, or only stops to send."""
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for torn in (chunked + b'8\r\n{"promp', chunked + b"zz\r\n", request(b'{"pro', length=100), request(b"", length=9)):
        for how in (socket.SHUT_WR, socket.SHUT_RDWR):
            with connect(server) as connection:
                connection.sendall(torn)
                connection.shutdown(how)
                if how == socket.SHUT_WR:
                    while connection.recv(1000):
                        pass
    assert answers(server)


@pytest.mark.parametrize(
    "header",
    ["X-A: \u00e9\u4e2d", "Authorization: Bearer \u00e9", "Content-Type: \u4e2d", "Accept-Encoding: gzip;q=\u00e9"],
)
def test_headers_that_are_no_ascii(server, header):
    with connect(server) as connection:
        connection.sendall(request(json.dumps(SHORT).encode(), header))
        assert read(connection)[0][0] in (200, 400)


def test_many_streams_at_once(server):
    """More than can run: each is answered, and in full."""
    body = SHORT | {"stream": True, "max_tokens": 4, "ignore_eos": True}

    def ask(number: int) -> str:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            return response.read().decode()

    with ThreadPoolExecutor(100) as pool:
        streams = list(pool.map(ask, range(100)))
    assert all(one.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in one for one in streams)


@pytest.mark.parametrize(
    "path, field, body",
    [
        ("chat/completions", "messages", {"messages": [{"role": "user", "content": "x"}] * 20000}),
        ("chat/completions", "logit_bias", {"messages": [], "logit_bias": {str(i): 1 for i in range(20000)}}),
        ("completions", "allowed_token_ids", SHORT | {"allowed_token_ids": [5] * 100000}),
        ("completions", "prompt", SHORT | {"prompt": [5] * 500000}),
        ("completions", "prompt", SHORT | {"prompt": [[5]] * 200000}),
        ("completions", "n", SHORT | {"prompt": ["a"] * 1000, "n": 100}),
        ("completions", "stop", SHORT | {"stop": "x" * 1000000}),
    ],
    ids=range(7),
)
def test_much_of_everything(server, path, field, body):
    """Refused by the field, and at once: nothing is computed that is refused afterwards."""
    refused = server.post(f"/v1/{path}", body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == field, refused.text


def test_what_takes_long_keeps_nobody_waiting(server):
    """Prompts of millions of characters wait for each other, and not for those that are short."""
    huge = {"prompt": "word " * 210_000, "max_tokens": 1, "truncate_prompt_tokens": 10}
    asking = [threading.Thread(target=server.post, args=("/v1/completions", huge)) for _ in range(6)]
    for one in asking:
        one.start()
    until(lambda: waiting(server) > 1, 20)
    assert answers(server) and any(one.is_alive() for one in asking)
    for one in asking:
        one.join(60)
