"""Loading: every name accounted for before a weight is read, own slices only, and ranks that add up to the whole."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from checkpoints import empty_checkpoint, tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from glimmer.backends import selection
from glimmer.backends.base import KVCacheSpec
from glimmer.batch import Batch
from glimmer.checkpoint.files import Checkpoint
from glimmer.config import EngineConfig
from glimmer.engine.runner import Runner
from glimmer.errors import CheckpointError, ConfigError
from glimmer.group import Group
from glimmer.model import load
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model.load import WeightLoader, build_model
from glimmer.model_config import ModelConfig

CPU, ALONE = torch.device("cpu"), Group()

GLM_45 = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "head_dim": 128,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "use_qk_norm": True,
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "torch_dtype": "bfloat16",
}
AIR = GLM_45 | {
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "use_qk_norm": False,
}


def loader(
    config: ModelConfig, checkpoint: Checkpoint, group: Group = ALONE, dtype: torch.dtype = torch.bfloat16, mtp=False
) -> WeightLoader:
    """The loader of a model that is yet to be loaded."""
    model = build_model(config, checkpoint, group, selection.choose(CPU), torch.float32, mtp).eval()
    return WeightLoader(model, checkpoint, dtype)


def plan(directory: Path, group: Group = ALONE, dtype: torch.dtype = torch.bfloat16, mtp: bool = False) -> WeightLoader:
    return loader(ModelConfig.load(directory), Checkpoint(directory), group, dtype, mtp)


# ---- every name accounted for --------------------------------------------------------------------------------------

NAMES = [  # one of each kind
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.3.post_attention_layernorm.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.bias",
    "model.layers.2.self_attn.v_proj.weight",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.2.self_attn.q_norm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.2.mlp.experts.7.up_proj.weight",
    "model.layers.2.mlp.shared_experts.gate_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture
def altered(checkpoint, tmp_path):
    """altered(change, **variant) -> a copy of a checkpoint in which change(tensors) was made."""

    def alter(change, **variant) -> Path:
        directory = tmp_path / "altered"
        shutil.copytree(checkpoint(index=False, use_qk_norm=True, **variant), directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return alter


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(name, altered):
    with pytest.raises(CheckpointError, match="1 tensor missing") as error:
        plan(altered(lambda tensors: tensors.pop(name)))
    assert name in error.value.found and str(error.value.found).count("model.layers") <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_misshapen_tensor_is_named_with_both_shapes(name, altered):
    def longer(tensors: dict[str, Tensor]) -> None:
        shapes.append(list(tensors[name].shape))
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
        shapes.append(list(tensors[name].shape))

    shapes: list[list[int]] = []
    with pytest.raises(CheckpointError, match="1 tensor of another shape") as error:
        plan(altered(longer))
    assert all(str(wanted) in error.value.found for wanted in (name, *shapes))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_type_is_named(name, altered):
    with pytest.raises(CheckpointError) as error:
        plan(altered(lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})))
    assert name in error.value.found and "int8" in error.value.found


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_with_another_number_of_dimensions_is_named(name, altered):
    with pytest.raises(CheckpointError) as error:
        plan(altered(lambda tensors: tensors.update({name: tensors[name][None]})))
    assert name in error.value.found


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.1.mlp.experts.8.up_proj.weight",
        "lm_head.bias",
        "model.layers.5.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.44.eh_proj.weight",
    ],
)
def test_a_superfluous_tensor_is_named(name, altered):
    with pytest.raises(CheckpointError, match="1 tensor superfluous") as error:
        plan(altered(lambda tensors: tensors.update({name: torch.zeros(8)})))
    assert name in error.value.found


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_proj.weight")])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, scale: tensors.pop(scale),
        lambda tensors, scale: tensors.update({scale: torch.ones(3, 1)}),
        lambda tensors, scale: tensors.update({scale: tensors[scale].to(torch.int8)}),
    ],
    ids=["missing", "misshapen", "int8"],
)
def test_a_scale_of_fp8_codes_is_named(change, name, altered):
    with pytest.raises(CheckpointError) as error:
        plan(altered(lambda tensors: change(tensors, f"{name}_scale"), fp8=True))
    assert name in error.value.found + error.value.expected


@pytest.mark.parametrize(
    "name", ["lm_head.weight_scale", "model.norm.weight_scale", "model.layers.1.self_attn.o_proj.weight_scale"]
)
def test_a_scale_without_codes_is_named(name, altered):
    with pytest.raises(CheckpointError) as error:
        plan(altered(lambda tensors: tensors.update({name: torch.ones(64, 1)})))
    assert name in error.value.found + error.value.expected


def test_many_names_are_counted_and_some_are_shown(altered):
    def empty(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]

    with pytest.raises(CheckpointError) as error:
        plan(altered(empty))
    assert error.value.found.startswith("72 tensors missing") and error.value.found.endswith("and 64 more")
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in error.value.found and len(error.value.found) < 900


@pytest.mark.parametrize(
    "key, value, names",
    [
        ("num_hidden_layers", 5, "missing.*model.layers.4."),
        ("num_hidden_layers", 3, "superfluous.*model.layers.3."),
        ("n_routed_experts", 9, "missing.*experts.8.gate_proj"),
        ("n_routed_experts", 7, "gate.weight is .8, 64., config.json says .7, 64."),
        ("first_k_dense_replace", 2, "missing.*model.layers.1.mlp.gate_proj"),
        ("use_qk_norm", False, "superfluous.*k_norm"),
        ("attention_bias", False, "superfluous.*k_proj.bias"),
        ("hidden_size", 128, "embed_tokens.weight is .320, 64., config.json says .320, 128."),
        ("num_key_value_heads", 2, "k_proj"),
        ("head_dim", 32, "q_proj"),
        ("n_shared_experts", 2, "shared_experts"),
        ("vocab_size", 321, "config.json says .321, 64."),
    ],
)
def test_a_configuration_of_another_model_is_found_out(key, value, names, checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint(use_qk_norm=True), tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=names):
        plan(directory)


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_hidden_layers=10**6),
        dict(num_hidden_layers=10**12),
        dict(n_routed_experts=10**6),
        dict(num_hidden_layers=900, n_routed_experts=10**5),
    ],
    ids=str,
)
def test_a_model_that_is_far_too_large_is_refused_before_it_is_built(changes, checkpoint, tmp_path, monkeypatch):
    directory = shutil.copytree(checkpoint(), tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setattr(load, "Glm4Moe", None)
    key, value = next(iter(changes.items()))
    with pytest.raises(ConfigError, match=f"{key}={value}"):
        plan(directory)


# ---- the published models, from headers ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, count, total, main",
    [
        (AIR, 18_329, 110_468_824_832, 106_852_251_264),
        (GLM_45, 44_691, 358_337_791_296, 352_797_829_024),
    ],
    ids=["GLM-4.5-Air", "GLM-4.5"],
)
def test_published_models(config, count, total, main, tmp_path):
    """Tensors, parameters (with and without MTP) and bytes; routers are kept in float32."""
    model, experts = ModelConfig.from_dict(config), config["n_routed_experts"]
    router = experts * config["hidden_size"] + experts
    with Checkpoint(empty_checkpoint(tmp_path, config)) as checkpoint:
        assert len(checkpoint.names()) == count
        assert sum(math.prod(checkpoint.shape(n)) for n in checkpoint.names()) == total
        whole = loader(model, checkpoint)
        assert whole.nbytes == 2 * main + 2 * router * (model.num_hidden_layers - model.first_k_dense_replace)
        asked = loader(model, checkpoint, mtp=True)
        assert asked.model.mtp_parts == (True, True) and asked.nbytes - whole.nbytes == 2 * (total - main) + 2 * router
        assert checkpoint.unread() == sorted(checkpoint.names()), "planning looks at headers only"


@pytest.mark.parametrize("stored, own", [("without_copies", False), ("separate_file", True)], ids=["4.6", "4.7"])
def test_the_mtp_layer_of_later_members(stored, own, tmp_path):
    """4.6 has no copies of embedding and head; 4.7 keeps the layer in a file that the index does not name."""
    config = GLM_45 | {"num_hidden_layers": 4, "n_routed_experts": 8}
    model = ModelConfig.from_dict(config)
    with Checkpoint(empty_checkpoint(tmp_path, config, mtp=stored)) as checkpoint:
        without, asked = (loader(model, checkpoint, mtp=mtp) for mtp in (False, True))
        assert without.model.mtp_parts is None and asked.model.mtp_parts == (own, own)
        copies = 2 * 2 * config["vocab_size"] * config["hidden_size"]
        assert (asked.nbytes - without.nbytes > copies) == own
        layer = [name for name in checkpoint.names() if name.startswith("model.layers.4.")]
        assert {checkpoint.file(name).name == "mtp.safetensors" for name in layer} == {own}


@pytest.mark.parametrize("config", [AIR, GLM_45], ids=["4.5-Air", "4.5"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_shares_add_up(config, fp8, tmp_path):
    """Bytes of all ranks: everything once, but norms, routers and key-value heads as often as they are held."""
    config = config | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8}
    empty_checkpoint(tmp_path, config, fp8=fp8, mtp=None)
    heads = config["num_key_value_heads"]
    with Checkpoint(tmp_path) as checkpoint:
        model = ModelConfig.load(tmp_path)
        for size in (1, 2, 4, 8, 16, 32):
            wanted = 0
            for name, shape, kind in tensors(config, None):
                router, quantised = ".mlp.gate." in name, fp8 and kind == "linear"
                width = 4 if router else 1 if quantised else 2
                times = size if router or kind == "norm" else 1
                if ".k_proj." in name or ".v_proj." in name:
                    times = max(1, size // heads)
                wanted += times * width * math.prod(shape)
                if quantised:  # scales go with their rows; where columns are cut, every rank has them all
                    wanted += 4 * shape[0] * (size if name.endswith(("o_proj.weight", "down_proj.weight")) else times)
            shares = [loader(model, checkpoint, Group(rank, size)).nbytes for rank in range(size)]
            assert sum(shares) == wanted, f"{size} ranks"
            assert max(shares) - min(shares) < 0.01 * max(shares)


class Agreed(Group):
    """Ranks that load the same."""

    def check_equal(self, values):
        pass


def test_sizes_that_do_not_divide_are_refused(checkpoint):
    directory = checkpoint()
    settings = EngineConfig(model=str(directory), tensor_parallel_size=3, max_model_len=64)
    with pytest.raises(ConfigError, match="tensor_parallel_size=3") as error:
        Runner(settings, ModelConfig.load(directory), Agreed(0, 3), CPU)
    assert error.value.expected == "one of 1, 2, 4, 8"


# ---- what is read --------------------------------------------------------------------------------------------------


class Share(Group):
    """One rank of several whose partial sums stay as they are, for the test to add up."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, n: int) -> Tensor:
        return x


