"""`glimmer demo`: three answers of the demo model with their speed, in words that anybody can check."""

import re

from glimmer.cli import demo
from glimmer.cli.main import main


def test_three_answers_and_their_speed(capsys):
    assert main(["demo"]) == 0
    city, total, call = capsys.readouterr().out.split("## ")[1:]
    assert demo.CITY in city and "中国的首都" in city
    assert re.search(r"<think>.*7\+6=13.*</think>\n.*933", total)
    assert "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>巴黎</arg_value>\n</tool_call>" in call
    for part in (city, total, call):
        tokens, speed = re.search(r"\((\d+) tokens in [\d.]+ s: (\d+) tokens/s\)", part).groups()
        assert int(tokens) > 10 and int(speed) > 0


def test_any_checkpoint_will_do(checkpoint, capsys):
    assert main(["demo", str(checkpoint()), "--dtype", "float32", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.count("(3 tokens in ") == 3


def test_a_missing_checkpoint_is_an_error_in_words(tmp_path, capsys):
    assert main(["demo", str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_installation_without_the_demo_model_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    for command in (["demo"], ["bench"], ["predict", "hi"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "no demo model" in err and "expected: " in err and "to do: " in err
    assert list(tmp_path.iterdir()) == []
