"""Nibbles and hardware scale layout: by hand, and undone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import FormatError
from halfbyte.formats.layout import (
    pack_nibbles,
    pack_words,
    padded_scale_shape,
    swizzle_128x4,
    unpack_nibbles,
    unswizzle_128x4,
)


def test_even_column_is_the_low_nibble() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_every_byte_survives_unpacking() -> None:
    every_byte = torch.arange(256).to(torch.uint8).view(16, 16)
    assert torch.equal(pack_nibbles(unpack_nibbles(every_byte)), every_byte)


def test_words_pack_like_nibbles() -> None:
    codes = torch.randint(0, 16, (4, 32), generator=torch.Generator().manual_seed(0))
    noise = 0x4B000000
    packed = pack_words((codes.int() | noise).view(-1))
    assert torch.equal(packed, pack_nibbles(codes.to(torch.uint8)).view(-1))


def test_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(FormatError, match="odd number"):
        pack_nibbles(torch.zeros(2, 3, dtype=torch.uint8))


@given(st.integers(1, 300), st.integers(1, 13))
def test_swizzle_is_undone(rows: int, blocks: int) -> None:
    scale = torch.randint(0, 256, (rows, blocks)).to(torch.uint8)
    swizzled = swizzle_128x4(scale)
    padded_rows, padded_blocks = padded_scale_shape(rows, blocks)
    assert swizzled.numel() == padded_rows * padded_blocks
    assert torch.equal(unswizzle_128x4(swizzled, rows, blocks), scale)
    assert int(swizzled.long().sum()) == int(scale.long().sum())


def test_swizzle_puts_each_scale_where_the_hardware_reads_it() -> None:
    rows, blocks = 256, 8
    scale = (torch.arange(rows * blocks) % 251).to(torch.uint8).view(rows, blocks)
    swizzled = swizzle_128x4(scale)
    for row, block in ((0, 0), (33, 5), (31, 3), (127, 7), (128, 0), (255, 7)):
        tile = (row // 128) * (blocks // 4) + block // 4
        place = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
        assert swizzled[place] == scale[row, block]


def test_swizzle_keeps_the_dtype_and_refuses_a_wrong_length() -> None:
    scale = torch.ones(3, 3).to(torch.float8_e4m3fn)
    swizzled = swizzle_128x4(scale)
    assert swizzled.dtype == torch.float8_e4m3fn
    with pytest.raises(FormatError, match="512 swizzled scales"):
        unswizzle_128x4(swizzled, 129, 3)
