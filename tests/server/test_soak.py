"""A short run of benchmarks/soak.py: clients of every kind, and nothing is left of them. By hand it runs for hours."""

import sys

import pytest
from servers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="what processes hold is read from /proc"),
]


def test_nothing_is_left_of_any_client(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import soak

    report = soak.soak(str(soak.DEMO), seconds=6, clients=6, seed=1, growth=48, words=[])
    assert report.faults == []
    assert report.answers > 10 and len(report.clients) >= 5
