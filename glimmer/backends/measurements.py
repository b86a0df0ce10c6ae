"""Measurements: what was measured on this machine, kept in memory, and in a file for later runs.

A file holds the measurements of one machine, which it describes: those of another one, of another build of the kernels
or of other threads lie in other files, and are never taken. Each counts for MAX_AGE. Not here: what is measured
(op_times.py, Backend.limits), what describes a machine and where the file lies (cli/machine.py).
"""

import json
import logging
import math
import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from glimmer.errors import CheckpointError
from glimmer.foreign import read_json

log = logging.getLogger("glimmer")

VERSION = 1  # of the file, and of what the measurements mean
MAX_AGE = 24 * 3600.0  # seconds; whatever else a machine does, it does otherwise on another day
MAX_FILE = 4 << 20  # bytes; a model in four forms has about a hundred measurements of 300 bytes each


class Measurements:
    """get(key, measure) -> a number: kept, or else measured now.

    directory: where files are kept, None: only in memory. machine: everything that all measurements depend on.
    anew: nothing that was kept is taken. taken: how many were; oldest: seconds since the first of these was measured.
    """

    def __init__(self, directory: Path | None = None, machine: Mapping[str, str] | None = None, anew: bool = False):
        self._machine = {"version": str(VERSION)} | dict(machine or {})
        self._found: dict[str, tuple[float, float]] = {}  # number, and when it was measured
        self._kept: dict[str, tuple[float, float]] = {}
        self._path: Path | None = None
        self.taken, self.oldest = 0, 0.0
        if directory is not None:
            name = blake2b(json.dumps(self._machine, sort_keys=True).encode(), digest_size=12).hexdigest()
            self._path = directory / f"{name}.json"
            self._kept = {} if anew else self._read(self._path)

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """What `key` stands for, measured once. key: everything that it depends on but the machine."""
        if key not in self._found and key in self._kept:
            self._found[key] = self._kept[key]
            self.taken, self.oldest = self.taken + 1, max(self.oldest, time.time() - self._kept[key][1])
        elif key not in self._found:
            self._found[key] = measure(), time.time()
        return self._found[key][0]

    def keep(self) -> None:
        """Write all of them down for later runs, unless all were kept; where that cannot be done, it is said."""
        path, everything = self._path, self._kept | self._found
        if path is None or everything == self._kept:
            return
        temporary = path.with_suffix(f".{os.getpid()}.new")
        content = json.dumps({"machine": self._machine, "measured": everything})
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_old(path.parent)
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(content)
            temporary.rename(path)
        except OSError as error:
            log.warning("what was measured is not kept in %s: %s", path, error.strerror or error)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, tuple[float, float]]:
        """What a file has that is not too old; a damaged or foreign file is said and has nothing."""
        try:
            status = path.lstat()
        except OSError:  # there is none
            return {}
        try:
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise ValueError("it is no file of this user")
            content = read_json(path, "what was measured", MAX_FILE)
            if content.get("machine") != self._machine:
                raise ValueError("it describes another machine than its name does")
            return dict(_measured(content.get("measured")))
        except (ValueError, CheckpointError) as error:
            found = error.found if isinstance(error, CheckpointError) else f"{path}: {error}"
            log.warning("%s; it is not used, and what it was for is measured anew", found)
            return {}

    @staticmethod
    def _remove_old(directory: Path) -> None:
        """Files of which nothing would be taken any more."""
        for file in directory.glob("*.json"):
            with suppress(FileNotFoundError):  # somebody else has removed it
                if file.lstat().st_mtime < time.time() - MAX_AGE:
                    file.unlink()


def _measured(table: Any) -> list[tuple[str, tuple[float, float]]]:
    """{key: [number, when]} without those that are too old. ValueError for anything else."""
    if not isinstance(table, dict):
        raise ValueError("it has no table of measurements")
    found, now = [], time.time()
    for key, entry in table.items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(map(_is_number, entry)):
            raise ValueError(f"{key[:80]!r} is {str(entry)[:80]}, where a number and its time are wanted")
        number, when = map(float, entry)
        if now - MAX_AGE <= when <= now:
            found.append((key, (number, when)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
