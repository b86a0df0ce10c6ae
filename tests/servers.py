"""A `glimmer serve` of its own process, for tests: started on a free port, waited for, and ended."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--max-model-len", "1024", "--max-num-seqs", "16", "--threads", "1", "--kv-cache-memory-bytes", "64MB")


class Server:
    """`glimmer serve` with these words; without a model the demo model answers. Use it in a `with`."""

    def __init__(
        self, *words: str, launcher: tuple[str, ...] = (), ready: bool = True, small: bool = True, **variables
    ):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables
        env |= {"SERVER_OF_A_TEST": str(id(self))}
        command = [*(launcher or (sys.executable, "-m", "glimmer")), "serve", *words, *(SMALL * small)]
        command += [] if "--port" in words else ["--port", "0"]
        self.process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        if not {"--port", "--uds"} & set(words):
            self.url = self.wait_for(r"listening on (http\S+?);")[1]
        if ready:
            self.wait_until_ready()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said += line

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match:
        """Wait until stderr has something; the match."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.said)):
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.said}"
            time.sleep(0.02)
        return found

    def wait_until_ready(self, timeout: float = 60) -> None:
        """Wait until /health says 200."""
        deadline = time.monotonic() + timeout
        while self.health() != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def health(self) -> int:
        """The status of /health; 0 if nobody answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10, verify=False).status_code
        except httpx.TransportError:
            return 0

    def post(self, path: str, body, **options) -> httpx.Response:
        """POST a JSON value, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=content, timeout=60, **options)

    def get(self, path: str, **options) -> httpx.Response:
        """GET a path."""
        return httpx.get(self.url + path, timeout=60, **options)

    def openai(self, **options):
        """The real client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, **{"api_key": "none", "timeout": 60} | options)

    def engine_processes(self) -> list[int]:
        """The engine's processes that are alive, whoever their parents are."""
        mark = b"glimmer.server.engine_process"
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_bytes().split(b"\0")
                state = (file.parent / "stat").read_text().rpartition(")")[2].split()[0]
                if mark in words and state != "Z" and self._is_ours(file.parent):
                    found.append(int(file.parent.name))
            except OSError:
                continue
        return sorted(found)

    def _is_ours(self, process: Path) -> bool:
        """Whether the engine's socket is that of this server: its environment has our mark."""
        return f"SERVER_OF_A_TEST={id(self)}".encode() in (process / "environ").read_bytes()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self._reader.join(5)
        self.process.stderr.close()


def events(response: httpx.Response) -> list[dict]:
    """The chunks of a stream, without [DONE], which must be its end."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
