"""What FP4 tensor cores would be given is what the formats say; the call refuses other devices."""

import pytest
import torch

from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.layout import unpack_nibbles, unswizzle_128x4
from halfbyte.formats.minifloat import decode_e2m1
from halfbyte.formats.nvfp4 import decode_nvfp4, encode_nvfp4, round_to_nvfp4
from halfbyte.kernels import blackwell


def _read(operand: blackwell.Fp4Operand) -> torch.Tensor:
    """The operand's values by the hardware's rules: block scales where the tiles put them."""
    rows, half = operand.codes_RI2.shape
    scales = unswizzle_128x4(operand.scales, rows, half // 8).float()
    codes = decode_e2m1(unpack_nibbles(operand.codes_RI2))
    return codes * (scales * operand.tensor_scale).repeat_interleave(16, dim=1)


@pytest.mark.parametrize("rows,columns", [(128, 64), (130, 96), (1, 32), (300, 1056)])
def test_operands_hold_the_formats_values(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    w_OI = torch.randn(rows, columns, generator=generator)
    encoded = encode_nvfp4(w_OI, torch.tensor(0.002))
    weight = blackwell.prepare_weight(encoded.codes_OI2, encoded.scale_OB, encoded.tensor_scale)
    assert torch.equal(_read(weight), decode_nvfp4(encoded, torch.float32))
    x_TI = torch.randn(rows, columns, generator=generator).bfloat16()
    x = blackwell.prepare_activations(x_TI, torch.tensor(0.003))
    expected = round_to_nvfp4(x_TI, torch.tensor(0.003)).float()
    assert torch.allclose(_read(x), expected, rtol=2.0**-8)  # the twin rounds to bf16


def test_every_scale_lies_where_a_tile_wants_it() -> None:
    scales = torch.arange(128 * 8, dtype=torch.int64).remainder(120).to(torch.uint8)
    scales = scales.view(128, 8).view(torch.float8_e4m3fn)
    codes = torch.zeros(128, 64, dtype=torch.uint8)
    operand = blackwell.prepare_weight(codes, scales, torch.tensor(1.0))
    flat = operand.scales.view(torch.uint8)
    for row, block in ((0, 0), (33, 5), (127, 7), (64, 4)):
        at = block // 4 * 512 + row % 32 * 16 + row // 32 * 4 + block % 4
        assert flat[at] == scales.view(torch.uint8)[row, block]


def test_a_product_elsewhere_is_refused_with_its_reason() -> None:
    codes = torch.zeros(32, 24, dtype=torch.uint8)
    scales = torch.ones(32, 3).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match="multiple of 32"):
        blackwell.prepare_weight(codes, scales, torch.tensor(1.0))
    weight = blackwell.prepare_weight(codes[:, :16], scales[:, :2], torch.tensor(1.0))
    with pytest.raises(UnsupportedError, match="FP4 products: "):
        blackwell.multiply(torch.zeros(2, 32), weight, torch.tensor(1.0))
