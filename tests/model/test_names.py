"""The table of names and cuts: all ranks together hold every element, and heads stay with the heads they read."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from checkpoints import TINY, tensors
from hypothesis import given
from hypothesis import strategies as st

from glimmer.backends.reference import Reference
from glimmer.errors import ConfigError
from glimmer.group import Group
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model.layers import Embedding, Experts, Layer, Linear, RMSNorm, Vector
from glimmer.model.names import check_tensor_parallel, mtp_prefix, param_specs, tensor_parallel_sizes
from glimmer.model_config import ModelConfig


def config(**changes) -> ModelConfig:
    return ModelConfig.from_dict(TINY | {"num_hidden_layers": 2, "n_routed_experts": 4} | changes)


AIR = dict(
    hidden_size=4096,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    vocab_size=151552,
)
GLM = AIR | dict(hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, use_qk_norm=True)
ODD = dict(
    num_attention_heads=12,
    num_key_value_heads=3,
    intermediate_size=101,
    moe_intermediate_size=37,
    vocab_size=1009,
    n_shared_experts=2,
)
MODELS = {"4.5-Air": AIR, "4.5": GLM, "odd widths": ODD, "one head each": dict(num_key_value_heads=8)}


def names_on_disk(changes: dict, mtp: str | None) -> dict[str, tuple[int, ...]]:
    raw = TINY | {"num_hidden_layers": 2, "n_routed_experts": 4} | changes
    return {name: shape for name, shape, _ in tensors(raw, mtp)}


@pytest.mark.parametrize("copies", [None, (True, True), (False, False)], ids=["no MTP", "copies", "no copies"])
@pytest.mark.parametrize("changes", [*MODELS.values(), dict(attention_bias=False), dict(first_k_dense_replace=0)])
def test_one_rank_reads_every_name_once(changes, copies):
    found = {}
    for spec in param_specs(config(**changes), Group(), copies):
        for part in spec.shards:
            assert f"{part.name}.weight" not in found and part.local_shape == part.shape
            found[f"{part.name}.weight"] = part.shape
        for name, length, cut in spec.vectors:
            assert name not in found and cut in (None, (0, length))
            found[name] = (length,)
    stored = None if copies is None else "full" if copies[0] else "without_copies"
    assert found == names_on_disk(changes, stored)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_all_ranks_hold_everything(changes):
    """Rows and columns of matrices once, key-value heads as often as they are shared, routers and norms everywhere."""
    model = config(**changes)
    sizes = tensor_parallel_sizes(model)
    assert {1, 2, 4} <= set(sizes) or model.num_key_value_heads == 3
    for size in sizes:
        held: dict[str, list] = {}
        shapes = {}
        for rank in range(size):
            for spec in param_specs(model, Group(rank, size), (True, True)):
                for part in spec.shards:
                    assert part.rows is None or part.cols is None
                    held.setdefault(part.name, []).append(part.rows or part.cols)
                    shapes[part.name] = part.shape[1 if part.cols else 0]
                for name, length, cut in spec.vectors:
                    held.setdefault(name, []).append(cut)
                    shapes[name] = length
        for name, cuts in held.items():
            times = size if name.endswith((".gate", ".eh_proj")) or "norm" in name or "correction" in name else 1
            if any(kv in name for kv in (".k_proj", ".v_proj")):
                times = max(1, size // model.num_key_value_heads)
            cover = Counter(cuts)
            if cuts[0] is None:
                assert times == size and set(cuts) == {None}, name
                continue
            assert set(cover.values()) == {times}, f"{name} at {size}"
            at = 0
            for start, stop in sorted(cover):
                assert start == at and stop > start, f"{name} at {size}: {sorted(cover)}"
                at = stop
            assert at == shapes[name], name


@given(heads=st.integers(1, 96), groups=st.integers(1, 96), size=st.integers(1, 96))
def test_query_heads_meet_their_key_head(heads, groups, size):
    """A rank's query head i reads its key head i // (h/g): the very one that it would read on one rank."""
    heads *= groups
    model = replace(
        config(),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        moe_intermediate_size=10**6,
        intermediate_size=10**6,
        vocab_size=10**6,
    )
    if size not in tensor_parallel_sizes(model):
        assert heads % size or (groups % size and size % groups)
        return
    d = model.head_dim
    for rank in {0, size // 2, size - 1}:
        q, k, v = next(s for s in param_specs(model, Group(rank, size), None) if s.layer.endswith("qkv_proj")).units[0]
        assert k.rows == v.rows
        queries, keys = (range(cut.rows[0] // d, cut.rows[1] // d) for cut in (q, k))
        assert len(queries) == heads // size and len(keys) == max(1, groups // size)
        for i, query in enumerate(queries):
            assert query // (heads // groups) == keys[i // (len(queries) // len(keys))]


def test_the_family_s_sizes():
    """96 query heads over 8 key-value heads: as vLLM, SGLang and the original accept them."""
    for changes in (AIR, GLM):
        assert tensor_parallel_sizes(config(**changes)) == [1, 2, 4, 8, 16, 24, 32, 48, 96]


@pytest.mark.parametrize("size", [3, 5, 6, 12, 64, 97, 192])
def test_other_sizes_are_refused_with_the_list(size):
    with pytest.raises(ConfigError) as error:
        check_tensor_parallel(config(**AIR), size)
    assert f"tensor_parallel_size={size}" in error.value.found and "96 query heads" in error.value.found
    assert error.value.expected == "one of 1, 2, 4, 8, 16, 24, 32, 48, 96"


def test_mtp_prefix_is_no_other_layer_s():
    """layers.4. is not layers.46."""
    assert mtp_prefix(replace(config(), num_hidden_layers=4)) == "model.layers.4."


@pytest.mark.parametrize("parts", [None, (True, True), (False, False)], ids=["no MTP", "copies", "no copies"])
@pytest.mark.parametrize("changes", [*MODELS.values(), dict(attention_bias=False), dict(first_k_dense_replace=0)])
def test_every_layer_declares_what_it_holds(changes, parts):
    """The layers of the model are those that are named, each gets what its class takes, and no other module holds
    anything."""
    model = Glm4Moe(config(**changes), Group(), Reference(torch.device("cpu")), torch.float32, parts)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    specs = {spec.layer: spec for spec in param_specs(model.config, model.group, parts)}
    assert layers.keys() == specs.keys()
    assert not list(model.parameters()) and not list(model.buffers())
    for name, layer in layers.items():
        units, vectors = [len(unit) for unit in specs[name].units], len(specs[name].vectors)
        match layer:
            case Linear():
                assert len(units) == 1 and vectors in (0, units[0])
            case Experts():
                assert units == [3] * model.config.n_routed_experts and not vectors
                gate, up, down = specs[name].units[0]
                assert layer.packed_together((gate, up, down)) == ((gate, up), (down,))
            case Embedding():
                assert units == [1] and not vectors and layer.plain
            case RMSNorm() | Vector():
                assert not units and vectors == 1
            case _:
                raise AssertionError(f"{name} is a {type(layer).__name__}")
    exact = {name for name, layer in layers.items() if layer.keep_float32}
    assert exact == {name for name in layers if name.endswith(("gate.proj", "correction_bias"))}
    assert all(layers[name].plain for name in exact if name.endswith("proj"))
    fine = {name for name, layer in layers.items() if layer.min_bits > 4}
    assert fine == {"lm_head", *({"mtp.eh_proj"} if parts else ()), *({"mtp.head"} if parts and parts[1] else ())}
