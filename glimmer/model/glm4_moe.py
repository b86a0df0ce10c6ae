"""The architecture of GLM-4.5, 4.5-Air, 4.6 and 4.7, MTP head included; every collective is in sight.

T tokens of all sequences in the step, H hidden_size, h and g this rank's query and key-value heads, D head_dim,
E n_routed_experts, K num_experts_per_tok, M this rank's part of a feed-forward width, V vocab_size.
Names follow the checkpoint's. Arithmetic is done by `ops`; tokens, positions and block tables come in `batch`.
Not here: devices, files, sampling, and whether a row belongs to a prompt or to an answer.
"""

# fmt: off  (each line of a forward pass ends with the shape of its result, in one column)
import torch
from torch import Tensor, nn

from glimmer.backends import Ops, RouteRule
from glimmer.batch import Batch
from glimmer.config import ModelConfig
from glimmer.group import Group
from glimmer.model.cache import Cache
from glimmer.model.layers import Embedding, Experts, Linear, RMSNorm, Vector


class Attention(nn.Module):
    """Grouped-query attention. GLM's own: the bias is on q, k and v only; q and k may be normed per head, after the
    bias and before the rotation; and the rotation covers only the first part of each head."""

    def __init__(self, config: ModelConfig, group: Group, ops: Ops):
        super().__init__()
        self.ops, self.group = ops, group
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // group.size
        self.kv_heads = config.key_value_heads(group.size)  # fewer heads than ranks: copies
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Linear(ops)
        self.o_proj = Linear(ops)
        self.q_norm = RMSNorm(ops, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(ops, config.rms_norm_eps) if config.use_qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], batch: Batch, cache: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, h + 2g, D)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)  # (T, h, D) (T, g, D) (T, g, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        self.ops.rope_(q, k, *rotary)
        self.ops.store_kv_(k, v, *cache, batch.slot_mapping)
        y = self.o_proj(self.ops.attention(q, *cache, batch, self.scale))  # (T, H) a partial sum
        return self.group.all_reduce(y)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). A partial sum: the caller reduces, once for all that it adds up."""

    def __init__(self, ops: Ops):
        super().__init__()
        self.ops = ops
        self.gate_up_proj = Linear(ops)
        self.down_proj = Linear(ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.swiglu(self.gate_up_proj(x)))  # (T, H)


class DenseMLP(MLP):
    """The feed-forward part of the layers below first_k_dense_replace."""

    def __init__(self, group: Group, ops: Ops):
        super().__init__(ops)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(super().forward(x))


class RoutedExperts(nn.Module):
    """The two matrices of every expert; this rank holds M columns of each."""

    def __init__(self, ops: Ops):
        super().__init__()
        self.ops = ops
        self.gate_up_proj = Experts(ops)
        self.down_proj = Experts(ops)

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return self.ops.experts(x, ids, scores, self.gate_up_proj.packed, self.down_proj.packed)  # (T, H) float32


class Router(nn.Module):
    """Chooses K experts for each token. Float32 throughout, and the correction bias chooses but does not weigh."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.rule = RouteRule(
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        self.proj = Linear(ops)
        self.e_score_correction_bias = Vector()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.route(self.proj(x), self.e_score_correction_bias.value, self.rule)  # (T, K) (T, K)


class MoE(nn.Module):
    """Routed experts and a shared one that every token passes through, unscaled."""

    def __init__(self, config: ModelConfig, group: Group, ops: Ops):
        super().__init__()
        self.ops, self.group = ops, group
        self.gate = Router(config, ops)
        self.experts = RoutedExperts(ops)
        self.shared_experts = MLP(ops)

    def forward(self, x: Tensor) -> Tensor:
        ids, scores = self.gate(x)  # (T, K) (T, K)
        y = self.experts(x, ids, scores)  # (T, H) a partial sum
        self.ops.add_(y, self.shared_experts(x))  # (T, H) also partial
        return self.group.all_reduce(y)  # one sum serves both


