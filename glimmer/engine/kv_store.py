"""KVStore: pages of the KV cache in a directory, found by the hash of the tokens that they are made of.

A page is a few consecutive blocks of one prefix; its name is the hash of its last block, which covers everything from
the beginning of the prefix on. Pages of different models or settings (`identity`) lie in different subdirectories.

    DIRECTORY/                          0700
        .lock                           the bytes of all pages; who changes it holds it
        <digest of the identity>/       0700
            <hash>.kv                   0600: a header, and the bytes of the blocks

A page gets its name when it is whole, and its bytes are compared with a checksum when they are read: one that a killed
process or a full disk has left incomplete is never taken for good. Any number of processes may share a directory. When
the pages exceed the limit, those go that have not been used for the longest time (by their time of modification).
Every file under a name that no page of ours has is left alone.
Not here: which blocks, when, and in which thread (disk_cache.py).
"""

import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import Path

from glimmer.checkpoint.buffers import large_pages
from glimmer.errors import ConfigError

log = logging.getLogger("glimmer")

MAGIC = b"GLMKV\x00\x00\x01"  # the last byte is the version of this format
HEAD = struct.Struct("<8s16s16s32sIIQ")  # magic, identity, hash, checksum, blocks, rows of a block, bytes of a block
HEADER = 512  # bytes before those of the blocks: HEAD, a uint16 for each block, and the CRC-32 of all of it
PAGE_SIZE = mmap.PAGESIZE  # what direct reads are aligned to
MAX_BLOCKS = (HEADER - HEAD.size - 4) // 2
NAME = re.compile(r"[0-9a-f]{32}\.kv")
UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.[0-9]+\.[0-9]+\.part")
FOLDER = re.compile(r"[0-9a-f]{32}")
STALE = 600.0  # seconds after which an unfinished page was left by a process that is gone
KEPT = 0.95  # share of the limit that is left when pages are removed

Checksum = Callable[[memoryview], bytes]  # 32 bytes of a page's blocks


@dataclass
class StoreStats:
    """What a store has done since it was opened, and the bytes of all pages in its directory when it last looked."""

    written_bytes: int = 0
    read_bytes: int = 0
    damaged_files: int = 0
    removed_files: int = 0
    stored_bytes: int = 0


