"""benchmarks/peers.py with scripted engines: ratios, medians, failures that stay in sight, and README's marks."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("peers", BENCHMARKS / "peers.py")
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)

OURS = {
    "engine": "glimmer",
    "load_s": 2.0,
    "load_peak_memory_gib": 1.0,
    "peak_memory_gib": 1.5,
    "decode_b1": 30.0,
    "percent": {"decode_b1": {"bandwidth": 88.0, "arithmetic": 3.0}},
    "limits": {"decode_b1": {"read": 4e10, "bfloat16": 9e11, "int8": 2e12}},
}
THEIRS = {"engine": "transformers 5", "load_s": 3.0, "peak_memory_gib": 3.0, "decode_b1": 10.0}


@pytest.fixture
def compare(monkeypatch, tmp_path, capsys):
    """compare(script, *options) -> (stdout, commands); script(command, how many came before) -> figures."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"x" * 1000)
    commands: list[list[str]] = []

    def command(script, *options: str) -> tuple[str, list[list[str]]]:
        def run(words, timeout):
            commands.append([str(word) for word in words])
            return script(commands[-1], len(commands) - 1)

        monkeypatch.setattr(peers, "run", run)
        monkeypatch.setattr(sys, "argv", ["peers.py", str(model), "--prefill", "--decode", "1", *options])
        peers.main()
        return capsys.readouterr().out, commands

    return command


def test_ratios_of_medians_and_the_order_of_runs(compare):
    rates = iter([20.0, 100.0, 30.0])
    script = lambda words, n: OURS | {"decode_b1": next(rates)} if "bench" in words else THEIRS
    out, commands = compare(script, "--rounds", "3")
    assert ["bench" in words for words in commands] == [True, False] * 3
    assert "| decode, batch 1, tokens/s | 30.00 | 88 % | 3 % | 10.00 | **3.00x** |" in out
    assert "| load, s | 2.00 |  |  | 3.00 | **1.50x** |" in out
    assert "| peak memory, GiB | 1.50 |  |  | 3.00 | **2.00x** |" in out
    assert "medians of 3" in out and "40.00 GB/s of reads" in out
    assert len(json.loads(out.splitlines()[-1])["glimmer bfloat16"]) == 3


def test_whoever_fails_is_in_the_table_and_not_asked_again(compare):
    def script(words, n):
        if "bench" in words:
            return OURS
        raise peers.Failed("exit code 1: out of luck")

    out, commands = compare(script, "--rounds", "2", "--peers", "transformers,vllm", "--vllm-python", "/a/python")
    assert sum("bench" in words for words in commands) == 2 and len(commands) == 4
    assert out.count("| failed | – | failed | – |") == 3
    assert "transformers, bfloat16: exit code 1: out of luck." in out and "vllm, bfloat16: exit code 1" in out
    out, _ = compare(script, "--peers", "vllm,llama.cpp")
    assert "vllm, bfloat16: not run: --vllm-python was not given." in out
    for form in ("bfloat16", "int8", "int4"):
        assert f"llama.cpp, {form}: not run: --llama-python was not given." in out


def test_llama_cpp_gets_its_files_and_a_second_chance(compare, monkeypatch, tmp_path):
    made = []

    def convert(words, **_):
        made.append(Path(words[3]).name)
        Path(words[3]).touch()
        return peers.subprocess.CompletedProcess(words, 0, "", "")

    def script(words, n):
        if "bench" in words:
            return OURS
        if "--plain" not in words:
            raise peers.Failed("exit code -11", crashed=True)
        return THEIRS | {"engine": "llama.cpp 1 Q8_0 plain"}

    monkeypatch.setattr(peers.subprocess, "run", convert)
    options = ["--peers", "llama.cpp", "--forms", "int8", "--llama-python", "/a/python", "--cache", str(tmp_path / "c")]
    out, _ = compare(script, *options)
    assert made == ["model-BF16.gguf", "model-Q8_0.gguf"]
    assert "**3.00x**" in out and "plain: with matrices as in the file" in out
    compare(script, *options)
    assert len(made) == 2, "they are there"


def test_write_replaces_what_is_between_the_marks(compare, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{peers.MARKS[0]}\nold\n{peers.MARKS[1]}\nafter\n")
    monkeypatch.setattr(peers, "HERE", tmp_path / "benchmarks")
    compare(lambda words, n: OURS if "bench" in words else THEIRS, "--write")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{peers.MARKS[0]}\n`model`") and text.endswith(f"{peers.MARKS[1]}\nafter\n")
    assert "old" not in text and "**3.00x**" in text
    readme = (BENCHMARKS.parent / "README.md").read_text()
    assert all(readme.count(mark) == 1 for mark in peers.MARKS)


def test_a_program_without_figures_has_failed_with_its_last_words():
    failing = "import sys; print('first', file=sys.stderr); sys.exit('glimmer: no such thing\\n  to do: another')"
    for program, words in ((failing, "exit code 1: glimmer: no such thing"), ("print('no figures')", "exit code 0")):
        with pytest.raises(peers.Failed, match=words):
            peers.run([sys.executable, "-c", program], 30)
    with pytest.raises(peers.Failed, match="not done within"):
        peers.run([sys.executable, "-c", "import time; time.sleep(9)"], 0.2)
    with pytest.raises(peers.Failed, match="No such file"):
        peers.run(["/nowhere/python"], 1)
    assert peers.run([sys.executable, "-c", "print('words'); print('{\"a\": 1}')"], 30) == {"a": 1}
