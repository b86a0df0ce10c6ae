"""`glimmer` itself: its help and version without torch, commands found by name, and how commands end."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glimmer import __version__
from glimmer.cli import demo, exits
from glimmer.cli.main import COMMANDS, main, module
from glimmer.errors import ConfigError, EngineError

ROOT = Path(__file__).resolve().parents[2]
LIGHT = """
import sys
from glimmer.cli.main import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "tokenizers", "numpy", "omegaconf"} & set(sys.modules))
sys.exit(f"imported {heavy}" if heavy else code)
"""


def process(*argv: str, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, timeout=60, **options)


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["-V"], *([*name.split(), "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_and_version_import_nothing_heavy(argv):
    done = process("-c", LIGHT, *argv)
    assert done.returncode == 0 and done.stdout and done.stderr == "", done.stderr


@pytest.mark.parametrize("argv", [["--fly"], ["predict", "--fly"], ["bench", "-x"], ["quantize"]], ids=" ".join)
def test_a_refusal_of_the_command_line_imports_nothing_heavy(argv):
    done = process("-c", LIGHT, *argv)
    assert done.returncode == 2 and "expected: " in done.stderr, done.stderr


@pytest.mark.parametrize("typed, meant", [("predictt", "predict"), ("server", "serve"), ("runbatch", "run-batch")])
def test_a_mistyped_command_is_told_the_near_one(typed, meant, capsys):
    assert main([typed]) == 2
    assert f"did you mean {meant!r}?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2 and "did you mean" not in capsys.readouterr().err


def test_version(capsys):
    for word in ("--version", "-V"):
        assert main([word]) == 0
        assert capsys.readouterr().out == f"glimmer {__version__}\n"
    assert process("-m", "glimmer", "--version").stdout == f"glimmer {__version__}\n"
    for name in COMMANDS:
        assert main([*name.split(), "--version"]) == 0 and capsys.readouterr().out == f"glimmer {__version__}\n", name


def test_every_command_has_its_file_and_says_its_name(capsys):
    files = {path.stem for path in (ROOT / "glimmer/cli").glob("*.py")}
    for name in COMMANDS:
        assert module(name).rpartition(".")[2] in files and importlib.import_module(module(name)).COMMAND.name == name
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name:12}{about}\n" in out for name, about in COMMANDS.items())
    assert "register-python-argcomplete glimmer" in out


CTRL_C = "def ctrl_c(number=2):\n    os.kill(os.getpid(), number)\n    sum(range(10**5))\n"
MAIN = "from glimmer.__main__ import main\n"


@pytest.mark.parametrize(
    "program, code",
    [
        (f"{MAIN}ctrl_c()", 130),
        (f"{MAIN}ctrl_c()\nsys.exit(main())", 130),
        (f"{MAIN}atexit.register(ctrl_c)\nsys.exit(main())", 130),
        (f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{MAIN}ctrl_c()\nsys.exit(main())", 0),
    ],
    ids=["before", "at once", "after", "ignored"],
)
def test_ctrl_c_before_and_after_a_command_is_quiet(program, code):
    done = process("-c", f"import atexit, os, signal, sys\n{CTRL_C}sys.argv[1:] = ['--version']\n{program}\n")
    assert (done.returncode, done.stderr) == (code, "") and done.stdout in ("", f"glimmer {__version__}\n")


SWALLOWS = "import os, signal, sys\ntry:\n    os.kill(os.getpid(), int(sys.argv[1]))\nexcept BaseException:\n    pass\n"


@pytest.mark.parametrize("number, code, line", [(signal.SIGINT, 130, "\n"), (signal.SIGTERM, -signal.SIGTERM, "")])
def test_a_library_that_swallows_what_is_raised_while_it_is_imported_swallows_no_signal(number, code, line, tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    program = "from glimmer.cli import exits, lazy\nexits.run('x', lambda: lazy.lazy('swallows').os.getpid())\n"
    done = process("-c", program, str(number.value), cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{line}glimmer x: interrupted\n")


def stay(seconds: int) -> str:
    """The program that sets how long a refused rank stays."""
    return f"import glimmer.cli.exits\nglimmer.cli.exits.OTHERS = {seconds}\n"


@pytest.mark.parametrize("moment", ["atexit.register(ctrl_c, 15)\n", "sys.exit = lambda code: (ctrl_c(15), exit(0))\n"])
def test_a_refused_rank_keeps_its_exit_code_when_the_launcher_ends_it(moment):
    """SIGTERM comes when the refusal has been told, before the interpreter has ended."""
    refused = f"{CTRL_C}sys.argv[1:] = ['bench', '--fly']\n{moment}{stay(0)}{MAIN}sys.exit(main())"
    program = f"import atexit, os, signal, sys\n{refused}"
    done = process("-c", program, env={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and "no key 'fly'" in done.stderr, done


def test_a_refused_rank_stays_until_the_others_can_have_refused_too():
    """torchrun ends the others as soon as one has ended: by a signal, which would be blamed in place of the refusal."""
    program = f"import sys\nsys.argv[1:] = ['bench', '--fly']\n{stay(60)}{MAIN}sys.exit(main())"
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    with subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stderr is not None and "no key 'fly'" in rank.stderr.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(1)
            rank.terminate()
            assert rank.wait(30) == 2
        finally:
            rank.kill()


def test_how_commands_end(capsys):
    def fail(error: BaseException):
        raise error

    assert exits.run("x", lambda: 0) == 0
    assert exits.run("x", lambda: fail(ConfigError("a", "b", "c"))) == 2
    assert capsys.readouterr().err == "glimmer x: a\n  expected: b\n  to do:    c\n"
    assert exits.run("x", lambda: fail(EngineError("a", "b", "c"))) == 1
    assert exits.run("x", lambda: fail(RuntimeError("can't start new thread"))) == 2  # there is no memory for its stack
    with pytest.raises(KeyboardInterrupt):
        exits.run("x", lambda: fail(KeyboardInterrupt()))


@pytest.mark.slow
@pytest.mark.parametrize("argv", ["doctor --device cpu", "--help", "predict --help"])
def test_a_closed_pipe_is_no_traceback(argv):
    with os.fdopen(closed_pipe(), "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "glimmer", *argv.split()], env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == exits.CLOSED_PIPE and "Error" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["a closed pipe", "/dev/full"])
def test_answers_are_saved_even_if_nobody_can_read_them(lost, checkpoint, tmp_path):
    command = [sys.executable, "-m", "glimmer", "predict", "--model", str(checkpoint(dtype="float32"))]
    command += ["--max-model-len", "64", "--max-tokens", "3", "hello"]
    with os.fdopen(os.open(lost, os.O_WRONLY) if lost == "/dev/full" else closed_pipe(), "w") as out:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, cwd=tmp_path, stdout=out, stderr=-1, text=True, timeout=100)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert "hello" in (tmp_path / "text_generation_result.txt").read_text()
    assert ("cannot be printed" in done.stderr) == (lost == "/dev/full")


@pytest.mark.slow
def test_the_demo_model_is_never_silent(tmp_path):
    done = process("-m", "glimmer", "predict", "--max-tokens", "2", "hi", cwd=tmp_path)
    assert done.returncode == 0 and "the small demo model answers" in done.stderr


@pytest.mark.slow
def test_a_lost_stderr_decides_nothing():
    for lost in ("2>&-", "2>/dev/full"):
        command = f'"{sys.executable}" -m glimmer doctor --fly {lost}; echo $?'
        done = subprocess.run(
            ["sh", "-c", command],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == ("2\n", "")


COMMANDS_IN_A_ROW = """
import json, sys
from glimmer.cli.main import main
for argv in json.loads(sys.argv[1]):
    print(main(argv), file=sys.stderr)
