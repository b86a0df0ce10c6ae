"""Buffers: the memory into which files are read, used again when nobody holds a tensor over it any more.

The system clears every page of new memory, and does so at its first touch, page by page: for a whole checkpoint that
takes longer than copying its bytes. Not here: what is read (files.py).
"""

import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

KEPT = 64 << 20  # bytes that wait to be used again: some experts of the largest model of the family
HUGE_PAGE = 2 << 20


class Buffers:
    """Gives out memory of one size after another. One thread at a time may ask; tensors may end in any thread."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []  # the one that has waited longest first
        self._ended: deque[mmap.mmap] = deque()  # of tensors that have ended since the last call

    def empty(self, nbytes: int) -> Tensor:
        """A tensor of nbytes uint8, one or more, with values left from before.

        Its memory is used again when neither it nor a view of it is left. OSError where there is no memory.
        """
        while self._ended:
            self._free.append(self._ended.popleft())
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        found = next((i for i, memory in enumerate(self._free) if len(memory) == size), None)
        memory = _new(size) if found is None else self._free.pop(found)
        while sum(map(len, self._free)) > KEPT:
            del self._free[0]
        view = memoryview(memory)  # what torch holds as long as there is a tensor over this memory
        if size <= KEPT:
            weakref.finalize(view, self._ended.append, memory).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes)


def large_pages(nbytes: int) -> memoryview:
    """Memory that begins with a page and has been written once, in large pages where the system has them: direct reads
    into small ones may be half as fast. OSError where there is none."""
    memory = torch.frombuffer(_new(-(-nbytes // HUGE_PAGE) * HUGE_PAGE), dtype=torch.uint8)
    return memory.fill_(1).numpy().data[:nbytes]


def _new(size: int) -> mmap.mmap:
    # Not malloc: it keeps what is freed between the packed weights, a tenth of them.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
