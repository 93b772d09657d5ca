"""The three linears, every CPU implementation against float64, over edge shapes."""

import pytest
import torch
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
