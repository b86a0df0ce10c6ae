"""PackedFile: a checkpoint's weights as a backend computes with them, written once by `glimmer prepare`.

It is a directory of two files. weights-*.bin holds sections: what one attribute of one layer of the model holds, as one
or more records of equal length, each from a multiple of 4096 bytes on (an expert is a record: one read brings it).
packed.json, the manifest, says where each section lies, what it is, and its checksums; of which files it was made, by
their fingerprints; and in which form and layout. It comes last, under its name at once: where it is, all is there.

A packed file lies in the model's directory, or in the cache directory where that cannot be written, or it is a
directory of its own with all else that a model needs (standalone), which needs no checkpoint any more.
Not here: what the bytes mean (backends/), which layers there are (model/packed.py).
"""

import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from glimmer.checkpoint.fingerprint import fingerprints
from glimmer.errors import CheckpointError, ConfigError
from glimmer.foreign import open_regular, read_json
from glimmer.hub import cache_directory
from glimmer.weight import GROUP_SIZE, Kind

log = logging.getLogger("glimmer")

MANIFEST = "packed.json"
JOURNAL, LOCK = "packed.journal", "packed.lock"
FORMAT, VERSION = "glimmer packed weights", 1
DATA = re.compile(r"weights-[0-9a-f]{8}\.bin")  # the file of the weights: a name, and no path
PAGE = 4096
MAX_MANIFEST = 512 << 20  # bytes; the largest model of the family needs 2 million
CHUNK = 8 << 20  # bytes written at once, from a multiple of as many on: the page cache keeps them in huge pages
SYNCED = 256 << 20  # bytes after which the journal is written: what an interruption costs at most


@dataclass(frozen=True)
class Form:
    """What loading was asked for: the dtype of plain values, and to quantise or not."""

    dtype: str
    quantization: str | None = None
    group_size: int | None = None

    @staticmethod
    def of(dtype: str, quantization: str | None, group_size: int | None) -> "Form":
        """The form that these settings mean (config.py)."""
        return Form(dtype, quantization, (group_size or GROUP_SIZE) if quantization == Kind.INT4 else None)

    @property
    def folder(self) -> str:
        """The directory of a packed file in this form."""
        parts = ("packed", self.dtype, self.quantization, self.group_size)
        return "-".join(str(part) for part in parts if part is not None)


class Section(NamedTuple):
    """num_records of nbytes each from byte `begin` on. description: how a backend, or torch, makes weights of them."""

    description: dict[str, Any]
    begin: int
    num_records: int
    nbytes: int
    checksums: list[str]


