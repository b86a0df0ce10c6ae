"""`glimmer doctor`: what this machine has, which libraries, and which operations will serve on each device."""

import argparse
import importlib.metadata
import platform

from glimmer import __version__, backends
from glimmer import device as devices

LIBRARIES = ("torch", "tokenizers", "safetensors", "jinja2", "omegaconf", "torch-npu")


def main(argv: list[str]) -> int:
    """Print the findings; 0 always, for a finding is not a failure."""
    parser = argparse.ArgumentParser("glimmer doctor", description=__doc__)
    parser.add_argument("--device", default="auto", help="whose operations to list: auto, cpu, cuda or npu")
    args = parser.parse_args(argv)
    device = devices.resolve(args.device, 0)
    kind, threads = device.type, devices.share_cores(device, 1)
    ops = backends.choose(kind, threads)
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
