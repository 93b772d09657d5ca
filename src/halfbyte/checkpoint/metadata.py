"""Configs beside the tensors: what a directory says it is, and what we say of our output.

Reads `config.json` (+ `hf_quant_config.json`) or `params.json`; writes the two files of a Model
Optimizer export. Architecture fields are in `fields`, foreign names in `names`.

Rules: docs/reference/formats.md, #the-two-json-files, #the-fp8-source and
#what-serving-engines-expect.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.compressed_fields import METHOD, compressed_facts
from halfbyte.checkpoint.fields import MULTIMODAL_TYPES, model_config
from halfbyte.checkpoint.names import (
    HUB_LAYOUTS,
    Dialect,
    Layout,
    canonical_module,
    detect_layout,
    foreign_module,
    foreign_name,
)
from halfbyte.checkpoint.native_fields import native_config
from halfbyte.checkpoint.shards import parse_json, scan
from halfbyte.checkpoint.strict_fields import FieldReader, Fields
from halfbyte.checkpoint.written_metadata import FP8, NVFP4, hub_config
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError, shown
from halfbyte.files import MAX_TEXT_BYTES, is_there, read_bounded
from halfbyte.modules import (
    CacheFormat,
    LinearSpec,
    WeightFormat,
    decoder_linears,
    encoder_linears,
    quantizable_linears,
)

_ALGORITHMS: dict[str, WeightFormat] = {"FP8": "fp8", "NVFP4": "nvfp4"}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the decoder's weights and cache are stored.

    formats   every canonical decoder linear -> its format, and a quantized head -> its; everything
              else is bf16
    kv_cache  what K and V are rounded to; "fp8" means that each layer has a k_scale and a v_scale
    has_row_scales    FP8 weights have a scale of each row
    has_input_scales  quantized linears have one; without, each token is rounded by its own
    """

    dialect: Dialect
    formats: Mapping[str, WeightFormat]
    kv_cache: CacheFormat
    has_row_scales: bool = False
    has_input_scales: bool = True


def is_native(directory: Path) -> bool:
    """Whether the directory holds Mistral's own layout only (`params.json`, `consolidated*`)."""
    has_hub = is_there(directory / "config.json") and any(directory.glob("model*.safetensors"))
    return not has_hub and is_there(directory / "params.json")


def read_config(directory: Path) -> tuple[ModelConfig, Quantization, Fields]:
    """What the JSON files of a checkpoint directory say, and the hub config.json as a dict.

    Headers of the shards are read for the layout and for a head of its own; a directory without
    shards is read too (layout by model_type), so that a model can be planned before it is there.
    Raises CheckpointError naming file and field.
    """
    directory = Path(directory)
    native = is_native(directory)
    if not native and not any(directory.glob("model*.safetensors*")):
        kind = read_json(directory / "config.json").get("model_type")
        layout: Layout = "hf" if kind in MULTIMODAL_TYPES else "hf-text"
        return read_config_in(directory, layout, has_head=None)
    stored = scan(directory, native=native)
    layout = detect_layout(stored)
    return read_config_in(
        directory, layout, has_head=foreign_name("head.weight", layout, "none") in stored
    )


def read_config_in(
    directory: Path, layout: Layout, *, has_head: bool | None
) -> tuple[ModelConfig, Quantization, Fields]:
    """What `read_config` gives, for a directory whose tensors are known to be spelt in `layout`."""
    if layout == "mistral":
        raw = read_json(directory / "params.json")
        config = native_config(raw, has_head=has_head)
        return config, _native_quantization(raw, config), hub_config(config)
    raw = read_json(directory / "config.json")
    config = model_config(raw, has_head=has_head)
    older_path = directory / "hf_quant_config.json"
    older = read_json(older_path) if is_there(older_path) else None
    return config, _quantization(raw.get("quantization_config"), older, config, layout), raw


