"""DiskCache: the prefix cache on disk. Full blocks are written behind, and read when a prompt begins with them.

Writing. When a page of a sequence (a few blocks, kv_store.py) is full, a note of it goes to the writer's thread, which
copies the blocks out of the cache and writes them. Nothing is copied before the disk takes it, and no step waits: if a
block is given to something else first, its page is dropped, which is counted. (A block's generation tells: it changes
before anything new is written to the block.)

Reading. When a waiting sequence could start, and the first page that memory lacks is on disk, the sequence gets blocks
for all of its pages and waits, while the readers' threads fill them, in order, up to the first page that is not there
or damaged; others go on meanwhile. Then the blocks are known by their hashes and free, and the scheduler finds them in
memory as it finds all others. All ranks take the same decisions: they ask each other what has been found.
Not here: files (kv_store.py), the layout of a block (Backend.export_blocks).
"""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from glimmer.engine.blocks import Blocks
from glimmer.engine.kv_store import HEADER, MAX_BLOCKS, KVStore
from glimmer.engine.sequence import Sequence
from glimmer.group import Group

log = logging.getLogger("glimmer")

PAGE = 1 << 20  # bytes that a page has at least, where PAGE_TOKENS allow it
PAGE_TOKENS = 128  # tokens of a page at most: what does not fill one is computed again
READERS = 8  # threads
QUEUE = 1 << 30  # bytes of pages that may wait for the writer
TURN = 0.02  # seconds that an engine with nothing to compute waits for the readers at a time
LEAVE = 5.0  # seconds that `close` leaves to the writer


