"""Modules that are imported when they are first used.

torch takes seconds to import. A command's help, its refusals and the shell's completion need none of it, so a command
names the modules that bring torch at the top of its file through `lazy`, where a reader looks for imports. (Not
importlib.util.LazyLoader: its unfinished modules are seen, and run too early, by whatever walks through sys.modules.)
"""

import importlib
from typing import Any


class lazy:
    """The module `name`: it is imported when one of its attributes is first read."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
