"""A program that prints, as one JSON line, what this machine can do at best: see Backend.limits.

usage: limits.py EXTENSION ISA THREADS. It needs nothing but the extension's own file, so that it is ready in a moment.
"""

import importlib.util
import json
import sys
from pathlib import Path

BYTES = 512 << 20  # read at once: more than the caches that these threads share
CACHED = 8 << 20  # the same for what they hold
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def main() -> None:
    """Measure and print."""
    spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
    assert spec is not None and spec.loader is not None, "an extension module has a loader"
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    native.select(sys.argv[2])
    pool = native.Pool(int(sys.argv[3]))
    arithmetic = {kind: native.arithmetic(pool, kind) for kind in ("bfloat16", "int8")}
    reads = {"read": native.read_bandwidth(pool, BYTES), "cached": native.read_bandwidth(pool, CACHED)}
    print(json.dumps(reads | arithmetic | {"cache": cache_bytes()}))


def cache_bytes() -> int:
    """Bytes of the largest cache; 0 where the system does not say."""
    sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")), default=0)


if __name__ == "__main__":
    main()
