"""The MTP layer against transformers' MtpModel, however it is stored; and that nobody loads it unasked."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from glimmer.backends import selection
from glimmer.backends.base import KVCacheSpec
from glimmer.batch import Batch
from glimmer.checkpoint.files import INDEX, Checkpoint
from glimmer.errors import CheckpointError
from glimmer.group import Group
from glimmer.model.load import WeightLoader, build_model
from glimmer.model_config import ModelConfig
from glimmer.weight import Weight

CPU, BLOCK, BLOCKS = torch.device("cpu"), 16, 8
TOKENS = torch.randint(0, 292, (60,), generator=torch.Generator().manual_seed(6))
STORED = ("full", "without_copies", "separate_file")
SETTINGS = {
    "4.5": dict(use_qk_norm=True, first_k_dense_replace=3, routed_scaling_factor=2.5),
    "4.5-Air": {},
    "groups, no bias": dict(attention_bias=False, n_group=2, norm_topk_prob=False),
    "no dense layer": dict(first_k_dense_replace=0),
}


def plan(directory, mtp: bool, dtype: torch.dtype = torch.float32) -> WeightLoader:
    config, checkpoint = ModelConfig.load(directory), Checkpoint(directory)
    model = build_model(config, checkpoint, Group(), selection.choose(CPU), torch.float32, mtp).eval()
    return WeightLoader(model, checkpoint, dtype)


class Drafter:
    """A model with its MTP layer and a cache for one sequence, in float32."""

    def __init__(self, directory):
        config, asked = ModelConfig.load(directory), plan(directory, mtp=True)
        asked.load()
        self.model = asked.model
        layers, heads = config.num_hidden_layers + 1, config.num_key_value_heads
        self.kv = self.model.backend.allocate_kv(
            KVCacheSpec(layers, BLOCK, heads, config.head_dim, torch.float32), BLOCKS
        )

    def batch(self, tokens: torch.Tensor, start: int = 0) -> Batch:
        places, stop = range(start, start + len(tokens)), start + len(tokens)
        return Batch.of(tokens.tolist(), places, places, [range(BLOCKS)], range(len(tokens)), [len(tokens)], [stop])

    @torch.inference_mode()
    def guess(self, tokens: torch.Tensor, *cuts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's hidden states and logits for all tokens but the last, computed in chunks that end at `cuts`."""
        parts, ends = [], [*cuts, len(tokens) - 1]
        for a, b in zip([0, *ends], ends):
            batch = self.batch(tokens[a:b], a)
            hidden = self.model(batch, self.kv)
            parts.append(self.model.draft(hidden, tokens[a + 1 : b + 1], batch, self.kv))
        hidden = torch.cat(parts)
        return hidden, self.model.draft_logits(hidden)


