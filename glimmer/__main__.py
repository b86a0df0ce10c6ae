"""`python -m glimmer`, and `torchrun -m glimmer`: the command line. All of it is in cli/main.py."""

import sys

from glimmer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
