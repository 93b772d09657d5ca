"""FP8 per tensor: the scale rule, encoding in three arithmetic profiles, decoding.

Called by `quantize` (weights, KV and input scales), `checkpoint` (decoding) and `kernels`. The
bytes are those of NVIDIA Model-Optimizer (decision 0003, rules in
docs/reference/formats.md#arithmetic-of-scales-and-codes); `direct` is more accurate than both of
its ways and never the default.
"""

from typing import Literal

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.measure import chunk_values, largest_magnitude
from halfbyte.formats.minifloat import E4M3_MAX, decode_e4m3, encode_e4m3

# ieee    Model-Optimizer on a CPU: true divisions, quotient rounded to bf16 before e4m3
# cuda    Model-Optimizer on a GPU: scales multiply by a rounded reciprocal, the divisor is bf16
# direct  one rounding: e4m3 of the f32 quotient
Profile = Literal["ieee", "cuda", "direct"]
PROFILES: tuple[Profile, ...] = ("ieee", "cuda", "direct")

# What a token's largest activation counts as at least, so that zeros have a scale.
_LEAST_LARGEST = 1e-12


def scale_from_amax(amax: Tensor, largest: float, profile: Profile) -> Tensor:
    """`amax / largest` as f32, by the profile's arithmetic; keeps the shape of `amax`.

    The CUDA division of a tensor by a constant multiplies by the constant's f32 reciprocal, which
    differs by one unit in the last place in about half of all scales.
    Raises FormatError if any maximum is zero, negative, infinite or NaN.
    """
    wide = amax.to(torch.float32)
    if not bool((torch.isfinite(wide) & (wide > 0)).all()):
        raise FormatError(
            f"a largest magnitude of {wide.flatten().tolist()} gives no scale; it must be "
            "positive and finite"
        )
    if profile == "cuda":
        return wide * torch.tensor(1.0 / largest, dtype=torch.float32, device=wide.device)
    # A tensor, not a number: on a GPU torch itself multiplies by the reciprocal of a number.
    return wide / torch.tensor(largest, dtype=torch.float32, device=wide.device)


def fp8_scale(amax: Tensor, profile: Profile = "ieee") -> Tensor:
    """The f32 scale of an FP8 tensor whose largest magnitude is `amax`: amax / 448.

    Serves weights, inputs, keys and values. Raises FormatError as `scale_from_amax`.
    """
    return scale_from_amax(amax, E4M3_MAX, profile)


def encode_fp8(w: Tensor, scale: Tensor, profile: Profile = "ieee") -> Tensor:
    """Encode `w` to e4m3 codes with one scale.

    w        bf16 or f32, any shape; not modified
    scale    f32, 0-d, > 0
    returns  float8_e4m3fn of the same shape

    Profiles `ieee` and `cuda` round the quotient to bf16 first, as the reference does on bf16
    weights; `cuda` also rounds the divisor. Raises FormatError if w holds NaN or infinity.
    """
    if not bool(torch.isfinite(largest_magnitude(w))):
        raise FormatError("the weight holds NaN or infinity, which cannot be encoded")
    divisor = scale.to(torch.float32)
    if profile == "cuda":
        divisor = divisor.to(torch.bfloat16).to(torch.float32)
    flat = w.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=w.device)
    chunk = chunk_values(w.device)
    quotient = torch.empty(min(flat.numel(), chunk), device=w.device)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        t = quotient[: part.numel()].copy_(part).div_(divisor)
        codes[start : start + chunk] = encode_e4m3(
            t if profile == "direct" else t.to(torch.bfloat16)
        )
    return codes.view(w.shape)


def decode_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode e4m3 codes: code times `scale` in f32, rounded once to `dtype`.

    This is how Mistral's FP8 checkpoints and Model-Optimizer's exports are decoded alike. `scale`
    may be bf16 or f32, shape () or (1,), or (O, 1) of the rows of a matrix.
    """
    if scale.numel() > 1:
        return _decode_rows(codes, scale.to(torch.float32), dtype)
    factor = scale.to(torch.float32).reshape(())
    if dtype == torch.float32:
        return decode_e4m3(codes).mul_(factor)
    flat = codes.reshape(-1)
    decoded = torch.empty(flat.shape, dtype=dtype, device=codes.device)
    chunk = chunk_values(codes.device)
    for start in range(0, flat.numel(), chunk):
        stop = start + chunk
        decoded[start:stop] = decode_e4m3(flat[start:stop]).mul_(factor)
    return decoded.view(codes.shape)


def _decode_rows(codes_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """`decode_fp8` with a scale of each row, some rows at a time."""
    decoded_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    step = max(1, chunk_values(codes_OI.device) // codes_OI.shape[1])
    for start in range(0, len(codes_OI), step):
        part = slice(start, start + step)
        decoded_OI[part] = decode_e4m3(codes_OI[part]).mul_(scale_O1[part])
    return decoded_OI


def round_tokens_to_fp8(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of an FP8 linear without an input scale: each row has a scale of its own.

    returns  codes_TI e4m3 of `x / s`, scale_T f32: `max(max|x|, 1e-12) / 448` of each row

    Quotients are f32; NaN stays NaN. A row of zeros has codes 0.
    Source: the `dynamic` activations of compressed-tensors, strategy `token`.
    """
    largest_T = x_TI.abs().amax(-1).to(torch.float32)
    scale_T = largest_T.clamp(min=_LEAST_LARGEST) / E4M3_MAX
    return encode_e4m3(x_TI.to(torch.float32) / scale_T[:, None]), scale_T


def round_to_fp8(x: Tensor, input_scale: Tensor) -> Tensor:
    """Activations as an FP8 linear sees them: `e4m3(clamp(x / s, +-448)) * s`, in x's dtype.

    Quotient and product are f32. Values beyond 448 * s saturate; NaN stays NaN.
    """
    scale = input_scale.to(torch.float32)
    codes = encode_e4m3(x.to(torch.float32) / scale)
    return (decode_e4m3(codes) * scale).to(x.dtype)
