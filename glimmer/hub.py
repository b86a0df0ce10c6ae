"""Hub ids and folders of the local caches of Hugging Face and ModelScope, as model directories; and our own cache.

Hugging Face's cache keeps each repository as models--OWNER--NAME, with refs/main naming a commit and snapshots/COMMIT
holding its files. It lies in $HF_HUB_CACHE, else in $HF_HOME/hub, else in ~/.cache/huggingface/hub. ModelScope's keeps
the files in OWNER/NAME, where its older versions write ___ for a dot, below $MODELSCOPE_CACHE, else below
~/.cache/modelscope/hub. Nothing is downloaded, but by `download`. Not here: what the files hold.
"""

import importlib
import os
import re
from contextlib import suppress
from pathlib import Path

from glimmer.errors import CheckpointError, ConfigError
from glimmer.foreign import read_text, unreadable

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]  # of a repository: what is read of it, and no code
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_directory(name: str | Path) -> Path:
    """The directory that a path, a Hub id such as zai-org/GLM-4.5-Air, or a models--OWNER--NAME folder stands for.

    A path that exists is taken before an id. Raises CheckpointError for a path that the system does not let us look at,
    for an id that is not in the local cache, and for a folder of the cache without a snapshot.
    """
    path = Path(name)
    try:
        return _found(path, str(name))
    except OSError as problem:
        raise unreadable(Path(problem.filename or path), problem) from None


def _found(path: Path, name: str) -> Path:
    """`model_directory`, for which the system's refusals are OSErrors."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # an id perhaps; ValueError: a NUL in the name
        path.stat()
    if path.is_dir():
        is_repository = path.name.startswith("models--") and not (path / "config.json").exists()
        return _snapshot(path) if is_repository else path
    if path.exists() or not _ID.fullmatch(name) or name.startswith("."):
        return path
    repository = cache() / f"models--{name.replace('/', '--')}"
    if repository.is_dir():
        return _snapshot(repository)
    for directory in modelscope_directories(name):
        if (directory / "config.json").is_file():
            return directory
    raise CheckpointError(
        f"model directory {name!r} does not exist, and there is no such repository in {cache()}",
        "a Hugging Face model directory, or the id of a model in the local cache ($HF_HUB_CACHE, $HF_HOME, "
        "$MODELSCOPE_CACHE)",
        f"check the path, or download it first: hf download {name}",
    )


def download(name: str) -> Path:
    """The directory of a Hub id, whose files are downloaded from Hugging Face unless they are here. Never any code.

    Raises ConfigError without the library, CheckpointError if the download fails.
    """
    if not _ID.fullmatch(name) or Path(name).exists():
        return model_directory(name)
    try:
        library = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            "--download without huggingface_hub", "the library that downloads", "pip install huggingface_hub"
        ) from None
    try:
        return Path(library.snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # of the network, of the disk, of the repository: the library has many
        raise CheckpointError(
            f"{name} cannot be downloaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "a repository of Hugging Face that this machine reaches",
            "check the name, the network, and HF_TOKEN if the repository is private",
        ) from None


def modelscope_directories(name: str) -> list[Path]:
    """Where the versions of ModelScope's library keep a repository."""
    owner, _, model = name.partition("/")
    base = Path(os.environ.get("MODELSCOPE_CACHE") or Path("~/.cache/modelscope/hub").expanduser()).expanduser()
    places = (base / "models", base, base / "hub" / "models", base / "hub")
    return [place / owner / spelling for place in places for spelling in (model, model.replace(".", "___"))]


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
