"""YAML -> a frozen Recipe. A recipe is a partition: rules have no order, and none may overlap.

What a recipe means for a model of a certain depth is `plan`'s business. Files are read strictly:
a missing or unknown key is an error that names it. Recipes that come with the package are in
`library/`; decision 0007 says why there are no wildcards.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast, get_args

from halfbyte.errors import UsageError, shown
from halfbyte.modules import (
    ATTENTION_LINEARS,
    MLP_LINEARS,
    CacheFormat,
    WeightFormat,
)
from halfbyte.recipe.strict_yaml import parse_yaml, read_yaml_text

KeptPart = Literal["embedding", "head", "vision", "projector"]
RuleGroup = Literal["attention", "mlp"]
WeightScales = Literal["amax", "mse", "weighted", "gptq"]
ActivationScales = Literal["amax", "headroom", "none"]
CacheScales = Literal["measured", "constant"]
# What cannot be chosen without calibration data.
NEED_DATA: tuple[WeightScales, ...] = ("weighted", "gptq")
BlockOrder = Literal["columns", "energy"]

_GROUP_LINEARS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION_LINEARS,
    "mlp": MLP_LINEARS,
}


@dataclass(frozen=True, slots=True)
class Share:
    """The first `percent` of a model's layers: as many as are nearest, and one at least."""

    percent: int

    def __str__(self) -> str:
        return f"{self.percent}%"

    def layers(self, num_layers: int) -> int:
        """How many layers the share is in a model of this depth; a half is rounded up."""
        return max((2 * num_layers * self.percent + 100) // 200, 1)


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers `first` to `last`, both included; negative numbers count from the end (-1 is last).

    A share as `last` ends with the last layer of that share, as `first` it begins behind it, so
    that `0..5%` and `5%..-1` are all layers, each once.
    """

    first: int | Share
    last: int | Share

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}..{self.last}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Gives one format to the linears of one group, or to the output head.

    group    None for the head, which is one linear
    layers   None means all
    linears  short names within the group (q, k, v, o or gate, up, down)
    """

    group: RuleGroup | None
    linears: tuple[str, ...]
    layers: tuple[LayerRange, ...] | None
    format: WeightFormat


# What inputs of a norm's readers are smoothed by where nothing else is said; 0.25 to 0.6 differ
# little (decision 0091).
DEFAULT_SMOOTHING = 0.4


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ goes through a weight (decision 0090).

    damping  share of the mean second moment that is added to every input's: more trusts
             calibration less
    order    which 16-blocks are rounded first: as they stand, or by falling energy of their inputs
    block    columns whose errors reach the others by one product; changes rounding of sums only
    sweeps   how often every 16-block is chosen anew afterwards
    """

    damping: float = 0.2
    order: BlockOrder = "energy"
    block: int = 128
    sweeps: int = 2


@dataclass(frozen=True, slots=True)
class Scales:
    """How a recipe wants scales and codes to be chosen.

    weights      block scales of NVFP4 by maxima, by squared error, by squared error weighted by
                 the inputs' squares; or scales and codes by GPTQ
    activations  input scales by maxima, or twice that; `none` asks for no data: they are constants
    cache        `constant` casts keys and values to FP8 as they are (scale 1); without data there
                 is nothing else
    smoothing    exponent by which inputs of NVFP4 gate and up are brought closer to each other; 0
                 leaves them
    """

    weights: WeightScales = "amax"
    activations: ActivationScales = "amax"
    cache: CacheScales = "measured"
    smoothing: float = 0.0
    gptq: GptqOptions = GptqOptions()

    def facts(self) -> dict[str, Any]:
        """For manifests, as JSON values: what has no effect is left out."""
        found = asdict(self)
        if not self.smoothing:
            del found["smoothing"]
        if self.weights != "gptq":
            del found["gptq"]
        return found


@dataclass(frozen=True, slots=True)
class Calibration:
    """From which text a recipe takes its statistics."""

    blend: str
    samples: int
    tokens_per_sample: int
    seed: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Who gets which format. `source` is the file it came from, for messages."""

    name: str
    rules: tuple[Rule, ...]
    keep: frozenset[KeptPart]
    kv_cache: CacheFormat
    scales: Scales
    calibration: Calibration
    source: str


def library_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = resources.files("halfbyte.recipe") / "library"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe of the library by name, or a YAML file by path.

    Raises UsageError naming the file, the rule and the key at fault.
    """
    name = str(name_or_path)
    if name in library_recipes():
        text = (resources.files("halfbyte.recipe") / "library" / f"{name}.yaml").read_text("utf-8")
        return parse_recipe(text, f"{name}.yaml")
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = ", ".join(library_recipes())
        raise UsageError(f"there is no recipe {name!r}; there are {known}, or give a .yaml file")
    return parse_recipe(read_yaml_text(path, "recipe"), path.name)


def parse_recipe(text: str, source: str) -> Recipe:
    """A recipe from YAML text; `source` names it in messages. Raises UsageError."""
    where = f"recipe {source}"
    raw = parse_yaml(text, where)
    keys = ("name", "rules", "keep", "kv_cache", "scales", "calibration")
    fields = _fields(raw, where, keys)
    rules = fields["rules"]
    if not isinstance(rules, list) or not rules:
        raise UsageError(f"{where}: rules must be a list with at least one rule")
    if not isinstance(fields["name"], str) or not fields["name"]:
        raise UsageError(f"{where}: name must be a word")
    return Recipe(
        name=fields["name"],
        rules=tuple(_rule(rule, f"{where}, rule {i + 1}") for i, rule in enumerate(rules)),
        keep=frozenset(_keep(fields["keep"], where)),
        kv_cache=cast(
            "CacheFormat", _choice(fields["kv_cache"], CacheFormat, f"{where}, kv_cache")
        ),
        scales=_scales(fields["scales"], f"{where}, scales"),
        calibration=_calibration(fields["calibration"], f"{where}, calibration"),
        source=source,
    )


def _fields(
    raw: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> Mapping[str, Any]:
    """A mapping with exactly these keys."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: a mapping with {', '.join(required)} was expected")
    unknown = [
        key[:60] if isinstance(key, str) else shown(key)
        for key in raw
        if key not in (*required, *optional)
    ]
    if unknown:
        known = ", ".join((*required, *optional))
        raise UsageError(f"{where}: unknown key {', '.join(unknown[:4])}; there are {known}")
    missing = [key for key in required if key not in raw]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}")
    return raw


