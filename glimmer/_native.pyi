"""
CPU kernels of glimmer. Pointers are passed as integers, sizes are in elements unless documented as bytes.
"""

from collections.abc import Sequence
from typing import Annotated

import torch

class UnreadError(OSError):
    pass

class Pool:
    """
    Threads that compute together; operations that are given the same pool run one at a time.
    """

    def __init__(self, threads: int) -> None:
        """
        A pool of so many threads, the caller included. Raises ValueError below 1.
        """

    @property
    def threads(self) -> int:
        """The number of threads that compute, the caller included."""

def available() -> str:
    """
    The instruction sets that this build and this CPU support, best last, separated by spaces.
    """

def isa() -> str:
    """The instruction set in use."""

def read_bandwidth(pool: Pool, nbytes: int) -> float:
    """
    Measure the memory bandwidth of all threads, in bytes per second, over a buffer of nbytes.
    """

def arithmetic(pool: Pool, kind: str) -> float:
    """
    Measure the peak arithmetic throughput of all threads for "bfloat16" or "int8", in operations per second.
    """

def select(name: str) -> None:
    """
    Use the kernels of the instruction set `name`, one of available(). Raises ValueError for another.
    """

class BufferPool:
    """
    Memory for the results of a step, which is reused after the tensor that holds it is freed.
    """

    def __init__(self, max_unused_bytes: int) -> None:
        """A pool that keeps at most max_unused_bytes of unused memory."""

    def acquire(self, nbytes: int) -> Annotated[torch.Tensor, dict(dtype="uint8")]:
        """A torch tensor of nbytes bytes (uint8), its content undefined."""

class MappedFile:
    """A file of weights, mapped read-only; all processes share its pages."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Map the first nbytes bytes. Raises RuntimeError."""

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""

    @property
    def damaged(self) -> bool:
        """
        Whether the file has shrunk, or could not be read, since: all of it reads as zeros then.
        """

    def tensor(self, begin: int, nbytes: int) -> Annotated[torch.Tensor, dict(dtype="uint8")]:
        """
        Bytes of the file as a torch tensor (uint8), which must not be written.
        """

def checksum(data: int, nbytes: int) -> str:
    """
    The checksum of a record of a packed file: CRC-32C of its four quarters, 32 hexadecimal digits.
    """

def checksums(pool: Pool, records: Sequence[int], nbytes: Sequence[int]) -> list[str]:
    """The checksums of records at these addresses, by all threads."""

def export_blocks(parts: Sequence[tuple[int, int, int]], blocks: Sequence[int], data: int) -> None:
    """
    Copy blocks of a cache to `data`, block after block. parts: address, bytes of a block and number of blocks of the
    keys and of the values of each layer. Raises IndexError for a block that does not exist.
    """

def import_blocks(parts: Sequence[tuple[int, int, int]], blocks: Sequence[int], data: int) -> None:
    """
    The reverse: fill blocks of a cache with what export_blocks has copied.
    """

