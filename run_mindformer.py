"""MindFormers' name for `glimmer predict`: the same arguments and the same YAML keys (docs/mindformers.md)."""

import sys
from pathlib import Path

from glimmer.predict import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], home=Path(__file__).resolve().parent))
