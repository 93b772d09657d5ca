"""e2m1 and e4m3: the two minifloats, nearest-even encode, exact decode.

The only statement of these rounding rules in torch; FP8, NVFP4 and the activation rules build on
it. Scales, blocks and packing live in `fp8`, `nvfp4` and `layout`.
"""

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

E2M1_MAX = 6.0  # largest e2m1
E4M3_MAX = 448.0  # largest e4m3
E4M3_TINY = 2.0**-9  # smallest positive e4m3, a subnormal

# Value of each 4-bit code: bit 3 is the sign, bits 0-2 the magnitude. Code 8 is negative zero.
E2M1_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)

# Adding 2**23 to a small non-negative f32 leaves its nearest integer, ties to even, in the low
# bits of the sum: the unit in the last place is 1 there.
_INTEGER = float(2**23)


class E2M1Buffers(NamedTuple):
    """Working memory of `encode_e2m1_words`: four f32 vectors of the same length.

    Kept between chunks, so that a large weight is encoded inside the processor's cache.
    """

    quotient: Tensor
    magnitude: Tensor
    nearest: Tensor
    coarser: Tensor

    def first(self, num_values: int) -> "E2M1Buffers":
        """The same memory, cut to its first `num_values` values."""
        return E2M1Buffers(*(buffer[:num_values] for buffer in self))


def e2m1_buffers(num_values: int, device: torch.device) -> E2M1Buffers:
    """Fresh working memory for up to `num_values` values."""
    return E2M1Buffers(*(torch.empty(num_values, device=device) for _ in range(4)))


def encode_e2m1_words(buffers: E2M1Buffers) -> Tensor:
    """Encode `buffers.quotient` to e2m1, one int32 a value: the hot loop of NVFP4 encoding.

    buffers  f32 vectors of equal length; all are overwritten
    returns  int32 in memory of `buffers.nearest`: bits 0-3 are the code, bits 4-7 are zero, the
             higher bits mean nothing

    On |t| < 2 the e2m1 grid has step 1/2, up to 4 step 1, up to 6 step 2, and codes count grid
    points; so the code is the least of round(2t), round(t) + 2, round(t/2) + 4 and 7, where each
    rounding is one exact f32 addition, ties to even. The sign bit is set when t < 0: negative
    zero encodes to 0. NaN gives a meaningless code.
    """
    quotient, magnitude, nearest, coarser = buffers
    quotient.add_(0.0)  # -0.0 becomes +0.0
    torch.abs(quotient, out=magnitude)
    torch.add(magnitude.new_full((), _INTEGER), magnitude, alpha=2, out=nearest)
    torch.add(magnitude, _INTEGER + 2, out=coarser)
    torch.minimum(nearest, coarser, out=nearest)
    torch.add(magnitude.new_full((), _INTEGER + 4), magnitude, alpha=0.5, out=coarser)
    torch.minimum(nearest, coarser, out=nearest).clamp_(max=_INTEGER + 7)
    sign = quotient.view(torch.int32).bitwise_right_shift_(31)  # 0 or -1
    return nearest.view(torch.int32).sub_(sign, alpha=8)


def encode_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 codes of `x`, ties to the even code, saturating at 6; unpacked, uint8 0-15.

    The sign bit (8) is set when x < 0, so -0.0 gives 0 and -0.1 gives 8. NaN is the caller's to
    exclude. Source: OCP Microscaling 1.0, section 5.3.3; zero signs as NVIDIA Model-Optimizer.
    """
    buffers = e2m1_buffers(x.numel(), x.device)
    buffers.quotient.copy_(x.reshape(-1))
    return encode_e2m1_words(buffers).bitwise_and_(15).to(torch.uint8).view(x.shape)


@cache
def _values_on(device: torch.device) -> Tensor:
    """The values of the sixteen codes, kept on a device: copying them waits for a GPU."""
    return torch.tensor(E2M1_VALUES, device=device)


# The sixteen codes by rising value, -0 below 0, and the largest f32 that takes each but the last.
_RISING_CODES = (15, 14, 13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)


@cache
def _bounds_on(device: torch.device) -> Tensor:
    """The largest f32 that is nearest to each value but the last: ties go to even codes."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1_VALUES[:8])])
    is_tie_up = torch.arange(7) % 2 == 1  # code 1 is odd: half of 0.5 and 1 goes to 1
    zeros, ones = torch.zeros(7), torch.full((7,), float("-inf"))
    above = torch.where(is_tie_up, torch.nextafter(middles, zeros), middles)
    below = torch.where(is_tie_up, -middles, torch.nextafter(-middles, ones))
    zero = torch.nextafter(torch.zeros(1), ones[:1])
    return torch.cat([below.flip(0), zero, above]).to(device)


@cache
def _rising_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and values (f32) by rising value."""
    values = [E2M1_VALUES[code] for code in _RISING_CODES]
    codes = torch.tensor(_RISING_CODES, dtype=torch.uint8, device=device)
    return codes, torch.tensor(values, device=device)


def nearest_rising_e2m1(t: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (int32, 0-15) of the nearest values by rising value, and the values: in two kernels.

    What `nearest_e2m1` finds in sixteen, for GPUs; `codes_of_ranks` gives the codes.
    """
    ranks = torch.bucketize(t, _bounds_on(t.device), out_int32=True)
    values = _rising_on(t.device)[1].index_select(0, ranks.view(-1))
    return ranks, values.view(t.shape)


def codes_of_ranks(ranks: Tensor) -> Tensor:
    """The e2m1 codes, uint8, of values that `nearest_rising_e2m1` has ranked."""
    return _rising_on(ranks.device)[0].index_select(0, ranks.reshape(-1)).view(ranks.shape)


def nearest_e2m1(t: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `encode_e2m1`, uint8, and the f32 values they stand for; `t` is f32, overwritten."""
    buffers = E2M1Buffers(t.view(-1), *(torch.empty_like(t).view(-1) for _ in range(3)))
    codes = encode_e2m1_words(buffers).bitwise_and_(15)
    values = _values_on(t.device).index_select(0, codes)
    return codes.to(torch.uint8).view(t.shape), values.view(t.shape)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Exact f32 values of unpacked e2m1 codes (uint8, 0-15)."""
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    return values[codes.to(torch.int32)]


def encode_e4m3(x: Tensor) -> Tensor:
    """Nearest e4m3 (float8_e4m3fn) of `x`, ties to even, clamped to +-448 first.

    The clamp comes first because e4m3 has no infinity: above 464 some conversions give NaN and
    some saturate. NaN stays NaN; negative values that round to zero give negative zero.
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Exact values of e4m3 codes; every one is representable in bf16, f16 and f32.

    On a CPU the bits are moved into an f16, whose exponent counts from 2**-14 where e4m3 counts
    from 2**-6: several times faster than the library's conversion, exact for subnormals too.
    """
    if codes.device.type != "cpu" or bool(has_nan_codes(codes)):
        return codes.to(dtype)
    bits = codes.view(torch.int8).to(torch.int16)  # the sign fills bits 7-15
    half = bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return half.to(torch.float32).mul_(2.0**8).to(dtype)


def has_nan_codes(codes: Tensor) -> Tensor:
    """Whether any e4m3 code is one of the two NaNs; bool, 0-d."""
    if codes.numel() == 0:
        return torch.tensor(False, device=codes.device)
    return codes.view(torch.uint8).bitwise_and(0x7F).amax() == 0x7F