class Packed:
    """
    Weight matrices of one shape, stored in the layout that the kernels read.
    """

    def __init__(
        self,
        pool: Pool,
        kind: str,
        count: int,
        n: int,
        k: int,
        parts: int,
        group_size: int,
        wide_scales: bool,
        owns: bool = True,
    ) -> None:
        """
        Allocate `count` matrices (n, k) of zeros, each of `parts` equal parts; fill them with fill(). Unless `owns`,
        nothing is allocated, and place() says where each matrix lies.
        """

    @property
    def stored_kind(self) -> str:
        """The kind, as the constructor takes it."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale, if the kind is int4."""

    @property
    def wide_scales(self) -> bool:
        """Whether scales of int4 have 32 bits."""

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix without the scales of its columns."""

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales of one matrix's columns; 0: there are none."""

    def place(self, e: int, file: MappedFile, panels: int, scales: int) -> None:
        """
        Use as matrix e what lies at these bytes of a file, multiples of 64. The file stays mapped as long.
        """

    def copy_matrix(self, e: int, panels: int, scales: int) -> None:
        """Copy matrix e to these addresses, as place() takes it."""

    @property
    def kind(self) -> str:
        """ "fp8", "int8", "int4", or "plain" for weights without scales."""

    @property
    def float32(self) -> bool:
        """Whether the products are computed in float32."""

    @property
    def count(self) -> int:
        """Number of matrices."""

    @property
    def n(self) -> int:
        """Rows of a matrix: output features."""

    @property
    def k(self) -> int:
        """Columns of a matrix: input features."""

    @property
    def parts(self) -> int:
        """Equal parts of a matrix: 2 for gate and up together, else 1."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""

    def fill(
        self, pool: Pool, e: int, first: int, rows: int, codes: int, stride: int, scales: int, zero_points: int
    ) -> None:
        """
        Pack rows first..first+rows of matrix e. stride: bytes from one row of codes to the next.
        """

class ExpertStore:
    """
    Slots in memory for some of the experts of a packed file; the others are read when chosen.
    """

    def __init__(self, descriptor: int, slots: int, slot_bytes: int, readers: int, half_life: float) -> None:
        """
        Slots of slot_bytes each, and threads that read. half_life: tokens after which a choice counts half.
        """

    def add_layer(
        self, gate_up: Packed, down: Packed, begin: int, layout: Sequence[int], checksums: Sequence[str]
    ) -> int:
        """
        One more layer; returns its number. layout: where in a record the panels and scales of gate_up and of down are,
        and the bytes of a record.
        """

    def resize(self, slots: int) -> None:
        """Use so many slots; memory of the others is given back."""

    def warm(self) -> None:
        """Begin to read the most frequent experts into empty slots."""

    def frequencies(self, layer: int) -> list[float]:
        """How often each expert was chosen lately, 0 to 1."""

    def set_frequencies(self, layer: int, values: Sequence[float]) -> None:
        """What an earlier run has counted."""

    @property
    def slots(self) -> int:
        """Slots that there were at first."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""

    @property
    def slots_in_use(self) -> int:
        """Slots that there are now."""

    @property
    def num_layers(self) -> int:
        """Layers that were added."""

    @property
    def direct(self) -> bool:
        """Whether the file system reads without the page cache."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """
        Experts that steps have wanted, those of them that had to be read, and bytes that were read.
        """

class CallList:
    """A list of calls of ops, which runs any number of times without Python."""

    def __init__(self) -> None:
        """An empty list."""

    def __call__(self, pool: Pool) -> None:
        """Run the calls in order."""

def linear(pool: Pool, x: int, x_bf16: bool, rows: int, w: Packed, bias: int, y: int, y_bf16: bool) -> None:
    """y = x @ w.T + bias; bias may be 0."""

def queue_linear(
    call_list: CallList, x: int, x_bf16: bool, rows: int, w: Packed, bias: int, y: int, y_bf16: bool
) -> None:
    """Append a call of `linear` to call_list; nothing is computed yet."""

def experts(
    pool: Pool,
    x: int,
    x_bf16: bool,
    rows: int,
    ids: int,
    scores: int,
    top_k: int,
    gate_up: Packed,
    down: Packed,
    y: int,
) -> None:
    """y = the sum of the chosen experts' outputs, weighted by scores."""

def queue_experts(
    call_list: CallList,
    x: int,
    x_bf16: bool,
    rows: int,
    ids: int,
    scores: int,
    top_k: int,
    gate_up: Packed,
    down: Packed,
    y: int,
) -> None:
    """Append a call of `experts` to call_list; nothing is computed yet."""

def stored_experts(
    pool: Pool,
    x: int,
    x_bf16: bool,
    rows: int,
    ids: int,
    scores: int,
    top_k: int,
    store: ExpertStore,
    layer: int,
    y: int,
) -> None:
    """
    The same as experts for a layer of a store. Raises UnreadError, an OSError.
    """

