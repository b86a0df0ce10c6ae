"""What a profile counts, against what the model holds and what its definition says; and that nothing of it stays."""

import pytest

from glimmer import LLM, SamplingParams

TOKENS = 300  # enough that every expert of the small model is chosen


@pytest.fixture(scope="module")
def llm(checkpoint) -> LLM:
    return LLM(str(checkpoint()), max_model_len=512, max_num_seqs=4, enable_prefix_caching=False)


def generate(llm: LLM, tokens: int = TOKENS, answer: int = 1) -> list[int]:
    prompt = {"prompt_token_ids": [(7 * i) % 250 + 3 for i in range(tokens)]}
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    return llm.generate(prompt, params)[0].outputs[0].token_ids


def test_a_long_prompt_reads_every_matrix_once_and_its_keys_once(llm):
    with llm.profile() as profile:
        generate(llm)
    packed = [m.packed for m in llm._runner.model.modules() if getattr(m, "packed", None) is not None]
    config = llm.model_config
    cache = 2 * 2 * config.num_key_value_heads * config.head_dim * TOKENS * config.num_hidden_layers
    assert profile.steps == 1
    assert profile.parts["attention"].nbytes == cache
    assert profile.total.nbytes == sum(w.nbytes for w in packed) + cache


def test_operations_are_those_of_the_definition(llm):
    with llm.profile() as profile:
        generate(llm)
    c, parts = llm.model_config, profile.parts
    sparse = c.num_hidden_layers - c.first_k_dense_replace
    pairs = TOKENS * (TOKENS + 1) // 2
    assert parts["attention"].operations == {
        "bfloat16": 4 * c.num_attention_heads * c.head_dim * pairs * c.num_hidden_layers
    }
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    assert parts["experts"].operations == {"bfloat16": 2 * TOKENS * c.num_experts_per_tok * expert * sparse}
    assert parts["lm_head"].operations == {"bfloat16": 2 * c.vocab_size * c.hidden_size}, "one row of logits"
    assert parts["mlp.gate.proj"].operations == {}, "float32 products have no measured limit"


def test_one_token_reads_no_more_experts_than_it_chooses(llm):
    with llm.profile() as profile:
        generate(llm, tokens=1)
    experts = next(m for name, m in llm._runner.model.named_modules() if name.endswith("1.mlp.experts"))
    stored = experts.packed.nbytes
    c = llm.model_config
    sparse = c.num_hidden_layers - c.first_k_dense_replace
    chosen = stored * c.num_experts_per_tok / c.n_routed_experts * sparse
    assert profile.parts["experts"].nbytes == pytest.approx(chosen, abs=2 * sparse)


def test_parts_add_up_to_the_steps(llm):
    with llm.profile() as profile:
        generate(llm, answer=5)
    assert profile.steps == 5
    assert sum(part.seconds for part in profile.parts.values()) == pytest.approx(profile.seconds)
    assert {"attention", "experts", "sampler", "scheduler, batch", "between operations"} <= set(profile.parts)
    reads, computes = profile.total.at_best({"read": 1e9, "bfloat16": 1e12, "int8": 1e12})
    assert reads == profile.total.nbytes / 1e9 and computes == profile.total.operations["bfloat16"] / 1e12


@pytest.mark.parametrize("fail", [False, True])
def test_a_closed_profile_leaves_nothing_behind(llm, fail):
    owners = [llm._engine, llm._runner, llm._engine.sampler, *llm._runner.model.modules()]
    before = [dict(vars(owner)) for owner in owners]
    alone = generate(llm, answer=3)
    try:
        with llm.profile() as profile:
            assert generate(llm, answer=3) == alone
            if fail:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fail
    assert [dict(vars(owner)) for owner in owners] == before
    generate(llm)
    assert profile.steps == 3


@pytest.mark.slow
def test_limits_where_there_are_kernels(llm):
    limits = llm.limits()
    assert (limits is None) == (llm.kernels is None)
    if limits is not None:
        assert limits.pop("cache") >= 0
        assert set(limits) == {"read", "cached", "bfloat16", "int8"} and min(limits.values()) > 1e8
