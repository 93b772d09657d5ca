"""Whether tensor values are those of the source. For `verify`.

Against the source two things are asked of a quantized weight. Every code must be the one that
rounding gives under the stored scale (so a flipped byte shows, and the scale of another tensor),
and the decoded weight as a whole must lie as close as its format allows (so a scale that clips
shows, whatever method chose it). Where the manifest says that codes were chosen together (GPTQ)
the first is not asked.

Norms may be the source's over powers of two, if the NVFP4 linears that read them are the
source's times the same: that is the same model (decision 0091).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import closeness
from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import encode_fp8
from halfbyte.formats.layout import unpack_nibbles
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.minifloat import decode_e2m1, decode_e4m3
from halfbyte.formats.nvfp4 import encode_nvfp4_with

# Rows looked at together: some tens of MB in f32 at full width.
_ROWS = 512

# The quotient is rounded to bf16 before e4m3, and one arithmetic profile rounds the scale to bf16
# too (docs/reference/formats.md#arithmetic-of-scales-and-codes): 2 ** -9 each. An FP8 source's own
# scale may be 0.3 % off the re-derived one on top.
_FP8_SLACK = 2**-8 + 0.003
# NVFP4 codes come from one f32 division; a GPU's approximate one moves 5 in 100,000 by an ulp.
_NVFP4_SLACK = 2**-20


@dataclass(frozen=True, slots=True)
class Compared:
    """How the values of a tensor relate to those of the source's."""

    problems: list[str]
    sqnr_db: float | None


# Norm -> linears that read its output, in a decoder layer.
_READERS = {
    "attention_norm": ("attention.q", "attention.k", "attention.v"),
    "mlp_norm": ("mlp.gate", "mlp.up"),
}


def check_against(
    checkpoint: Checkpoint, source: Checkpoint, name: str, *, is_nearest: bool = True
) -> Compared | None:
    """Compare one tensor with the source's of the same meaning; None for scales.

    is_nearest  codes of NVFP4 weights should be those of rounding to nearest

    Scales are judged by what they decode to.
    """
    linear, _, role = name.rpartition(".")
    if role not in ("weight", "bias") or (checkpoint.config.text.tied_head and linear == "head"):
        return None
    if name not in source:
        return Compared(["the source has no such tensor"], None)
    chosen = checkpoint.format_of(linear)
    if chosen == "bf16":
        return _compare_plain(checkpoint, source, name)
    # Weights are encoded from bf16, but codes that were FP8 already are kept: nothing rounds those.
    is_kept = chosen == source.format_of(linear) == "fp8"
    try:
        original = source.decoded(linear, torch.float32 if is_kept else torch.bfloat16)
    except FormatError as error:
        return Compared([f"the source is damaged: {error}"], None)
    if not bool(torch.isfinite(largest_magnitude(original))):
        return Compared(["the source holds NaN or infinity here"], None)
    try:
        decoded = checkpoint.decoded(linear, torch.float32)
    except FormatError:
        return None  # a scale that is no scale is named where it stands
    if original.shape != decoded.shape:
        return Compared([f"is {list(decoded.shape)}, the source's {list(original.shape)}"], None)
    if chosen == "nvfp4" and (factors_I := _smoothing_of(checkpoint, source, linear)) is not None:
        original = (original.to(torch.float32) * factors_I).to(original.dtype)
    near = closeness(chosen, original, decoded)
    problems = []
    if near.is_far:
        problems.append(
            f"{near.sqnr_db:.1f} dB from the source; {chosen} gives {near.floor_db:.3g} at least: "
            "codes or scales are those of another weight"
        )
    count = 0
    if chosen == "fp8":
        count = _fp8_misfits(checkpoint, linear, original)
    elif is_nearest:
        count = _nvfp4_misfits(checkpoint, linear, original)
    if count:
        problems.append(
            f"{count} codes are not what rounding the source gives under the stored scale"
        )
    return Compared(problems, near.sqnr_db)


def _compare_plain(checkpoint: Checkpoint, source: Checkpoint, name: str) -> Compared:
    linear = name.rpartition(".")[0]
    was = source.format_of(linear)
    try:
        theirs = source.tensor(name) if was == "bf16" else source.decoded(linear)
    except FormatError as error:
        return Compared([f"the source is damaged: {error}"], None)
    if checkpoint.tensor(name).equal(theirs):
        return Compared([], None if was == "bf16" else math.inf)
    if _smoothing(checkpoint, source, name) is not None:
        return Compared([], None)
    return Compared(["is not the source's, though it passes through"], None)


