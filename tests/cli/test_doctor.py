"""`glimmer doctor` names what will serve: the same as the engine would choose."""

import pytest
import torch

from glimmer.backends.selection import choose
from glimmer.cli import doctor


@pytest.mark.parametrize("only", ["", "reference"])
def test_findings(capsys, monkeypatch, only):
    monkeypatch.setenv("GLIMMER_BACKEND", only)
    assert doctor.main(["--device", "cpu"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("op "))
    ops = choose(torch.device("cpu"))
    assert rows["kernels"] == (ops.kernels or "none of our own")
    assert int(rows["threads"].split()[0]) >= 1 and rows["device"].startswith("cpu")
    if ops.kernels is not None:
        used, _, could = ops.kernels.partition(" (of ")
        assert used == could.rstrip(")").split(", ")[-1], "the best that this processor can"


def test_every_op_is_listed(capsys):
    doctor.main(["--device", "cpu"])
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if line.startswith("op ")] == [
        ["op", op, backend] for op, backend in choose(torch.device("cpu")).table()
    ]
