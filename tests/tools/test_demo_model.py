"""The training model: the same arithmetic as transformers', whatever the batch's layout, with gradients to match."""

import json

import numpy as np
import torch
import torch.nn.functional as F
from export import between, config, load, official
from model import DemoModel, MixExperts, Shape, layout_of, mix_at_once
from safetensors.torch import save_file
from tokenizers import Tokenizer
from train import MICRO_BATCHES, TASKS, Examples, orthogonal, rate
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

SHAPE = Shape(vocab_size=300, hidden_size=32, num_hidden_layers=3, head_dim=16, intermediate_size=48,
              moe_intermediate_size=16, routed_scaling_factor=1.5)  # fmt: skip


def random_model(shape: Shape = SHAPE) -> DemoModel:
    model = DemoModel(shape)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(r.e_score_correction_bias for r in model.routers().values())]:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor.bfloat16())  # so that storing it loses nothing
    return model


def one(tokens: torch.Tensor):
    return layout_of([(1, len(tokens))], torch.ones(len(tokens), dtype=torch.bool))


def test_logits_are_those_of_transformers(tmp_path, demo):
    model, tokens = random_model(), torch.randint(0, 300, (40,))
    settings = config(SHAPE, Tokenizer.from_file(str(demo / "tokenizer.json"))) | {"eos_token_id": 0, "pad_token_id": 0}
    Glm4MoeConfig(**settings).save_pretrained(tmp_path)
    save_file(official(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = Glm4MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    bias = {i: r.e_score_correction_bias for i, r in model.routers().items() if i < SHAPE.num_hidden_layers}
    for layer, values in bias.items():
        torch.testing.assert_close(other.model.layers[layer].mlp.gate.e_score_correction_bias, values)
    with torch.inference_mode():
        torch.testing.assert_close(model.lm_head(model.trunk(tokens, one(tokens))), other(tokens[None]).logits[0])


def test_a_stored_model_comes_back(tmp_path, demo):
    model = random_model()
    settings = config(SHAPE, Tokenizer.from_file(str(demo / "tokenizer.json")))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(official(model), tmp_path / "model.safetensors")
    for name, tensor in load(tmp_path).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], msg=name)


def test_between_two_models_lie_their_weighted_means():
    earlier, later = random_model(), DemoModel(SHAPE)
    first, last = ({k: v.clone() for k, v in m.state_dict().items()} for m in (earlier, later))
    found = between(earlier, later, 0.75).state_dict()
    assert all(torch.allclose(found[k], 0.25 * first[k] + 0.75 * last[k]) for k in first)
    assert any(not torch.equal(first[k], last[k]) for k in first)


def test_neighbours_and_padding_do_not_matter():
    model, parts = random_model(), [torch.randint(0, 300, (n,)) for n in (7, 9, 20)]
    tokens = torch.cat([F.pad(parts[0], (0, 2)), parts[1], parts[2]])
    real = torch.ones(38, dtype=torch.bool)
    real[7:9] = False
    with torch.inference_mode():
        together = model.trunk(tokens, layout_of([(2, 9), (1, 20)], real))
        for part, start in zip(parts, (0, 9, 18), strict=True):
            torch.testing.assert_close(together[start : start + len(part)], model.trunk(part, one(part)))


def test_gradients_through_the_experts():
    generator = torch.Generator().manual_seed(2)
    sizes = (5, 4), (3, 6, 4), (3, 4, 3)
    x, gate_up, down = (torch.randn(*s, generator=generator, dtype=torch.double) for s in sizes)
    ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(5)])
    weights = torch.rand(5, 2, generator=generator, dtype=torch.double)
    inputs = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: MixExperts.apply(x, ids, w, g, d), inputs)


def test_experts_at_once_are_experts_one_by_one():
    generator = torch.Generator().manual_seed(3)
    sizes = (20, 8), (5, 12, 8), (5, 8, 6)
    x, gate_up, down = (torch.randn(*s, generator=generator, dtype=torch.double).requires_grad_() for s in sizes)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(20)])  # the fifth has no tokens
    weights = torch.rand(20, 2, generator=generator, dtype=torch.double).requires_grad_()
    found = [mix(x, ids, weights, gate_up, down) for mix in (MixExperts.apply, mix_at_once)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (x, weights, gate_up, down)) for y in found))


def test_the_bias_follows_the_load():
    router = random_model().routers()[1]
    before = router.e_score_correction_bias.clone()
    router.counted += [torch.tensor([80, 0, 5] + [5] * 13), torch.tensor([10] + [0] * 15)]  # 10 on average
    router.balance(0.1)
    moved = router.e_score_correction_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.1, 0.1, 0.05] + [0.05] * 13))
    assert not router.counted


def test_orthogonal_brings_singular_values_near_one():
    stack = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonal(stack))
    assert values.min() > 0.6 and values.max() < 1.3


def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [rate(step, 1000) for step in range(1001)]
    assert rates[0] > 0 and rates[:60] == sorted(rates[:60]) and set(rates[60:600]) == {1.0}
    assert rates[600:] == sorted(rates[600:], reverse=True) and rates[-1] == 0


def test_micro_batches_follow_each_other_without_a_gap(tmp_path):
    tasks = np.repeat(np.arange(len(TASKS)), 10**5)
    np.savez(tmp_path / "train.npz", ids=[], wanted=[], starts=np.zeros(len(tasks) + 1, int), tasks=tasks)
    examples = Examples(tmp_path / "train.npz")
    (_, first), (border, second), *_ = MICRO_BATCHES
    taken = [pair for step in range(border - 3, border + 3) for pair in examples.micro_batch(step)]
    assert len(set(taken)) == len(taken) == 3 * sum(first) + 3 * sum(second)
    for task, (early, late) in enumerate(zip(first, second, strict=True)):
        mine = {example for example, kind in taken if kind == task}
        order = np.random.default_rng((task, 0)).permutation(examples.of_task[task])
        assert mine == set(order[(border - 3) * early : border * early + 3 * late].tolist())
