"""Experts of a layer in two tensors, as transformers 5 saves them: plain values, no quantised ones."""

import re

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats.base import FLOATS, Config, Format, Matrix, Slice, misfit
from glimmer.weight import Kind, Weight

EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d{1,9})\.(gate|up|down)_proj", re.ASCII)


class Stacked(Format):
    """mlp.experts.gate_up_proj (experts, 2 * width, hidden), each expert's gate above its up, and mlp.experts.down_proj
    (experts, hidden, width).
    """

    accepts = "experts of a layer in one tensor (bf16, fp16, fp32)"
    codes, dimensions = "weight", 3

    def codes_of(self, module: str) -> str:
        """The tensor of all experts for a matrix of one, or the name that any other matrix would have."""
        found = EXPERT.fullmatch(module)
        if found is None:
            return super().codes_of(module)
        return f"{found[1]}.{'down_proj' if found[3] == 'down' else 'gate_up_proj'}"

    def matches(self, checkpoint: Checkpoint, module: str, config: Config) -> bool:
        return EXPERT.fullmatch(module) is not None

    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        name, (expert, matrix) = self.codes_of(module), _place(module)
        experts, rows, cols = checkpoint.shape(name)
        if expert >= experts or (rows % 2 and matrix != "down") or checkpoint.dtype(name) not in FLOATS:
            shape = "(experts, hidden, width)" if matrix == "down" else "(experts, 2 * width, hidden)"
            misfit(checkpoint, name, f"bfloat16, float16 or float32 {shape} of {expert + 1} experts or more")
        rows = rows if matrix == "down" else rows // 2
        return Matrix(Kind.PLAIN, (rows, cols), (name,), dtype=checkpoint.dtype(name), experts=experts)

    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        (out, _), (name,) = (found := self.stored(checkpoint, module, config)).shape, found.tensors
        expert, matrix = _place(module)
        first, last = rows or (0, out)
        above = out if matrix == "up" else 0
        return Weight(Kind.PLAIN, checkpoint.tensor(name, (above + first, above + last), cols, matrix=expert))


def _place(module: str) -> tuple[int, str]:
    """Number of the expert, and which of its matrices it is."""
    found = EXPERT.fullmatch(module)
    assert found is not None, f"{module} is no matrix of an expert"
    return int(found[2]), found[3]
