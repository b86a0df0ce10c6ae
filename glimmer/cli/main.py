"""The command line: `glimmer COMMAND`. Each command has a file of its own here; this one finds it and runs it.

A command NAME is the file NAME.py (its words joined by `_`) with `COMMAND`, the options that it takes (options.py), and
`main(argv)`, which returns the exit code; its line in COMMANDS below is all that it needs besides. Nothing here imports
torch.
"""

import difflib
import importlib
import os
import re
import sys

from glimmer import __version__
from glimmer.cli import exits
from glimmer.errors import ConfigError

COMMANDS = {
    "predict": "answer one prompt, several, or a file of them",
    "chat": "talk to a model in the terminal",
    "serve": "answer over HTTP: OpenAI's API, and others",
    "run-batch": "answer the requests of a file, in OpenAI's batch format",
    "demo": "a city, a sum and a tool call, with their speed",
    "bench": "measure loading, prefill and decode on this machine",
    "bench serve": "measure a server, ours or another, under load",
    "quantize": "write a checkpoint with fp8, int8 or int4 matrices",
    "prepare": "write a model's packed file, from which it starts at once",
    "plan": "what a model needs, what fits here, and how fast it will be",
    "doctor": "what this machine has, and which operations will serve",
}

HELP = """\
usage: glimmer COMMAND [options]

Runs the GLM-4.5 family (GLM-4.5, 4.5-Air, 4.6, 4.7) from a Hugging Face directory, in one process or many.

commands
{commands}

options
  -h, --help       this page
  -V, --version    the version

examples
  glimmer predict "请介绍一下北京"                           the demo model that comes with glimmer
  glimmer predict --model DIR --chat "Why is the sky blue?"
  torchrun --nproc-per-node 8 -m glimmer predict --model DIR --tensor-parallel-size 8 "请介绍一下北京"
  glimmer bench DIR

Each command has its own --help. Settings of the engine and of sampling may also stand in the environment, as
GLIMMER_<NAME> (GLIMMER_MAX_MODEL_LEN=4096), and in a YAML file that --config names; the command line is the strongest.
To complete commands, options and their values in bash or zsh: eval "$(register-python-argcomplete glimmer)"
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code, as exits.py lists them."""
    argv = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        importlib.import_module("glimmer.cli.completion").complete(os.environ.get("COMP_LINE", ""))
    length = 2 if " ".join(argv[:2]) in COMMANDS else 1  # `bench serve` is a command, not `bench` of a directory
    name = " ".join(argv[:length]) or "--help"
    try:
        return exits.run(name, lambda: command(name, argv[length:]))
    except KeyboardInterrupt:
        exits.write("")  # what has been printed so far, for the process ends without further ado
        exits.to_stderr(f"\nglimmer {name}: interrupted")
        return exits.INTERRUPTED


def command(name: str, argv: list[str]) -> int:
    """Find the command and run it."""
    if name in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())), end="")
        return 0
    if name in ("-V", "--version"):
        print(f"glimmer {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        todo = f"did you mean {near[0]!r}? See glimmer --help" if near else "see glimmer --help"
        refusal = ConfigError(f"no command {name!r}", " or ".join(COMMANDS), todo)
        exits.to_stderr(f"glimmer: {refusal}")
        return refusal.exit_code
    with exits.importing():
        found = importlib.import_module(module(name))
    code: int = found.main(argv)
    return code


def module(name: str) -> str:
    """The module of a command."""
    return f"glimmer.cli.{re.sub('[ -]', '_', name)}"
