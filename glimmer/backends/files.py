"""PackedFiles: what a backend can do whose packed weights go into a file, are mapped from it, and read one by one.

Not here: the form of the file (checkpoint/packed_file.py), which weights there are (model/packed.py), ops (base.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from glimmer.backends.base import ExpertSet, Packed


@dataclass(frozen=True)
class Records:
    """Packed weights as they go into a file: `count` records of nbytes each, one for a Linear, one for each expert.

    description: JSON that `map_packed` understands. copy(e, buffer) writes record e to nbytes of uint8.
    """

    description: dict[str, Any]
    count: int
    nbytes: int
    copy: Callable[[int, Tensor], None]


class MappedFile(Protocol):
    """A file that is mapped read-only."""

    @property
    def damaged(self) -> bool:
        """Whether it has shrunk or could not be read since: what is computed with it is worth nothing then."""
        ...

    def tensor(self, begin: int, nbytes: int) -> Tensor:
        """Some of its bytes, uint8, not to be written; it stays mapped as long as they are held."""
        ...


class ExpertStore(Protocol):
    """Slots in memory for some of the experts of all layers; `Backend.experts` fills them from the packed file."""

    @property
    def slots_in_use(self) -> int: ...
    @property
    def direct(self) -> bool:
        """Whether its file is read without the page cache."""
        ...

    @property
    def counts(self) -> tuple[int, int, int]:
        """Experts that steps have wanted so far, those of them that had to be read, and bytes that were read."""
        ...

    def resize(self, slots: int) -> None:
        """Use so many slots; the memory of others is given back to the system."""
        ...

    def warm(self) -> None:
        """Begin to read the experts that are chosen most into empty slots."""
        ...

    def frequencies(self, layer: int) -> list[float]:
        """How often each expert of a layer was chosen lately, from 0 to 1. Layers are counted as they were added."""
        ...

    def set_frequencies(self, layer: int, values: Sequence[float]) -> None:
        """What an earlier run has counted."""
        ...


class PackedFiles(ABC):
    """A backend whose packed weights go into files. packed_layout: what a file says of their layout."""

    packed_layout: ClassVar[str]

    @abstractmethod
    def records(self, packed: Packed | ExpertSet) -> Records:
        """Packed weights, to be written to a file. A record has a multiple of 4096 bytes."""

    @abstractmethod
    def map_file(self, descriptor: int, nbytes: int) -> MappedFile:
        """The first nbytes of a file, for `map_packed`. Raises OSError. The descriptor may be closed afterwards."""

    @abstractmethod
    def map_packed(self, description: dict[str, Any], file: MappedFile, begin: int) -> Packed | ExpertSet:
        """Packed weights whose records lie in a file from `begin` on; nothing is copied. ValueError if they cannot."""

    @abstractmethod
    def expert_store(self, descriptor: int, slots: int, slot_bytes: int) -> ExpertStore:
        """Slots for experts that are read from a packed file when a token has chosen them. Raises OSError."""

    @abstractmethod
    def page_packed(
        self, description: dict[str, Any], store: ExpertStore, begin: int, checksums: Sequence[str]
    ) -> ExpertSet:
        """The experts of a layer, whose records lie in the store's file from `begin` on; nothing is read yet.

        `experts` raises OSError for them, with the reason, when one cannot be read or is not what was written.
        """

    @abstractmethod
    def checksums(self, records: Sequence[Tensor]) -> list[str]:
        """A checksum of the bytes of each record: 32 hexadecimal digits, the same for every backend that has any."""
