"""The command line: `glimmer COMMAND`. Each command has a file of its own; this one only finds it.

Errors that glimmer raises on purpose become three lines and an exit code here, never a traceback, and so does Ctrl-C,
even while a command and torch with it are still being imported, which takes seconds.
"""

import importlib
import sys

from glimmer import __version__
from glimmer.errors import ConfigError, GlimmerError

HELP = """\
usage: glimmer COMMAND [options]

Runs the GLM-4.5 family (GLM-4.5, 4.5-Air, 4.6, 4.7) from a Hugging Face directory, in one process or many.

commands
  predict   answer one prompt, several, or a file of them
  demo      a city, a sum and a tool call, with their speed
  bench     measure loading, prefill and decode on this machine
  quantize  write a checkpoint with int8 or int4 matrices
  doctor    what this machine has, and which operations will serve

examples
  glimmer predict "请介绍一下北京"                           the demo model that comes with glimmer
  glimmer predict --model DIR --chat "Why is the sky blue?"
  torchrun --nproc-per-node 8 -m glimmer predict --model DIR --tensor-parallel-size 8 "请介绍一下北京"
  glimmer bench DIR

Each command has its own --help. `glimmer --version` prints the version.
"""

COMMANDS = {
    "predict": "glimmer.predict",
    "demo": "glimmer.showcase",
    "bench": "glimmer.bench",
    "quantize": "glimmer.quantize",
    "doctor": "glimmer.doctor",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 the engine failed, 2 bad input, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        print(f"glimmer {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        refusal = ConfigError(f"no command {argv[0]!r}", " or ".join(COMMANDS), "see glimmer --help")
        print(f"glimmer: {refusal}", file=sys.stderr)
        return refusal.exit_code
    try:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    except GlimmerError as error:
        print(f"glimmer {argv[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nglimmer {argv[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
