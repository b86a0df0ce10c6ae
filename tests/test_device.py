"""What a machine has, where a system does not tell everything that Linux tells."""

import os

import pytest

from glimmer import device


def test_cpus_without_affinity(monkeypatch):
    """macOS has no sched_getaffinity: every CPU counts."""
    assert 1 <= device.available_cpus() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert device.available_cpus() == os.cpu_count()
    rows = dict(device.describe())
    assert f"{os.cpu_count()} cores" in rows["processor"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(cpus, siblings, files): such a machine; siblings: CPUs of each core, files of /sys/fs/cgroup."""

    def make(cpus: set[int], siblings: list[tuple[int, ...]], files: dict[str, str]) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus, raising=False)
        monkeypatch.setattr(device, "SYS", tmp_path)
        monkeypatch.setattr(device, "TORCH_THREADS", len(siblings))
        contents = {f"fs/cgroup/{name}": text for name, text in files.items()}
        for core in siblings:
            listed = ",".join(map(str, core))
            contents |= {f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{listed}\n" for cpu in core}
        for name, text in contents.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return make


EIGHT = [(0, 4), (1, 5), (2, 6), (3, 7)]  # four cores of two CPUs each


def version_1(quota: str) -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "399999 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "10000000 100000\n"}, 8),
        (version_1("-1"), 8),
        (version_1("300000"), 3),
        (version_1("399999"), 3),
        (version_1("50000"), 1),
        (version_1("0"), 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, 8),
    ],
)
def test_quotas_of_cpu_time(machine, files, cpus):
    """Of both versions of control groups, rounded down to whole CPUs."""
    machine(set(range(8)), EIGHT, files)
    assert device.available_cpus() == cpus
    assert device.share_cores(1) == min(cpus, 4)
    assert device.share_cores(2) == max(1, min(cpus, 4) // 2)
    assert device.share_cores(100) == 1


@pytest.mark.parametrize("cpus, cores", [(set(range(8)), 4), ({0, 4}, 1), ({0, 1, 4}, 2), ({3}, 1)])
def test_physical_cores_count_alike_for_one_process_and_several(machine, cpus, cores):
    machine(cpus, EIGHT, {})
    assert device.share_cores(1) == cores
    assert [device.share_cores(n) for n in (2, 4)] == [max(1, cores // n) for n in (2, 4)]


def test_omp_num_threads_counts_where_the_process_is_alone(machine, monkeypatch):
    machine(set(range(8)), EIGHT, {})
    monkeypatch.setattr(device, "TORCH_THREADS", 1)
    assert device.share_cores(1) == 1 and device.share_cores(2) == 2
    monkeypatch.setattr(device, "TORCH_THREADS", 1000)
    assert device.share_cores(1) == 4


@pytest.mark.parametrize("processes", [1, 2])
def test_more_threads_than_cpus_are_capped_with_a_warning(machine, caplog, processes):
    machine(set(range(8)), EIGHT, version_1("350000"))
    assert [device.share_cores(processes, asked) for asked in (1, 2, 3)] == [1, 2, 3] and not caplog.records
    for asked in (4, 1000, 10**30):
        caplog.clear()
        assert device.share_cores(processes, asked) == 3
        assert caplog.messages == [f"threads={asked}, but this process may use 3 CPUs: computing with 3 threads"]