class PackedFile:
    """An open packed file. Raises CheckpointError when it is damaged, or of another version.

    layers: path of a layer in the model -> attribute -> Section. descriptor: of the file with the sections, of nbytes.
    """

    def __init__(self, directory: Path):
        self.directory, self.manifest = directory, directory / MANIFEST
        try:
            table = read_json(self.manifest, "the manifest of a packed file", MAX_MANIFEST)
        except CheckpointError as error:
            raise self._damaged(error.found.removeprefix(f"{self.manifest} ")) from None
        found = {"format": table.get("format"), "version": table.get("version")}
        if found != {"format": FORMAT, "version": VERSION}:
            raise self._damaged(f"has format {found['format']!r}, version {found['version']!r}")
        if table.pop("digest", None) != _digest(table):
            raise self._damaged("does not agree with its own digest")
        try:
            self.form, self.layout = Form(**table["form"]), str(table["layout"])
            self.source: dict[str, str] = table["source"]
            self.nbytes, self.file = int(table["nbytes"]), directory / str(table["data"])
            self.layers = {
                layer: {name: Section(**section) for name, section in sections.items()}
                for layer, sections in table["layers"].items()
            }
            self._check_places()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"is incomplete: {error!r}") from None
        if not DATA.fullmatch(self.file.name) or self.file.parent != directory:
            raise self._damaged(f"names {str(table['data'])!r} as its data")
        try:
            self.descriptor = open_regular(self.file)
        except FileNotFoundError:
            raise self._damaged(f"names {self.file.name}, which is not there") from None
        size = os.fstat(self.descriptor).st_size
        if size != self.nbytes:
            os.close(self.descriptor)
            raise self._damaged(f"wants {self.nbytes:,} bytes of {self.file.name}, which has {size:,}")

    def _check_places(self) -> None:
        """CheckpointError for a section that cannot lie where it is said to."""
        for section in self.sections():
            end = section.begin + section.num_records * section.nbytes
            if (
                section.begin < 0
                or section.begin % PAGE
                or section.num_records < 1
                or section.nbytes < 1
                or end > self.nbytes
            ):
                raise self._damaged(f"places a section at bytes {section.begin:,} to {end:,} of {self.nbytes:,}")
            if len(section.checksums) != section.num_records:
                raise self._damaged("lacks checksums")

    def sections(self) -> list[Section]:
        """All sections of all layers."""
        return [section for sections in self.layers.values() for section in sections.values()]

    def __len__(self) -> int:
        """How many records there are: at least one for each layer and each expert."""
        return sum(section.num_records for section in self.sections())

    def stale(self, source: Mapping[str, str]) -> str | None:
        """What differs from the files that it was made of, or None."""
        for name in sorted(source.keys() | self.source.keys()):
            if source.get(name) != self.source.get(name):
                return name
        return None

    def _damaged(self, what: str) -> CheckpointError:
        return damaged(self.manifest, what)

    def close(self) -> None:
        """Close the descriptor. What is mapped stays."""
        os.close(self.descriptor)

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def damaged(path: Path, what: str) -> CheckpointError:
    """The error of a packed file that cannot be computed with."""
    return CheckpointError(
        f"{path} {what}", f"a packed file of version {VERSION}, as it was written", "make it again: glimmer prepare"
    )


def is_packed(model: Path) -> bool:
    """Whether a model's directory is a packed file itself, without a checkpoint."""
    return (model / MANIFEST).is_file()


def places(model: Path, form: Form) -> list[Path]:
    """Where the packed file of a model may lie, in the order in which it is looked for and, if possible, written."""
    absolute = model.resolve()
    key = blake2b(str(absolute).encode(), digest_size=6).hexdigest()
    return [absolute / form.folder, cache_directory() / f"{absolute.name}-{key}" / form.folder]


def find(model: Path, form: Form, layout: str, quantization_config: object) -> PackedFile | None:
    """The packed file of a model in a form; one that is stale or damaged is named in a warning, and not used."""
    source: dict[str, str] | None = None
    for directory in places(model, form):
        if not (directory / MANIFEST).is_file():
            if (directory / JOURNAL).is_file():
                log.warning("the packed file %s is not used: it is not finished; glimmer prepare goes on", directory)
            continue
        try:
            packed = PackedFile(directory)
        except CheckpointError as error:
            log.warning("a packed file is not used: %s; %s", error.found, error.todo)
            continue
        source = source or source_of(model, quantization_config)
        stale = packed.stale(source)
        if stale is None and packed.form == form and packed.layout == layout:
            return packed
        packed.close()
        if stale is not None:
            reason = f"it was made of another {stale}"
        elif packed.form != form:
            reason = f"it holds {packed.form.folder}"
        else:
            reason = f"its layout is {packed.layout!r}, not {layout!r}"
        log.warning("the packed file %s is not used: %s; glimmer prepare makes it again", directory, reason)
    return None


def in_other_forms(model: Path, form: Form) -> list[Path]:
    """The packed files of a model, finished ones, that are there in other forms than this one."""
    folders = {place.parent: None for place in places(model, form)}
    others = [file.parent for folder in folders for file in sorted(folder.glob(f"packed-*/{MANIFEST}"))]
    return [directory for directory in others if directory.name != form.folder]


