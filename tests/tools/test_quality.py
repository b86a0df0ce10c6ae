"""The table of what quantisation costs: its rows, its figures' plausibility, and its place in a document."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("quality", ROOT / "tools" / "quality.py")
quality = importlib.util.module_from_spec(spec)
sys.modules["quality"] = quality  # its dataclasses look their module up
spec.loader.exec_module(quality)


@pytest.fixture
def run(monkeypatch, capsys, demo):
    """run(*arguments) -> what it prints, from a few short texts."""
    monkeypatch.setattr(quality, "COUNTS", {"sum": 2, "fact": 2})

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quality.py", "--model", str(demo), "--device", "cpu", *arguments])
        quality.main()
        return capsys.readouterr().out

    return call


def rows(text: str) -> dict[str, list[float]]:
    """form -> size in percent, KL, agreement in percent, perplexity"""
    found = re.findall(r"^\| (\S.*?) \| (\d+)% \| (\S+) \| (\S+)% \| (\S+) \|$", text, re.M)
    return {form: list(map(float, figures)) for form, *figures in found}


def test_every_form_has_a_row(run):
    found = rows(run())
    assert list(found) == list(quality.FORMS)
    size, kl, same, perplexity = zip(*found.values())
    assert size[0] == 100 and list(size) == sorted(size, reverse=True) and size[-1] < 50
    assert kl[0] == 0 and 0 < kl[1] < 0.01 and 0 < kl[2] < kl[3] < 0.05 and 0 < kl[4] < 0.05
    assert same[0] == 100 and min(same) > 90
    assert all(1 <= p < 1.5 for p in perplexity), "it knows what it was trained to write"


def test_the_table_takes_its_place_in_a_document(run, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{quality.BEGIN}\nold\n{quality.END}\nafter\n")
    text = tmp_path / "text.txt"
    text.write_text("北京是中国的首都。" * 20)
    printed = run("--text", str(text), "--write", str(document))
    written = document.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert rows(written) == rows(printed) and "text.txt" in written
    document.write_text("no marks")
    with pytest.raises(SystemExit, match="0 places"):
        run("--text", str(text), "--write", str(document))


def test_the_page_has_a_place_for_it():
    page = (ROOT / "docs" / "numerics.md").read_text()
    assert page.count(quality.BEGIN) == page.count(quality.END) == 1
