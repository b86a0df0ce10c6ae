"""SocketDirectory: a directory for a socket that only this user may enter, gone when its owner closes it.

An owner that is killed leaves its directory behind; the next one removes it. Whether an owner lives is told by a lock
that the system releases with the process. Not here: what goes over the socket (wire.py).
"""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from glimmer.errors import ConfigError

PREFIX = "glimmer-socket-"
MAX_PLACE = 70  # characters of the directory around it: the path of a socket has 107 at most
NEW = 60.0  # seconds in which a directory may lack its lock because it is being made


class SocketDirectory:
    """A new directory below the one for temporary files. path: where. ConfigError if none can be made."""

    def __init__(self) -> None:
        try:
            place = tempfile.gettempdir()
            place = place if len(place) < MAX_PLACE else "/tmp"
            _remove_stale(Path(place))
            self.path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
            self._lock = _lock(self.path)
        except OSError as error:
            raise ConfigError(
                f"no directory for a socket: {error.strerror}",
                "a directory for temporary files, such as /tmp",
                "make /tmp writable, or name another in TMPDIR",
            ) from None

    def close(self) -> None:
        """Remove it, and all that lies in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock(path: str | Path) -> int:
    """A descriptor that holds the lock of a directory. BlockingIOError if another has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_stale(place: Path) -> None:
    """Remove the directories of this user whose owners have ended."""
    for path in place.glob(f"{PREFIX}*"):
        try:
            found = path.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < NEW:
                continue
            lock = _lock(path)
        except OSError:  # its owner lives, or another process has just removed it
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