def loaded(directory: Path, rank: int, size: int) -> Glm4Moe:
    group = Share(rank, size)
    asked = plan(directory, group, torch.float32, mtp=True)
    asked.load()
    return asked.model


ODD = dict(
    num_attention_heads=12,
    num_key_value_heads=3,
    intermediate_size=101,
    moe_intermediate_size=37,
    vocab_size=331,
    n_shared_experts=2,
    use_qk_norm=True,
)


@pytest.mark.parametrize("variant", [{}, dict(fp8=True), ODD], ids=["plain", "fp8", "odd widths"])
@torch.inference_mode()
def test_partial_sums_of_all_ranks_make_the_whole(variant, checkpoint):
    directory = checkpoint(mtp="full", **variant)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    tokens, places = torch.tensor([0, 7, 150, 318, 319]), torch.arange(5)
    batch = Batch.of(tokens.tolist(), range(5), range(5), [[0]], range(5), [5], [5])
    config = ModelConfig.load(directory)

    def parts(model: Glm4Moe) -> dict[str, Tensor]:
        layer = model.layers[1]
        spec = KVCacheSpec(1, 16, layer.self_attn.kv_heads, config.head_dim, torch.float32)
        (kv,) = model.backend.allocate_kv(spec, 1)
        ids, scores = layer.mlp.gate(x)
        return {
            "embed_tokens": model.embed_tokens(tokens),
            "attention": layer.self_attn(x, model.rotary(places), batch, kv),
            "dense": model.layers[0].mlp(x),
            "experts": layer.mlp.experts(x, ids, scores),
            "moe": layer.mlp(x),
            "mtp": model.mtp.block.mlp(x),
            "mtp embedding": model.mtp.embed_tokens(tokens),
        }

    whole = loaded(directory, 0, 1)
    expected = parts(whole)
    for size in (2, 4, 8) if not variant.get("vocab_size") else (3, 6):
        ranks = [loaded(directory, rank, size) for rank in range(size)]
        shares = [parts(model) for model in ranks]
        for name, value in expected.items():
            found = sum(share[name] for share in shares)
            # Of a cut matrix each rank quantises its own part of the inputs, with its own scale: other rounding errors.
            tolerance = 0.05 if variant.get("fp8") else 1e-6
            assert (found - value).norm() <= tolerance * value.norm(), f"{name} on {size} ranks"
        assert torch.allclose(torch.cat([m.logits(x) for m in ranks], 1), whole.logits(x), atol=1e-5)


