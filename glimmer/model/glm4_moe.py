"""The architecture of GLM-4.5, 4.5-Air, 4.6 and 4.7, MTP head included; every collective is in sight.

T tokens of all sequences in the step, H hidden_size, h and g this rank's query and key-value heads, D head_dim,
E n_routed_experts, K num_experts_per_tok, M this rank's part of a feed-forward width, V vocab_size.
Names follow the checkpoint's. Arithmetic is done by `backend`; tokens, positions and block tables come in `batch`.
Not here: devices, files, sampling, and whether a row belongs to a prompt or to an answer.
"""

# fmt: off
# Each line of a forward pass ends with the shape of its result, in one column.
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from glimmer.backends.base import Backend, KVCache, RouteRule
from glimmer.batch import Batch
from glimmer.group import Group
from glimmer.model.layers import Embedding, Experts, Linear, RMSNorm, Vector
from glimmer.model_config import ModelConfig, Yarn

Rotary = tuple[Tensor, Tensor]  # cos and sin of the angles, (T, R/2) float32 each


class Attention(nn.Module):
    """Grouped-query attention. GLM's own: the bias is on q, k and v only; q and k may be normed per head, after the
    bias and before the rotation; and the rotation covers only the first part of each head."""

    def __init__(self, config: ModelConfig, group: Group, backend: Backend):
        super().__init__()
        self.backend, self.group = backend, group
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // group.size
        self.kv_heads = config.key_value_heads(group.size)  # fewer heads than ranks: copies
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Linear(backend)
        self.o_proj = Linear(backend)
        self.q_norm = RMSNorm(backend, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(backend, config.rms_norm_eps) if config.use_qk_norm else None

    def forward(self, x: Tensor, rotary: Rotary, batch: Batch, kv: KVCache) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))                    # (T, h + 2g, D)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)           # (T, h, D) (T, g, D) (T, g, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        self.backend.rope_(q, k, *rotary)
        self.backend.store_kv_(k, v, kv, batch.slot_mapping)
        y = self.o_proj(self.backend.attention(q, kv, batch, self.scale))            # (T, H) a partial sum
        return self.group.all_reduce(y)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). A partial sum: the caller reduces, once for all that it adds up."""

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend
        self.gate_up_proj = Linear(backend)
        self.down_proj = Linear(backend)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.backend.swiglu(self.gate_up_proj(x)))        # (T, H)
        return y


class DenseMLP(MLP):
    """The feed-forward part of the layers below first_k_dense_replace."""

    def __init__(self, group: Group, backend: Backend):
        super().__init__(backend)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(super().forward(x))


class Router(nn.Module):
    """Chooses K experts for each token. Float32 throughout, and the correction bias chooses but does not weigh."""

    def __init__(self, config: ModelConfig, backend: Backend):
        super().__init__()
        self.backend = backend
        self.rule = RouteRule(
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        self.proj = Linear(backend, keep_float32=True)
        self.e_score_correction_bias = Vector(backend)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.e_score_correction_bias.value
        return self.backend.route(self.proj(x), bias, self.rule)                     # (T, K) (T, K)


class MoE(nn.Module):
    """Routed experts and a shared one that every token passes through, unscaled."""

    def __init__(self, config: ModelConfig, group: Group, backend: Backend):
        super().__init__()
        self.backend, self.group = backend, group
        self.gate = Router(config, backend)
        self.experts = Experts(backend)
        self.shared_experts = MLP(backend)

    def forward(self, x: Tensor) -> Tensor:
        ids, scores = self.gate(x)                                                   # (T, K) (T, K)
        self.experts.fetch(ids)                                                      # from disk, where they are there
        shared = self.shared_experts(x)                                              # (T, H) a partial sum
        y = self.experts(x, ids, scores)                                             # (T, H) float32, also partial
        self.backend.add_(y, shared)                                                 # (T, H)
        return self.group.all_reduce(y)                                              # one sum serves both


class Block(nn.Module):
    """One decoder layer. The residual is added inside the norm that follows."""

    def __init__(self, config: ModelConfig, group: Group, backend: Backend, dense: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(backend, config.rms_norm_eps)
        self.self_attn = Attention(config, group, backend)
        self.post_attention_layernorm = RMSNorm(backend, config.rms_norm_eps)
        self.mlp = DenseMLP(group, backend) if dense else MoE(config, group, backend)

    def forward(
        self, x: Tensor, residual: Tensor, rotary: Rotary, batch: Batch, kv: KVCache
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm(x, residual)                              # residual += x; x = norm(residual)
        x = self.self_attn(x, rotary, batch, kv)                                     # (T, H)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual                                                 # (T, H) (T, H)


class MTP(nn.Module):
    """The multi-token-prediction layer: from the hidden state at p and the token at p+1, a hidden state for p+2.

    Checkpoints store it as layer num_hidden_layers. `embed_tokens` and `head` are copies of the main model's in some of
    them; where they are absent, the main model's own serve.
    """

    def __init__(self, config: ModelConfig, group: Group, backend: Backend, own_embedding: bool, own_head: bool):
        super().__init__()
        first, _ = group.split(config.vocab_size)
        self.enorm = RMSNorm(backend, config.rms_norm_eps)
        self.hnorm = RMSNorm(backend, config.rms_norm_eps)
        self.eh_proj = Linear(backend, min_bits=8)
        self.block = Block(config, group, backend, dense=False)
        self.norm = RMSNorm(backend, config.rms_norm_eps)
        self.embed_tokens = Embedding(backend, first) if own_embedding else None
        self.head = Linear(backend, min_bits=8) if own_head else None


class Glm4Moe(nn.Module):
    """tokens -> hidden states -> logits of the rows asked for.

    residual_dtype: in what the sum over layers is kept. mtp: None, or (own_embedding, own_head) to build the MTP layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        backend: Backend,
        residual_dtype: torch.dtype,
        mtp: tuple[bool, bool] | None = None,
    ):
        super().__init__()
        self.config, self.group, self.backend, self.residual_dtype = config, group, backend, residual_dtype
        self.embed_tokens = Embedding(backend, group.split(config.vocab_size)[0])
        self.layers = nn.ModuleList(
            Block(config, group, backend, dense=i < config.first_k_dense_replace)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(backend, config.rms_norm_eps)
        self.lm_head = Linear(backend, min_bits=8)
        self.mtp_parts = mtp
        self.mtp = MTP(config, group, backend, *mtp) if mtp is not None else None
        self._frequencies: Tensor | None = None  # of the rotary angles, made where the first positions are

    def use(self, backend: Backend, group: Group) -> None:
        """Compute from now on with another backend that shares the first one's layouts (a wrapper), and its group."""
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend  # type: ignore[assignment]  # torch declares attributes as tensors or modules
            if hasattr(module, "group"):
                module.group = group  # type: ignore[assignment]

    def forward(self, batch: Batch, kv: Sequence[KVCache]) -> Tensor:
        """The hidden state of every row after the final norm, (T, H): what logits and the MTP layer start from."""
        return self.run_layers(*self.start(batch), batch, kv)

    def start(self, batch: Batch) -> tuple[Tensor, Rotary]:
        """What layers get beside tokens and hidden states: residual (T, H), nothing yet; the rotary angles."""
        shape = len(batch.tokens), self.config.hidden_size
        residual = torch.zeros(shape, dtype=self.residual_dtype, device=batch.tokens.device)
        return residual, self.rotary(batch.positions)

    def run_layers(self, residual: Tensor, rotary: Rotary, batch: Batch, kv: Sequence[KVCache]) -> Tensor:
        """All layers and the final norm. Nothing but ops and collectives, so that a step can be captured."""
        x = self.group.all_reduce(self.embed_tokens(batch.tokens))                   # (T, H)
        for i, block in enumerate(self.layers):
            x, residual = block(x, residual, rotary, batch, kv[i])
        hidden: Tensor = self.norm(x, residual)[0]                                   # (T, H)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R, V) float32, the whole vocabulary on every rank."""
        return self.group.all_gather(self.lm_head(hidden).float(), self.config.vocab_size)

    def draft(self, hidden: Tensor, tokens: Tensor, batch: Batch, kv: Sequence[KVCache]) -> Tensor:
        """MTP hidden states (T, H) for the rows of `batch`: row t pairs hidden state t with the token after it.

        hidden: (T, H) of `forward`, or of an earlier `draft` when chaining. tokens: (T,) each row's next token.
        """
        batch = replace(batch, tokens=tokens)
        return self.run_draft(hidden, *self.start(batch), batch, kv)

    def run_draft(
        self, x: Tensor, residual: Tensor, rotary: Rotary, batch: Batch, kv: Sequence[KVCache]
    ) -> Tensor:
        """The MTP layer and its norm, after every draft alike. x: hidden states; batch.tokens: those after them. Ops
        and collectives only, as in `run_layers`."""
        mtp = self.mtp
        assert mtp is not None, "the model was built without its MTP layer"
        embedded = self.group.all_reduce((mtp.embed_tokens or self.embed_tokens)(batch.tokens))
        x = self.backend.concat(mtp.enorm(embedded), mtp.hnorm(x))                   # (T, 2H)
        x, residual = mtp.block(mtp.eh_proj(x), residual, rotary, batch, kv[len(self.layers)])
        drafted: Tensor = mtp.norm(x, residual)[0]                                   # (T, H)
        return drafted

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """(R, H) of `draft` -> (R, V), not widened: guesses of the token two places after the row's own. Ops and
        collectives only, as in `run_layers`."""
        assert self.mtp is not None, "the model was built without its MTP layer"
        return self.group.all_gather((self.mtp.head or self.lm_head)(hidden), self.config.vocab_size)

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin of the rotary angles, (T, R/2) float32 each; computed once for all layers."""
        if self._frequencies is None:
            self._frequencies = rotary_frequencies(self.config, positions.device)
        angles, yarn = positions[:, None] * self._frequencies, self.config.yarn      # (T, R/2) float32
        if yarn is None:
            return angles.cos(), angles.sin()
        return angles.cos() * yarn.attention_factor, angles.sin() * yarn.attention_factor


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """The angles of position 1, (R/2,) float32."""
    i = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32)
    wavelengths = config.rope_theta ** (i / config.rotary_dim)                       # (R/2,)
    if config.yarn is None:
        return 1.0 / wavelengths
    kept = _yarn_kept(config.yarn, config.rotary_dim, config.rope_theta).to(device)
    return 1.0 / (config.yarn.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_kept(yarn: Yarn, dim: int, theta: float) -> Tensor:
    """How much of each frequency YaRN keeps, (R/2,): 1 for fast rotations, 0 for slow ones, and a ramp between them."""

    def place(rotations: float) -> float:  # the dimension that turns so many times within the original context
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = place(yarn.beta_fast), place(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)
    return 1 - ramp.clamp(0, 1)
