"""`python -m glimmer`, `torchrun -m glimmer` and `glimmer`: the command line. All of it is in cli/main.py."""

import importlib
import sys

INTERRUPTED = 130  # as cli/exits.py has it, which is not there yet


def main() -> int:
    """cli/main.py's main; Ctrl-C while that is being imported is quiet."""
    try:
        code: int = importlib.import_module("glimmer.cli.main").main()
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
