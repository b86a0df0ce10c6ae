"""The CPU's ops over glimmer._native: check the arguments, allocate the result, then one call.

Every row comes out bit for bit the same whatever rows are beside it and however many threads there are: an output is
one sum in one order. Packed matrices live in the extension's own memory, in the panels that csrc/kernels.h describes;
the KV cache is laid out in strips of 16 slots (csrc/attention.h). Not here: any arithmetic. Where the extension is not
installed this module does not import, and selection.py says so.
"""

import ctypes
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from glimmer import _native
from glimmer.backends.base import ExpertSet, KVCache, KVCacheSpec, Packed, RouteRule
from glimmer.backends.files import ExpertStore, MappedFile, PackedFiles, Records
from glimmer.backends.reference import Reference
from glimmer.batch import Batch
from glimmer.weight import ExpertWeights, Kind, Weight, layout

log = logging.getLogger("glimmer")

STRIP = 16  # slots of the cache that lie together: a block has a whole number of strips
CONVERTED_AT_ONCE = 4 << 20  # bytes of a plain matrix whose values change their type
POOLED = 1 << 20  # bytes of a result from which on its memory comes from a pool: the system would clear new pages
MAX_UNUSED = 512 << 20  # bytes that the pool keeps between steps
FLOATS = (torch.float32, torch.bfloat16)
READERS = 8  # threads that read experts, a quarter of one each
HALF_LIFE = 16.0  # tokens after which the choice of an expert counts half; docs/memory.md has the measurement
PAGE = 4096  # bytes: what direct reads are aligned to, and so records of packed weights
KINDS = ("float32", "float32 as bfloat16", "bfloat16", "fp8", "int8", "int4")  # of packed matrices


@dataclass(frozen=True)
class PagedExperts(ExpertSet):
    """The experts of a layer, of which `store` has some in memory. gate_up and down have no memory of their own."""

    store: _native.ExpertStore
    layer: int


