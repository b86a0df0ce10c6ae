"""Compile every Triton kernel for a GPU that is not here: launches become compilations.

usage: compile_kernels.py TARGET KINDS ROWS (two lists with commas: of weights, and of how many rows)

The ops run on a CPU, in bfloat16, with the types, the constants and the specialisations that a launch would have on a
GPU; what they return is garbage, and nobody looks at it. It prints the name of each kernel and how many forms of it
were compiled.
"""

import collections
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
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip


def main() -> None:
    target, kinds, counts = TARGETS[sys.argv[1]], sys.argv[2].split(","), list(map(int, sys.argv[3].split(",")))
    forms: dict[str, set] = collections.defaultdict(set)

    def compile_it(kernel: JITFunction, *args, grid, warmup, **constants) -> None:
        given = dict(zip(kernel.arg_names, args)) | constants
        types = {name: type_of(given[name]) for name in kernel.arg_names if name not in constants}
        fixed = {name: value for name, value in given.items() if types.get(name, "constexpr") == "constexpr"}
        form = (tuple(types.items()), tuple(fixed.items()))
        if form not in forms[kernel.__name__]:
            forms[kernel.__name__].add(form)
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            triton.compile(ASTSource(kernel, signature, fixed), target=target)

    JITFunction.run = compile_it
    run_all(Cuda(torch.device("cpu")), kinds, counts)
    for name, found in sorted(forms.items()):
        print(name, len(found))


def type_of(value) -> str:
    """As a launch of Triton's would have it: a number 1 is a constant."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 else "i32" if abs(value) < 2**31 else "i64"


def run_all(ops: Cuda, kinds: list[str], counts: list[int]) -> None:
    """Each op, with Air's widths divided by eight. One row decodes, after so many others that its keys are split."""
    bf16, hidden, width, experts = torch.bfloat16, 512, 176, 16
    norm = torch.ones(hidden, dtype=bf16)
    for rows in counts:
        x = torch.ones(rows, hidden, dtype=bf16)
        ops.embed(torch.zeros(rows, dtype=torch.int64), x, 0)
        ops.rms_norm(x, norm, 1e-5)
        ops.add_rms_norm(x, x.float(), norm, 1e-5)
        ops.swiglu(x)
        ops.forbid_(torch.zeros(rows, 999), torch.zeros(rows, 125, dtype=torch.uint8))
        q, k, v = torch.ones(rows, 28, 128, dtype=bf16).split((24, 2, 2), 1)
        ops.rms_norm(q, torch.ones(128, dtype=bf16), 1e-5)
        ops.rope_(q, k, torch.ones(rows, 32), torch.ones(rows, 32))
        rule = RouteRule(8, 1, 1, True, 1.0)
        ops.route(torch.zeros(rows, experts), torch.zeros(experts), rule)
        ids = torch.arange(8).expand(rows, -1).contiguous()
        for kind in kinds:
            make = lambda n, k: Weight.empty(kind, (n, k), 32, dtype=bf16, device="cpu")  # noqa: B023
            ops.linear(x, ops.pack_linear([make(300, hidden)], bf16), norm[:300])
            each = [([make(width, hidden), make(width, hidden)], make(hidden, width))] * experts
            ops.experts(x, ids, torch.ones(rows, 8), ops.pack_experts(each, experts, bf16))
        for dtype in (bf16, torch.int8):
            (cache,) = ops.allocate_kv(KVCacheSpec(1, 16, 2, 128, dtype), 200)
            blocks = list(range(100)) if rows == 1 else list(range(7))
            length = 1500 if rows == 1 else rows
            batch = Batch.of([0] * rows, [0] * rows, [0] * rows, [blocks], [0], [rows], [length])
            ops.store_kv_(k, v, cache, batch.slot_mapping)
            ops.attention(q, cache, batch, 0.1)


if __name__ == "__main__":
    main()
