"""Checkpoint: a Hugging Face directory of safetensors files, read one slice of one tensor at a time.

Words: the *header* of a file is its JSON table of tensors; the *index* is model.safetensors.index.json, which says
which file holds which tensor.

The headers are parsed here, and not by the safetensors library, because every size must be checked against the file
before anything is read, so that half a download is an error message and not half a model. Data is read into memory of
our own, and not mapped: a mapped file that shrinks while it is read ends the process with SIGBUS. A file that is
changed after its header was read is refused, so that no model is made of two.

Not here: what a tensor means (model/names.py), how a format lays out its bits (formats/), config.json (only its
presence is checked, as the mark of a model directory), writing.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glimmer.checkpoint.buffers import Buffers
from glimmer.errors import CheckpointError, shown
from glimmer.foreign import open_regular, parse_json, pread, read_bytes, unreadable, unusable

INDEX = "model.safetensors.index.json"
LAYOUT = "a directory with config.json, tokenizer.json and *.safetensors files"

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

MAX_HEADER = 100_000_000  # bytes; the format's own limit. The largest GLM checkpoint in one file would need 6 million
POINTER = b"version https://git-lfs"
STRETCH = 4 << 20  # bytes that are read at a time of a matrix that is cut by columns
MAX_DIMS = 8  # far more than any weight has; keeps the product of a hostile shape small

Version = tuple[int, int, int, int]  # device, inode, size and time of the last change of a file
Pread = Callable[[int, Tensor, int], int]  # as of Backend


class Stored(NamedTuple):
    """Where a tensor lies: bytes begin:end of its file, counted from the start of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """All tensors of a model directory. Opening reads headers only, whatever the size of the files.

    Every *.safetensors file of the directory counts, whether the index names it or not: GLM-4.7 keeps its MTP layer
    in a file that the index of some repositories leaves out. Of a tensor that lies in two files the one is taken that
    the index names. index_fault says where the index and the files disagree, if they do: whoever knows which tensors
    are wanted raises it, or warns when all are there. Several threads may read at once. pread: what copies bytes of a
    file; Backend.pread has several threads for it. whole=False: headers are all that is wanted, so files may end
    behind them, and files that the index names need not be there.

    Raises CheckpointError when the directory or a file cannot be used.
    """

    def __init__(self, directory: str | os.PathLike[str], whole: bool = True):
        self.directory, self._whole = Path(directory), whole
        self._tensors: dict[str, Stored] = {}
        self._versions: dict[Path, Version] = {}
        self._current: tuple[Path, int] | None = None  # the file that was read last, and its descriptor
        self.pread: Pread = lambda descriptor, memory, offset: pread(descriptor, memory.numpy().data, offset)
        self._buffers = Buffers()
        self._reading = Lock()  # one file is open at a time
        self._closed = False
        self._read: set[str] = set()
        paths = _list(self.directory)
        index = _read_index(self.directory / INDEX)
        absent = _absent_files(self.directory, paths, index)
        _check_present(self.directory, paths, absent)
        self._twice: dict[str, str] = {}  # tensors that lie in two files, and one of these
        for path in paths:
            if path.suffix == ".safetensors":
                self._open(path, index)
        self._check_twice(index)
        self.index_fault: CheckpointError | None = absent or _astray(index, self._tensors)

    def _open(self, file: Path, index: dict[str, str]) -> None:
        """Read one header."""
        descriptor = self._descriptor(file)
        try:
            tensors = _read_header(file, descriptor, self._whole)
        except (OSError, MemoryError) as error:
            raise unreadable(file, error) from error
        for name, stored in tensors.items():
            if name in self._tensors:
                self._twice[name] = file.name if index.get(name) != file.name else self._tensors[name].file.name
            if name not in self._tensors or index.get(name) == file.name:
                self._tensors[name] = stored

    def _check_twice(self, index: dict[str, str]) -> None:
        for name, file in self._twice.items():
            if index.get(name) != self._tensors[name].file.name:
                raise CheckpointError(
                    f"tensor {shown(name)} lies in {self._tensors[name].file.name} and in {file}",
                    f"each tensor once, or an index ({INDEX}) that says which one counts",
                    f"move the file that does not belong to this model out of {self.directory}",
                )

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk. Raises CheckpointError when there is no such tensor, as the next four do."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type on disk."""
        return self._find(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes on disk."""
        stored = self._find(name)
        return stored.end - stored.begin

    def file(self, name: str) -> Path:
        """The file that holds it."""
        return self._find(name).file

    def tensor(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        matrix: int | None = None,
    ) -> Tensor:
        """Rows start:stop and columns start:stop (None: all) of a tensor, in the type on disk, and mark it as read.

        matrix: of a tensor of three dimensions, a stack of matrices, only this one. The result is memory of its own, as
        long as it or a view of it is held. Slice bounds must lie inside the shape. CheckpointError when the file has
        been changed since its header was read.
        """
        stored = self._find(name)
        assert not self._closed, "the checkpoint is closed"
        _, dtype, shape, begin, end = stored
        if matrix is not None:
            assert len(shape) == 3 and 0 <= matrix < shape[0], f"matrix {matrix} of {name} {shape}"
            nbytes = (end - begin) // shape[0]
            begin, end, shape = begin + matrix * nbytes, begin + (matrix + 1) * nbytes, shape[1:]
        if rows is not None:
            start, stop = rows
            assert shape and 0 <= start <= stop <= shape[0], f"rows {rows} of {name} {shape}"
            row = (end - begin) // max(shape[0], 1)
            begin, end, shape = begin + start * row, begin + stop * row, (stop - start, *shape[1:])
        self._read.add(name)
        if cols is None or cols == (0, *shape[1:2]):
            return self._data(stored.file, begin, end).view(dtype).view(shape)
        start, stop = cols
        assert len(shape) > 1 and 0 <= start <= stop <= shape[1], f"columns {cols} of {name} {shape}"
        part = torch.empty((shape[0], stop - start, *shape[2:]), dtype=dtype)
        row = (end - begin) // max(shape[0], 1)
        count = max(1, STRETCH // max(row, 1))  # rows at a time: what is cut off takes no memory
        for first in range(0, shape[0], count):
            last = min(first + count, shape[0])
            data = self._data(stored.file, begin + first * row, begin + last * row)
            part[first:last] = data.view(dtype).view(last - first, *shape[1:])[:, start:stop]
        return part

    def _data(self, file: Path, begin: int, end: int) -> Tensor:
        """Bytes begin:end of a file, as uint8."""
        with self._reading:
            return self._data_alone(file, begin, end)

    def _data_alone(self, file: Path, begin: int, end: int) -> Tensor:
        """The same, for the thread that holds the lock."""
        descriptor = self._descriptor(file)
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        try:
            data = self._buffers.empty(end - begin)
            count = self.pread(descriptor, data, begin)
        except (OSError, MemoryError) as error:
            raise unreadable(file, error) from error
        if count < end - begin or _version(descriptor) != self._versions[file]:  # fewer: the file has shrunk
            raise _changed(file)
        return data

    def _descriptor(self, file: Path) -> int:
        """An open descriptor of a file, the same as long as this file is read; only one is open at a time."""
        if self._current is not None:
            path, descriptor = self._current
            if path == file:
                return descriptor
            self._close_current()
        try:
            descriptor = open_regular(file)
        except FileNotFoundError:
            raise _changed(file) from None
        self._current = file, descriptor
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice the read-ahead
        if self._versions.setdefault(file, _version(descriptor)) != _version(descriptor):
            raise _changed(file)
        return descriptor

    def _close_current(self) -> None:
        if self._current is not None:
            os.close(self._current[1])
            self._current = None

    def unread(self, ignoring: Callable[[str], bool] = lambda name: False) -> list[str]:
        """Sorted names of the tensors that nobody has asked for, without those that `ignoring` accepts."""
        return sorted(name for name in self._tensors if name not in self._read and not ignoring(name))

    def close(self) -> None:
        """No more tensors after this. Those that were read stay."""
        self._closed = True
        self._close_current()

    def __del__(self) -> None:
        self._close_current()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find(self, name: str) -> Stored:
        if name not in self._tensors:
            raise CheckpointError(
                f"no tensor {shown(name)} among the {len(self._tensors)} of {self.directory}",
                "every tensor that config.json calls for",
                "check that all files of the checkpoint are there and that config.json belongs to them",
            )
        return self._tensors[name]


def _list(directory: Path) -> list[Path]:
    """What the directory holds, sorted; hidden files (left by file managers) do not count."""
    try:
        if directory.is_file():
            raise CheckpointError(
                f"{directory} is a file", "the directory of a checkpoint", f"give the directory: {directory.parent}"
            )
        if not directory.is_dir():
            raise CheckpointError(f"there is no directory {directory}", LAYOUT, "check the path, or download the model")
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(directory, error) from error


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name; empty when there is no index."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return {}
    if data.startswith(POINTER):
        raise _pointer(path)
    index = _parse(path, "is", data)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise unusable(path, "is not an index", '{"weight_map": {"tensor name": "file name", ...}}')
    return names


def _absent_files(directory: Path, paths: list[Path], index: dict[str, str]) -> CheckpointError | None:
    """What to say when the index names files that are not there."""
    present = {path.name for path in paths}
    missing = Counter(file for file in index.values() if file not in present)
    if not missing:
        return None
    return CheckpointError(
        f"{directory} lacks {len(missing)} of the {len(set(index.values()))} files that {INDEX} names, "
        f"with {missing.total()} tensors: {_some(sorted(missing))}",
        "every file that the index names",
        "finish the download of these files",
    )


def _check_present(directory: Path, paths: list[Path], absent: CheckpointError | None) -> None:
    """The directory must hold a configuration and some weights."""
    present = {path.name for path in paths}
    suffixes = {path.suffix for path in paths}
    lacking = [] if "config.json" in present else ["no config.json"]
    lacking += [] if ".safetensors" in suffixes else ["no *.safetensors files"]
    if lacking and absent is not None:
        raise absent
    if lacking:
        others = " and ".join(sorted(f"*{suffix}" for suffix in suffixes & {".bin", ".gguf", ".pt", ".pth"}))
        raise CheckpointError(
            f"{directory} has {' and '.join(lacking)}"
            + (f", but {others} files, which are not read" if others else "")
            + (" (GGUF is llama.cpp's format)" if ".gguf" in suffixes else ""),
            LAYOUT,
            "give the directory that holds these files, or finish the download",
        )


def _astray(index: dict[str, str], tensors: dict[str, Stored]) -> CheckpointError | None:
    """What to say when tensors do not lie in the files that the index says."""
    astray = [name for name, file in index.items() if name not in tensors or tensors[name].file.name != file]
    if not astray:
        return None
    return CheckpointError(
        f"{len(astray)} tensors are not in the files that {INDEX} names for them: "
        + _some([f"{shown(name)} not in {shown(index[name])}" for name in astray]),
        "an index that agrees with the files",
        f"download {INDEX} and these files again, from one revision of the checkpoint",
    )


def _version(descriptor: int) -> Version:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} has been changed, or has gone, while it was being read",
        "files that stay as they are until the model is loaded",
        "wait until the download or copy has finished, then start again",
    )


def _read_header(path: Path, descriptor: int, whole: bool = True) -> dict[str, Stored]:
    """The tensors of one file: 8 bytes with the header's length, the header, then nothing but data."""
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, len(POINTER), 0)
    if start == POINTER:
        raise _pointer(path)
    data = 8 + int.from_bytes(start[:8], "little")
    if size < 8 or size < data <= 8 + MAX_HEADER:
        wanted = f"{data:,} bytes or more, say its first eight" if size >= 8 else "a header and data"
        raise unusable(path, f"ends within its header: it has {size:,} bytes", wanted)
    if data > 8 + MAX_HEADER:
        raise unusable(path, f"claims a header of {data - 8:,} bytes", f"at most {MAX_HEADER:,} bytes of JSON")
    header = _parse(path, "has a header that is", os.pread(descriptor, data - 8, 8))
    if not isinstance(header, dict):
        raise unusable(path, "has a header that is no table of tensors", "a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _describe(path, name, entry, data) for name, entry in header.items()}
    _check_layout(path, tensors, data, size if whole else None)
    return tensors


def _describe(path: Path, name: str, entry: Any, data: int) -> Stored:
    """One entry of a header, checked in itself; `data` is where the file's data begin."""
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if _counts(*shape, begin, end):
            pass
        case _:
            raise unusable(
                path,
                f"describes tensor {shown(name)} as {shown(entry)}",
                '{"dtype": ..., "shape": [...], "data_offsets": [begin, end]} in whole numbers, none negative',
            )
    if code not in DTYPES:
        raise unusable(
            path,
            f"has tensor {shown(name)} of type {shown(code)}",
            f"one of {' '.join(DTYPES)}",
            "use a checkpoint in bf16 or in the official FP8 format",
        )
    dtype = DTYPES[code]
    if len(shape) > MAX_DIMS or not _counts(math.prod(max(size, 1) for size in shape)):
        most = f"at most {MAX_DIMS} dimensions and 2**63 - 1 elements"
        raise unusable(path, f"has tensor {shown(name)} of shape {shown(shape)}", most)
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise unusable(
            path,
            f"gives tensor {shown(name)} {end - begin:,} bytes (data_offsets {begin:,} to {end:,})",
            f"{nbytes:,} bytes, which {code} of shape {shape} takes",
        )
    return Stored(path, dtype, tuple(shape), data + begin, data + end)


def _check_layout(path: Path, tensors: dict[str, Stored], data: int, size: int | None) -> None:
    """Tensors must lie one behind the other from the first byte of data to the last byte of the file (None: any)."""
    place = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != place:
            fault = "overlaps the tensor before it" if stored.begin < place else "leaves a gap before it"
            raise unusable(path, f"has tensor {shown(name)} at byte {stored.begin:,}, which {fault}", f"byte {place:,}")
        place = stored.end
    if size is not None and place > size:
        raise unusable(path, f"is cut short: it has {size:,} bytes", f"{place:,} bytes, says its header")
    if size is not None and place < size:
        raise unusable(path, f"has {size - place:,} bytes too many: {size:,}", f"{place:,} bytes, says its header")


def _parse(path: Path, what: str, data: bytes) -> Any:
    """JSON of a file; `what` says, after the path, what should be JSON."""
    try:
        return parse_json(data)
    except ValueError as error:
        raise unusable(path, f"{what} no readable JSON: {error}", "JSON in UTF-8, each key once") from error


def _counts(*numbers: Any) -> bool:
    """Are these whole numbers, not negative, that fit a file? (JSON's true is a bool, not a number.)"""
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _pointer(path: Path) -> CheckpointError:
    return unusable(
        path, "is a git-lfs pointer, not the file", "the file itself", f"run: git -C {path.parent} lfs pull"
    )


def _some(things: list[str], most: int = 5) -> str:
    return ", ".join(things[:most]) + (f" and {len(things) - most} more" if len(things) > most else "")
