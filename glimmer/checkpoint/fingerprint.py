"""Fingerprints of a model directory's files, by which ranks on several machines see that theirs are the same.

A file of at most WHOLE bytes is digested whole, so also configurations and tokenizers. Of a larger one, which holds
weights, its size, its header (or as many bytes of its beginning) and SAMPLES pages that are spread over it are: weights
of another training differ nearly everywhere, and nothing that is loaded later is read twice.
Not here: the comparison (engine/runner.py), and what the files mean.
"""

import os
from hashlib import blake2b
from pathlib import Path

from glimmer.foreign import open_regular, unreadable

WHOLE = 32 << 20
SAMPLES, PAGE = 64, 4096
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def fingerprints(directory: str | Path) -> dict[str, str]:
    """File name -> "BYTES bytes, digest DIGEST" of the weights and of FILES; what is not there is left out."""
    directory = Path(directory)
    try:
        names = {path.name for path in directory.glob("*.safetensors") if not path.name.startswith(".")}
        names |= {name for name in FILES if (directory / name).exists()}
        return {name: _fingerprint(directory / name) for name in sorted(names)}
    except OSError as error:
        raise unreadable(Path(error.filename or directory), error) from None


def _fingerprint(file: Path) -> str:
    digest = blake2b(digest_size=12)
    descriptor = open_regular(file)
    try:
        size = os.fstat(descriptor).st_size
        if size <= WHOLE:
            spans = [(begin, PAGE * 256) for begin in range(0, size, PAGE * 256)]
        else:
            header = min(8 + int.from_bytes(os.pread(descriptor, 8, 0), "little"), WHOLE)
            spans = [(0, header)] + [(i * (size - PAGE) // (SAMPLES - 1), PAGE) for i in range(SAMPLES)]
        for begin, length in spans:
            digest.update(os.pread(descriptor, length, begin))
    finally:
        os.close(descriptor)
    return f"{size:,} bytes, digest {digest.hexdigest()}"
