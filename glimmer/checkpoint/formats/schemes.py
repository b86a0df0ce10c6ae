"""What a quantization_config says of one matrix: how many bits, and how many columns share a scale.

One configuration may say several things: GPTQ's `dynamic` and AutoRound's `extra_config` change them for the modules
whose names fit a pattern, compressed-tensors has `config_groups` with targets. Shapes alone do not tell: 192 columns in
two groups are groups of 96, or of 128 with a short last one. Not here: whether it can be read (the formats).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Scheme(NamedTuple):
    """What is said of a matrix; None: nothing. group_size -1: one group of all columns."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


def scheme(config: Mapping[str, Any], module: str) -> Scheme:
    """What a quantization_config that has passed `check` says of the matrix of `module`."""
    match config.get("quant_method"):
        case "gptq":
            said = {**config, **_dynamic(config.get("dynamic") or {}, module)}
        case "auto-round":
            said = {**config, **_extra(config.get("extra_config") or {}, module)}
        case "awq":
            said = {"bits": 4, "group_size": config.get("group_size", config.get("q_group_size"))}
        case "compressed-tensors":
            weights = _targeted(config, module).get("weights") or {}
            whole = weights.get("strategy") == "channel"
            said = {
                "bits": weights.get("num_bits"),
                "group_size": -1 if whole else weights.get("group_size"),
                "sym": weights.get("symmetric"),
            }
        case _:
            said = {}
    return Scheme(said.get("bits"), said.get("group_size"), said.get("sym"))


def _dynamic(rules: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The changes of the first of GPTQModel's rules that fits; one that begins with "-:" leaves a module plain."""
    for rule, changes in rules.items():
        if re.match(rule.removeprefix("-:").removeprefix("+:"), module):
            return {} if rule.startswith("-:") else changes
    return {}


def _extra(layers: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The changes of AutoRound's extra_config: under the module's own name, or else under a pattern within it."""
    if module in layers:
        return dict(layers[module])
    return next((changes for name, changes in layers.items() if re.search(name, module)), {})


def _targeted(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config group whose targets name the module, or else the one for its class."""
    others: Mapping[str, Any] = {}
    for group in (config.get("config_groups") or {}).values():
        for target in group.get("targets") or ():
            pattern = target.removeprefix("re:")
            if target == module or (pattern != target and re.match(pattern, module)):
                return dict(group)
            if pattern == target and "." not in target and not others:  # a class: "Linear"
                others = group
    return others


def patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, pattern) of all that should be regular expressions in a quantization_config."""
    for key in ("dynamic", "extra_config"):
        for rule in config.get(key) or {}:
            yield key, rule.removeprefix("-:").removeprefix("+:") if key == "dynamic" else rule
    for name, group in (config.get("config_groups") or {}).items():
        for target in group.get("targets") or ():
            if target.startswith("re:"):
                yield f"config_groups.{name}.targets", target.removeprefix("re:")
