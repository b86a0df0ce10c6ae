"""Every op of every backend on this machine against its definition, written out here once more in plain torch.

A definition is one function, evaluated twice: in float64 it is the truth, in the op's own dtype it shows what plain
torch makes of it. An op passes if its error is at most twice plain torch's, plus two roundings of its result: how
plain torch rounds differs from processor to processor, and on some it is lucky.
"""

import errno
import importlib
import importlib.util
import itertools
import pkgutil
import threading
from collections.abc import Iterator

import numpy
import pytest
import torch
from torch import Tensor

from glimmer import backends
from glimmer import device as devices
from glimmer.backends.base import LAYOUTS, OPS, Backend, KVCache, KVCacheSpec, RouteRule
from glimmer.backends.selection import choose, names
from glimmer.backends.timed import Timed
from glimmer.batch import Batch
from glimmer.weight import ExpertWeights, Kind, Weight

pytestmark = pytest.mark.slow

try:
    from glimmer.backends import cpu
except ImportError:
    cpu = None

KINDS = devices.available()
INTERPRETED = "cpu triton"  # conftest.py asks for Triton's interpreter, where there is Triton
SETS = [f"cpu cpu {name}" for name in cpu._native.available().split() if name != cpu._native.isa()] if cpu else []
ALSO = [f"{kind} {name}" for kind in KINDS for name in names(torch.device(kind))[1:]]


@pytest.fixture(scope="module", params=[*KINDS, *ALSO, *SETS])
def served(request) -> Iterator[tuple[Backend, torch.device]]:
    """(ops, device): all that serve each device, the best first, and each other instruction set."""
    kind, only, name = [*request.param.split(), "", ""][:3]
    best = cpu._native.isa() if cpu else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIMMER_BACKEND", only)
        ops = choose(torch.device(kind))
    if name:
        cpu._native.select(name)
    before = numpy.seterr(all="ignore")  # Triton's interpreter would warn where a GPU computes NaN
    yield ops, torch.device(kind)
    numpy.seterr(**before)
    if name:
        cpu._native.select(best)


def cache_of(ops: Backend, blocks: int, size: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Backend, KVCache]:
    """A cache of one layer, and the backend that serves it in the place of `ops`."""
    spec = KVCacheSpec(1, size, heads, dim, dtype)
    if cpu and isinstance(ops, cpu.Cpu) and not cpu.fits_strips(spec):
        ops = cpu.CpuAnyBlock(ops.device, ops.threads)
    return ops, ops.allocate_kv(spec, blocks)[0]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


# Triton's interpreter takes seconds for what a GPU does in microseconds: of these parameters it gets so many values.
INTERPRETED_VALUES = {
    "inner": (64, 88),
    "width": (1, 44, 63, 64, 88),
    "rows": range(34),
    "case": ("one token", "few of many"),
    "heads": ("3 over 1", (3, 1)),
    "size": (5,),
    "steps": ("everything at once", "several decode", [(20, 20)]),
    "step": (),
    "bad": (torch.inf,),
}


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch) -> None:
    """Triton's interpreter is not asked for what it computes differently from a GPU, or for minutes."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("served") == INTERPRETED:
        if torch.bfloat16 in params.values():
            pytest.skip("Triton's interpreter cuts what a GPU rounds to bfloat16")
        if any(params[name] not in few for name, few in INTERPRETED_VALUES.items() if name in params):
            pytest.skip("minutes in Triton's interpreter")
        for name, few in (("SPLIT", 16), ("MAX_SPLITS", 4)):  # of few keys, too, there are several splits
            monkeypatch.setattr(f"glimmer.backends.cuda.backend.{name}", few)


@pytest.fixture
def noise():
    """noise(*shape, dtype=...) -> normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return draw


TRUTHS: dict[tuple, tuple[Tensor, Tensor]] = {}


def double(value):
    """The same in float64, whatever it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list):
        return [double(v) for v in value]
    return value


def assert_close(found: Tensor, definition, *inputs, case: tuple = ()) -> None:
    """The tolerance of this file. case: names these inputs, so that their truth is computed for one backend only."""
    if not case or case not in TRUTHS:
        TRUTHS[case] = definition(*double(list(inputs))), definition(*inputs)
    truth, plain = TRUTHS[case]
    error = (found.cpu().double() - truth).abs().max()
    allowed = 2 * (plain.double() - truth).abs().max() + 2 * torch.finfo(found.dtype).eps * truth.abs().max()
    assert found.isfinite().all() and error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def call(op, device: torch.device, *inputs, changes: tuple[int, ...] = ()):
    """op(*inputs) on the device; its inputs stay as they are, except those that it is there to change."""
    there = [value.to(device) if isinstance(value, Tensor) else value for value in inputs]
    before = [value.clone() if isinstance(value, Tensor) else value for value in there]
    result = op(*there)
    for i, (a, b) in enumerate(zip(there, before)):
        if isinstance(a, Tensor) and i not in changes:
            assert torch.allclose(a, b, 0, 0, equal_nan=True), f"input {i} was changed"
    return [there[i].cpu() for i in changes] if changes else result


# ---- small ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, rows", [(1, 1), (63, 2), (64, 1), (200, 3), (40_009, 5)])
def test_forbid(width, rows, served, noise):
    ops, device = served
    padded = noise(rows, width + 7)
    padded[0, 0], padded[-1, width - 1] = float("nan"), float("inf")
    allowed = torch.randint(256, (rows, -(-width // 8) + 1), dtype=torch.uint8)
    allowed[:, : allowed.shape[1] // 3] = 255  # words without anything to do, and words with nothing else
    allowed[:, -(allowed.shape[1] // 3) :] = 0
    [found] = call(lambda x, bits: ops.forbid_(x[:, :width], bits), device, padded, allowed, changes=(0,))
    for row, bits, before in zip(found, allowed.tolist(), padded):
        expected = [x if bits[i // 8] >> i % 8 & 1 else float("-inf") for i, x in enumerate(before[:width].tolist())]
        assert torch.equal(row.nan_to_num(9), torch.tensor(expected + before[width:].tolist()).nan_to_num(9))


@pytest.mark.parametrize("width, rows", [(1, 1), (63, 2), (200, 3), (40_009, 2)])
def test_argmax(width, rows, served, dtype, noise):
    """The first of the largest, of which there are several in the first row."""
    ops, device = served
    padded = noise(rows, width + 7, dtype=dtype)
    padded[:, width:] = 100.0  # what the logits are a part of
    padded[0, width // 3] = padded[0, width // 2] = padded[0, width - 1] = 9.0
    tokens = torch.full((rows,), -1)
    [found] = call(lambda tokens, x: ops.argmax_(tokens, x[:, :width]), device, tokens, padded, changes=(0,))
    lists = padded[:, :width].tolist()
    assert found.dtype == torch.int64 and found.tolist() == [row.index(max(row)) for row in lists]


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("first, held", [(0, 50), (10, 5), (49, 1)])
def test_embed(rows, first, held, served, dtype, noise):
    ops, device = served
    table, tokens = noise(held, 36, dtype=dtype), torch.arange(rows) * 7 % 50
    found = call(ops.embed, device, tokens, table, first).cpu()
    assert found.dtype == dtype
    for token, row in zip(tokens.tolist(), found):
        inside = first <= token < first + held
        assert torch.equal(row, table[token - first] if inside else torch.zeros(36, dtype=dtype))


def test_embed_keeps_a_broken_row_to_itself(served):
    """NaN in a rank's first row is no reason to spoil tokens that other ranks hold."""
    ops, device = served
    table = torch.tensor([[float("nan")], [2.0]], device=device)
    found = ops.embed(torch.tensor([0, 4, 5, 9], device=device), table, 4).cpu()
    assert found[[0, 2, 3], 0].tolist() == [0, 2, 0] and found[1].isnan().all()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(1, 64), (7, 44), (7, 5120), (3, 12, 128)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_rms_norm(shape, eps, served, dtype, noise):
    ops, device = served
    x, weight = noise(*shape, dtype=dtype, scale=3), 1 + noise(shape[-1], dtype=dtype, scale=0.1)
    found = call(ops.rms_norm, device, x, weight, eps)
    assert found.dtype == dtype and found.shape == x.shape
    assert_close(found, rms_norm, x, weight, eps)


