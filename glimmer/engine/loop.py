"""Loop: the one owner of an engine. Its thread steps the engine; any number of threads and coroutines ask it.

    submit, cancel, run --> inbox --> the engine's thread: what begins and ends, one step --> Client.put, after_step

A turn of the thread begins with the inbox. On several ranks rank 0's requests are everybody's: rank 0 then tells the
other ranks which requests begin and which end (ranks.py), so that all engines take the same steps. Then comes a step,
and each client gets what became known about its requests.

Failures stay where they belong. A request that fails ends alone, a step that fails ends its own sequences (engine.py).
A client that fails, or that is cancelled, loses its own requests. Whatever else goes wrong in the thread is the end of
the engine: every waiting client hears why at once, and so does everyone who asks later.

On one process the thread ends when nothing is left to do, and begins again with the next request. On several ranks it
begins with the first request and ends with `close`; while there is nothing to do, rank 0 says so every HEARTBEAT
seconds, and all ranks make sure that none of them is stopped.
Not here: text, and what a client does with tokens (llm.py).
"""

import atexit
import itertools
import logging
import os
import queue
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from glimmer.engine.engine import Engine
from glimmer.engine.ranks import (
    Abort,
    Arrival,
    Call,
    CallMatcher,
    Discard,
    ParentRequest,
    Record,
    Stop,
    from_json,
    notify_end,
    to_json,
)
from glimmer.engine.sequence import FinishReason, Output, failure
from glimmer.errors import EngineError

log = logging.getLogger("glimmer")
T = TypeVar("T")

LINGER = 0.05  # seconds that the thread of a single process waits for the next request before it ends
HEARTBEAT = 0.5  # seconds between two messages of an idle rank 0
LEAVE = 1.0  # seconds that an interrupted call, and `close` on several ranks, wait for the last step
LAST_STEP = 600.0  # seconds that `close` waits for the last step of a single process
MESSAGE = 1 << 20  # bytes that rank 0 sends at the head of a step, about; one request may be longer

CLOSED = EngineError("the engine is closed", "requests before close()", "make a new LLM")
FORKED = EngineError(
    "an LLM in a forked process, which has none of the threads of the one that made it",
    "requests in the process that made the LLM",
    "make the LLM in the child, or start it with multiprocessing's method 'spawn'",
)


class OpenRequest:
    """A parent request that is being answered, for the call whose `position`-th it is. Its answers begin one by one."""

    def __init__(self, parent: ParentRequest, call: Call, position: int):
        self.parent, self.call, self.position = parent, call, position
        self.begun = 0
        self.open = parent.params.n  # answers that have not ended


