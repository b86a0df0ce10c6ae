"""GPTQ (AutoGPTQ, GPTQModel; 4 or 8 bits, without activation order), both versions of its zero points; AutoRound, which
writes the same tensors, or those of AWQ, under rules of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glimmer.checkpoint.files import Checkpoint
from glimmer.checkpoint.formats import packed
from glimmer.checkpoint.formats.awq import QWeight
from glimmer.checkpoint.formats.base import Config, Unsupported, table, want, want_group_size, want_one
from glimmer.checkpoint.formats.schemes import scheme
from glimmer.errors import CheckpointError

VERSIONS = ("gptq", "gptq_v2")
PACKINGS = tuple(f"auto_round:{name}" for name in ("auto_gptq", "gptq", "auto_awq", "awq"))


def gptq_zeros(quantization_config: Mapping[str, Any] | None, symmetric: bool | None = None) -> str:
    """What qzeros hold: zero points "less one" (the first version), "plain" (the second), or nothing but the "middle".

    symmetric: what is said of one matrix, where rules make a difference. Symmetric checkpoints are told from their
    values: some call themselves the first version and are the second.
    """
    said = quantization_config or {}
    if (said.get("sym") if symmetric is None else symmetric) is True:
        return "middle"
    return "plain" if _version(said) == "gptq_v2" else "less one"


def _version(config: Config) -> Any:
    """What config.json says of the version of zero points, under either of the two keys that GPTQModel has used."""
    return config.get("format") if config.get("checkpoint_format") is None else config["checkpoint_format"]


class GPTQ(QWeight):
    """qweight (in * bits / 32, out): a word has eight inputs (of 4 bits) or four (of 8 bits) of one output that follow
    each other, lowest bits first; qzeros in plain order."""

    accepts = "gptq (4 or 8 bits, without desc_act)"
    quant_method = "gptq"

    def check_config(self, config: Config) -> None:
        for key in ("checkpoint_format", "format"):
            want_one(key, config.get(key), (None, *VERSIONS))
        if config.get("format") is not None:
            want("checkpoint_format beside format", _version(config), config["format"])
        if config.get("is_marlin_format"):
            raise Unsupported("is_marlin_format", True, "false")
        schemes = {"": config}
        for rule, changes in table("dynamic", config.get("dynamic") or {}).items():
            if not rule.startswith("-:"):  # these are left unquantised
                schemes[f"dynamic.{rule}."] = {**config, **table(f"dynamic.{rule}", changes)}
        for where, each in schemes.items():
            _check_scheme(where, each)
            want(f"{where}desc_act", each.get("desc_act", False), False)
        if _version(config) is None and any(each.get("sym") is not True for each in schemes.values()):
            self._check_writer(config)

    def _check_writer(self, config: Config) -> None:
        """Asymmetric zero points of an unsaid version are of the first, unless they come from a tool that has both."""
        if "gptqmodel" in str(table("meta", config.get("meta") or {}).get("quantizer")).lower():
            raise Unsupported(
                "checkpoint_format", None, "'gptq' or 'gptq_v2' (asymmetric, meta.quantizer is GPTQModel)"
            )

    def bits(self, config: Config, module: str) -> int:
        return 8 if scheme(config, module).bits == 8 else 4

    def inputs(self, rows: int, bits: int) -> int:
        return rows * 32 // bits

    def codes_shape(self, out: int, inner: int, bits: int) -> tuple[int, int]:
        return inner * bits // 32, out

    def unpack_codes(
        self, checkpoint: Checkpoint, name: str, rows: tuple[int, int], cols: tuple[int, int], bits: int
    ) -> Tensor:
        (start, stop), each = cols, 32 // bits
        codes = packed.down_columns(checkpoint.tensor(name, (start // each, -(-stop // each)), rows))
        return codes[:, start % each * bits // 8 :][:, : (stop - start) * bits // 8]

    def unpack_zeros(self, words: Tensor, bits: int) -> Tensor:
        return packed.unpack(words, bits).T

    def zero_points(
        self, checkpoint: Checkpoint, module: str, zeros: Tensor, bits: int, config: Config
    ) -> Tensor | None:
        match gptq_zeros(config, scheme(config, module).symmetric):
            case "middle":
                _check_middle(checkpoint, f"{module}.qzeros", zeros, 1 << (bits - 1))
                return None
            case "less one":
                return ((zeros.to(torch.int32) + 1) & ((1 << bits) - 1)).to(torch.uint8)
        return zeros


class AutoRound(GPTQ):
    """The tensors of GPTQ, whose zero points are of the first version; its AWQ tensors are read by AWQ."""

    accepts = "auto-round (4 or 8 bits, packed as auto_gptq or auto_awq)"
    quant_method = "auto-round"

    def check_config(self, config: Config) -> None:
        want_one("data_type", config.get("data_type", "int"), ("int",))
        want_one("packing_format", config.get("packing_format"), PACKINGS)
        schemes = {"": config}
        for name, changes in table("extra_config", config.get("extra_config") or {}).items():
            schemes[f"extra_config.{name}."] = {**config, **table(f"extra_config.{name}", changes)}
        for where, each in schemes.items():
            if not where or each.get("bits") not in (16, 32):  # these are left unquantised
                want_one(f"{where}data_type", each.get("data_type", "int"), ("int",))
                _check_scheme(where, each)
                if "awq" in config["packing_format"]:
                    want(f"{where}bits", each.get("bits"), 4)

    def matches(self, checkpoint: Checkpoint, module: str, config: Config) -> bool:
        return config.get("quant_method") == self.quant_method


def _check_scheme(where: str, scheme: Config) -> None:
    want_one(f"{where}bits", scheme.get("bits"), (4, 8))
    want_group_size(f"{where}group_size", scheme.get("group_size"))


def _check_middle(checkpoint: Checkpoint, name: str, zeros: Tensor, middle: int) -> None:
    """Zero points of a symmetric matrix: all are in the middle of the codes, kept as such or less one."""
    if not ((zeros == middle).all() or (zeros == middle - 1).all()):
        raise CheckpointError(
            f"{checkpoint.file(name)} has zeros from {zeros.min()} to {zeros.max()} in {name}; config.json says sym",
            f"{middle - 1} or {middle} everywhere, which symmetric GPTQ checkpoints have",
            "set sym to false in quantization_config if the checkpoint is asymmetric, or download it again",
        )
