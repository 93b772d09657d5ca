"""A partition written as a recipe's YAML, with the reasons beside it as comments.

What is written is read by `schema` like any file that a person wrote. Called by `quantize.budget`.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import yaml

from halfbyte.config import ModelConfig
from halfbyte.modules import CacheFormat, WeightFormat
from halfbyte.recipe.schema import Calibration, Scales

_UNITS = {"attention": (("q", "k", "v"), ("o",)), "mlp": (("gate", "up"), ("down",))}
_FORMATS: tuple[WeightFormat, ...] = ("bf16", "fp8", "nvfp4")


def recipe_text(
    name: str,
    formats: Mapping[str, WeightFormat],
    config: ModelConfig,
    *,
    kv_cache: CacheFormat,
    scales: Scales,
    calibration: Calibration,
    reasons: Sequence[str] = (),
) -> str:
    """The YAML text of a recipe that gives these formats to a model of this depth.

    formats  canonical linear -> format: every decoder linear, and a head that is not kept
    reasons  lines for people, written as comments ahead of everything
    """
    text = config.text
    rules = [
        rule
        for group in _UNITS
        for chosen in _FORMATS
        for rule in _rules(group, chosen, formats, text.num_layers)
    ]
    keep = ["embedding"]
    if formats.get("head", "bf16") != "bf16":
        rules.append({"part": "head", "format": formats["head"]})
    else:
        keep.append("head")
    keep += ["vision", "projector"]
    lines = [f"# {line}".rstrip() for line in reasons]
    lines += [f"name: {_flow(name)}", "rules:"]
    lines += [f"  - {_flow(rule)}" for rule in rules]
    facts = scales.facts()
    lines += [
        f"keep: {_flow(keep)}",
        f"kv_cache: {kv_cache}",
        f"scales: {_flow(facts)}",
        "calibration: "
        + _flow(
            {
                "blend": calibration.blend,
                "samples": calibration.samples,
                "tokens_per_sample": calibration.tokens_per_sample,
                "seed": calibration.seed,
            }
        ),
    ]
    return "\n".join(lines) + "\n"


def _rules(
    group: str, chosen: WeightFormat, formats: Mapping[str, WeightFormat], num_layers: int
) -> list[dict[str, Any]]:
    """Rules for one group and format: one where all its linears have the same layers."""
    found: dict[tuple[int, ...], list[str]] = {}
    for unit in _UNITS[group]:
        layers = tuple(
            layer
            for layer in range(num_layers)
            if formats[f"decoder.{layer}.{group}.{unit[0]}"] == chosen
        )
        if layers:
            found.setdefault(layers, []).extend(unit)
    rules = []
    for layers, linears in found.items():
        rule: dict[str, Any] = {"part": "decoder", "group": group}
        if len(linears) < sum(map(len, _UNITS[group])):
            rule["linears"] = linears
        if len(layers) < num_layers:
            rule["layers"] = spans(layers)
        rules.append({**rule, "format": chosen})
    return rules


def spans(layers: Sequence[int]) -> list[int | str]:
    """Layers as a recipe spells them: `[0-3, 7]`."""
    found: list[int | str] = []
    for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        members = [layer for _, layer in run]
        first, last = members[0], members[-1]
        found.append(first if first == last else f"{first}-{last}")
    return found


def _flow(value: Any) -> str:
    """One line of YAML, however long: a recipe's rule is read as a line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...").strip()
