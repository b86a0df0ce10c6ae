"""A program that prints, as one JSON line, what this machine can do at best: see Backend.limits.

usage: limits.py EXTENSION ISA THREADS. It needs nothing but the extension's own file, so that it is ready in a moment.
"""

import importlib.util
import json
import sys

BYTES = 512 << 20  # read at once: more than the caches that these threads share


def main() -> None:
    """Measure and print."""
    spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
    assert spec is not None and spec.loader is not None, "an extension module has a loader"
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    native.select(sys.argv[2])
    pool = native.Pool(int(sys.argv[3]))
    arithmetic = {kind: native.arithmetic(pool, kind) for kind in ("bfloat16", "int8")}
    print(json.dumps({"read": native.read_bandwidth(pool, BYTES), **arithmetic}))


if __name__ == "__main__":
    main()
