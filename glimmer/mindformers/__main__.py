"""`python -m glimmer.mindformers`: the launcher, launch.py, with Ctrl-C as glimmer/__main__.py has it."""

from glimmer.__main__ import main  # isort: split

import os
import sys

if __name__ == "__main__":
    code = main("glimmer.mindformers.launch")
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread that hears from the store while the interpreter is finalised would abort the process.
    os._exit(code)
