"""What the kernels of the CPU promise beyond the contract of the ops, with each instruction set here: a row has the
same bits whatever is beside it, and what is broken stays where it is. Whether results are right: test_ops.py.
"""

import os
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor

from glimmer.backends.base import KVCache, KVCacheSpec, RouteRule
from glimmer.batch import Batch
from glimmer.weight import ExpertWeights, Weight

cpu = pytest.importorskip("glimmer.backends.cpu", reason="the extension is not built")
_native = cpu._native
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True, params=_native.available().split())
def instructions(request):
    best = _native.isa()
    _native.select(request.param)
    yield request.param
    _native.select(best)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(7)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


@pytest.fixture
def ops() -> cpu.Cpu:
    """A backend whose results nothing else has touched."""
    return cpu.Cpu(CPU, 2)


@pytest.fixture
def threads(ops):
    """threads(n): ops computes with so many from now on."""

    def change(n: int) -> None:
        ops._pool = _native.Pool(n)

    return change


@pytest.mark.parametrize("rows, inner", [(64, 256), (352, 160), (40, 72), (33, 67), (7, 31), (16, 128)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_rows_lie_in_panels(ops, noise, kind, rows, inner):
    """Units of four bytes of 32 rows lie side by side, unit after unit; codes of int8 with 128 added."""
    each = {"float32": 1, "bfloat16": 2, "int8": 4}[kind]
    step = {"float32": 1, "bfloat16": 32, "int8": 64}[kind]
    values = noise(rows, inner)
    weight = (
        Weight("plain", values.to(getattr(torch, kind))) if kind != "int8" else Weight("plain", values).quantize(kind)
    )
    packed = ops.pack_linear([weight], torch.bfloat16 if kind == "bfloat16" else torch.float32)
    copy = ops.records(packed)
    buffer = torch.zeros(copy.nbytes, dtype=torch.uint8)
    copy.copy(0, buffer)
    panels, depth = -(-rows // 32), -(-inner // step) * step
    codes = (weight.codes.view(torch.uint8) ^ 128) if kind == "int8" else weight.codes
    expected = torch.full((panels * 32, depth), 128 if kind == "int8" else 0).to(codes.dtype)
    expected[:rows, :inner] = codes
    expected = expected.view(panels, 32, depth // each, each).transpose(1, 2).contiguous().view(-1)
    found = buffer[: expected.nbytes].view(codes.dtype)
    if kind == "int8" and rows % 32:  # columns beyond the last row have no codes
        mask = (torch.arange(panels * 32) < rows).view(panels, 32, 1, 1).expand(-1, -1, depth // each, each)
        mask = mask.transpose(1, 2).reshape(-1)
        found, expected = found[mask], expected[mask]
    assert torch.equal(found, expected)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(width), b.view(width))


# ---- attention -----------------------------------------------------------------------------------------------------


class Sequences:
    """Sequences of some lengths in one cache (of dtype, or of codes), and a query for every position of each: row p of
    queries[s]."""

    def __init__(
        self,
        ops: cpu.Cpu,
        noise,
        dtype: torch.dtype,
        codes: bool,
        lengths: list[int],
        heads: tuple[int, int],
        width: int,
        size=16,
    ):
        self.ops, self.lengths, self.size, (h, g) = ops, lengths, size, heads
        needed = [-(-n // size) for n in lengths]
        order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).tolist()
        self.blocks = [[order.pop() for _ in range(n)] for n in needed]
        spec = KVCacheSpec(1, size, g, width, torch.int8 if codes else dtype)
        self.cache = ops.allocate_kv(spec, sum(needed))[0]
        for each in (self.cache.keys, self.cache.values):
            each.fill_(-1 if codes else torch.nan)  # all bits set: a scale of NaN, too
        self.queries = [noise(n, h, width, dtype=dtype) for n in lengths]
        self.kv = [noise(2, n, g, width, dtype=dtype) for n in lengths]
        for s, (k, v) in enumerate(self.kv):
            self.store(s, k, v)

    def store(self, s: int, k: Tensor, v: Tensor) -> None:
        slots = [self.blocks[s][p // self.size] * self.size + p % self.size for p in range(len(k))]
        self.ops.store_kv_(k, v, self.cache, torch.tensor(slots))

    def attend(self, *chunks: tuple[int, int, int]) -> list[Tensor]:
        """One call for chunks (sequence, first position, last + 1): the rows of each."""
        counts = [b - a for _, a, b in chunks]
        rows, tables = [0] * sum(counts), [self.blocks[s] for s, _, _ in chunks]
        batch = Batch.of(rows, rows, rows, tables, [], counts, [b for _, _, b in chunks])
        q = torch.cat([self.queries[s][a:b] for s, a, b in chunks])
        return list(self.ops.attention(q, self.cache, batch, q.shape[2] ** -0.5).split(counts))


@pytest.fixture(params=[False, True], ids=["", "int8 cache"])
def codes(request) -> bool:
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("heads, width", [((24, 2), 128), ((96, 8), 64), ((3, 1), 16), ((4, 4), 44)], ids=str)
def test_a_row_of_attention_is_the_same_alone_in_a_batch_and_in_a_chunk(
    heads, width, dtype, codes, ops, noise, threads
):
    lengths = [1, 2, 15, 16, 17, 31, 33, 64, 127, 128, 129, 150, 200, 255, 257, 300] * 2
    some = Sequences(ops, noise, dtype, codes, lengths, heads, width)
    threads(2)
    whole = some.attend(*((s, 0, n) for s, n in enumerate(lengths)))
    threads(1)
    ends = some.attend(*((s, n - 1, n) for s, n in enumerate(lengths)))  # a batch of 32 that decodes
    assert all(same(end, rows[-1:]) for end, rows in zip(ends, whole))
    for s in (0, 4, 9, 15):
        n = lengths[s]
        assert same(torch.cat([some.attend((s, a, min(a + 7, n)))[0] for a in range(0, n, 7)]), whole[s])
        for p in {0, n // 3, n - 1}:
            assert same(some.attend((s, p, p + 1))[0], whole[s][p : p + 1])


@pytest.mark.slow
def test_a_row_of_attention_over_many_keys_is_the_same_however_they_are_divided(dtype, codes, ops, noise, threads):
    """Alone, its splits are tasks of their own; beside others, one thread does them all."""
    some = Sequences(ops, noise, dtype, codes, [5000, 2100, 2049, 2048], (6, 2), 64)
    last = [(s, n - 1, n) for s, n in enumerate(some.lengths)]
    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append([some.attend(chunk)[0] for chunk in last])
        found.append(some.attend(*last))
        found.append([some.attend((s, n - 40, n))[0][-1:] for s, n in enumerate(some.lengths)])
        found.append([rows[-1:] for rows in some.attend(*((s, n - 900, n) for s, n in enumerate(some.lengths)))])
    for rows in found[1:]:
        assert all(same(a, b) for a, b in zip(rows, found[0]))


def test_what_is_broken_in_one_sequence_stays_there(dtype, codes, ops, noise):
    some = Sequences(ops, noise, dtype, codes, [40, 150, 33], (4, 2), 32)
    before = some.attend((0, 0, 40), (1, 0, 150), (2, 0, 33))
    some.queries[0][7, 3, 0] = torch.nan
    after = some.attend((0, 0, 40), (1, 0, 150), (2, 0, 33))
    assert after[0][7, 3 * 32 :].isnan().all() and same(after[0][7, : 3 * 32], before[0][7, : 3 * 32])
    for s, rows in enumerate(before):
        keep = [r for r in range(len(rows)) if (s, r) != (0, 7)]
        assert same(after[s][keep], rows[keep])

    before = after
    for bad in (torch.nan, torch.inf):
        k, v = some.kv[1].clone()
        k[130, 1, 5] = torch.nan
        v[131, 1, :] = bad
        some.store(1, k, v)
        after = some.attend((0, 0, 40), (1, 0, 150), (2, 0, 33))
        assert same(after[0], before[0]) and same(after[2], before[2])
        assert same(after[1][:130], before[1][:130]), "what came before saw nothing of it"
        assert after[1][130:, 2 * 32 :].isnan().all() and same(after[1][130:, : 2 * 32], before[1][130:, : 2 * 32])
    k, v = some.kv[1].clone()
    v[100, 0, 3] = torch.inf
    some.store(1, k, v)
    after = some.attend((1, 0, 150))[0]
    assert same(after[:100], before[1][:100]) and not after[100:, 3].isfinite().any()
    if codes:  # which have one scale for all columns of a head
        assert after[100:, : 2 * 32].isnan().all() and same(after[100:, 2 * 32 :], before[1][100:, 2 * 32 :])
    else:
        assert same(after[100:, 4:32], before[1][100:, 4:32])


def test_attention_over_blocks_of_any_size(dtype, codes, ops, noise):
    """Sizes that are no multiple of a strip are the reference's. All of them agree."""
    any_block = cpu.CpuAnyBlock(CPU, 2)
    served = [(ops, 16), (ops, 48), (any_block, 7)]
    found = [Sequences(who, noise, dtype, codes, [100], (4, 2), 32, size) for who, size in served]
    for other in found[1:]:
        other.queries = found[0].queries
        other.store(0, *found[0].kv[0])
    first, second, third = (some.attend((0, 60, 100))[0] for some in found)
    assert same(first, second)
    torch.testing.assert_close(first, third, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


# ---- the others ----------------------------------------------------------------------------------------------------


def row_ops(ops: cpu.Cpu, noise, dtype: torch.dtype) -> dict:
    """name -> op(x (T, 512)) for every op that maps rows to rows."""

    def packed(kind: str, out: int, inner: int) -> Weight:
        codes, scales = noise(out, inner), noise(out, 1).abs()
        match kind:
            case "plain":
                return Weight("plain", codes.to(dtype))
            case "fp8":
                return Weight("fp8", (codes * 100).clamp(-448, 448).to(torch.float8_e4m3fn), scales)
            case "int8":
                return Weight("int8", (codes * 50).clamp(-127, 127).to(torch.int8), scales)
        nibbles = (codes[:, : inner // 2] * 1e4).long().remainder(256).to(torch.uint8)
        zeros = nibbles[:, : inner // 32] % 16 if kind == "int4 with zeros" else None
        return Weight("int4", nibbles, noise(out, inner // 32).abs(), zeros, 32)

    rule = RouteRule(8, 1, 1, True, 1.0)
    weight, bias = noise(512, dtype=dtype), noise(64)
    residual = noise(1, 512)
    served = {
        "rms_norm": lambda x: ops.rms_norm(x, weight, 1e-5),
        "rms_norm of heads": lambda x: ops.rms_norm(x.view(len(x), 8, 64)[:, 1:6], weight[:64], 1e-5),
        "add_rms_norm": lambda x: torch.cat(ops.add_rms_norm(x, residual.expand(len(x), -1), weight, 1e-5), 1),
        "swiglu": ops.swiglu,
        "route": lambda x: torch.cat(ops.route(x[:, :64].float(), bias, rule), 1),
    }
    for kind in ("plain", "fp8", "int8", "int4", "int4 with zeros"):
        one = ops.pack_linear([packed(kind, 100, 512)], dtype)
        gate_up = [[packed(kind, 96, 512), packed(kind, 96, 512)] for _ in range(8)]
        each = (ExpertWeights(pair, packed(kind, 512, 96)) for pair in gate_up)
        experts = ops.pack_experts(each, 8, dtype)
        served[f"linear {kind}"] = lambda x, one=one: ops.linear(x, one, bias.new_ones(100))

        def mix(x: Tensor, experts=experts) -> Tensor:
            ids = x[:, :8].float().argsort(1)[:, :3]
            return ops.experts(x, ids, x[:, :3].float(), experts)

        served[f"experts {kind}"] = mix
    return served


def test_rows_are_the_same_alone_and_among_others(ops, dtype, noise, threads):
    x = noise(300, 512, dtype=dtype)
    for name, op in row_ops(ops, noise, dtype).items():
        threads(2)
        whole = op(x)
        threads(1)
        for a, b in ((0, 1), (7, 8), (299, 300), (3, 9), (0, 32), (100, 143)):
            assert same(op(x[a:b]), whole[a:b]), f"{name}: rows {a}..{b}"


def test_rows_of_a_wide_matrix_are_the_same_alone_and_among_others(ops, dtype, noise):
    """Many rows of fp8 take a wide matrix in stretches."""
    x, codes = noise(40, 9000, dtype=dtype), (noise(70, 9000) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    packed = ops.pack_linear([Weight("fp8", codes, noise(70, 1).abs())], dtype)
    whole = ops.linear(x, packed, None)
    for a, b in ((0, 1), (39, 40), (5, 18)):
        assert same(ops.linear(x[a:b], packed, None), whole[a:b])


@pytest.mark.parametrize("inner", [512, 7, 333], ids=str)
def test_float32_weights_that_bfloat16_holds_take_half_the_memory_and_give_the_same_bits(ops, inner, dtype, noise):
    codes, x = noise(100, inner).bfloat16(), noise(300, inner, dtype=dtype)
    x[:, 0] = torch.where(torch.arange(300) % 2 == 0, torch.nan, x[:, 0])  # what follows a row of odd width
    half, whole = (ops.pack_linear([Weight("plain", c)], torch.float32) for c in (codes, codes.float()))
    assert same(ops.linear(x, half, None), ops.linear(x, whole, None)) and half.float32
    assert inner < 512 or half.nbytes < 0.51 * whole.nbytes


@pytest.mark.parametrize("inner, group", [(512, 32), (512, 128), (704, 704)], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_packed_bytes_are_those_of_what_is_packed(ops, inner, group, stored, noise):
    weight = Weight("plain", noise(96, inner)).quantize("int4", group)
    scales = (weight.scales * (1 if stored == torch.bfloat16 else 1 + 2**-10)).to(stored).float()
    int8 = Weight("plain", noise(96, inner)).quantize("int8")
    for each in (Weight("int4", weight.codes, scales, weight.zeros, group, stored), int8):
        held = ops.pack_linear([each], torch.bfloat16).nbytes
        predicted = ops.packed_bytes(each)
        assert 0 <= held - predicted <= 4096 + 64, "and a little room at the end"


def test_memory_of_results_is_used_again_but_never_while_anyone_holds_it(ops):
    ops._results = _native.BufferPool(8 << 20)
    shape = (1 << 10, 1 << 9)
    first, other = (ops._new(*shape, dtype=torch.float32) for _ in range(2))
    assert first.shape == shape and first.is_contiguous() and first.data_ptr() != other.data_ptr()
    first.fill_(1), other.fill_(2)
    place, part = first.data_ptr(), first[512:]
    del first
    held = [ops._new(*shape, dtype=torch.float32).fill_(3) for _ in range(3)]
    assert part.eq(1).all() and other.eq(2).all(), "a part of a result keeps the whole"
    del part
    again = ops._new(1 << 11, 1 << 9, dtype=torch.bfloat16)
    assert again.data_ptr() == place and again.dtype == torch.bfloat16
    assert all(each.eq(3).all() for each in held)
    del again, held, other  # ten megabytes, of which eight are kept
    memory = [ops._results.acquire(2 << 20) for _ in range(5)]
    assert sum(bool(each.any()) for each in memory) == 4


def test_a_recording_repeats_its_calls_in_little_memory(ops, noise):
    """Of many results two are alive at a time; a second capture lies in the same memory; other backends stay out."""
    up, down = (
        ops.pack_linear([Weight("plain", noise(*shape).bfloat16() / 16)], torch.bfloat16)
        for shape in ((1024, 256), (256, 512))
    )

    def chain(x: Tensor) -> Tensor:
        for _ in range(16):
            x = ops.linear(ops.swiglu(ops.linear(x, up, None)), down, bias)
        return x

    bias = noise(256).bfloat16()
    few, many = noise(3, 256, dtype=torch.bfloat16), noise(40, 256, dtype=torch.bfloat16)
    foreign, another = torch.full((1, 4), 1.0), cpu.Cpu(CPU, 1)

    def captured() -> Tensor:
        another.add_(foreign, torch.ones(1, 4))
        return chain(few)

    calls = ops.capture(captured)
    others = ops.capture(lambda: chain(many))
    mine, theirs = calls.output, others.output
    places = {calls.memory.acquire(1).data_ptr() for _ in range(50)}
    assert mine.data_ptr() != theirs.data_ptr() and len(places) <= 4
    for x, y, captured in ((few, mine, calls), (many, theirs, others), (few, mine, calls)):
        x.copy_(noise(*x.shape))
        captured.replay()
        assert same(y, chain(x))
    assert foreign.eq(2).all()


@pytest.mark.parametrize("block_size", [16, 5])
def test_captures_of_many_sizes_hold_no_results(block_size, noise):
    """Their outputs are their own; all else lies in memory that they share, also what torch computes."""
    spec = KVCacheSpec(1, block_size, 2, 32, torch.bfloat16)
    ops = cpu.Cpu.make(CPU, 1, spec)
    [kv] = ops.allocate_kv(spec, 4)
    memory, places = ops._capture_memory, set()

    class Counting:
        def acquire(self, nbytes: int) -> Tensor:
            place = memory.acquire(nbytes)
            places.add(place.data_ptr())
            return place

    ops._capture_memory = Counting()

    def step(x: Tensor, slots: Tensor) -> Tensor:
        x = ops.swiglu(ops.concat(ops.swiglu(x), ops.swiglu(x)))
        ops.store_kv_(x[:, :64].unflatten(1, (2, 32)), x[:, 64:].unflatten(1, (2, 32)), kv, slots)
        return ops.concat(x, x)

    captures, counts = [], []
    for rows in range(1, 13):
        x, slots = noise(rows, 256, dtype=torch.bfloat16), torch.arange(rows)
        captures.append((x, slots, ops.capture(lambda x=x, slots=slots: step(x, slots))))
        counts.append(len(places))
    assert counts[0] == counts[-1] < 8
    for x, slots, captured in captures:
        x.copy_(noise(*x.shape))
        captured.replay()
        assert same(captured.output, step(x, slots))


def test_broken_rows_stay_alone(ops, dtype, noise):
    x = noise(40, 512, dtype=dtype)
    broken = x.clone()
    broken[11, 5], broken[12, 8] = torch.nan, torch.inf
    rest = [r for r in range(40) if r not in (11, 12)]
    for name, op in row_ops(ops, noise, dtype).items():
        before, after = op(x), op(broken)
        assert same(before[rest], after[rest]), name
        if name not in ("route", "rms_norm of heads"):
            assert not after[11].isfinite().all(), name


def test_routing_with_broken_logits_chooses_experts_that_exist(ops):
    for groups in (1, 4):
        logits = torch.full((3, 16), torch.nan)
        logits[1, :] = -torch.inf
        logits[2, ::2] = 0
        ids, scores = ops.route(logits, torch.zeros(16), RouteRule(4, groups, min(groups, 2), True, 2.0))
        assert ((ids >= 0) & (ids < 16)).all() and all(len(set(row)) == 4 for row in ids.tolist())
        assert scores[0].isnan().all() and scores[1].max() < 1e-15 and scores[2].isnan().all()


def test_of_equal_choices_the_first_are_taken(ops):
    ids, _ = ops.route(torch.zeros(1, 16), torch.zeros(16), RouteRule(4, 4, 2, True, 1.0))
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_what_does_not_fit_is_refused(ops, noise):
    x, kv, codes = noise(3, 2, 32), noise(2, 2, 16, 2, 32), torch.zeros(2, 2, 16, 2, 36, dtype=torch.int8)
    cache = KVCache(*kv, 32)
    one = torch.zeros(1, 1, dtype=torch.int64)

    def batch(table: Tensor, counts=(3,), lens=(5,)) -> Batch:
        return Batch.of([0] * 3, [0] * 3, [0] * 3, table.tolist(), [], counts, lens)

    rule = RouteRule(4, 1, 1, True, 1.0)
    refused = [
        lambda: ops.rms_norm(x, noise(31), 1e-5),
        lambda: ops.rms_norm(x.double(), noise(32), 1e-5),
        lambda: ops.add_rms_norm(x[0], noise(3, 32), noise(32), 1e-5),
        lambda: ops.add_(noise(3, 5), noise(3, 4)),
        lambda: ops.add_(noise(5, 3).T, noise(3, 5)),
        lambda: ops.swiglu(noise(3, 5)),
        lambda: ops.embed(one[0].int(), noise(4, 4), 0),
        lambda: ops.rope_(x, x[:2], noise(3, 4), noise(3, 4)),
        lambda: ops.rope_(x, x, noise(3, 17), noise(3, 17)),
        lambda: ops.rope_(x.mT, x.mT, noise(3, 1), noise(3, 1)),
        lambda: ops.route(noise(3, 8), noise(9), rule),
        lambda: ops.forbid_(noise(3, 9), one.new_zeros(3, 1).byte()),
        lambda: ops.forbid_(noise(3, 8), one.new_zeros(2, 1).byte()),
        lambda: ops.forbid_(noise(8, 3).T, one.new_zeros(3, 1).byte()),
        lambda: ops.forbid_(noise(3, 8), one.new_zeros(3, 1)),
        lambda: ops.argmax_(one.new_zeros(2), noise(3, 8)),
        lambda: ops.argmax_(one.new_zeros(3).int(), noise(3, 8)),
        lambda: ops.argmax_(one.new_zeros(3), noise(8, 3).T),
        lambda: ops.argmax_(one.new_zeros(3), noise(3, 0)),
        lambda: ops.concat(noise(3, 4), noise(2, 4)),
        lambda: ops.concat(noise(3, 4), noise(3, 4).bfloat16()),
        lambda: ops.route(noise(3, 3), noise(3), rule),
        lambda: ops.route(noise(3, 16), noise(16), RouteRule(4, 3, 1, True, 1.0)),
        lambda: ops.store_kv_(x, x, cache, torch.tensor([0, 1, 32])),
        lambda: ops.store_kv_(x, x, cache, torch.tensor([0, 1, -1])),
        lambda: ops.store_kv_(x, x[:2], cache, torch.tensor([0, 1, 2])),
        lambda: ops.store_kv_(x.bfloat16(), x.bfloat16(), cache, torch.tensor([0, 1, 2])),
        lambda: ops.attention(x, cache, batch(one - 1), 1.0),
        lambda: ops.attention(x, cache, batch(one + 2), 1.0),
        lambda: ops.attention(x, cache, batch(one, lens=(2,)), 1.0),
        lambda: ops.attention(x, cache, batch(one, lens=(17,)), 1.0),
        lambda: ops.attention(x, cache, batch(one, counts=(2,)), 1.0),
        lambda: ops.attention(x, cache, batch(one, counts=(1, 2)), 1.0),
        lambda: ops.attention(noise(3, 3, 32), cache, batch(one), 1.0),
        lambda: ops.attention(x.bfloat16(), cache, batch(one), 1.0),
        lambda: ops.attention(x, KVCache(kv[0], kv[1].mT, 32), batch(one), 1.0),
        lambda: ops.attention(x, KVCache(*codes[..., :32].contiguous(), 32), batch(one), 1.0),
        lambda: ops.attention(x, KVCache(codes[0], kv[1], 32), batch(one), 1.0),
        lambda: ops.attention(x, KVCache(*codes.float(), 32), batch(one), 1.0),
        lambda: ops.store_kv_(x, x, KVCache(*codes[..., :32].contiguous(), 32), torch.tensor([0, 1, 2])),
        lambda: ops.store_kv_(x.double(), x.double(), KVCache(*codes, 32), torch.tensor([0, 1, 2])),
    ]
    for i, call in enumerate(refused):
        with pytest.raises(ValueError):
            call()
            pytest.fail(f"number {i} was accepted")


# ---- threads -------------------------------------------------------------------------------------------------------


def test_a_forked_process_starts_threads_of_its_own(ops, noise):
    weight, x = ops.pack_linear([Weight("plain", noise(600, 512))], torch.float32), noise(70, 512)
    expected = ops.linear(x, weight, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about forks of processes with threads
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.linear(x, weight, None), expected) else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "the child waits for threads that it does not have"
        time.sleep(0.01)
    assert ended[1] == 0 and torch.equal(ops.linear(x, weight, None), expected)


def test_threads_may_share_a_backend(ops, noise):
    """Its pool computes for one of them at a time."""
    weight, x = ops.pack_linear([Weight("plain", noise(600, 512))], torch.float32), noise(70, 512)
    expected, found = ops.linear(x, weight, None), []
    many = [threading.Thread(target=lambda: found.append(ops.linear(x, weight, None))) for _ in range(20)]
    for thread in many:
        thread.start()
    for thread in many:
        thread.join(60)
    assert len(found) == 20 and all(same(y, expected) for y in found)


def test_more_threads_than_cpus_give_the_same_bits_and_do_not_wait_for_each_other(ops, noise):
    """Most of them have no CPU: with and without their help, the rows are the same."""
    weight, x = ops.pack_linear([Weight("plain", noise(600, 512))], torch.float32), noise(70, 512)
    expected, many = ops.linear(x, weight, None), cpu.Cpu(ops.device, 50)
    deadline = time.monotonic() + 60
    for i in range(300):
        rows = 1 + i % 70
        assert same(many.linear(x[:rows], weight, None), expected[:rows])
        assert time.monotonic() < deadline, f"{i} of 300 in a minute"


@pytest.mark.parametrize("n", [0, -1, 1 << 20])
def test_pools_of_impossible_size_are_refused(n):
    with pytest.raises(ValueError, match="thread"):
        _native.Pool(n)


@pytest.mark.parametrize(
    "size, width, words",
    [
        (12, 64, "block_size=12 is no multiple"),
        (16, 63, "head_dim=63 is odd"),
        (12, 63, "multiple of 16 and head_dim=63"),
    ],
)
def test_slow_attention_is_named_with_its_own_reason(size, width, words, caplog):
    assert isinstance(cpu.Cpu.make(CPU, 1, KVCacheSpec(1, size, 2, width, torch.float32)), cpu.CpuAnyBlock)
    [said] = [record.getMessage() for record in caplog.records]
    assert words in said and ("block_size" in said) == (size == 12) and ("head_dim" in said) == (width == 63)
