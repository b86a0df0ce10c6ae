"""Format: one way in which a checkpoint stores a matrix; and what several formats have in common.

A format is one class with all that there is to know of it: what config.json may say of it, which tensors a matrix has
and of what shapes and types, how a slice of them becomes a `Weight`, and, where we write it ourselves, how a `Weight`
becomes tensors and what config.json then says. Methods look at headers only, except `read` (and two numbers of a
weight_shape). Not here: which formats there are (__init__.py), and which matrices a model has (model/names.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.errors import CheckpointError
from glimmer.weight import GROUP_SIZE, Kind, Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Slice = tuple[int, int] | None  # start:stop of rows or columns; None: all of them
Config = Mapping[str, Any]  # the quantization_config of a config.json; empty where it has none


class Matrix(NamedTuple):
    """A matrix on disk, from headers only: what `read` will make of it, and the names of all its tensors.

    tensors: that with the codes (or plain values) first, then that with the scales, where there is one.
    zeros: whether zero points are stored. dtype: of plain values. widened: how the values are stored of which `read`
    makes plain ones, since no kernel multiplies them as they are. experts: how many matrices share the tensor.
    """

    kind: Kind
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    group_size: int | None = None
    zeros: bool = False
    dtype: torch.dtype | None = None
    widened: str = ""
    experts: int | None = None


class Format(ABC):
    """One way in which a matrix is stored. A format has no state: what it needs of config.json is passed to it.

    accepts        what of it can be read, in the words of a message to the user
    codes          last part of the name of the tensor with the codes: "weight" for a matrix X with X.weight
    dimensions     of that tensor
    codes_dtypes   the types that this tensor may have, where they tell formats apart
    quant_method   as quantization_config names it; None: a checkpoint without one
    writes         the kind of Weight that `encode` takes; None: we never write this format
    """

    accepts: ClassVar[str]
    codes: ClassVar[str]
    dimensions: ClassVar[int] = 2
    codes_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    quant_method: ClassVar[str | None] = None
    writes: ClassVar[Kind | None] = None

    def check_config(self, config: Config) -> None:
        """Raise Unsupported when a quantization_config with our quant_method says what `read` cannot follow."""
        raise NotImplementedError(f"{type(self).__name__} is in no quantization_config")

    def codes_of(self, module: str) -> str:
        """The tensor with the codes of a matrix; there is a matrix of that name if there is this tensor."""
        return f"{module}.{self.codes}"

    def matches(self, checkpoint: Checkpoint, module: str, config: Config) -> bool:
        """Whether a matrix whose codes' tensor is there is stored in this format."""
        return not self.codes_dtypes or checkpoint.dtype(self.codes_of(module)) in self.codes_dtypes

    @abstractmethod
    def stored(self, checkpoint: Checkpoint, module: str, config: Config) -> Matrix:
        """What is on disk. Raises CheckpointError when tensors are missing or do not fit together."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint, module: str, rows: Slice, cols: Slice, config: Config) -> Weight:
        """Rows and columns of the matrix. Raises as `stored` does, and CheckpointError for values that cannot be."""

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """The tensors that store a Weight of the kind that `writes` names, by the last part of their names."""
        raise NotImplementedError(f"{type(self).__name__} is only read")

    def describe(self, group_size: int | None) -> dict[str, Any]:
        """What config_groups of a compressed-tensors config.json say of matrices written by `encode`."""
        raise NotImplementedError(f"{type(self).__name__} is only read")


# ---- refusals ------------------------------------------------------------------------------------------------------


class Unsupported(Exception):
    """A key of quantization_config has a value that no format can follow; `check` makes a ConfigError of it."""

    def __init__(self, key: str, value: Any, wanted: str):
        super().__init__(key, value, wanted)
        self.key, self.value, self.wanted = key, value, wanted


def table(key: str, value: Any) -> dict[str, Any]:
    """The value, which must be a table."""
    if not isinstance(value, dict):
        raise Unsupported(key, value, "a table")
    return value


def want(key: str, value: Any, wanted: Any) -> None:
    """The value must be this one, and of its type (1 is not true)."""
    if value != wanted or type(value) is not type(wanted):
        raise Unsupported(key, value, repr(wanted))


def want_all(where: str, value: Any, wanted: Mapping[str, Any]) -> None:
    """The value must be a table in which these keys have these values."""
    scheme = table(where, value)
    for key, each in wanted.items():
        want(f"{where}.{key}", scheme.get(key), each)


def want_one(key: str, value: Any, wanted: tuple[Any, ...]) -> None:
    """The value must be one of these."""
    if value not in wanted:
        raise Unsupported(key, value, " or ".join(map(repr, wanted)))


def want_group_size(key: str, value: Any) -> None:
    """The value must be a number of columns that share a scale."""
    if type(value) is not int or not (value == -1 or (0 < value < 1 << 31 and value % GROUP_SIZE == 0)):
        raise Unsupported(key, value, f"a multiple of {GROUP_SIZE}, or -1 for whole rows,")


def misfit(checkpoint: Checkpoint, name: str, expected: str) -> NoReturn:
    """Refuse a tensor that is not as it should be."""
    dtype = str(checkpoint.dtype(name)).removeprefix("torch.")
    raise CheckpointError(
        f"{checkpoint.file(name)} has {name} as {dtype} of shape {checkpoint.shape(name)}",
        expected,
        "finish or repeat the download; if it stays so, use a checkpoint in bf16 or in the official FP8 format",
    )


def want_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A tensor must have this shape and type."""
    if checkpoint.shape(name) != shape or checkpoint.dtype(name) != dtype:
        misfit(checkpoint, name, f"{str(dtype).removeprefix('torch.')} of shape {shape}")


