"""MindFormers' name for `glimmer predict`: the same arguments and the same YAML keys (docs/mindformers.md)."""

import sys

if __name__ == "__main__":
    try:
        from pathlib import Path

        from glimmer.__main__ import main

        sys.exit(main("glimmer.cli.predict", sys.argv[1:], home=Path(__file__).resolve().parent))
    except ModuleNotFoundError as missing:
        sys.exit(
            f"run_mindformer.py: {missing} for {sys.executable}\n"
            "  expected: the Python in which glimmer is installed\n"
            "  to do:    run `make demo` once, then .venv/bin/python run_mindformer.py ..."
        )
    except KeyboardInterrupt:  # importing torch takes seconds
        sys.exit(130)