def open_standalone(model: Path, form: Form, layout: str | None) -> PackedFile:
    """The packed file that a model's directory is; it is used in whatever form it has, unless another one is asked for.

    Raises ConfigError when it is of another form, and CheckpointError as PackedFile does.
    """
    packed = PackedFile(model)
    if packed.layout != layout:
        packed.close()
        raise ConfigError(
            f"{model} holds weights in the layout {packed.layout!r}, and {layout!r} is computed with here",
            "the backend for which they were packed",
            "use that device and backend, or prepare the checkpoint again",
        )
    if packed.form.dtype != form.dtype or (form.quantization is not None and packed.form != form):
        packed.close()
        raise ConfigError(
            f"{model} holds weights prepared as {packed.form.folder}, and {form.folder} was asked for",
            "what it was prepared for",
            "leave dtype, quantization and group_size out, or prepare the checkpoint again",
        )
    return packed


def source_of(model: Path, quantization_config: object) -> dict[str, str]:
    """What a packed file is made of: fingerprints of the weights, and of what config.json says of their format."""
    found = {name: value for name, value in fingerprints(model).items() if name.endswith(".safetensors")}
    return found | {"config.json (quantization_config)": _digest(quantization_config)}


def digest_of(model: Path) -> str | None:
    """The digest of the packed file that a model's directory is, or None if it is a checkpoint."""
    if not (model / MANIFEST).is_file():
        return None
    return str(read_json(model / MANIFEST, "the manifest of a packed file", MAX_MANIFEST).get("digest"))