class Block(nn.Module):
    """One decoder layer. The residual is added inside the norm that follows."""

    def __init__(self, config: ModelConfig, group: Group, ops: Ops, dense: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(ops, config.rms_norm_eps)
        self.self_attn = Attention(config, group, ops)
        self.post_attention_layernorm = RMSNorm(ops, config.rms_norm_eps)
        self.mlp = DenseMLP(group, ops) if dense else MoE(config, group, ops)

    def forward(self, x, residual, rotary, batch: Batch, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm(x, residual)  # residual += x; x = norm(residual)
        x = self.self_attn(x, rotary, batch, cache)  # (T, H)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual  # (T, H) (T, H)


class MTP(nn.Module):
    """The multi-token-prediction layer: from the hidden state at p and the token at p+1, a hidden state for p+2.

    Checkpoints store it as layer num_hidden_layers. `embed_tokens` and `head` are copies of the main model's in some of
    them; where they are absent, the main model's own serve.
    """

    def __init__(self, config: ModelConfig, group: Group, ops: Ops, own_embedding: bool, own_head: bool):
        super().__init__()
        first, _ = group.split(config.vocab_size)
        self.enorm = RMSNorm(ops, config.rms_norm_eps)
        self.hnorm = RMSNorm(ops, config.rms_norm_eps)
        self.eh_proj = Linear(ops)
        self.block = Block(config, group, ops, dense=False)
        self.norm = RMSNorm(ops, config.rms_norm_eps)
        self.embed_tokens = Embedding(ops, first) if own_embedding else None
        self.head = Linear(ops) if own_head else None


class Glm4Moe(nn.Module):
    """tokens -> hidden states -> logits of the rows asked for.

    residual_dtype: in what the sum over layers is kept. mtp: None, or (own_embedding, own_head) to build the MTP layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        ops: Ops,
        residual_dtype: torch.dtype,
        mtp: tuple[bool, bool] | None = None,
    ):
        super().__init__()
        self.config, self.group, self.ops, self.residual_dtype = config, group, ops, residual_dtype
        self.embed_tokens = Embedding(ops, group.split(config.vocab_size)[0])
        self.layers = nn.ModuleList(
            Block(config, group, ops, dense=i < config.first_k_dense_replace) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(ops, config.rms_norm_eps)
        self.lm_head = Linear(ops)
        self.mtp = MTP(config, group, ops, *mtp) if mtp is not None else None

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """The hidden state of every row after the final norm, (T, H): what logits and the MTP layer start from."""
        return self.run_layers(*self.embed(batch), batch, cache)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What the first layer gets: x (T, H), nothing yet; residual (T, H), the embedded tokens; the rotary angles."""
        x = self.group.all_reduce(self.embed_tokens(batch.tokens))  # (T, H)
        return torch.zeros_like(x), x.to(self.residual_dtype), self._rotary(batch.positions)

    def run_layers(self, x: Tensor, residual: Tensor, rotary, batch: Batch, cache: Cache) -> Tensor:
        """All layers and the final norm. Nothing but ops and collectives, so that a step may be recorded."""
        for i, block in enumerate(self.layers):
            x, residual = block(x, residual, rotary, batch, cache.layer(i))
        x, _ = self.norm(x, residual)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R, V) float32, the whole vocabulary on every rank."""
        return self.group.all_gather(self.lm_head(hidden).float(), self.config.vocab_size)

    def draft(self, hidden: Tensor, tokens: Tensor, batch: Batch, cache: Cache) -> Tensor:
        """MTP hidden states (T, H) for the rows of `batch`: row t pairs hidden state t with the token after it.

        hidden: (T, H) of `forward`, or of an earlier `draft` when chaining. tokens: (T,) each row's next token.
        """
        mtp = self.mtp
        embedded = self.group.all_reduce((mtp.embed_tokens or self.embed_tokens)(tokens))
        x = mtp.eh_proj(torch.cat((mtp.enorm(embedded), mtp.hnorm(hidden)), -1))  # (T, H), the embedding first
        x, residual = torch.zeros_like(x), x.to(self.residual_dtype)
        x, residual = mtp.block(x, residual, self._rotary(batch.positions), batch, cache.layer(len(self.layers)))
        x, _ = mtp.norm(x, residual)
        return x

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """(R, H) of `draft` -> (R, V) float32: guesses of the token two places after the row's own."""
        return self.group.all_gather((self.mtp.head or self.lm_head)(hidden).float(), self.config.vocab_size)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles, (T, R/2) float32 each; computed once for all layers."""
        i = torch.arange(0, self.config.rotary_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = 1.0 / self.config.rope_theta ** (i / self.config.rotary_dim)  # (R/2,)
        angles = positions[:, None].float() * frequencies
        return angles.cos(), angles.sin()