@torch.inference_mode()
def judged(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two of transformers' MtpModel."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    # transformers knows the layer by its number in the published models.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
    mtp, tokens = MtpModel.from_pretrained(model).eval(), tokens[None]
    hidden = model.model(tokens[:, :-1]).last_hidden_state
    positions = torch.arange(1, tokens.shape[1])[None]  # it counts from the token, we from the hidden state before it
    hidden = mtp.forward_layer(0, hidden, positions, MtpCache(), input_ids=tokens[:, 1:])
    return hidden[0], model.lm_head(hidden)[0]


@pytest.mark.parametrize("variant", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("stored", STORED[:2])
def test_agrees_with_transformers(stored, variant, checkpoint, reference):
    directory = checkpoint(dtype="float32", mtp=stored, **variant)
    hidden, logits = Drafter(directory).guess(TOKENS)
    expected_hidden, expected_logits = judged(reference(directory), TOKENS)
    assert (hidden - expected_hidden).abs().max() < 5e-5
    assert (logits.log_softmax(-1) - expected_logits.log_softmax(-1)).abs().max() < 1e-4


def test_the_same_layer_however_it_is_stored(checkpoint):
    first, *others = (Drafter(checkpoint(dtype="float32", mtp=stored)).guess(TOKENS) for stored in STORED)
    for other in others:
        assert torch.equal(other[0], first[0]) and torch.equal(other[1], first[1])


def test_chunks_give_what_the_whole_gives(checkpoint):
    drafter = Drafter(checkpoint(dtype="float32", mtp="full", use_qk_norm=True))
    whole = drafter.guess(TOKENS)
    for cuts in ((1,), (16,), (3, 40), tuple(range(1, 59))):
        for found, expected in zip(drafter.guess(TOKENS, *cuts), whole):
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_copies_are_used_where_they_are(checkpoint, reference, tmp_path):
    """Where the layer has its own embedding and head, those count: here they differ from the main model's."""
    source = checkpoint(dtype="float32", mtp="full")
    directory = tmp_path / "own"
    shutil.copytree(source, directory)
    file = directory / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"model.layers.4.{name}.weight"] = tensors[f"model.layers.4.{name}.weight"].flip(0)
    save_file(tensors, file, {"format": "pt"})
    own = Drafter(directory).guess(TOKENS)
    assert not torch.allclose(own[0], Drafter(source).guess(TOKENS)[0], atol=0.1)

    # The same with no copies, but with the main model's own flipped, after it has computed its hidden states.
    main = Drafter(directory)
    main.model.mtp.embed_tokens, main.model.mtp.head = None, None
    main.model.embed_tokens.table = main.model.embed_tokens.table.flip(0)
    with Checkpoint(directory) as opened:
        head = opened.tensor("lm_head.weight").float().flip(0)
    main.model.lm_head.packed = main.model.backend.pack_linear([Weight("plain", head)], torch.float32)
    drafter = Drafter(source)
    with torch.inference_mode():
        batch = drafter.batch(TOKENS[:-1])
        hidden = drafter.model(batch, drafter.kv)
        expected = main.model.draft(hidden, TOKENS[1:], batch, main.kv)
        assert torch.equal(own[0], expected)
        assert torch.equal(own[1], main.model.draft_logits(expected))


def test_chaining_feeds_the_draft_its_own_hidden_state(checkpoint):
    """A second guess takes the first one's hidden state, after its norm, where the main model's would be."""
    drafter = Drafter(checkpoint(dtype="float32", mtp="full"))
    first, _ = drafter.guess(TOKENS)
    with torch.inference_mode():
        again = drafter.model.draft(first, TOKENS[1:], drafter.batch(TOKENS[:-1]), drafter.kv)
        logits = drafter.model.draft_logits(again)
    assert logits.isfinite().all() and not torch.allclose(again, first, atol=0.1)


# ---- which tensors, and when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("stored", STORED)
def test_never_loaded_unless_asked(stored, fp8, checkpoint, engine):
    directory = checkpoint(mtp=stored, fp8=fp8)
    without, unasked, asked = plan(checkpoint(fp8=fp8), False), plan(directory, False), plan(directory, True)
    assert unasked.model.mtp_parts is None and unasked.nbytes == without.nbytes
    assert [s.layer for s in unasked.param_specs] == [s.layer for s in without.param_specs]
    assert asked.model.mtp_parts == ((False, False) if stored == "without_copies" else (True, True))
    assert asked.nbytes > unasked.nbytes
    llm = engine(directory, speculative_config="off")
    assert llm._runner.model.mtp is None
    unread = Checkpoint(directory).names() - Checkpoint(checkpoint(fp8=fp8)).names()
    assert unread and all(name.startswith("model.layers.4.") for name in unread)


def test_fp8_head_of_the_layer(checkpoint, reference):
    """The official FP8 checkpoints quantise the MTP layer, its head included, though the head it copies is plain."""
    drafter = Drafter(checkpoint(fp8=True, mtp="full"))
    mtp = drafter.model.mtp
    assert mtp.head.packed.kind == "fp8" and drafter.model.lm_head.packed.kind == "plain"
    assert mtp.block.self_attn.qkv_proj.packed.kind == "fp8" and mtp.eh_proj.packed.kind == "plain"
    _, logits = drafter.guess(TOKENS)
    _, plain = Drafter(checkpoint(mtp="full")).guess(TOKENS)
    p, q = plain.double().log_softmax(-1), logits.double().log_softmax(-1)
    assert 1e-4 < (p.exp() * (p - q)).sum(-1).mean() < 0.3  # quantised, yet the same layer


@pytest.mark.parametrize("stored", [None, *STORED])
def test_asked_for_but_not_there(stored, checkpoint, tmp_path):
    """A layer that is absent, or lacks its heart, is refused by name; without being asked for, it is no one's loss."""
    directory = checkpoint() if stored is None else tmp_path / "copy"
    if stored is not None:
        shutil.copytree(checkpoint(mtp=stored), directory)
        for file in directory.glob("*.safetensors"):
            tensors = load_file(file)
            tensors.pop("model.layers.4.eh_proj.weight", None)
            save_file(tensors, file)
        if (directory / INDEX).exists():
            index = json.loads((directory / INDEX).read_text())
            index["weight_map"].pop("model.layers.4.eh_proj.weight", None)
            (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.eh_proj\.weight"):
        plan(directory, mtp=True)
    assert plan(directory, mtp=False).model.mtp_parts is None


def test_every_tensor_of_the_layer_counts_when_it_is_asked_for(checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint(mtp="separate_file"), tmp_path / "copy")
    tensors = load_file(directory / "mtp.safetensors")
    gone = tensors.pop("model.layers.4.mlp.experts.5.up_proj.weight")
    save_file(tensors, directory / "mtp.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor missing.*model\.layers\.4\.mlp\.experts\.5\.up_proj\.weight"):
        plan(directory, mtp=True)
    assert plan(directory, mtp=False).model.mtp_parts is None
    save_file(
        tensors | {"model.layers.4.mlp.experts.5.up_proj.weight": gone, "model.layers.4.surprise": gone.clone()},
        directory / "mtp.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"1 tensor superfluous.*model\.layers\.4\.surprise"):
        plan(directory, mtp=True)
    assert plan(directory, mtp=False).model.mtp_parts is None


def test_one_layer_less_in_the_configuration_is_no_mtp_layer(checkpoint, tmp_path):
    """An ordinary layer at the MTP layer's place is not left out in silence: the model would answer nonsense."""
    directory = shutil.copytree(checkpoint(), tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"superfluous.*model\.layers\.3\."):
        plan(directory, mtp=False)
