"""What each calibration method would lose on a linear, whichever was chosen, side by side.

A linear is judged by its output: sampled inputs through sampled rows of the weight, both as the
method would round them, against the same product in f32. Weights alone would not tell `headroom`
from `max`. Called by `report`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.formats.fp8 import Profile, decode_fp8, round_to_fp8
from halfbyte.formats.measure import relative_error
from halfbyte.formats.nvfp4 import decode_nvfp4, round_to_nvfp4
from halfbyte.quantize.layer import QuantizedLinear, SourceWeight
from halfbyte.quantize.scales import METHODS, encode_weight_nvfp4, input_scale

# Output features compared, evenly spaced; with 64 tokens that is 4,096 outputs a linear.
_ROWS = 64


def output_errors(
    linear: QuantizedLinear, sample_TI: Tensor | None, observed: Tensor, profile: Profile
) -> dict[str, float | None]:
    """Method -> SQNR of the linear's output in dB (None if nothing was lost).

    sample_TI  some of its calibration inputs, bf16; None gives no errors
    observed   the magnitude that calibration found, 0-d

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
    for method, scales in METHODS.items():
        if scales.activations == "none":
            continue
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
        errors[method] = None if error == 0 else round(-20 * math.log10(error), 2)
    return errors


def _stored(tensors: Mapping[str, Tensor], linear: QuantizedLinear, step: int) -> Tensor:
    """The same rows of an FP8 weight as it was encoded."""
    codes = tensors[f"{linear.name}.weight"].view(torch.uint8)[::step][:_ROWS]
    scale = tensors[f"{linear.name}.weight_scale"]
    return decode_fp8(codes.contiguous().view(torch.float8_e4m3fn), scale)
