"""GPTQ (AutoGPTQ, GPTQModel; 4 bits, without activation order), both versions of its zero points."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats import packed
from glimmer.checkpoint.formats.awq import QWeight
from glimmer.checkpoint.formats.base import Config, Unsupported, table, want, want_group_size, want_one
from glimmer.errors import CheckpointError
from glimmer.weight import DEFAULT_ZERO_POINT


def gptq_zeros(quantization_config: Mapping[str, Any] | None) -> str:
    """What qzeros hold: zero points "less one" (the first version), "plain" (the second), or nothing but the "middle".

    Symmetric checkpoints are told from their values: some call themselves the first version and are the second.
    """
    said = quantization_config or {}
    if said.get("sym") is True:
        return "middle"
    return "plain" if said.get("checkpoint_format") == "gptq_v2" else "less one"


class GPTQ(QWeight):
    """qweight (in / 8, out): a word has inputs 8j .. 8j + 7 of one output, lowest bits first; qzeros in plain order."""

    accepts = "gptq (4 bits, without desc_act)"
    quant_method = "gptq"

    def check_config(self, config: Config) -> None:
        _check_scheme("", config)
        want_one("checkpoint_format", config.get("checkpoint_format"), (None, "gptq", "gptq_v2"))
        if config.get("is_marlin_format"):
            raise Unsupported("is_marlin_format", True, "false")
        for rule, changes in table("dynamic", config.get("dynamic") or {}).items():
            if not rule.startswith("-:"):  # these are left unquantised
                _check_scheme(f"dynamic.{rule}.", {**config, **table(f"dynamic.{rule}", changes)})

    def inputs(self, rows: int) -> int:
        return 8 * rows

    def codes_shape(self, out: int, inner: int) -> tuple[int, int]:
        return inner // 8, out

    def unpack_codes(self, checkpoint: Checkpoint, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        start, stop = cols
        codes = packed.down_columns(checkpoint.tensor(name, (start // 8, -(-stop // 8)), rows))
        return codes[:, start % 8 // 2 :][:, : (stop - start) // 2]

    def unpack_zeros(self, words: Tensor) -> Tensor:
        return packed.nibbles(words).T

    def zero_points(self, checkpoint: Checkpoint, name: str, zeros: Tensor, config: Config) -> Tensor | None:
        match gptq_zeros(config):
            case "middle":
                _check_middle(checkpoint, name, zeros)
                return None
            case "less one":
                return (zeros + 1) & 15
        return zeros


def _check_scheme(where: str, scheme: Config) -> None:
    want(f"{where}bits", scheme.get("bits"), 4)
    want_group_size(f"{where}group_size", scheme.get("group_size"))
    want(f"{where}desc_act", scheme.get("desc_act", False), False)


def _check_middle(checkpoint: Checkpoint, name: str, zeros: Tensor) -> None:
    """Zero points of a symmetric matrix: all are 8, kept as such or less one."""
    if not ((zeros == DEFAULT_ZERO_POINT).all() or (zeros == DEFAULT_ZERO_POINT - 1).all()):
        raise CheckpointError(
            f"{checkpoint.file(name)} has zeros from {zeros.min()} to {zeros.max()} in {name}; config.json says sym",
            f"{DEFAULT_ZERO_POINT - 1} or {DEFAULT_ZERO_POINT} everywhere, which symmetric GPTQ checkpoints have",
            "set sym to false in quantization_config if the checkpoint is asymmetric, or download it again",
        )
