"""The architecture as it is trained: Glm4MoeForCausalLM with its MTP layer, on ragged batches of whole examples.

A batch is flat: T tokens, laid out as segments of equal length (B sequences of L tokens each, padded on the right), so
that nothing but attention ever sees a second axis, and short examples pay for short attention. Every module is named as
in the official checkpoint, except that a layer's experts are two stacked tensors: `export.py` cuts them apart.
Not here: sampling, a cache, any way of running the model but training and scoring it (glimmer does the rest).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json that this file needs, under the same names."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 768
    moe_intermediate_size: int = 96
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 1
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    partial_rotary_factor: float = 0.5


@dataclass(frozen=True)
class Layout:
    """How T flat tokens fall into sequences: `segments` are (B, L) pairs in order, their products adding up to T."""

    segments: tuple[tuple[int, int], ...]
    positions: Tensor  # (T,) int64, each token's index in its own sequence
    real: Tensor  # (T,) bool, false for padding


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        h, d = shape.hidden_size, shape.head_dim
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, d
        self.q_proj = nn.Linear(h, self.heads * d)
        self.k_proj = nn.Linear(h, self.kv_heads * d)
        self.v_proj = nn.Linear(h, self.kv_heads * d)
        self.o_proj = nn.Linear(self.heads * d, h, bias=False)
        self.q_norm, self.k_norm = RMSNorm(d, shape.rms_norm_eps), RMSNorm(d, shape.rms_norm_eps)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H) -> queries, keys and values, (T, heads, D) each; grouped queries have no fast kernel in float32."""
        tokens, share = x.shape[0], self.heads // self.kv_heads
        q = rotate(self.q_norm(self.q_proj(x).view(tokens, self.heads, -1)), rope)
        k = rotate(self.k_norm(self.k_proj(x).view(tokens, self.kv_heads, -1)), rope)
        v = self.v_proj(x).view(tokens, self.kv_heads, -1)
        return q, k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:  # (T, H) -> (T, H)
        q, k, v = self.project(x, rope)
        sizes, out = [rows * length for rows, length in layout.segments], []
        for (rows, length), *parts in zip(layout.segments, *(t.split(sizes) for t in (q, k, v)), strict=True):
            sequences = [t.view(rows, length, -1, self.head_dim).transpose(1, 2) for t in parts]
            mixed = F.scaled_dot_product_attention(*sequences, is_causal=True)
            out.append(mixed.transpose(1, 2).reshape(rows * length, -1))
        return self.o_proj(torch.cat(out))


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores choose the experts together with a correction bias that no gradient touches."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.top_k, self.scale = shape.num_experts_per_tok, shape.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(shape.n_routed_experts, shape.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))
        self.counted: list[Tensor] = []  # tokens of each expert, one tensor (E,) per pass

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:  # (T, H) -> (T, K) (T, K)
        scores = torch.sigmoid(F.linear(x.float(), self.weight.float()))
        ids = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1, sorted=False).indices
        self.counted.append(torch.bincount(ids[real].flatten(), minlength=len(self.weight)))
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scale

    def load(self) -> Tensor:
        """(E,) float32: each expert's share of the tokens since the last `balance`, 1 where it is even."""
        counts = torch.stack(self.counted).sum(dim=0).float()
        return counts / counts.mean()

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Raise the bias of experts that got less than their even share since the last call, lower the others'.

        In proportion to what they lack, and by `speed` at most: a fixed step would swing to and fro for ever.
        """
        self.e_score_correction_bias += speed * (1 - self.load()).clamp(min=-1)
        self.counted.clear()


class MixExperts(torch.autograd.Function):
    """Sum of the chosen experts' outputs, weighted. One expert at a time, so that its rows stay in the cache."""

    @staticmethod
    def forward(ctx, x, ids, weights, gate_up, down):  # (T, H) (T, K) (T, K) (E, 2M, H) (E, H, M) -> (T, H)
        experts, top_k = gate_up.shape[0], ids.shape[1]
        order = ids.flatten().argsort()
        counts = torch.bincount(ids.flatten(), minlength=experts).tolist()
        y, saved = torch.zeros_like(x), []
        for e, pairs in enumerate(order.split(counts)):
            rows = pairs // top_k
            hidden = x[rows] @ gate_up[e].T
            gate, up = hidden.chunk(2, dim=-1)
            y.index_add_(0, rows, (F.silu(gate) * up) @ down[e].T * weights.flatten()[pairs, None])
            saved += [pairs, hidden]
        ctx.save_for_backward(x, weights, gate_up, down, *saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weights, gate_up, down, *saved = ctx.saved_tensors
        top_k, flat = weights.shape[1], weights.flatten()
        grad_x, grad_weights = torch.zeros_like(x), torch.zeros_like(flat)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for e in range(gate_up.shape[0]):
            pairs, hidden = saved[2 * e], saved[2 * e + 1]
            rows, weight = pairs // top_k, flat[pairs, None]
            mine, grad_y = x[rows], grad[rows]
            gate, up = hidden.chunk(2, dim=-1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            inner = silu * up
            grad_inner = grad_y @ down[e]
            grad_weights[pairs] = (grad_inner * inner).sum(-1)
            grad_inner = grad_inner * weight
            grad_down[e] = grad_y.T @ (inner * weight)
            grad_hidden = torch.cat([grad_inner * up * (sigmoid + silu * (1 - sigmoid)), grad_inner * silu], dim=-1)
            grad_gate_up[e] = grad_hidden.T @ mine
            grad_x.index_add_(0, rows, grad_hidden @ gate_up[e])
        return grad_x, None, grad_weights.view_as(weights), grad_gate_up, grad_down


def mix_at_once(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What MixExperts computes, by few large operations: every expert's rows are padded to the most that one has.

    For a GPU, which would spend its time on beginning one expert after the other.
    """
    chosen = ids.flatten()
    order = chosen.argsort()
    counts = torch.bincount(chosen, minlength=gate_up.shape[0])
    experts, rows = chosen[order], order // ids.shape[1]
    place = experts, torch.arange(len(order), device=x.device) - (counts.cumsum(0) - counts)[experts]
    padded = x.new_zeros(len(counts), int(counts.max()), x.shape[1]).index_put(place, x[rows])
    gate, up = (padded @ gate_up.mT).chunk(2, dim=-1)
    y = ((F.silu(gate) * up) @ down.mT)[place] * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, rows, y)


class Experts(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        e, m, h = shape.n_routed_experts, shape.moe_intermediate_size, shape.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * m, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, m))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # (T, H) (T, K) (T, K) -> (T, H)
        mix = mix_at_once if x.is_cuda else MixExperts.apply
        return mix(x, ids, weights, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate, self.experts = Router(shape), Experts(shape)
        self.shared_experts = MLP(shape.hidden_size, shape.moe_intermediate_size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        ids, weights = self.gate(x, real)
        return self.experts(x, ids, weights) + self.shared_experts(x)


class Block(nn.Module):
    def __init__(self, shape: Shape, dense: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size) if dense else MoE(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, layout)
        h = self.post_attention_layernorm(x)
        return x + (self.mlp(h, layout.real) if isinstance(self.mlp, MoE) else self.mlp(h))


class MTPBlock(Block):
    """The layer after the last: from hidden state t and token t+1 it guesses token t+2."""

    def __init__(self, shape: Shape):
        super().__init__(shape, dense=False)
        h = shape.hidden_size
        self.enorm, self.hnorm = RMSNorm(h, shape.rms_norm_eps), RMSNorm(h, shape.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * h, h, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(h, shape.rms_norm_eps)})


class Model(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        blocks = [Block(shape, dense=i < shape.first_k_dense_replace) for i in range(shape.num_hidden_layers)]
        self.layers = nn.ModuleList([*blocks, MTPBlock(shape)])
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class DemoModel(nn.Module):
    """`trunk` gives hidden states after the final norm, `draft` the MTP layer's; `lm_head` turns either into logits."""

    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__()
        self.shape = shape
        self.model = Model(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        rotary = int(shape.head_dim * shape.partial_rotary_factor)
        frequencies = shape.rope_theta ** (-torch.arange(0, rotary, 2).float() / rotary)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.fill_(1.6)  # at 1 no score exceeds the root of head_dim: too even to pick one of many
            if parameter.ndim == 1:
                continue  # the other norms stay 1; biases are zeroed below
            std = (
                0.02 if any(part in name for part in ("embed", "lm_head", "mlp.gate.")) else parameter.shape[-1] ** -0.5
            )
            quieter = 0.5 if "down_proj" in name or "o_proj" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std * quieter)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, None].float() * self.frequencies
        return torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()

    def trunk(self, tokens: Tensor, layout: Layout) -> Tensor:
        """(T,) int64 -> (T, H)."""
        x, rope = self.model.embed_tokens(tokens), self.rope(layout.positions)
        for block in self.model.layers[:-1]:
            x = block(x, rope, layout)
        return self.model.norm(x)

    def draft(self, hidden: Tensor, following: Tensor, layout: Layout) -> Tensor:
        """Hidden state t and token t+1 -> (T, H), whose logits are a guess at token t+2."""
        mtp = self.model.layers[-1]
        x = mtp.eh_proj(torch.cat([mtp.enorm(self.model.embed_tokens(following)), mtp.hnorm(hidden)], dim=-1))
        return mtp.shared_head["norm"](mtp(x, self.rope(layout.positions), layout))

    def routers(self) -> dict[int, Router]:
        """Layer index -> its router."""
        return {i: block.mlp.gate for i, block in enumerate(self.model.layers) if isinstance(block.mlp, MoE)}


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """(T, heads, D) with its first dimensions rotated in half-split pairs."""
    cos, sin = rope
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)


def layout_of(segments: list[tuple[int, int]], real: Tensor) -> Layout:
    """The layout of (B, L) segments; `real` is (T,) bool."""
    positions = [torch.arange(length).repeat(rows) for rows, length in segments]
    return Layout(tuple(segments), torch.cat(positions).to(real.device), real)