class Loop:
    """Submit calls from any thread; their clients are called in the loop's own thread."""

    def __init__(self, engine: Engine):
        self.engine, self._group = engine, engine.group
        # What is put into the inbox is called by the loop's thread between two steps. A SimpleQueue may be used by
        # finalizers, which run in any thread at any moment.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._records: deque[Record] = deque()  # what begins and ends, in this order
        self._open_requests: dict[str, OpenRequest] = {}  # by the parent requests' ids: all that have not ended
        self._queue: OrderedDict[str, OpenRequest] = OrderedDict()  # those whose answers have not all begun, in order
        self._answers: dict[str, tuple[OpenRequest, int]] = {}  # by request id: what the engine works on
        self._watching: dict[Call, None] = {}  # calls whose clients want to know of every step
        waits = self._group.timeouts
        self._matcher = CallMatcher(self._group.rank, waits.request, waits.mismatch)  # of callers on ranks other than 0
        self._idle = False  # the last turn was a heartbeat: the next message travels soon
        self._call_numbers, self._ordinals = itertools.count(), itertools.count(1)
        self._ordering: int | None = None  # the one thread that makes all ordered calls; 0 if there are several
        self._guard = threading.RLock()  # over the three below
        self._running = False  # a thread is in _run
        self._together = self._group.size == 1  # all ranks' threads have begun
        self._thread: threading.Thread | None = None
        self._latest: threading.Thread | None = None  # the same, also after its last turn: until it has ended
        self._end: EngineError | None = None  # why there is no engine any more
        self._over = threading.Event()  # set with the end
        _loops.add(self)

    # ------------------------------------------------------------------ for any thread

    @property
    def idle(self) -> bool:
        """Nothing is being answered, and nobody has asked for anything."""
        return not (self._open_requests or self._records or self.engine.busy) and self._inbox.empty()

    @property
    def ended(self) -> EngineError | None:
        """Why nothing will be answered any more; None as long as requests are welcome."""
        return self._end

    @property
    def num_waiting(self) -> int:
        """Answers that have not begun, about: other threads change it."""
        return sum(one.parent.params.n - one.begun for one in list(self._queue.values()))

    def submit(self, call: Call) -> None:
        """Begin to answer. Raises EngineError if the engine is dead or closed, or within a client's method."""
        if threading.current_thread() is self._thread:
            raise EngineError(
                "a request from within on_step, which the engine's own thread calls",
                "requests of other threads, or between calls",
                "ask when generate has returned, in on_finish, or in another thread",
            )
        if self._end is not None and not self._matcher.holds(call):
            raise _copy(self._end)
        if self._group.size > 1:
            _ = call.digest  # made here, for it may take long: nobody waits for this thread
        if call.ordered:
            me, ordinal = threading.get_ident(), next(self._ordinals)
            self._ordering = me if self._ordering in (None, me) else 0
            call.ordinal = ordinal if self._ordering else None
        self._post(lambda: self._open(call))

    def cancel(self, call: Call, wait: bool = True) -> None:
        """End what is left of a call. When this returns, the engine holds nothing of it (unless wait=False).

        Whoever is interrupted (Ctrl-C, SIGTERM) meanwhile waits no longer than LEAVE seconds for the end of a step.
        What the engine still holds then ends before anything that is asked for later begins. For a call that was never
        submitted, or has ended, this does nothing. May be called by a finalizer.
        """
        if call.ended.is_set():
            return
        self._post(lambda: self._close(call))
        if wait and threading.current_thread() is not self._thread:
            interrupted = not isinstance(sys.exc_info()[1], Exception | GeneratorExit | None)
            call.ended.wait(LEAVE if interrupted else None)

    def run(self, what: Callable[[], T]) -> T:
        """Call `what` between two steps; return what it returns, or raise what it raises."""
        with self._guard:
            if not self._running or self._thread is threading.current_thread():
                return what()  # there are no steps meanwhile
        results: list[T] = []
        failures: list[BaseException] = []
        done, given_up = threading.Event(), threading.Event()

        def do() -> None:
            try:
                if not given_up.is_set():
                    results.append(what())
            except BaseException as error:
                failures.append(error)
            done.set()

        self._post(do)
        try:
            done.wait()
        except BaseException:  # an interrupt: it must not be called later
            given_up.set()
            raise
        if failures:
            raise failures[0]
        return results[0]

    def follow(self) -> None:
        """Take part in what rank 0 computes, without callers on this rank, until rank 0 closes.

        On rank 0 this returns at once; from then on rank 0 tells the others that it is there. EngineError if the job
        fails.
        """
        self._post(self._matcher.release)
        if self._group.rank != 0:
            self._over.wait()
            if self._end not in (None, CLOSED):
                raise _copy(self._end)

    def close(self) -> None:
        """End the thread; whoever still waits gets an error that says so. May be called again.

        Raises EngineError within a client's method: the thread cannot wait for itself.
        """
        if threading.current_thread() is self._thread:
            raise EngineError(
                "close() from within on_step, which the engine's own thread calls",
                "close() in another thread, or between calls",
                "raise an exception in on_step, which ends its call; then close",
            )
        with self._guard:
            thread = self._latest
            if not self._running or not self._together:
                self._stop(CLOSED)
        if thread is None:
            return
        if self._group.rank == 0:
            self._post(lambda: self._records.append(Stop()))
        else:
            thread.join(LEAVE)  # rank 0 closes as well, and tells all ranks
            self._post(lambda: self._stop(CLOSED))
        thread.join(LAST_STEP if self._group.size == 1 else LEAVE)

    def after_fork(self) -> None:
        """In a forked child, where the thread does not exist and another thread may have held the lock: the end."""
        self._guard, self._inbox, self._latest = threading.RLock(), queue.SimpleQueue(), None
        self._stop(FORKED)

    def _post(self, do: Callable[[], None]) -> None:
        """Have the thread call `do`; begin a thread if there is none. After the end, `do` is called here."""
        self._inbox.put(do)
        with self._guard:
            if self._end is not None:
                return self._drain()
            begin = not self._running
        if begin:  # should two threads begin, one of them finds that it is not needed
            threading.Thread(target=self._run, name="glimmer-engine", daemon=True).start()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        with self._guard:
            if self._running or self._end is not None:
                return
            if self._latest is None:
                self._close_at_exit()
            self._running, self._thread = True, threading.current_thread()
            self._latest = self._thread
        try:
            self._together = self._group.wait_for_all("answers requests", self._group.timeouts.request)
            if not self._together:  # rank 0 has closed before it asked for anything
                self._stop(CLOSED)
            while self._running and self._turn():
                pass
        except BaseException as error:
            log.debug("the engine has failed", exc_info=error)
            problem = failure("the engine", error)
            if self.idle and not self._matcher.awaited:  # nobody hears of it otherwise
                log.error("%s", problem)
            self._group.close()  # the other ranks hear of it; first, for whoever is told here may end the process
            self._stop(problem)

    def _close_at_exit(self) -> None:
        """Have the interpreter close the loop before it ends, and before it destroys the process groups.

        A thread that still uses tensors while the interpreter is finalised would abort the process. (What was
        registered last is called first; the process groups were registered when they were made.)
        """
        close = partial(_close, weakref.ref(self))
        atexit.register(close)
        weakref.finalize(self, atexit.unregister, close).atexit = False

    def _turn(self) -> bool:
        """The inbox, what begins and ends, one step. False if there shall be no further turn."""
        if not self._attend():
            return False
        records = self._exchange()
        for record in records:
            self._apply(record)
        if self._end is not None:
            return False
        self._feed()
        self._idle = not records and not self.engine.busy  # alike on all ranks
        if self._idle:
            self._group.heartbeat()
        elif self.engine.busy:
            with self.engine.runner.running():
                outputs = self.engine.step()
            self._deliver(outputs)
        return True

    def _attend(self) -> bool:
        """Do what is in the inbox. Rank 0 waits for it if there is nothing else to do. False if the thread ends."""
        leads, alone = self._group.rank == 0, self._group.size == 1
        wait = leads and self.idle
        try:
            if wait:
                self._inbox.get(timeout=LINGER if alone else HEARTBEAT)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass
        if not leads:
            self._matcher.refuse_overdue()
        if wait and alone:
            with self._guard:
                if self.idle:
                    self._running, self._thread = False, None
        return self._running

    def _exchange(self) -> list[Record]:
        """What begins and ends before this step on all ranks, as rank 0 says."""
        timeout = self._group.timeouts.heartbeat if self._idle else None
        if self._group.rank != 0:
            return [from_json(record) for record in self._group.broadcast(None, timeout=timeout)]
        records: list[Record] = []
        size = 0
        while self._records and size < MESSAGE:
            record = self._records.popleft()
            size += 8 * len(record.parent.prompt_token_ids) if isinstance(record, Arrival) else 8
            records.append(record)
        if self._group.size > 1:
            self._group.broadcast([to_json(record) for record in records], timeout=timeout)
        return records

    def _apply(self, record: Record) -> None:
        """Begin or end what the record says."""
        if isinstance(record, Stop):
            self._stop(CLOSED)
        elif isinstance(record, Abort):
            self._abort(record.id)
        else:
            call = record.call or self._matcher.arrive(record)
            self._open_requests[record.parent.id] = OpenRequest(record.parent, call, record.position)
            self._queue[record.parent.id] = self._open_requests[record.parent.id]
            if call.watches:
                self._watching[call] = None

    def _feed(self) -> None:
        """Begin answers, as long as no more of them wait in the engine than can run at once."""
        scheduler = self.engine.scheduler
        while self._queue and len(scheduler.waiting) < scheduler.max_sequences:
            open_request = next(iter(self._queue.values()))
            parent, answer = open_request.parent, open_request.begun
            open_request.begun += 1
            if open_request.begun == parent.params.n:
                del self._queue[parent.id]
            request = parent.child(answer)
            self._answers[request.id] = open_request, answer
            try:
                self.engine.add(request, parent.constraints[answer] if parent.constraints else None)
            except Exception as error:
                if self._group.size > 1:  # perhaps not on all of them
                    raise
                problem = failure("the start of a request", error)
                self._deliver([Output(request.id, finish_reason=FinishReason.ERROR, problem=problem)])

    def _deliver(self, outputs: list[Output]) -> None:
        """What a step brought, to those who asked for it."""
        new = dict.fromkeys(self._watching, 0)
        for output in outputs:
            open_request, answer = self._answers[output.request_id]
            new[open_request.call] = new.get(open_request.call, 0) + len(output.token_ids)
            self._put(open_request, answer, output)
        for call, count in new.items():
            self._notify(call, count)

    def _notify(self, call: Call, new: int) -> None:
        """A step is over for a client that it may have brought something."""
        try:
            call.client.after_step(new)
        except BaseException as error:  # a callback's: its caller shall raise it
            self._fail(call, error)

    def _put(self, open_request: OpenRequest, answer: int, output: Output) -> None:
        """Hand an output to its client."""
        try:
            enough = open_request.call.client.put(open_request.position, answer, output)
        except Exception as error:
            self._fail(open_request.call, error)
            enough = False
        if output.finish_reason is not None:
            self._answers.pop(output.request_id, None)
            open_request.open -= 1
            if open_request.open == 0:
                del self._open_requests[open_request.parent.id]
                open_request.call.open -= 1
                if open_request.call.open == 0:
                    self._watching.pop(open_request.call, None)
                    open_request.call.finish()
        elif enough and self._group.rank == 0:
            self._records.append(Abort(output.request_id))

    # ------------------------------------------------------------------ what the inbox is asked for

    def _open(self, call: Call) -> None:
        """A call begins: on rank 0 for everybody; elsewhere it gets the answers of rank 0's equal call."""
        call.opened = True
        if self._end is not None and not self._matcher.holds(call):
            call.client.end(_copy(self._end))
            call.finish()
        elif not call.requests:
            call.finish()
        elif self._group.rank != 0:
            self._matcher.claim(call)
        else:
            number, size = next(self._call_numbers), len(call.requests)
            digest = call.digest if self._group.size > 1 else ""
            for position, parent in enumerate(call.requests):
                self._records.append(Arrival(number, size, digest, call.ordinal, position, parent, call))

    def _close(self, call: Call) -> None:
        """A call is cancelled."""
        if self._end is not None or not call.opened:
            call.finish()
        elif self._group.rank != 0:
            self._matcher.withdraw(call)
        else:
            self._records.extend(Abort(parent.id) for parent in call.requests)

    def _fail(self, call: Call, error: BaseException) -> None:
        """The call's client has failed: it is told so, and its requests end."""
        client, call.client = call.client, Discard()
        if self._group.rank == 0:
            self._close(call)
        notify_end(client, error)

    def _abort(self, id: str) -> None:
        """End a parent request, or one answer of it (REQUEST.ANSWER), whatever its state."""
        name, _, which = id.partition(".")
        open_request = self._open_requests.get(name)
        if open_request is None:
            return
        for answer in [int(which)] if which else range(open_request.parent.params.n):
            request_id = f"{name}.{answer}"
            if request_id in self._answers or answer >= open_request.begun:
                self.engine.abort(request_id)
                self._put(open_request, answer, Output(request_id, finish_reason=FinishReason.ABORT))
        if not which:
            self._queue.pop(name, None)
        if self._group.rank != 0:  # rank 0's client wanted it, others may still wait
            self._notify(open_request.call, 0)

    def _stop(self, reason: EngineError) -> None:
        """The end: everyone who waits hears the reason, and so will everyone who asks later."""
        with self._guard:
            self._end, self._running, self._thread = self._end or reason, False, None
        arriving = [record.call for record in self._records if isinstance(record, Arrival) and record.call is not None]
        for call in dict.fromkeys([*(open_request.call for open_request in self._open_requests.values()), *arriving]):
            notify_end(call.client, _copy(reason))
            call.finish()
        self._matcher.end(_copy(reason))
        for waiting in (self._records, self._open_requests, self._queue, self._answers, self._watching):
            waiting.clear()
        with self._guard:
            self._drain()
        if reason is not FORKED:  # a forked process has none of the engine's threads
            self.engine.close()
        self._over.set()

    def _drain(self) -> None:
        """After the end: answer what is in the inbox."""
        while not self._inbox.empty():
            self._inbox.get_nowait()()


_loops: weakref.WeakSet[Loop] = weakref.WeakSet()  # of this process


def _after_fork() -> None:
    for loop in list(_loops):
        loop.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _close(reference: "weakref.ref[Loop]") -> None:
    """Close a loop, unless nobody needs it any more."""
    loop = reference()
    if loop is not None:
        loop.close()


def _copy(error: EngineError) -> EngineError:
    """The same error as an exception of its own: several threads may raise it."""
    return EngineError(error.found, error.expected, error.todo)
