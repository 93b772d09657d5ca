"""e4m3 codes to NVFP4 without decoding: every implementation gives the bytes of the long way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import decode_fp8
from halfbyte.formats.nvfp4 import EncodedNVFP4, encode_nvfp4, nvfp4_tensor_scale
from halfbyte.kernels.dispatch import implementations

E4M3 = torch.float8_e4m3fn
FASTER = {n: f for n, f in implementations("fp8_to_nvfp4").items() if n != "reference"}
SEARCHES = implementations("largest_fp8_code")

pytestmark = pytest.mark.skipif(not FASTER, reason="no C compiler on this machine")


def long_way(codes_OI: Tensor, scale: Tensor, tensor_scale: Tensor) -> EncodedNVFP4:
    return encode_nvfp4(decode_fp8(codes_OI, scale), tensor_scale)


def assert_same(codes_OI: Tensor, scale: Tensor, tensor_scale: Tensor) -> None:
    expected = long_way(codes_OI, scale, tensor_scale)
    for fp8_to_nvfp4 in FASTER.values():
        for made, wanted in zip(fp8_to_nvfp4(codes_OI, scale, tensor_scale), expected, strict=True):
            assert made.dtype == wanted.dtype
            assert made.shape == wanted.shape
            assert torch.equal(
                made.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
            )


def every_pair() -> Tensor:
    """For every largest magnitude code a row of blocks with all codes up to it, both signs."""
    rows = []
    for largest in range(0x7F):
        signed = torch.arange(128).clamp(max=largest)
        signed = torch.stack((signed, signed + 128), 1).flatten()
        blocks = torch.full((19, 16), largest)
        blocks[:, 1:15] = signed.repeat(2)[: 19 * 14].view(19, 14)
        rows.append(blocks.flatten())
    return torch.stack(rows).to(torch.uint8).view(E4M3)


@pytest.mark.parametrize("shared", [1.0, 1.37, 300.0])
@pytest.mark.parametrize(
    "scale", [1.0, 0.0123, 2.0**-9 / 448, 3.3e-38, 1e-40, 7e-41, 6.6e35], ids=str
)
def test_every_code_under_every_largest_code(scale: float, shared: float) -> None:
    """Scales down to where bf16 and the quotients underflow, and up to where bf16 ends; `shared`
    is how much larger a fused partner is.
    """
    factor = torch.tensor(scale)
    amax = torch.tensor(min(448 * scale * shared, 3e38))
    assert_same(every_pair(), factor, nvfp4_tensor_scale(amax))


def test_limits_keep_apart_what_the_arithmetic_keeps_apart() -> None:
    """The block scale floor of 2**-9: blocks far below the tensor's maximum, and zeros."""
    codes = every_pair().view(torch.uint8).clone()
    codes[::3, 16:48] = 0
    codes[1::3, 16:48] = 0x80  # negative zeros only
    assert_same(codes.view(E4M3), torch.tensor(2.0**-20), torch.tensor(1.0))
    assert_same(codes.view(E4M3), torch.tensor(0.5), torch.tensor(1e-30))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 16), (3, 48), (17, 304), (130, 1040)]),
    st.floats(2.0**-40, 2.0**40, width=32),
)
def test_any_shape_and_scale(seed: int, shape: tuple[int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
        -8, 8, (shape[0], 1), generator=generator
    )
    codes = values.to(E4M3)
    amax = decode_fp8(codes, torch.tensor(scale)).abs().max()
    assert_same(codes, torch.tensor(scale), nvfp4_tensor_scale(amax))


def test_strided_codes_and_a_scale_with_a_dimension() -> None:
    codes = torch.randn(64, 32).to(E4M3).t()
    assert_same(codes, torch.tensor([0.25]), torch.tensor(0.001))


@pytest.mark.parametrize("fp8_to_nvfp4", implementations("fp8_to_nvfp4").values())
def test_what_has_no_code_is_refused(fp8_to_nvfp4) -> None:  # type: ignore[no-untyped-def]
    codes = torch.ones(4, 32).to(E4M3)
    one = torch.tensor(1.0)
    for nan in (0x7F, 0xFF):
        broken = codes.view(torch.uint8).clone()
        broken[2, 17] = nan
        with pytest.raises(FormatError, match="NaN or infinity"):
            fp8_to_nvfp4(broken.view(E4M3), one, one)
    with pytest.raises(FormatError, match="NaN or infinity"):
        fp8_to_nvfp4(torch.full((4, 32), 448.0).to(E4M3), torch.tensor(1e37), one)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(FormatError, match="must be positive and finite"):
            fp8_to_nvfp4(codes, one, torch.tensor(scale))
    with pytest.raises(FormatError, match="multiple of 16"):
        fp8_to_nvfp4(codes[:, :24], one, one)
    with pytest.raises(FormatError, match="NaN or infinity"):
        fp8_to_nvfp4(codes, torch.tensor(float("nan")), one)


def test_a_negative_scale_turns_signs() -> None:
    codes = torch.randn(4, 32).to(E4M3)
    assert_same(codes, torch.tensor(-0.5), torch.tensor(0.001))


@pytest.mark.parametrize("largest_fp8_code", SEARCHES.values(), ids=SEARCHES)
def test_the_largest_code_wherever_it_lies(largest_fp8_code) -> None:  # type: ignore[no-untyped-def]
    for count in (1, 15, 17, 65536, 65537, 200_000):
        for place in {0, count // 2, count - 1}:
            for code in (0x01, 0x7E, 0xFE, 0x7F, 0xFF):
                codes = torch.zeros(count, dtype=torch.uint8)
                codes[place] = code
                found = largest_fp8_code(codes.view(E4M3))
                assert found.dtype == E4M3
                assert int(found.view(torch.uint8)) == code & 0x7F
    assert float(largest_fp8_code(torch.empty(0, 16).to(E4M3))) == 0