class BlockIO(Protocol):
    """The cache whose blocks are kept: Runner."""

    @property
    def kv_identity(self) -> str:
        """Everything that the bytes of a block depend on but the tokens."""

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of a block over all layers."""

    def export_blocks(self, blocks: Sequence_[int]) -> Tensor: ...
    def import_blocks(self, blocks: Sequence_[int], data: Tensor) -> None: ...
    def checksum(self, data: memoryview) -> bytes: ...


class BlockRows(Protocol):
    """Whoever counts rows of a block that are there beside those of the model: a Drafter."""

    def rows_of(self, blocks: Sequence_[int]) -> list[int]: ...
    def set_rows(self, blocks: Sequence_[int], rows: Sequence_[int]) -> None: ...


@dataclass(frozen=True)
class DiskStats:
    """What has come of the directory since the engine began; of this rank.

    hit_tokens      tokens that were read in place of being computed; page_tokens: those of a page
    read_bytes, written_bytes   of pages
    stored_bytes    of all pages in the directory, whoever wrote them
    damaged_files   pages that were none, and were ignored
    removed_files   pages that were removed to keep the limit
    dropped_pages   pages that were not written, since their blocks were needed before the disk took them
    """

    hit_tokens: int = 0
    page_tokens: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    stored_bytes: int = 0
    damaged_files: int = 0
    removed_files: int = 0
    dropped_pages: int = 0


class Page(NamedTuple):
    """A full page of a sequence, and what its blocks were when it became full."""

    name: bytes
    blocks: list[int]
    generations: list[int]
    rows: list[int]


@dataclass(eq=False)
class Fetch:
    """Pages `first`, first + 1, ... of a sequence that are being read into its blocks.

    before: blocks that it had already. end: all pages before it are good when all readers are done.
    """

    names: list[bytes]
    blocks: list[int]
    before: int
    first: int
    end: int
    coming: frozenset[bytes]
    next: int = 0
    rows: dict[int, list[int]] = field(default_factory=dict)
    readers: list[Future[None]] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> int | None:
        """The next page to read."""
        with self.guard:
            if self.next >= self.end:
                return None
            self.next += 1
            return self.next - 1

    def stop(self, page: int) -> None:
        """This page is not there, and none after it is wanted."""
        with self.guard:
            self.end = min(self.end, page)


class DiskCache:
    """A directory for one rank's blocks. Raises ConfigError if it cannot be used. Called by the engine's thread."""

    def __init__(self, directory: Path, limit: int, io: BlockIO, blocks: Blocks, group: Group, rows: BlockRows | None):
        self.io, self.blocks, self.group, self.rows = io, blocks, group, rows
        block_bytes, size = io.kv_block_bytes, blocks.size
        self.num_blocks = max(1, min(-(-PAGE // block_bytes), PAGE_TOKENS // size, MAX_BLOCKS))  # of a page
        self.page_tokens = self.num_blocks * size
        self.store = KVStore(directory, io.kv_identity, self.num_blocks, block_bytes, limit, io.checksum)
        self._hit_tokens = self._dropped_pages = 0
        self.fetches: dict[Sequence, Fetch] = {}  # which hold their blocks and must not start
        self._readers = ThreadPoolExecutor(READERS, "glimmer-kv-read")
        self._writer = ThreadPoolExecutor(1, "glimmer-kv-write")
        self._written: Future[None] | None = None  # the last of what the writer has to do
        self._queued = 0  # bytes of pages that wait for the writer
        self._guard = threading.Lock()
        self._closed = False
        self._local = threading.local()

    @property
    def stats(self) -> DiskStats:
        """What there is to say at this moment."""
        return DiskStats(
            hit_tokens=self._hit_tokens,
            page_tokens=self.page_tokens,
            dropped_pages=self._dropped_pages,
            **asdict(self.store.stats),
        )

    # ------------------------------------------------------------------ reading

    def begin(self, sequence: Sequence) -> bool:
        """Begin to read the pages that follow a waiting sequence's blocks: False if there are none, or it did before.

        Until `collect` has found all of them read, the sequence holds its blocks and must not start.
        """
        if sequence.looked_up:
            return False
        sequence.looked_up = True
        before, per_page = len(sequence.blocks), self.num_blocks
        first, end = before // per_page, (len(sequence.tokens) - 1) // self.page_tokens
        if first >= end:
            return False
        digests = self.blocks.hashes(sequence, end * per_page)
        names = digests[per_page - 1 :: per_page]
        if not self.group.all_reduce_min(int(self.store.has(names[first]))):
            return False
        grown = self.blocks.allocate(sequence, end * self.page_tokens)
        assert grown, "the scheduler has counted the free blocks"
        coming = frozenset(digests[before:])
        fetch = Fetch(names, list(sequence.blocks), before, first, end, coming, next=first)
        fetch.readers = [self._readers.submit(self._read, fetch) for _ in range(min(READERS, end - first))]
        self.fetches[sequence] = fetch
        return True

    def coming(self) -> set[bytes]:
        """Hashes of the blocks that are being read."""
        return {digest for fetch in self.fetches.values() for digest in fetch.coming}

    def forget(self, sequence: Sequence) -> bool:
        """Nobody waits for the sequence any more. False if it is not being read; else `collect` takes its blocks."""
        fetch = self.fetches.get(sequence)
        if fetch is not None:
            fetch.stop(fetch.first)
        return fetch is not None

    def collect(self) -> None:
        """Offer what has been read to `match_prefix`, and take their blocks from the sequences that waited for it."""
        for sequence, fetch in list(self.fetches.items()):
            done = all(reader.done() for reader in fetch.readers)
            end = self.group.all_reduce_min(fetch.end if done else -1)
            if end < 0:
                continue
            del self.fetches[sequence]
            num_blocks = max(fetch.before, end * self.num_blocks)
            if self.rows is not None:
                for page in range(fetch.first, end):
                    new = range(max(fetch.before, page * self.num_blocks), (page + 1) * self.num_blocks)
                    rows = [fetch.rows[page][i - page * self.num_blocks] for i in new]
                    self.rows.set_rows([fetch.blocks[i] for i in new], rows)
            self._hit_tokens += (num_blocks - fetch.before) * self.blocks.size
            sequence.num_computed_tokens = num_blocks * self.blocks.size
            self.blocks.cache_full_blocks(sequence, fetch.before * self.blocks.size)
            self.blocks.release(sequence)

    def wait(self) -> None:
        """Give the readers a moment, since there is nothing else to do."""
        wait([reader for fetch in self.fetches.values() for reader in fetch.readers if not reader.done()], TURN)

    def _read(self, fetch: Fetch) -> None:
        """A reader: page after page, until there is none."""
        page = None
        try:
            if not hasattr(self._local, "memory"):
                self._local.memory = self.store.memory()
            memory: memoryview = self._local.memory
            blocks_read = torch.frombuffer(memory, dtype=torch.uint8)[HEADER : HEADER + self.store.page_bytes]
            while (page := fetch.take()) is not None:
                rows = self.store.get(fetch.names[page], memory)
                if rows is None:
                    return fetch.stop(page)
                skip = max(0, fetch.before - page * self.num_blocks)
                blocks = fetch.blocks[page * self.num_blocks + skip : (page + 1) * self.num_blocks]
                self.io.import_blocks(blocks, blocks_read[skip * self.store.block_bytes :])
                fetch.rows[page] = rows
        except Exception as error:  # the sequence computes what is not read
            log.warning("KV blocks cannot be read: %s: %s", type(error).__name__, error)
            fetch.stop(fetch.first if page is None else page)

    # ------------------------------------------------------------------ writing

    def offer(self, sequence: Sequence, before: int) -> None:
        """The sequence has computed more than `before` tokens: write the pages that have become full since."""
        per_page = self.num_blocks
        first, end = before // self.page_tokens, sequence.num_computed_tokens // self.page_tokens
        if first >= end or self._closed or self.store.full is not None:
            return
        with self._guard:
            room = max(0, (QUEUE - self._queued) // self.store.page_bytes)
            self._dropped_pages += max(0, end - first - room)
            end = min(end, first + room)
            self._queued += (end - first) * self.store.page_bytes
        digests = self.blocks.hashes(sequence, end * per_page)
        pages = []
        for i in range(first, end):
            blocks = sequence.blocks[i * per_page : (i + 1) * per_page]
            rows = [0] * per_page if self.rows is None else self.rows.rows_of(blocks)
            generations = self.blocks.generations(blocks)
            pages.append(Page(digests[(i + 1) * per_page - 1], blocks, generations, rows))
        if pages:
            self._submit(partial(self._write, pages))

    def used(self, sequence: Sequence) -> None:
        """The sequence ends: its pages have been used now, its beginning latest of all."""
        end = sequence.num_computed_tokens // self.page_tokens
        if not end or self._closed:
            return
        names = self.blocks.hashes(sequence, end * self.num_blocks)[self.num_blocks - 1 :: self.num_blocks]

        def use() -> None:
            now = time.time_ns()
            for i, name in enumerate(names):
                if self._closed or not self.store.use(name, now - 1000 * i):
                    return

        self._submit(use)

    def close(self) -> None:
        """Write what waits to be written, for LEAVE seconds at most, and end all threads."""
        for fetch in self.fetches.values():
            fetch.stop(fetch.first)
        if self._written is not None:
            wait([self._written], LEAVE)
        self._closed = True
        self._readers.shutdown()
        self._writer.shutdown()

    def _submit(self, task: Callable[[], None]) -> None:
        try:
            self._written = self._writer.submit(task)
        except RuntimeError:  # the interpreter is ending: no thread begins anything any more
            self._closed = True

    def _write(self, pages: list[Page]) -> None:
        for page in pages:
            try:
                self._write_page(page)
            except Exception as error:
                log.warning("KV blocks cannot be written: %s: %s", type(error).__name__, error)
                self._closed = True
            with self._guard:
                self._queued -= self.store.page_bytes

    def _write_page(self, page: Page) -> None:
        same: Callable[[], bool] = lambda: self.blocks.generations(page.blocks) == page.generations
        if self._closed or self.store.full is not None or self.store.has(page.name):
            return
        if same():
            data = self.io.export_blocks(page.blocks)
            if self.store.put(page.name, page.rows, data.numpy().data, same):
                return
        if self.store.full is None:
            with self._guard:
                self._dropped_pages += 1
