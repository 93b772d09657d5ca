"""From statistics to scales: shared scales of fused groups, input and cache scales.

Called by `layer`. What a scale means is in `formats`; which rule a linear follows is the plan's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import Profile, fp8_scale
from halfbyte.formats.minifloat import E2M1_MAX, E4M3_MAX
from halfbyte.formats.nvfp4 import (
    EncodedNVFP4,
    block_errors,
    block_maxima,
    block_scales,
    encode_nvfp4,
    encode_nvfp4_with,
    nvfp4_input_scale,
)
from halfbyte.log import say_once
from halfbyte.modules import WeightFormat, fused_partners
from halfbyte.recipe.schema import ActivationScales, Scales, WeightScales

# The calibration methods by name: max mirrors the reference, none needs no data.
METHODS: Mapping[str, Scales] = {
    "max": Scales("amax", "amax"),
    "headroom": Scales("amax", "headroom"),
    "mse": Scales("mse", "amax"),
    "none": Scales("amax", "none"),
}

# What an input of zero is taken for, as Model-Optimizer does at export.
_ASSUMED_AMAX: dict[WeightFormat, float] = {"fp8": E4M3_MAX, "nvfp4": E2M1_MAX}

# Calibration sees the first few hundred positions of a few hundred rows; serving sees more. A
# floating-point format pays for a doubled scale only in its subnormal range.
_HEADROOM = 2.0

# Data-free input scales stand for this largest input where the source declares none.
_PINNED_AMAX = E4M3_MAX


def shared_maxima(
    maxima: Mapping[str, Tensor], formats: Mapping[str, WeightFormat]
) -> dict[str, Tensor]:
    """Weight maxima with NVFP4 fused groups brought to their largest member.

    maxima   canonical linear -> bf16 or f32, 0-d; must hold every partner of an NVFP4 linear
    formats  canonical linear -> its format

    Engines run gate and up as one product with one tensor scale, so both must encode with it. FP8
    groups are left alone, as Model-Optimizer leaves them.
    """
    shared = dict(maxima)
    for name in maxima:
        if formats[name] == "nvfp4":
            shared[name] = torch.stack([maxima[p] for p in fused_partners(name)]).amax()
    return shared


# e4m3 block scales tried around the one that maps the block's maximum to 6, in steps of the e4m3
# grid (8 an octave): from clipping the maximum by a fifth to mapping it to 4 and a little below.
# The first of equal errors wins.
_SEARCHED_STEPS = (0, 1, -1, 2, -2, 3, 4, 5, 6)
_LARGEST_E4M3 = 0x7E


def encode_weight_nvfp4(w_OI: Tensor, tensor_scale: Tensor, rule: WeightScales) -> EncodedNVFP4:
    """Encode a weight with block scales from block maxima, or those of least squared error."""
    if rule == "amax":
        return encode_nvfp4(w_OI, tensor_scale)
    return encode_nvfp4_with(w_OI, least_squares_scales(w_OI, tensor_scale), tensor_scale)


def least_squares_scales(w_OI: Tensor, tensor_scale: Tensor) -> Tensor:
    """For every 16-block the e4m3 scale, of those around amax / 6, with the least squared error.

    Never worse than amax scales on any block. Blocks of zeros keep scale 1. Costs one encoding for
    each of nine candidates. Idea: block-scale sweeps of NVIDIA Model-Optimizer and "four over
    six" (Cook et al. 2025), here over e4m3 neighbours only.
    """
    first = block_scales(block_maxima(w_OI), tensor_scale).view(torch.uint8)
    best = first.clone()
    least = torch.full(first.shape, torch.inf, device=w_OI.device)
    for step in _SEARCHED_STEPS:
        tried = (first.to(torch.int16) + step).clamp_(1, _LARGEST_E4M3).to(torch.uint8)
        errors = block_errors(w_OI, tried.view(torch.float8_e4m3fn), tensor_scale)
        is_better = errors < least
        best[is_better] = tried[is_better]
        least = torch.minimum(least, errors)
    return best.view(torch.float8_e4m3fn)


def input_scale(
    name: str,
    chosen: WeightFormat,
    observed: Tensor,
    profile: Profile,
    rule: ActivationScales = "amax",
) -> Tensor:
    """The f32 scale of a linear's input from its observed magnitude (bf16, 0-d).

    `headroom` leaves room for inputs twice as large. An observed zero, from a linear that
    calibration never reached, counts as 448 (FP8) or 6 (NVFP4), with a warning.
    """
    largest = observed.to(torch.float32)
    if float(largest) == 0:
        assumed = _ASSUMED_AMAX[chosen]
        say_once(f"{name}: calibration saw only zeros at its input; assuming {assumed:g}")
        largest = torch.tensor(assumed)
    elif rule == "headroom":
        largest = largest * _HEADROOM
    make = {"fp8": fp8_scale, "nvfp4": nvfp4_input_scale}[chosen]
    return make(largest, profile)


def pinned_input_scale(chosen: WeightFormat, declared: Tensor | None, profile: Profile) -> Tensor:
    """The f32 scale of a linear's input when no data is run.

    declared  the source's activation scale (amax / 448) if it has one: kept for FP8, and over 6
              for NVFP4, which then means the same largest input. Without one, 448 is assumed.
    """
    amax = torch.tensor(_PINNED_AMAX) if declared is None else declared.to(torch.float32) * E4M3_MAX
    if declared is not None and chosen == "fp8":
        return declared.to(torch.float32)
    return {"fp8": fp8_scale, "nvfp4": nvfp4_input_scale}[chosen](amax, profile)


def cache_scale(
    name: str, observed: Tensor, profile: Profile, rule: ActivationScales = "amax"
) -> Tensor:
    """The f32 scale of keys or values from their observed magnitude: amax / 448.

    Scales below 1 are normal and kept. Raises FormatError if the magnitude is zero: a scale of 0
    would turn the cache into NaN.
    """
    largest = observed.to(torch.float32) * (_HEADROOM if rule == "headroom" else 1.0)
    try:
        return fp8_scale(largest, profile)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error


def pinned_cache_scale() -> Tensor:
    """The scale of keys and values when no data is run: 1, so that they are cast as they are."""
    return torch.tensor(1.0)