class PackedWriter:
    """Writes a packed file into `directory`, section by section; again where an earlier attempt has stopped.

    head: form, layout and source. checksum: of a buffer. `done` has the layers that an earlier attempt has written.
    Raises ConfigError when another process is writing there, CheckpointError when the disk is full or refuses.
    """

    def __init__(self, directory: Path, head: Mapping[str, Any], checksums: Callable[[list[Any]], list[str]]):
        self.directory, self._checksums = directory, checksums
        self.done: dict[str, dict[str, Section]] = {}
        self._file = self._journal = self._lock = -1
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another process is writing a packed file into {directory}",
                    "one writer at a time",
                    "wait until it has finished",
                ) from None
            self._head = dict(head)
            self._begin()
        except OSError as error:
            self.close()
            self.refused(Path(error.filename or directory), error)
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Go on with what the journal tells, or begin anew."""
        journal = self.directory / JOURNAL
        end = self._read_journal(journal)
        for stray in self.directory.glob("weights-*.bin"):
            if stray.name not in (self._name, self._in_use()):
                stray.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(self.directory / self._name, flags, 0o644)
        os.ftruncate(self._file, end)
        kept: list[dict[str, Any]] = [{"head": self._head, "data": self._name}]
        if self.done:
            kept.append({"layers": {name: _jsonable(sections) for name, sections in self.done.items()}, "end": end})
        temporary = journal.with_suffix(".new")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.rename(journal)
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._chunk, self._filled = end - end % CHUNK, end % CHUNK  # where the buffer goes, and how much of it is there
        self._buffer = bytearray(CHUNK)
        self._buffer[: self._filled] = os.pread(self._file, self._filled, self._chunk)
        self._pending: dict[str, dict[str, Section]] = {}
        self._synced = end

    def _read_journal(self, journal: Path) -> int:
        """What an earlier attempt at the same has written, as far as its journal and its data are whole: where it
        ends."""
        self._name, end = f"weights-{os.urandom(4).hex()}.bin", 0
        first, *lines = _journal(journal) or [{}]
        name = str(first.get("data"))
        if first.get("head") != json.loads(json.dumps(self._head)) or not DATA.fullmatch(name):
            return 0
        self._name, file = name, self.directory / name
        size = file.stat().st_size if file.is_file() else 0
        for line in lines:
            try:
                next_end, layers = int(line["end"]), {name: _sections(one) for name, one in line["layers"].items()}
            except (KeyError, TypeError, ValueError, AttributeError):
                break
            if not end <= next_end <= size:
                break
            end = next_end
            self.done |= layers
        return end

    def _in_use(self) -> str | None:
        """The data of the packed file that is there now; it is replaced in the end."""
        try:
            name = str(read_json(self.directory / MANIFEST, "a manifest", MAX_MANIFEST).get("data"))
        except CheckpointError:  # there is none, or it is worth nothing
            return None
        return name if DATA.fullmatch(name) else None

    @property
    def end(self) -> int:
        """Bytes that have been written."""
        return self._chunk + self._filled

    def add(self, layer: str, name: str, description: dict[str, Any], records: "Callable[[int], Any]", n: int) -> None:
        """One more section: n records, of which records(i) gives the i-th as uint8, all of one length."""
        checksums, begin, nbytes = [], self.end, 0
        for i in range(n):
            record = records(i)
            nbytes = len(record)
            checksums += self._checksums([record])
            self._write(memoryview(record.numpy()))
            if nbytes % PAGE:
                self._write(memoryview(bytes(PAGE - nbytes % PAGE)))
        assert n == 1 or nbytes % PAGE == 0, "records of whole pages"
        self._pending.setdefault(layer, {})[name] = Section(description, begin, n, nbytes, checksums)

    def finish_layer(self) -> None:
        """All sections of a layer have been added: an interruption costs no more than SYNCED bytes from here."""
        if self.end - self._synced >= SYNCED:
            self._sync()

    def _write(self, data: memoryview) -> None:
        while len(data):
            count = min(len(data), CHUNK - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == CHUNK:
                self._flush()
                self._chunk, self._filled = self._chunk + CHUNK, 0

    def _flush(self) -> None:
        view, at = memoryview(self._buffer)[: self._filled], self._chunk
        try:
            while len(view):
                count = os.pwrite(self._file, view, at)
                view, at = view[count:], at + count
        except OSError as error:
            self.refused(self.directory / self._name, error)

    def refused(self, path: Path, error: OSError) -> NoReturn:
        """Raises CheckpointError: what belongs to the packed file cannot be written."""
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}",
            "a directory that can be written, and a disk that takes the packed weights",
            "free some space, or choose another place (--out), and run it again: it goes on where it has stopped",
        ) from error

    def _sync(self) -> None:
        """What has been added so far is on the disk, and the journal knows it."""
        self._flush()
        try:
            os.fdatasync(self._file)
            layers = {layer: _jsonable(sections) for layer, sections in self._pending.items()}
            os.write(self._journal, (json.dumps({"layers": layers, "end": self.end}) + "\n").encode())
            os.fdatasync(self._journal)
        except OSError as error:
            self.refused(self.directory / self._name, error)
        self.done |= self._pending
        self._pending, self._synced = {}, self.end

    def finish(self) -> None:
        """The manifest: from now on the packed file is there, in place of an older one."""
        self._sync()
        layers = {layer: _jsonable(sections) for layer, sections in self.done.items()}
        table = {"format": FORMAT, "version": VERSION, **self._head}
        table |= {"data": self._name, "nbytes": self.end, "layers": layers}
        table["digest"] = _digest(table)
        temporary, old = self.directory / f"{MANIFEST}.new", self._in_use()
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(table, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.directory / MANIFEST)
            (self.directory / JOURNAL).unlink()
            if old not in (None, self._name):
                (self.directory / str(old)).unlink(missing_ok=True)
        except OSError as error:
            self.refused(self.directory / self._name, error)

    def close(self) -> None:
        """Let others write. What has been written is kept, to go on with."""
        for descriptor in (self._file, self._journal, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._journal = self._lock = -1

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def head(form: Form, layout: str, source: Mapping[str, str]) -> dict[str, Any]:
    """What a packed file says of itself, before any section."""
    return {"form": asdict(form), "layout": layout, "source": dict(source)}


def _journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that an interruption has cut, or that is damaged."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(value, dict):
                break
            lines.append(value)
    return lines


def _sections(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Section]:
    return {name: Section(**section) for name, section in sections.items()}


def _jsonable(sections: Mapping[str, Section]) -> dict[str, dict[str, Any]]:
    return {name: section._asdict() for name, section in sections.items()}


def _digest(value: object) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
