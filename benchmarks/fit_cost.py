"""What share of a machine's limits steps reach: the constants of glimmer/model/cost.py, from README's measured tables.

usage: fit_cost.py [README]

Each row of the tables for `air-quarter` says what share of the bandwidth and of the arithmetic, as measured beside it,
a figure has reached. If reads and products do not overlap, reads / r + products / a = 1 holds for each of them, with r
and a the shares that they would reach alone, but for what steps take besides (other constants of cost.py). A
least-squares fit finds r, and a for bfloat16 and for int8; printed are these and, for each figure, predicted time /
measured time.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch
from make_checkpoint import CONFIG

from glimmer.backends import selection
from glimmer.backends.base import KVCacheSpec
from glimmer.model.cost import CALL, ELEMENT, PYTHON_CALL, STEP, Shapes, as_quantized
from glimmer.model_config import ModelConfig
from glimmer.weight import Kind

FORMS = {"bfloat16": Kind.PLAIN, "int8": Kind.INT8, "int4": Kind.INT4, "FP8": Kind.FP8}
ROW = re.compile(r"\| (prefill of (\d+) tokens|decode, batch (\d+)), tokens/s \| ([\d,.]+) \| (\d+) % \| (\d+) %")
CONTEXT = 64 + 20  # of bench's decode, about in the middle


def main(readme: Path) -> None:
    """Fit and print."""
    config = ModelConfig.from_dict(CONFIG)
    text = readme.read_text(encoding="utf-8")
    limits = {name: float(re.search(rf"([\d.]+) T\w+/s in {name}", text)[1]) for name in ("bfloat16", "int8")}
    spec = KVCacheSpec(config.num_hidden_layers, 16, config.num_key_value_heads, config.head_dim, torch.bfloat16)
    rows, besides, labels = [], [], []
    for part in re.split(r"\n\*\*", text.partition("<!-- measured: begin -->")[2])[1:]:
        form = next((kind for name, kind in FORMS.items() if part.startswith(name)), None)
        if form is None:
            continue
        shapes = Shapes(config, as_quantized(form, 32), selection.choose(selection.HOST))
        for what, length, batch, rate, bandwidth, arithmetic in ROW.findall(part):
            work = shapes.work(spec, int(length), 0) if length else shapes.work(spec, 1, CONTEXT, int(batch))
            alone = {kind: work.cost.operations[kind] / limits[kind] for kind in limits}
            share = {kind: int(arithmetic) / 100 * value / sum(alone.values()) for kind, value in alone.items()}
            rows.append([int(bandwidth) / 100, share["bfloat16"], share["int8"]])
            took = int(length or batch) / float(rate.replace(",", ""))
            called = work.cost.calls * (PYTHON_CALL if length else CALL) + work.steps * STEP
            besides.append((called + work.cost.elements * ELEMENT / limits["bfloat16"] / 1e12) / took)
            labels.append(f"{form:6} {what}")
    table = np.array(rows)
    inverse, *_ = np.linalg.lstsq(table, 1 - np.array(besides), rcond=None)
    for name, value in zip(("read", "bfloat16", "int8"), inverse):
        print(f"{name:10} reaches {1 / value:.3f} of the limit")
    for label, ratio in zip(labels, table @ inverse + besides):
        print(f"{label:32} predicted / measured time {ratio:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "README.md")