# ---- scales and groups ---------------------------------------------------------------------------------------------


def stored_group_size(
    checkpoint: Checkpoint, scale: str, shape: tuple[int | None, int | None], inner: int, said: int | None = None
) -> int:
    """Columns that share a scale, from the shape of the scales, whose side None counts the groups.

    said: by config.json (-1: all columns). The last group may be shorter. Where the shape contradicts it, as it does
    where nothing is said, it is what divides the columns; a number of groups that several sizes give is refused.
    """
    if scale not in checkpoint:
        raise CheckpointError(
            f"no tensor {scale} in {checkpoint.directory}",
            "the scales of a matrix beside its codes",
            "finish the download of the checkpoint",
        )
    found = checkpoint.shape(scale)
    if inner > 0 and len(found) == 2 and checkpoint.dtype(scale) in FLOATS:
        groups = found[shape.index(None)]
        fits = found == tuple(groups if side is None else side for side in shape)
        if fits and groups == 1:
            return inner
        if fits and said is not None and said > 0 and groups == -(-inner // said):
            return said
        if fits and groups == -(-inner // GROUP_SIZE):
            return GROUP_SIZE
        if fits and groups and said is None and inner % groups == 0 and inner // groups % GROUP_SIZE == 0:
            return inner // groups
        if fits and groups:
            least = -(-inner // (groups * GROUP_SIZE)) * GROUP_SIZE
            if -(-inner // least) == groups > -(-inner // (least + GROUP_SIZE)):  # the only size with so many groups
                return least
    sides = tuple("groups" if side is None else side for side in shape)
    expected = f"shape ({sides[0]}, {sides[1]}), groups of a multiple of {GROUP_SIZE} of the {inner} inputs"
    misfit(checkpoint, scale, f"bfloat16, float16 or float32 of {expected}, or one of all")


def sliced_groups(module: str, group_size: int, start: int, stop: int) -> tuple[int, int]:
    """The groups that columns start:stop belong to; these must begin with a group, or lie within one."""
    within = stop > start and start // group_size == (stop - 1) // group_size
    if start % 2 or stop % 2 or (start % group_size and not within):
        raise CheckpointError(
            f"columns {start}:{stop} of {module} are wanted by one process; it is quantised in groups of {group_size}",
            f"cuts between columns that are multiples of {group_size}",
            "run fewer processes (tensor_parallel_size), or a checkpoint with smaller groups",
        )
    return start // group_size, -(-stop // group_size)


def check_order(checkpoint: Checkpoint, order: str, inner: int, group_size: int) -> None:
    """A g_idx, where there is one, must say of each column what its place says already."""
    if order not in checkpoint:
        return
    places = torch.arange(inner, dtype=torch.int32) // group_size
    if not torch.equal(checkpoint.tensor(order), places):
        raise CheckpointError(
            f"{checkpoint.file(order)} has a {order} that reorders its columns (desc_act, activation order)",
            "columns of a group side by side",
            "use a checkpoint quantised without activation order (desc_act: false)",
        )


def each_column(parts: Tensor, size: int, start: int, stop: int) -> Tensor:
    """(rows, groups) of the groups of `size` columns that columns start:stop touch -> (rows, stop - start)."""
    return parts[:, torch.arange(start, stop) // size - start // size]


def row_scales(checkpoint: Checkpoint, name: str, rows: Slice) -> Tensor:
    """A scale for each row, (rows, 1) float32; CheckpointError for one that is no positive, finite number."""
    scales = checkpoint.tensor(name, rows).reshape(-1, 1).to(torch.float32, copy=True)
    check_scales(checkpoint, name, scales, scales > 0, rows)
    return scales


def group_scales(checkpoint: Checkpoint, name: str, scales: Tensor, rows: Slice) -> Tensor:
    """Scales (rows, groups) of a slice as they will be held, float32; CheckpointError for one that is not finite."""
    scales = scales.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    check_scales(checkpoint, name, scales, scales.isfinite(), rows)
    return scales


def check_scales(checkpoint: Checkpoint, name: str, scales: Tensor, good: Tensor, rows: Slice) -> None:
    """Refuse scales (rows, groups) of a slice that are not finite, or not `good`."""
    wrong = ~(good & scales.isfinite())
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise CheckpointError(
            f"{checkpoint.file(name)} has {int(wrong.sum())} scales in {name} that are no positive, finite numbers, "
            f"the first of them {scales[row, group]} in row {row + (rows[0] if rows else 0)}",
            "scales above zero",
            f"download {checkpoint.file(name).name} again; if it stays so, the checkpoint is broken",
        )
