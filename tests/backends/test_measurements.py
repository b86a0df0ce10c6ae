"""Measurements kept between runs: taken where nothing differs, never from a file that is old, foreign or damaged."""

import json
import logging
import os
import stat
import time

import pytest

from glimmer.backends.measurements import MAX_AGE, MAX_FILE, Measurements

HERE = {"processor": "one", "threads": "2"}


def never() -> float:
    pytest.fail("measured again")


@pytest.fixture
def written(tmp_path):
    """The file of a machine, which holds 2.5 for "key"."""
    one = Measurements(tmp_path / "measured", HERE)
    assert one.get("key", lambda: 2.5) == one.get("key", never) == 2.5 and one.taken == 0
    one.keep()
    (file,) = (tmp_path / "measured").iterdir()
    return file


def test_what_was_measured_is_taken_by_the_next_run(written):
    assert stat.S_IMODE(written.stat().st_mode) == 0o600 and stat.S_IMODE(written.parent.stat().st_mode) == 0o700
    later = Measurements(written.parent, HERE)
    assert later.get("key", never) == later.get("key", never) == 2.5
    assert later.taken == 1 and 0 <= later.oldest < MAX_AGE
    before = written.stat().st_mtime_ns
    later.keep()
    assert written.stat().st_mtime_ns == before, "nothing is new"
    assert later.get("other", lambda: 1.0) == 1.0
    later.keep()
    last = Measurements(written.parent, HERE)
    assert (last.get("key", never), last.get("other", never)) == (2.5, 1.0)
    assert list(written.parent.iterdir()) == [written]


def test_another_machine_measures_for_itself(written):
    for machine in (HERE | {"threads": "1"}, HERE | {"build": "new"}, {"processor": "one"}):
        assert Measurements(written.parent, machine).get("key", lambda: 1.0) == 1.0
    assert Measurements().get("key", lambda: 1.0) == 1.0


def test_what_is_asked_for_anew_is_measured_and_kept(written):
    anew = Measurements(written.parent, HERE, anew=True)
    assert anew.get("key", lambda: 3.5) == 3.5 and anew.taken == 0
    anew.keep()
    assert Measurements(written.parent, HERE).get("key", never) == 3.5


@pytest.mark.parametrize("shift", [-MAX_AGE - 60, 3600])
def test_what_is_too_old_or_from_the_future_is_measured_again(written, shift):
    content = json.loads(written.read_text())
    content["measured"]["key"][1] += shift
    written.write_text(json.dumps(content))
    assert Measurements(written.parent, HERE).get("key", lambda: 1.0) == 1.0


def test_old_files_are_removed(written):
    long_ago = time.time() - MAX_AGE - 60
    os.utime(written, (long_ago, long_ago))
    other = Measurements(written.parent, HERE | {"threads": "1"})
    other.get("key", lambda: 1.0)
    other.keep()
    assert not written.exists() and len(list(written.parent.iterdir())) == 1


def replaced(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_bytes(b"\xff" * 100),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text(" " * (MAX_FILE + 1)),
        replaced(machine={"version": "1", "processor": "other"}),
        replaced(measured=[]),
        *(replaced(measured={"key": entry}) for entry in (2.5, [2.5], [True, 1], [-1, 1], ["2", 1], [1e999, 1], None)),
        lambda file: (file.rename(file.with_suffix(".other")), file.symlink_to(file.with_suffix(".other"))),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), os.mkfifo(file)),
    ],
)
def test_a_damaged_or_foreign_file_is_said_and_not_used(written, caplog, damage):
    damage(written)
    with caplog.at_level(logging.WARNING, "glimmer"):
        found = Measurements(written.parent, HERE)
    assert found.get("key", lambda: 1.0) == 1.0 and found.taken == 0
    (record,) = caplog.records
    assert str(written) in record.getMessage() and "measured anew" in record.getMessage()


def test_a_place_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "measured").write_text("in the way")
    found = Measurements(tmp_path / "measured", HERE)
    assert found.get("key", lambda: 1.0) == 1.0
    found.keep()
    assert "is not kept" in caplog.text
