"""Order in memory: nibbles in a byte, and the scale layout that Blackwell tensor cores read.

Legend: O rows (out features) · I columns (in features) · B 16-blocks along I.
"""

import torch
from torch import Tensor

from halfbyte.errors import FormatError

# The hardware reads block scales in tiles of 128 rows by 4 blocks (CUDA PTX ISA, tcgen05 scale
# factors "scale_vec::4X"; cuBLAS, "1D block scaling factors layout").
TILE_ROWS = 128
TILE_BLOCKS = 4


def pack_nibbles(codes_OI: Tensor) -> Tensor:
    """Two 4-bit codes a byte: even column in the low nibble, odd in the high one.

    codes_OI  uint8 0-15, an even number of columns
    returns   uint8 (..., I / 2)
    """
    if codes_OI.shape[-1] % 2:
        raise FormatError(
            f"{codes_OI.shape[-1]} columns of 4-bit codes: an odd number has no bytes"
        )
    return codes_OI[..., 0::2] | (codes_OI[..., 1::2] << 4)


def unpack_nibbles(packed_OI2: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 (..., 2 * I2) codes 0-15."""
    pair = torch.stack((packed_OI2 & 15, packed_OI2 >> 4), dim=-1)
    return pair.flatten(-2)


def pack_words(words: Tensor) -> Tensor:
    """Pack codes held in int32 (bits 0-3 the code, 4-7 zero, the rest anything); flat, uint8.

    Reads two codes as one int64, which is many times faster than strided columns. `words` must be
    contiguous, of even length, and is overwritten. Assumes a little-endian machine, as
    safetensors does.
    """
    pair = words.view(torch.int64)
    odd = (pair >> 28).bitwise_and_(0xF0)
    return pair.bitwise_or_(odd).to(torch.uint8)


def padded_scale_shape(rows: int, blocks: int) -> tuple[int, int]:
    """Rows and blocks rounded up to whole tiles of 128 x 4."""
    return (
        -(-rows // TILE_ROWS) * TILE_ROWS,
        -(-blocks // TILE_BLOCKS) * TILE_BLOCKS,
    )


def swizzle_128x4(scale_OB: Tensor) -> Tensor:
    """Block scales in the order Blackwell reads them; padding is zero.

    scale_OB  any one-byte dtype, (O, B)
    returns   same dtype, flat, of `padded_scale_shape` elements

    Tiles of 128 rows x 4 blocks follow each other row of tiles by row of tiles, 512 bytes each.
    Inside a tile the scale of row r and block b lies at (r % 32) * 16 + (r // 32) * 4 + b.

    Example: with 8 blocks a row, row 33, block 5 is in tile 1, at 512 + 1 * 16 + 1 * 4 + 1 = 533.
    """
    rows, blocks = scale_OB.shape
    padded_rows, padded_blocks = padded_scale_shape(rows, blocks)
    padded = torch.zeros((padded_rows, padded_blocks), dtype=torch.uint8, device=scale_OB.device)
    padded[:rows, :blocks] = scale_OB.view(torch.uint8)
    tiles = padded.view(padded_rows // TILE_ROWS, 4, 32, padded_blocks // TILE_BLOCKS, TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale_OB.dtype)


def unswizzle_128x4(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of `swizzle_128x4`, padding dropped: (rows, blocks), row-major."""
    padded_rows, padded_blocks = padded_scale_shape(rows, blocks)
    if swizzled.numel() != padded_rows * padded_blocks:
        raise FormatError(
            f"{swizzled.numel()} swizzled scales; {rows} rows of {blocks} blocks "
            f"have {padded_rows * padded_blocks}"
        )
    tiles = swizzled.view(torch.uint8).view(
        padded_rows // TILE_ROWS, padded_blocks // TILE_BLOCKS, 32, 4, TILE_BLOCKS
    )
    rowwise = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_blocks)
    return rowwise[:rows, :blocks].contiguous().view(swizzled.dtype)
