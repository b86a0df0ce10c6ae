"""Every error that glimmer raises on purpose.

    GlimmerError
    ├── ConfigError        a setting, a config.json key or a command-line value      -> exit 2
    ├── CheckpointError    a directory, a file or a tensor of a checkpoint           -> exit 2
    ├── NotEnoughMemory    weights or cache do not fit                               -> exit 2
    ├── RequestError       one request is refused; carries the field; HTTP 400       -> exit 2
    └── EngineError        a rank failed, a kernel did, or the model did             -> exit 1

Each message has three parts: what was found, what was expected, what to do. They are separate attributes, so that a
terminal can show them on three lines and a server as one sentence. Asserts elsewhere are for our own invariants.
"""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: Any) -> str:
    """repr for a message, whatever the value: cut to a line, and a description of what cannot be printed."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a number of {value.bit_length()} bits"
    try:
        return _SHORT.repr(value)
    except Exception:  # Python prints no integer of more than 4,300 digits; a caller's class may print nothing at all
        return f"a {type(value).__name__} that cannot be printed"


class GlimmerError(Exception):
    """found, expected, todo: three phrases without a final full stop. `exit_code` is what a command ends with."""

    exit_code = 2

    def __init__(self, found: str, expected: str, todo: str):
        super().__init__(found, expected, todo)
        self.found, self.expected, self.todo = found, expected, todo

    def __str__(self) -> str:
        return f"{self.found}\n  expected: {self.expected}\n  to do:    {self.todo}"


class ConfigError(GlimmerError):
    """A setting that cannot be served: wrong value, wrong type, or a combination that makes no sense."""


class CheckpointError(GlimmerError):
    """A model directory that cannot be used: files missing or corrupt, tensors missing, unread or misshapen."""


class NotEnoughMemory(GlimmerError):
    """Weights or cache need more memory than there is; said before anything is loaded."""


class RequestError(GlimmerError):
    """One request that cannot be served. `field` names the parameter at fault ("prompt", "temperature", ...)."""

    def __init__(self, field: str, found: str, expected: str, todo: str):
        super().__init__(found, expected, todo)
        self.field = field


class EngineError(GlimmerError):
    """Something that was running has failed: another rank, a kernel, or the arithmetic of the model."""

    exit_code = 1
