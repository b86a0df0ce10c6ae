"""Directories for sockets: where they are made, and which of them are removed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from glimmer.errors import ConfigError
from glimmer.server.socket_directory import MAX_PLACE, SocketDirectory

OWNER = """
import sys, tempfile
from glimmer.server.socket_directory import SocketDirectory
tempfile.tempdir = sys.argv[1]
made = SocketDirectory()
open(made.path + "/engine.sock", "w").close()
print(made.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(monkeypatch):
    """A directory for temporary files whose path is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        yield Path(place)


def test_only_its_user_may_enter_and_it_ends(place):
    made = SocketDirectory()
    assert Path(made.path).parent == place and os.stat(made.path).st_mode & 0o777 == 0o700
    made.close()
    assert list(place.iterdir()) == []
    made.close()


def test_places(monkeypatch):
    """A long place is not used, since a socket's path is short; none at all is refused."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * MAX_PLACE)
    made = SocketDirectory()
    made.close()
    assert made.path.startswith("/tmp/")
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(ConfigError, match="No such file"):
        SocketDirectory()


def test_what_a_killed_owner_has_left_is_removed_and_nothing_else(place):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    owners = [subprocess.Popen([sys.executable, "-c", OWNER, str(place)], **pipes) for _ in range(2)]
    killed, alive = (Path(owner.stdout.readline().strip()) for owner in owners)
    owners[0].send_signal(signal.SIGKILL)
    owners[0].communicate(timeout=20)
    other = place / "glimmer-model"
    other.mkdir()
    new = place / "glimmer-socket-new"
    new.mkdir()
    for path in (killed, alive, other):
        os.utime(path, (0, 0))
    made = SocketDirectory()
    assert set(place.iterdir()) == {alive, other, new, Path(made.path)}
    assert (alive / "engine.sock").exists()
    made.close()
    owners[1].communicate(timeout=20)