"""


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may search every directory")
def test_a_path_that_may_not_be_searched_is_called_that(tmp_path):
    """By every way to a file, wherever permission is missing; it was said that there is no such directory."""
    closed, model = tmp_path / "closed", tmp_path / "model"
    for directory in (closed, model):
        directory.mkdir()
    (model / "config.json").write_text("{}")
    id = "zai-org/GLM-4.5-Air"
    argvs = [
        ["quantize", str(demo.MODEL), str(closed / "below/out"), "--quantization", "int8"],
        ["plan", str(model)],
        ["doctor", str(closed / "below")],
        ["doctor", id],
    ]
    words = (
        [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    )  # root may search all
    argv = [*words, sys.executable, "-c", COMMANDS_IN_A_ROW, json.dumps(argvs)]
    for directory in (closed, model):
        directory.chmod(0)
    try:
        run = subprocess.run(
            argv, env=os.environ | {"HF_HUB_CACHE": str(closed)}, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        for directory in (closed, model):
            directory.chmod(0o700)
    assert run.stderr.splitlines()[3::4] == ["2"] * 4 and run.stderr.count("permission denied\n") == 4, run.stderr
    for found in (closed / "below", model / "config.json", closed / "models--zai-org--GLM-4.5-Air"):
        assert str(found) in run.stderr
