"""Compile every Triton kernel for GPUs that are not here: launches become compilations.

The ops run on a CPU, in bfloat16, with the types, the constants and the specialisations that a launch would have on a
GPU; what they return is garbage, and nobody looks at it. Each kernel is compiled for each target, and once with each
value of each constant that is not a size; with the argument "all", so for each target. Prints for each: the target, the
kernel, the bytes of shared memory, and the constants.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from glimmer.backends.base import KVCacheSpec, RouteRule
from glimmer.backends.cuda.backend import Cuda
from glimmer.batch import Batch
from glimmer.weight import Weight

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip


SIZES = {"BLOCK", "ROWS", "COLUMNS", "INNER", "KEYS", "TOP_K", "CHOSEN", "GATHER", "SHARE", "D", "WIDTH"}
OPTIONS = ("num_warps", "num_stages")


def main() -> None:
    seen: set[tuple] = set()
    for target in TARGETS:
        JITFunction.run = compiler(target, seen)
        for rows in (1, 100):
            run_all(Cuda(torch.device("cpu")), rows)


def compiler(target: str, seen: set[tuple]):
    """What a launch does in place of launching; what has been compiled is added to `seen`."""

    def compile_it(kernel: JITFunction, *args, grid, warmup, **constants) -> None:
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        given = dict(zip(kernel.arg_names, args)) | constants
        where = target if sys.argv[1:] == ["all"] else ""
        values = {(where, kernel.__name__, name, constants[name]) for name in constants.keys() - SIZES}
        values.add((target, kernel.__name__))
        if values <= seen:
            return
        seen.update(values)
        types = {name: type_of(given[name]) for name in kernel.arg_names if name not in constants}
        fixed = {name: value for name, value in given.items() if types.get(name, "constexpr") == "constexpr"}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if name not in fixed and is_aligned(given[name])
        }
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        built = triton.compile(
            ASTSource(kernel, signature, fixed, aligned), target=TARGETS[target], options=options or None
        )
        print(target, kernel.__name__, built.metadata.shared, constants)

    return compile_it


def type_of(value) -> str:
    """As a launch of Triton's would have it: a number 1 is a constant."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 else "i32" if abs(value) < 2**31 else "i64"


def is_aligned(value) -> bool:
    """Whether Triton knows of it at a launch that it is a multiple of 16; a GPU's memory always is."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def run_all(ops: Cuda, rows: int) -> None:
    """Each op, with Air's widths divided by eight. One row decodes, after so many others that its keys are split."""
    bf16, hidden, width, experts = torch.bfloat16, 512, 176, 16
    norm, x = torch.ones(hidden, dtype=bf16), torch.ones(rows, hidden, dtype=bf16)
    ops.embed(torch.zeros(rows, dtype=torch.int64), x, 0)
    ops.rms_norm(x, norm, 1e-5)
    ops.add_rms_norm(x, x.float(), norm, 1e-5)
    ops.swiglu(x)
    ops.forbid_(torch.zeros(rows, 999), torch.zeros(rows, 125, dtype=torch.uint8))
    q, k, v = torch.ones(rows, 28, 128, dtype=bf16).split((24, 2, 2), 1)
    ops.rope_(q, k, torch.ones(rows, 32), torch.ones(rows, 32))
    ops.route(torch.zeros(rows, experts), torch.zeros(experts), RouteRule(8, 1, 1, True, 1.0))
    ids = torch.arange(8).expand(rows, -1).contiguous()
    for kind in ("plain", "fp8", "int8", "int4"):
        make = lambda n, k: Weight.empty(kind, (n, k), 32, dtype=bf16, device="cpu")  # noqa: B023
        ops.linear(x, ops.pack_linear([make(300, hidden)], bf16), norm[:300])
        each = [([make(width, hidden), make(width, hidden)], make(hidden, width))] * experts
        ops.experts(x, ids, torch.ones(rows, 8), ops.pack_experts(each, experts, bf16))
    blocks, length = (list(range(100)), 1500) if rows == 1 else (list(range(7)), rows)
    batch = Batch.of([0] * rows, [0] * rows, [0] * rows, [blocks], [0], [rows], [length])
    for dtype in (bf16, torch.int8):
        (cache,) = ops.allocate_kv(KVCacheSpec(1, 16, 2, 128, dtype), 200)
        ops.store_kv_(k, v, cache, batch.slot_mapping)
        ops.attention(q, cache, batch, 0.1)


if __name__ == "__main__":
    main()
