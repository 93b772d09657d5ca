"""Canonical names and the four foreign layouts they are stored under; rotary row order.

Foreign names exist here and in `metadata` only. A layout is a way to spell module names:

    hf        model.language_model.layers.N…, model.vision_tower.…, lm_head.weight
    hf-old    language_model.model.layers.N…, vision_tower.…, language_model.lm_head.weight
    hf-text   model.layers.N…, lm_head.weight (text only)
    mistral   layers.N.attention.wq…, vision_encoder.…, output.weight (consolidated files)

and a dialect a way to spell the roles of a quantized linear. `foreign_name` and `canonical_name`
are inverse to each other for every tensor that a model of ours can have.

Rules: docs/reference/formats.md#names-and-layouts. Source: `transformers` (Mistral3, Ministral3).
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Literal

from torch import Tensor

from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError

Layout = Literal["hf", "hf-old", "hf-text", "mistral"]
Dialect = Literal["none", "mistral-fp8", "modelopt", "compressed"]

LAYOUTS: tuple[Layout, ...] = ("hf", "hf-old", "hf-text", "mistral")
HUB_LAYOUTS: tuple[Layout, ...] = ("hf", "hf-old", "hf-text")

# canonical role -> foreign role
_ROLES_MODELOPT = {
    "weight": "weight",
    "weight_scale": "weight_scale",
    "tensor_scale": "weight_scale_2",
    "input_scale": "input_scale",
}
_ROLES_MISTRAL_HF = {
    "weight": "weight",
    "weight_scale": "weight_scale_inv",
    "input_scale": "activation_scale",
}
_ROLES_MISTRAL_NATIVE = {
    "weight": "weight",
    "weight_scale": "qscale_weight",
    "input_scale": "qscale_act",
}
# As llm-compressor writes it; scales of the cache hang under the attention itself.
_ROLES_COMPRESSED = {
    "weight": "weight",
    "weight_scale": "weight_scale",
    "input_scale": "input_scale",
}
_ROLES_PLAIN = {"weight": "weight"}
_SCALE_ROLES = {
    *(foreign for roles in (_ROLES_MODELOPT, _ROLES_MISTRAL_HF, _ROLES_MISTRAL_NATIVE)
      for foreign in roles.values() if foreign != "weight"),
    "k_scale",
    "v_scale",
}  # fmt: skip


def is_scale(foreign: str) -> bool:
    """Whether a stored tensor of this name scales others, in any dialect; the rest is the model."""
    return foreign.rpartition(".")[2] in _SCALE_ROLES


# Text part of the hub layouts, below their prefix: canonical module -> foreign module.
_HUB_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_NATIVE_LAYER = {
    "attention_norm": "attention_norm",
    "attention.q": "attention.wq",
    "attention.k": "attention.wk",
    "attention.v": "attention.wv",
    "attention.o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}
# The hub's vision tower keeps the native norm and MLP group names but the hub's linear names.
_HUB_ENCODER_LAYER = {
    "attention_norm": "attention_norm",
    "attention.q": "attention.q_proj",
    "attention.k": "attention.k_proj",
    "attention.v": "attention.v_proj",
    "attention.o": "attention.o_proj",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.gate_proj",
    "mlp.up": "feed_forward.up_proj",
    "mlp.down": "feed_forward.down_proj",
}
_HUB_PROJECTOR = {
    "projector.norm": "norm",
    "projector.merge": "patch_merger.merging_layer",
    "projector.in": "linear_1",
    "projector.out": "linear_2",
}
_NATIVE_PROJECTOR = {
    "projector.norm": "pre_mm_projector_norm",
    "projector.merge": "patch_merger.merging_layer",
    "projector.in": "vision_language_adapter.w_in",
    "projector.out": "vision_language_adapter.w_out",
}

_DECODER_PREFIX: dict[Layout, str] = {
    "hf": "model.language_model.",
    "hf-old": "language_model.model.",
    "hf-text": "model.",
    "mistral": "",
}
_TOWER_PREFIX: dict[Layout, str] = {
    "hf": "model.vision_tower.",
    "hf-old": "vision_tower.",
    "hf-text": "model.vision_tower.",
    "mistral": "vision_encoder.",
}
_PROJECTOR_PREFIX: dict[Layout, str] = {
    "hf": "model.multi_modal_projector.",
    "hf-old": "multi_modal_projector.",
    "hf-text": "model.multi_modal_projector.",
    "mistral": "",
}
_HEAD: dict[Layout, str] = {
    "hf": "lm_head",
    "hf-old": "language_model.lm_head",
    "hf-text": "lm_head",
    "mistral": "output",
}

_LAYERED = re.compile(r"(decoder|encoder)\.(0|[1-9]\d*)\.(.+)")


def vision_prefixes(layout: Layout) -> tuple[str, str]:
    """What names of the vision tower and of the projector begin with (hub layouts)."""
    return _TOWER_PREFIX[layout], _PROJECTOR_PREFIX[layout]


@cache
def _roles(layout: Layout, dialect: Dialect) -> dict[str, str]:
    if dialect == "mistral-fp8":
        return _ROLES_MISTRAL_NATIVE if layout == "mistral" else _ROLES_MISTRAL_HF
    tables = {
        "none": _ROLES_PLAIN,
        "modelopt": _ROLES_MODELOPT,
        "compressed": _ROLES_COMPRESSED,
    }
    return tables[dialect]


@cache
def _fixed_modules(layout: Layout) -> dict[str, str]:
    """Canonical -> foreign modules that stand outside numbered layers."""
    native = layout == "mistral"
    decoder, tower = _DECODER_PREFIX[layout], _TOWER_PREFIX[layout]
    projector = _NATIVE_PROJECTOR if native else _HUB_PROJECTOR
    return {
        "embedding": "tok_embeddings" if native else f"{decoder}embed_tokens",
        "norm": f"{decoder}norm",
        "head": _HEAD[layout],
        "encoder.patch": f"{tower}patch_conv",
        "encoder.norm": f"{tower}ln_pre",
        **{name: _PROJECTOR_PREFIX[layout] + foreign for name, foreign in projector.items()},
        **({"eagle.fuse": "eagle_linear"} if native else {}),
    }


def foreign_module(name: str, layout: Layout) -> str:
    """The foreign spelling of canonical module `name`, e.g. `decoder.4.mlp.up` -> `….up_proj`.

    Raises CheckpointError for a name that is not canonical.
    """
    fixed = _fixed_modules(layout).get(name)
    if fixed is not None:
        return fixed
    match = _LAYERED.fullmatch(name)
    if match:
        part, layer, rest = match.groups()
        if part == "decoder":
            table = _NATIVE_LAYER if layout == "mistral" else _HUB_LAYER
            prefix = f"{_DECODER_PREFIX[layout]}layers."
        else:
            table = _NATIVE_LAYER if layout == "mistral" else _HUB_ENCODER_LAYER
            prefix = f"{_TOWER_PREFIX[layout]}transformer.layers."
        if rest in table:
            return f"{prefix}{layer}.{table[rest]}"
    raise CheckpointError(f"{name} is not a canonical module name")


def foreign_name(name: str, layout: Layout, dialect: Dialect) -> str:
    """The spelling of canonical tensor `name` in a foreign layout and dialect.

    `decoder.4.mlp.up.tensor_scale` -> `model.language_model.layers.4.mlp.up_proj.weight_scale_2`
    (hf, modelopt). Raises CheckpointError for a name or role that the dialect does not have.
    """
    module, _, role = name.rpartition(".")
    if role in ("k_scale", "v_scale"):
        # Scales of the KV cache hang under the projection they belong to.
        home = foreign_module(f"{module}.{role[0]}", layout)
        return f"{home.rpartition('.')[0] if dialect == 'compressed' else home}.{role}"
    if role == "bias":
        return f"{foreign_module(module, layout)}.bias"
    foreign_role = _roles(layout, dialect).get(role)
    if foreign_role is None:
        raise CheckpointError(f"{name}: dialect {dialect} has no role {role}")
    return f"{foreign_module(module, layout)}.{foreign_role}"


@cache
def _reverse_fixed(layout: Layout) -> dict[str, str]:
    return {foreign: name for name, foreign in _fixed_modules(layout).items()}


@cache
def _layer_pattern(layout: Layout, part: str) -> tuple[re.Pattern[str], dict[str, str]]:
    if part == "decoder":
        prefix = f"{_DECODER_PREFIX[layout]}layers."
        table = _NATIVE_LAYER if layout == "mistral" else _HUB_LAYER
    else:
        prefix = f"{_TOWER_PREFIX[layout]}transformer.layers."
        table = _NATIVE_LAYER if layout == "mistral" else _HUB_ENCODER_LAYER
    pattern = re.compile(re.escape(prefix) + r"(0|[1-9]\d*)\.(.+)")
    return pattern, {foreign: name for name, foreign in table.items()}


def canonical_module(foreign: str, layout: Layout) -> str | None:
    """The canonical name of a foreign module, or None if the layout has no such module."""
    fixed = _reverse_fixed(layout).get(foreign)
    if fixed is not None:
        return fixed
    for part in ("decoder", "encoder"):
        pattern, table = _layer_pattern(layout, part)
        match = pattern.fullmatch(foreign)
        if match and match[2] in table:
            return f"{part}.{match[1]}.{table[match[2]]}"
    return None


def canonical_name(foreign: str, layout: Layout, dialect: Dialect) -> str | None:
    """The canonical name of a foreign tensor, or None if layout and dialect have no such tensor."""
    module, _, role = foreign.rpartition(".")
    if dialect == "compressed" and role in ("k_scale", "v_scale"):
        module = f"{module}.{role[0]}_proj"
    canonical = canonical_module(module, layout)
    if canonical is None:
        return None
    if role in ("k_scale", "v_scale"):
        attention, _, short = canonical.rpartition(".")
        is_home = canonical.startswith("decoder.") and attention.endswith(".attention")
        return f"{attention}.{role}" if is_home and short == role[0] else None
    if role == "bias":
        return f"{canonical}.bias" if canonical in ("projector.in", "projector.out") else None
    for ours, theirs in _roles(layout, dialect).items():
        if role == theirs:
            is_linear = canonical.startswith(("decoder.", "eagle.", "head"))
            is_linear = is_linear and "norm" not in canonical
            return f"{canonical}.{ours}" if ours == "weight" or is_linear else None
    return None


def detect_layout(foreign_names: Iterable[str]) -> Layout:
    """Which layout these tensor names are spelt in, told by the embedding and the layers.

    Raises CheckpointError if none fits.
    """
    names = set(foreign_names)
    for layout in LAYOUTS:
        if foreign_name("embedding.weight", layout, "none") in names:
            return layout
    some = ", ".join(sorted(names)[:3])
    raise CheckpointError(
        f"the layout is not known: none of {len(names)} tensors is an embedding ({some}, …)"
    )


def rotary_heads(name: str, config: ModelConfig) -> int | None:
    """How many heads' rotary pairs the rows of tensor `name` hold; None if it holds none.

    Native files interleave a head's pairs, hub files store them as two halves, in text and vision
    alike; so the rows of q and k differ between the two. Only weights (and, for NVFP4, their block
    scales) have rows.
    """
    match = _LAYERED.fullmatch(name)
    if match is None:
        return None
    part, _, rest = match.groups()
    if rest not in (
        "attention.q.weight",
        "attention.k.weight",
        "attention.q.weight_scale",
        "attention.k.weight_scale",
    ):
        return None
    if part == "encoder":
        return config.vision.num_heads if config.vision else None
    return config.text.num_heads if rest.startswith("attention.q") else config.text.num_kv_heads


def native_to_hub_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k from interleaved pairs (native, GGUF) to two halves (hub); a copy.

    Worked example, one head of 6 rows: native rows 0 1 2 3 4 5 hold pairs (0,1) (2,3) (4,5); the
    hub wants first members, then second ones: 0 2 4 1 3 5.
    """
    rows = weight.shape[0]
    head_dim = rows // num_heads
    return (
        weight.reshape(num_heads, head_dim // 2, 2, *weight.shape[1:])
        .transpose(1, 2)
        .reshape(weight.shape)
    )


def hub_to_native_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Undo `native_to_hub_rows`: rows of q or k from two halves to interleaved pairs; a copy."""
    rows = weight.shape[0]
    head_dim = rows // num_heads
    return (
        weight.reshape(num_heads, 2, head_dim // 2, *weight.shape[1:])
        .transpose(1, 2)
        .reshape(weight.shape)
    )