def queue_stored_experts(
    call_list: CallList,
    x: int,
    x_bf16: bool,
    rows: int,
    ids: int,
    scores: int,
    top_k: int,
    store: ExpertStore,
    layer: int,
    y: int,
) -> None:
    """
    Append a call of `stored_experts` to call_list; nothing is computed yet.
    """

def fetch_experts(pool: Pool, ids: int, count: int, store: ExpertStore, layer: int) -> None:
    """Begin to read what stored_experts will want."""

def queue_fetch_experts(call_list: CallList, ids: int, count: int, store: ExpertStore, layer: int) -> None:
    """
    Append a call of `fetch_experts` to call_list; nothing is computed yet.
    """

def embed(
    pool: Pool, tokens: int, count: int, table: int, is_bf16: bool, rows: int, n: int, first: int, y: int
) -> None:
    """
    y = rows of the embedding table; zeros for tokens outside first..first+rows.
    """

def queue_embed(
    call_list: CallList, tokens: int, count: int, table: int, is_bf16: bool, rows: int, n: int, first: int, y: int
) -> None:
    """Append a call of `embed` to call_list; nothing is computed yet."""

def rms_norm(
    pool: Pool,
    x: int,
    x_bf16: bool,
    rows: int,
    heads: int,
    n: int,
    stride: int,
    weight: int,
    y_bf16: bool,
    eps: float,
    y: int,
) -> None:
    """y = the RMS norm of each head of x."""

def queue_rms_norm(
    call_list: CallList,
    x: int,
    x_bf16: bool,
    rows: int,
    heads: int,
    n: int,
    stride: int,
    weight: int,
    y_bf16: bool,
    eps: float,
    y: int,
) -> None:
    """Append a call of `rms_norm` to call_list; nothing is computed yet."""

def add_rms_norm(
    pool: Pool,
    x: int,
    x_bf16: bool,
    residual: int,
    residual_bf16: bool,
    rows: int,
    n: int,
    weight: int,
    y_bf16: bool,
    eps: float,
    total: int,
    y: int,
) -> None:
    """total = residual + x; y = the RMS norm of total."""

def queue_add_rms_norm(
    call_list: CallList,
    x: int,
    x_bf16: bool,
    residual: int,
    residual_bf16: bool,
    rows: int,
    n: int,
    weight: int,
    y_bf16: bool,
    eps: float,
    total: int,
    y: int,
) -> None:
    """Append a call of `add_rms_norm` to call_list; nothing is computed yet."""

def add(pool: Pool, y: int, y_bf16: bool, x: int, x_bf16: bool, rows: int, n: int) -> None:
    """y += x."""

def queue_add(call_list: CallList, y: int, y_bf16: bool, x: int, x_bf16: bool, rows: int, n: int) -> None:
    """Append a call of `add` to call_list; nothing is computed yet."""

def swiglu(pool: Pool, x: int, is_bf16: bool, rows: int, n: int, y: int) -> None:
    """y (rows, n) = silu(gate) * up of x (rows, 2n)."""

def queue_swiglu(call_list: CallList, x: int, is_bf16: bool, rows: int, n: int, y: int) -> None:
    """Append a call of `swiglu` to call_list; nothing is computed yet."""

def rope(
    pool: Pool,
    q: int,
    q_heads: int,
    q_stride: int,
    k: int,
    k_heads: int,
    k_stride: int,
    is_bf16: bool,
    rows: int,
    width: int,
    cos: int,
    sin: int,
    half: int,
) -> None:
    """Rotary position embedding of the heads of q and k, in place."""

def queue_rope(
    call_list: CallList,
    q: int,
    q_heads: int,
    q_stride: int,
    k: int,
    k_heads: int,
    k_stride: int,
    is_bf16: bool,
    rows: int,
    width: int,
    cos: int,
    sin: int,
    half: int,
) -> None:
    """Append a call of `rope` to call_list; nothing is computed yet."""

def route(
    pool: Pool,
    logits: int,
    bias: int,
    rows: int,
    experts: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    normed: bool,
    factor: float,
    ids: int,
    scores: int,
) -> None:
    """
    ids and scores (rows, top_k) of the experts that the router chooses for each row.
    """

