"""The HTTP process: sockets, signals, and the beginning and the end of the server.

    run(config, model, command)                   listens at once, starts the engine; 503 until the model is loaded
    python -m glimmer.server.http_process SOCKET  the same, started by rank 0 of a job; the settings come on stdin

SIGTERM and SIGINT end the server in order: no new requests, those that run have `shutdown_timeout` seconds, and the
engine process ends last. A second signal ends everything at once. Not here: routes (app.py), the engine (client.py).
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from glimmer.errors import ConfigError, EngineError, GlimmerError, shown
from glimmer.server.app import make_app
from glimmer.server.client import EngineClient
from glimmer.server.protocol import Protocol
from glimmer.server.service import Service
from glimmer.server.settings import ServerConfig

log = logging.getLogger("glimmer.server")

PROGRESS = 10.0  # seconds between two lines about loading
IDLE = 75  # seconds for which a connection without requests is kept
LAST_WORDS = 2.0  # seconds that streams have to say that the server ends


class _Server(uvicorn.Server):
    """uvicorn without its own signals: see `_until_told`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to this file."""
        yield


def run(config: ServerConfig, model: str, command: Sequence[str] | None, path: str | None = None) -> int:
    """Serve until told to end, or until there is no engine; returns the exit code.

    command, path: as EngineClient's. Raises ConfigError for an address that cannot be had, CheckpointError for a model
    without a tokenizer, and what the engine process says when it cannot begin.
    """
    return asyncio.run(_run(config, model, command, path))


async def _run(config: ServerConfig, model: str, command: Sequence[str] | None, path: str | None) -> int:
    _check_certificate(config)
    listener = _listen(config)
    own = None if config.uds is None else os.stat(config.uds).st_ino
    client = EngineClient(command, path, restart=config.on_engine_death == "restart")
    service = Service(config, model, client)
    server = _Server(
        uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=IDLE,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            http=Protocol,
        )
    )
    told = _signals()
    serving: asyncio.Task[None] | None = None
    try:
        await client.start()
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        _say(f"listening on {_address(config, listener)}; the model is being loaded")
        announcing = asyncio.ensure_future(_announce(service, config, listener))
        await _first(told.wait(), client.died.wait(), serving, *([_parent_gone()] if command is None else []))
        announcing.cancel()
        if told.is_set():
            await _drain(service, server, serving, told, config.shutdown_timeout)
            return 0
        if client.died.is_set():
            server.should_exit = server.force_exit = True
            await asyncio.wait({serving}, timeout=LAST_WORDS)
            raise client.problem or EngineError("the engine has ended", "an engine that runs", "start it again")
        return EngineError.exit_code
    finally:
        server.should_exit = server.force_exit = True
        await client.close()
        if serving is not None:
            await asyncio.wait({serving}, timeout=LAST_WORDS)
        service.close()
        listener.close()
        if config.uds is not None:
            with contextlib.suppress(OSError):
                if os.stat(config.uds).st_ino == own:  # and not another server's by now
                    os.unlink(config.uds)


async def _parent_gone() -> None:
    """Returns when the process at the other end of stdin has ended."""
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(0, 1 << 16):
            loop.remove_reader(0)
            gone.set()

    loop.add_reader(0, read)
    await gone.wait()


async def _drain(
    service: Service, server: uvicorn.Server, serving: "asyncio.Task[None]", told: asyncio.Event, seconds: float
) -> None:
    """End in order: what is being answered has so many seconds, or until the second signal."""
    told.clear()
    service.draining = True
    if service.client.open:
        _say(f"shutting down: {service.client.open} requests have {seconds:g} s to end; a second signal ends them now")
    server.should_exit = True
    again = asyncio.ensure_future(told.wait())
    await asyncio.wait({serving, again}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not serving.done():
        await service.client.close()  # streams say why they end
        await asyncio.wait({serving}, timeout=LAST_WORDS)


async def _announce(service: Service, config: ServerConfig, listener: socket.socket) -> None:
    """Say each time when the model is ready, and now and then how far it has been loaded."""
    client = service.client
    while True:
        while not client.loaded.is_set():
            await _first(client.loaded.wait(), asyncio.sleep(PROGRESS))
            if client.state == "loading" and (loading := client.loading) is not None:
                _say(f"{loading.done / 2**20:,.0f} of {loading.total / 2**20:,.0f} MiB of weights have been loaded")
        ready = client.ready
        assert ready is not None
        tokens = ready.num_blocks * ready.block_size
        _say(
            f"ready on {_address(config, listener)}: {ready.device} x {ready.ranks}, context {ready.max_model_len} "
            f"tokens, cache {tokens} tokens"
        )
        with contextlib.suppress(GlimmerError):  # whoever asks for a form is told why there is none
            await service.in_thread(service.prepare_grammars)
        while client.loaded.is_set():
            await asyncio.sleep(1)


async def _first(*waits: "asyncio.Future[None] | object") -> None:
    """Wait for one of several."""
    tasks = [asyncio.ensure_future(one) for one in waits]  # type: ignore[type-var]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]


def _signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told


def _check_certificate(config: ServerConfig) -> None:
    """ConfigError if there shall be TLS, and its files are none."""
    if config.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"ssl_certfile={shown(config.ssl_certfile)} and ssl_keyfile={shown(config.ssl_keyfile)} cannot be used: "
            f"{error.strerror if isinstance(error, OSError) and error.strerror else error}",
            "a certificate and its private key, as PEM files without a password",
            "correct the paths, or the files",
        ) from None


def _give_way(path: str) -> None:
    """Remove the socket of a server that was killed. OSError if there is a server that listens."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, "another server listens there")


def _listen(config: ServerConfig) -> socket.socket:
    """The socket of the server. ConfigError if the address cannot be had."""
    try:
        if config.uds is not None:
            _give_way(config.uds)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(config.uds)
            listener.listen(2048)
        else:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        place = config.uds or f"{config.host}:{config.port}"
        raise ConfigError(
            f"{place} cannot be listened on: {error.strerror or error}",
            "an address of this machine and a free port, or the path of a socket that no server has",
            f"choose another {'--uds' if config.uds else '--port, or --host'}; `ss -lxtp` shows who has it",
        ) from None
    listener.setblocking(False)
    return listener


def _address(config: ServerConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return f"unix:{Path(config.uds).absolute()}"
    host, port = listener.getsockname()[:2]
    return f"http{'s' * bool(config.ssl_certfile)}://{f'[{host}]' if ':' in host else host}:{port}{config.prefix}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"glimmer serve: {line}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """As a program of its own: see the top."""
    settings = json.loads(sys.stdin.readline())
    logging.basicConfig(format="glimmer serve: %(message)s", level=logging.WARNING)
    try:
        return run(ServerConfig(**settings["server"]), settings["model"], None, argv[0])
    except GlimmerError as error:
        _say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