def test_rms_norm_of_nothing_and_of_much(served, dtype):
    ops, device = served
    x = torch.tensor([[0.0] * 8, [1e-4] * 8, [3e18] * 8], dtype=dtype)
    found = call(ops.rms_norm, device, x, torch.ones(8, dtype=dtype), 1e-5).tolist()
    assert found[0] == [0] * 8
    assert found[1] == pytest.approx([1e-4 / (1e-8 + 1e-5) ** 0.5] * 8, rel=0.01)
    assert found[2] == pytest.approx([1] * 8, rel=0.01)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["residual float32", "residual bfloat16"])
@pytest.mark.parametrize("rows", [1, 7])
def test_add_rms_norm(rows, kept, served, dtype, noise):
    ops, device = served
    x, residual, weight = noise(rows, 176, dtype=dtype), noise(rows, 176, dtype=kept, scale=4), noise(176, dtype=dtype)
    normed, total = call(ops.add_rms_norm, device, x, residual, weight, 1e-5)
    assert normed.dtype == dtype and total.dtype == kept
    assert_close(total, lambda x, residual: (x + residual).to(residual.dtype), x, residual)
    # From the sum as it is kept: what is lost in keeping it is lost for the next layer, too.
    assert_close(normed, rms_norm, total.cpu().to(dtype) if dtype == kept else total.cpu().float(), weight, 1e-5)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["sum float32", "sum bfloat16"])
@pytest.mark.parametrize("rows, width", [(1, 44), (7, 88), (300, 176)])
def test_add(rows, width, kept, served, dtype, noise):
    ops, device = served
    x, y = noise(rows, width, dtype=dtype), noise(rows, width, dtype=kept, scale=4)
    (found,) = call(ops.add_, device, y.clone(), x, changes=(0,))
    assert found.dtype == kept
    assert_close(found, lambda x, y: (y + x).to(y.dtype), x, y)


def test_concat(served, dtype, noise):
    ops, device = served
    x, y = noise(5, 44, dtype=dtype), noise(5, 16, dtype=dtype)
    assert torch.equal(call(ops.concat, device, x, y).cpu(), torch.cat((x, y), 1))
    if ops.captures:
        calls = ops.capture(lambda: ops.concat(x, y))
        x.copy_(noise(5, 44, dtype=dtype))
        calls.replay()
        assert torch.equal(calls.output, torch.cat((x, y), 1))


