"""The model against transformers' Glm4MoeForCausalLM on tiny random checkpoints of every variant of the family."""

import copy
import json

import pytest
import torch
from checkpoints import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from glimmer import LLM, SamplingParams
from glimmer.backends import selection
from glimmer.backends.base import ExpertSet, Packed
from glimmer.engine.sequence import Chunk, Request, Sequence, Step
from glimmer.group import Group
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.model_config import ModelConfig
from glimmer.weight import Weight

pytestmark = pytest.mark.slow

LENGTHS = (1, 2, 16, 17, 100, 300)  # around the block of 16, and long
TOKENS = 292  # the tokenizer's; the vocabulary is padded to 320
ANSWER = 8

VARIANTS = {
    "4.5-Air": {},
    "4.5": dict(use_qk_norm=True, first_k_dense_replace=3, routed_scaling_factor=2.5, mtp="full"),
    "4.6": dict(use_qk_norm=True, first_k_dense_replace=3, routed_scaling_factor=2.5, mtp="without_copies"),
    "4.7": dict(use_qk_norm=True, routed_scaling_factor=2.5, mtp="separate_file", dtype_key="dtype"),
    "no attention bias": dict(attention_bias=False),
    "qk-norm, no attention bias": dict(attention_bias=False, use_qk_norm=True),
    "one group of two": dict(n_group=2, topk_group=1),
    "two groups of four": dict(n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "weights not normalised": dict(norm_topk_prob=False),
    "not normalised, but scaled": dict(norm_topk_prob=False, routed_scaling_factor=2.5),
    "no dense layer": dict(first_k_dense_replace=0),
    "three dense layers": dict(first_k_dense_replace=3),
    "only dense layers": dict(first_k_dense_replace=4),
    "one expert a token": dict(num_experts_per_tok=1),
    "every expert": dict(num_experts_per_tok=8),
    "two shared experts": dict(n_shared_experts=2),
    "rope_parameters": dict(rope="parameters"),
    "whole heads rotated": dict(partial_rotary_factor=1.0),
    "rope_parameters, a quarter rotated": dict(rope="parameters", partial_rotary_factor=0.25, rope_theta=10000),
    "yarn": dict(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
    "yarn, mscale, every dimension": dict(
        partial_rotary_factor=1.0,
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "mscale": 0.707, "mscale_all_dim": 1.0, "truncate": False},
    ),
    "dtype for torch_dtype": dict(dtype_key="dtype"),
    "one eos id": dict(eos_token_id=256),
    "aliases": dict(num_local_experts=8, num_mtp_layers=0),
    "large epsilon": dict(rms_norm_eps=0.1, use_qk_norm=True),
    "float16 storage": dict(dtype="float16"),
    "float32 storage": dict(dtype="float32"),
    "three files": dict(shards=3),
    "one file, no index": dict(index=False),
    "one key-value head": dict(num_key_value_heads=1),
    "odd sizes": dict(hidden_size=72, intermediate_size=44, moe_intermediate_size=20, head_dim=12),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, TOKENS, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def logits(llm: LLM, tokens: list[int], *cuts: int) -> Tensor:
    """Raw logits (T, V) of every position: the tokens as chunks that end at `cuts`, one chunk a step."""
    sequence = Sequence(Request("", tuple(tokens), SamplingParams(), ""), len(tokens))
    sequence.blocks = list(range(-(-len(tokens) // llm.config.block_size)))
    ends = [*cuts, len(tokens)]
    steps = [Step((Chunk(sequence, a, b - a, b - a),)) for a, b in zip([0, *ends], ends)]
    return torch.cat([llm._runner.forward(llm._runner.batch(step))[1] for step in steps])


@torch.inference_mode()
def judged(model, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


def ids(tokens: list[int]) -> dict:
    return {"prompt_token_ids": tokens}


def greedy(max_tokens: int = ANSWER, **params) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)


def assert_same_choices(expected: Tensor, tokens: list[int]) -> None:
    """`tokens` are what the reference's logits (N, V) choose, wherever its two best are further than 1e-3 apart."""
    best = expected.log_softmax(-1)[:, :TOKENS].topk(2, -1)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-3
    assert clear.float().mean() > 0.5
    wrong = clear & (best.indices[:, 0] != torch.tensor(tokens))
    assert not wrong.any(), f"other tokens at {wrong.nonzero().flatten().tolist()}"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_agrees_in_float32(variant, checkpoint, engine, reference):
    directory = checkpoint(**variant)
    llm, model = engine(directory), reference(directory)
    prompts = [prompt(n) for n in LENGTHS]
    outputs = llm.generate([ids(p) for p in prompts], greedy())
    for tokens, output in zip(prompts, outputs):
        answer = output.outputs[0].token_ids
        assert len(answer) == ANSWER
        expected, found = judged(model, tokens + answer), logits(llm, tokens + answer)
        error = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
        assert error < 1e-4, f"log-probabilities of {len(tokens)} tokens differ by {error:.1e}"
        assert_same_choices(expected[len(tokens) - 1 : -1], answer)


YARN = [
    dict(),
    dict(original_max_position_embeddings=8192),
    dict(beta_fast=64, beta_slow=2),
    dict(attention_factor=1.25),
    dict(mscale=0.707, mscale_all_dim=0.8),
    dict(mscale=1.0),
    dict(truncate=False),
    dict(partial_rotary_factor=0.25, rope_theta=10000.0),
    dict(beta_fast=1, beta_slow=1),
    dict(factor=None, original_max_position_embeddings=1024),
]


@pytest.mark.parametrize("changes", YARN, ids=str)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_yarn_as_transformers_computes_it(changes, place):
    raw = {key: value for key, value in TINY.items() if key != "rope_scaling"}
    raw |= {place: {"rope_type": "yarn", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "factor": 4.0} | changes}
    theirs = Glm4MoeRotaryEmbedding(Glm4MoeConfig(**copy.deepcopy(raw | {"head_dim": 128})))
    config = ModelConfig.from_dict(raw | {"head_dim": 128, "num_nextn_predict_layers": 0})
    positions = torch.tensor([0, 1, 2, 17, 1000, 4095, 16383])
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = Glm4Moe(config, Group(), selection.choose(torch.device("cpu")), torch.float32).rotary(positions)
    for found, expected in zip(ours, (cos, sin), strict=True):
        assert (found - expected[0, :, : found.shape[1]]).abs().max() < 2e-3  # angles of 16,383 rad have an ulp of 1e-3
        assert (found[:4] - expected[0, :4, : found.shape[1]]).abs().max() < 1e-5


def test_the_variants_differ(checkpoint, engine):
    """A key that both sides ignored would pass the test above: each must change the answer."""
    same = {"dtype_key", "rope", "mtp", "shards", "index", "num_local_experts", "num_mtp_layers", "eos_token_id"}
    plain = logits(engine(checkpoint()), prompt(17))
    for key in sorted({key for variant in VARIANTS.values() for key in variant}):
        value = next(variant for variant in VARIANTS.values() if key in variant)[key]
        if key == "topk_group":
            other = logits(engine(checkpoint(n_group=2, topk_group=1)), prompt(17))
            assert not torch.equal(logits(engine(checkpoint(n_group=2, topk_group=2)), prompt(17)), other)
        elif key == "n_group":
            assert not torch.equal(logits(engine(checkpoint(n_group=2)), prompt(17)), plain)
        else:
            assert torch.equal(logits(engine(checkpoint(**{key: value})), prompt(17)), plain) == (key in same), key


def test_logprobs_of_the_public_api(checkpoint, engine, reference):
    """What generate() reports is the log-softmax of the raw logits, with ranks, for prompt and answer."""
    directory = checkpoint(use_qk_norm=True)
    llm, model = engine(directory), reference(directory)
    prompts = [prompt(n, seed=1) for n in (1, 40, 300)]
    for tokens, output in zip(prompts, llm.generate([ids(p) for p in prompts], greedy(logprobs=3, prompt_logprobs=2))):
        answer = output.outputs[0]
        expected = judged(model, tokens + answer.token_ids).log_softmax(-1)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(tokens) and len(answer.logprobs) == ANSWER
        rows = zip(expected, tokens[1:] + answer.token_ids, output.prompt_logprobs[1:] + answer.logprobs, strict=False)
        for i, (row, token, found) in enumerate(rows):
            count = 2 if i < len(tokens) - 1 else 3
            assert token in found and len(found) in (count, count + 1)
            assert {f.rank for f in found.values()} == {*range(1, count + 1), found[token].rank}
            order = row.sort(descending=True).values
            for id, item in found.items():
                assert abs(item.logprob - row[id]) < 1e-4
                assert abs(order[item.rank - 1] - row[id]) < 1e-4  # the rank, up to near ties


# ---- the same tokens, however they are computed --------------------------------------------------------------------


SHARED = prompt(70, seed=2)
CROWD = (
    [prompt(n, seed=3) for n in (1, 2, 15, 33, 64, 150)]
    + [SHARED[:n] + prompt(m, seed=4) for n, m in ((16, 1), (32, 5), (48, 1), (70, 1), (70, 30))]
    + [SHARED, SHARED[:33], SHARED]
)
BUDGET = 12  # tokens of each answer

SETTINGS = {
    "whole": {},
    "chunks of 7": dict(max_num_batched_tokens=7),
    "one token at a time": dict(max_num_batched_tokens=1, max_num_seqs=3),
    "blocks of 3": dict(block_size=3),
    "blocks of 1, chunks of 50": dict(block_size=1, max_num_batched_tokens=50),
    "no prefix reuse": dict(enable_prefix_caching=False),
    "few blocks": dict(kv_cache_memory_bytes=12 * 2 * 16 * 4 * 4 * 16 * 4, max_model_len=192),  # 12 blocks of 16 tokens
}


@pytest.fixture(scope="module")
def alone(checkpoint, engine):
    """The answer to each of CROWD when nothing runs beside it and nothing is reused."""
    llm = engine(checkpoint(), enable_prefix_caching=False)
    return [llm.generate(ids(tokens), greedy(BUDGET))[0].outputs[0].token_ids for tokens in CROWD]


@pytest.mark.parametrize("how", SETTINGS.values(), ids=SETTINGS)
def test_same_tokens_in_any_company(how, alone, checkpoint, engine):
    llm = engine(checkpoint(), **how)
    for _ in range(2):  # the second time with a cache full of prefixes
        outputs = llm.generate([ids(tokens) for tokens in CROWD], greedy(BUDGET))
        assert [o.outputs[0].token_ids for o in outputs] == alone
    if "kv_cache_memory_bytes" in how:
        assert llm._engine.scheduler.preemptions > 0, "this case was meant to run out of blocks"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(len(CROWD))),
    count=st.integers(1, len(CROWD)),
    budgets=st.lists(st.integers(1, BUDGET), min_size=len(CROWD), max_size=len(CROWD)),
    how=st.sampled_from(list(SETTINGS)),
)
def test_same_tokens_in_any_order(order, count, budgets, how, alone, checkpoint, engine):
    llm = engine(checkpoint(), **SETTINGS[how])
    chosen = order[:count]
    outputs = llm.generate([ids(CROWD[i]) for i in chosen], [greedy(budgets[i]) for i in chosen])
    assert [o.outputs[0].token_ids for o in outputs] == [alone[i][: budgets[i]] for i in chosen]


@pytest.mark.parametrize("cuts", [(1,), (16,), (17,), (5, 40, 41), tuple(range(1, 60))], ids=str)
def test_chunks_give_the_logits_of_the_whole(cuts, checkpoint, engine):
    llm = engine(checkpoint(use_qk_norm=True, n_group=2))
    tokens = prompt(60, seed=5)
    torch.testing.assert_close(logits(llm, tokens, *cuts), logits(llm, tokens), atol=5e-5, rtol=0)


# ---- bfloat16 ------------------------------------------------------------------------------------------------------


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row, from logits."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("name", ["4.5-Air", "4.5", "one group of two", "only dense layers"])
def test_bfloat16_is_no_further_from_float32_than_transformers(name, checkpoint, engine, reference):
    directory = checkpoint(**VARIANTS[name])
    exact = reference(directory)
    theirs = reference(directory, dtype="bfloat16", attn_implementation="sdpa", experts_implementation="grouped_mm")
    ours = engine(directory, dtype="bfloat16")
    kl = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        tokens = prompt(300, seed)
        found = logits(ours, tokens), judged(theirs, tokens)
        kl += torch.stack([divergence(judged(exact, tokens), each).mean() for each in found])
    assert kl[0] <= 1.5 * kl[1], f"mean KL {kl[0] / 4:.2e}, transformers' {kl[1] / 4:.2e}"
    assert kl[0] > 0, "nothing was computed in bfloat16"


# ---- FP8 -----------------------------------------------------------------------------------------------------------


def through_fp8(x: Tensor) -> Tensor:
    """What is left of x after dynamic quantisation to FP8, a scale for each token."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


@torch.inference_mode()
def experts_through_fp8(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Glm4MoeExperts.forward, where both matrices of an expert get their inputs through FP8."""
    out = torch.zeros_like(x)
    x = through_fp8(x)
    for t in range(len(x)):
        for e, weight in zip(chosen[t], weights[t]):
            gate, up = (self.gate_up_proj[e] @ x[t]).chunk(2)
            out[t] += weight * (self.down_proj[e] @ through_fp8(torch.nn.functional.silu(gate) * up))
    return out


@pytest.fixture(scope="module")
def fp8(checkpoint, reference, tmp_path_factory):
    """An FP8 checkpoint, and dtype -> transformers' model with its weights dequantised and all inputs through FP8."""
    directory = checkpoint(fp8=True, use_qk_norm=True, mtp="without_copies")
    stored = {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    scales = {name: tensor.float() for name, tensor in stored.items() if name.endswith("_scale")}
    plain = tmp_path_factory.mktemp("dequantised")
    weights = {k: v.float() * scales.get(f"{k}_scale", 1) for k, v in stored.items() if k not in scales}
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))

    def quantised(dtype: str):
        model = copy.deepcopy(reference(plain, dtype=dtype))
        for name, module in model.named_modules():
            if f"{name}.weight_scale" in scales:
                module.register_forward_pre_hook(lambda module, inputs: (through_fp8(inputs[0]),))
            if type(module).__name__ == "Glm4MoeExperts":
                module.forward = experts_through_fp8.__get__(module)
        return model

    return directory, reference(plain), quantised


def test_fp8_is_codes_times_scales_on_both_sides(fp8, engine):
    """Rounding apart, exactly what an independent computation gives; a different thing from quantised weights alone.

    An input that lies within rounding error of the border between two codes may go either way: a row of 2,000 inputs
    has such a one in some 2 of 100 cases, and is then another row.
    """
    directory, weights_only, quantised = fp8
    llm, model = engine(directory), quantised("float32")
    errors, effects = [], []
    for seed in range(40):
        tokens = prompt(1 + seed % 3, seed)
        expected = judged(model, tokens)
        errors += (logits(llm, tokens) - expected).abs().amax(-1).tolist()
        effects += (judged(weights_only, tokens) - expected).abs().amax(-1).tolist()
    assert min(effects) > 0.1
    assert sum(error < 2e-5 for error in errors) >= 0.9 * len(errors), sorted(errors)


def test_fp8_in_bfloat16(fp8, engine):
    directory, _, quantised = fp8
    exact, theirs, ours = quantised("float32"), quantised("bfloat16"), engine(directory, dtype="bfloat16")
    kl = torch.zeros(2, dtype=torch.float64)
    for tokens in (prompt(n, 7) for n in (1, 2, 5, 20, 40)):
        found = logits(ours, tokens), judged(theirs, tokens)
        kl += torch.stack([divergence(judged(exact, tokens), each).mean() for each in found])
    assert kl[0] <= 1.5 * kl[1], kl


def weights_of(packed: Packed | ExpertSet) -> list[Weight]:
    """What the reference holds of a layer."""
    parts = (packed.gate_up, packed.down) if isinstance(packed, ExpertSet) else (packed,)
    return [weight for part in parts for weight in part.weights]


def test_fp8_stays_one_byte(fp8, engine, monkeypatch):
    """No layer widens its codes for good, and what the checkpoint leaves plain is left plain."""
    monkeypatch.setenv("GLIMMER_BACKEND", "reference")  # whose packed matrices show their codes
    own = engine(fp8[0], seed=1, speculative_config="off")  # not one that other tests have loaded
    model = own._runner.model
    packed = {name: weights_of(layer.packed) for name, layer in model.named_modules() if hasattr(layer, "packed")}
    kinds = {name: {w.kind for w in weights} for name, weights in packed.items()}
    plain = {name for name, kind in kinds.items() if kind != {"fp8"}}
    assert plain == {"lm_head"} | {f"layers.{i}.mlp.gate.proj" for i in (1, 2, 3)}
    assert all(w.codes.dtype == torch.float8_e4m3fn for n, p in packed.items() if n not in plain for w in p)
