"""Weight: what quantising keeps, what it costs, and how it lays the codes out."""

import pytest
import torch
from torch import Tensor

from glimmer import weight as module
from glimmer.weight import Weight, layout


def draw(*shape: int, heavy: bool = False) -> Tensor:
    """Normal numbers; heavy: Student's t with four degrees of freedom, as far from the mean as weights get."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(*shape, generator=generator) * 0.02
    if not heavy:
        return normal
    return normal / (torch.randn(4, *shape, generator=generator).square().mean(0)).sqrt()


def error(weight: Weight, values: Tensor) -> float:
    return float((weight.dequantize() - values).norm() / values.norm())


@pytest.mark.parametrize(
    "kind, inner, group, expected",
    [
        ("int8", 44, None, ("int8", None)),
        ("int4", 4096, 128, ("int4", 128)),
        ("int4", 4096, 32, ("int4", 32)),
        ("int4", 1408, 128, ("int4", 128)),
        ("int4", 10944, 128, ("int4", 32)),
        ("int4", 64, 128, ("int4", 32)),
        ("int4", 44, 32, ("int4", 32)),
        ("int4", 37, 32, ("int8", None)),
    ],
)
def test_layout(kind, inner, group, expected):
    assert layout(kind, inner, group) == expected
    made = Weight("plain", draw(3, inner)).quantize(kind, group)
    assert (made.kind, made.group_size, made.shape) == (*expected, (3, inner))
    blank = Weight.empty(made.kind, (3, inner), made.group_size)
    assert blank.nbytes == made.nbytes == sum(t.nbytes for t in (made.codes, made.scales, made.zeros) if t is not None)
    for ours, theirs in ((made.codes, blank.codes), (made.scales, blank.scales), (made.zeros, blank.zeros)):
        assert ours is theirs is None or (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


@pytest.mark.parametrize("heavy, limits", [(False, (0.009, 0.079, 0.097)), (True, (0.020, 0.096, 0.145))])
def test_error(heavy, limits):
    """Plain symmetric rounding to int4 makes 0.097 and 0.118 of normal numbers, 0.131 and 0.194 of heavy tails."""
    values = draw(256, 1024, heavy=heavy)
    for (kind, group), limit in zip((("int8", None), ("int4", 32), ("int4", 128)), limits):
        found = error(Weight("plain", values).quantize(kind, group), values)
        assert 0.8 * limit < found < limit, f"{kind}/{group}: {found:.4f}"


@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 32), ("int4", 128)])
@pytest.mark.parametrize("inner", [44, 88, 176, 1408])
def test_no_value_is_off_by_more_than_a_step_or_the_range_that_was_clipped(kind, group, inner):
    values = draw(19, inner)
    made = Weight("plain", values).quantize(kind, group)
    scales = made.scales if kind == "int8" else made.scales.repeat_interleave(made.group_size, 1)[:, :inner]
    steps = (made.dequantize() - values).abs() / scales
    assert steps.max() <= (0.5001 if kind == "int8" else 2.0)
    assert steps.square().mean().sqrt() < 0.32, "evenly spread over half a step would be 0.29"


@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 32)])
def test_what_is_on_the_grid_stays_exactly(kind, group):
    grid = torch.randint(-127, 128, (7, 64)) if kind == "int8" else torch.randint(-5, 11, (7, 64))
    grid[:, ::32], grid[:, 1::32] = (-127, 127) if kind == "int8" else (-5, 10)
    values = grid * 2.0 ** -torch.arange(7)[:, None]
    assert torch.equal(Weight("plain", values).quantize(kind, group).dequantize(), values)


@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 32), ("int4", 128)])
def test_rows_with_nothing_and_with_nan(kind, group):
    values = draw(6, 256)
    values[0], values[2, 200], values[4, 3], values[5] = 0, float("nan"), float("inf"), 1e-41
    found = Weight("plain", values).quantize(kind, group)
    assert found.scales[[0, 1, 3, 5]].isfinite().all() and (found.scales[[0, 1, 3, 5]] > 0).all()
    found = found.dequantize()
    assert found[0].eq(0).all() and found[2, 200].isnan() and found[4, 3].isnan()
    assert found[[1, 3, 5]].isfinite().all() and found[5].abs().max() < 1e-37
    assert found.isnan().sum() == 2 * (group or 256)


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign(sign):
    """All values on one side of zero: the range reaches to zero all the same."""
    values = sign * (1 + draw(8, 64).abs())
    assert error(Weight("plain", values).quantize("int4", 32), values) < 0.03


def test_fp8_is_the_nearest_number_of_the_format():
    """Against all finite numbers of e4m3, made here from their bits; rows of zeros and of NaN are what they were."""
    bits = torch.arange(128)
    exponent, fraction = bits // 8, bits % 8
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    numbers = torch.where(exponent == 0, fraction * 2.0**-9, normal)[:-1].float()
    values = draw(20, 96)
    values[3], values[7, 5], values[9] = 0, float("nan"), 1e-41
    found = Weight("plain", values).quantize("fp8")
    assert (found.kind, found.codes.dtype, found.group_size) == ("fp8", torch.float8_e4m3fn, None)
    decoded = found.dequantize()
    assert decoded[3].eq(0).all() and decoded[7].isnan().all() and decoded[9].abs().max() < 1e-37
    for row in (0, 1, 2, 4, 19):
        scale = values[row].abs().max() / 448
        assert torch.equal(found.scales[row], scale[None])
        distance = (values[row].abs()[:, None] / scale - numbers).abs()
        nearest = distance.min(1).values
        chosen = (found.codes[row].float().abs()[:, None] == numbers).float().argmax(1)
        assert (distance.gather(1, chosen[:, None])[:, 0] <= nearest + 1e-4).all()
        assert torch.equal(found.codes[row].float().sign().abs(), (chosen > 0).float())
    assert 0.02 < error(Weight("plain", draw(256, 1024)).quantize("fp8"), draw(256, 1024)) < 0.028


def test_fp8_is_widened_first():
    codes, scales = (draw(40, 96) * 5000).clamp(-448, 448).to(torch.float8_e4m3fn), draw(40, 1).abs() + 1e-3
    fp8 = Weight("fp8", codes, scales)
    for kind, group in (("int8", None), ("int4", 32)):
        found, expected = fp8.quantize(kind, group), Weight("plain", fp8.dequantize()).quantize(kind, group)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("kind, group", [("int8", None), ("int4", 32), ("int4", 128)])
def test_blocks_of_rows_and_joined_parts_are_what_the_whole_would_be(kind, group, monkeypatch):
    values = draw(50, 256)
    whole = Weight("plain", values).quantize(kind, group)
    monkeypatch.setattr(module, "BLOCK", 7 * 256)
    parts = [Weight("plain", part).quantize(kind, group) for part in values.split(20)]
    joined = Weight.join(parts, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(joined.dequantize(), whole.dequantize())


@pytest.mark.parametrize("group", [32, 128])
def test_a_group_is_quantised_alone(group):
    """The same codes and scales to the last bit, whichever other rows and groups are quantised beside it."""
    values = draw(61, 12 * group)
    whole = Weight("plain", values).quantize("int4", group)
    for rows, first, last in ((1, 0, 12), (2, 3, 4), (7, 5, 12), (33, 1, 8), (61, 11, 12)):
        part = Weight("plain", values[-rows:, first * group : last * group]).quantize("int4", group)
        assert torch.equal(part.scales, whole.scales[-rows:, first:last])
        assert torch.equal(part.zeros, whole.zeros[-rows:, first:last])
        assert torch.equal(part.codes, whole.codes[-rows:, first * group // 2 : last * group // 2])


def test_scales_of_int4_fit_in_bfloat16():
    scales = Weight("plain", draw(64, 256)).quantize("int4", 32).scales
    assert torch.equal(scales, scales.bfloat16().float())


def test_nibbles_lie_low_half_first():
    weight = Weight("int4", torch.tensor([[0x21, 0x43]], dtype=torch.uint8), torch.tensor([[2.0]]), None, 4)
    assert weight.nibbles().tolist() == [[1, 2, 3, 4]] and weight.dequantize().tolist() == [[-14, -12, -10, -8]]
