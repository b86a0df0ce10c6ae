"""The engine process: loads the model, answers what comes over the socket in token ids, and ends with the HTTP process.

    python -m glimmer.server.engine_process SOCKET '{"model": DIR, ...}'      EngineConfig's fields as JSON

Rank 0 connects to the socket; other ranks take part in what it computes. Three threads share the work: this file's
reader hands requests to the engine's loop (engine/loop.py), the loop's own thread collects what a step brought to each
request, and the sender writes all of it as one message. Where the socket ends, the HTTP process is gone, and this
process ends at once, even while it is loading. Not here: text, stop strings, HTTP.
"""

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from glimmer.engine.ranks import Call
from glimmer.engine.sequence import Constraint, Logprob, Output
from glimmer.errors import EngineError, GlimmerError
from glimmer.llm import LLM
from glimmer.parallel import world
from glimmer.server import wire
from glimmer.text.answers import AnswerFormat
from glimmer.text.budget import ThinkingBudget

CONNECT = 60.0  # seconds that the HTTP process may take to make its socket
LISTEN = 2.0  # and then to listen; a socket where nobody listens for longer is that of a process that has ended
COMPILERS = 2  # requests whose grammars are compiled at the same time
LAST_WORDS = 2.0  # seconds that the last message may take


class Connection:
    """The socket to the HTTP process. Messages are sent by a thread of their own, many deltas of tokens as one."""

    def __init__(self, path: str):
        self._socket = _connect(path)
        self._incoming = self._socket.makefile("rb", buffering=1 << 16)
        self._outgoing: queue.SimpleQueue[wire.FromEngine | list[wire.TokenDelta] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="glimmer-sender", daemon=True)
        self._sender.start()

    def send(self, message: wire.FromEngine | list[wire.TokenDelta]) -> None:
        """Send a message, or deltas, after all that were given before. Does not wait."""
        self._outgoing.put(message)

    def receive(self) -> wire.ToEngine | None:
        """Wait for the next message. None if there is no HTTP process any more, or it speaks another language."""
        try:
            head = self._incoming.read(wire.LENGTH.size)
            if len(head) < wire.LENGTH.size:
                return None
            length = wire.length_of(head)
            content = self._incoming.read(length)
            return wire.to_engine(content) if len(content) == length else None
        except (OSError, ValueError, wire.FrameError):
            return None

    def finish(self) -> None:
        """Send what is still to be sent."""
        self._outgoing.put(None)
        self._sender.join(LAST_WORDS)

    def _send(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                if not isinstance(message, list):
                    self._socket.sendall(wire.frame(message))
                    continue
                deltas = message
                following: wire.FromEngine | list[wire.TokenDelta] | None = []
                while isinstance(following, list):
                    deltas += following
                    try:
                        following = self._outgoing.get_nowait()
                    except queue.Empty:
                        break
                self._socket.sendall(wire.frame(wire.Tokens(deltas)))
                if following is None:
                    return
                if not isinstance(following, list):
                    self._socket.sendall(wire.frame(following))
        except OSError:
            pass  # the reader hears of it, too


class Requester:
    """The client (engine/ranks.py) of one request of the HTTP process."""

    def __init__(self, id: int, answers: int, connection: Connection, gone: Callable[[int], object]):
        self.id, self._left, self._connection, self._gone = id, answers, connection, gone
        self.call: Call | None = None
        self.unwanted: set[int] = set()  # answers that have had their last token
        self.cancelled = False
        self._new: list[wire.TokenDelta] = []

    def put(self, prompt: int, answer: int, output: Output) -> bool:
        """As Client.put."""
        finish = output.finish_reason
        self._new.append(
            wire.TokenDelta(
                self.id,
                answer,
                list(output.token_ids),
                None if finish is None else finish.value,
                output.num_cached_tokens,
                [_logprobs(place, id) for place, id in zip(output.logprobs, output.token_ids)],
                [_logprobs(place) for place in output.prompt_logprobs],
                None if output.problem is None else wire.Problem.of(output.problem),
            )
        )
        if finish is not None:
            self._left -= 1
            if self._left == 0:
                self._gone(self.id)
        return answer in self.unwanted

    def after_step(self, new: int) -> None:
        """As Client.after_step."""
        if self._new:
            deltas, self._new = self._new, []
            self._connection.send(deltas)

    def end(self, error: BaseException) -> None:
        """As Client.end."""
        self._gone(self.id)
        self._connection.send(wire.Ended(self.id, wire.Problem.of(error)))


class EngineProcess:
    """Rank 0: the model, and the requests of the HTTP process."""

    def __init__(self, connection: Connection, llm: LLM):
        self._connection, self._llm = connection, llm
        self._open: dict[int, Requester] = {}
        self._leaving = False
        self._compilers = ThreadPoolExecutor(COMPILERS, "glimmer-compilers")
        assert llm.tokenizer is not None, "a server has one"
        tags = [llm.tokenizer.token_to_id(tag) for tag in AnswerFormat().think or ()]
        self._thoughts = tuple(-1 if id is None else id for id in tags)

    def run(self, incoming: "queue.SimpleQueue[wire.ToEngine | None]") -> bool:
        """Answer until the HTTP process says that it is enough (True), or is gone (False)."""
        threading.Thread(target=self._report, name="glimmer-heartbeat", daemon=True).start()
        self._compilers.submit(self._llm.grammars.prepare)
        while (message := incoming.get()) is not None:
            if isinstance(message, wire.Close):
                self._leaving = True
                return True
            if isinstance(message, wire.Cancel):
                self._cancel(message)
            else:
                self._submit(message)
        self._leaving = True
        return False

    def _submit(self, message: wire.Submit) -> None:
        """Begin a request. Grammars are compiled beside the reader, which others need meanwhile."""
        answers = message.params.get("n", 1)
        requester = Requester(message.id, answers, self._connection, lambda id: self._open.pop(id, None))
        self._open[message.id] = requester
        if message.constraint is None and message.thinking_budget is None:
            self._begin(message, requester)
        else:
            self._compilers.submit(self._begin, message, requester)

    def _begin(self, message: wire.Submit, requester: Requester) -> None:
        try:
            params = wire.params_from_wire(message.params)
            constraints = [one for _ in range(params.n) if (one := self._constraint(message)) is not None]
            requester.call = self._llm.submit(
                message.prompt_token_ids, params, requester, constraints, message.cache_salt
            )
        except Exception as error:  # of this request only
            self._open.pop(message.id, None)
            self._connection.send(wire.Ended(message.id, wire.Problem.of(error)))
        else:
            if requester.cancelled:
                self._llm.cancel(requester.call)

    def _constraint(self, message: wire.Submit) -> Constraint | None:
        """What one answer must look like."""
        grammars = self._llm.grammars
        asked = None if message.constraint is None else grammars.constraint(message.constraint)
        if message.thinking_budget is None:
            return asked
        opens, closes = self._thoughts
        only = grammars.vocabulary.only([closes])
        return ThinkingBudget(message.thinking_budget, opens, closes, only, message.thinking, asked)

    def _cancel(self, message: wire.Cancel) -> None:
        requester = self._open.get(message.id)
        if requester is None:
            return
        if message.answer is not None:
            requester.unwanted.add(message.answer)
            return
        requester.cancelled = True
        if requester.call is not None:
            self._llm.cancel(requester.call)

    def _report(self) -> None:
        """Signs of life; and the last word where the engine has ended, such as with another rank."""
        while (reason := self._llm.ended) is None:
            self._connection.send(wire.Alive(self._llm.load))
            time.sleep(wire.HEARTBEAT)
        if not self._leaving:
            self._connection.send(wire.Failed(wire.Problem.of(reason), reason.exit_code))
            self._connection.finish()
            os._exit(reason.exit_code)  # whatever waits for the other ranks would wait for long


def serve(path: str, settings: dict[str, Any]) -> int:
    """Rank 0's part: connect, load, answer. Returns the exit code. Other ranks: `follow`."""
    connection = Connection(path)
    incoming: queue.SimpleQueue[wire.ToEngine | None] = queue.SimpleQueue()
    loaded = threading.Event()

    def read() -> None:
        message: wire.ToEngine | None
        while (message := connection.receive()) is not None:
            if isinstance(message, wire.Close) and not loaded.is_set():
                os._exit(0)
            incoming.put(message)
        if not loaded.is_set():
            os._exit(1)
        incoming.put(None)
        time.sleep(LAST_WORDS)  # a step that takes long
        os._exit(1)

    threading.Thread(target=read, name="glimmer-reader", daemon=True).start()
    try:
        llm = LLM(**settings, on_load=lambda done, total: connection.send(wire.Loading(done, total)))
    except Exception as error:
        code = error.exit_code if isinstance(error, GlimmerError) else EngineError.exit_code
        connection.send(wire.Failed(wire.Problem.of(error), code))
        connection.finish()
        return code
    loaded.set()
    connection.send(
        wire.Ready(
            llm.max_model_len,
            llm.model_config.vocab_size,
            list(llm.eos_token_ids),
            llm.load.num_blocks,
            llm.config.block_size,
            llm.config.max_num_seqs,
            llm.size,
            str(llm.group.device),
        )
    )
    llm.follow()  # from now on the other ranks know of each other's end
    in_order = EngineProcess(connection, llm).run(incoming)
    connection.finish()
    llm.close()
    return 0 if in_order else EngineError.exit_code


def follow(settings: dict[str, Any], loaded: Callable[[], object] = lambda: None) -> int:
    """The part of a rank other than 0. loaded: called when it is ready to take part."""
    llm = LLM(**settings)
    loaded()
    llm.follow()
    llm.close()
    return 0


def _connect(path: str) -> socket.socket:
    deadline = time.monotonic() + CONNECT
    seen = False
    while True:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(path)
            return connected
        except OSError as error:
            connected.close()
            if isinstance(error, ConnectionRefusedError) and not seen:
                seen, deadline = True, min(deadline, time.monotonic() + LISTEN)
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{path} does not answer: {error.strerror}",
                    "the HTTP process to listen there",
                    "see what it said",
                ) from None
            time.sleep(0.05)


def _logprobs(place: dict[int, Logprob], first: int | None = None) -> list[wire.Logprob]:
    """The log-probabilities at a place, the one of token `first` in front."""
    ids: Sequence[int] = list(place) if first is None else [first, *(id for id in place if id != first)]
    return [wire.Logprob(id, place[id].logprob, place[id].rank) for id in ids]


def main(argv: list[str]) -> int:
    """As a program of its own: see the top."""
    path, settings = argv[0], json.loads(argv[1])
    try:
        rank, size = world()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the HTTP process, which ends this one at the end
        if size == 1:  # so is SIGTERM; but a launcher uses it where another rank has failed
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        level = logging.WARNING if rank == 0 else logging.ERROR
        logging.basicConfig(format="glimmer serve: %(message)s", level=level)
        return serve(path, settings) if rank == 0 else follow(settings)
    except GlimmerError as error:
        print(f"glimmer serve: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
