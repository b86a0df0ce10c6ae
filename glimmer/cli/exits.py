"""How a command ends: its exit code, and what is said on the terminal when something stopped it.

    0    done                        2    bad input: a GlimmerError that the user can put right
    1    the engine failed           130  Ctrl-C
    141  whoever read the output has closed it (128 + SIGPIPE, as with other programs)

A lost stdout or stderr changes none of these codes; SIGTERM ends a process as Ctrl-C does, and then by that signal.
Not here: what a command does.
"""

import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from glimmer.errors import ConfigError, GlimmerError, NotEnoughMemory

REFUSED = GlimmerError.exit_code
INTERRUPTED = 130
CLOSED_PIPE = 141
OTHERS = 2.0  # seconds that the processes of a job may be apart in what they find
_command = ""  # the latest that `run` has begun


class Terminated(BaseException):
    """SIGTERM has come: somebody, or the launcher of a job that cannot go on, ends this process.

    reported: it has been said on the terminal already, with what is kept.
    """

    reported = False


def terminate(*_: object) -> None:
    """As a handler of SIGTERM."""
    raise Terminated


@contextmanager
def importing() -> Iterator[None]:
    """While modules are imported: Ctrl-C and SIGTERM end the process at once, where they would raise an exception.

    An exception could come in the middle of what a library does as it is imported, and some of that swallows it: the
    process would go on as if nobody had asked it to end.
    """

    def end(number: int, _: object) -> None:
        write("")
        to_stderr("\n" * (number == signal.SIGINT) + f"glimmer {_command}".rstrip() + ": interrupted")
        if number == signal.SIGINT:
            os._exit(INTERRUPTED)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    raising = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    found = {number: handler for number, handler in raising.items() if signal.getsignal(number) is handler}
    if threading.current_thread() is not threading.main_thread():
        found = {}
    for number in found:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def place() -> str:
    """ " (rank R on HOST)" in a group of processes that torchrun started; nothing in a single process."""
    if alone():
        return ""
    return f" (rank {os.environ.get('RANK')} on {socket.gethostname()})"


def alone() -> bool:
    """Whether nobody but this process was started; else torchrun or a launcher has started several."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody may be reading along."""
    return stream is not None and stream.isatty()


def can_show(text: str) -> bool:
    """Whether stdout has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def to_stderr(text: str) -> None:
    """A text on stderr. Where stderr is closed or full, it is lost."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def write(text: str) -> OSError | None:
    """A text on stdout. Where stdout is closed or full it is lost, and so is all that follows: that is returned."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        return error
    return None


def say(command: str, line: str) -> None:
    """A line on stderr, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        to_stderr(f"glimmer {command}: {line}")


def discard(stream: TextIO) -> None:
    """Send what a stream still buffers, and all that follows, nowhere: else the interpreter's end fails on it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


# How a lack of memory is told by the loader of libraries, and by Python where a thread's stack cannot be mapped.
NO_MEMORY = ("failed to map segment", "can't start new thread")


def run(command: str, work: Callable[[], int]) -> int:
    """The exit code of `work`. A GlimmerError becomes its three lines, and so do a lack of memory and a path that this
    user may not use; a closed pipe ends quietly; Ctrl-C is raised."""
    global _command
    prepare()
    _command = command
    handles = alone() and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if handles and before is signal.SIG_DFL:  # of a job's processes the launcher takes care
        signal.signal(signal.SIGTERM, terminate)
    try:
        code = work()
        sys.stdout.flush()
        return code
    except GlimmerError as error:
        to_stderr(f"glimmer {command}{place()}: {error}")
        keep_code(error.exit_code)
        return error.exit_code
    except (MemoryError, ImportError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        refusal = NotEnoughMemory(
            "this process gets no more memory",
            "memory, or address space, for the program and the model",
            "raise the limit (ulimit -v unlimited, or the container's), or use a machine with more memory",
        )
        to_stderr(f"glimmer {command}{place()}: {refusal}")
        return refusal.exit_code
    except BrokenPipeError:
        discard(sys.stdout)
        return CLOSED_PIPE
    except PermissionError as error:
        if error.filename is None:
            raise
        denied = ConfigError(
            f"{error.filename}: permission denied",
            "a path that this user may use",
            "change its permissions, or those of the directories above it, or run as its owner",
        )
        to_stderr(f"glimmer {command}{place()}: {denied}")
        keep_code(denied.exit_code)
        return denied.exit_code
    except Terminated as reason:  # the process that started this one shall see that SIGTERM ended it
        if not reason.reported:
            to_stderr(f"glimmer {command}: interrupted")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        if handles and before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


def keep_code(code: int) -> None:
    """In a job of several processes: end with this code even if SIGTERM comes before the process has ended.

    The launcher sends it to all processes as soon as one of them has ended; the job's end shall be blamed on what was
    found, not on that signal. What one process refuses most often all of them refuse: this one stays until the others
    have had the time to find it too.
    """
    if not alone() and threading.current_thread() is threading.main_thread():
        write("")
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        if code == REFUSED:
            time.sleep(OTHERS)


def prepare() -> None:
    """Make stdout and stderr such that writing to them is safe.

    One that was closed when the process began leads nowhere, so that no other file gets its number. A terminal that
    cannot show a character gets the character's number.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