def read_json(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> Fields:
    """A JSON object from a file; CheckpointError if it is missing, damaged or too large."""
    try:
        return parse_json(read_bounded(path, max_bytes), path.name)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


# --- reading what is said about quantization


def _all(config: ModelConfig, format_: WeightFormat) -> dict[str, WeightFormat]:
    return {linear.name: format_ for linear in decoder_linears(config)}


def unquantized(config: ModelConfig) -> Quantization:
    """The quantization of a checkpoint that has none: every weight is bf16."""
    return Quantization("none", _all(config, "bf16"), "bf16")


def _native_quantization(raw: Fields, config: ModelConfig) -> Quantization:
    stated = raw.get("quantization")
    if stated is None:
        return unquantized(config)
    fields = FieldReader(stated, "params.json.quantization")
    fields.must_be("qformat_weight", "fp8_e4m3")
    fields.must_be("qscheme_act", "TENSOR")
    fields.finish({})
    return Quantization("mistral-fp8", _all(config, "fp8"), "bf16")


def _quantization(
    stated: Any, older: Fields | None, config: ModelConfig, layout: Layout
) -> Quantization:
    """From config.json's `quantization_config` and from hf_quant_config.json, which must agree."""
    if stated is None and older is None:
        return unquantized(config)
    if isinstance(stated, dict) and stated.get("quant_method") == "fp8":
        return _mistral_fp8(stated, config, layout)
    if isinstance(stated, dict) and stated.get("quant_method") == METHOD:
        return _compressed(stated, config)
    found = []
    if stated is not None:
        found.append(_modelopt(_flat(stated), config, layout, "quantization_config"))
    if older is not None:
        found.append(_modelopt(_older(older), config, layout, "hf_quant_config.json"))
    if len(found) == 2 and found[0] != found[1]:
        where = next(
            (
                name
                for name in (*found[0].formats, "head")
                if found[0].formats.get(name) != found[1].formats.get(name)
            ),
            "the KV cache",
        )
        raise CheckpointError(
            f"config.json and hf_quant_config.json disagree about {where}; one of them is stale"
        )
    return found[0]


def _compressed(stated: Fields, config: ModelConfig) -> Quantization:
    """What llm-compressor says; its names are of another library's modules, in whatever layout."""
    facts = compressed_facts(stated)

    def covers(linear: LinearSpec) -> bool:
        return facts.covers(foreign_module(linear.name, layout) for layout in HUB_LAYOUTS)

    quantized = [linear.name for linear in encoder_linears(config) if covers(linear)]
    if quantized:
        raise CheckpointError(
            f"quantization_config: {quantized[0]} and {len(quantized) - 1} more linears of the "
            "image part are quantized; that is not implemented, `ignore` must name them"
        )
    formats = _all(config, "bf16")
    formats |= {linear.name: "fp8" for linear in quantizable_linears(config) if covers(linear)}
    cache: CacheFormat = "fp8" if facts.kv_is_fp8 else "bf16"
    rows, inputs = facts.has_row_scales, facts.has_input_scale
    return Quantization("compressed", formats, cache, rows, inputs)


_IGNORED_FP8 = {"dequantize": "a wish about loading, not about what is stored"}


def _mistral_fp8(stated: Fields, config: ModelConfig, layout: Layout) -> Quantization:
    fields = FieldReader(stated, "quantization_config")
    fields.must_be("quant_method", "fp8")
    fields.must_be("activation_scheme", "static")
    fields.must_be("weight_block_size", None)
    fields.must_be("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    fields.must_be("is_checkpoint_fp8_serialized", True, default=True)
    fields.must_be("kv_cache_scheme", None)
    fields.must_be("scale_fmt", None)
    kept = fields.optional("modules_to_not_convert") or []
    fields.finish(_IGNORED_FP8)
    return Quantization("mistral-fp8", _except(kept, _all(config, "fp8"), layout), "bf16")


def _except(
    kept: Any, quantized: Mapping[str, WeightFormat], layout: Layout
) -> dict[str, WeightFormat]:
    """The linears with their formats, but those that a pattern of `kept` names as bf16.

    A pattern is a module name, the name of a module above it, or either with `*`.
    """
    if not isinstance(kept, list) or not all(isinstance(pattern, str) for pattern in kept):
        raise CheckpointError("quantization_config: the exclusions must be a list of names")

    def is_kept(foreign: str) -> bool:
        return any(
            foreign == pattern or foreign.startswith(f"{pattern}.") or fnmatchcase(foreign, pattern)
            for pattern in kept
        )

    return {
        name: "bf16" if is_kept(foreign_module(name, layout)) else chosen
        for name, chosen in quantized.items()
    }


@dataclass(frozen=True, slots=True)
class _ModelOptFacts:
    """The facts both files of an export carry, wherever they stand in them."""

    algorithm: Any
    layers: Any
    kept: Any
    group_size: Any
    kv_is_fp8: bool


def _flat(stated: Any) -> _ModelOptFacts:
    """The facts in `quantization_config` of config.json."""
    if isinstance(stated, dict) and "quantization" in stated:
        raise CheckpointError(
            "quantization_config: the nested form {'quantization': …} is refused by serving "
            "engines for mixed precision; it belongs in hf_quant_config.json"
        )
    fields = FieldReader(stated, "quantization_config")
    fields.must_be("quant_method", "modelopt")
    scheme = fields.optional("kv_cache_scheme")
    if scheme not in (None, FP8):
        raise CheckpointError(
            f"quantization_config.kv_cache_scheme = {shown(scheme)}: only {FP8} or null"
        )
    groups = fields.optional("config_groups") or {}
    facts = _ModelOptFacts(
        fields.optional("quant_algo"),
        fields.optional("quantized_layers"),
        fields.optional("ignore") or [],
        fields.optional("group_size"),
        scheme is not None,
    )
    if not isinstance(groups, dict) or any(
        not isinstance(group, dict) or group.get("weights") not in (FP8, NVFP4)
        for group in groups.values()
    ):
        raise CheckpointError("quantization_config.config_groups: a group we do not implement")
    fields.finish({"producer": "who wrote it"})
    return facts


def _older(raw: Fields) -> _ModelOptFacts:
    """The facts in hf_quant_config.json."""
    outer = FieldReader(raw, "hf_quant_config.json")
    fields = FieldReader(outer.optional("quantization"), "hf_quant_config.json.quantization")
    outer.finish({"producer": "who wrote it"})
    cache = fields.must_be("kv_cache_quant_algo", None, "FP8")
    facts = _ModelOptFacts(
        fields.optional("quant_algo"),
        fields.optional("quantized_layers"),
        fields.optional("exclude_modules") or [],
        fields.optional("group_size"),
        cache == "FP8",
    )
    fields.must_be("has_zero_point", None, False)
    fields.must_be("pre_quant_scale", None, False)
    fields.finish({})
    return facts


def _modelopt(
    facts: _ModelOptFacts, config: ModelConfig, layout: Layout, where: str
) -> Quantization:
    cache: CacheFormat = "fp8" if facts.kv_is_fp8 else "bf16"
    if facts.group_size not in (None, 16):
        raise CheckpointError(
            f"{where}: NVFP4 blocks of {shown(facts.group_size)}, only 16 is implemented"
        )
    if facts.algorithm == "MIXED_PRECISION":
        return Quantization("modelopt", _mixed(facts.layers, config, layout, where), cache)
    uniform = _ALGORITHMS.get(str(facts.algorithm).upper())
    if uniform is None:
        raise CheckpointError(f"{where}: quant_algo {shown(facts.algorithm)} is not implemented")
    # A head that is not kept counts among the linears, as in vLLM (#42124).
    quantized = {linear.name: uniform for linear in quantizable_linears(config)}
    formats = _except(facts.kept, quantized, layout)
    if formats.get("head") == "bf16":
        del formats["head"]
    return Quantization("modelopt", formats, cache)


def _mixed(layers: Any, config: ModelConfig, layout: Layout, where: str) -> dict[str, WeightFormat]:
    formats = _all(config, "bf16")
    known = {linear.name for linear in quantizable_linears(config)}
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(f"{where}: MIXED_PRECISION needs quantized_layers")
    for foreign, entry in layers.items():
        name = canonical_module(foreign, layout)
        if name not in known:
            raise CheckpointError(
                f"{where}: quantized_layers names {foreign[:99]}, which is no decoder linear and "
                f"no head of its own of this model in the spelling of its tensors ({layout})"
            )
        fields = FieldReader(entry, f"{where}.quantized_layers[{foreign}]")
        algorithm = str(fields.optional("quant_algo")).upper()
        fields.must_be("group_size", None, 16)
        fields.finish({})
        if algorithm not in _ALGORITHMS:
            raise CheckpointError(
                f"{where}: {foreign}: quant_algo {algorithm[:60]} is not implemented"
            )
        formats[name] = _ALGORITHMS[algorithm]
    return formats


# --- writing
