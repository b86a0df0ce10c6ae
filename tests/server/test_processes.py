"""The two processes and their ends: of the engine, of a rank, of the HTTP process, of a client, and in good order."""

import json
import os
import signal
import socket
import sys
import threading
import time

import httpx
import pytest
from jobs import until
from servers import Server

pytestmark = pytest.mark.slow
LONG = {"prompt": "hello", "max_tokens": 900, "temperature": 0, "ignore_eos": True}
SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "minLength": 3000}}, "required": ["text"]}
RESPONSES = {"input": "Go on", "reasoning": {"effort": "none"},
             "text": {"format": {"type": "json_schema", "name": "long", "schema": SCHEMA}}}  # fmt: skip
MESSAGES = {"max_tokens": 900, "messages": [{"role": "user", "content": "Go on"}],
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "glimmer")


class Stream(threading.Thread):
    """A stream that is read in a thread of its own, once it has begun."""

    def __init__(self, server: Server, path: str = "/v1/completions", **body):
        super().__init__(daemon=True)
        self.server, self.path, self.lines = server, path, []
        self.body = LONG | body if path == "/v1/completions" else body
        self.start()
        until(lambda: len(self.lines) > 3)

    def run(self) -> None:
        body = self.body | {"stream": True}
        with httpx.stream("POST", self.server.url + self.path, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)

    def end(self) -> str:
        """The last line."""
        self.join(10)
        assert not self.is_alive()
        return self.lines[-1].removeprefix("data: ")


def metric(server: Server, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def test_a_client_that_leaves_frees_its_blocks(server):
    until(lambda: metric(server, "vllm:num_requests_running") == 0, 10)  # of those who have left before
    free, body = metric(server, "glimmer:free_blocks"), LONG | {"n": 16}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        until(lambda: metric(server, "vllm:num_requests_running") > 0, 10)
    until(lambda: metric(server, "vllm:num_requests_running") == 0, 5)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
    until(lambda: metric(server, "vllm:num_requests_running") == 0, 5)
    assert metric(server, "glimmer:free_blocks") == free and metric(server, "vllm:request_success_total") >= 32


def test_metrics_tell_what_drafts_bring(server):
    """The demo model has an MTP layer, and a fresh engine tries it."""
    name = "vllm:spec_decode_num_accepted_tokens"
    ask = {"model": "any", "messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0}
    server.post("/v1/chat/completions", ask)
    until(lambda: metric(server, name) > 0, 10)
    lines = server.get("/metrics").text.splitlines()
    assert any(line.startswith(f"{name}_per_pos{{") and 'position="0"' in line for line in lines)
    assert metric(server, f"{name}_per_pos") > 0
    assert metric(server, "glimmer:tokens_per_step") > 1 and metric(server, "glimmer:draft_gain") > 0


def test_a_client_that_does_not_read_delays_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": True, "n": 8}).encode()
    with socket.create_connection((host, int(port))) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        silent.sendall(head.encode() + body)
        assert server.post("/v1/completions", LONG | {"max_tokens": 20}).json()["usage"]["completion_tokens"] == 20
        until(lambda: metric(server, "vllm:num_requests_running") == 0, 30)  # its answers end without it


def test_a_life_of_a_server():
    """The engine is killed, and started again; then SIGTERM lets an answer end."""
    with Server() as server:
        [engine] = server.engine_processes()
        responses, messages = Stream(server, "/v1/responses", **RESPONSES), Stream(server, "/v1/messages", **MESSAGES)
        stream = Stream(server)
        os.kill(engine, signal.SIGKILL)
        begin = time.monotonic()
        until(lambda: server.health() == 503, 2)
        assert time.monotonic() - begin < 2
        told = json.loads(stream.end())["error"]
        assert "engine" in told["message"] and told["code"] == "unavailable"
        told = json.loads(messages.end())
        assert told["type"] == "error" and told["error"]["type"] == "overloaded_error" and told["request_id"]
        told = json.loads(responses.end())
        assert told["type"] == "response.failed" and told["response"]["error"]["code"] == "server_error"
        assert told["response"]["status"] == "failed" and told["response"]["output"]
        server.wait_until_ready()
        assert server.engine_processes() not in ([engine], [])
        stream = Stream(server, max_tokens=300)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert stream.end() == "[DONE]" and not server.engine_processes()


def test_ends_without_order():
    """The second SIGTERM does not wait; a killed HTTP process leaves no orphan."""
    with Server(ready=False) as hasty, Server(ready=False) as killed:
        hasty.wait_until_ready()
        stream = Stream(hasty, n=16)  # for longer than the two signals take
        hasty.process.send_signal(signal.SIGTERM)
        hasty.wait_for("a second signal ends")
        hasty.process.send_signal(signal.SIGTERM)
        assert hasty.process.wait(8) == 0 and "shutting down" in stream.end()
        killed.wait_until_ready()
        assert len(killed.engine_processes()) == 1
        killed.process.kill()
        until(lambda: not killed.engine_processes(), 10)


def test_an_end_before_the_engine_has_connected():
    """SIGTERM waits for nothing then; and an engine whose HTTP process was killed does not look for it for long."""
    with Server(ready=False) as told:
        assert told.health() == 503
        assert told.stop(timeout=5) == 0 and not told.engine_processes()
    with Server(ready=False) as killed:
        killed.process.kill()
        until(lambda: not killed.engine_processes(), 20)  # it has begun, but may import for a while


def test_a_unix_socket_and_a_death_that_is_the_end(tmp_path):
    path = tmp_path / "http.sock"
    with Server("--uds", str(path), "--on-engine-death", "exit", ready=False) as server:
        server.wait_for("ready on unix:")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            assert client.get("/health").status_code == 200
        os.kill(server.engine_processes()[0], signal.SIGKILL)
        assert server.process.wait(20) == 1 and "the engine process has ended" in server.said
    assert not path.exists()


def test_several_ranks():
    """As vLLM's users start them, where one that dies is the end of all; and under torchrun."""
    with Server("-tp", "2", "--on-engine-death", "exit", ready=False) as own, Server(launcher=TORCHRUN) as under:
        own.wait_until_ready()
        body = LONG | {"max_tokens": 8}
        answers = [server.post("/v1/completions", body).json()["choices"] for server in (own, under)]
        assert answers[0] == answers[1]
        stream = Stream(own)
        os.kill(own.engine_processes()[-1], signal.SIGKILL)  # the last one was started last
        assert "error" in json.loads(stream.end())
        assert own.process.wait(30) == 1
        until(lambda: not own.engine_processes(), 15)
        under.process.send_signal(signal.SIGTERM)
        under.process.wait(30)
        assert "Exception in" not in under.said


def test_a_server_that_cannot_begin_says_why(server):
    with Server("--max-model-len", "100000000", ready=False, small=False) as refused:
        assert refused.process.wait(30) == 2
    assert "expected:" in refused.said and "Traceback" not in refused.said
    port = server.url.rpartition(":")[2]
    taken = ("--port", port)
    job = {"RANK": "0", "WORLD_SIZE": "2"}  # whose other rank would wait for this one
    with Server(*taken, ready=False) as second, Server(*taken, ready=False, **job) as first_of_two:
        for one in (second, first_of_two):
            assert one.process.wait(30) == 2 and "cannot be listened on" in one.said
            assert one.said.count("expected:") == 1
