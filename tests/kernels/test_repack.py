"""Tiled weights are undone exactly, and the operand words decode as the kernels decode them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import FormatError
from halfbyte.formats.minifloat import decode_e2m1
from halfbyte.kernels import repack


def _random_nvfp4(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (rows, columns // 16), dtype=torch.uint8, generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 20).map(lambda n: n * 24),
    columns=st.integers(1, 24).map(lambda n: n * 16),
    slice_rows=st.sampled_from([64, 128, 4096]),
)
def test_nvfp4_tiles_are_undone_whatever_the_shape(
    rows: int, columns: int, slice_rows: int
) -> None:
    codes, scales = _random_nvfp4(rows, columns, seed=rows * 1000 + columns)
    weight = repack.tile_nvfp4(codes, scales, torch.full((rows,), 0.25), slice_rows=slice_rows)
    back, back_scales = repack.untile_nvfp4(weight)
    assert torch.equal(back[:rows, :columns:2], codes & 15)
    assert torch.equal(back[:rows, 1:columns:2], codes >> 4)
    assert torch.equal(back_scales[:rows, : columns // 16], scales.float())
    assert not back[rows:].any() and not back[:, columns:].any()
    assert not back_scales[rows:].any() and not back_scales[:, columns // 16 :].any()
    assert weight.row_scale_O[0] == 0.25 * 256


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 20).map(lambda n: n * 24),
    columns=st.integers(1, 24).map(lambda n: n * 16),
    slice_rows=st.sampled_from([64, 128, 4096]),
)
def test_fast_tiles_hold_values_rounded_to_e4m3_whatever_the_shape(
    rows: int, columns: int, slice_rows: int
) -> None:
    codes, scales = _random_nvfp4(rows, columns, seed=rows * 1000 + columns)
    scales.view(torch.uint8)[0] = 0  # a row of zeros
    scales.view(torch.uint8)[1] = 1  # nothing but the least scale
    tensor_scale_O = torch.rand(rows) + 0.5
    weight = repack.tile_nvfp4(codes, scales, tensor_scale_O, slice_rows=slice_rows, is_fast=True)
    values = repack.fast_values(weight).float()
    assert bool(torch.isfinite(values).all())
    assert not values[rows:].any() and not values[:, columns:].any()
    found = values[:rows, :columns] * weight.row_scale_O[:rows, None] / tensor_scale_O[:, None]
    unpacked = torch.stack((codes & 15, codes >> 4), -1).reshape(rows, columns)
    exact = decode_e2m1(unpacked) * scales.float().repeat_interleave(16, 1)
    # Half a step of e4m3, or of e2m1 times the least scale: the row's largest over 2**10.
    largest_O1 = scales.float().amax(-1, keepdim=True)
    bound = torch.maximum(exact.abs() * 2.0**-4, largest_O1 * 2.0**-10)
    assert bool(((found - exact).abs() <= bound * 1.0001).all())


def test_fast_codes_and_scales_are_undone() -> None:
    codes = torch.randint(0, 256, (128, 192), dtype=torch.uint8)
    assert torch.equal(repack.unpack_fast_codes(repack.pack_fast_codes(codes)), codes)
    scales = torch.randint(0, 256, (128, 24), dtype=torch.uint8)
    assert torch.equal(repack.unpack_fast_scales(repack.pack_fast_scales(scales)), scales)


def _select_bytes(low: int, high: int, selector: int) -> int:
    """`prmt.b32` in its default mode."""
    source = (low | high << 32).to_bytes(8, "little")
    chosen = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        chosen.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def _look_up_as_the_kernel_does(codes: int, scales: int, index: int) -> list[int]:
    """`three_halves`, `magnitudes_of` and `look_up` of primitives.cu in Python integers."""
    mantissas = scales & 0x07070707
    grows = (mantissas + 0x07070707) & ~(mantissas + 0x02020202) & 0x08080808
    larger = scales + 0x04040404 + (grows >> 3)
    one, more = index, 4 + index
    low = _select_bytes(scales, larger, more << 12 | one << 8 | one << 4 | 8 | one) - 0x800
    high = _select_bytes(scales, larger, more << 12 | one << 8 | more << 4 | one) + 0x10100808
    selectors = codes & 0x77777777
    words = [
        _select_bytes(low, high, selectors) | codes & 0x80808080,
        _select_bytes(low, high, selectors >> 16) | codes << 4 & 0x80808080,
    ]
    return [byte for word in words for byte in word.to_bytes(4, "little")]


def test_looked_up_bytes_are_the_rounded_values_for_every_scale_and_code() -> None:
    # Every byte from 2**-5 to 60, in every place of a word; codes 0 to 7 and 8 to 15.
    for first in range(16, 104):
        scales = [first, 16 + (first * 7) % 88, 103, 16 + (first * 31) % 88]
        word = int.from_bytes(bytes(scales), "little")
        for index, scale in enumerate(scales):
            value = torch.tensor([scale], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
            for start in (0, 8):
                codes = list(range(start, start + 8))
                packed = torch.tensor(
                    [a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)]
                )
                row = packed.to(torch.uint8).repeat(64, 16)
                unit = repack.pack_fast_codes(row)[0, 0, :4].numpy().tobytes()
                found = _look_up_as_the_kernel_does(int.from_bytes(unit, "little"), word, index)
                exact = decode_e2m1(torch.tensor(codes, dtype=torch.uint8)) * value
                wanted = exact.to(torch.float8_e4m3fn)
                got = torch.tensor(found, dtype=torch.uint8).view(torch.float8_e4m3fn)
                assert torch.equal(got.float(), wanted.float()), (scale, codes)


def test_paired_activations_meet_the_weights_of_the_same_feature() -> None:
    """A product over a unit in the order in which lanes and registers hold it."""
    generator = torch.Generator().manual_seed(7)
    codes, scales = _random_nvfp4(64, 128, seed=8)
    weight = repack.tile_nvfp4(codes, scales, torch.ones(64), is_fast=True)
    values = repack.fast_values(weight).double()[:64]
    x = torch.randn(1, 128, generator=generator).to(torch.float8_e4m3fn)
    chunks = repack.pair_activations(x).double().view(2, 4, 4, 4)  # half chunk t byte
    unit = repack._move_signs(weight.data[0, 0, :4096], back=True)
    unit = unit.view(2, 4, 8, 4, 2, 8)  # half strip g t p byte
    nibbles = torch.stack((unit & 15, unit >> 4), -1).reshape(2, 4, 8, 4, 2, 4, 4)
    scale_bytes = weight.data[0, 0, 4096:].view(4, 8, 4, 2, 2)  # strip g t half p
    scale = scale_bytes.view(torch.float8_e4m3fn).double().permute(3, 0, 1, 2, 4)
    held = (decode_e2m1(nibbles).double() * scale[..., None, None]).to(torch.float8_e4m3fn)
    # half strip g t p chunk byte against half chunk t byte
    sums = torch.einsum("hsgtpcb,hctb->sgp", held.double(), chunks).reshape(64)
    assert torch.allclose(sums, values @ x.double()[0], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_byte_tiles_are_undone(dtype: torch.dtype) -> None:
    rows = torch.randint(0, 127, (192, 384), dtype=dtype)
    back = repack.untile_bytes(repack.tile_bytes(rows))
    assert torch.equal(back.view(dtype), rows)


def test_a_unit_holds_a_chunk_of_all_rows_in_permuted_strips() -> None:
    rows = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 128)
    unit = repack.tile_bytes(rows)[0, 0].view(8, 64, 16)
    assert unit[3, :, 0].tolist()[:16] == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]


def _unpack_as_the_kernel_does(word: int) -> list[tuple[float, float]]:
    """`unpack_e2m1` of primitives.cu in Python integers: four (low, high) fp16 pairs."""
    pairs = [
        word & 0x8E008E00,
        (word << 3) & 0x8E008E00,
        ((word & 0x40384038) * 66) & 0x8E008E00,
        ((word & 0x20072007) * 516) & 0x8E008E00,
    ]
    bits = torch.tensor([[p & 0xFFFF, p >> 16 & 0xFFFF] for p in pairs], dtype=torch.int32)
    values = bits.to(torch.uint16).view(torch.float16).float() * 2.0**14
    return [(low, high) for low, high in values.tolist()]


def test_operand_words_decode_to_the_codes_a_thread_multiplies() -> None:
    codes, scales = _random_nvfp4(64, 128, seed=5)
    unpacked = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(64, 128)
    values = decode_e2m1(unpacked)
    unit = repack.pack_operand_words(unpacked)[0, 0].view(torch.int32).view(2, 4, 32, 4)
    for half, strip, lane, step in ((0, 0, 0, 0), (1, 3, 31, 3), (0, 2, 13, 1), (1, 1, 6, 2)):
        g, t = lane // 4, lane % 4
        row, k = strip * 16 + 2 * g, half * 64 + step * 16 + 2 * t
        word = int(unit[half, strip, lane, step]) & 0xFFFFFFFF
        expected = [
            (values[row, k], values[row, k + 1]),
            (values[row + 1, k], values[row + 1, k + 1]),
            (values[row, k + 8], values[row, k + 9]),
            (values[row + 1, k + 8], values[row + 1, k + 9]),
        ]
        got = _unpack_as_the_kernel_does(word)
        assert got == [(float(a), float(b)) for a, b in expected]
    del scales


def test_every_block_scale_and_its_products_are_exact_in_fp16() -> None:
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    encoded = repack.encode_scales(scales)
    assert torch.equal(repack.decode_scales(encoded), scales.float())
    as_fp16 = (encoded.to(torch.int16) << 7).view(torch.float16)
    codes = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    products = (codes.float() * 2.0**-14).to(torch.float16)[None] * as_fp16[:, None]
    exact = codes.double()[None] * scales.double()[:, None]
    assert torch.equal(products.double() * repack.NVFP4_GAIN, exact)


def test_scale_words_give_both_steps_by_a_mask_and_a_rotation() -> None:
    scales = torch.randint(0, 256, (64, 8), dtype=torch.uint8)
    words = repack.pack_scales(scales)[0, 0].view(torch.int32).view(4, 8, 4)
    for strip, g, pair in ((0, 0, 0), (2, 5, 1), (3, 7, 3)):
        word = int(words[strip, g, pair]) & 0xFFFFFFFF
        rotated = (word << 8 | word >> 24) & 0xFFFFFFFF
        for step, value in ((0, word), (1, rotated)):
            kept = value & 0x7F807F80
            rows = scales[strip * 16 + 2 * g : strip * 16 + 2 * g + 2, pair * 2 + step]
            assert [kept >> 7 & 0xFF, kept >> 23] == rows.tolist()
    assert torch.equal(repack.unpack_scales(repack.pack_scales(scales)), scales)


def test_a_negative_block_scale_is_refused() -> None:
    codes, scales = _random_nvfp4(64, 128, seed=1)
    scales.view(torch.uint8)[3, 2] = 0x81
    with pytest.raises(FormatError, match="not negative"):
        repack.tile_nvfp4(codes, scales, torch.ones(64))


def test_activations_are_chunk_major() -> None:
    x = torch.randn(3, 128, dtype=torch.float16)
    tiled = repack.tile_activations(x, 8)
    assert tiled.shape == (16, 8, 16)
    assert torch.equal(tiled[5, 2].view(torch.float16), x[2, 40:48])
    assert not tiled[:, 3:].any()
    assert torch.equal(repack.untile_activations(tiled, 8, 3, 128, torch.float16), x)
    assert torch.equal(repack.untile_activations(tiled, 8, 2, 96, torch.float16), x[:2, :96])
