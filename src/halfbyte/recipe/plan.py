"""Recipe x config -> Plan: one format per linear, and what it will weigh.

Called by `quantize` before anything heavy begins, and by `halfbyte inspect plan`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from halfbyte.config import ModelConfig
from halfbyte.errors import FormatError, UsageError
from halfbyte.log import say_once
from halfbyte.modules import (
    CacheFormat,
    LinearSpec,
    WeightFormat,
    decoder_linears,
    encoder_linears,
    fused_partners,
    head_linear,
    quantizable_linears,
)
from halfbyte.recipe.schema import LayerRange, Recipe, Rule, Scales, Share

_BLOCK = 16  # inputs that share one NVFP4 block scale
_SCALAR_BYTES = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """The format of every decoder linear (canonical name, model order) and of the KV cache.

    The head is listed where it is quantized. Everything that is not listed stays as the source has
    it.
    """

    recipe_name: str
    formats: Mapping[str, WeightFormat]
    kv_cache: CacheFormat
    scales: Scales = field(default_factory=Scales)


@dataclass(frozen=True, slots=True)
class Size:
    """What a part of a checkpoint comes to."""

    num_bytes: int
    num_tensors: int

    def __add__(self, other: "Size") -> "Size":
        return Size(self.num_bytes + other.num_bytes, self.num_tensors + other.num_tensors)


def make_plan(recipe: Recipe, config: ModelConfig) -> Plan:
    """Apply a recipe to a model, so that every linear has one format.

    A rule for the head leaves a tied one, which is the embedding, in bf16 and says so in a warning.

    Raises UsageError for a layer outside the model, a rule that matches nothing, two rules that
    claim the same linear, a linear or part that none claims, a head that is both claimed and kept,
    fused partners of different formats; FormatError for an NVFP4 linear whose width is no multiple
    of 16. The message names recipe, rule and linear.
    """
    linears = [*decoder_linears(config), head_linear(config)]
    claimed: dict[str, int] = {}
    for number, rule in enumerate(recipe.rules):
        where = f"recipe {recipe.source}, rule {number + 1}"
        layers = _layers(rule, config.text.num_layers, where)
        if rule.group is None and "head" in recipe.keep:
            raise UsageError(f"{where} claims the head, which the recipe names under keep as well")
        for linear in linears:
            if not _matches(rule, layers, linear):
                continue
            if linear.name in claimed:
                raise UsageError(
                    f"{where} overlaps rule {claimed[linear.name] + 1}: both claim {linear.name}"
                )
            claimed[linear.name] = number
    _check_leftovers(recipe, config, claimed)
    formats = {x.name: recipe.rules[claimed[x.name]].format for x in linears if x.name in claimed}
    if formats.get("head", "bf16") != "bf16" and config.text.tied_head:
        say_once(
            f"recipe {recipe.source}: the head of this model is its embedding (tied), which stays "
            f"in bf16, not {formats['head']}"
        )
    if config.text.tied_head or formats.get("head") == "bf16":
        formats.pop("head", None)
    _check_partners(recipe, formats)
    _check_widths(linears, formats)
    return Plan(recipe.name, formats, recipe.kv_cache, recipe.scales)


def _layers(rule: Rule, num_layers: int, where: str) -> frozenset[int]:
    if rule.layers is None:
        return frozenset(range(num_layers))
    ranges = [_resolve(item, num_layers, where) for item in rule.layers]
    counts = Counter(layer for layers in ranges for layer in layers)
    twice = [layer for layer, count in counts.items() if count > 1]
    if twice:
        raise UsageError(f"{where} names layer {min(twice)} twice")
    return frozenset(counts)


def _resolve(item: LayerRange, num_layers: int, where: str) -> range:
    first = _place(item.first, num_layers)
    last = _place(item.last, num_layers) - isinstance(item.last, Share)
    if min(first, last) < 0 or max(first, last) >= num_layers:
        raise UsageError(
            f"{where}: layers {item} go past layer {num_layers - 1}, the last of this model"
        )
    if first > last:
        raise UsageError(f"{where}: layers {item} match nothing in a model of {num_layers} layers")
    return range(first, last + 1)


def _place(end: int | Share, num_layers: int) -> int:
    """A layer counted from the start; of a share, the first layer behind it."""
    if isinstance(end, Share):
        return end.layers(num_layers)
    return end + num_layers if end < 0 else end


def _matches(rule: Rule, layers: frozenset[int], linear: LinearSpec) -> bool:
    if rule.group is None or linear.layer is None:
        return rule.group is None and linear.part == "head"
    short = linear.name.rpartition(".")[2]
    return linear.group == rule.group and linear.layer in layers and short in rule.linears


def _check_leftovers(recipe: Recipe, config: ModelConfig, claimed: Collection[str]) -> None:
    left = [linear.name for linear in decoder_linears(config) if linear.name not in claimed]
    is_head_free = not config.text.tied_head and "head" not in claimed
    parts = ["embedding", "head"] if is_head_free else ["embedding"]
    if config.vision is not None:
        parts += ["vision", "projector"]
    left = [*left, *(part for part in parts if part not in recipe.keep)]
    if left:
        more = f" and {len(left) - 1} others" if len(left) > 1 else ""
        raise UsageError(
            f"recipe {recipe.source} says nothing about {left[0]}{more}; claim it by a rule "
            "(format: bf16 leaves it alone) or name its part under keep"
        )


def _check_partners(recipe: Recipe, formats: Mapping[str, WeightFormat]) -> None:
    for name, chosen in formats.items():
        for partner in fused_partners(name):
            if formats[partner] != chosen:
                raise UsageError(
                    f"recipe {recipe.source}: {name} is {chosen}, {partner} is {formats[partner]}; "
                    "engines run them as one product, so they must carry one format"
                )


def _check_widths(linears: Iterable[LinearSpec], formats: Mapping[str, WeightFormat]) -> None:
    for linear in linears:
        if formats.get(linear.name) == "nvfp4" and linear.in_features % _BLOCK:
            raise FormatError(
                f"{linear.name}: {linear.in_features} input features; NVFP4 needs a multiple of 16"
            )


def linear_size(linear: LinearSpec, chosen: WeightFormat) -> Size:
    """Bytes and tensors of one linear: weight, its scales, and the input scale."""
    count = linear.out_features * linear.in_features
    match chosen:
        case "bf16":
            return Size(2 * count, 1)
        case "fp8":
            return Size(count + 2 * _SCALAR_BYTES, 3)
        case "nvfp4":
            return Size(count // 2 + count // _BLOCK + 2 * _SCALAR_BYTES, 4)


def plan_sizes(plan: Plan, config: ModelConfig) -> dict[str, Size]:
    """What each part of the planned checkpoint comes to, from shapes alone.

    Keys: decoder linears in bf16, fp8 and nvfp4; kv scales; norms, embedding and head; vision.
    """
    text = config.text
    sizes = {"bf16": Size(0, 0), "fp8": Size(0, 0), "nvfp4": Size(0, 0)}
    for linear in decoder_linears(config):
        chosen = plan.formats[linear.name]
        sizes[chosen] += linear_size(linear, chosen)
    scales = 2 * text.num_layers if plan.kv_cache == "fp8" else 0
    sizes["kv scales"] = Size(_SCALAR_BYTES * scales, scales)
    norms = 2 * text.num_layers + 1
    sizes["norms"] = Size(2 * text.width * norms, norms)
    table = Size(2 * text.vocab_size * text.width, 1)
    sizes["embedding, head"] = table if text.tied_head else table + head_size(plan, config)
    sizes["vision"] = _vision_size(config)
    return sizes


def head_size(plan: Plan, config: ModelConfig) -> Size:
    """Bytes and tensors of the head; a tied one counts as the table that it is."""
    return linear_size(head_linear(config), plan.formats.get("head", "bf16"))


def _vision_size(config: ModelConfig) -> Size:
    vision = config.vision
    if vision is None:
        return Size(0, 0)
    linears = encoder_linears(config)
    count = sum(linear.out_features * linear.in_features for linear in linears)
    tensors = len(linears)
    # The patch convolution, the norm before the layers, two norms a layer, the merger's norm.
    norms = 2 * vision.num_layers + (2 if vision.has_merger else 1)
    count += vision.width * vision.num_channels * vision.patch_size**2
    count += vision.width * norms
    tensors += norms + 1
    if vision.projector_bias:
        count += 2 * config.text.width
        tensors += 2
    return Size(2 * count, tensors)


def plan_size(plan: Plan, config: ModelConfig) -> Size:
    """Bytes and tensors of the whole planned checkpoint."""
    return sum(plan_sizes(plan, config).values(), Size(0, 0))


_SCALE_RULES: dict[WeightFormat, str] = {
    "bf16": "-",
    "fp8": "{weights} / 448 per tensor, inputs {activations}",
    "nvfp4": "{weights} per 16 and per tensor, inputs {activations}",
}


def format_plan(plan: Plan, config: ModelConfig, *, every_layer: bool = False) -> str:
    """A table for people: module, format, scale rule, bytes; then the parts and the total.

    Layers that are treated alike share a row unless `every_layer`; the bytes are those of the row.
    """
    rows = [("module", "format", "scales", "bytes")]
    for names, linear, chosen in _rows(plan, config, every_layer):
        rule = _SCALE_RULES[chosen].format(
            weights=plan.scales.weights, activations=plan.scales.activations
        )
        total = linear_size(linear, chosen).num_bytes * len(names)
        rows.append((_joined(names), chosen, rule, f"{total:,}"))
    sizes = plan_sizes(plan, config)
    for part in ("kv scales", "norms", "embedding, head", "vision"):
        if sizes[part].num_tensors:
            name, kind, num_bytes = part, "bf16", sizes[part].num_bytes
            if part == "kv scales":
                kind = plan.kv_cache
            elif part == "embedding, head" and "head" in plan.formats:
                # The head has a row of its own.
                name, num_bytes = "embedding", num_bytes - head_size(plan, config).num_bytes
            rows.append((name, kind, "-", f"{num_bytes:,}"))
    size = plan_size(plan, config)
    rows.append(("total", "", f"{size.num_tensors:,} tensors", f"{size.num_bytes:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}"
        for a, b, c, d in rows
    ]
    return "\n".join([f"recipe {plan.recipe_name}, KV cache {plan.kv_cache}", *lines])


def _rows(
    plan: Plan, config: ModelConfig, every_layer: bool
) -> Iterable[tuple[list[str], LinearSpec, WeightFormat]]:
    linears = [x for x in quantizable_linears(config) if x.name in plan.formats]
    if every_layer:
        return [([x.name], x, plan.formats[x.name]) for x in linears]
    first: dict[tuple[str, str, WeightFormat], LinearSpec] = {}
    names: dict[tuple[str, str, WeightFormat], list[str]] = {}
    for linear in linears:
        short = linear.name.rpartition(".")[2]
        key = (str(linear.group), short, plan.formats[linear.name])
        first.setdefault(key, linear)
        names.setdefault(key, []).append(linear.name)
    return [(names[key], first[key], key[2]) for key in names]


def _joined(names: list[str]) -> str:
    """`decoder.{0-3,87}.mlp.gate` for the same linear of several layers."""
    if len(names) == 1:
        return names[0]
    _, _, group, short = names[0].split(".")
    layers = [int(name.split(".")[1]) for name in names]
    runs = []
    for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        members = [layer for _, layer in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"decoder.{{{','.join(runs)}}}.{group}.{short}"