CHILD = """
import sys, torch
from pathlib import Path
from glimmer.backends import selection
from glimmer.checkpoint.files import Checkpoint
from glimmer.config import EngineConfig
from glimmer.model_config import ModelConfig
from glimmer.model.load import WeightLoader, build_model
from glimmer.group import Group

def kib(key):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))

directory, dtype, group = sys.argv[1], getattr(torch, sys.argv[2]), Group(rank=1, size=4)
quantization = sys.argv[3] or None
config, checkpoint, backend = ModelConfig.load(directory), Checkpoint(directory), selection.choose(torch.device("cpu"))
model = build_model(config, checkpoint, group, backend, torch.float32)
loader = WeightLoader(model, checkpoint, dtype, quantization)
before = kib("VmHWM")
loader.load()
print(before, kib("VmHWM"), loader.nbytes)
"""


def test_other_threads_compute_with_as_many_threads_as_before(checkpoint):
    """torch's count is that of each thread; what a new one begins with is common to all."""
    before, seen = torch.get_num_threads(), []

    def look(nbytes: int) -> None:
        other = Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()

    torch.set_num_threads(3)
    try:
        directory = checkpoint()
        model = build_model(
            ModelConfig.load(directory), Checkpoint(directory), ALONE, selection.choose(CPU, 2), torch.float32
        )
        WeightLoader(model, Checkpoint(directory), torch.bfloat16).load(look)
        assert set(seen) == {3}, seen
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "dtype, mtp, quantization, backend",
    [
        ("bfloat16", "full", "", ""),
        ("float32", None, "", "reference"),
        ("float32", None, "", ""),
        ("bfloat16", None, "int8", ""),
        ("bfloat16", None, "int4", ""),
    ],
)
def test_peak_memory_is_the_share_and_one_tensor(dtype, mtp, quantization, backend, tmp_path):
    config = GLM_45 | {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "n_routed_experts": 16,
        "moe_intermediate_size": 1024,
        "intermediate_size": 4096,
        "vocab_size": 20_000,
        "first_k_dense_replace": 1,
    }
    empty_checkpoint(tmp_path, config, mtp=mtp)
    command = [sys.executable, "-c", CHILD, str(tmp_path), dtype, quantization]
    child = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"GLIMMER_BACKEND": backend}, timeout=120
    )
    assert child.returncode == 0, child.stderr
    before, peak, share = map(int, child.stdout.split())
    with Checkpoint(tmp_path) as checkpoint:
        size = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        largest = max(checkpoint.nbytes(name) for name in checkpoint.names())
    assert size > 400 << 20 and share < (250 << 20)
    rounding = 24 << 20  # a stretch that changes its type on the way, and packed matrices in huge pages
    most = share + largest + rounding
    halved = dtype == "float32" and backend == ""  # our kernels keep what bfloat16 holds in half of the bytes
    assert share * (0.8 if halved else 1) < (peak - before) << 10 <= most, (
        f"{peak - before} KiB more for a share of {share >> 10}"
    )
