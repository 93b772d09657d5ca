"""Every code, every midpoint and its neighbours, against rules written in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.formats.minifloat import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_TINY,
    codes_of_ranks,
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    has_nan_codes,
    nearest_e2m1,
    nearest_rising_e2m1,
)

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3_value(code: int) -> float:
    """The value of an e4m3 code from its bits: sign, 4 exponent bits (bias 7), 3 mantissa bits."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3_MAGNITUDES = tuple(e4m3_value(code) for code in range(0x7F))


def nearest_code(values: Tensor, grid: tuple[float, ...]) -> Tensor:
    """Index into `grid` of the value nearest to each |value|, ties to the even index; float64."""
    magnitude = values.double().abs()
    points = torch.tensor(grid, dtype=torch.float64)
    below = (magnitude[:, None] >= points).sum(dim=1).sub(1).clamp(0, len(grid) - 2)
    to_below, to_above = magnitude - points[below], points[below + 1] - magnitude
    upward = (to_above < to_below) | ((to_above == to_below) & (below % 2 == 1))
    return below + upward.long()


def neighbourhood(points: list[float]) -> Tensor:
    """Each point and the f32 numbers just below and above it, with both signs."""
    middle = torch.tensor(points, dtype=torch.float32)
    around = torch.cat(
        [
            middle,
            torch.nextafter(middle, torch.tensor(math.inf)),
            torch.nextafter(middle, torch.tensor(-math.inf)),
        ]
    )
    return torch.cat([around, -around])


def every_finite_bf16() -> Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return values[values.isfinite()]


def expected_e2m1(values: Tensor) -> Tensor:
    return (nearest_code(values, E2M1_MAGNITUDES) + 8 * (values < 0)).to(torch.uint8)


def test_e2m1_codes_mean_what_the_table_says() -> None:
    assert decode_e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == list(E2M1_VALUES)
    assert E2M1_VALUES[:8] == E2M1_MAGNITUDES
    assert E2M1_VALUES[8:] == tuple(-value for value in E2M1_MAGNITUDES)
    assert max(E2M1_VALUES) == E2M1_MAX


def test_e2m1_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert decode_e2m1(encode_e2m1(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_e2m1_is_exact_at_every_point_midpoint_and_neighbour() -> None:
    middles = [(a + b) / 2 for a, b in pairwise(E2M1_MAGNITUDES)]
    values = neighbourhood([*E2M1_MAGNITUDES, *middles])
    assert torch.equal(encode_e2m1(values), expected_e2m1(values))


def test_e2m1_is_exact_on_every_bf16() -> None:
    values = every_finite_bf16()
    assert torch.equal(encode_e2m1(values), expected_e2m1(values))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_e2m1_is_exact_on_any_f32(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(encode_e2m1(tensor), expected_e2m1(tensor))
    assert_ranked_alike(tensor)


def assert_ranked_alike(values: Tensor) -> None:
    """What GPUs find in two kernels is what the others find."""
    ranks, found = nearest_rising_e2m1(values)
    codes, wanted = nearest_e2m1(values.clone())
    assert torch.equal(codes_of_ranks(ranks), codes)
    assert torch.equal(found, wanted)


def test_e2m1_by_rank_is_that_by_arithmetic() -> None:
    middles = [(a + b) / 2 for a, b in pairwise(E2M1_MAGNITUDES)]
    assert_ranked_alike(neighbourhood([*E2M1_MAGNITUDES, *middles]).float())
    assert_ranked_alike(every_finite_bf16().float().view(-1, 16))


@pytest.mark.parametrize(
    "value, code",
    [
        (0.0, 0),
        (-0.0, 0),
        (-0.1, 8),
        (-1e-40, 8),
        (1e-40, 0),
        (6.0, 7),
        (7.0, 7),
        (1e30, 7),
        (math.inf, 7),
        (-math.inf, 15),
    ],
)
def test_e2m1_zero_sign_and_saturation(value: float, code: int) -> None:
    assert int(encode_e2m1(torch.tensor([value]))) == code


def test_e2m1_keeps_shape_and_does_not_touch_its_input() -> None:
    x = torch.tensor([[-0.0, 5.0, -2.5]])
    before = x.clone()
    assert encode_e2m1(x).shape == (1, 3)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
    assert encode_e2m1(torch.empty(0, 16)).shape == (0, 16)


def test_e4m3_codes_mean_what_their_bits_say() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded = decode_e4m3(codes, dtype).double()
        expected = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64)
        assert torch.equal(decoded.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
        assert decoded.dtype == torch.float64
    assert max(E4M3_MAGNITUDES) == E4M3_MAX
    assert E4M3_MAGNITUDES[1] == E4M3_TINY


def expected_e4m3(values: Tensor) -> Tensor:
    return (nearest_code(values, E4M3_MAGNITUDES) + 128 * values.signbit()).to(torch.uint8)


def test_e4m3_is_exact_at_every_point_midpoint_and_neighbour() -> None:
    middles = [(a + b) / 2 for a, b in pairwise(E4M3_MAGNITUDES)]
    values = neighbourhood([*E4M3_MAGNITUDES, *middles, 464.0, 480.0, 1e30])
    assert torch.equal(encode_e4m3(values).view(torch.uint8), expected_e4m3(values))


def test_e4m3_is_exact_on_every_bf16() -> None:
    values = every_finite_bf16()
    assert torch.equal(encode_e4m3(values).view(torch.uint8), expected_e4m3(values))


def test_e4m3_saturates_and_keeps_nan() -> None:
    x = torch.tensor([1e9, -1e9, math.inf, -math.inf, math.nan, -1e-9])
    codes = encode_e4m3(x).view(torch.uint8).tolist()
    assert codes[:4] == [0x7E, 0xFE, 0x7E, 0xFE]
    assert codes[4] & 0x7F == 0x7F
    assert codes[5] == 0x80


def test_e4m3_without_nan_decodes_alike_fast_and_slow() -> None:
    """The fast path takes tensors without NaN; every other code must come out the same."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F]).to(torch.uint8)
    stored = codes.view(torch.float8_e4m3fn)
    assert not bool(has_nan_codes(stored))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded, library = decode_e4m3(stored, dtype), stored.to(dtype)
        assert torch.equal(decoded, library)
        assert torch.equal(decoded.signbit(), library.signbit())


def test_nan_codes_are_found() -> None:
    for code, is_nan in ((0x7F, True), (0xFF, True), (0x7E, False), (0x00, False)):
        stored = torch.tensor([0, code], dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert bool(has_nan_codes(stored)) is is_nan
    assert not bool(has_nan_codes(torch.empty(0, dtype=torch.float8_e4m3fn)))
