"""`glimmer bench` on a tiny checkpoint: every figure that was asked for, and what stands beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glimmer.backends import op_times
from glimmer.backends.selection import choose
from glimmer.cli import bench
from glimmer.cli.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(checkpoint, capsys, monkeypatch):
    """run(*options) -> (table, the figures of its last line)."""

    monkeypatch.setattr(op_times, "ROUND_SECONDS", 1e-4)

    def command(*options: str) -> tuple[str, dict]:
        once = () if "--repeat" in options else ("--repeat", "1")
        assert bench.main([str(checkpoint()), "--device", "cpu", "--steps", "2", *once, *options]) == 0
        table, _, line = capsys.readouterr().out.strip().rpartition("\n")
        return table, json.loads(line)

    return command


def test_every_figure_with_its_share_of_the_limits(run):
    # The best of several, since shares are rounded: so small a model reaches less than a thousandth in a busy moment.
    table, figures = run("--prefill", "20", "--decode", "1", "3", "--threads", "1", "--repeat", "4")
    keys = {"prefill_20", "decode_b1", "decode_b3"}
    assert all(figures[key] > 0 for key in keys) and figures["quantization"] is None
    assert figures["peak_memory_gib"] >= figures["load_peak_memory_gib"] > 0
    assert "prefill of 20 tokens" in table and "decode, batch 3" in table and "scheduler" not in table
    if choose(torch.device("cpu")).kernels is None:
        assert figures["percent"] == {} and "no percentages" in table
    else:
        assert set(figures["percent"]) == set(figures["limits"]) == keys
        assert all(share["bandwidth"] > 0 and "arithmetic" in share for share in figures["percent"].values())
        assert set(figures["predicted"]) == keys and min(figures["predicted"].values()) > 0 and "predicted" in table
        assert "% of bandwidth" in table and "% of arithmetic" in table and "limit beside them: read" in table


def test_the_reference_has_no_limits_and_says_so(run, monkeypatch):
    monkeypatch.setenv("GLIMMER_BACKEND", "reference")
    table, figures = run("--prefill", "--decode", "2")
    assert figures["percent"] == {} and "no percentages" in table and "% of" not in table


def test_profile_is_a_picture_of_each_figure(run):
    table, figures = run("--prefill", "30", "--decode", "2", "--profile")
    assert set(figures["profile_ms"]) == {"prefill_30", "decode_b2"}
    for parts in figures["profile_ms"].values():
        assert {"attention", "experts", "lm_head", "between operations", "scheduler, batch"} <= set(parts)
    assert table.count("█" * bench.BAR) >= 2 and "all others" in table


def test_decoding_after_long_prompts(run):
    """Longer together than a step computes: the first decode while the last still read their prompts."""
    table, figures = run("--prefill", "--decode", "3", "--context", "1500")
    assert figures["decode_b3_after_1500"] > 0 and "after 1,500" in table


def test_sequences_that_do_not_fit_together_are_refused(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("glimmer.device.default_cache", lambda device: 1)
    assert main(["bench", str(checkpoint()), "--prefill", "--decode", "4", "--context", "200", "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert "do not decode together" in error and "expected:" in error and "to do:" in error


@pytest.mark.parametrize("option", ["--prefill", "--decode", "--steps", "--context", "--threads", "--repeat"])
def test_counts_are_positive(option, capsys):
    assert main(["bench", "/nowhere", option, "0"]) == 2
    err = capsys.readouterr().err
    assert f"{option[2:]}=" in err and ("a whole number" in err or "whole numbers from 1 on" in err)


@pytest.mark.slow
def test_the_number_of_processes_is_that_of_torchrun(checkpoint):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glimmer"]
    command += ["bench", str(checkpoint()), "--device", "cpu", "--steps", "2", "--repeat", "1", "--threads", "1"]
    command += ["--prefill", "20", "--decode", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["processes"] == 2 and figures["prefill_20"] > 0 and figures["decode_b2"] > 0


def test_what_drafts_bring(run, checkpoint, capsys):
    assert (
        bench.main(["--device", "cpu", "--steps", "2", "--prefill", "--decode", "1", "--speculative", "--mtp", "2"])
        == 0
    )
    table, _, line = capsys.readouterr().out.strip().rpartition("\n")
    found = json.loads(line)["speculative"]["b1"]
    assert found["gain"] > 0 and 1.5 < found["tokens_per_step"] <= 3
    assert len(found["accepted"]) == 2 and found["accepted"][0] > 0.9
    assert "drafts, batch 1" in table and "tokens a step" in table
    table, figures = run("--prefill", "--decode", "1", "--speculative")
    assert "no drafts" in table and figures["speculative"] == {}
