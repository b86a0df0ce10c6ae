"""Experts that do not fit into memory: how many slots they have, and what becomes of them while the engine runs.

The backend's store (backends/base.py:ExpertStore) reads an expert from the packed file when a token has chosen it, into
the slot of one that is chosen less. Here its slots shrink when the system runs short of memory and grow again, and
what it has counted is kept beside the packed file, so that the next start begins with the experts that were in use.
Not here: reading, and which expert loses its slot (csrc/store.h); how memory is divided (engine/runner.py).
"""

import json
import logging
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimmer.backends.base import ExpertSet
from glimmer.backends.files import ExpertStore, PackedFiles
from glimmer.backends.selection import HOST
from glimmer.checkpoint.packed_file import PackedFile, Section
from glimmer.device import free_memory
from glimmer.errors import CheckpointError
from glimmer.foreign import read_json

log = logging.getLogger("glimmer")

STATS = "expert_stats.json"
MAX_STATS = 16 << 20  # bytes; the largest model of the family has 14,240 experts
RESERVE = 512 << 20  # bytes that the system shall have free, besides what is mapped
LOOK_EVERY, SAVE_EVERY = 1.0, 60.0  # seconds


@dataclass(frozen=True)
class PagingStats:
    """slots in use for `experts` experts of all layers; since the start: experts that steps have wanted, those of them
    that had to be read, and bytes that were read. direct: without the page cache; slot_bytes: of the largest expert."""

    slots: int
    experts: int
    wanted: int
    missed: int
    bytes_read: int
    direct: bool
    slot_bytes: int


class Pager:
    """The store of one engine. mapped: bytes of the packed file that must stay in the page cache.

    Raises OSError when the store cannot be made.
    """

    def __init__(self, backend: PackedFiles, packed: PackedFile, slots: int, slot_bytes: int, mapped: int):
        self._packed, self._slots, self._slot_bytes = packed, slots, slot_bytes
        self._backend, self._mapped = backend, mapped
        self._layers: list[tuple[str, int]] = []  # (path in the model, experts), in the order of the store
        self.store: ExpertStore = backend.expert_store(packed.descriptor, slots, slot_bytes)

    def add(self, layer: str, section: Section) -> ExpertSet:
        """The experts of one more layer. ValueError if a section holds none."""
        self._layers.append((layer, section.num_records))
        return self._backend.page_packed(section.description, self.store, section.begin, section.checksums)

    def start(self) -> None:
        """All layers have been added: take up what an earlier run has counted, and watch the memory from now on."""
        path = self._packed.directory / STATS
        found = counted(path)
        for number, (layer, experts) in enumerate(self._layers):
            values = found.get(layer, ())
            if len(values) == experts:
                self.store.set_frequencies(number, values)
        self.store.warm()
        stop = threading.Event()
        watch = threading.Thread(
            target=_watch,
            args=(weakref.ref(self), stop),
            name="glimmer-experts",
            daemon=True,
        )
        watch.start()
        self._finish = weakref.finalize(self, _finish, stop, self.store, list(self._layers), path)

    def close(self) -> None:
        """Write down what has been counted. May be called again."""
        self._finish()

    def stats(self) -> PagingStats:
        """What the store has done so far."""
        wanted, missed, nbytes = self.store.counts
        experts = sum(count for _, count in self._layers)
        return PagingStats(
            self.store.slots_in_use, experts, wanted, missed, nbytes, self.store.direct, self._slot_bytes
        )

    def save(self) -> None:
        """Write down what has been counted so far."""
        _save(self.store, self._layers, self._packed.directory / STATS)

    def fit(self) -> None:
        """Give slots back if the system runs short of memory, and take them again when it does not any more."""
        spare = free_memory(HOST) - self._mapped - RESERVE
        used = self.store.slots_in_use
        if spare < 0:
            wanted = used + spare // self._slot_bytes
            log.warning("memory runs short: experts have %d slots in place of %d", max(wanted, 2), used)
            self.store.resize(wanted)
        elif used < self._slots and spare > RESERVE + self._slot_bytes:
            self.store.resize(min(self._slots, used + (spare - RESERVE) // self._slot_bytes))
            self.store.warm()


def _watch(pager: "weakref.ref[Pager]", stop: threading.Event) -> None:
    elapsed = 0.0
    while not stop.wait(LOOK_EVERY):
        one = pager()
        if one is None:
            return
        one.fit()
        elapsed += LOOK_EVERY
        if elapsed >= SAVE_EVERY:
            one.save()
            elapsed = 0.0
        del one


def _finish(stop: threading.Event, store: ExpertStore, layers: list[tuple[str, int]], path: Path) -> None:
    stop.set()
    _save(store, layers, path)


def _save(store: ExpertStore, layers: list[tuple[str, int]], path: Path) -> None:
    if not store.counts[0]:
        return
    table = {
        layer: [float(f"{value:.3g}") for value in store.frequencies(number)]
        for number, (layer, _) in enumerate(layers)
    }
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        temporary.write_text(json.dumps(table), encoding="utf-8")
        temporary.rename(path)
    except OSError as error:  # a place that cannot be written: the next start counts anew
        log.info("which experts are in use is not kept in %s: %s", path, error)


def counted(path: Path) -> dict[str, list[float]]:
    """How often each expert was chosen lately, by layer, as earlier runs have written; what is no such list is none."""
    if not path.is_file():
        return {}
    try:
        table = read_json(path, "which experts are in use", MAX_STATS)
    except CheckpointError as error:
        log.warning("%s; it is not used, and written anew", error.found)
        return {}
    return {name: list(row) for name, row in table.items() if isinstance(row, list) and all(map(_is_share, row))}


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
