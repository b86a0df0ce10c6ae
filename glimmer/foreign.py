"""Foreign files: the one reader of what others have written (JSON, YAML, templates, prompts), with every size bounded.

What is read is a regular file of limited size (never a pipe or a device, which may be without an end), in UTF-8 without
lone surrogates; JSON has each key once, limited nesting and integers of limited length. Whatever an operating system or
a parser refuses becomes a GlimmerError in three parts, which tells the limits of this process (open files, address
space) and permissions from damage of the file. Not here: what the content means, and the data of safetensors files
(checkpoint/files.py).
"""

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glimmer.errors import CheckpointError, GlimmerError, shown

Error = Callable[[str, str, str], GlimmerError]

MAX_BYTES = 64 << 20  # of a JSON, YAML or text file; the longest index of the family has 15 MB
MAX_TOKENIZER = 256 << 20  # the family's tokenizer.json has 20 MB
MAX_DIGITS = 300  # of an integer; a float holds any such number
MAX_DEPTH = 64  # of lists and objects within each other
MAX_NUMBER = 2**31 - 1  # of a count or a size in a configuration


def unusable(path: Path, found: str, expected: str, todo: str | None = None) -> CheckpointError:
    """The error of a file that is not what it should be."""
    return CheckpointError(f"{path} {found}", expected, todo or f"download {path.name} again and compare its size")


def unreadable(path: Path, problem: OSError | MemoryError, error: Error = CheckpointError) -> GlimmerError:
    """The error of a file that the system does not let us read: a limit of this process is no damage of the file."""
    code = errno.ENOMEM if isinstance(problem, MemoryError) else problem.errno
    if code in (errno.EMFILE, errno.ENFILE):
        return error(
            f"{path} cannot be opened: this process may not have more open files",
            "a limit of open files above the number of the checkpoint's files",
            "raise the limit: ulimit -n 4096",
        )
    if code == errno.ENOMEM:
        return error(
            f"{path} cannot be read: this process gets no more memory",
            "memory, or address space, for the file",
            "raise the limit (ulimit -v unlimited, or the container's), or use a machine with more memory",
        )
    if code in (errno.EACCES, errno.EPERM):
        return error(
            f"{path} cannot be read: permission denied",
            "a file that this user may read",
            "change its permissions (chmod a+r), or run as its owner",
        )
    reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return error(f"{path} cannot be read: {reason}", "a readable file", "check the path and the disk")


def open_regular(path: Path, error: Error = CheckpointError) -> int:
    """A descriptor of a regular file, to read from; the error for anything else. FileNotFoundError if there is none."""
    try:
        # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        if os.path.islink(path):
            raise error(
                f"{path} cannot be read: No such file where the link points to, {os.readlink(path)}",
                "the file itself",
                "finish the download, or copy the file to where the link points",
            ) from None
        raise
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise unreadable(path, problem if isinstance(problem, OSError) else OSError(str(problem)), error) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
        raise error(
            f"{path} cannot be read: Is a {kinds.get(stat.S_IFMT(mode), 'socket')}, no regular file",
            "a regular file",
            "give a file",
        )
    return descriptor


def pread(descriptor: int, memory: memoryview, offset: int) -> int:
    """Read bytes of an open file, from `offset` on, into memory: how many there are before its end. OSError."""
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_bytes(
    path: Path, limit: int = MAX_BYTES, error: Error = CheckpointError, descriptor: int | None = None
) -> bytes:
    """The content of a regular file of at most `limit` bytes. FileNotFoundError if there is none.

    descriptor: an open one to read instead, to its end: what stdin is, for example; `path` is its name.
    """
    descriptor = open_regular(path, error) if descriptor is None else descriptor
    try:
        with open(descriptor, "rb") as file:
            content = file.read(limit + 1)
    except (OSError, MemoryError) as problem:
        raise unreadable(path, problem, error) from None
    if len(content) > limit:
        raise error(f"{path} has more than {limit:,} bytes", f"at most {limit:,} bytes", "give the file that is meant")
    return content


def read_text(
    path: Path,
    limit: int = MAX_BYTES,
    error: Error = CheckpointError,
    encoding: str = "utf-8",
    descriptor: int | None = None,
) -> str:
    """The text of a file in UTF-8; the rest as `read_bytes`. encoding: or "utf-8-sig"."""
    try:
        return read_bytes(path, limit, error, descriptor).decode(encoding)
    except UnicodeDecodeError as problem:
        raise error(
            f"{path} cannot be read: {problem}", "a text file in UTF-8", "save it in UTF-8, or download it again"
        ) from None


def parse_json(content: bytes | str) -> Any:
    """JSON within the bounds of this module. ValueError says what is wrong with it."""
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep") from None
    _check(value, strings="\\u" in text)
    return value


def read_json(path: Path, what: str, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file. CheckpointError when it is missing, unreadable or not an object."""
    try:
        value = parse_json(read_bytes(path, limit))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist", what, "check that the directory is a complete Hugging Face checkpoint"
        ) from None
    except MemoryError as problem:
        raise unreadable(path, problem) from None
    except ValueError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem}", f"{what} as JSON", "download the file again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} cannot be read: it holds a JSON {type(value).__name__}", "an object", "download the file again"
        )
    return value


def read_optional_json(path: Path, what: str) -> dict[str, Any]:
    """`read_json`, or {} where no such file exists."""
    return read_json(path, what) if os.path.lexists(path) else {}


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, where at most {MAX_DIGITS} are read")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {shown(twice)} comes twice")
    return table


def _check(value: Any, strings: bool) -> None:
    """ValueError where a value is nested too deeply or, with `strings`, where a text holds half a surrogate pair."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            if isinstance(container, dict):
                inner += container.values()
                if strings:
                    inner += container
            elif isinstance(container, list):
                inner += container
            elif strings and isinstance(container, str) and not is_unicode(container):
                raise ValueError(f"the text {container[:80]!a} holds half of a surrogate pair")
        level = inner if strings else [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")


def typed_text(word: str) -> str:
    """A word of the command line or the environment as text.

    Under a locale whose encoding is not UTF-8 (LC_ALL=C, with Python's own UTF-8 mode switched off) Python hands on the
    bytes that it cannot read as lone surrogates. ValueError if those bytes are no UTF-8.
    """
    return word if is_unicode(word) else os.fsencode(word).decode()


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can express a text: whether it is free of lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
