"""Client of an HTTP server with OpenAI's API, ours or another: JSON, streams of events, and a server of one's own.

For the commands that ask a server (`bench serve`, `run-batch`, `chat`). Any number of threads may share one Api: each
call has a connection of its own. What a server refuses is a ServerRefusal with its status and message; one that cannot
be reached, that breaks off, or that answers in no known form, is a ConfigError or an EngineError.
Not here: what is asked.
"""

import http.client
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from glimmer.cli import exits
from glimmer.cli.child import ends_with_parent
from glimmer.errors import ConfigError, EngineError, GlimmerError
from glimmer.foreign import parse_json
from glimmer.server.socket_directory import SocketDirectory

LINE = 8 << 20  # bytes of one event of a stream
BODY = 256 << 20  # bytes of one response
MAX_CALLS = 1024  # of tools, in one answer
SENDABLE = re.compile(r"[\x21-\x7e]+")
POLL = 0.1  # seconds between two questions whether a server is ready
END = 15.0  # seconds that a server of one's own has to end


class ServerRefusal(GlimmerError):
    """A server has answered with an error. status: HTTP's; body: what it sent, as JSON or text."""

    def __init__(self, status: int, body: Any):
        message = body
        if isinstance(body, dict):
            error = body.get("error", body)
            message = error.get("message", error) if isinstance(error, dict) else error
        super().__init__(
            f"the server answers {status}: {str(message)[:2000]}",
            "a request that it takes",
            "change the request, or the server's settings, as it says",
        )
        self.status, self.body = status, body


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CALLS)]
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    """As much of the form of OpenAI's streams, of chats and completions, as the commands rely on."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float):
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Api:
    """A server at `url`: http://HOST:PORT, https://HOST, or unix:PATH; /v1 at its end may be there or not.

    key: sent as Bearer. timeout: seconds of silence after which a call fails. ConfigError for what is no url or key.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0):
        self.url, self._timeout = url, timeout
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._prefix = ""
        if key and not SENDABLE.fullmatch(key):
            raise ConfigError("api_key with other characters than visible ASCII", "a key", "correct the key")
        if url.startswith("unix:"):
            self._place: Any = url.removeprefix("unix:")
            return
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            if parts.scheme not in ("http", "https") or not parts.hostname or not SENDABLE.fullmatch(url):
                raise ValueError
            self._place = (parts.scheme == "https", parts.hostname, parts.port)
        except ValueError:
            raise ConfigError(
                f"url={url!r}", "http://HOST:PORT, https://HOST, or unix:PATH", "correct the address of the server"
            ) from None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")

    def _connect(self) -> http.client.HTTPConnection:
        if isinstance(self._place, str):
            return _UnixConnection(self._place, self._timeout)
        secure, host, port = self._place
        if secure:
            return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=self._timeout)

    @contextmanager
    def _response(self, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """The response to a POST of a body, or to a GET where it is None."""
        connection = self._connect()
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", self._prefix + path, content, self._headers)
            yield connection.getresponse()
        except ssl.SSLError as error:
            raise self._absent(f"TLS: {error.reason or error}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = (error.strerror if isinstance(error, OSError) else "") or f"{type(error).__name__} {error}".strip()
            raise self._absent(reason) from None
        finally:
            connection.close()

    def _absent(self, reason: str) -> EngineError:
        return EngineError(f"the server at {self.url}: {reason}", "a server that answers", "is it running? see its log")

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON of a response. ServerRefusal for a status that is not 2xx."""
        with self._response(path, body) as response:
            status, content = response.status, _json(response.read(BODY))
        if not 200 <= status < 300:
            raise ServerRefusal(status, content)
        return content

    def events(self, path: str, body: Any) -> Generator[dict[str, Any], None, None]:
        """The events of a stream, up to [DONE]. Closing the iterator ends the request.

        Each has the form of _Event. ServerRefusal for a status that is not 2xx, and for an event that carries an error.
        """
        with self._response(path, body) as response:
            if not 200 <= response.status < 300:
                raise ServerRefusal(response.status, _json(response.read(BODY)))
            while line := response.readline(LINE):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = _json(data)
                if not isinstance(event, dict):
                    raise self._absent(f"an event that is no JSON object: {data[:80]!r}")
                if event.get("error"):
                    raise ServerRefusal(500, event)
                try:
                    msgspec.convert(event, _Event)
                except msgspec.ValidationError as error:
                    raise self._absent(f"an event in no known form: {error}") from None
                yield event
        raise self._absent("the stream broke off before its end")

    def model(self) -> str:
        """The name of the first model that is served."""
        found = self.ask("/v1/models")
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._absent(f"/v1/models answers {str(found)[:80]!r}, which names no model") from None

    def is_ready(self) -> bool:
        """Whether /health answers 200."""
        try:
            self.ask("/health")
        except (EngineError, ServerRefusal):
            return False
        return True


def _json(content: bytes) -> Any:
    """JSON, or the text where it is none."""
    try:
        return parse_json(content)
    except ValueError:
        return content.decode(errors="replace")


@contextmanager
def own_server(words: Sequence[str], quiet: bool = False) -> Iterator[Api]:
    """`glimmer serve WORDS` as a child on a socket in a private directory, until the end of the block.

    Its messages go to this process's stderr; where it shall be quiet, only if it fails. Raises EngineError, or
    ConfigError, as the child's exit code says, if it ends before it is ready.
    """
    directory = SocketDirectory()
    with ExitStack() as stack:
        stack.callback(directory.close)
        place, said = f"{directory.path}/socket", Path(directory.path) / "stderr"
        serve = [sys.executable, "-m", "glimmer", "serve", *words, "--uds", place]
        command = [sys.executable, *ends_with_parent(serve)]
        stderr = stack.enter_context(said.open("wb")) if quiet else None
        # A session of its own: Ctrl-C is for this process, which then ends the server.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stderr or sys.stderr, stderr=stderr, start_new_session=True
        )
        try:
            api = Api(f"unix:{place}")
            while not api.is_ready():
                if child.poll() is not None:
                    if quiet:
                        exits.to_stderr(said.read_text(errors="replace").rstrip())
                    kind = ConfigError if child.returncode == ConfigError.exit_code else EngineError
                    raise kind("the server has ended before it was ready", "a server", "see its message above")
                time.sleep(POLL)
            yield api
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if child.poll() is None:
                    child.send_signal(number)
                    try:
                        child.wait(END)
                    except subprocess.TimeoutExpired:
                        continue


def serve_words(engine: Mapping[str, Any]) -> list[str]:
    """Settings of an engine as the words of `glimmer serve`."""
    words = [f"--model={engine['model']}"] if "model" in engine else []
    for name, value in engine.items():
        if name != "model":
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
