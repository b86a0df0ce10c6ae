"""Completion by argcomplete, asked as bash asks: commands, options and their values, without torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glimmer.cli.completion import parser
from glimmer.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
BASH = """
eval "$("$PYTHON" -c 'from argcomplete.shell_integration import shellcode; print(shellcode(["glimmer"]))')"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9 COMP_WORDS=($1) COMP_CWORD=1 COMPREPLY=()
_python_argcomplete glimmer
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def complete(tmp_path):
    """complete(line) -> what bash offers at its end."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    command = tmp_path / "bin" / "glimmer"
    command.parent.mkdir()
    # torch that cannot be imported: completion has no need of it
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m glimmer "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    env = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": path, "PYTHON": sys.executable}

    def ask(line: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", BASH, "bash", line], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split()

    return ask


@pytest.mark.parametrize(
    "line, offered",
    [
        ("glimmer pre", ["predict", "prepare"]),
        ("glimmer predict --dty", ["--dtype"]),
        ("glimmer predict --dtype ", ["auto", "bfloat16", "float32"]),
        ("glimmer bench --kv-cache-dtype i", ["int8"]),
        ("glimmer quantize --quantization ", ["fp8", "int8", "int4"]),
        ("glimmer predict --device c", ["cpu", "cuda"]),
        ("glimmer predict --max-num-seqs ", []),
        ("glimmer predict --model bi", ["bin/"]),
        ("glimmer bench bi", ["bin/"]),
        ("glimmer bench ser", ["serve"]),
        ("glimmer bench serve --endpoint ", ["completions", "chat"]),
        ("glimmer bench --endp", []),
    ],
)
def test_what_the_shell_offers(complete, line, offered):
    assert complete(line) == offered


def test_every_command_is_offered(complete):
    assert {name for name in COMMANDS if " " not in name} <= set(complete("glimmer "))


def test_the_parser_knows_every_option():
    page = parser().format_help()
    assert all(name in page for name in COMMANDS if " " not in name)
