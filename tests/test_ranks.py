"""Requests on several ranks, with real processes: rank 0's are everybody's, in whatever order they are made."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("rank_programs.py"))
SECONDS = 150  # after which a process is killed, and the test has failed


def run(program: str, model: str, out: Path, size: int = 2, **variables: str) -> list[tuple[int, str]]:
    """(exit code, stderr) of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = []
    for rank in range(size):
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        env |= variables
        command = [sys.executable, SCRIPT, program, model, str(out)]
        jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [job.communicate(timeout=SECONDS)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert not any("terminate called" in words for words in said), said
    return [(job.returncode, words) for job, words in zip(jobs, said)]


def found(out: Path, rank: int) -> dict:
    return json.loads(Path(f"{out}.{rank}").read_text())


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    return str(checkpoint())


def alone(program: str, model: str, out: Path) -> dict:
    [(code, said)] = run(program, model, out, size=1)
    assert code == 0, said
    return found(out, 0)


def test_the_same_program_on_every_rank(model, tmp_path):
    expected = alone("everywhere", model, tmp_path / "alone")
    ranks = run("everywhere", model, tmp_path / "out")
    assert [code for code, _ in ranks] == [0, 0], ranks
    for rank in (0, 1):
        mine = found(tmp_path / "out", rank)
        for part in expected:
            assert mine[part] == expected[part], f"rank {rank}, {part}"


def test_a_slower_rank_gets_its_last_answers_after_rank_0_has_closed(model, tmp_path):
    expected = alone("slow", model, tmp_path / "alone")
    ranks = run("slow", model, tmp_path / "out")
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert found(tmp_path / "out", 0) == expected == found(tmp_path / "out", 1)


def test_only_rank_0_has_requests(model, tmp_path):
    expected = alone("serve", model, tmp_path / "alone")
    ranks = run("serve", model, tmp_path / "out")
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert found(tmp_path / "out", 0) == expected and "again" in expected and found(tmp_path / "out", 1) == {}


@pytest.mark.parametrize(
    "program, words",
    [
        ("others", "call 2 of generate and chat on rank 1 that rank 0 does not make: prompt"),
        ("more", "closed"),
        ("hotter", "asked with temperature=0.5, here with temperature=1.5"),
    ],
)
def test_calls_that_rank_0_does_not_make_are_refused(program, words, model, tmp_path):
    (first, said0), (second, said1) = run(program, model, tmp_path / "out")
    assert (first, second) == (0, 1 if program == "more" else 2), (said0, said1)
    assert words in said1 and "Traceback" not in said0 + said1


def test_another_model_on_one_rank_is_refused_on_all_before_loading(model, tmp_path):
    here = tmp_path / "model"
    here.symlink_to(model)
    config = json.loads((Path(model) / "config.json").read_text())
    shutil.copytree(model, f"{here}.differs")
    Path(f"{here}.differs", "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    host = socket.gethostname()
    for code, said in run("differs", str(here), tmp_path / "out"):
        assert code == 2 and "Traceback" not in said
        assert f"norm_topk_prob in config.json of rank 1 on {host} is False, of rank 0 on {host} True\n" in said


def test_the_end_of_a_program_is_orderly(model, tmp_path):
    for _ in range(3):
        ranks = run("ends", model, tmp_path / "out")
        assert [code for code, _ in ranks] == [0, 0], ranks
    ranks = run("raises", model, tmp_path / "out")
    assert [code for code, _ in ranks] == [7, 7], ranks


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_and_the_other_ends_in_good_order(victim, model, tmp_path):
    ranks = run("dies", model, tmp_path / f"out.{victim}")
    code, said = ranks[1 - victim]
    assert ranks[victim][0] == -9 and code == 1, ranks
    assert f"lost rank {victim}" in said and "Traceback" not in said


def test_a_rank_that_is_stopped_is_named_though_nobody_asks_for_anything(model, tmp_path):
    (code, said), _ = run("stopped", model, tmp_path / "out", GLIMMER_HEARTBEAT_TIMEOUT="1")
    before, _, after = said.partition("rank 0 asks")
    assert code == 1 and "lost rank 1 on" in before and "lost rank 1 on" in after and "Traceback" not in said


@pytest.mark.parametrize("program", ["drafts", "paying"])
def test_drafts_on_several_ranks(program, tmp_path):
    """All ranks propose the same, as many as rank 0 says; the answers are those without drafts."""
    demo = Path(__file__).resolve().parents[1] / "glimmer/demo"
    ranks = run(program, str(demo), tmp_path / "out")
    assert [code for code, _ in ranks] == [0, 0], ranks
    mine, theirs = found(tmp_path / "out", 0), found(tmp_path / "out", 1)
    assert mine == theirs and mine["drafted"] == mine["plain"] and mine["accepted"] > 0


def test_kv_blocks_on_disk_of_several_ranks(model, tmp_path):
    """Each rank reads its own part, and only as much as all ranks have: one has lost the third of four pages."""
    ranks = run("disk", model, tmp_path / "out")
    assert [code for code, _ in ranks] == [0, 0], ranks
    first = [found(tmp_path / "out", rank) for rank in (0, 1)]
    parts = [path for path in (tmp_path / "out.kv").iterdir() if path.is_dir()]
    pages = [sorted(part.glob("*.kv"), key=lambda path: -path.stat().st_mtime_ns) for part in parts]
    assert [len(files) for files in pages] == [4, 4], "the beginning is the latest"
    pages[0][2].write_bytes(b"damaged")
    ranks = run("disk", model, tmp_path / "out")
    assert [code for code, _ in ranks] == [0, 0], ranks
    second = [found(tmp_path / "out", rank) for rank in (0, 1)]
    assert [one["read"] for one in first + second] == [0, 0, 256, 256]
    assert [one["cached"][0] for one in first + second] == [0, 0, 256, 256]
    assert all(one["answers"] == first[0]["answers"] for one in first + second)
    assert sorted(one["damaged"] for one in second) == [0, 1]