def _choice(value: Any, kinds: Any, where: str) -> str:
    allowed = get_args(kinds)
    if not isinstance(value, str) or value not in allowed:
        raise UsageError(f"{where}: {shown(value)} is not one of {', '.join(allowed)}")
    return value


def _rule(raw: Any, where: str) -> Rule:
    if isinstance(raw, dict) and raw.get("part") == "head":
        fields = _fields(raw, where, ("part", "format"))
        chosen = _choice(fields["format"], WeightFormat, f"{where}, format")
        return Rule(None, (), None, cast("WeightFormat", chosen))
    fields = _fields(raw, where, ("part", "group", "format"), ("layers", "linears"))
    if fields["part"] != "decoder":
        raise UsageError(
            f"{where}: part {shown(fields['part'])}: only the decoder and the head are quantized; "
            "name other parts under keep"
        )
    group = cast("RuleGroup", _choice(fields["group"], RuleGroup, f"{where}, group"))
    return Rule(
        group=group,
        linears=_linears(fields.get("linears"), group, where),
        layers=_layers(fields["layers"], where) if "layers" in fields else None,
        format=cast("WeightFormat", _choice(fields["format"], WeightFormat, f"{where}, format")),
    )


def _linears(value: Any, group: str, where: str) -> tuple[str, ...]:
    known = _GROUP_LINEARS[group]
    if value is None:
        return known
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: linears must be a list out of {', '.join(known)}")
    for short in value:
        if short not in known:
            raise UsageError(
                f"{where}: {group} has no linear {shown(short)}, only {', '.join(known)}"
            )
    return tuple(value)


# No model has a layer of more than six digits.
_RANGE = re.compile(
    r"(\d{1,6})-(\d{1,6})|(-?\d{1,6}|[1-9]\d?%)\.\.(-?\d{1,6}|[1-9]\d?%)|(-?\d{1,6})"
)


