"""The names of a checkpoint: for each layer of the model, the tensors that fill it and this rank's part of them.

`param_specs` lists them in the order of the model's layers. Cuts are half-open ranges of rows (outputs) or columns
(inputs); None means whole. Heads must divide (key-value heads are copied when there are more ranks than heads);
widths and the vocabulary need not, because Group.split gives some ranks one more, or one group of columns more: the
columns of a quantised matrix that share a scale stay together. Not here: in which precision a layer keeps its
parameters (layers.py), reading (load.py) and packing (backends/).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from glimmer.errors import ConfigError
from glimmer.group import Group
from glimmer.model_config import ModelConfig

Cut = tuple[int, int] | None
# (name of a matrix that is cut along its inputs, their number) -> how many inputs stay together
ShardAlignment = Callable[[str, int], int]


@dataclass(frozen=True)
class Shard:
    """One matrix `name`.weight of the checkpoint: its whole shape (out, in) there, and our cut of it."""

    name: str
    shape: tuple[int, int]
    rows: Cut = None
    cols: Cut = None

    @property
    def local_shape(self) -> tuple[int, int]:
        """(out, in) of the cut."""
        rows, cols = self.rows or (0, self.shape[0]), self.cols or (0, self.shape[1])
        return rows[1] - rows[0], cols[1] - cols[0]


@dataclass(frozen=True)
class ParamSpec:
    """What fills one layer of the model.

    layer    path in the model
    units    matrices that the layer packs at once: those whose rows follow each other in a Linear, the one of an
             Embedding, or gate, up and down of each expert; norms and vectors have none
    vectors  (name, whole length, cut): the weight of a norm, the correction bias, or the biases of the shards, in order
    """

    layer: str
    units: tuple[tuple[Shard, ...], ...] = ()
    vectors: tuple[tuple[str, int, Cut], ...] = ()

    @property
    def shards(self) -> Iterator[Shard]:
        """The matrices of all units."""
        return (shard for unit in self.units for shard in unit)


def tensor_parallel_sizes(config: ModelConfig) -> list[int]:
    """How many processes can share the model: heads divide, and key-value heads divide or are copied evenly."""
    h, g = config.num_attention_heads, config.num_key_value_heads
    narrowest = min(config.moe_intermediate_size, config.intermediate_size, config.vocab_size)
    return [n for n in range(1, h + 1) if h % n == 0 and (g % n == 0 or n % g == 0) and n <= narrowest]


def check_tensor_parallel(config: ModelConfig, size: int) -> None:
    """ConfigError, with the sizes that do, when `size` does not divide the heads."""
    sizes = tensor_parallel_sizes(config)
    if size not in sizes:
        raise ConfigError(
            f"tensor_parallel_size={size} for {config.num_attention_heads} query heads"
            f" and {config.num_key_value_heads} key-value heads",
            "one of " + ", ".join(map(str, sizes)),
            "start that many processes",
        )


def mtp_prefix(config: ModelConfig) -> str:
    """What the names of the MTP layer's tensors begin with."""
    return f"model.layers.{config.num_hidden_layers}."


def param_specs(
    config: ModelConfig,
    group: Group,
    mtp: tuple[bool, bool] | None,
    shard_alignment: ShardAlignment = lambda name, width: 1,
) -> Iterator[ParamSpec]:
    """Every layer once. mtp as in Glm4Moe: None, or whether the MTP layer has its own embedding and its own head."""
    hidden, vocabulary = config.hidden_size, group.split(config.vocab_size)
    table = (config.vocab_size, hidden)
    yield ParamSpec("embed_tokens", ((Shard("model.embed_tokens", table, rows=vocabulary),),))
    for i in range(config.num_hidden_layers):
        dense = i < config.first_k_dense_replace
        yield from _block(config, group, shard_alignment, f"layers.{i}", f"model.layers.{i}", dense)
    yield ParamSpec("norm", vectors=(("model.norm.weight", hidden, None),))
    yield ParamSpec("lm_head", ((Shard("lm_head", table, rows=vocabulary),),))
    if mtp is None:
        return
    ours, theirs = "mtp", mtp_prefix(config)[:-1]
    for norm in ("enorm", "hnorm"):
        yield ParamSpec(f"{ours}.{norm}", vectors=((f"{theirs}.{norm}.weight", hidden, None),))
    yield ParamSpec(f"{ours}.eh_proj", ((Shard(f"{theirs}.eh_proj", (hidden, 2 * hidden)),),))
    yield from _block(config, group, shard_alignment, f"{ours}.block", theirs, dense=False)
    yield ParamSpec(f"{ours}.norm", vectors=((f"{theirs}.shared_head.norm.weight", hidden, None),))
    own_embedding, own_head = mtp
    if own_embedding:
        yield ParamSpec(f"{ours}.embed_tokens", ((Shard(f"{theirs}.embed_tokens", table, rows=vocabulary),),))
    if own_head:
        yield ParamSpec(f"{ours}.head", ((Shard(f"{theirs}.shared_head.head", table, rows=vocabulary),),))


