"""How a command ends: its exit code, and what is said on the terminal when something stopped it.

    0    done                        2    bad input: a GlimmerError that the user can put right
    1    the engine failed           130  Ctrl-C
    141  whoever read the output has closed it (128 + SIGPIPE, as with other programs)

A lost stderr changes none of these codes. Not here: what a command does.
"""

import io
import os
import socket
import sys
from collections.abc import Callable
from typing import TextIO

from glimmer.errors import GlimmerError

INTERRUPTED = 130
CLOSED_PIPE = 141


def place() -> str:
    """ " (rank R on HOST)" in a group of processes that torchrun started; nothing in a single process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ""
    return f" (rank {os.environ.get('RANK')} on {socket.gethostname()})"


def tell(text: str) -> None:
    """A text on stderr. Where stderr is closed or full, it is lost."""
    if sys.stderr is None:  # as Python starts with a closed file descriptor 2
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def say(command: str, line: str) -> None:
    """A line on stderr, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"glimmer {command}: {line}")


def discard(stream: TextIO) -> None:
    """Send what a stream still buffers, and all that follows, nowhere: else the interpreter's end fails on it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def run(command: str, work: Callable[[], int]) -> int:
    """The exit code of `work`. A GlimmerError becomes its three lines, a closed pipe ends quietly; Ctrl-C is raised."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character gets its number
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
        sys.stdout.flush()
        return code
    except GlimmerError as error:
        tell(f"glimmer {command}{place()}: {error}")
        return error.exit_code
    except BrokenPipeError:
        discard(sys.stdout)
        return CLOSED_PIPE
