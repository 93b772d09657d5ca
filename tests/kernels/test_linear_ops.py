"""The three linears, every CPU implementation against float64, over edge shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bounded import assert_bounded
from halfbyte.errors import FormatError
from halfbyte.formats.layout import unpack_nibbles
from halfbyte.formats.minifloat import decode_e2m1
from halfbyte.kernels import native, reference
from halfbyte.kernels.dispatch import implementations

# One row, around the group sizes of the kernel, odd tails; the widths of the demo model; ragged
# last panels; a single block.
ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 47, 48, 49, 100)
SHAPES = ((1, 16), (15, 304), (17, 32), (33, 576), (96, 1536), (960, 576))
FORMATS = ("bf16", "fp8", "nvfp4")
NATIVE = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason="no C compiler on this machine"
)


def stored(format: str, out: int, width: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Arguments of `prepare_*`, and the weight they stand for in float64."""
    generator = torch.Generator().manual_seed(out * width)
    w_OI = torch.randn(out, width, generator=generator)
    if format == "bf16":
        w = w_OI.to(torch.bfloat16)
        return (w,), w.double()
    if format == "fp8":
        codes = (w_OI * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale_O = torch.rand(out, generator=generator) + 0.5
        return (codes, scale_O), codes.double() * scale_O.double()[:, None]
    packed = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8, generator=generator)
    scale_OB = (torch.rand(out, width // 16, generator=generator) * 448).to(torch.float8_e4m3fn)
    scale_OB.view(torch.uint8)[0, 0] = 0  # some exporters store it: decodes to zeros
    scale_OB.view(torch.uint8)[-1, -1] = 1  # the smallest subnormal
    scale_O = torch.rand(out, generator=generator) * 1e-3
    values = decode_e2m1(unpack_nibbles(packed)).double()
    exact = values * scale_OB.double().repeat_interleave(16, 1) * scale_O.double()[:, None]
    return (packed, scale_OB, scale_O), exact


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_implementation_is_as_exact_as_torch(format: str, shape: tuple[int, int]) -> None:
    arguments, exact_OI = stored(format, *shape)
    prepares, linears = implementations(f"prepare_{format}"), implementations(f"linear_{format}")
    for name, linear in linears.items():
        weight = prepares[name](*arguments)
        assert (weight.out_features, weight.in_features) == shape
        for rows in ROWS:
            generator = torch.Generator().manual_seed(rows)
            x_TI = torch.randn(rows, shape[1], generator=generator).to(torch.bfloat16)
            exact = x_TI.double() @ exact_OI.T
            plain = x_TI @ exact_OI.to(torch.bfloat16).T
            assert_bounded(linear(x_TI, weight), plain, exact)
            wide = x_TI.float() @ exact_OI.to(torch.bfloat16).float().T
            assert_bounded(linear(x_TI, weight, torch.float32), wide, exact)


@given(
    rows=st.integers(1, 20),
    width=st.sampled_from([1, 15, 16, 17, 300, 4096]),
    exponent=st.integers(-30, 30),
    odd=st.sampled_from([None, 0.0, torch.nan, torch.inf, -(2.0**-130)]),
    seed=st.integers(0, 2**20),
)
def test_tokens_are_rounded_alike_everywhere(
    rows: int, width: int, exponent: int, odd: float | None, seed: int
) -> None:
    """Codes' values and scales are the definition's, whatever a row holds."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(rows, width, generator=generator) * 2.0**exponent
    x_TI[0] *= 2.0**-12  # most of it subnormal as e4m3, were the scale another row's
    if odd is not None:
        x_TI[-1, width // 2] = odd
        if odd == 0.0:
            x_TI[-1] = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        found = implementations("round_tokens")
        wanted_TI, wanted_T = reference.round_tokens(x_TI.to(dtype))
        for name, function in found.items():
            rounded_TI, scale_T = function(x_TI.to(dtype))
            assert torch.equal(rounded_TI.nan_to_num(777.0), wanted_TI.nan_to_num(777.0)), name
            assert torch.equal(scale_T.nan_to_num(777.0), wanted_T.nan_to_num(777.0)), name
            assert rounded_TI.dtype == dtype and scale_T.dtype == torch.float32
    if odd in (None, 0.0):
        # Every value takes its nearest code: half a step is a sixteenth at most.
        values = wanted_TI.double() * wanted_T.double()[:, None]
        least = wanted_T.double()[:, None] * 2.0**-10
        error = (values - x_TI.double()).abs()
        assert bool((error <= torch.maximum(x_TI.double().abs() * (2.0**-4 + 1e-6), least)).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_s_scale_multiplies_its_sums(shape: tuple[int, int]) -> None:
    arguments, exact_OI = stored("fp8", *shape)
    for name, linear in implementations("linear_fp8").items():
        weight = implementations("prepare_fp8")[name](*arguments)
        for rows in (1, 9, 49):
            generator = torch.Generator().manual_seed(rows)
            x_TI, scale_T = reference.round_tokens(
                torch.randn(rows, shape[1], generator=generator).to(torch.bfloat16)
            )
            exact = x_TI.double() @ exact_OI.T * scale_T.double()[:, None]
            wide = (x_TI.float() @ exact_OI.float().T) * scale_T[:, None]
            assert_bounded(linear(x_TI, weight, None, scale_T), wide.to(torch.bfloat16), exact)
            wide = (x_TI.float() @ exact_OI.to(torch.bfloat16).float().T) * scale_T[:, None]
            assert_bounded(linear(x_TI, weight, torch.float32, scale_T), wide, exact)


@NATIVE
@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_decoded_exactly(format: str) -> None:
    """The identity multiplies out every weight on its own: nothing is rounded but the result."""
    arguments, exact_OI = stored(format, 40, 304)
    weight = getattr(native, f"prepare_{format}")(*arguments)
    identity = torch.eye(304, dtype=torch.bfloat16)
    decoded = getattr(native, f"linear_{format}")(identity, weight, torch.float32).T
    assert torch.equal(decoded, exact_OI.float())


@NATIVE
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(format: str) -> None:
    arguments, _ = stored(format, 33, 576)
    weight = getattr(native, f"prepare_{format}")(*arguments)
    linear = getattr(native, f"linear_{format}")
    x_TI = torch.randn(100, 576).to(torch.bfloat16)
    together = linear(x_TI, weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(linear(x_TI, weight), together)
    finally:
        torch.set_num_threads(threads)
    for start, count in ((0, 1), (5, 2), (99, 1), (20, 8), (41, 17), (3, 49)):
        part = slice(start, start + count)
        assert torch.equal(linear(x_TI[part], weight), together[part])


@NATIVE
def test_every_output_is_written() -> None:
    """An earlier tensor of the same size poisons the memory; none of it shines through."""
    arguments, _ = stored("fp8", 33, 64)
    weight = native.prepare_fp8(*arguments)
    for rows in ROWS:
        torch.full((rows, 33), float("nan"), dtype=torch.bfloat16)
        x_TI = torch.randn(rows, 64).to(torch.bfloat16)
        assert native.linear_fp8(x_TI, weight).isfinite().all()


@NATIVE
def test_strided_activations_are_read_right() -> None:
    arguments, _ = stored("nvfp4", 48, 64)
    weight = native.prepare_nvfp4(*arguments)
    wide = torch.randn(5, 128).to(torch.bfloat16)
    strided = wide[:, ::2]
    dense = native.linear_nvfp4(strided.contiguous(), weight)
    assert torch.equal(native.linear_nvfp4(strided, weight), dense)


@NATIVE
def test_nan_weight_reaches_the_result() -> None:
    codes = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[3, 4] = 0x7F
    weight = native.prepare_fp8(codes, torch.ones(16))
    y_TO = native.linear_fp8(torch.ones(1, 16, dtype=torch.bfloat16), weight)
    assert y_TO.isnan()[0].tolist() == [row == 3 for row in range(16)]


@NATIVE
def test_bad_block_scale_is_refused() -> None:
    packed, scale_OB, scale_O = stored("nvfp4", 16, 32)[0]
    scale_OB.view(torch.uint8)[0, 1] = 0x7F
    with pytest.raises(FormatError, match="negative or NaN"):
        native.prepare_nvfp4(packed, scale_OB, scale_O)


@NATIVE
def test_odd_width_stays_in_torch() -> None:
    w_OI = torch.randn(8, 24).to(torch.bfloat16)
    weight = native.prepare_bf16(w_OI)
    x_TI = torch.randn(3, 24).to(torch.bfloat16)
    assert weight.implementation == "reference"
    expected = reference.linear_bf16(x_TI, reference.prepare_bf16(w_OI))
    assert torch.equal(native.linear_bf16(x_TI, weight), expected)
