"""What a machine has, where a system does not tell everything that Linux tells."""

import os

from glimmer import device


def test_cpus_without_affinity(monkeypatch):
    """macOS has no sched_getaffinity: every CPU counts."""
    assert 1 <= device.available_cpus() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert device.available_cpus() == os.cpu_count()
    rows = dict(device.describe())
    assert f"{os.cpu_count()} cores" in rows["processor"]
