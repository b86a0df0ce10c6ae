"""Times of single ops: every call that a model makes can be made again, large ones in part."""

import json
from pathlib import Path

import pytest
import torch

from glimmer.backends import op_times, selection
from glimmer.backends.base import KVCacheSpec
from glimmer.backends.op_times import MAX_BYTES, MAX_OPERATIONS, OpTimes, partly
from glimmer.backends.timed import Call, Matrix, Values
from glimmer.errors import ConfigError
from glimmer.model.cost import SMALLEST, Shapes, as_quantized
from glimmer.model_config import ModelConfig
from glimmer.weight import Kind

DEMO = json.loads((Path(__file__).resolve().parents[2] / "glimmer" / "demo" / "config.json").read_text())
BF16, INT64 = torch.bfloat16, torch.int64


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", list(Kind))
def test_every_call_of_a_model_can_be_made_again(kind, cache, monkeypatch):
    monkeypatch.setattr(op_times, "ROUND_SECONDS", 1e-5)
    config = ModelConfig.from_dict(DEMO | {"num_hidden_layers": 2, "vocab_size": 64})
    backend = selection.choose(selection.HOST)
    spec = KVCacheSpec(2, 16, config.num_key_value_heads, config.head_dim, cache)
    shapes, times = Shapes(config, as_quantized(kind, 32), backend), OpTimes(backend, 1 << 16)
    calls = {}
    for rows, context, sequences in ((40, 0, 1), (1, 70, 3)):
        calls |= shapes.work(spec, rows, context, sequences).cost.calls
    ops = {"embed", "rms_norm", "add_rms_norm", "add_", "swiglu", "rope_", "linear", "route", "experts"}
    assert {call.op for call in calls} == ops | {"store_kv_", "attention"}
    for call in calls:
        for captured in (False, True):
            assert 0 < times(call, 1 << 14, captured) < 1, call
            assert times(call, 1 << 14, captured) == times(call, 1 << 14, captured), "measured once"
    assert 0 < times(SMALLEST, 0, False) < 1e-3


def matrix(n: int, k: int, number: int = 1) -> Matrix:
    return Matrix(Kind.PLAIN, n, k, None, BF16, False, number)


@pytest.mark.parametrize("rows", [1, 512])
def test_large_matrices_are_measured_in_part(rows):
    head = Call("linear", (Values((rows, 4096), BF16), matrix(151552, 4096), Values((151552,), BF16)))
    part, share = partly(head)
    x, fewer, bias = part.arguments
    assert x == head.arguments[0] and fewer.k == 4096 and bias.shape == (fewer.n,) and fewer.n % 32 == 0
    assert share == fewer.n / 151552 and fewer.n * fewer.row_bytes <= MAX_BYTES
    assert 2 * rows * fewer.n * fewer.k <= MAX_OPERATIONS
    small = Call("linear", (Values((rows, 64), BF16), matrix(64, 64), None))
    assert partly(small) == (small, 1)
    table = Call("embed", (Values((rows,), INT64), Values((151552, 4096), BF16), 0))
    assert partly(table)[0].arguments[1].shape[0] < 151552 and partly(table)[1] == 1


@pytest.mark.parametrize("rows, distinct", [(1, 8), (8, 50), (512, 128)])
@pytest.mark.parametrize("width", [1408, 96])
def test_of_many_experts_some_are_measured_with_as_many_rows_each(rows, distinct, width):
    arguments = (
        Values((rows, 4096), BF16), Values((rows, 8), INT64),
        matrix(2 * width, 4096, distinct), matrix(4096, width, distinct),
    )  # fmt: skip
    part, share = partly(Call("experts", arguments))
    x, chosen, gate_up, down = part.arguments
    assert gate_up.number == down.number <= distinct and x.shape[0] == chosen.shape[0]
    assert chosen.shape[1] <= gate_up.number, "a token's experts differ"
    each = rows * 8 / distinct
    assert chosen.numel / gate_up.number == pytest.approx(each, rel=0.35) and share == chosen.numel / (rows * 8)
    if gate_up.number > 1:
        assert gate_up.number * 3 * 4096 * width * 2 <= MAX_BYTES


def test_what_is_too_large_to_be_measured_is_refused():
    """Of a config.json that no model has: before memory is asked for."""
    times = OpTimes(selection.choose(selection.HOST), 1 << 16)
    wide = Values((512, 1 << 28), BF16)
    for call in (Call("add_", (wide, wide)), Call("linear", (wide, matrix(64, 1 << 28), None))):
        with pytest.raises(ConfigError, match="GB of operands"):
            times(call, 1 << 30, False)
