"""EngineClient: the HTTP process's side of the socket. It starts the engine process, and knows whether there is one.

    client.state      "loading", "ready", or "dead" with client.problem

Whoever asks gets what the engine brings through a Receiver, in the event loop, and must not wait in it. When the engine
process ends, by whatever cause, the end of its socket is noticed at once: all receivers are told, and the process is
started again, or `died` is set, as the configuration says. Not here: text, HTTP, what the messages mean to a request.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from glimmer.engine_load import EngineLoad
from glimmer.errors import EngineError, GlimmerError
from glimmer.server import wire
from glimmer.server.socket_directory import SocketDirectory

log = logging.getLogger("glimmer.server")

STDERR = 2  # the descriptor
SILENCE = 60.0  # seconds without a sign of life after which an engine that has loaded counts as dead
RESTARTS = 3  # deaths within RECENT seconds after which the engine is not started again
RECENT = 300.0
LAST_STEP = 5.0  # seconds that the engine process has to end by itself


class Unavailable(EngineError):
    """No request can be answered at the moment: ask again in `retry_after` seconds. HTTP 503."""

    retry_after = 5


class Receiver(Protocol):
    """What one request of the engine brings. Called in the event loop."""

    def put(self, delta: wire.TokenDelta) -> None:
        """A step has brought this."""

    def end(self, error: GlimmerError) -> None:
        """Nothing more will come, for this reason."""


class EngineClient:
    """The engine process, as the HTTP process sees it.

    command: starts the engine process, with the socket's path in place of "{socket}"; None: somebody else starts it.
    path: of the socket, in a directory that exists; None: in a new private directory.
    restart: start the engine again when one dies that was ready once.
    exit_code: with state "dead", what the server should end with.
    """

    def __init__(self, command: Sequence[str] | None, path: str | None = None, restart: bool = False):
        self._command, self._restart = command, restart and command is not None
        self._directory: SocketDirectory | None = None
        if path is None:
            self._directory = SocketDirectory()
            path = f"{self._directory.path}/engine.sock"
        self._path = path
        self.state = "loading"
        self.ready: wire.Ready | None = None
        self.alive: EngineLoad | None = None  # as of the last sign of life
        self.loading: wire.Loading | None = None
        self.problem: GlimmerError | None = None
        self.exit_code = EngineError.exit_code
        self.died, self.loaded = asyncio.Event(), asyncio.Event()
        self._receivers: dict[int, Receiver] = {}
        self._numbers = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._heard = time.monotonic()
        self._deaths: list[float] = []
        self.deaths = 0
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, and start the engine process. It is ready later: see `state`."""
        self._server = await asyncio.start_unix_server(self._connected, self._path, limit=1 << 20)
        os.chmod(self._path, stat.S_IRUSR | stat.S_IWUSR)
        await self._launch()
        self._task(self._watch())

    async def close(self) -> None:
        """End the engine process, and whoever still waits for it."""
        self._closing = True
        self._end_all(Unavailable("the server is shutting down", "a server that stays", "ask another server, or later"))
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(wire.frame(wire.Close()))
            await self._end_process()
        else:  # one that has not connected yet has nothing to end in order
            await self._end_process((signal.SIGTERM, signal.SIGKILL))
        for task in list(self._tasks):
            task.cancel()
        if self._writer is not None:
            self._writer.close()
        if self._server is not None:
            self._server.close()
        if self._directory is not None:
            self._directory.close()

    # ------------------------------------------------------------------ requests

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._receivers)

    def submit(self, make: Callable[[int], wire.Submit], receiver: Receiver) -> int:
        """Ask the engine; returns the request's number. Unavailable if there is no engine."""
        if self.state != "ready" or self._writer is None:
            raise self.absent()
        id = next(self._numbers)
        self._send(make(id))
        self._receivers[id] = receiver
        return id

    def cancel(self, id: int, answer: int | None = None) -> None:
        """End a request, or one answer of it. Nothing more comes of a request that is ended."""
        if answer is None and self._receivers.pop(id, None) is None:
            return
        if self._writer is not None and self.state == "ready":
            self._send(wire.Cancel(id, answer))

    def done(self, id: int) -> None:
        """Nothing more is expected of a request."""
        self._receivers.pop(id, None)

    def absent(self) -> Unavailable:
        """Why no request can be answered at the moment."""
        if self.state == "loading":
            return Unavailable("the model is being loaded", "a model that is ready", "ask again in a few seconds")
        problem = self.problem
        return Unavailable(
            problem.found if problem else "the engine has ended",
            "an engine",
            "see what the server says; start it again",
        )

    def _send(self, message: wire.ToEngine) -> None:
        assert self._writer is not None
        self._writer.write(wire.frame(message))

    # ------------------------------------------------------------------ the engine process

    async def _launch(self) -> None:
        self.state = "loading"
        self.loaded.clear()
        if self._command is not None:
            words = [word.replace("{socket}", self._path) for word in self._command]
            self._process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.DEVNULL, stdout=STDERR, start_new_session=True
            )
            self._task(self._wait_for(self._process))

    async def _wait_for(self, process: asyncio.subprocess.Process) -> None:
        """The engine process has ended before it could connect."""
        code = await process.wait()
        await asyncio.sleep(0.2)  # what it has said is read first
        if process is self._process and self._writer is None:
            how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
            await self._lost(EngineError(f"the engine process {how}", "an engine that runs", "see what it said"))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The engine process is there: read what it says until it is gone."""
        if self._writer is not None:
            writer.close()
            return
        self._writer, self._heard = writer, time.monotonic()
        if self._closing:
            self._send(wire.Close())
        problem = EngineError("the engine process has ended", "an engine that runs", "see what the server says")
        try:
            while True:
                length = wire.length_of(await reader.readexactly(wire.LENGTH.size))
                self._take(wire.from_engine(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except wire.FrameError as error:
            problem = EngineError(
                f"the engine process says what is no message: {error}", problem.expected, problem.todo
            )
        writer.close()
        self._writer = None
        await self._lost(problem)

    def _take(self, message: wire.FromEngine) -> None:
        self._heard = time.monotonic()
        if isinstance(message, wire.Tokens):
            for delta in message.deltas:
                receiver = self._receivers.get(delta.id)
                if receiver is not None:
                    receiver.put(delta)
        elif isinstance(message, wire.Ended):
            receiver = self._receivers.pop(message.id, None)
            if receiver is not None:
                receiver.end(message.problem.error())
        elif isinstance(message, wire.Alive):
            self.alive = message.load
        elif isinstance(message, wire.Loading):
            self.loading = message
        elif isinstance(message, wire.Ready):
            self.ready, self.state = message, "ready"
            self.loaded.set()
        else:
            self.problem, self.exit_code = message.problem.error(), message.exit_code

    async def _lost(self, problem: EngineError) -> None:
        """There is no engine any more: tell everybody, and start it again if that may help."""
        if self._closing or self.state == "dead":
            return
        never = self.ready is None  # what ends the first start would end the next
        refused = self.state == "loading" and self.problem is not None  # it has said why it cannot begin
        self.problem = self.problem or problem
        self.state = "dead"
        self._end_all(Unavailable(problem.found, problem.expected, "ask again in a few seconds"))
        self.deaths, self.alive = self.deaths + 1, None
        now = time.monotonic()
        self._deaths = [*(death for death in self._deaths if now - death < RECENT), now]
        if not self._restart or never or refused or len(self._deaths) > RESTARTS:
            self.died.set()
            return
        log.error("%s; it is started again", problem.found)
        await self._end_process()
        if not self._closing:
            self.problem = None
            await self._launch()

    async def _watch(self) -> None:
        """End an engine process that gives no sign of life."""
        while True:
            await asyncio.sleep(SILENCE / 10)
            if self.state == "ready" and time.monotonic() - self._heard > SILENCE and self._writer is not None:
                log.error("the engine process has been silent for %g s", SILENCE)
                self._writer.close()

    def _end_all(self, problem: GlimmerError) -> None:
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            receiver.end(problem)

    async def _end_process(self, signals: Sequence[int | None] = (None, signal.SIGTERM, signal.SIGKILL)) -> None:
        """Wait until the engine process, and all that it has started, have ended; with force if need be."""
        process = self._process
        for number in signals:
            if process is None or process.returncode is not None:
                return
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), LAST_STEP)

    def _task(self, work: "asyncio.Future[None] | object") -> None:
        task = asyncio.ensure_future(work)  # type: ignore[type-var]
        self._tasks.add(task)  # type: ignore[arg-type]
        task.add_done_callback(self._tasks.discard)  # type: ignore[attr-defined]
