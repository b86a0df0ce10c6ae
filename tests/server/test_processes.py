"""The two processes and their ends: of the engine, of the HTTP process, of a client, and in good order."""

import json
import os
import signal
import socket
import threading
import time

import httpx
import pytest
from jobs import until
from servers import Server

pytestmark = pytest.mark.slow
LONG = {"prompt": "hello", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def server():
    with Server() as started:
        yield started


class Stream(threading.Thread):
    """A stream that is read in a thread of its own."""

    def __init__(self, server, body=LONG):
        super().__init__(daemon=True)
        self.server, self.body, self.lines, self.error = server, body, [], None
        self.start()

    def run(self):
        try:
            with httpx.stream(
                "POST", f"{self.server.url}/v1/completions", json=self.body | {"stream": True}, timeout=60
            ) as r:
                self.status = r.status_code
                for line in r.iter_lines():
                    if line:
                        self.lines.append(line)
        except httpx.TransportError as error:
            self.error = error

    def wait_for_tokens(self):
        until(lambda: len(self.lines) > 3)


def test_a_killed_engine_is_noticed_at_once_and_started_again(server):
    [engine] = server.engine_processes()
    stream = Stream(server)
    stream.wait_for_tokens()
    os.kill(engine, signal.SIGKILL)
    begin = time.monotonic()
    until(lambda: server.health() == 503, 2)
    assert time.monotonic() - begin < 2
    stream.join(10)
    last = json.loads(stream.lines[-1].removeprefix("data: "))
    assert "engine" in last["error"]["message"] and last["error"]["code"] == "unavailable"
    server.wait_until_ready()
    assert server.engine_processes() not in ([engine], []) and server.post("/v1/completions", LONG).status_code == 200


def test_a_killed_engine_may_be_the_end(tmp_path):
    with Server("--on-engine-death", "exit") as server:
        os.kill(server.engine_processes()[0], signal.SIGKILL)
        assert server.process.wait(20) == 1 and "the engine process has ended" in server.said


def test_a_killed_http_process_leaves_no_orphan(server):
    stream = Stream(server)
    stream.wait_for_tokens()
    assert len(server.engine_processes()) == 1
    server.process.kill()
    until(lambda: not server.engine_processes(), 10)


def test_a_client_that_leaves_frees_its_blocks(server):
    free, body = metric(server, "glimmer:free_blocks"), LONG | {"n": 16}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        until(lambda: metric(server, "vllm:num_requests_running") > 0, 10)
    until(lambda: metric(server, "vllm:num_requests_running") == 0, 5)
    assert metric(server, "glimmer:free_blocks") == free
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
    until(lambda: metric(server, "vllm:num_requests_running") == 0, 5)


def metric(server, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def test_sigterm_lets_answers_end(server):
    stream = Stream(server, LONG | {"max_tokens": 300})
    stream.wait_for_tokens()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    stream.join(5)
    assert stream.lines[-1] == "data: [DONE]" and stream.error is None and not server.engine_processes()


def test_the_second_sigterm_does_not_wait(server):
    stream = Stream(server)
    stream.wait_for_tokens()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("a second signal ends")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(8) == 0
    stream.join(5)
    assert "shutting down" in stream.lines[-1]


def test_a_client_that_does_not_read_delays_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": True, "n": 8}).encode()
    with socket.create_connection((host, int(port))) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        silent.sendall(head.encode() + body)
        assert server.post("/v1/completions", LONG | {"max_tokens": 20}).json()["usage"]["completion_tokens"] == 20
        until(lambda: metric(server, "vllm:num_requests_running") == 0, 30)  # its answers end without it


def test_a_server_that_cannot_begin_says_why():
    with Server("--kv-cache-memory-bytes", "1", "--max-model-len", "100000000", ready=False, small=False) as server:
        assert server.process.wait(30) == 2
    assert "expected:" in server.said and "Traceback" not in server.said