@pytest.mark.parametrize("rows, width", [(1, 44), (7, 88), (33, 176), (2, 1408)])
def test_swiglu(rows, width, served, dtype, noise):
    ops, device = served
    x = noise(rows, 2 * width, dtype=dtype, scale=4)
    found = call(ops.swiglu, device, x)
    assert found.shape == (rows, width) and found.dtype == dtype
    assert_close(found, lambda x: x[:, :width] / (1 + (-x[:, :width]).exp()) * x[:, width:], x)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension i of the first half of the rotated part turns with dimension i of its second half."""
    half, out = cos.shape[1], x.clone()
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * cos[:, None, i] - b * sin[:, None, i]
        out[..., i + half] = b * cos[:, None, i] + a * sin[:, None, i]
    return out


@pytest.mark.parametrize("heads, dim, turned", [((96, 8), 128, 64), ((3, 1), 16, 4), ((2, 2), 12, 12)], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_rope(rows, heads, dim, turned, served, dtype, noise):
    """In place, on views of one matrix, as the model calls it; the rest of each head, and v, stay as they were."""
    ops, device = served
    angles = torch.arange(rows)[:, None] * 1e6 ** (-torch.arange(0, turned, 2) / turned) + 1000
    qkv = noise(rows, sum(heads) + heads[1], dim, dtype=dtype).to(device)
    before, cos, sin = qkv.cpu().clone(), angles.cos(), angles.sin()
    q, k, _ = qkv.split((*heads, heads[1]), 1)
    assert ops.rope_(q, k, cos.to(device), sin.to(device)) is None
    after = qkv.cpu()
    q, k, v = before.split((*heads, heads[1]), 1)
    assert_close(after[:, : heads[0]], rope, q, cos, sin)
    assert_close(after[:, heads[0] : sum(heads)], rope, k, cos, sin)
    assert torch.equal(after[..., turned:], before[..., turned:]) and torch.equal(after[:, sum(heads) :], v)


@pytest.mark.parametrize("size", [5, 16, 32])
def test_store_kv(size, served, dtype, noise):
    """Slots are found again by attention: each key answers to a query of its own, so loudly that no other is heard."""
    ops, device = served
    ops, cache = cache_of(ops, 3, size, 2, 96, dtype)
    cache.keys.fill_(1e4), cache.values.fill_(1e4)
    kv = noise(3 * size, 4, 96, dtype=dtype)
    kv[:, :2] = torch.eye(96)[: 3 * size, None] * 100
    order = torch.randperm(3 * size, generator=torch.Generator().manual_seed(1))
    for slots, rows in ((order.flip(0)[:7], -kv), (order, kv)):  # some are written over
        k, v = rows[slots].to(device).split(2, 1)  # views of one tensor, as in the model
        ops.store_kv_(k, v, cache, slots.to(device))
    k, v = kv.split(2, 1)
    blocks, size = torch.tensor([[1, 2, 0]]), 3 * size
    batch = Batch.of([0], [size - 1], [0], blocks.tolist(), [0], [1], [size]).to(device)
    for p, slot in enumerate(torch.arange(size).view(3, -1)[blocks[0]].flatten().tolist()):
        q = k[slot].repeat_interleave(3, 0)[None]
        found = ops.attention(q.to(device), cache, batch, 1.0).cpu().view(2, 3, 96)
        assert torch.equal(found, v[slot][:, None].expand(-1, 3, -1)), f"position {p}, slot {slot}"


# ---- matrices ------------------------------------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x @ w.T if bias is None else x @ w.T + bias


SIZES = [(1, 64, 44), (7, 44, 88), (3, 88, 176), (4, 176, 1408), (33, 1408, 64), (2, 4096, 5), (30, 10944, 33)]


@pytest.mark.parametrize("rows, inner, out", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_linear(rows, inner, out, bias, stored, served, dtype, noise):
    ops, device = served
    x, w = noise(rows, inner, dtype=dtype), noise(out, inner, dtype=stored, scale=inner**-0.5)
    b = noise(out, dtype=dtype) if bias else None
    packed = ops.pack_linear([Weight("plain", w)], dtype)
    found = call(lambda x: ops.linear(x, packed, None if b is None else b.to(device)), device, x)
    assert found.dtype == dtype and found.shape == (rows, out)
    assert_close(found, linear, x, w.to(dtype), b)


def fp8_weight(noise, out: int, inner: int) -> Weight:
    codes = noise(out, inner, scale=100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Weight("fp8", codes, noise(out, 1).abs() * inner**-0.5 / 100 + 1e-6)


@pytest.mark.parametrize("rows, inner, out", SIZES, ids=str)
def test_linear_fp8(rows, inner, out, served, dtype, noise):
    """Rows that FP8 expresses exactly, with scales that are powers of two: their quantisation rounds nothing."""
    ops, device = served
    weight = fp8_weight(noise, out, inner)
    codes = noise(rows, inner, scale=100).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    codes[:, 0] = 448
    x = (codes * 2.0 ** -torch.arange(5, 5 + rows)[:, None].clamp(max=20)).to(dtype)
    b = noise(out, dtype=dtype)
    packed = ops.pack_linear([weight], dtype)
    found = call(lambda x: ops.linear(x, packed, b.to(device)), device, x)
    assert found.dtype == dtype
    assert_close(found, lambda x, w, b: (x @ w.to(x.dtype).T) + b, x, weight.codes.double() * weight.scales.double(), b)


def test_linear_fp8_quantises_each_row_by_its_own_largest(served, dtype, noise):
    """A row of large numbers costs its neighbours nothing; nor do zeros. The error is that of 3 bits of fraction."""
    ops, device = served
    weight = fp8_weight(noise, 40, 512)
    x = noise(4, 512, dtype=dtype) * torch.tensor([[1e-6], [1.0], [0.0], [1e6]], dtype=dtype)
    found = call(lambda x: ops.linear(x, ops.pack_linear([weight], dtype), None), device, x).cpu().double()
    truth = x.double() @ weight.dequantize().double().T
    assert found[2].abs().max() == 0
    error = (found - truth).norm(dim=1) / truth.norm(dim=1)
    assert all(0.01 < e < 0.06 for e in error[[0, 1, 3]])


INTEGERS = ["int8", "int4 in 32", "int4 in 128", "int4 in whole rows", "int4 without zeros"]


def integer_weight(how: str, noise, out: int, inner: int) -> Weight:
    """Random codes of every value that there is. int4's scales are bfloat16 numbers, as ours are, or float16 ones."""
    if how == "int8":
        codes = noise(out, inner, scale=60).clamp(-127, 127).to(torch.int8)
        return Weight("int8", codes, noise(out, 1).abs() * inner**-0.5 / 60 + 1e-6)
    group = {"int4 in 128": 128, "int4 in whole rows": inner}.get(how, 32)
    codes = noise(out, inner // 2, scale=1e4).long().remainder(256).to(torch.uint8)
    scales = noise(out, -(-inner // group)).abs() * inner**-0.5 / 5 + 1e-6
    scales = scales.to(torch.bfloat16 if how in ("int4 in 32", "int4 without zeros") else torch.float16).float()
    zeros = (noise(*scales.shape, scale=3) + 7).clamp(0, 15).to(torch.uint8)
    return Weight("int4", codes, scales, None if how == "int4 without zeros" else zeros, group)


def values(weight: Weight) -> Tensor:
    """What the documentation of Weight says that its codes mean, in float64."""
    if weight.kind == "int8":
        return weight.codes.double() * weight.scales.double()
    column = torch.arange(weight.shape[1])
    nibbles = weight.codes[:, column // 2].long() // torch.where(column % 2 == 1, 16, 1) % 16
    zeros = 8 if weight.zeros is None else weight.zeros[:, column // weight.group_size].double()
    return (nibbles - zeros) * weight.scales[:, column // weight.group_size].double()


@pytest.mark.parametrize("rows, inner, out", [*SIZES, (5, 1408, 70), (1, 2048, 9)], ids=str)
@pytest.mark.parametrize("how", INTEGERS)
def test_linear_of_integers(how, rows, inner, out, served, dtype, noise):
    """Rows that int8 expresses exactly, each group with the largest code and a power of two: nothing is rounded."""
    ops, device = served
    weight = integer_weight(how, noise, out, inner)
    group = weight.group_size or inner
    x = noise(rows, inner, scale=50).round().clamp(-127, 127)
    x[:, ::group] = torch.where(x[:, ::group] < 0, -127, 127)
    x = (x * 2.0 ** -torch.arange(5, 5 + rows)[:, None].clamp(max=20)).to(dtype)
    b = noise(out, dtype=dtype)
    packed = ops.pack_linear([weight], dtype)
    found = call(lambda x: ops.linear(x, packed, b.to(device)), device, x)
    assert found.dtype == dtype and found.shape == (rows, out)
    truth = x.double() @ values(weight).T + b.double()
    # Exact but for float32: two products a group, one sum more for each, the bias; and one rounding to the result.
    steps = 4 + 3 * (inner // group if weight.group_size else 1)
    size = x.double().abs() @ values(weight).abs().T + b.double().abs()
    allowed = steps * 2**-24 * size + torch.finfo(dtype).eps * truth.abs()
    assert ((found.cpu().double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("rows, inner, out", SIZES, ids=str)
@pytest.mark.parametrize("how", INTEGERS)
def test_linear_of_integers_is_off_by_half_a_step_of_its_inputs(how, rows, inner, out, served, dtype, noise):
    """Against the widened product. Each input is off by at most half of 1/127 of the largest in its row or group."""
    ops, device = served
    weight = integer_weight(how, noise, out, inner)
    x = noise(rows, inner, dtype=dtype) * (10.0 ** torch.arange(-3, 3)[torch.arange(rows) % 6])[:, None].to(dtype)
    found = call(lambda x: ops.linear(x, ops.pack_linear([weight], dtype), None), device, x).cpu().double()
    w = weight.dequantize().double()
    truth, allowed = x.double() @ w.T, torch.finfo(dtype).eps * (x.double() @ w.T).abs()
    for part, matrix in zip(x.double().split(weight.group_size or inner, 1), w.split(weight.group_size or inner, 1)):
        half = part.abs().amax(1, keepdim=True) / 254
        allowed += 1.001 * half * matrix.abs().sum(1)
    error = (found - truth).abs()
    assert (error <= allowed).all()
    assert error.mean() < 0.3 * allowed.mean(), "such errors have both signs, and mostly cancel"


@pytest.mark.parametrize("how", INTEGERS)
def test_linear_of_integers_keeps_broken_rows_to_themselves(how, served, dtype, noise):
    """Zeros give zeros; NaN and infinity give NaN, and only in their own row; so do those of a weight's scales."""
    ops, device = served
    weight = integer_weight(how, noise, 40, 256)
    x = noise(5, 256, dtype=dtype)
    x[0], x[1, 200], x[3, 7] = 0, float("nan"), float("-inf")
    packed = ops.pack_linear([weight], dtype)
    found = ops.linear(x.to(device), packed, None).cpu()
    assert found[0].eq(0).all() and found[[1, 3]].isnan().all() and found[[2, 4]].isfinite().all()
    weight.scales[9, -1] = float("nan")
    found = ops.linear(x.to(device), ops.pack_linear([weight], dtype), None).cpu()
    assert found[:, 9].isnan().all() and found[2, :9].isfinite().all() and found[2, 10:].isfinite().all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_int4_scales_of_any_sign_and_size(stored, served, noise):
    """Others' scales may be negative, nothing, or so small beside a row's others that the group is next to nothing.

    bfloat16 and float16 scales count exactly, float32 ones to 20 bits. Rows of ones and of powers of two round nothing.
    """
    ops, device = served
    weight = integer_weight("int4 in 32", noise, 40, 192)
    scales = noise(40, 6) * 2.0 ** torch.arange(-40, 40)[torch.randint(0, 80, (40, 6), generator=torch.manual_seed(3))]
    scales[1], scales[2, ::2], scales[3], scales[4, 1] = 0, 0, -scales[3].abs(), -scales[4, 1].abs()
    scales[5] *= 2.0**-80
    scales = scales.clamp(-6e4, 6e4).to(stored).float()
    weight = Weight("int4", weight.codes, scales, weight.zeros, 32)
    x = 127 * torch.stack((torch.ones(192), 2.0 ** -torch.arange(6).repeat_interleave(32)))
    packed = ops.pack_linear([weight], torch.float32)
    found = call(lambda x: ops.linear(x, packed, None), device, x).cpu().double()
    truth, size = x.double() @ values(weight).T, x.double() @ values(weight).abs().T
    allowed = size * (2.0**-19 if stored == torch.float32 else 2.0**-20)
    assert ((found - truth).abs() <= allowed).all()
    assert found[:, 1].eq(0).all()
    alone = Weight("int4", weight.codes[:, 16:32], scales[:, 1:2].contiguous(), weight.zeros[:, 1:2].contiguous(), 32)
    one = ops.linear(x[:1, 32:64].contiguous().to(device), ops.pack_linear([alone], torch.float32), None).cpu()
    exact = (x[:1, 32:64].double() @ values(alone).T).float()
    assert torch.equal(one, exact) if stored != torch.float32 else torch.allclose(one, exact, rtol=2**-20)


def test_linear_of_integers_where_zeros_are_left_out(served, dtype, noise):
    ops, device = served
    weight = integer_weight("int4 without zeros", noise, 24, 96)
    explicit = Weight("int4", weight.codes, weight.scales, torch.full((24, 3), 8, dtype=torch.uint8), 32)
    x = noise(5, 96, dtype=dtype).to(device)
    mixed = ops.linear(x, ops.pack_linear([weight, explicit], dtype), None)
    assert torch.equal(mixed[:, :24], ops.linear(x, ops.pack_linear([weight], dtype), None))
    assert torch.equal(mixed[:, :24], mixed[:, 24:])


@pytest.mark.parametrize("kind", ["plain", "fp8", *INTEGERS])
def test_packed_parts_follow_each_other_and_are_copies(kind, served, dtype, noise):
    """Rows of q, k and v in one matrix; what comes later to the file's own bytes is nothing to the packed form."""
    ops, device = served
    plain = lambda n: Weight("plain", noise(n, 48, dtype=dtype))
    make = {"plain": plain, "fp8": lambda n: fp8_weight(noise, n, 48)}
    make |= {how: lambda n: integer_weight(kind, noise, n, 48) for how in INTEGERS}
    parts = [make[kind](n) for n in (5, 1, 9)]
    x = noise(3, 48, dtype=dtype).to(device)
    apart = [ops.linear(x, ops.pack_linear([part], dtype), None) for part in parts]
    packed = ops.pack_linear(parts, dtype)
    together = ops.linear(x, packed, None)
    for part in parts:
        part.codes.zero_()
        if part.scales is not None:
            part.scales.zero_()
    torch.testing.assert_close(together, torch.cat(apart, 1))
    assert torch.equal(ops.linear(x, packed, None), together)


# ---- attention -----------------------------------------------------------------------------------------------------

STEPS = {  # (tokens already in the cache, tokens in this chunk) of each sequence
    "first token": [(0, 1)],
    "one decodes": [(40, 1)],
    "several decode": [(0, 1), (14, 1), (15, 1), (16, 1), (31, 1), (99, 1)],
    "prompts": [(0, 15), (0, 16), (0, 17), (0, 1), (0, 50)],
    "chunks with a past": [(16, 16), (3, 30), (31, 2), (16, 1), (64, 64)],
    "everything at once": [(0, 20), (33, 1), (17, 5), (0, 1), (48, 16)],
}
LONG = {
    "longer than one call": [(20, 600), (0, 530), (700, 1)],
    "longer than a split": [(4999, 1), (2040, 20), (0, 300)],
    "decoding beyond a split": [(2500, 1), (1023, 1), (1024, 1), (20, 1)],
}
HEADS = {"96 over 8": (96, 8, 128), "8 over 4": (8, 4, 16), "3 over 1": (3, 1, 44), "as many": (2, 2, 64)}
WIDE = {"24 over 2": (24, 2, 128)}


def paged(steps: list[tuple[int, int]], size: int, seed: int) -> tuple[Batch, int]:
    """The batch of such a step, its blocks scattered over a pool; and the number of blocks."""
    lengths = [past + n for past, n in steps]
    needed = [-(-length // size) for length in lengths]
    pool = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed))
    blocks, at = torch.zeros(len(steps), max(needed) + 1, dtype=torch.int64), 0
    for s, n in enumerate(needed):
        blocks[s, :n] = pool[at : at + n]
        at += n
    places = [(s, p) for s, (past, n) in enumerate(steps) for p in range(past, past + n)]
    counts = [n for _, n in steps]
    slots = [int(blocks[s, p // size]) * size + p % size for s, p in places]
    rows = [stop - 1 for stop in itertools.accumulate(counts)]
    tokens, positions = [0] * len(slots), [p for _, p in places]
    return Batch.of(tokens, positions, slots, blocks.tolist(), rows, counts, lengths), len(pool)


def attention(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """Each row by itself: its keys gathered one slot after the other, a softmax, a sum."""
    size, out = keys.shape[1], []
    share = q.shape[1] // keys.shape[2]
    for s, length in enumerate(batch.seq_lens.tolist()):
        slots = torch.tensor([int(batch.block_tables[s, p // size]) * size + p % size for p in range(length)])
        k, v = (x.flatten(0, 1)[slots].repeat_interleave(share, 1) for x in (keys, values))  # (L, h, D)
        for row in range(*batch.query_start_loc[s : s + 2].tolist()):
            seen = int(batch.positions[row]) + 1
            weights = torch.einsum("hd,lhd->hl", q[row], k[:seen]) * scale
            out.append(torch.einsum("hl,lhd->hd", weights.softmax(-1), v[:seen]).flatten())
    return torch.stack(out)


def coded(x: Tensor) -> Tensor:
    """What an int8 cache makes of keys or values (..., D), in float32."""
    scales = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scales).round() * scales


def filled(ops: Backend, keys: Tensor, values: Tensor, batch: Batch, codes: bool) -> tuple[Backend, KVCache]:
    """A cache with these keys and values in it, or with their codes, and who serves it. What others have left in slots
    that the batch does not use is NaN."""
    blocks, size, heads, dim = keys.shape
    ops, cache = cache_of(ops, blocks, size, heads, dim, torch.int8 if codes else keys.dtype)
    for each in (cache.keys, cache.values):
        each.fill_(-1 if codes else torch.nan)  # of codes each is -1, and each scale, all bits set, NaN
    used = [
        int(batch.block_tables[s, p // size]) * size + p % size
        for s, n in enumerate(batch.seq_lens.tolist())
        for p in range(n)
    ]
    slots = torch.tensor(used)
    ops.store_kv_(*(x.flatten(0, 1)[slots].to(ops.device) for x in (keys, values)), cache, slots.to(ops.device))
    return ops, cache


@pytest.mark.parametrize(
    "steps, heads, codes",
    [
        *itertools.product(STEPS, HEADS, [False, True]),
        ("longer than one call", "8 over 4", False),
        ("longer than one call", "3 over 1", True),
        ("longer than a split", "24 over 2", False),
        ("longer than a split", "8 over 4", True),
        ("decoding beyond a split", "3 over 1", False),
        ("decoding beyond a split", "3 over 1", True),
    ],
)
def test_attention(steps, heads, codes, served, dtype, noise):
    ops, device = served
    h, g, dim = (HEADS | WIDE)[heads]
    size = 16 if steps != "chunks with a past" else 5
    batch, pool = paged((STEPS | LONG)[steps], size, seed=len(steps))
    q = noise(len(batch.tokens), h + g, dim, dtype=dtype)[:, :h]
    keys, values = noise(pool, size, g, dim, dtype=dtype), noise(pool, size, g, dim, dtype=dtype)
    there = batch.to(device)
    scale = dim**-0.5
    ops, cache = filled(ops, keys, values, batch, codes)
    attend = lambda q, k, v: ops.attention(q, KVCache(k, v, dim), there, scale)
    found = call(attend, device, q, cache.keys, cache.values)
    assert found.shape == (len(batch.tokens), h * dim) and found.dtype == dtype
    keys, values = (coded(x) if codes else x for x in (keys, values))
    definition = lambda q, k, v: attention(q, k.to(q.dtype), v.to(q.dtype), batch, scale)
    assert_close(found, definition, q, keys, values, case=(steps, heads, codes, dtype))


def test_attention_does_not_depend_on_longer_tables_and_other_sequences(served, noise):
    """A captured step has room for the longest sequence that there may be, and gives the same bits."""
    ops, device = served
    batch, pool = paged(STEPS["several decode"], 16, seed=1)
    q, keys, values = noise(6, 4, 16), noise(pool, 16, 2, 16), noise(pool, 16, 2, 16)
    ops, cache = filled(ops, keys, values, batch, False)
    found = ops.attention(q.to(device), cache, batch.to(device), 0.25)
    assert torch.equal(ops.attention(q.to(device), cache, batch.widened(90).to(device), 0.25), found)
    alone = Batch.of([0], [99], [0], batch.block_tables[-1:].tolist(), [0], [1], [100])
    assert torch.equal(ops.attention(q[-1:].to(device), cache, alone.to(device), 0.25), found[-1:])


@pytest.mark.parametrize("step", [0.004, 0.02, 0.2, -0.2], ids=str)
def test_attention_where_scores_rise_or_fall(step, served, noise):
    """By e to the power of `step` from key to key: what has been summed up loses weight slowly, fast, or not at all."""
    ops, device = served
    batch, pool = paged([(1200, 100)], 16, seed=1)
    q, keys, values = torch.ones(100, 2, 16), torch.zeros(pool, 16, 1, 16), noise(pool, 16, 1, 16)
    slots = torch.tensor([int(batch.block_tables[0, p // 16]) * 16 + p % 16 for p in range(1300)])
    keys.flatten(0, 1)[slots, 0, 0] = step * torch.arange(1300.0)
    there = batch.to(device)
    ops, cache = filled(ops, keys, values, batch, False)
    found = ops.attention(q.to(device), cache, there, 1.0).cpu()
    truth = attention(q.double(), keys.double(), values.double(), batch, 1.0)
    rounded = 1 + 1.5 * 1300 * abs(step)  # a score as a power of two, whose last place is an error of its weight
    assert ((found.double() - truth).abs() <= 2**-23 * rounded * values.abs().max()).all()


@pytest.mark.parametrize("size", [1e9, 3e10, 7e20, 1e38], ids=str)
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_attention_of_enormous_scores(order, size, served, dtype, noise):
    """Finite scores of any size give finite weights: all of it to the largest, or equal parts to equal ones."""
    ops, device = served
    steps = [(4990, 10), (0, 40)]
    batch, pool = paged(steps, 16, seed=1)
    q, keys = torch.ones(50, 4, 16, dtype=dtype), torch.zeros(pool, 16, 2, 16, dtype=dtype)
    values = noise(pool, 16, 2, 16, dtype=dtype)
    for s, (past, n) in enumerate(steps):
        places = torch.arange(past + n)
        slots = batch.block_tables[s, places // 16] * 16 + places % 16
        share = {"rising": (places + 1) / (past + n), "falling": 1 / (places + 1), "equal": 1.0 * (places % 7 == 3)}
        keys.flatten(0, 1)[slots, :, 3] = (share[order] * size).to(dtype)[:, None]
    there, scale = batch.to(device), 0.3
    ops, cache = filled(ops, keys, values, batch, False)
    found = ops.attention(q.to(device), cache, there, scale).cpu()
    truth = attention(q.double(), keys.double(), values.double(), batch, scale)
    assert ((found.double() - truth).abs() <= (2**-7 if dtype == torch.bfloat16 else 2**-18) * values.abs().max()).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_attention_over_codes_of_much_little_and_nothing(bad, served, dtype, noise):
    """Every key and value, head by head, has a scale of its own; zeros stay zeros; NaN and infinity are NaN."""
    ops, device = served
    batch, pool = paged([(0, 40)], 16, seed=1)
    q, keys, values = noise(40, 4, 32, dtype=dtype), *(noise(pool, 16, 2, 32, dtype=dtype) for _ in range(2))
    slots = batch.slot_mapping
    for x in (keys, values):
        x.flatten(0, 1)[slots[:3], 0] *= torch.tensor([1e-30, 1e3, 0.0], dtype=dtype)[:, None]
    keys.flatten(0, 1)[slots[1], 0] /= 1e3  # a score of thousands would leave nothing to the others
    there = batch.to(device)
    attend = lambda k, v: ops.attention(q.to(device), filled(ops, k, v, batch, True)[1], there, 0.2).cpu()
    sound = attend(keys, values)
    definition = lambda q, k, v: attention(q, k.to(q.dtype), v.to(q.dtype), batch, 0.2)
    assert_close(sound, definition, q, *(coded(x).nan_to_num(0) for x in (keys, values)))
    for broken in (keys, values):
        before = broken.clone()
        broken.flatten(0, 1)[slots[33], 1, 7] = bad
        found = attend(keys, values)
        broken.copy_(before)
        assert found[33:, 2 * 32 :].isnan().all()
        assert torch.equal(found[:, : 2 * 32], sound[:, : 2 * 32]), "the other head's"


@pytest.mark.parametrize("steps", [[(0, 40)], [(20, 20)], [(39, 1)]], ids=str)
def test_attention_hides_no_nan(steps, served, noise):
    """A row that sees NaN is NaN, and no other row or head is."""
    ops, device = served
    batch, pool = paged(steps, 16, seed=1)
    rows = len(batch.tokens)
    q, keys, values = noise(rows, 4, 32), *(noise(pool, 16, 2, 32) for _ in range(2))
    slots = torch.tensor([int(batch.block_tables[0, p // 16]) * 16 + p % 16 for p in range(40)])
    there = batch.to(device)
    attend = lambda: ops.attention(q.to(device), filled(ops, keys, values, batch, False)[1], there, 0.2).cpu()
    sound, last = attend(), min(rows, 7)
    for broken in (keys, values):
        before = broken.clone()
        broken.flatten(0, 1)[slots[40 - last], 1] = torch.nan
        found = attend()
        broken.copy_(before)
        assert found[rows - last :, 2 * 32 :].isnan().all()
        assert torch.equal(found[:, : 2 * 32], sound[:, : 2 * 32]), "the other head's"
        assert found[: rows - last].isfinite().all(), "rows before it"
    q[rows - 1, 3] = torch.nan
    found = attend()
    assert found[rows - 1, 3 * 32 :].isnan().all() and found[:, : 3 * 32].isfinite().all()
    assert found[: rows - 1].isfinite().all()


# ---- routing and experts -------------------------------------------------------------------------------------------


def route(logits: Tensor, bias: Tensor, rule: RouteRule) -> list[dict[int, float]]:
    """For each token {expert: weight}, in Python's own numbers."""
    out = []
    for row in logits.double().tolist():
        scores = [1 / (1 + 2.718281828459045**-x) for x in row]
        choice = dict(enumerate(s + b for s, b in zip(scores, bias.double().tolist())))
        size = len(row) // rule.n_group
        if rule.n_group > 1:
            of = lambda group: sum(sorted(choice[e] for e in range(group * size, (group + 1) * size))[-2:])  # noqa: B023
            kept = sorted(range(rule.n_group), key=of)[-rule.topk_group :]
            choice = {e: c for e, c in choice.items() if e // size in kept}
        chosen = sorted(choice, key=choice.get)[-rule.top_k :]
        total = sum(scores[e] for e in chosen) + 1e-20 if rule.norm_topk_prob else 1
        out.append({e: scores[e] / total * rule.routed_scaling_factor for e in chosen})
    return out


def rule(top_k: int, n_group: int = 1, topk_group: int = 1, norm: bool = True, factor: float = 1.0) -> RouteRule:
    return RouteRule(top_k, n_group, topk_group, norm, factor)


def assert_routes(served, logits: Tensor, bias: Tensor, how: RouteRule) -> None:
    ops, device = served
    ids, scores = call(lambda *args: ops.route(*args, how), device, logits, bias)
    assert ids.shape == scores.shape == (len(logits), how.top_k)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32
    for row, weights, expected in zip(ids.tolist(), scores.tolist(), route(logits, bias, how)):
        assert len(set(row)) == how.top_k and dict(zip(row, weights)) == pytest.approx(expected, rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("rows", [1, 7, 65])
@pytest.mark.parametrize(
    "experts, how",
    [
        (128, rule(8)),
        (160, rule(8, factor=2.5)),
        (8, rule(8)),
        (8, rule(1, norm=False)),
        (16, rule(4, 4, 2)),
        (16, rule(2, 8, 1, norm=False, factor=2.5)),
        (160, rule(8, 8, 3)),
        (8, rule(4, 2, 2)),
    ],
    ids=str,
)
def test_route(rows, experts, how, served, noise):
    assert_routes(served, noise(rows, experts, scale=2), noise(experts, scale=0.3), how)


def test_route_bias_chooses_but_does_not_weigh(served):
    logits, bias = torch.tensor([[3.0, 2.0, 1.0, -1.0]]), torch.tensor([0.0, -1.0, 0.0, 2.0])
    ops, device = served
    ids, scores = ops.route(logits.to(device), bias.to(device), rule(2, norm=False))
    found = dict(zip(ids[0].tolist(), scores[0].tolist()))
    assert found == pytest.approx({0: float(torch.tensor(3.0).sigmoid()), 3: float(torch.tensor(-1.0).sigmoid())})


def test_route_of_tiny_scores(served):
    """1e-20 keeps the sum from being zero, and is too small to be seen otherwise."""
    ops, device = served
    for logit, total in ((-30.0, 1.0), (-200.0, 0.0)):
        _, scores = ops.route(torch.full((1, 4), logit, device=device), torch.zeros(4, device=device), rule(2))
        assert float(scores.sum()) == pytest.approx(total, abs=1e-6)


def test_route_with_negative_choices(served):
    """Experts of groups that lost are out, even where all choices of the group that won are below zero."""
    logits, bias = torch.zeros(3, 8), torch.tensor([-3.0, -3.1, -3.2, -3.3, -0.6, -40.0, -40.0, -40.0])
    assert_routes(served, logits, bias, rule(3, n_group=2))
    ops, device = served
    ids, _ = ops.route(logits.to(device), bias.to(device), rule(3, n_group=2))
    assert {frozenset(row) for row in ids.tolist()} == {frozenset((0, 1, 2))}


def test_route_sees_the_last_bits_of_the_bias(served):
    """In bfloat16 these biases would be one number: 238 of them were once 8, and other experts were chosen."""
    bias = 0.5 + torch.arange(128) * 1e-5
    assert_routes(served, torch.zeros(2, 128), bias.roll(50), rule(8))


@pytest.mark.parametrize(
    "logits, bias, how, expected",
    [
        ([0.0] * 8, [0.0] * 8, rule(3), [0, 1, 2]),
        ([0.0, 1, 1, 1, 0, 1, 0, 0], [0.0] * 8, rule(3), [1, 2, 3]),
        ([0.0] * 8, [0, 0, torch.inf, 0, torch.inf, 0, 0, 0], rule(3), [2, 4, 0]),
        ([0.0] * 8, [-torch.inf] * 8, rule(3), [0, 1, 2]),
        ([0.0] * 8, [-torch.inf, 0, 0, -torch.inf, 0, 0, 0, 0], rule(7), [1, 2, 4, 5, 6, 7, 0]),
        ([0.0, 0, torch.nan, 0, 0, 0, 0, 0], [0.0] * 8, rule(2), [2, 0]),
        ([0.0] * 8, [0.0] * 8, rule(4, 4, 2), [0, 1, 2, 3]),
        ([0.0] * 8, [0.0, 0, 0, 0, -torch.inf, 0, 0, 0], rule(2, 2, 1), [0, 1]),
        ([0.0] * 8, [9.0, 9, 9, 9, torch.inf, -torch.inf, -torch.inf, -torch.inf], rule(2, 2, 1), [4, 0]),
        ([0.0, -1e10, -89, -1e10], [-0.5, 0, 0, 0], rule(3), [0, 1, 2]),
        ([0.0] * 6, [-torch.inf, torch.inf, 1, 1, torch.inf, torch.inf], rule(3, 3, 2), [1, 4, 5]),
        ([0.0] * 6, [2.0, 1, torch.nan, -torch.inf, 3, 3], rule(2, 3, 1), [2, 0]),
        ([torch.inf, -torch.inf, 0.0, 0.0], [0.0, -torch.inf, 0, 0], rule(2, 2, 1), [2, 3]),
    ],
)
def test_route_of_equal_and_infinite_choices(logits, bias, how, expected, served):
    """Of equal ones the lowest number comes first; NaN counts as infinity, so that its score is seen."""
    ops, device = served
    ids, scores = call(lambda *args: ops.route(*args, how), device, torch.tensor([logits]), torch.tensor(bias))
    assert ids[0].tolist() == expected
    assert scores.isnan().any() == any(x != x for x in logits)


def experts(x: Tensor, ids: Tensor, scores: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    """One token and one of its experts after the other; the weight is put on what comes out."""
    out = []
    for row, chosen, weights in zip(x, ids.tolist(), scores):
        y = torch.zeros_like(row)
        for e, weight in zip(chosen, weights):
            gate, up = (gate_up[e] @ row).chunk(2)
            y += (down[e] @ (gate / (1 + (-gate).exp()) * up)) * weight
        out.append(y)
    return torch.stack(out)


CHOICES = {
    "one token": [[2, 0]],
    "all on one expert": [[3]] * 7,
    "each on its own": [[0], [1], [2], [3], [4], [5], [6], [7]],
    "one expert for all, the others for some": [[5, i] for i in range(5)],
    "every expert": [[*range(8)], [*range(7, -1, -1)]],
    "few of many": [[7, 1], [1, 7], [7, 2]],
}


def chosen(case: str, noise) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(CHOICES[case])
    return ids, noise(*ids.shape).sigmoid()


@pytest.mark.parametrize("width", [44, 88, 176, 1408])
@pytest.mark.parametrize("case", CHOICES)
def test_experts(case, width, served, dtype, noise):
    ops, device = served
    hidden = 64 if width > 50 else 100
    ids, scores = chosen(case, noise)
    x = noise(len(ids), hidden, dtype=dtype)
    gates, ups = ([noise(width, hidden, dtype=dtype, scale=hidden**-0.5) for _ in range(8)] for _ in range(2))
    downs = [noise(hidden, width, dtype=dtype, scale=width**-0.5) for _ in range(8)]
    plain = lambda w: Weight("plain", w)
    each = (ExpertWeights([plain(g), plain(u)], plain(d)) for g, u, d in zip(gates, ups, downs))
    packed = ops.pack_experts(each, 8, dtype)
    found = call(lambda *args: ops.experts(*args, packed), device, x, ids, scores)
    assert found.dtype == torch.float32 and found.shape == x.shape
    assert_close(found, experts, x, ids, scores, [torch.cat(pair) for pair in zip(gates, ups)], downs)


def assert_as_one_by_one(served, dtype, x, ids, scores, halves, downs, tolerance):
    """experts as the linears and swiglu, called for one token and one expert at a time, would do it."""
    ops, device = served
    packed = ops.pack_experts((ExpertWeights(pair, down) for pair, (down,) in zip(halves, downs)), 8, dtype)
    found = ops.experts(x, ids.to(device), scores.to(device), packed).cpu().double()
    single = lambda x, parts: ops.linear(x, ops.pack_linear(parts, torch.float32), None)
    for row, y, its, weights in zip(x.float(), found, ids.tolist(), scores.double()):
        each = [single(ops.swiglu(single(row[None], halves[e])), downs[e])[0].cpu().double() for e in its]
        expected = sum(w * part for w, part in zip(weights, each))
        assert (y - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("case", CHOICES)
def test_experts_fp8(case, served, dtype, noise):
    """As the FP8 linears and swiglu, called for one token and one expert at a time, would do it."""
    _, device = served
    ids, scores = chosen(case, noise)
    x = noise(len(ids), 64, dtype=dtype).to(device)
    halves = [[fp8_weight(noise, 88, 64), fp8_weight(noise, 88, 64)] for _ in range(8)]
    downs = [[fp8_weight(noise, 64, 88)] for _ in range(8)]
    # An input of the second matrix on the border of two codes may go either way: 1/16 of a few of 88 numbers.
    assert_as_one_by_one(served, dtype, x, ids, scores, halves, downs, 0.05)


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("how, hidden", [("int8", 64), ("int4 in 32", 64), ("int4 in 128", 128)], ids=str)
def test_experts_of_integers(how, hidden, case, served, dtype, noise):
    """As the linears and swiglu, called for one token and one expert at a time, would do it."""
    _, device = served
    ids, scores = chosen(case, noise)
    x = noise(len(ids), hidden, dtype=dtype).to(device)
    halves = [[integer_weight(how, noise, 88, hidden), integer_weight(how, noise, 88, hidden)] for _ in range(8)]
    downs = [[integer_weight("int4 in 32" if "4" in how else how, noise, hidden, 88)] for _ in range(8)]
    # An input of the second matrix on the border of two codes may go either way: 1/127 of a few of 88 numbers.
    assert_as_one_by_one(served, dtype, x, ids, scores, halves, downs, 0.02)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("inner", [2, 44, 88, 352, 1408])
def test_quantize(inner, group, served, dtype, noise):
    """As the reference but for the last bits of sums, and each row the same whatever is beside it."""
    values = noise(37, inner + 6, dtype=dtype)[:, :inner]  # rows that lie apart
    values[3], values[5, 1], values[7, 0], values[9], values[11] = 0, torch.nan, -torch.inf, 1e-38, values[11].abs()
    found, expected = (q(Weight("plain", values), "int4", group) for q in (served[0].quantize, Weight.quantize))
    assert (found.kind, found.group_size, found.shape) == (expected.kind, expected.group_size, expected.shape)
    assert torch.equal(found.scales.nan_to_num(), found.scales.bfloat16().float().nan_to_num())
    ours, theirs = found.dequantize(), expected.dequantize()
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours[[5, 7]].isnan().any(1).all()
    sound = [r for r in range(37) if r not in (5, 7)]
    errors = [(x[sound] - values[sound].float()).square().sum(1) for x in (ours, theirs)]
    assert (errors[0] <= 1.01 * errors[1] + 1e-12).all(), "no row is worse"
    assert (found.nibbles() != expected.nibbles()).float().mean() < 0.01
    for rows in (slice(0, 1), slice(4, 8), slice(30, 37)):
        alone = served[0].quantize(Weight("plain", values[rows]), "int4", group)
        for part, whole in ((alone.codes, found.codes), (alone.scales, found.scales), (alone.zeros, found.zeros)):
            assert torch.equal(part.nan_to_num(-1), whole[rows].nan_to_num(-1))


@pytest.mark.parametrize("inner", [1, 31, 44, 96, 1409])
def test_quantize_to_int8(inner, served, dtype, noise):
    """The bits of the reference, for rows of zeros, of tiny and of huge numbers, and of what is no number."""
    values = noise(14, inner + 6, dtype=dtype)[:, :inner]  # rows that lie apart
    values[3], values[5, -1], values[7, 0], values[9], values[11] = 0, torch.nan, -torch.inf, 1e-38, 3e38
    values[12] = torch.arange(inner) % 255 * 0.5 - 63.5  # halves, which are rounded to even
    found, expected = (q(Weight("plain", values), "int8", None) for q in (served[0].quantize, Weight.quantize))
    assert torch.equal(found.codes, expected.codes) and found.codes[[3, 5, 7]].eq(0).all()
    assert torch.equal(found.scales.nan_to_num(-1), expected.scales.nan_to_num(-1))
    assert found.scales[[5, 7]].isnan().all()


@pytest.mark.parametrize("stored", ["fp8", "plain"])
def test_quantize_of_what_is_stored_and_to_int8(stored, served, noise):
    values = noise(24, 96, scale=50)
    weight = Weight("plain", values)
    if stored == "fp8":
        weight = Weight("fp8", values.to(torch.float8_e4m3fn), noise(24, 1).abs() + 0.1)
    for kind, inner in (("int8", 96), ("int4", 95)):  # an odd width becomes int8
        part = Weight(weight.kind, weight.codes[:, :inner], weight.scales)
        found, expected = served[0].quantize(part, kind, 32), part.quantize(kind, 32)
        assert found.kind == "int8" and torch.equal(found.codes, expected.codes)
    found, wide = served[0].quantize(weight, "int4", 32), Weight("plain", weight.dequantize())
    assert torch.equal(found.codes, served[0].quantize(wide, "int4", 32).codes)


# ---- what there is -------------------------------------------------------------------------------------------------


def test_the_table_names_every_op(served):
    ops, _ = served
    assert list(dict.fromkeys(name.partition("[")[0] for name, _ in ops.table())) == list(OPS)
    assert {name for name, _ in ops.table() if name.startswith("linear")} == {f"linear[{kind}]" for kind in Kind}
    assert {backend for _, backend in ops.table()} <= {"reference", ops.name}


def backend_classes() -> list[type[Backend]]:
    """All backends of the package, whether their devices are here or not."""
    for module in pkgutil.walk_packages(backends.__path__, "glimmer.backends."):
        needs_triton = module.name.startswith("glimmer.backends.cuda")
        if (module.name != "glimmer.backends.cpu" or cpu) and (not needs_triton or importlib.util.find_spec("triton")):
            importlib.import_module(module.name)
    classes: list[type[Backend]] = [Backend]
    for cls in classes:
        classes += [each for each in cls.__subclasses__() if each.__module__.startswith("glimmer.backends.")]
    return classes[1:]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", backend_classes(), ids=lambda cls: cls.__name__)
def test_ops_that_share_a_layout_are_overridden_together_or_not_at_all(cls, layout):
    own = {op for op in LAYOUTS[layout] if op in vars(cls)}
    assert own in (set(), set(LAYOUTS[layout])), f"{cls.__name__} overrides {own} of {LAYOUTS[layout]}"


def blocks_of(served, monkeypatch, spec: KVCacheSpec, count: int) -> tuple[Backend, list[KVCache]]:
    """Who serves such a cache in the place of `served`, and so many blocks of each layer."""
    ops, device = served
    monkeypatch.setenv("GLIMMER_BACKEND", ops.name)
    chosen = choose(device, cache=spec)
    return chosen, chosen.allocate_kv(spec, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size, dim", [(5, 16), (16, 15), (32, 16)])
def test_the_bytes_of_a_block_are_those_that_are_allocated(size, dim, dtype, served, monkeypatch):
    spec = KVCacheSpec(3, size, 2, dim, dtype)
    chosen, caches = blocks_of(served, monkeypatch, spec, 7)
    assert sum(kv.keys.nbytes + kv.values.nbytes for kv in caches) == 7 * chosen.kv_block_bytes(spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size, dim", [(5, 16), (32, 16)])
def test_blocks_are_exported_and_imported_byte_for_byte(size, dim, dtype, served, monkeypatch):
    spec = KVCacheSpec(3, size, 2, dim, dtype)
    chosen, caches = blocks_of(served, monkeypatch, spec, 7)
    random = torch.randint(0, 256, (3, chosen.kv_block_bytes(spec)), dtype=torch.uint8)
    chosen.import_blocks(caches, [4, 0, 6], random)
    assert torch.equal(chosen.export_blocks(caches, [4, 0, 6]), random)
    assert torch.equal(chosen.export_blocks(caches, [6, 4, 1]), torch.stack([random[2], random[0], 0 * random[0]]))
    parts = [part[[4, 0, 6]].flatten(1).view(torch.uint8).cpu() for kv in caches for part in (kv.keys, kv.values)]
    assert torch.equal(torch.cat(parts, 1), random), "keys and values of each layer in their order"
    if chosen.device.type == "cpu":
        with pytest.raises(IndexError):
            chosen.export_blocks(caches, [1, 7])
        with pytest.raises(IndexError):
            chosen.import_blocks(caches, [7, 1, 0], random)
    assert torch.equal(chosen.export_blocks(caches, [0]), random[1:2]), "nothing was written"


@pytest.mark.parametrize("size, dim", [(5, 16), (32, 16)])
def test_bytes_of_fewer_or_more_blocks_are_refused(size, dim, served, monkeypatch):
    spec = KVCacheSpec(2, size, 2, dim, torch.float32)
    chosen, caches = blocks_of(served, monkeypatch, spec, 3)
    data = torch.ones(2 * chosen.kv_block_bytes(spec), dtype=torch.uint8)
    for wrong in (data[:-1], data[: len(data) // 2]):
        with pytest.raises((ValueError, RuntimeError)):
            chosen.import_blocks(caches, [1, 2], wrong)
    assert not chosen.export_blocks(caches, [1, 2]).any()


@pytest.mark.parametrize("size, dim", [(5, 16), (16, 15), (32, 16)])
def test_the_table_says_who_serves_a_cache_of_any_block_and_head(size, dim, served, monkeypatch, caplog):
    """Who is listed is who allocates, and what is slow is said."""
    ops, device = served
    monkeypatch.setenv("GLIMMER_BACKEND", ops.name)
    chosen = choose(device, cache=KVCacheSpec(1, size, 2, dim, torch.float32))
    table, fits = dict(chosen.table()), ops.name != "cpu" or (size % 16 == 0 and dim % 2 == 0)
    assert table["attention"] == table["store_kv_"] == (ops.name if fits else "reference")
    assert table["linear[plain]"] == ops.name
    assert ("slow" in caplog.text) == (not fits)


def test_two_backends_with_their_own_threads_do_not_disturb_each_other(served, noise):
    ops, device = served
    before = torch.get_num_threads()
    weight = Weight("plain", noise(600, 512))
    others = [type(ops)(device, threads) for threads in (1, 3)]
    packed = [each.pack_linear([weight], torch.float32) for each in others]
    x = noise(70, 512).to(device)
    expected, found = others[0].linear(x, packed[0], None), {}

    def run(i: int) -> None:
        with others[i].running():
            assert torch.get_num_threads() == others[i].torch_threads
            found[i] = [others[i].linear(x, packed[i], None) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(y, expected) for i in (0, 1) for y in found[i])
    assert [each.threads for each in others] == [1, 3] and torch.get_num_threads() == before


def test_timed_ops_are_those_of_the_backend_that_it_wraps(served, noise):
    ops, device = served
    packed, x = ops.pack_linear([Weight("plain", noise(8, 16))], torch.float32), noise(3, 16).to(device)
    timed = Timed(ops, {id(packed): "here"}, lambda: None)
    assert torch.equal(timed.linear(x, packed, None), ops.linear(x, packed, None))
    part = timed.parts()["here"]
    assert part.seconds > 0 and part.nbytes == packed.nbytes and not part.operations, "float32 has no limit"
    assert timed.table() == ops.table() and not timed.captures


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset, nbytes", [(0, 1), (3, 5000), (17, 1 << 20), (1, (3 << 20) - 1), (4000, 3 << 20)])
def test_pread(offset, nbytes, served, tmp_path):
    """Every byte to its place; at the end of the file, fewer."""
    ops, _ = served
    content = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    there = content[offset : offset + nbytes]
    with open(tmp_path / "file", "rb") as file:
        memory = torch.zeros(nbytes + 64, dtype=torch.uint8)
        assert ops.pread(file.fileno(), memory[:nbytes], offset) == len(there)
    assert torch.equal(memory[: len(there)], there) and not memory[len(there) :].any()
    with pytest.raises(OSError) as caught, open(tmp_path / "other", "wb") as file:
        ops.pread(file.fileno(), memory[:nbytes], offset)
    assert caught.value.errno == errno.EBADF
