"""NVFP4: 4-bit e2m1 codes, an e4m3 scale per 16 inputs, one f32 scale per tensor.

A weight is `value(code) * block_scale * tensor_scale`. The bytes are those of NVIDIA
Model-Optimizer (decision 0003, rules in docs/reference/formats.md#arithmetic-of-scales-and-codes).
Called by `quantize`, `checkpoint` (decoding) and `kernels`.

Legend: O out features · I in features · B 16-blocks along I · I2 bytes, two codes each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import Profile, scale_from_amax
from halfbyte.formats.layout import pack_words, unpack_nibbles
from halfbyte.formats.measure import chunk_values
from halfbyte.formats.minifloat import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_TINY,
    E2M1Buffers,
    decode_e2m1,
    decode_e4m3,
    e2m1_buffers,
    encode_e2m1,
    encode_e2m1_words,
    encode_e4m3,
)

BLOCK = 16  # inputs that share a block scale

# e4m3 block scales that a search tries around the one that maps the block's maximum to 6, in steps
# of the e4m3 grid (8 an octave): from clipping the maximum by a fifth to mapping it to 4 and a
# little below. The first of equal errors wins.
SEARCHED_STEPS = (0, 1, -1, 2, -2, 3, 4, 5, 6)
_LARGEST_E4M3 = 0x7E


class EncodedNVFP4(NamedTuple):
    """A weight encoded in NVFP4: codes, block scales and a tensor scale."""

    codes_OI2: Tensor  # uint8, even column in the low nibble
    scale_OB: Tensor  # float8_e4m3fn, row-major
    tensor_scale: Tensor  # f32, 0-d


def nvfp4_tensor_scale(amax: Tensor, profile: Profile = "ieee") -> Tensor:
    """The f32 tensor scale of a weight, or fused group, of largest magnitude `amax`: amax / 2688.

    With it the largest block scale is 448, the largest e4m3. Profile `direct` divides as `ieee`.
    Raises FormatError if `amax` is zero, negative, infinite or NaN.
    """
    return scale_from_amax(amax, E2M1_MAX * E4M3_MAX, profile)


def nvfp4_input_scale(amax: Tensor, profile: Profile = "ieee") -> Tensor:
    """The f32 scale that bounds the block scales of activations: amax / 2688, as for weights."""
    return nvfp4_tensor_scale(amax, profile)


def encode_nvfp4(w_OI: Tensor, tensor_scale: Tensor) -> EncodedNVFP4:
    """Encode a weight to NVFP4 with amax block scales.

    w_OI          bf16 or f32, I % 16 == 0; not modified
    tensor_scale  f32 scalar > 0, shared by a fused group
    returns       codes_OI2 uint8 (low nibble first), scale_OB e4m3, tensor_scale

    Ties go to even mantissa. A block of zeros gets block scale 1.0; block scales stay within
    [2**-9, 448]. Works through the rows in chunks; beside the result and the block maxima it
    needs a few MB. Raises FormatError if I is not a multiple of 16, if w holds NaN or infinity,
    or if the tensor scale is not positive and finite.
    Source: OCP Microscaling 1.0 (e2m1); block-scale floor 2**-9, true division and zero blocks as
    NVIDIA Model-Optimizer (torchao: floor 2**-6, reciprocal, -0.0 kept: other bytes).
    """
    blockmax_OB = block_maxima(w_OI)
    return encode_nvfp4_with(w_OI, block_scales(blockmax_OB, tensor_scale), tensor_scale)


def block_maxima(w_OI: Tensor) -> Tensor:
    """Max |w| of every 16-block, f32 (O, B).

    Raises FormatError for a width that is not a multiple of 16 and for NaN or infinite weights.
    """
    rows, columns = w_OI.shape
    if columns % BLOCK or columns == 0:
        raise FormatError(
            f"the weight has {columns} input features; NVFP4 needs a multiple of {BLOCK}"
        )
    if w_OI.dtype == torch.bfloat16:
        # Magnitudes of bf16 order like their bits, and integers reduce faster than floats.
        bits = w_OI.reshape(-1, BLOCK).view(torch.int16)
        maxima = torch.empty(bits.shape[0], dtype=torch.int16, device=w_OI.device)
        step = chunk_values(w_OI.device) // BLOCK
        for start in range(0, bits.shape[0], step):
            part = bits[start : start + step].bitwise_and(0x7FFF)
            torch.amax(part, dim=1, out=maxima[start : start + step])
        largest = maxima.view(torch.bfloat16).to(torch.float32)
    else:
        largest = w_OI.to(torch.float32).reshape(-1, BLOCK).abs().amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        raise FormatError("the weight holds NaN or infinity; NVFP4 has neither")
    return largest.view(rows, columns // BLOCK)


def block_scales(blockmax_OB: Tensor, tensor_scale: Tensor) -> Tensor:
    """e4m3 block scales that map each block's maximum to 6, the largest e2m1."""
    scale = tensor_scale.to(torch.float32)
    if not bool(torch.isfinite(scale) & (scale > 0)):
        raise FormatError(f"the tensor scale is {float(scale)}; it must be positive and finite")
    return nearest_scales(blockmax_OB, scale)


