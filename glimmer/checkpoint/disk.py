"""check_space: whether a disk has room for the weights that a command is about to write."""

import os
import shutil
from pathlib import Path

from glimmer.errors import CheckpointError

SLACK = 64 << 20  # bytes of disk for everything but weights


def check_space(directory: Path, nbytes: int, weights: str, todo: str) -> None:
    """CheckpointError unless the disk has room for so many bytes more in a directory, which need not exist yet.

    weights: what they are, in a word; todo: what to do about it.
    """
    place = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    free, wanted = shutil.disk_usage(place).free, nbytes + SLACK
    if free < wanted:
        raise CheckpointError(
            f"{place} has {free / 1e9:.2f} GB free", f"{wanted / 1e9:.2f} GB for the {weights} weights", todo
        )
