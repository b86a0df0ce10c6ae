"""Hub ids and folders of the local Hugging Face cache, as model directories; and our own cache directory. Nothing is
downloaded.

The cache keeps each repository as models--OWNER--NAME, with refs/main naming a commit and snapshots/COMMIT holding its
files. It lies in $HF_HUB_CACHE, else in $HF_HOME/hub, else in ~/.cache/huggingface/hub. Not here: what the files hold.
"""

import os
import re
from pathlib import Path

from glimmer.errors import CheckpointError
from glimmer.foreign import read_text

_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_directory(name: str | Path) -> Path:
    """The directory that a path, a Hub id such as zai-org/GLM-4.5-Air, or a models--OWNER--NAME folder stands for.

    A path that exists is taken before an id. Raises CheckpointError for an id that is not in the local cache, and for a
    folder of the cache without a snapshot.
    """
    path = Path(name)
    if path.is_dir():
        is_repository = path.name.startswith("models--") and not (path / "config.json").exists()
        return _snapshot(path) if is_repository else path
    if path.exists() or not _ID.fullmatch(str(name)) or str(name).startswith("."):
        return path
    repository = cache() / f"models--{str(name).replace('/', '--')}"
    if not repository.is_dir():
        raise CheckpointError(
            f"model directory {str(name)!r} does not exist, and there is no such repository in {cache()}",
            "a Hugging Face model directory, or the id of a model in the local cache ($HF_HUB_CACHE, $HF_HOME)",
            f"check the path, or download it first: hf download {name}",
        )
    return _snapshot(repository)


def cache() -> Path:
    """Where the Hugging Face libraries keep what they download."""
    hub, home = os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_HOME")
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(hub or Path(home or Path(general) / "huggingface") / "hub").expanduser()


def cache_directory() -> Path:
    """Where glimmer keeps what it can make again: $GLIMMER_CACHE, else `glimmer` in $XDG_CACHE_HOME or ~/.cache."""
    own, general = os.environ.get("GLIMMER_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or Path(general) / "glimmer").expanduser()


def _snapshot(repository: Path) -> Path:
    """The snapshot that refs/main names, or the only one."""
    snapshots = repository / "snapshots"
    try:
        commit = read_text(repository / "refs" / "main", 1000).strip()
    except FileNotFoundError:
        commit = ""
    if re.fullmatch(r"\w+", commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    found = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"{repository} has {len(found)} snapshots, and refs/main names {'none of them' if commit else 'none'}",
        "one snapshot, or refs/main with its name",
        "finish the download, or give the folder of the snapshot that is meant",
    )