def nearest_scales(blockmax_OB: Tensor, tensor_scale: Tensor) -> Tensor:
    """What `block_scales` gives for a tensor scale (f32) that is known to be sound."""
    wanted = blockmax_OB / (E2M1_MAX * tensor_scale)
    wanted.masked_fill_(wanted == 0, 1.0)
    return wanted.clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def neighbour_scales(scales: Tensor, step: int) -> Tensor:
    """e4m3 codes, as uint8, so many steps of the grid away; never zero and never NaN."""
    return (scales.to(torch.int16) + step).clamp_(1, _LARGEST_E4M3).to(torch.uint8)


def encode_nvfp4_with(w_OI: Tensor, scale_OB: Tensor, tensor_scale: Tensor) -> EncodedNVFP4:
    """Encode with given block scales (e4m3, > 0): codes are nearest to `w / (scale * tensor)`.

    For scale searches; `encode_nvfp4` is the usual door and checks the weight.
    """
    rows, columns = w_OI.shape
    scale = tensor_scale.to(torch.float32)
    values = w_OI.reshape(-1)
    divisors = decode_e4m3(scale_OB).mul_(scale).view(-1, 1)
    packed = torch.empty(values.numel() // 2, dtype=torch.uint8, device=w_OI.device)
    chunk = chunk_values(w_OI.device)
    buffers = e2m1_buffers(min(values.numel(), chunk), w_OI.device)
    for start in range(0, values.numel(), chunk):
        stop = min(start + chunk, values.numel())
        packed[start // 2 : stop // 2] = _encode_chunk(
            values[start:stop], divisors[start // BLOCK : stop // BLOCK], buffers
        )
    return EncodedNVFP4(packed.view(rows, columns // 2), scale_OB, scale)


def block_errors(
    w_OI: Tensor, scale_OB: Tensor, tensor_scale: Tensor, importance_I: Tensor | None = None
) -> Tensor:
    """Sum of squared errors of every 16-block under given block scales: f32 (O, B).

    What `encode_nvfp4_with` would lose, without its codes; in units of w squared. With
    `importance_I` (f32, >= 0) each square is multiplied by that of its column.
    """
    importance_BS = None if importance_I is None else importance_I.view(-1, BLOCK)
    values = w_OI.reshape(-1)
    divisors = decode_e4m3(scale_OB).mul_(tensor_scale.to(torch.float32)).view(-1, 1)
    errors = torch.empty(divisors.shape[0], device=w_OI.device)
    chunk = chunk_values(w_OI.device)
    buffers = e2m1_buffers(min(values.numel(), chunk), w_OI.device)
    for start in range(0, values.numel(), chunk):
        stop = min(start + chunk, values.numel())
        blocks = slice(start // BLOCK, stop // BLOCK)
        used = buffers.first(stop - start)
        used.quotient.copy_(values[start:stop]).view(-1, BLOCK).div_(divisors[blocks])
        code = encode_e2m1_words(used).bitwise_and_(7).to(torch.float32)
        # The magnitudes 0 .5 1 1.5 2 3 4 6 are three straight lines over the code, joined.
        value = torch.maximum(torch.maximum(code * 0.5, code - 2), code * 2 - 8)
        squares = value.sub_(used.magnitude).square_().view(-1, BLOCK)
        if importance_BS is not None:
            number = torch.arange(blocks.start, blocks.start + squares.shape[0], device=w_OI.device)
            squares *= importance_BS[number % importance_BS.shape[0]]
        lost = squares.sum(dim=1)
        errors[blocks] = lost.mul_(divisors[blocks, 0].square())
    return errors.view(scale_OB.shape)


def _encode_chunk(values: Tensor, divisors: Tensor, buffers: E2M1Buffers) -> Tensor:
    """Packed codes of some whole blocks; `divisors` is (blocks, 1)."""
    used = buffers.first(values.numel())
    used.quotient.copy_(values).view(-1, BLOCK).div_(divisors)
    return pack_words(encode_e2m1_words(used))


def decode_nvfp4(encoded: EncodedNVFP4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight (O, I) that the codes stand for, computed in f32 and rounded once to `dtype`.

    The step of a block, `block_scale * tensor_scale` rounded to f32, is what the encoder divided
    by; a weight is `value(code)` times it, in the reference's order: the other one gives other
    weights where the product lies on a tie of bf16. A block scale of zero (Model-Optimizer 0.44
    stores some) decodes to zeros.
    """
    codes_OI2, scale_OB, tensor_scale = encoded
    rows, half = codes_OI2.shape
    decoded = torch.empty((rows, half * 2), dtype=dtype, device=codes_OI2.device)
    pairs = byte_values(codes_OI2.device)
    step = max(1, chunk_values(codes_OI2.device) // (2 * half))
    for start in range(0, rows, step):
        part = codes_OI2[start : start + step]
        values = pairs.index_select(0, part.reshape(-1).to(torch.int32)).view(-1, BLOCK)
        steps = decode_e4m3(scale_OB[start : start + step]).mul_(tensor_scale.to(torch.float32))
        values.mul_(steps.view(-1, 1))
        decoded[start : start + step] = values.view(part.shape[0], -1)
    return decoded


def byte_values(device: torch.device) -> Tensor:
    """f32 (256, 2): the values of the low and high nibble of every byte."""
    every_byte = torch.arange(256, device=device).to(torch.uint8)
    return torch.tensor(E2M1_VALUES, device=device)[unpack_nibbles(every_byte[:, None]).int()]


def round_to_nvfp4(x: Tensor, input_scale: Tensor) -> Tensor:
    """Activations (..., I) as an NVFP4 linear of FP4 hardware sees them, in x's dtype.

    Block scales are made here, at run time: e4m3(min(max|x| / (6 s), 448)). `input_scale` only
    bounds them: a block beyond the calibrated maximum saturates its scale at 448, then its codes
    at 6. A block whose scale rounds to zero becomes zeros; NaN spreads over its block.
    """
    if x.shape[-1] % BLOCK:
        raise FormatError(f"{x.shape[-1]} input features; NVFP4 needs a multiple of {BLOCK}")
    scale = input_scale.to(torch.float32)
    blocks = x.to(torch.float32).reshape(-1, BLOCK)
    wanted = blocks.abs().amax(dim=1, keepdim=True) / (E2M1_MAX * scale)
    block_scale = decode_e4m3(encode_e4m3(wanted)) * scale
    quotient = (blocks / block_scale).masked_fill_(block_scale == 0, 0.0)
    rounded = decode_e2m1(encode_e2m1(quotient)) * block_scale
    return rounded.view(x.shape).to(x.dtype)