class KVStore:
    """Pages of `num_blocks` blocks of `block_bytes` each. All methods may be called by several threads.

    identity: a text that says everything the bytes of a page depend on but the tokens. limit: bytes of all pages.
    Raises ConfigError if the directory cannot be used, or if others than its owner may write to it.
    """

    def __init__(
        self, directory: Path, identity: str, num_blocks: int, block_bytes: int, limit: int, checksum: Checksum
    ):
        assert 1 <= num_blocks <= MAX_BLOCKS, "more blocks than a header describes"
        self.root, self.num_blocks, self.block_bytes, self.limit = directory, num_blocks, block_bytes, limit
        self.page_bytes = num_blocks * block_bytes
        self.stats = StoreStats()
        self.full: str | None = None  # why nothing is written any more
        self._identity = blake2b(identity.encode(), digest_size=16).digest()
        self._checksum = checksum
        self._numbers = count()
        self._guard = threading.Lock()
        self.folder = directory / self._identity.hex()
        if limit < HEADER + self.page_bytes:
            raise ConfigError(
                f"kv_cache_size_bytes={limit}",
                f"at least {HEADER + self.page_bytes} bytes: a page of KV blocks of this model",
                "raise kv_cache_size_bytes, or leave kv_cache_dir out",
            )
        try:
            _make_private(directory)
            _make_private(self.folder)
            self._measure()
        except OSError as error:
            raise _unusable(directory, error.strerror or str(error)) from None

    def path(self, name: bytes) -> Path:
        """Where the page of that hash lies, if it is there."""
        return self.folder / f"{name.hex()}.kv"

    def has(self, name: bytes) -> bool:
        """Whether there is a file of that name; what it holds is found out by `get`."""
        return os.path.isfile(self.path(name))

    def use(self, name: bytes, when: int) -> bool:
        """Set the time (in ns) at which the page was used; False if there is none."""
        try:
            os.utime(self.path(name), ns=(when, when), follow_symlinks=False)
        except OSError:  # it is not there, or not ours: it is of no use then
            return False
        return True

    def memory(self) -> memoryview:
        """Memory for `get`."""
        return large_pages(-(-(HEADER + self.page_bytes) // PAGE_SIZE) * PAGE_SIZE)

    def get(self, name: bytes, memory: memoryview) -> list[int] | None:
        """Read a page into what `memory` gave, its blocks from HEADER on: the `rows` of `put`, or None if there is no
        good page. A damaged one is counted and removed.
        """
        path = self.path(name)
        try:
            rows = self._read(path, name, memory)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            with self._guard:
                self.stats.damaged_files += 1
            log.debug("%s is ignored: %s", path, error)
            try:
                path.unlink(missing_ok=True)
            except OSError as problem:
                log.debug("%s stays where it is: %s", path, problem.strerror)
            return None
        with self._guard:
            self.stats.read_bytes += HEADER + self.page_bytes
        return rows

    def _read(self, path: Path, name: bytes, memory: memoryview) -> list[int]:
        """As `get`. OSError or ValueError for what is no good page."""
        nbytes = HEADER + self.page_bytes
        try:
            self._read_file(path, memory, nbytes, getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._read_file(path, memory, nbytes, 0)  # on a file system that does not read directly
        header, blocks = memory[:HEADER], memory[HEADER:nbytes]
        rows = list(struct.unpack_from(f"<{self.num_blocks}H", header, HEAD.size))
        if header != self._header(name, blocks, rows):
            raise ValueError("other bytes than its checksum says")
        return rows

    @staticmethod
    def _read_file(path: Path, memory: memoryview, nbytes: int, flags: int) -> None:
        """A file of so many bytes; ValueError for any other. Without the page cache (flags: O_DIRECT) a disk may be
        twice as fast, and hardly slower than the page cache."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
                raise ValueError(f"no file of {nbytes} bytes")
            if status.st_uid != os.geteuid():
                raise ValueError("another user's file")
            done = 0
            while done < nbytes:
                count = os.preadv(descriptor, [memory[done:]], done)
                if count == 0:
                    raise ValueError(f"it ends after {done} bytes")
                done += count
        finally:
            os.close(descriptor)

    def put(self, name: bytes, rows: Sequence[int], memory: memoryview, good: Callable[[], bool]) -> bool:
        """Write a page: whether it is there now. rows: a number from 0 to 65,535 to be kept for each block.

        good: asked when all bytes are written; the page gets its name only then, and only if it says so. When the disk
        is full, or does not take what is written, this is said once and nothing is written any more (`full`).
        """
        if self.full is not None:
            return False
        part = self.folder / f".{name.hex()}.{os.getpid()}.{next(self._numbers)}.part"
        try:
            self._make_room()
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                _write(descriptor, memoryview(self._header(name, memory, rows)))
                _write(descriptor, memory)
            finally:
                os.close(descriptor)
            if not good():
                part.unlink(missing_ok=True)
                return False
            os.rename(part, self.path(name))
        except OSError as error:
            self._stop(part, error)
            return False
        with self._guard:
            self.stats.written_bytes += HEADER + self.page_bytes
        return True

    # ------------------------------------------------------------------ one page

    def _header(self, name: bytes, memory: memoryview, rows: Sequence[int]) -> bytearray:
        """The header that a page has."""
        checksum = self._checksum(memory)
        head = HEAD.pack(MAGIC, self._identity, name, checksum, self.num_blocks, 0, self.block_bytes)
        head += struct.pack(f"<{self.num_blocks}H", *rows)
        return bytearray(head.ljust(HEADER - 4, b"\0") + zlib.crc32(head).to_bytes(4, "little"))

    def _stop(self, part: Path, error: OSError) -> None:
        """Nothing is written any more."""
        try:
            part.unlink(missing_ok=True)
        except OSError as problem:
            log.debug("%s stays where it is: %s", part, problem.strerror)
        with self._guard:
            first, self.full = self.full is None, error.strerror or str(error)
        if first:
            room = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if room else self.full
            log.warning(
                "%s: %s; no further KV blocks are written there, those that are there are read", self.root, what
            )

    # ------------------------------------------------------------------ all pages

    def _measure(self) -> None:
        """Find out how much there is in the directory, and remove what is too much."""
        with self._locked() as lock:
            self._note(lock, self._remove_oldest(0))

    def _make_room(self) -> None:
        """Count a page that will be written; remove the oldest ones if the limit would be exceeded.

        What has been counted and is not written is found out when the directory is measured.
        """
        new = HEADER + self.page_bytes
        with self._locked() as lock:
            noted = os.pread(lock, 32, 0)
            total = int(noted) if noted.strip().isdigit() else self.limit
            if total + new > self.limit:
                total = self._remove_oldest(new)
            self._note(lock, total + new)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Alone among all processes: a descriptor of .lock, which holds the bytes of all pages."""
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _note(self, lock: int, total: int) -> None:
        os.pwrite(lock, b"%32d" % total, 0)
        self.stats.stored_bytes = total

    def _remove_oldest(self, new: int) -> int:
        """Bytes of all pages, after the oldest ones are removed if they and `new` bytes exceed the limit."""
        pages = sorted(self._pages())
        total = sum(size for _, size, _ in pages)
        if total + new > self.limit:
            for _, size, path in pages:
                if total + new <= self.limit * KEPT:
                    break
                with suppress(FileNotFoundError):  # a damaged one that somebody else has removed
                    os.unlink(path)
                total -= size
                self.stats.removed_files += 1
        return total

    def _pages(self) -> Iterator[tuple[int, int, str]]:
        """(when it was used, bytes, path) of all pages; what killed processes have left unfinished is removed."""
        for folder in os.scandir(self.root):
            if not FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder):
                unfinished = UNFINISHED.fullmatch(entry.name)
                if not (unfinished or NAME.fullmatch(entry.name)) or not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                    if unfinished and time.time() - status.st_mtime > STALE:
                        os.unlink(entry.path)
                        continue
                except FileNotFoundError:  # somebody else has removed it
                    continue
                yield status.st_mtime_ns, status.st_size, entry.path


def _write(descriptor: int, data: memoryview) -> None:
    """All of the data."""
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _make_private(directory: Path) -> None:
    """Make a directory that only its owner may enter. One that is there must be ours, and nobody else may write to it:
    what others could have put there would be taken for the model's own."""
    try:
        os.makedirs(directory, mode=0o700)
    except FileExistsError:
        status = os.stat(directory)
        if not stat.S_ISDIR(status.st_mode):
            raise _unusable(directory, "is no directory") from None
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise _unusable(directory, "belongs to another user, or others may write to it") from None


def _unusable(directory: Path, what: str) -> ConfigError:
    return ConfigError(
        f"kv_cache_dir={str(directory)!r}: {what}",
        "a directory that this user can make, or owns, and to which nobody else may write",
        "choose another one, such as a new one within it, or leave it out: KV blocks are then kept in memory only",
    )