def _block(
    config: ModelConfig, group: Group, shard_alignment: ShardAlignment, ours: str, theirs: str, dense: bool
) -> Iterator[ParamSpec]:
    hidden = config.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield ParamSpec(f"{ours}.{norm}", vectors=((f"{theirs}.{norm}.weight", hidden, None),))
    yield from _attention(config, group, f"{ours}.self_attn", f"{theirs}.self_attn")
    ours, theirs = f"{ours}.mlp", f"{theirs}.mlp"
    if dense:
        yield from _mlp(config.intermediate_size, hidden, group, shard_alignment, ours, theirs)
        return
    experts = config.n_routed_experts
    correction = (f"{theirs}.gate.e_score_correction_bias", experts, None)
    yield ParamSpec(f"{ours}.gate.proj", ((Shard(f"{theirs}.gate", (experts, hidden)),),))
    yield ParamSpec(f"{ours}.gate.e_score_correction_bias", vectors=(correction,))
    width = config.moe_intermediate_size
    each = [_gate_up_down(width, hidden, group, shard_alignment, f"{theirs}.experts.{e}") for e in range(experts)]
    yield ParamSpec(f"{ours}.experts", tuple(each))
    shared = f"{ours}.shared_experts", f"{theirs}.shared_experts"
    yield from _mlp(width * config.n_shared_experts, hidden, group, shard_alignment, *shared)


def _attention(config: ModelConfig, group: Group, ours: str, theirs: str) -> Iterator[ParamSpec]:
    hidden, d, (h, g) = config.hidden_size, config.head_dim, (config.num_attention_heads, config.num_key_value_heads)
    q = (h // group.size * group.rank * d, h // group.size * (group.rank + 1) * d)
    kv = config.key_value_heads(group.size)  # with more ranks than heads, neighbours hold the same one
    first = group.rank * g // group.size
    k = (first * d, (first + kv) * d)
    rows = (("q_proj", h * d, q), ("k_proj", g * d, k), ("v_proj", g * d, k))
    yield ParamSpec(
        f"{ours}.qkv_proj",
        (tuple(Shard(f"{theirs}.{name}", (out, hidden), rows=cut) for name, out, cut in rows),),
        tuple((f"{theirs}.{name}.bias", out, cut) for name, out, cut in rows) if config.attention_bias else (),
    )
    yield ParamSpec(f"{ours}.o_proj", ((Shard(f"{theirs}.o_proj", (hidden, h * d), cols=q),),))
    for norm in ("q_norm", "k_norm") if config.use_qk_norm else ():
        yield ParamSpec(f"{ours}.{norm}", vectors=((f"{theirs}.{norm}.weight", d, None),))


def _mlp(
    width: int, hidden: int, group: Group, shard_alignment: ShardAlignment, ours: str, theirs: str
) -> Iterator[ParamSpec]:
    gate, up, down = _gate_up_down(width, hidden, group, shard_alignment, theirs)
    yield ParamSpec(f"{ours}.gate_up_proj", ((gate, up),))
    yield ParamSpec(f"{ours}.down_proj", ((down,),))


def _gate_up_down(
    width: int, hidden: int, group: Group, shard_alignment: ShardAlignment, theirs: str
) -> tuple[Shard, Shard, Shard]:
    """The matrices of a feed-forward part; each rank has the same columns of its width in all three."""
    size = shard_alignment(f"{theirs}.down_proj", width)
    size = size if width // size >= group.size else 1  # no rank goes without
    start, stop = group.split(width // size)
    cut = (size * start, size * stop)
    gate, up = (Shard(f"{theirs}.{name}", (width, hidden), rows=cut) for name in ("gate_proj", "up_proj"))
    return gate, up, Shard(f"{theirs}.down_proj", (hidden, width), cols=cut)