class CapturedStep:
    """Calls of ops that `replay` repeats on the same tensors.

    Whoever replays puts new values into the tensors that the ops were given. Results lie in `memory`, where a later one
    takes the place of one that nobody holds any more; captures that share it overwrite each other's results. The calls
    hold none of them, so that captures of any number need no more memory than the largest; each has an output of its
    own.
    """

    output: Tensor

    def __init__(self, pool: _native.Pool, memory: _native.BufferPool):
        self.pool, self.memory = pool, memory
        self._parts: list[Callable[[_native.Pool], object]] = []  # lists of native calls, and calls that torch computes
        self._held: list[Any] = []  # what the calls read or write: their arguments are addresses
        self._results: set[int] = set()  # where results lie

    def add(self, name: str, arguments: tuple[Any, ...], held: tuple[Tensor | None, ...]) -> None:
        """One more native call. held: tensors whose addresses are among the arguments."""
        if not self._parts or not isinstance(self._parts[-1], _native.CallList):
            self._parts.append(_native.CallList())
        getattr(_native, f"queue_{name}")(self._parts[-1], *arguments)
        self._held.append((arguments, held))

    def add_torch(self, call: Callable[..., object], tensors: tuple[Tensor, ...]) -> None:
        """One more call that is not the extension's: call(*tensors)."""
        borrowed = [self._borrowed(tensor) for tensor in tensors]
        self._parts.append(lambda pool: call(*borrowed))

    def new(self, nbytes: int) -> Tensor:
        """Memory for a result."""
        result = self.memory.acquire(nbytes)
        self._results.add(result.data_ptr())
        return result

    def finish(self, result: Tensor) -> None:
        """The captured function has returned this."""
        self.output = result.clone()
        self.add_torch(self.output.copy_, (result,))

    def _borrowed(self, tensor: Tensor) -> Tensor:
        """The tensor; if it is a result, in the same place without holding it: `memory` gives no place back."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._results:
            return tensor
        place = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        whole = torch.frombuffer(place, dtype=tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def replay(self) -> None:
        for part in self._parts:
            part(self.pool)


class Cpu(Reference, PackedFiles):
    """Our own kernels for AVX2, AVX-512, AMX and plain C++, chosen by what the processor has."""

    name = "cpu"
    captures = True
    packed_layout = "panels of 32 columns, 1"  # csrc/kernels.h; the same for every instruction set

    def __init__(self, device: torch.device, threads: int = 1):
        super().__init__(device, threads)
        self._pool = _native.Pool(threads)
        self._results = _native.BufferPool(MAX_UNUSED)
        self._capture_memory = _native.BufferPool(sys.maxsize)
        self._capture: CapturedStep | None = None

    @classmethod
    def make(cls, device: torch.device, threads: int, cache: KVCacheSpec | None) -> "Cpu":
        if cache is None or fits_strips(cache):
            return Cpu(device, threads)
        blocks = f"block_size={cache.block_size} is no multiple of {STRIP}" if cache.block_size % STRIP else ""
        heads = f"head_dim={cache.head_dim} is odd" if cache.head_dim % 2 else ""
        log.warning("slow: plain torch computes attention, because %s", " and ".join(filter(None, (blocks, heads))))
        return CpuAnyBlock(device, threads)

    @property
    def torch_threads(self) -> int:
        """1: what is left to torch is too small to be divided, and its threads would compete with ours."""
        return 1

    @property
    def kernels(self) -> str:
        return f"{_native.isa()} (of {', '.join(_native.available().split())})"

    @property
    def build(self) -> str:
        return blake2b(Path(str(_native.__file__)).read_bytes(), digest_size=16).hexdigest()

    def limits(self) -> dict[str, float]:
        # In a process of its own: what it reads shall not count as memory of this one.
        program = Path(__file__).with_name("limits.py")
        command = [sys.executable, "-P", str(program), str(_native.__file__), _native.isa(), str(self.threads)]
        found: dict[str, float] = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        )
        return found

    # ------------------------------------------------------------------ captured steps

    def capture(self, function: Callable[[], Tensor]) -> CapturedStep:
        """Raises RuntimeError where an op would have to copy an input: a copy would not be repeated."""
        captured = CapturedStep(self._pool, self._capture_memory)
        self._capture = captured
        try:
            captured.finish(function())
        finally:
            self._capture = None
        return captured

    def _run(self, name: str, *arguments: Any, held: tuple[Tensor | None, ...] = ()) -> None:
        """_native.NAME(*arguments), kept where a step is being captured. held: tensors that the arguments point to and
        that are neither results of ops nor what the caller of the op holds."""
        if self._capture is not None:
            self._capture.add(name, arguments, held)
        getattr(_native, name)(self._pool, *arguments)

    def _run_torch(self, call: Callable[..., object], *tensors: Tensor) -> None:
        """call(*tensors), kept where a step is being captured: what torch computes as fast. Among `tensors` are all
        results of ops that it reads or writes."""
        if self._capture is not None:
            self._capture.add_torch(call, tensors)
        call(*tensors)

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Where the result of an op will be."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._capture is None and nbytes < POOLED:
            return torch.empty(shape, dtype=dtype)
        memory = self._results.acquire(nbytes) if self._capture is None else self._capture.new(nbytes)
        return memory.view(dtype).view(shape)

    def _contiguous(self, x: Tensor) -> Tensor:
        if x.is_contiguous():
            return x
        if self._capture is not None:
            raise RuntimeError(f"a copy of {tuple(x.shape)} cannot be recorded")
        return x.contiguous()

    def _heads(self, x: Tensor) -> Tensor:
        """x (T, h, D) with the heads of a row side by side; rows may lie further apart, as those of q in qkv."""
        return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else self._contiguous(x)

    def _input(self, x: Tensor, width: int) -> Tensor:
        """x (T, width) as the extension reads it. Raises ValueError for another shape or dtype."""
        if x.ndim != 2 or x.shape[1] != width or x.dtype not in FLOATS or x.device.type != "cpu":
            found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"{found}, where (T, {width}) float32 or bfloat16 is wanted")
        return self._contiguous(x)

    # ------------------------------------------------------------------ rows

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        if tokens.dtype != torch.int64 or table.dtype not in FLOATS or not table.is_contiguous():
            _refuse("embed", tokens, table)
        tokens, (rows, n) = self._contiguous(tokens), table.shape
        is_bf16, y = table.dtype == torch.bfloat16, self._new(len(tokens), n, dtype=table.dtype)
        self._run("embed", tokens.data_ptr(), len(tokens), table.data_ptr(), is_bf16, rows, n, first, y.data_ptr())
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        n = x.shape[-1]
        if weight.shape != (n,) or x.dtype not in FLOATS or weight.dtype not in FLOATS or weight.stride(0) != 1:
            _refuse("rms_norm", x, weight)
        y = self._new(*x.shape, dtype=weight.dtype)
        if x.ndim == 3:
            x = self._heads(x)
            rows, heads, stride = len(x), x.shape[1], x.stride(0)
        else:
            x = self._contiguous(x)
            rows, heads, stride = y.numel() // n, 1, n
        x_bf16, y_bf16 = x.dtype == torch.bfloat16, weight.dtype == torch.bfloat16
        self._run(
            "rms_norm",
            x.data_ptr(), x_bf16, rows, heads, n, stride, weight.data_ptr(), y_bf16, eps, y.data_ptr(),
        )  # fmt: skip
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, n = x.shape
        floats = x.dtype in FLOATS and residual.dtype in FLOATS and weight.dtype in FLOATS
        if not floats or residual.shape != (rows, n) or weight.shape != (n,) or weight.stride(0) != 1:
            _refuse("add_rms_norm", x, residual, weight)
        x, residual = self._contiguous(x), self._contiguous(residual)
        total, y = self._new(rows, n, dtype=residual.dtype), self._new(rows, n, dtype=weight.dtype)
        x_bf16, residual_bf16, y_bf16 = (t.dtype == torch.bfloat16 for t in (x, residual, weight))
        self._run(
            "add_rms_norm",
            x.data_ptr(), x_bf16, residual.data_ptr(), residual_bf16, rows, n, weight.data_ptr(), y_bf16, eps,
            total.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y, total

    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or x.dtype != y.dtype:
            _refuse("concat", x, y)
        x, y, (rows, n), size = self._contiguous(x), self._contiguous(y), x.shape, x.itemsize
        z = self._new(rows, n + y.shape[1], dtype=x.dtype)
        self._run("concat", x.data_ptr(), n * size, y.data_ptr(), y.shape[1] * size, rows, z.data_ptr())
        return z

    def add_(self, y: Tensor, x: Tensor) -> None:
        if y.ndim != 2 or x.shape != y.shape or y.dtype not in FLOATS or x.dtype not in FLOATS or not y.is_contiguous():
            _refuse("add_", y, x)
        x, (rows, n) = self._contiguous(x), y.shape
        self._run("add", y.data_ptr(), y.dtype == torch.bfloat16, x.data_ptr(), x.dtype == torch.bfloat16, rows, n)

    def swiglu(self, x: Tensor) -> Tensor:
        rows, both = x.shape
        if x.dtype not in FLOATS or both % 2:
            _refuse("swiglu", x)
        x, y = self._contiguous(x), self._new(rows, both // 2, dtype=x.dtype)
        self._run("swiglu", x.data_ptr(), x.dtype == torch.bfloat16, rows, both // 2, y.data_ptr())
        return y

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        (rows, heads, width), (others, kv_heads, _), half = q.shape, k.shape, cos.shape[1]
        fits = rows == others == len(cos) and k.shape[2] == width >= 2 * half and cos.shape == sin.shape
        types = q.dtype == k.dtype and q.dtype in FLOATS and cos.dtype == sin.dtype == torch.float32
        if not fits or not types or self._heads(q) is not q or self._heads(k) is not k:
            _refuse("rope_", q, k, cos, sin)
        cos, sin = self._contiguous(cos), self._contiguous(sin)
        self._run(
            "rope",
            q.data_ptr(), heads, q.stride(0), k.data_ptr(), kv_heads, k.stride(0), q.dtype == torch.bfloat16, rows,
            width, cos.data_ptr(), sin.data_ptr(), half,
        )  # fmt: skip

    def forbid_(self, logits: Tensor, allowed: Tensor) -> None:
        fits = logits.ndim == allowed.ndim == 2 and len(logits) == len(allowed) and logits.stride(1) == 1
        if not fits or logits.dtype != torch.float32 or allowed.dtype != torch.uint8:
            _refuse("forbid_", logits, allowed)
        allowed, (rows, n) = self._contiguous(allowed), logits.shape
        self._run("forbid", logits.data_ptr(), logits.stride(0), rows, n, allowed.data_ptr(), allowed.shape[1])

    def argmax_(self, tokens: Tensor, logits: Tensor) -> None:
        fits = logits.ndim == 2 and logits.stride(1) == 1 and logits.dtype in FLOATS
        if not fits or tokens.shape != logits.shape[:1] or tokens.dtype != torch.int64 or not tokens.is_contiguous():
            _refuse("argmax_", tokens, logits)
        (rows, n), is_bf16 = logits.shape, logits.dtype == torch.bfloat16
        self._run("argmax", logits.data_ptr(), is_bf16, logits.stride(0), rows, n, tokens.data_ptr())

    def route(self, logits: Tensor, bias: Tensor, rule: RouteRule) -> tuple[Tensor, Tensor]:
        """The best expert first; of equals the one with the lowest number."""
        rows, experts = logits.shape
        if logits.dtype != torch.float32 or bias.dtype != torch.float32 or bias.shape != (experts,):
            _refuse("route", logits, bias)
        logits, bias = self._contiguous(logits), self._contiguous(bias)
        ids, scores = (self._new(rows, rule.top_k, dtype=dtype) for dtype in (torch.int64, torch.float32))
        self._run(
            "route",
            logits.data_ptr(), bias.data_ptr(), rows, experts, rule.top_k, rule.n_group, rule.topk_group,
            rule.norm_topk_prob, rule.routed_scaling_factor, ids.data_ptr(), scores.data_ptr(),
        )  # fmt: skip
        return ids, scores

    # ------------------------------------------------------------------ cache

    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int) -> list[KVCache]:
        """Raises ValueError for what CpuAnyBlock serves."""
        if not fits_strips(spec):
            raise ValueError(f"a cache that is not made of strips of {STRIP} slots: {spec}")
        return super().allocate_kv(spec, num_blocks)

    def export_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int]) -> Tensor:
        parts = _parts(caches)
        data = torch.empty(len(blocks), sum(nbytes for _, nbytes, _ in parts), dtype=torch.uint8)
        _native.export_blocks(parts, blocks, data.data_ptr())
        return data

    def import_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int], data: Tensor) -> None:
        parts = _parts(caches)
        whole = data.dtype == torch.uint8 and data.is_contiguous()
        if not whole or data.nbytes != len(blocks) * sum(nbytes for _, nbytes, _ in parts):
            raise ValueError(f"{tuple(data.shape)} {data.dtype} for {len(blocks)} blocks")
        _native.import_blocks(parts, blocks, data.data_ptr())

    def checksum(self, data: memoryview) -> bytes:
        address = np.frombuffer(data, np.uint8).ctypes.data
        return _native.checksum(address, data.nbytes).encode()

    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        blocks, size, heads, width = kv.num_blocks, kv.block_size, kv.num_kv_heads, kv.head_dim
        k, v, slot_mapping = self._heads(k), self._heads(v), self._contiguous(slot_mapping)
        fits = k.shape == v.shape == (len(slot_mapping), heads, width) and slot_mapping.dtype == torch.int64
        if not fits or k.dtype != v.dtype or not _is_cache(kv, k):
            _refuse("store_kv_", k, v, kv.keys, kv.values, slot_mapping)
        self._run(
            "store_kv",
            k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k.dtype == torch.bfloat16, len(slot_mapping),
            slot_mapping.data_ptr(), kv.keys.data_ptr(), kv.values.data_ptr(), kv.quantized, blocks, size, heads, width,
        )  # fmt: skip

    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        rows, q_heads, width = q.shape
        q, tables = self._heads(q), self._contiguous(batch.block_tables)
        query_start_loc, seq_lens, sequences = batch.query_start_loc_cpu, batch.seq_lens_cpu, batch.num_sequences
        fits = (
            width == kv.head_dim
            and rows == int(query_start_loc[-1])
            and len(tables) == sequences == len(query_start_loc) - 1
        )
        types = tables.dtype == query_start_loc.dtype == seq_lens.dtype == torch.int64
        if not fits or not types or not _is_cache(kv, q):
            _refuse("attention", q, kv.keys, kv.values, tables, query_start_loc, seq_lens)
        y = self._new(rows, q_heads * width, dtype=q.dtype)
        self._run(
            "attention",
            q.data_ptr(), q.stride(0), q_heads, q.dtype == torch.bfloat16, kv.keys.data_ptr(), kv.values.data_ptr(),
            kv.quantized, kv.num_blocks, kv.block_size, kv.num_kv_heads, width, tables.data_ptr(), tables.shape[1],
            query_start_loc.data_ptr(), seq_lens.data_ptr(), sequences, scale, y.data_ptr(),
        )  # fmt: skip
        return y

    # ------------------------------------------------------------------ weights

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, _native.Packed)
        x = self._input(x, weight.k)
        x_bf16 = x.dtype == torch.bfloat16
        y_bf16 = x_bf16 and not weight.float32
        y = self._new(len(x), weight.n, dtype=torch.bfloat16 if y_bf16 else torch.float32)
        bias = None if bias is None else bias.float()
        if bias is not None and bias.shape != (weight.n,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)}, where ({weight.n},) is wanted")
        held = (bias,)
        self._run("linear", x.data_ptr(), x_bf16, len(x), weight, _address(bias), y.data_ptr(), y_bf16, held=held)
        return y

    def experts(self, x: Tensor, ids: Tensor, scores: Tensor, experts: ExpertSet) -> Tensor:
        """Raises ValueError for an id that is no expert."""
        gate_up, down = experts.gate_up, experts.down
        x = self._input(x, gate_up.k)
        if ids.shape != scores.shape or len(ids) != len(x) or ids.dtype != torch.int64 or scores.dtype != torch.float32:
            found = f"ids {ids.dtype} {tuple(ids.shape)}, scores {scores.dtype} {tuple(scores.shape)}"
            raise ValueError(f"{found} for {len(x)} rows, where int64 and float32 (rows, K) are wanted")
        ids, scores = self._contiguous(ids), self._contiguous(scores)
        y, x_bf16 = self._new(len(x), down.n, dtype=torch.float32), x.dtype == torch.bfloat16
        chosen = (x.data_ptr(), x_bf16, len(x), ids.data_ptr(), scores.data_ptr(), ids.shape[1])
        if isinstance(experts, PagedExperts):
            self._run("stored_experts", *chosen, experts.store, experts.layer, y.data_ptr())
        else:
            self._run("experts", *chosen, gate_up, down, y.data_ptr())
        return y

    def fetch_experts(self, ids: Tensor, experts: ExpertSet) -> None:
        if isinstance(experts, PagedExperts):
            ids = self._contiguous(ids)
            self._run("fetch_experts", ids.data_ptr(), ids.numel(), experts.store, experts.layer)

    def quantize(self, weight: Weight, kind: str, group: int | None) -> Weight:
        """As the reference does, except that an int4 group's sums are added up in another order."""
        kind, group = layout(kind, weight.shape[1], group)
        values, to_int8 = weight.codes, kind == Kind.INT8 and weight.codes.dtype in FLOATS
        if values.device.type != "cpu" or (group is None and not to_int8):
            return super().quantize(weight, kind, group)
        values = values if values.dtype in FLOATS else weight.dequantize()
        values = values if values.stride(1) == 1 else values.contiguous()
        (out, inner), made = weight.shape, Weight.quantized(kind, weight.shape, group, values.device)
        matrix = values.data_ptr(), values.dtype == torch.bfloat16, values.stride(0), out, inner
        codes, scales = made.codes.data_ptr(), _address(made.scales)
        if group is None:
            _native.quantize_int8(self._pool, *matrix, codes, scales)
        else:
            _native.quantize_int4(self._pool, *matrix, group, codes, scales, _address(made.zeros))
        return made

    def pack_linear(self, parts: Sequence[Weight], dtype: torch.dtype) -> _native.Packed:
        if dtype == torch.float32 and all(p.codes.dtype == torch.bfloat16 for p in parts):
            kind, dtype = "float32 as bfloat16", torch.bfloat16  # half the bytes, the same sums
        else:
            kind = _kind(parts[0], dtype)
        packed = self._empty(parts, kind, 1, 1)
        self._fill(packed, 0, parts, dtype)
        return packed

    def pack_experts(self, experts: Iterable[ExpertWeights], count: int, dtype: torch.dtype) -> ExpertSet:
        """The panels of gate and up lie interleaved."""
        packed: ExpertSet | None = None
        for e, (gate_up, down) in enumerate(experts):
            if packed is None:
                packed = ExpertSet(
                    self._empty(gate_up, _kind(gate_up[0], dtype), count, len(gate_up)),
                    self._empty([down], _kind(down, dtype), count, 1),
                )
            self._fill(packed.gate_up, e, gate_up, dtype)
            self._fill(packed.down, e, [down], dtype)
        assert packed is not None, "a layer without experts"
        return packed

    def packed_bytes(self, weight: Weight) -> int:
        if weight.kind != Kind.INT4 or weight.scales is None:
            return weight.nbytes
        # A group's scale and zero point share a word; a row has a power of two.
        return weight.codes.nbytes + weight.scales.numel() * (4 if _wide_scales([weight]) else 2) + weight.shape[0] * 4

    def pread(self, descriptor: int, memory: Tensor, offset: int) -> int:
        found = _native.pread(self._pool, descriptor, offset, memory.nbytes, memory.data_ptr())
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        return found

    def records(self, packed: Packed | ExpertSet) -> Records:
        """A record: the panels of its matrices, then the scales of their columns, each from a multiple of 64 bytes."""
        matrices = [packed.gate_up, packed.down] if isinstance(packed, ExpertSet) else [packed]
        places, nbytes = _places(matrices)

        def copy(e: int, buffer: Tensor) -> None:
            assert len(buffer) == nbytes and buffer.is_contiguous(), "a buffer of one record"
            for matrix, (panels, scales) in zip(matrices, places, strict=True):
                assert isinstance(matrix, _native.Packed)
                matrix.copy_matrix(e, buffer.data_ptr() + panels, buffer.data_ptr() + scales)

        return Records({"matrices": [_describe(m) for m in matrices]}, matrices[0].count, nbytes, copy)

    def map_file(self, descriptor: int, nbytes: int) -> _native.MappedFile:
        try:
            return _native.MappedFile(descriptor, nbytes)
        except RuntimeError as error:
            raise OSError(str(error)) from None

    def map_packed(self, description: dict[str, Any], file: MappedFile, begin: int) -> Packed | ExpertSet:
        assert isinstance(file, _native.MappedFile)
        matrices = [self._described(matrix) for matrix in _listed(description.get("matrices"))]
        if not 1 <= len(matrices) <= 2 or len({matrix.count for matrix in matrices}) != 1:
            raise ValueError("weights of one or two matrices are wanted")
        places, nbytes = _places(matrices)
        for matrix, (panels, scales) in zip(matrices, places, strict=True):
            for e in range(matrix.count):
                matrix.place(e, file, begin + e * nbytes + panels, begin + e * nbytes + scales)
        return ExpertSet(*matrices) if len(matrices) == 2 else matrices[0]

    def expert_store(self, descriptor: int, slots: int, slot_bytes: int) -> _native.ExpertStore:
        try:
            return _native.ExpertStore(descriptor, slots, slot_bytes, READERS, HALF_LIFE)
        except RuntimeError as error:
            raise OSError(str(error)) from None

    def page_packed(
        self, description: dict[str, Any], store: ExpertStore, begin: int, checksums: Sequence[str]
    ) -> ExpertSet:
        assert isinstance(store, _native.ExpertStore)
        gate_up, down = (self._described(matrix) for matrix in _listed(description.get("matrices")))
        ((up, up_scales), (low, low_scales)), nbytes = _places([gate_up, down])
        layout = [up, up_scales, low, low_scales, nbytes]
        return PagedExperts(gate_up, down, store, store.add_layer(gate_up, down, begin, layout, list(checksums)))

    def checksums(self, records: Sequence[Tensor]) -> list[str]:
        assert all(record.dtype == torch.uint8 and record.is_contiguous() for record in records)
        return _native.checksums(
            self._pool, [record.data_ptr() for record in records], [len(record) for record in records]
        )

    def _described(self, matrix: Any) -> _native.Packed:
        """Matrices without memory, from what `_describe` has said of them; ValueError for anything else."""
        match matrix:
            case {
                "kind": str(kind), "count": int(count), "n": int(n), "k": int(k), "parts": int(parts),
                "group_size": int(group_size), "wide_scales": bool(wide),
            } if kind in KINDS and 0 < count < 1 << 20:  # fmt: skip
                return _native.Packed(self._pool, kind, count, n, k, parts, group_size, wide, owns=False)
        raise ValueError(f"{str(matrix)[:200]} describes no matrices")

    def _empty(self, parts: Sequence[Weight], kind: str, count: int, num_parts: int) -> _native.Packed:
        rows, inner = sum(p.shape[0] for p in parts), parts[0].shape[1]
        group = -(-(parts[0].group_size or 32) // 32) * 32
        return _native.Packed(self._pool, kind, count, rows, inner, num_parts, group, _wide_scales(parts))

    def _fill(self, packed: Packed, e: int, parts: Sequence[Weight], dtype: torch.dtype) -> None:
        assert isinstance(packed, _native.Packed)
        row = 0
        for part in parts:
            plain = part.kind == Kind.PLAIN
            # A few rows at a time: where values change their type, so little is held twice.
            step = max(1, CONVERTED_AT_ONCE // (part.shape[1] * dtype.itemsize)) if plain else part.shape[0]
            for first in range(0, part.shape[0], step):
                codes = part.codes[first : first + step]
                codes = codes.to(dtype) if plain else codes
                codes = codes if codes.stride(1) == 1 else codes.contiguous()
                scales = None if part.scales is None else part.scales.contiguous()
                zeros = None if part.zeros is None else part.zeros.contiguous()
                stride = codes.stride(0) * codes.itemsize
                address = codes.data_ptr()
                packed.fill(self._pool, e, row, len(codes), address, stride, _address(scales), _address(zeros))
                row += len(codes)


class CpuAnyBlock(Cpu):
    """Cpu for a cache whose blocks or heads do not consist of strips: cache and attention are the reference's."""

    cache_layout = f"{Cpu.cache_layout}, blocks of any size"

    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int) -> list[KVCache]:
        return Reference.allocate_kv(self, spec, num_blocks)

    def export_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int]) -> Tensor:
        return super().export_blocks(caches, blocks)

    def import_blocks(self, caches: Sequence[KVCache], blocks: Sequence[int], data: Tensor) -> None:
        super().import_blocks(caches, blocks, data)

    def store_kv_(self, k: Tensor, v: Tensor, kv: KVCache, slot_mapping: Tensor) -> None:
        self._run_torch(lambda k, v: Reference.store_kv_(self, k, v, kv, slot_mapping), k, v)

    def attention(self, q: Tensor, kv: KVCache, batch: Batch, scale: float) -> Tensor:
        y = self._new(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
        self._run_torch(lambda y, q: y.copy_(Reference.attention(self, q, kv, batch, scale)), y, q)
        return y

    def serves(self, op: str) -> str:
        return Reference.name if op in ("store_kv_", "attention") else super().serves(op)


def fits_strips(spec: KVCacheSpec) -> bool:
    """Whether Cpu can lay out a cache; else it is CpuAnyBlock's."""
    return spec.block_size % STRIP == 0 and spec.head_dim % 2 == 0


def _parts(caches: Sequence[KVCache]) -> list[tuple[int, int, int]]:
    """Keys and values of all layers: address, bytes of a block, number of blocks."""
    parts = (part for kv in caches for part in (kv.keys, kv.values))
    return [(part.data_ptr(), part.nbytes // len(part), len(part)) for part in parts]


def _is_cache(kv: KVCache, rows: Tensor) -> bool:
    """Whether a cache is one of ours, and of the dtype of the rows that it is given or asked by, or of codes."""
    keys, values = kv.keys, kv.values
    width = kv.head_dim + (torch.float32.itemsize if kv.quantized else 0)
    same = keys.shape == values.shape and keys.dtype == values.dtype and keys.dtype in (rows.dtype, torch.int8)
    whole = keys.is_contiguous() and values.is_contiguous() and keys.ndim == 4 and keys.shape[3] == width
    return same and whole and rows.dtype in FLOATS


def _describe(packed: Packed) -> dict[str, Any]:
    """Matrices as JSON."""
    assert isinstance(packed, _native.Packed)
    names = ("count", "n", "k", "parts", "group_size", "wide_scales")
    return {"kind": packed.stored_kind} | {name: getattr(packed, name) for name in names}


def _places(matrices: Sequence[Packed]) -> tuple[list[tuple[int, int]], int]:
    """Where in a record the panels and the scales of each matrix begin, and how many bytes a record has."""
    begins: list[list[int]] = []
    end = 0
    for size in ("matrix_bytes", "scales_bytes"):
        begins.append([])
        for matrix in matrices:
            begins[-1].append(end)
            end += -(-getattr(matrix, size) // 64) * 64
    return list(zip(*begins, strict=True)), -(-end // PAGE) * PAGE


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(weight: Weight, dtype: torch.dtype) -> str:
    """What the extension calls the kind of a packed matrix."""
    return str(dtype).removeprefix("torch.") if weight.kind == Kind.PLAIN else weight.kind


def _wide_scales(parts: Sequence[Weight]) -> bool:
    """Whether scales of int4 need 32 bits, because bfloat16 would lose something: other people's float16 scales."""
    return any(part.kind == Kind.INT4 and part.scales_dtype != torch.bfloat16 for part in parts)


def _refuse(op: str, *tensors: Tensor) -> NoReturn:
    """Raises ValueError: what an op was given is not what its contract says."""
    found = ", ".join(f"{t.dtype} {tuple(t.shape)} strides {t.stride()} on {t.device}" for t in tensors)
    raise ValueError(f"{op} of {found}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
