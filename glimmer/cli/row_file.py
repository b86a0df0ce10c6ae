"""RowFile: a .jsonl file of results that one process writes, row by row, each safe on disk before it counts.

For `predict --output` and `run-batch`, which can be cut off at any moment and continued. Not here: what is in a row.
"""

import fcntl
import json
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from glimmer.errors import ConfigError

log = logging.getLogger("glimmer")
LINES_OF_ITS_OWN = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})  # for str.splitlines


class RowFile:
    """The file, locked while this is open. `flag` is the option that named it, for messages.

    Raises ConfigError where the file is in use, is no regular file, cannot be written, or is not empty although it
    shall not be resumed; OSError is never raised.
    """

    def __init__(self, path: Path, resume: bool, flag: str = "--output"):
        self.path, self._name = path, f"{flag} {path}"
        if os.path.exists(path) and not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{self._name} is no regular file", "a file to write rows to", "choose another name")
        try:
            self._file = self._open(path)
            if not resume and self.size:
                raise ConfigError(
                    f"{self._name} is there already",
                    "a new file",
                    "add --resume to continue it, or choose another name",
                )
        except OSError as error:
            raise ConfigError(f"{self._name}: {error.strerror}", "a file to write to", "check the path") from None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Give the file free for others."""
        self._file.close()

    def read(self) -> tuple[list[bytes], bytes]:
        """The lines of an earlier run, and what follows the last of them: a line that was perhaps cut off."""
        try:
            self._file.seek(0)
            *lines, last = self._file.read().split(b"\n")
        except OSError as error:
            raise ConfigError(f"{self._name}: {error.strerror}", "a file to read", "check the path") from None
        return lines, last

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row: it is on disk when this returns. Of one for which there is no space nothing stays."""
        size, line = self.size, encode(row)
        try:
            _write(self._file, line)
        except OSError as error:
            self._file.truncate(size)
            raise self._full(error) from None

    def replace(self, lines: Sequence[bytes]) -> None:
        """Other lines for the file, wholly or not at all; it stays locked."""
        target = Path(os.path.realpath(self.path))
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            new = self._open(part)
            try:
                new.truncate(0)  # of a process that had this number before and was killed
                _write(new, b"".join(line + b"\n" for line in lines))
                os.chmod(part, stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
                part.replace(target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._full(error) from None
        self._file.close()
        self._file = new

    def _full(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._name}: {error.strerror}",
            "space on the disk for a row",
            "free some space; the same command with --resume answers the rest",
        )

    def _open(self, path: Path) -> BinaryIO:
        """The file, locked, without a buffer."""
        while True:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115  # close() closes it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ConfigError(
                    f"{self._name} is being written by another process",
                    "one job for each file",
                    "wait for it, or choose another name",
                ) from None
            except OSError as error:  # some network file systems have no locks
                log.warning("%s cannot be locked here (%s): no other job may write to it", self._name, error.strerror)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
            file.close()  # another process has replaced it since it was opened


def encode(row: dict[str, Any]) -> bytes:
    """A row as a line."""
    return json.dumps(row, ensure_ascii=False).translate(LINES_OF_ITS_OWN).encode() + b"\n"


def _write(file: BinaryIO, content: bytes) -> None:
    """All of it, on disk when this returns. A file without a buffer may take a part of it at a time."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())
