"""`glimmer doctor`: what this machine has, which libraries, and which operations will serve on each device."""

import importlib.metadata
import platform
from typing import TYPE_CHECKING

from glimmer import __version__
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, Command, pick

if TYPE_CHECKING:
    from glimmer import device as devices
    from glimmer.backends import selection
else:
    selection, devices = lazy("glimmer.backends.selection"), lazy("glimmer.device")

LIBRARIES = ("torch", "tokenizers", "safetensors", "jinja2", "omegaconf", "torch-npu")

COMMAND = Command(
    "doctor",
    "What this machine has, which libraries, and which operations will serve on a device.",
    "[options]",
    {"engine": pick(ENGINE, "device")},
)


def main(argv: list[str]) -> int:
    """Print the findings; 0 always, for a finding is not a failure."""
    if COMMAND.asks_for_help(argv):
        return 0
    device = devices.resolve(COMMAND.read(argv).take("device", "auto"), 0)
    kind, threads = device.type, devices.share_cores(1)
    ops = selection.choose(device, threads)
    rows = [
        ("glimmer", f"{__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        *devices.describe(),
        *((name, _version(name)) for name in LIBRARIES),
        ("device", f"{kind} (of {', '.join(devices.available())}), collectives by {devices.COLLECTIVES[kind]}"),
        ("threads", f"{threads} unless --threads says otherwise"),
        ("kernels", ops.kernels or "none of our own"),
        *((f"op {op}", backend) for op, backend in ops.table()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, finding in rows:
        print(f"{name:<{width}}  {finding}")
    return 0


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