def _smoothing(checkpoint: Checkpoint, source: Checkpoint, name: str) -> Tensor | None:
    """What the weights of a norm (canonical tensor) were divided by, f32; None if they are not the
    source's over powers of two, or if a linear that reads them is not NVFP4.
    """
    prefix, _, norm = name.removesuffix(".weight").rpartition(".")
    readers = [f"{prefix}.{short}" for short in _READERS.get(norm, ())]
    if not readers or {checkpoint.format_of(reader) for reader in readers} != {"nvfp4"}:
        return None
    ours_D, theirs_D = (x.tensor(name).to(torch.float32) for x in (checkpoint, source))
    if ours_D.shape != theirs_D.shape:
        return None
    factors_D = torch.where(theirs_D == 0, 1.0, theirs_D / ours_D)
    mantissa_D = torch.frexp(factors_D).mantissa
    is_power = bool(((mantissa_D == 0.5) & torch.isfinite(factors_D)).all())
    return factors_D if is_power and torch.equal(ours_D * factors_D, theirs_D) else None


def _smoothing_of(checkpoint: Checkpoint, source: Checkpoint, linear: str) -> Tensor | None:
    """What the norm before a decoder linear was divided by, if it was."""
    prefix, _, short = linear.partition(".")[2].partition(".")
    for norm, readers in _READERS.items():
        name = f"decoder.{prefix}.{norm}.weight"
        if short in readers and name in source and name in checkpoint:
            return _smoothing(checkpoint, source, name)
    return None


def _fp8_misfits(checkpoint: Checkpoint, linear: str, original: Tensor) -> int:
    """How many codes lie further from the source's value than half a step of e4m3."""
    codes = checkpoint.tensor(f"{linear}.weight")
    scale = checkpoint.tensor(f"{linear}.weight_scale").to(torch.float32)
    # Encoding anew is fast and settles most tensors; only rows that differ are looked at closer.
    if scale.numel() == 1:
        rows = _differing_rows(codes, encode_fp8(original, scale))
    else:
        rows = torch.arange(len(codes))
    scale_O1 = scale.reshape(-1, 1).expand(len(codes), 1)
    count = 0
    for start in range(0, rows.numel(), _ROWS):
        part = rows[start : start + _ROWS]
        q = decode_e4m3(codes.view(torch.uint8)[part].view(torch.float8_e4m3fn))
        t = original[part].to(torch.float32).div_(scale_O1[part])
        # Half a step: 2 ** -4 of the power of two below, 2 ** -10 among subnormals. A value just
        # above a power of two may have come from below it, where steps are half as wide.
        exponent = torch.frexp(q.abs()).exponent - 1
        half = torch.ldexp(torch.ones_like(q), exponent.clamp_(min=-6) - 4)
        slack = t.abs() * _FP8_SLACK
        # Beyond 448 everything saturates; how far it may clip is the SQNR's business.
        distance = (t.clamp(-448, 448) - q).abs()
        count += int((distance > half + slack).sum())
    return count


def _nvfp4_misfits(checkpoint: Checkpoint, linear: str, original: Tensor) -> int:
    """How many codes are not the nearest e2m1 value under their stored block scale."""
    packed = checkpoint.tensor(f"{linear}.weight")
    scales = checkpoint.tensor(f"{linear}.weight_scale")
    tensor_scale = checkpoint.tensor(f"{linear}.tensor_scale")
    anew = encode_nvfp4_with(original, scales, tensor_scale)
    rows = _differing_rows(packed, anew.codes_OI2)
    count = 0
    for start in range(0, rows.numel(), _ROWS):
        part = rows[start : start + _ROWS]
        q = decode_e2m1(unpack_nibbles(packed[part]))
        block = scales.view(torch.uint8)[part].view(torch.float8_e4m3fn)
        step = (decode_e4m3(block) * tensor_scale).repeat_interleave(16, dim=1)
        t = original[part].to(torch.float32) / step
        magnitude = q.abs()
        # Steps of e2m1: 0.5 below 2, 1 below 4, then 2; downwards from 2 and 4 half as wide.
        up = torch.where(magnitude < 2, 0.25, torch.where(magnitude < 4, 0.5, 1.0))
        down = torch.where(magnitude <= 2, 0.25, torch.where(magnitude <= 4, 0.5, 1.0))
        delta = torch.where(q < 0, -1.0, 1.0) * (t.clamp(-6, 6) - q)
        bad = (delta > up + _NVFP4_SLACK * t.abs()) | (delta < -down - _NVFP4_SLACK * t.abs())
        # A block scale of 0 decodes to 0 whatever its codes (docs/reference/formats.md#edge-cases).
        count += int((bad & (step > 0)).sum())
    return count


def _differing_rows(stored: Tensor, anew: Tensor) -> Tensor:
    """Indices of the rows in which two matrices of codes differ."""
    a, b = stored.view(torch.uint8), anew.view(torch.uint8)
    if a.equal(b):
        return torch.empty(0, dtype=torch.int64)
    return (a != b).any(dim=1).nonzero()[:, 0]
