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
    SEARCHED_STEPS,
    EncodedNVFP4,
    block_errors,
    block_maxima,
    block_scales,
    encode_nvfp4,
    encode_nvfp4_with,
    neighbour_scales,
    nvfp4_input_scale,
)
from halfbyte.log import say_once
from halfbyte.modules import WeightFormat, fused_partners
from halfbyte.recipe.schema import DEFAULT_SMOOTHING, ActivationScales, Scales, WeightScales

# The calibration methods by name: max mirrors the reference, none needs no data.
METHODS: Mapping[str, Scales] = {
    "max": Scales("amax", "amax"),
    "headroom": Scales("amax", "headroom"),
    "mse": Scales("mse", "amax"),
    "weighted": Scales("weighted", "amax"),
    "gptq": Scales("gptq", "amax"),
    "smooth": Scales("weighted", "amax", smoothing=DEFAULT_SMOOTHING),
    "gptq-smooth": Scales("gptq", "amax", smoothing=DEFAULT_SMOOTHING),
    "none": Scales("amax", "none"),
}

# What an input of zero is taken for, as Model-Optimizer does at export.
_ASSUMED_AMAX: dict[WeightFormat, float] = {"fp8": E4M3_MAX, "nvfp4": E2M1_MAX}

# Calibration sees the first few hundred positions of a few hundred rows; serving sees more. A
# floating-point format pays for a doubled scale only in its subnormal range.
_HEADROOM = 2.0

# Data-free input scales stand for this largest input where the source declares none.
_PINNED_AMAX = E4M3_MAX

# Smoothing moves no input by more than 2 ** 8: norm weights stay far from bf16's ends.
_MOST_SMOOTHED = 8.0


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


def encode_weight_nvfp4(
    w_OI: Tensor, tensor_scale: Tensor, rule: WeightScales, energy_I: Tensor | None = None
) -> EncodedNVFP4:
    """Encode a weight, rounding to nearest, with the block scales of a rule.

    amax      those that map each block's maximum to 6
    mse       those of least squared error
    weighted  those of least squared error of the outputs, as far as inputs are independent:
              `energy_I` says how large each one's square is on average
    """
    if rule == "amax":
        return encode_nvfp4(w_OI, tensor_scale)
    importance_I = energy_I if rule == "weighted" else None
    scale_OB = least_squares_scales(w_OI, tensor_scale, importance_I)
    return encode_nvfp4_with(w_OI, scale_OB, tensor_scale)


def least_squares_scales(
    w_OI: Tensor, tensor_scale: Tensor, importance_I: Tensor | None = None
) -> Tensor:
    """For every 16-block the e4m3 scale, of those around amax / 6, with the least squared error.

    Never worse than amax scales on any block. Blocks of zeros keep scale 1. Costs one encoding for
    each of nine candidates. Idea: block-scale sweeps of NVIDIA Model-Optimizer and "four over
    six" (Cook et al. 2025), here over e4m3 neighbours only.
    """
    first = block_scales(block_maxima(w_OI), tensor_scale).view(torch.uint8)
    best = first.clone()
    least = torch.full(first.shape, torch.inf, device=w_OI.device)
    for step in SEARCHED_STEPS:
        tried = neighbour_scales(first, step)
        errors = block_errors(w_OI, tried.view(torch.float8_e4m3fn), tensor_scale, importance_I)
        is_better = errors < least
        best[is_better] = tried[is_better]
        least = torch.minimum(least, errors)
    return best.view(torch.float8_e4m3fn)


def smoothing_factors(energy_I: Tensor, exponent: float) -> Tensor:
    """Powers of two near (rms / median rms) ** exponent, f32 (I,): what inputs are divided by.

    energy_I  mean squares of the inputs

    Norm weights are divided and weights that read the input multiplied by them, both exactly, so
    the model stays what it was; but inputs that share a block of 16 come closer to each other,
    and so less of them is lost when they are rounded to FP4. Inputs that are always zero keep 1.
    Idea: SmoothQuant (Xiao et al. 2022), AWQ (Lin et al. 2023), folded.
    """
    rms_I = energy_I.to(torch.float64).sqrt()
    lives_I = rms_I > 0
    if not bool(lives_I.any()):
        return torch.ones_like(energy_I, dtype=torch.float32)
    powers_I = (rms_I / rms_I[lives_I].median()).log2().mul_(exponent).round_()
    powers_I = torch.where(lives_I, powers_I, 0.0).clamp_(-_MOST_SMOOTHED, _MOST_SMOOTHED)
    return torch.ldexp(torch.ones_like(powers_I), powers_I.to(torch.int32)).to(torch.float32)


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