def queue_route(
    call_list: CallList,
    logits: int,
    bias: int,
    rows: int,
    experts: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    normed: bool,
    factor: float,
    ids: int,
    scores: int,
) -> None:
    """Append a call of `route` to call_list; nothing is computed yet."""

def quantize_int4(
    pool: Pool,
    x: int,
    is_bf16: bool,
    stride: int,
    rows: int,
    inner: int,
    group_size: int,
    codes: int,
    scales: int,
    zero_points: int,
) -> None:
    """
    Quantise x (rows, inner) to int4 codes with a scale and a zero point for each group.
    """

def quantize_int8(
    pool: Pool, x: int, is_bf16: bool, stride: int, rows: int, inner: int, codes: int, scales: int
) -> None:
    """Quantise x (rows, inner) to int8 codes with a scale for each row."""

def pread(pool: Pool, descriptor: int, offset: int, nbytes: int, memory: int) -> int:
    """
    Read bytes of an open file with all threads: how many there are before its end, or -errno.
    """

def forbid(pool: Pool, x: int, stride: int, rows: int, n: int, allowed: int, bytes: int) -> None:
    """
    x (rows, n) = -infinity where the bit of `allowed` (rows, bytes) is not set.
    """

def queue_forbid(call_list: CallList, x: int, stride: int, rows: int, n: int, allowed: int, bytes: int) -> None:
    """Append a call of `forbid` to call_list; nothing is computed yet."""

def argmax(pool: Pool, x: int, is_bf16: bool, stride: int, rows: int, n: int, tokens: int) -> None:
    """tokens (rows) = the first of the largest of each row of x (rows, n)."""

def queue_argmax(call_list: CallList, x: int, is_bf16: bool, stride: int, rows: int, n: int, tokens: int) -> None:
    """Append a call of `argmax` to call_list; nothing is computed yet."""

def concat(pool: Pool, x: int, n: int, y: int, m: int, rows: int, z: int) -> None:
    """z (rows, n + m), in bytes, of x (rows, n) and y (rows, m)."""

def queue_concat(call_list: CallList, x: int, n: int, y: int, m: int, rows: int, z: int) -> None:
    """Append a call of `concat` to call_list; nothing is computed yet."""

def store_kv(
    pool: Pool,
    k: int,
    k_stride: int,
    v: int,
    v_stride: int,
    is_bf16: bool,
    rows: int,
    slot_mapping: int,
    keys: int,
    values: int,
    codes: bool,
    blocks: int,
    block_size: int,
    heads: int,
    width: int,
) -> None:
    """
    Write keys and values of new tokens into their slots of the paged cache.
    """

def queue_store_kv(
    call_list: CallList,
    k: int,
    k_stride: int,
    v: int,
    v_stride: int,
    is_bf16: bool,
    rows: int,
    slot_mapping: int,
    keys: int,
    values: int,
    codes: bool,
    blocks: int,
    block_size: int,
    heads: int,
    width: int,
) -> None:
    """Append a call of `store_kv` to call_list; nothing is computed yet."""

def attention(
    pool: Pool,
    q: int,
    stride: int,
    q_heads: int,
    is_bf16: bool,
    keys: int,
    values: int,
    codes: bool,
    blocks: int,
    block_size: int,
    heads: int,
    width: int,
    block_tables: int,
    columns: int,
    query_start_loc: int,
    seq_lens: int,
    sequences: int,
    scale: float,
    y: int,
) -> None:
    """
    y = causal attention of the rows of q over the keys and values of their sequences in the paged cache.
    """

def queue_attention(
    call_list: CallList,
    q: int,
    stride: int,
    q_heads: int,
    is_bf16: bool,
    keys: int,
    values: int,
    codes: bool,
    blocks: int,
    block_size: int,
    heads: int,
    width: int,
    block_tables: int,
    columns: int,
    query_start_loc: int,
    seq_lens: int,
    sequences: int,
    scale: float,
    y: int,
) -> None:
    """Append a call of `attention` to call_list; nothing is computed yet."""
