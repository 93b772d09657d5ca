"""What each calibration method would lose on a linear, whichever was chosen, side by side.

A linear is judged by its output: sampled inputs through sampled rows of the weight, both as the
method would round them, against the same product in f32. Weights alone would not tell `headroom`
from `max`. Called by `report`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.formats.fp8 import Profile, decode_fp8, round_to_fp8
from halfbyte.formats.measure import relative_error
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4, round_to_nvfp4
from halfbyte.quantize.encode import SourceWeight
from halfbyte.quantize.layer import QuantizedLinear
from halfbyte.quantize.scales import METHODS, encode_weight_nvfp4, input_scale
from halfbyte.recipe.schema import NEED_DATA, Scales

# Output features compared, evenly spaced; with 64 tokens that is 4,096 outputs a linear.
_ROWS = 64


# What the others cost is known without sums over all inputs.
JUDGED = tuple(
    name
    for name, scales in METHODS.items()
    if scales.activations != "none" and scales.weights not in NEED_DATA and not scales.smoothing
)


def output_errors(
    linear: QuantizedLinear,
    sample_TI: Tensor | None,
    observed: Tensor,
    profile: Profile,
    chosen: Scales,
) -> dict[str, float | None]:
    """Method -> SQNR of the linear's output in dB (None if nothing was lost).

    sample_TI  some of its calibration inputs, bf16; None gives no errors
    observed   the magnitude that calibration found, 0-d
    chosen     what the checkpoint is made by: where that is none of `JUDGED`, an NVFP4 linear is
               judged as it was encoded too, under `chosen`

    `none` is left out: it runs no data.
    """
    if sample_TI is None or linear.format == "bf16":
        return {}
    source = linear.source
    step = max(1, source.stored.shape[0] // _ROWS)
    part = SourceWeight(source.name, source.stored[::step][:_ROWS].contiguous(), source.scale)
    w_OI, x_TI = part.decoded(), sample_TI.to(source.stored.device)
    exact_TO = x_TI.float() @ w_OI.float().T
    errors: dict[str, float | None] = {}
    if linear.smoothing_I is not None:
        x_TI = (x_TI.float() / linear.smoothing_I).to(x_TI.dtype)
        observed = x_TI.abs().amax()
    for method in JUDGED:
        scales = METHODS[method]
        scale = input_scale(linear.name, linear.format, observed, profile, scales.activations)
        scale = scale.to(x_TI.device)
        if linear.format == "fp8":
            rounded_TI, decoded_OI = (
                round_to_fp8(x_TI, scale),
                _stored(linear.tensors, linear, step),
            )
        else:
            tensor_scale = linear.tensors[f"{linear.name}.tensor_scale"]
            encoded = encode_weight_nvfp4(w_OI, tensor_scale, scales.weights)
            rounded_TI, decoded_OI = round_to_nvfp4(x_TI, scale), decode_nvfp4(encoded)
        error = relative_error(exact_TO, rounded_TI.float() @ decoded_OI.float().T)
        errors[method] = _decibels(error)
    is_judged = any(replace(chosen, cache="measured") == METHODS[name] for name in JUDGED)
    if linear.format == "nvfp4" and not is_judged:
        errors["chosen"] = _decibels(relative_error(exact_TO, _product(linear, x_TI, step)))
    return errors


def _decibels(error: float) -> float | None:
    return None if error == 0 else round(-20 * math.log10(error), 2)


def _product(linear: QuantizedLinear, x_TI: Tensor, step: int) -> Tensor:
    """Rounded inputs through the same rows of an NVFP4 weight as it was encoded."""
    codes, scales, tensor_scale, input_scale = (
        linear.tensors[f"{linear.name}.{role}"]
        for role in ("weight", "weight_scale", "tensor_scale", "input_scale")
    )
    part = EncodedNVFP4(codes[::step][:_ROWS], scales[::step][:_ROWS], tensor_scale)
    rounded_TI = round_to_nvfp4(x_TI, input_scale.to(x_TI.device))
    return rounded_TI.float() @ decode_nvfp4(part).float().T


def _stored(tensors: Mapping[str, Tensor], linear: QuantizedLinear, step: int) -> Tensor:
    """The same rows of an FP8 weight as it was encoded."""
    codes = tensors[f"{linear.name}.weight"].view(torch.uint8)[::step][:_ROWS]
    scale = tensors[f"{linear.name}.weight_scale"]
    return decode_fp8(codes.contiguous().view(torch.float8_e4m3fn), scale)
