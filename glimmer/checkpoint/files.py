"""Checkpoint: a Hugging Face directory of safetensors files, read one slice of one tensor at a time.

Words: the *header* of a file is its JSON table of tensors; the *index* is model.safetensors.index.json, which says
which file holds which tensor; a *view* is a torch tensor whose memory is the mapped file itself.

The headers are parsed here, and not by the safetensors library, for two reasons: every size must be checked against
the file before anything is read, so that half a download is an error message and not half a model; and pages that
have been copied must be given back (`release`), so that loading needs the memory of one tensor and not of a file.

Not here: what a tensor means (model/names.py), how a format lays out its bits (formats/), config.json (only its
presence is checked, as the mark of a model directory), writing.
"""

import json
import math
import mmap
import os
import reprlib
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from glimmer.errors import CheckpointError

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
MAX_DIMS = 8  # far more than any weight has; keeps the product of a hostile shape small

# Reading one byte makes the kernel map its neighbours too (64 KiB of them, or one large page of 2 MiB), so ranges are
# given back in whole windows. Larger ones would make every call walk page tables that it has nothing to do with.
WINDOW = 2 << 20

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


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
    are wanted raises it, or warns when all are there. Not for use by several threads at once.

    Raises CheckpointError when the directory or a file cannot be used.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self._tensors: dict[str, Stored] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._bytes: dict[Path, Tensor] = {}  # each file whole, as uint8; a view, like everything handed out
        self._read: set[str] = set()
        self._touched: list[tuple[Path, int, int]] = []
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
        """Read one header and map the file."""
        try:
            with open(file, "rb") as opened:
                tensors = _read_header(file, opened)
                # PROT_READ: a private writable map of 200 GB would count as 200 GB of memory promised by the kernel.
                mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        except OSError as error:
            raise _unusable(file, f"cannot be read: {error.strerror or error}", "a readable file") from error
        # From a cold disk 0.6 GB/s with it and 0.45 without; from the page cache no difference. WILLNEED and
        # POPULATE_READ were slower or no faster.
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor shall it be
            self._bytes[file] = torch.frombuffer(mapped, dtype=torch.uint8)
        self._maps[file] = mapped
        for name, stored in tensors.items():
            if name in self._tensors:
                self._twice[name] = file.name if index.get(name) != file.name else self._tensors[name].file.name
            if name not in self._tensors or index.get(name) == file.name:
                self._tensors[name] = stored

    def _check_twice(self, index: dict[str, str]) -> None:
        for name, file in self._twice.items():
            if index.get(name) != self._tensors[name].file.name:
                raise CheckpointError(
                    f"tensor {_quote(name)} lies in {self._tensors[name].file.name} and in {file}",
                    f"each tensor once, or an index ({INDEX}) that says which one counts",
                    f"move the file that does not belong to this model out of {self.directory}",
                )

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

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

    def tensor(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        """Rows start:stop and columns start:stop (None: all) of a tensor, in the type on disk, and mark it as read.

        The result is a view into the file: nothing is copied, and writing to it kills the process. It stays valid
        after `release` (which costs a second read) and after `close`. Slice bounds must lie inside the shape.
        """
        stored = self._find(name)
        assert self._bytes, "the checkpoint is closed"
        _, dtype, shape, begin, end = stored
        if rows is not None:
            start, stop = rows
            assert shape and 0 <= start <= stop <= shape[0], f"rows {rows} of {name} {shape}"
            row = (end - begin) // max(shape[0], 1)
            begin, end, shape = begin + start * row, begin + stop * row, (stop - start, *shape[1:])
        self._read.add(name)
        if begin < end:
            self._touched.append((stored.file, begin, end))
        data = self._bytes[stored.file][begin:end]
        if begin % dtype.itemsize:  # after a header of odd length; torch cannot look at such bytes in place
            data = data.clone()
        view = data.view(dtype).view(shape)
        if cols is None:
            return view
        start, stop = cols
        assert len(shape) > 1 and 0 <= start <= stop <= shape[1], f"columns {cols} of {name} {shape}"
        return view[:, start:stop]

    def release(self) -> None:
        """Give the pages behind every view handed out since the last call back to the kernel.

        A process that copies what it wants and then releases holds its copies and one tensor, never a whole file. The
        bytes stay in the page cache while there is room, so other processes that read the same file lose nothing.
        """
        for file, begin, end in self._touched:
            start = begin // WINDOW * WINDOW
            self._maps[file].madvise(mmap.MADV_DONTNEED, start, -(-end // WINDOW) * WINDOW - start)
        self._touched.clear()

    def unread(self, ignoring: Callable[[str], bool] = lambda name: False) -> list[str]:
        """Sorted names of the tensors that nobody has asked for, without those that `ignoring` accepts."""
        return sorted(name for name in self._tensors if name not in self._read and not ignoring(name))

    def close(self) -> None:
        """No more tensors after this. A file is unmapped when the last view into it is gone."""
        # mmap.close() would take the memory away under live views: torch holds the map, not a lock on its buffer.
        self._touched.clear()
        self._bytes.clear()
        self._maps.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find(self, name: str) -> Stored:
        if name not in self._tensors:
            raise CheckpointError(
                f"no tensor {_quote(name)} among the {len(self._tensors)} of {self.directory}",
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
        raise CheckpointError(
            f"{directory} cannot be read: {error.strerror or error}", "a readable directory", "check its permissions"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name; empty when there is no index."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror or error}", "a readable file") from error
    if data.startswith(POINTER):
        raise _pointer(path)
    index = _parse(path, "is", data)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise _unusable(path, "is not an index", '{"weight_map": {"tensor name": "file name", ...}}')
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
            + (f", but {others} files, which are not read" if others else ""),
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
        + _some([f"{_quote(name)} not in {_quote(index[name])}" for name in astray]),
        "an index that agrees with the files",
        f"download {INDEX} and these files again, from one revision of the checkpoint",
    )


def _read_header(path: Path, opened: BinaryIO) -> dict[str, Stored]:
    """The tensors of one file: 8 bytes with the header's length, the header, then nothing but data."""
    size = os.fstat(opened.fileno()).st_size
    start = opened.read(len(POINTER))
    if start == POINTER:
        raise _pointer(path)
    data = 8 + int.from_bytes(start[:8], "little")
    if size < 8 or size < data <= 8 + MAX_HEADER:
        wanted = f"{data:,} bytes or more, say its first eight" if size >= 8 else "a header and data"
        raise _unusable(path, f"ends within its header: it has {size:,} bytes", wanted)
    if data > 8 + MAX_HEADER:
        raise _unusable(path, f"claims a header of {data - 8:,} bytes", f"at most {MAX_HEADER:,} bytes of JSON")
    opened.seek(8)
    header = _parse(path, "has a header that is", opened.read(data - 8))
    if not isinstance(header, dict):
        raise _unusable(path, "has a header that is no table of tensors", "a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _describe(path, name, entry, data) for name, entry in header.items()}
    _check_layout(path, tensors, data, size)
    return tensors


def _describe(path: Path, name: str, entry: Any, data: int) -> Stored:
    """One entry of a header, checked in itself; `data` is where the file's data begin."""
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if _counts(*shape, begin, end):
            pass
        case _:
            raise _unusable(
                path,
                f"describes tensor {_quote(name)} as {_quote(entry)}",
                '{"dtype": ..., "shape": [...], "data_offsets": [begin, end]} in whole numbers, none negative',
            )
    if code not in DTYPES:
        raise _unusable(
            path,
            f"has tensor {_quote(name)} of type {_quote(code)}",
            f"one of {' '.join(DTYPES)}",
            "use a checkpoint in bf16 or in the official FP8 format",
        )
    dtype = DTYPES[code]
    if len(shape) > MAX_DIMS or not _counts(math.prod(max(size, 1) for size in shape)):
        most = f"at most {MAX_DIMS} dimensions and 2**63 - 1 elements"
        raise _unusable(path, f"has tensor {_quote(name)} of shape {_quote(shape)}", most)
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _unusable(
            path,
            f"gives tensor {_quote(name)} {end - begin:,} bytes (data_offsets {begin:,} to {end:,})",
            f"{nbytes:,} bytes, which {code} of shape {shape} takes",
        )
    return Stored(path, dtype, tuple(shape), data + begin, data + end)


def _check_layout(path: Path, tensors: dict[str, Stored], data: int, size: int) -> None:
    """Tensors must lie one behind the other from the first byte of data to the last byte of the file."""
    place = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != place:
            fault = "overlaps the tensor before it" if stored.begin < place else "leaves a gap before it"
            raise _unusable(
                path, f"has tensor {_quote(name)} at byte {stored.begin:,}, which {fault}", f"byte {place:,}"
            )
        place = stored.end
    if place > size:
        raise _unusable(path, f"is cut short: it has {size:,} bytes", f"{place:,} bytes, says its header")
    if place < size:
        raise _unusable(path, f"has {size - place:,} bytes too many: {size:,}", f"{place:,} bytes, says its header")


def _parse(path: Path, what: str, data: bytes) -> Any:
    """JSON in which no key comes twice. `what` says, after the path, what should be JSON."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"{what} no readable JSON: {error}", "JSON in UTF-8, each key once") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {_quote(twice)} comes twice")
    return table


def _counts(*numbers: Any) -> bool:
    """Are these whole numbers, not negative, that fit a file? (JSON's true is a bool, not a number.)"""
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _unusable(path: Path, found: str, expected: str, todo: str | None = None) -> CheckpointError:
    return CheckpointError(f"{path} {found}", expected, todo or f"download {path.name} again and compare its size")


def _pointer(path: Path) -> CheckpointError:
    return _unusable(
        path, "is a git-lfs pointer, not the file", "the file itself", f"run: git -C {path.parent} lfs pull"
    )


def _some(things: list[str], most: int = 5) -> str:
    return ", ".join(things[:most]) + (f" and {len(things) - most} more" if len(things) > most else "")


def _quote(thing: Any) -> str:
    """repr, cut to a line: names and values in a broken header may be of any length and depth."""
    return _SHORT.repr(thing)
