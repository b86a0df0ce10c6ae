"""Files of rows: one writer at a time, wholly replaced or not at all."""

import os

import pytest

from glimmer.cli.row_file import RowFile
from glimmer.errors import ConfigError


def test_what_a_killed_process_of_this_number_has_left_is_no_row(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"1\n2\n")
    (tmp_path / f".out.{os.getpid()}").write_bytes(b"half a ro")
    file = RowFile(path, resume=True)
    file.replace([b"2"])
    file.add({"a": 3})
    file.close()
    assert path.read_bytes() == b'2\n{"a": 3}\n'
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(tmp_path, monkeypatch):
    path = tmp_path / "out"
    first = RowFile(path, resume=True)
    opened = []

    def replaced_meanwhile(*words, **options):
        opened.append(open(*words, **options))  # noqa: SIM115
        if len(opened) == 1:
            (tmp_path / "new").write_bytes(b"1\n")
            (tmp_path / "new").replace(path)
            first.close()
        return opened[-1]

    monkeypatch.setattr("glimmer.cli.row_file.open", replaced_meanwhile, raising=False)
    second = RowFile(path, resume=True)
    second.add({"a": 2})
    assert len(opened) == 2 and opened[0].closed and path.read_bytes() == b'1\n{"a": 2}\n'
    with pytest.raises(ConfigError, match="another process"):
        RowFile(path, resume=True)