def _layers(value: Any, where: str) -> tuple[LayerRange, ...]:
    """`[0-3, -1]`, `[4..-2]`, `[0..5%]`: numbers, `A-B` from the start, `A..B` from either end."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UsageError(f"{where}: layers is empty; leave it out to mean all")
    return tuple(_layer_range(item, where) for item in items)


def _layer_range(item: Any, where: str) -> LayerRange:
    is_short = isinstance(item, str) or (type(item) is int and abs(item) < 10**6)
    match = _RANGE.fullmatch(str(item)) if is_short else None
    if match is None:
        raise UsageError(
            f"{where}: {shown(item)} is not a layer; write 3, -1 (the last), 0-3, "
            "4..-2 (from the fifth to the last but one), or 0..5% (the first twentieth)"
        )
    ends = [_end(text) for text in match.groups() if text is not None]
    return LayerRange(ends[0], ends[-1])


def _end(text: str) -> int | Share:
    return Share(int(text[:-1])) if text.endswith("%") else int(text)


def _keep(value: Any, where: str) -> list[KeptPart]:
    if not isinstance(value, list):
        raise UsageError(f"{where}: keep must be a list out of {', '.join(get_args(KeptPart))}")
    return [cast("KeptPart", _choice(part, KeptPart, f"{where}, keep")) for part in value]


def _scales(raw: Any, where: str) -> Scales:
    optional = ("cache", "smoothing", "gptq")
    fields = _fields(raw, where, ("weights", "activations"), optional)
    scales = Scales(
        cast("WeightScales", _choice(fields["weights"], WeightScales, f"{where}, weights")),
        cast(
            "ActivationScales",
            _choice(fields["activations"], ActivationScales, f"{where}, activations"),
        ),
        cast(
            "CacheScales", _choice(fields.get("cache", "measured"), CacheScales, f"{where}, cache")
        ),
        _number(fields.get("smoothing", 0.0), 0.0, 1.0, f"{where}, smoothing"),
        _gptq(fields.get("gptq", {}), f"{where}, gptq"),
    )
    if "gptq" in fields and scales.weights != "gptq":
        raise UsageError(f"{where}: gptq has options, but weights are {scales.weights}")
    if scales.activations == "none" and (scales.smoothing or scales.weights in NEED_DATA):
        what = f"weights: {scales.weights}" if scales.weights in NEED_DATA else "smoothing"
        raise UsageError(f"{where}: {what} needs calibration data; activations: none runs none")
    return scales


def _gptq(raw: Any, where: str) -> GptqOptions:
    default = GptqOptions()
    fields = _fields(raw, where, (), ("damping", "order", "block", "sweeps"))
    block = _whole(fields.get("block", default.block), 16, 1 << 16, f"{where}, block")
    if block % 16:
        raise UsageError(f"{where}, block: {block} is not a multiple of 16, the columns of a scale")
    return GptqOptions(
        _number(fields.get("damping", default.damping), 0.0, 100.0, f"{where}, damping"),
        cast(
            "BlockOrder", _choice(fields.get("order", default.order), BlockOrder, f"{where}, order")
        ),
        block,
        _whole(fields.get("sweeps", default.sweeps), 0, 100, f"{where}, sweeps"),
    )


def _number(value: Any, least: float, most: float, where: str) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        raise UsageError(f"{where}: {shown(value)} is not a number from {least:g} to {most:g}")
    return float(value)


def _whole(value: Any, least: int, most: int, where: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{where}: {shown(value)} is not a whole number from {least} to {most}")
    return value


_MAX_INTEGER = 2**31 - 1


def _calibration(raw: Any, where: str) -> Calibration:
    fields = _fields(raw, where, ("blend", "samples", "tokens_per_sample", "seed"))
    for key, least in (("samples", 1), ("tokens_per_sample", 1), ("seed", 0)):
        if type(fields[key]) is not int or not least <= fields[key] <= _MAX_INTEGER:
            raise UsageError(
                f"{where}: {key} must be a whole number of at least {least}, at most {_MAX_INTEGER}"
            )
    if not isinstance(fields["blend"], str):
        raise UsageError(f"{where}: blend must be a name or a path")
    return Calibration(**fields)
