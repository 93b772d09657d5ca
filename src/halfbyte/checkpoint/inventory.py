"""Every tensor that a checkpoint of a given architecture and quantization must hold.

`reader` compares files with it, `recipe.plan`'s sums are checked against it, `verify` counts by it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from halfbyte.checkpoint.metadata import Quantization
from halfbyte.checkpoint.names import Layout, foreign_name
from halfbyte.checkpoint.shard_plan import Shapes
from halfbyte.config import ModelConfig
from halfbyte.modules import LinearSpec, decoder_linears, eagle_fuse, encoder_linears, head_linear

_BF16 = (torch.bfloat16,)
_F32 = (torch.float32,)
# Mistral's own FP8 files hold their scalars in bf16; f32 is as good.
_SCALAR = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Expected:
    """Shape and admissible dtypes of one tensor; scalars may also be stored as one element."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def stored(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype as we write it: the first of those that may be."""
        return self.shape, self.dtypes[0]


def expected_tensors(config: ModelConfig, quantization: Quantization) -> dict[str, Expected]:
    """Canonical name -> what must be stored under it, in model order.

    The head of a tied model is absent.
    """
    return dict(_expected(config, quantization))


def shapes_to_write(config: ModelConfig, quantization: Quantization, layout: Layout) -> Shapes:
    """Foreign name -> shape and dtype of what `expected_tensors` lists, as a layout spells it."""
    return {
        foreign_name(name, layout, quantization.dialect): expected.stored
        for name, expected in expected_tensors(config, quantization).items()
    }


def expected_eagle_tensors(config: ModelConfig, quantization: Quantization) -> dict[str, Expected]:
    """What must be stored of a draft model, which uses its target's embedding and head."""
    layers = {
        name: expected
        for name, expected in _expected(config, quantization)
        if name.startswith("decoder.") or name == "norm.weight"
    }
    return {**dict(_linear(eagle_fuse(config), quantization)), **layers}


def _expected(config: ModelConfig, quantization: Quantization) -> Iterator[tuple[str, Expected]]:
    text = config.text
    norm = Expected((text.width,), _BF16)
    table = Expected((text.vocab_size, text.width), _BF16)
    yield "embedding.weight", table
    by_layer: dict[int, list[LinearSpec]] = {}
    for linear in decoder_linears(config):
        assert linear.layer is not None
        by_layer.setdefault(linear.layer, []).append(linear)
    for layer, linears in by_layer.items():
        yield f"decoder.{layer}.attention_norm.weight", norm
        yield f"decoder.{layer}.mlp_norm.weight", norm
        for linear in linears:
            yield from _linear(linear, quantization)
        if quantization.kv_cache == "fp8":
            yield f"decoder.{layer}.attention.k_scale", Expected((), _scalar_dtypes(quantization))
            yield f"decoder.{layer}.attention.v_scale", Expected((), _scalar_dtypes(quantization))
    yield "norm.weight", norm
    if "head" in quantization.formats:
        yield from _linear(head_linear(config), quantization)
    elif not text.tied_head:
        yield "head.weight", table
    yield from _vision(config)


def _linear(linear: LinearSpec, quantization: Quantization) -> Iterator[tuple[str, Expected]]:
    name, out, in_ = linear.name, linear.out_features, linear.in_features
    chosen = quantization.formats[name]
    if chosen == "bf16":
        yield f"{name}.weight", Expected((out, in_), _BF16)
        return
    scalar = Expected((), _scalar_dtypes(quantization))
    if chosen == "fp8":
        yield f"{name}.weight", Expected((out, in_), (torch.float8_e4m3fn,))
        rows = Expected((out, 1), scalar.dtypes)
        yield f"{name}.weight_scale", rows if quantization.has_row_scales else scalar
    else:
        yield f"{name}.weight", Expected((out, in_ // 2), (torch.uint8,))
        yield f"{name}.weight_scale", Expected((out, in_ // 16), (torch.float8_e4m3fn,))
        yield f"{name}.tensor_scale", scalar
    if quantization.has_input_scales:
        yield f"{name}.input_scale", scalar


def _scalar_dtypes(quantization: Quantization) -> tuple[torch.dtype, ...]:
    return _F32 if quantization.dialect in ("none", "modelopt") else _SCALAR


def _vision(config: ModelConfig) -> Iterator[tuple[str, Expected]]:
    vision = config.vision
    if vision is None:
        return
    norm = Expected((vision.width,), _BF16)
    patch = (vision.width, vision.num_channels, vision.patch_size, vision.patch_size)
    yield "encoder.patch.weight", Expected(patch, _BF16)
    yield "encoder.norm.weight", norm
    for layer in range(vision.num_layers):
        yield f"encoder.{layer}.attention_norm.weight", norm
        yield f"encoder.{layer}.mlp_norm.weight", norm
    if vision.has_merger:
        yield "projector.norm.weight", norm
    for linear in encoder_linears(config):
        shape = (linear.out_features, linear.in_features)
        yield f"{linear.name}.weight", Expected(shape, _BF16)
        if vision.projector_bias and linear.name in ("projector.in", "projector.out"):
            yield f"{linear.name}.bias", Expected((linear.out_features,), _BF16)
