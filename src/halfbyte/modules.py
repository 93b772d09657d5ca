"""Canonical names: every linear of a model, listed once, in order.

Foreign names exist only in `checkpoint.names`. A canonical tensor name is a module name, a dot and
a role:

    embedding.weight                     (V, D)
    decoder.I.attention_norm.weight      (D,)
    decoder.I.attention.{q,k,v,o}.ROLE
    decoder.I.attention.{k_scale,v_scale}  scalars of the KV cache (no further role)
    decoder.I.mlp_norm.weight            (D,)
    decoder.I.mlp.{gate,up,down}.ROLE
    norm.weight                          (D,)
    head.weight                          (V, D)
    encoder.patch.weight, encoder.norm.weight
    encoder.I.attention_norm.weight, encoder.I.attention.{q,k,v,o}.weight
    encoder.I.mlp_norm.weight, encoder.I.mlp.{gate,up,down}.weight
    projector.norm.weight, projector.merge.weight, projector.{in,out}.{weight,bias}
    eagle.fuse.ROLE                      (D, 2 D), only in a draft model, beside decoder.I and norm

ROLE of a linear: `weight` (bf16, e4m3 codes or packed e2m1 codes), `weight_scale` (FP8: f32
scalar; NVFP4: e4m3 per 16 inputs), `tensor_scale` (NVFP4 only, f32 scalar), `input_scale` (f32
scalar; in a Mistral FP8 source the same meaning is stored as `activation_scale`).
"""

from dataclasses import dataclass
from typing import Literal

from halfbyte.config import ModelConfig

Part = Literal["decoder", "encoder", "projector", "embedding", "head", "eagle"]
Group = Literal["attention", "mlp", ""]
WeightFormat = Literal["bf16", "fp8", "nvfp4"]
CacheFormat = Literal["bf16", "fp8"]
# What a quantized linear computes (decision 0004).
Mode = Literal["weight_only", "declared", "fp8_declared"]
# By what an FP8 linear rounds its activations: the checkpoint's scale where it has one, that scale
# or nothing, or the largest value of each token (decision 0157).
Fp8Activations = Literal["auto", "static", "per-token"]

ATTENTION_LINEARS = ("q", "k", "v", "o")
MLP_LINEARS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear of the model: `name` is canonical, the weight is (out_features, in_features)."""

    name: str
    part: Part
    group: Group
    layer: int | None
    out_features: int
    in_features: int


def decoder_linears(config: ModelConfig) -> list[LinearSpec]:
    """Every linear of the decoder layers, in order q k v o gate up down, layer by layer."""
    text = config.text
    query, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    shapes: tuple[tuple[Group, str, int, int], ...] = (
        ("attention", "q", query, text.width),
        ("attention", "k", kv, text.width),
        ("attention", "v", kv, text.width),
        ("attention", "o", text.width, query),
        ("mlp", "gate", text.mlp_width, text.width),
        ("mlp", "up", text.mlp_width, text.width),
        ("mlp", "down", text.width, text.mlp_width),
    )
    return [
        LinearSpec(f"decoder.{layer}.{group}.{short}", "decoder", group, layer, out, in_)
        for layer in range(text.num_layers)
        for group, short, out, in_ in shapes
    ]


def encoder_linears(config: ModelConfig) -> list[LinearSpec]:
    """Every linear of the vision encoder and the projector; empty for text-only models."""
    vision = config.vision
    if vision is None:
        return []
    heads = vision.num_heads * vision.head_dim
    shapes: tuple[tuple[Group, str, int, int], ...] = (
        ("attention", "q", heads, vision.width),
        ("attention", "k", heads, vision.width),
        ("attention", "v", heads, vision.width),
        ("attention", "o", vision.width, heads),
        ("mlp", "gate", vision.mlp_width, vision.width),
        ("mlp", "up", vision.mlp_width, vision.width),
        ("mlp", "down", vision.width, vision.mlp_width),
    )
    linears = [
        LinearSpec(f"encoder.{layer}.{group}.{short}", "encoder", group, layer, out, in_)
        for layer in range(vision.num_layers)
        for group, short, out, in_ in shapes
    ]
    merged = vision.width * vision.spatial_merge_size**2
    width = config.text.width
    merge = LinearSpec("projector.merge", "projector", "", None, vision.width, merged)
    return [
        *linears,
        *([merge] if vision.has_merger else []),
        LinearSpec("projector.in", "projector", "", None, width, vision.width),
        LinearSpec("projector.out", "projector", "", None, width, width),
    ]


def head_linear(config: ModelConfig) -> LinearSpec:
    """The output head, which a tied model shares with its embedding."""
    text = config.text
    return LinearSpec("head", "head", "", None, text.vocab_size, text.width)


def quantizable_linears(config: ModelConfig) -> list[LinearSpec]:
    """Every linear that may be stored in a narrower format: the decoder's, and a head of its own.

    A tied head is the embedding, which is looked up and stays bf16.
    """
    head = [] if config.text.tied_head else [head_linear(config)]
    return [*decoder_linears(config), *head]


def linears(config: ModelConfig) -> list[LinearSpec]:
    """Every linear of the model: decoder, head, then encoder and projector."""
    return [*decoder_linears(config), head_linear(config), *encoder_linears(config)]


def eagle_fuse(config: ModelConfig) -> LinearSpec:
    """What joins a token's embedding and the hidden state before it, in a draft model."""
    width = config.text.width
    return LinearSpec("eagle.fuse", "eagle", "", None, width, 2 * width)


def fused_partners(name: str) -> tuple[str, ...]:
    """Names, itself included, of the linears that read the same input as linear `name`.

    `decoder.4.mlp.up` -> (`decoder.4.mlp.gate`, `decoder.4.mlp.up`). Engines run such a group as
    one product, so its members carry one format, and an NVFP4 group one tensor scale.
    """
    prefix, _, short = name.rpartition(".")
    for group in (("q", "k", "v"), ("gate", "up")):
        if short in group:
            return tuple(f"{prefix}.{member}" for member in group)
    return (name,)
