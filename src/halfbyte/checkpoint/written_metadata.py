"""The JSON files of a checkpoint that we write: config.json and what says how it is quantized."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import halfbyte
from halfbyte.checkpoint.names import (
    Layout,
    foreign_module,
    vision_prefixes,
)
from halfbyte.checkpoint.strict_fields import Fields
from halfbyte.config import ModelConfig, TextConfig, VisionConfig
from halfbyte.errors import CheckpointError
from halfbyte.modules import (
    ATTENTION_LINEARS,
    MLP_LINEARS,
    CacheFormat,
    WeightFormat,
)

# vLLM's fallback reader asks for this name; the local version part says who really wrote it.
PRODUCER = {"name": "modelopt", "version": f"0.47.0+halfbyte.{halfbyte.__version__}"}


FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


NVFP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}


_GROUPS: dict[WeightFormat, dict[str, Any]] = {"fp8": FP8, "nvfp4": NVFP4}


# Fields of both parts of a config.json that no checkpoint of ours has otherwise.
_COMMON = {"attention_dropout": 0.0, "dtype": "bfloat16"}


def hub_config(config: ModelConfig) -> Fields:
    """A `config.json` of the hub layout that says what `config` says.

    For sources that have none (GGUF files, native checkpoints); a source's own file is copied.
    Both `tie_word_embeddings` are written, since the library's defaults for them differ, and the
    two rope fields that it fails without.
    """
    text = config.text
    fields = _hub_text(text)
    vision = config.vision
    if vision is None:
        return {"architectures": ["Ministral3ForCausalLM"], **fields}
    if vision.has_merger:
        of_class: Fields = {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "spatial_merge_size": vision.spatial_merge_size,
        }
    else:
        # Nothing before the projector: only LLaVA's class has that, here with a tower of Pixtral's.
        of_class = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_feature_select_strategy": "full",
        }
        if text.rope.kind == "default" and not text.rope.llama_4_scaling_beta:
            # What readers of that class expect beneath it.
            plain = {"rope_theta": text.rope.theta, "rope_type": "default"}
            fields |= {"model_type": "mistral", "rope_parameters": plain}
    return {
        **of_class,
        "dtype": "bfloat16",
        "image_token_index": vision.image_token_id,
        "multimodal_projector_bias": vision.projector_bias,
        "projector_hidden_act": vision.projector_activation,
        "text_config": fields,
        "tie_word_embeddings": text.tied_head,
        "vision_config": _hub_tower(vision),
        "vision_feature_layer": vision.feature_layer,
    }


def _hub_text(text: TextConfig) -> Fields:
    return {
        **_COMMON,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": _one_or_list(text.eos_token_ids),
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "hidden_size": text.width,
        "initializer_range": 0.02,
        "intermediate_size": text.mlp_width,
        "max_position_embeddings": text.max_positions,
        "model_type": "ministral3",
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "pad_token_id": text.pad_token_id,
        "rms_norm_eps": text.norm_eps,
        "rope_parameters": _rope_fields(text),
        "sliding_window": None,
        "tie_word_embeddings": text.tied_head,
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }


def _hub_tower(vision: VisionConfig) -> Fields:
    return {
        **_COMMON,
        "head_dim": vision.head_dim,
        "hidden_act": vision.activation,
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "initializer_range": 0.02,
        "intermediate_size": vision.mlp_width,
        "model_type": "pixtral",
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
        "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "default"},
    }


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None


def _rope_fields(text: TextConfig) -> Fields:
    rope = text.rope
    fields: Fields = {
        "llama_4_scaling_beta": rope.llama_4_scaling_beta,
        "original_max_position_embeddings": rope.original_max_positions or text.max_positions,
        "rope_theta": rope.theta,
        "rope_type": rope.kind,
    }
    if rope.kind == "yarn":
        fields |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "factor": rope.factor,
            "max_position_embeddings": text.max_positions,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "type": "yarn",
        }
    return dict(sorted(fields.items()))


def mistral_fp8_config(raw_config: Mapping[str, Any], layout: Layout) -> Fields:
    """`config.json` of the FP8 dialect in which the model is published: everything FP8.

    raw_config   the bf16 checkpoint's config.json; copied but for `quantization_config`
    """
    kept = [foreign_module("head", layout)]
    if "vision_config" in raw_config:
        kept = [*(prefix.rstrip(".") for prefix in vision_prefixes(layout)), *kept]
    return {
        **_without_quantization(raw_config),
        "quantization_config": {
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": kept,
            "quant_method": "fp8",
            "weight_block_size": None,
        },
    }


def modelopt_configs(
    raw_config: Mapping[str, Any],
    formats: Mapping[str, WeightFormat],
    kv_cache: CacheFormat,
    layout: Layout,
) -> tuple[Fields, Fields]:
    """`config.json` and `hf_quant_config.json` of a Model Optimizer export.

    raw_config   the source's config.json; copied but for `quantization_config`
    formats      canonical decoder linear -> format, every one of them, and a quantized head; any
                 order
    layout       the spelling of the tensors that go with it

    Two formats make a MIXED_PRECISION checkpoint that lists its layers, one format a uniform one
    that lists what is left out. Raises CheckpointError if nothing is quantized.
    """
    names = sorted(formats, key=_model_order)
    quantized = {name: formats[name] for name in names if formats[name] != "bf16"}
    found = list(dict.fromkeys(quantized.values()))
    if not found:
        raise CheckpointError("nothing is quantized: there is no Model Optimizer export of that")
    if len(found) > 1:
        stated, older = _mixed_facts(quantized, found, layout)
    else:
        kept = _exclusions(names, formats, layout, has_vision="vision_config" in raw_config)
        stated, older = _uniform_facts(found[0], kept)
    scheme = {"kv_cache_scheme": dict(FP8)} if kv_cache == "fp8" else {}
    cache_algorithm = "FP8" if kv_cache == "fp8" else None
    quantization_config = {
        **stated,
        **scheme,
        "producer": dict(PRODUCER),
        "quant_method": "modelopt",
    }
    config = {
        **_without_quantization(raw_config),
        "quantization_config": quantization_config,
    }
    algorithm = older.pop("quant_algo")
    return config, {
        "producer": dict(PRODUCER),
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": cache_algorithm,
            **older,
        },
    }


def _without_quantization(raw_config: Mapping[str, Any]) -> Fields:
    dropped = ("quantization_config", "compression_config")
    return {key: value for key, value in raw_config.items() if key not in dropped}


def _model_order(name: str) -> tuple[float, int]:
    if name == "head":
        return math.inf, 0
    _, layer, _, short = name.split(".")
    return int(layer), (*ATTENTION_LINEARS, *MLP_LINEARS).index(short)


def _mixed_facts(
    quantized: dict[str, WeightFormat], found: list[WeightFormat], layout: Layout
) -> tuple[Fields, Fields]:
    spelt = {foreign_module(name, layout): chosen for name, chosen in quantized.items()}
    groups = {
        f"group_{number}": {
            "input_activations": dict(_GROUPS[chosen]),
            "weights": dict(_GROUPS[chosen]),
            "targets": sorted(name for name, other in spelt.items() if other == chosen),
        }
        for number, chosen in enumerate(found)
    }
    layers = {
        name: {"quant_algo": chosen.upper(), **({"group_size": 16} if chosen == "nvfp4" else {})}
        for name, chosen in spelt.items()
    }
    stated = {
        "config_groups": groups,
        "quantized_layers": layers,
        "ignore": [],
        "quant_algo": "MIXED_PRECISION",
    }
    return stated, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def _uniform_facts(chosen: WeightFormat, kept: list[str]) -> tuple[Fields, Fields]:
    group = {
        "input_activations": dict(_GROUPS[chosen]),
        "weights": dict(_GROUPS[chosen]),
        "targets": ["Linear"],
    }
    size = {"group_size": 16} if chosen == "nvfp4" else {}
    stated = {
        "config_groups": {"group_0": group},
        "ignore": kept,
        "quant_algo": chosen.upper(),
        **size,
    }
    return stated, {"quant_algo": chosen.upper(), **size, "exclude_modules": kept}


def _exclusions(
    names: list[str],
    formats: Mapping[str, WeightFormat],
    layout: Layout,
    *,
    has_vision: bool,
) -> list[str]:
    """What a uniform checkpoint leaves in bf16, as the shortest patterns that match nothing else.

    Beneath a module without a quantized linear everything is starred: `model.layers.3*`, or
    `model.layers.3.*` where there is a layer 31. Same patterns as Model Optimizer writes.
    """
    kept = [name for name in ("embedding", "head", *names) if formats.get(name, "bf16") == "bf16"]
    modules = [foreign_module(name, layout) for name in kept]
    if has_vision:
        modules += [f"{prefix}linear" for prefix in vision_prefixes(layout)]
    beginnings: set[str] = set()
    for name in names:
        if formats[name] != "bf16":
            spelt = foreign_module(name, layout)
            beginnings.update(spelt[:end] for end in range(len(spelt) + 1))
    return sorted({_pattern(module, beginnings) for module in modules})


def _pattern(module: str, beginnings: Collection[str]) -> str:
    """The shortest pattern for a module that matches nothing that begins in one of these ways."""
    parts = module.split(".")
    for count in range(1, len(parts)):
        above = ".".join(parts[:count])
        if above not in beginnings:
            return f"{above}*"
        if f"{above}." not in beginnings:
            return f"{above}.*"
    return module
