"""Modules that are imported when they are first used.

torch takes seconds to import. A command's help, its refusals and the shell's completion need none of it, so a command
names the modules that bring torch at the top of its file through `lazy`, where a reader looks for imports. (Not
importlib.util.LazyLoader: its unfinished modules are seen, and run too early, by whatever walks through sys.modules.)
"""

import importlib
import sys
from typing import Any

from glimmer.cli import exits


class lazy:
    """The module `name`: it is imported when one of its attributes is first read."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if self._name not in sys.modules:
            with exits.importing():
                importlib.import_module(self._name)
        return getattr(sys.modules[self._name], attribute)
