"""A checkpoint of the demo model made wider, without changing what it computes: where its training goes on.

    python tools/demo_model/grow.py --model glimmer/demo --data build/demo_model --out build/demo_model/wide

The wider model's new hidden dimensions are written by nobody and read with random weights, its new heads and inner
neurons compute at random and are read by nobody; so each new weight has a gradient from the first step on, and the
logits stay (but for the rounding to bf16). A key and value head that serves several heads is doubled, so that each of
the copies has room for new heads beside the old. Not here: training (train.py), more layers or experts.
"""

import argparse
from pathlib import Path

import torch
from export import export, load
from model import DemoModel, Shape
from torch import Tensor

NEW = -1  # in an axis' origins: an index that the narrow model has not


def origins(old: Shape, new: Shape) -> dict[str, list[int]]:
    """For each kind of axis, where every index of the wider model comes from in the narrow one."""
    copies = new.num_key_value_heads // old.num_key_value_heads
    served, room = (shape.num_attention_heads // shape.num_key_value_heads for shape in (old, new))
    share = -(-served // copies)  # of a key and value head's query heads, those that go with each of its copies
    heads: list[int] = []
    for kv in range(new.num_key_value_heads):
        begin, end = kv // copies * served, (kv // copies + 1) * served
        mine = range(begin, end)[kv % copies * share :][:share]
        heads += [*mine, *[NEW] * (room - len(mine))]
    if len(heads) != new.num_attention_heads or not set(range(old.num_attention_heads)) <= set(heads):
        raise ValueError(f"{new} has no place for all heads of {old}")

    def longer(before: int, after: int) -> list[int]:
        return [*range(before), *[NEW] * (after - before)]

    def channels(of: list[int]) -> list[int]:
        return [NEW if head == NEW else head * old.head_dim + i for head in of for i in range(old.head_dim)]

    hidden = longer(old.hidden_size, new.hidden_size)
    inner = longer(old.moe_intermediate_size, new.moe_intermediate_size)
    return {
        "hidden": hidden, "twice hidden": hidden + [NEW if i == NEW else i + old.hidden_size for i in hidden],
        "dense": longer(old.intermediate_size, new.intermediate_size), "inner": inner,
        "twice inner": inner + [NEW if i == NEW else i + old.moe_intermediate_size for i in inner],
        "heads": channels(heads), "kv": channels([kv // copies for kv in range(new.num_key_value_heads)]),
        "same": [],
    }  # fmt: skip


def axes(name: str) -> tuple[str, str]:
    """The kinds of a weight's last two axes (rows, columns)."""
    inner = "dense" if name.startswith("model.layers.0.") else "inner"
    for part, kinds in {
        "embed_tokens": ("same", "hidden"), "lm_head": ("same", "hidden"), "mlp.gate.": ("same", "hidden"),
        "eh_proj": ("hidden", "twice hidden"), "q_proj": ("heads", "hidden"), "k_proj": ("kv", "hidden"),
        "v_proj": ("kv", "hidden"), "o_proj": ("hidden", "heads"), "gate_up_proj": ("twice inner", "hidden"),
        "gate_proj": (inner, "hidden"), "up_proj": (inner, "hidden"), "down_proj": ("hidden", inner),
    }.items():  # fmt: skip
        if part in name:
            return kinds
    raise ValueError(f"no rule says how {name} grows")


@torch.no_grad()
def grow(old: DemoModel, shape: Shape, seed: int = 0) -> DemoModel:
    """A model of the larger `shape`, of as many layers and experts, which computes what `old` does."""
    new, of = DemoModel(shape, seed), origins(old.shape, shape)
    before, after = old.state_dict(), new.state_dict()
    for name, tensor in after.items():
        source = before[name]
        if "q_norm" in name or "k_norm" in name or name.endswith("e_score_correction_bias"):
            tensor.copy_(source)
        elif name.endswith("norm.weight"):  # zeros beside it make the root of the mean square smaller
            tensor[: len(source)] = source * (len(source) / len(tensor)) ** 0.5
        elif name.endswith(".bias"):
            place(tensor[:, None], source[:, None], of[axes(name)[0]], [])
        else:
            rows, columns = axes(name)
            place(tensor, source, of[rows], of[columns])
            if rows == "hidden":
                tensor[..., torch.tensor(of[rows]) == NEW, :] = 0
            if columns in ("heads", "dense", "inner") or "embed_tokens" in name:
                tensor[..., torch.tensor(of[columns]) == NEW] = 0
    return new


def place(tensor: Tensor, source: Tensor, rows: list[int], columns: list[int]) -> None:
    """Copy into (…, R, C) what the narrow matrix has, by the origins of each axis; none: the axis is the same."""
    rows, columns = rows or [*range(source.shape[-2])], columns or [*range(source.shape[-1])]
    old_rows, old_columns = torch.tensor(rows), torch.tensor(columns)
    new_rows, new_columns = (old_rows != NEW).nonzero()[:, 0], (old_columns != NEW).nonzero()[:, 0]
    tensor[..., new_rows[:, None], new_columns] = source[..., old_rows[new_rows][:, None], old_columns[new_columns]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the narrow checkpoint")
    parser.add_argument("--data", type=Path, default=Path("build/demo_model"), help="where its tokenizer lies")
    parser.add_argument("--out", type=Path, default=Path("build/demo_model/wide"))
    args = parser.parse_args()
    export(grow(load(args.model), Shape()), args.data, args.out)


if __name__ == "__main__":
    main()
