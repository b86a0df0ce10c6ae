"""Which model made a row: a digest of a checkpoint's files, without loading them.

Configuration, tokenizer, chat template and small files count whole; of larger files their size, and pieces of their
beginning (where a safetensors file says what it holds), middle and end. Two checkpoints of the same shape differ in
these, and a copy of a directory does not. Not here: whether the files are good.
"""

import os
from hashlib import blake2b
from pathlib import Path

from glimmer.errors import CheckpointError

SUFFIXES = (".json", ".jinja", ".safetensors")
WHOLE = 64 << 20  # bytes of a file that is read from beginning to end
PIECE = 256 << 10  # bytes of each of three pieces of a larger one


def of_model(name: str) -> str:
    """The digest, 16 hexadecimal digits. What is no directory stands for itself: loading will say what it is."""
    directory = Path(name)
    digest = blake2b(digest_size=8)
    if not directory.is_dir():
        digest.update(name.encode(errors="surrogateescape"))
        return digest.hexdigest()
    try:
        for file in sorted(directory.iterdir()):
            if file.suffix in SUFFIXES and file.is_file():
                _add(digest, file)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory}: {error.strerror}", "a directory that can be read", "check its permissions"
        ) from None
    return digest.hexdigest()


def _add(digest: blake2b, file: Path) -> None:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(f"{file.name} {size}\n".encode(errors="surrogateescape"))
        pieces = [(0, size)] if size <= WHOLE else [(at, PIECE) for at in (0, size // 2, size - PIECE)]
        for begin, length in pieces:
            stream.seek(begin)
            digest.update(stream.read(length))
