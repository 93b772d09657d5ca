"""Stored weights in the order the streaming linears read them, and back.

A *unit* is 64 output features of one K block, contiguous in memory, so that one bulk copy brings
it; units follow each other along K, then along the output features. Rows of a 16-row strip are
permuted so that a thread of the tensor-core product ends up with two neighbouring output features.

    FP8    K block of 128, 8192 bytes: [chunk of 16 inputs][row][16 bytes]
    bf16   K block of  64, 8192 bytes: [chunk of  8 inputs][row][16 bytes]
    NVFP4  K block of 128, 4608 bytes: [half][warp][lane][16 bytes] codes, [warp][8][16] scales
    NVFP4 for the fast product, likewise: [half][warp][lane][16] codes, [warp][lane][4] scales

NVFP4 codes for the exact product lie in the registers' order of an m64k16 operand, eight codes a
32-bit word, four words (k-steps of 16 inputs) a thread and load. In each 16-bit half of a word the
codes of the operand's four registers put sign | magnitude at bits 15|11-9, 12|8-6, 14|5-3,
13|2-0: nine integer operations make four fp16 pairs, each value times 2**-14. A block scale s
becomes the byte of exponent (5 bits) and mantissa (3 bits) of fp16(s * 2**6), which holds every
e4m3 value >= 0; four of them lie in a word so that three operations make two fp16 pairs. Code times
scale is exact in fp16, 2**-8 too small; the weight's row scale makes up for it.

The fast product multiplies values rounded to e4m3, which it looks up: a lane holds whole 16-blocks,
so that the eight magnitudes of one scale, in two words, serve sixteen codes. Of 64 inputs (a
"half"), lane t of four has block t of rows 2g and 2g + 1: 16 bytes as the checkpoint stores them, a
row after the other, but for the signs, which lie in a word as those of e4m3 values would: of codes
0 to 3 at bits 7, 15, 23, 31, of codes 4 to 7 four bits lower. Its four scales (half, row) are one
word. A scale is stored as the e4m3 byte of s * 2**k, where k puts a row's largest at exponent 12
(`fast_scales`): six times it stays below 448, and the half of every scale from 2**-5 on is a normal
number, so that seven magnitudes come from two bytes by adding to their exponents.

Every function here runs on any device; `untile_*` is the exact inverse of `tile_*` up to padding.
Shape legend: O, I out and in features; B 16-blocks along I; R 64-row tiles; C K blocks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.minifloat import decode_e2m1, encode_e2m1

ROWS = 64  # of a unit
# Rows are padded to this many so that one block of the grid always has whole tiles.
TILE_ROWS = 256
UNIT_BYTES = {"fp8": 8192, "bf16": 8192, "nvfp4": 4608, "nvfp4_fast": 4608}
K_BLOCK = {"fp8": 128, "bf16": 64, "nvfp4": 128, "nvfp4_fast": 128}
# Code value 2**-14 times scale 2**6.
NVFP4_GAIN = 2.0**8
# Largest and least block scale of the fast product, as powers of two.
_FAST_TOP = 5
_FAST_LEAST = -5
_SIGN_BIT = (15, 12, 14, 13)  # per operand register
_MAGNITUDE_BIT = (9, 6, 3, 0)

TileFormat = Literal["fp8", "nvfp4", "nvfp4_fast", "bf16"]


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """A weight in units, ready for the streaming product.

    data            uint8 (R, C, unit bytes)
    row_scale_O     f32, multiplies the sums of an output feature (weight scale, and whatever the
                    format left out); the activations' scale is the caller's to multiply in
    out_features    padded to whole tiles
    in_features     as stored; units beyond it are zero
    """

    format: TileFormat
    data: Tensor
    row_scale_O: Tensor
    out_features: int
    in_features: int

    @property
    def num_k_blocks(self) -> int:
        """Number of K blocks that a row tile has."""
        return self.data.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes that the product reads: the tiles and an f32 scale a row."""
        return self.data.numel() + self.row_scale_O.numel() * 4


def padded(size: int, multiple: int) -> int:
    """The next multiple of `multiple` from `size` on."""
    return (size + multiple - 1) // multiple * multiple


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    out, in_ = matrix.shape
    if (out, in_) == (rows, columns):
        return matrix
    target = matrix.new_zeros(rows, columns)
    target[:out, :in_] = matrix
    return target


def tile_bytes(rows_OI: Tensor) -> Tensor:
    """Tile a matrix of 1- or 2-byte elements: (O, I) -> uint8 (R, C, 8192), exact inverse below.

    O a multiple of 64, a row a multiple of 128 bytes.
    """
    rows = rows_OI.contiguous().view(torch.uint8)
    num_rows, row_bytes = rows.shape
    if num_rows % ROWS or row_bytes % 128:
        raise FormatError(f"cannot tile {num_rows} rows of {row_bytes} bytes into 64 x 128 units")
    # row = 16 strip + 2 g + p lies at 16 strip + 8 p + g.
    parts = rows.view(num_rows // ROWS, 4, 8, 2, row_bytes // 128, 8, 16)
    return parts.permute(0, 4, 5, 1, 3, 2, 6).reshape(num_rows // ROWS, row_bytes // 128, 8192)


def untile_bytes(units: Tensor) -> Tensor:
    """Undo `tile_bytes`: uint8 (R, C, 8192) -> uint8 (64 R, 128 C)."""
    num_tiles, num_blocks, _ = units.shape
    parts = units.view(num_tiles, num_blocks, 8, 4, 2, 8, 16)
    return parts.permute(0, 3, 5, 4, 1, 2, 6).reshape(num_tiles * ROWS, num_blocks * 128)


def pack_operand_words(codes_OI: Tensor) -> Tensor:
    """Unpacked e2m1 codes (O, I) uint8 -> uint8 (R, C, 4096) in operand order."""
    out, in_ = codes_OI.shape
    shape = (out // ROWS, 4, 8, 2, in_ // 128, 2, 4, 2, 4, 2)  # R strip g p | C half step hi t e
    parts = codes_OI.view(shape).permute(
        0, 4, 5, 1, 2, 8, 6, 9, 7, 3
    )  # R C half strip g t step e hi p
    parts = parts.reshape(*parts.shape[:8], 4)  # register = p + 2 hi
    halves = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=codes_OI.device)
    for register in range(4):
        code = parts[..., register].to(torch.int32)
        halves |= (code >> 3) << _SIGN_BIT[register] | (code & 7) << _MAGNITUDE_BIT[register]
    low = halves.to(torch.uint8)
    high = (halves >> 8).to(torch.uint8)
    return torch.stack((low, high), dim=-1).reshape(out // ROWS, in_ // 128, 4096)


def unpack_operand_words(units: Tensor) -> Tensor:
    """Undo `pack_operand_words`: uint8 (R, C, 4096) -> codes (64 R, 128 C) uint8."""
    num_tiles, num_blocks, _ = units.shape
    shape = (num_tiles, num_blocks, 2, 4, 8, 4, 4, 2, 2)  # R C half strip g t step e byte
    pairs = units.view(shape).to(torch.int32)
    halves = pairs[..., 0] | pairs[..., 1] << 8
    registers = [
        (halves >> _SIGN_BIT[r] & 1) << 3 | halves >> _MAGNITUDE_BIT[r] & 7 for r in range(4)
    ]
    parts = torch.stack(registers, dim=-1).to(torch.uint8)
    parts = parts.view(num_tiles, num_blocks, 2, 4, 8, 4, 4, 2, 2, 2)  # ... step e hi p
    parts = parts.permute(0, 3, 4, 9, 1, 2, 6, 8, 5, 7)
    return parts.reshape(num_tiles * ROWS, num_blocks * 128)


def encode_scales(scale_OB: Tensor) -> Tensor:
    """Block scales e4m3 >= 0 -> their bytes: exponent and mantissa of fp16(s * 64). Exact."""
    half = (scale_OB.to(torch.float32) * 64.0).to(torch.float16).view(torch.int16)
    return (half >> 7).to(torch.uint8)


def decode_scales(bytes_OB: Tensor) -> Tensor:
    """Undo `encode_scales`: bytes (O, B) -> f32 scales (O, B). Exact."""
    half = (bytes_OB.to(torch.int16) << 7).view(torch.float16)
    return half.to(torch.float32) / 64.0


def pack_scales(bytes_OB: Tensor) -> Tensor:
    """Scale bytes (O, B) -> uint8 (R, C, 512): a word holds two k-steps of rows 2g and 2g + 1.

    The even step's bytes sit at bits 14-7 and 30-23, where an fp16 has exponent and mantissa; the
    odd step's do after a rotation to the left by 8.
    """
    out, blocks = bytes_OB.shape
    parts = bytes_OB.view(out // ROWS, 4, 8, 2, blocks // 8, 4, 2)  # R strip g p | C pair odd
    parts = parts.permute(0, 4, 1, 2, 5, 6, 3).to(torch.int64)  # R C strip g pair odd p
    pairs = parts[..., 0] << 7 | parts[..., 1] << 23
    even, odd = pairs[..., 0], pairs[..., 1]
    words = even | odd >> 8 | (odd & 0xFF) << 24
    as_bytes = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    return as_bytes.to(torch.uint8).reshape(out // ROWS, blocks // 8, 512)


def unpack_scales(units: Tensor) -> Tensor:
    """Undo `pack_scales`: uint8 (R, C, 512) -> (64 R, 8 C)."""
    num_tiles, num_blocks, _ = units.shape
    parts = units.view(num_tiles, num_blocks, 4, 8, 4, 4).to(torch.int64)  # R C strip g pair byte
    words = sum(parts[..., i] << 8 * i for i in range(4))
    assert isinstance(words, Tensor)
    rotated = (words << 8 | words >> 24) & 0xFFFFFFFF
    steps = torch.stack([words, rotated], dim=-1)  # R C strip g pair odd
    rows = torch.stack([steps >> 7 & 0xFF, steps >> 23 & 0xFF], dim=-1).to(torch.uint8)
    # R C strip g pair odd p -> R strip g p C pair odd
    return rows.permute(0, 2, 3, 6, 1, 4, 5).reshape(num_tiles * ROWS, num_blocks * 8)


def tile_nvfp4(
    codes_OI2: Tensor,
    scale_OB: Tensor,
    tensor_scale_O: Tensor,
    *,
    slice_rows: int = 4096,
    is_fast: bool = False,
) -> TiledWeight:
    """Prepare an NVFP4 weight; members of a fused group are stacked.

    codes_OI2       uint8, low nibble the even input; not modified
    scale_OB        e4m3 >= 0; not modified
    tensor_scale_O  f32, of each row
    slice_rows      rows repacked at a time, which bounds the scratch memory to 20 bytes a code
    is_fast         for the product that rounds to e4m3 (format "nvfp4_fast")
    """
    out, in_ = codes_OI2.shape[0], codes_OI2.shape[1] * 2
    if (scale_OB.view(torch.uint8) > 0x7E).any():
        raise FormatError("NVFP4 block scales must be finite and not negative")
    rows, columns = padded(out, TILE_ROWS), padded(in_, 128)
    shape = (rows // ROWS, columns // 128, UNIT_BYTES["nvfp4"])
    data = torch.zeros(shape, dtype=torch.uint8, device=codes_OI2.device)
    row_scale_O = tensor_scale_O * (1.0 if is_fast else NVFP4_GAIN)
    for start in range(0, out, slice_rows):
        stop = min(out, start + slice_rows)
        packed, scales = codes_OI2[start:stop], scale_OB[start:stop]
        whole = padded(stop - start, ROWS)
        tiles = slice(start // ROWS, (start + whole) // ROWS)
        if is_fast:
            packed, encoded, gain_O = fast_scales(packed, scales)
            row_scale_O[start:stop] *= gain_O
            data[tiles, :, :4096] = pack_fast_codes(_pad(packed, whole, columns // 2))
            data[tiles, :, 4096:] = pack_fast_scales(_pad(encoded, whole, columns // 16))
        else:
            codes = _unpacked(packed)
            data[tiles, :, :4096] = pack_operand_words(_pad(codes, whole, columns))
            encoded = encode_scales(scales)
            data[tiles, :, 4096:] = pack_scales(_pad(encoded, whole, columns // 16))
    scale = _padded_scales(row_scale_O, rows)
    return TiledWeight("nvfp4_fast" if is_fast else "nvfp4", data, scale, rows, in_)


def untile_nvfp4(weight: TiledWeight) -> tuple[Tensor, Tensor]:
    """Codes (O, I) unpacked uint8 and scales (O, B) f32 of a tiled weight, padding included.

    Of "nvfp4_fast" the codes and scales that the product works with (`fast_scales`).
    """
    codes, scales = weight.data[..., :4096].contiguous(), weight.data[..., 4096:].contiguous()
    if weight.format == "nvfp4_fast":
        scale_OB = unpack_fast_scales(scales).view(torch.float8_e4m3fn).float()
        return _unpacked(unpack_fast_codes(codes)), scale_OB
    return unpack_operand_words(codes), decode_scales(unpack_scales(scales))


def _unpacked(codes_OI2: Tensor) -> Tensor:
    """Two codes a byte, low nibble first -> one a byte."""
    pairs = torch.stack((codes_OI2 & 15, codes_OI2 >> 4), dim=-1)
    return pairs.reshape(codes_OI2.shape[0], codes_OI2.shape[1] * 2)


def fast_scales(codes_OI2: Tensor, scale_OB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale bytes and the gain of each row for the fast product.

    Scales times 2**k, the row's largest then in [32, 64); exact, but for scales more than 2**10
    below the largest: their blocks are rounded again to the least scale, 2**-5.

    returns  uint8 (O, I / 2), not to be modified; e4m3 bytes (O, B); f32 (O,), which makes up for
             2**k
    """
    scale_OB = scale_OB.float()
    exponent_O1 = torch.frexp(scale_OB.amax(-1, keepdim=True)).exponent - 1
    gain_O1 = torch.ldexp(torch.ones_like(scale_OB[:, :1]), exponent_O1 - _FAST_TOP)
    wanted_OB = scale_OB / gain_O1
    least = 2.0**_FAST_LEAST
    is_small_OB = wanted_OB < least
    encoded_OB = wanted_OB.clamp(min=least).to(torch.float8_e4m3fn).view(torch.uint8)
    if is_small_OB.any():
        blocks_XJ = codes_OI2.view(*scale_OB.shape, 8)[is_small_OB]
        values_XI = decode_e2m1(_unpacked(blocks_XJ)) * (wanted_OB[is_small_OB] / least)[:, None]
        again_XI = encode_e2m1(values_XI)
        codes_OI2 = codes_OI2.clone()
        again_XJ = again_XI[:, 0::2] | again_XI[:, 1::2] << 4
        codes_OI2.view(*scale_OB.shape, 8)[is_small_OB] = again_XJ
    return codes_OI2, encoded_OB, gain_O1[:, 0]


def pack_fast_codes(codes_OI2: Tensor) -> Tensor:
    """Packed codes (O, I / 2), two a byte -> uint8 (R, C, 4096) as the fast product reads them."""
    out, half_width = codes_OI2.shape
    parts = _move_signs(codes_OI2, back=False).reshape(
        out // ROWS, 4, 8, 2, half_width // 64, 2, 4, 8
    )
    # R strip g p C half t byte -> R C half strip g t p byte
    return parts.permute(0, 4, 5, 1, 2, 6, 3, 7).reshape(out // ROWS, half_width // 64, 4096)


def unpack_fast_codes(units: Tensor) -> Tensor:
    """Undo `pack_fast_codes`: uint8 (R, C, 4096) -> (64 R, 64 C)."""
    num_tiles, num_blocks, _ = units.shape
    parts = units.view(num_tiles, num_blocks, 2, 4, 8, 4, 2, 8)
    packed = parts.permute(0, 3, 4, 6, 1, 2, 5, 7).reshape(num_tiles * ROWS, num_blocks * 64)
    return _move_signs(packed, back=True)


def _move_signs(packed: Tensor, *, back: bool) -> Tensor:
    """Signs of the eight codes in a word of four bytes from bits 4 i + 3 to 8 i + 7 (i < 4) and
    8 (i - 4) + 3 (i >= 4), or back.
    """
    words = packed.contiguous().view(torch.int32)
    moved = words & 0x77777777
    for i in range(8):
        places = (4 * i + 3, 8 * i + 7 if i < 4 else 8 * (i - 4) + 3)
        source, target = reversed(places) if back else places
        moved |= (words >> source & 1) << target
    return moved.view(torch.uint8)


def pack_fast_scales(bytes_OB: Tensor) -> Tensor:
    """Scale bytes (O, B) -> uint8 (R, C, 512): a lane's word holds (half, row) in this order."""
    out, blocks = bytes_OB.shape
    parts = bytes_OB.reshape(out // ROWS, 4, 8, 2, blocks // 8, 2, 4)
    # R strip g p C half t -> R C strip g t half p
    return parts.permute(0, 4, 1, 2, 6, 5, 3).reshape(out // ROWS, blocks // 8, 512)


def unpack_fast_scales(units: Tensor) -> Tensor:
    """Undo `pack_fast_scales`: uint8 (R, C, 512) -> (64 R, 8 C)."""
    num_tiles, num_blocks, _ = units.shape
    parts = units.view(num_tiles, num_blocks, 4, 8, 4, 2, 2)
    return parts.permute(0, 2, 3, 6, 1, 5, 4).reshape(num_tiles * ROWS, num_blocks * 8)


def _padded_scales(scale_O: Tensor, rows: int) -> Tensor:
    target = torch.ones(rows, dtype=torch.float32, device=scale_O.device)
    target[: scale_O.shape[0]] = scale_O
    return target


def tile_rows(weight_OI: Tensor, scale_O: Tensor, format_: TileFormat) -> TiledWeight:
    """Prepare an FP8 (e4m3) or bf16 weight; members of a fused group are stacked.

    weight_OI   not modified
    scale_O     f32, of each row
    """
    out, in_ = weight_OI.shape
    rows, columns = padded(out, TILE_ROWS), padded(in_, K_BLOCK[format_])
    as_integers = weight_OI.view(torch.int16 if format_ == "bf16" else torch.uint8)
    data = tile_bytes(_pad(as_integers, rows, columns))
    return TiledWeight(format_, data, _padded_scales(scale_O, rows), rows, in_)


def untile_rows(weight: TiledWeight) -> Tensor:
    """The (O, I) matrix of an FP8 or bf16 tiled weight, padding included, in its own dtype."""
    dtype = torch.bfloat16 if weight.format == "bf16" else torch.float8_e4m3fn
    return untile_bytes(weight.data).view(dtype)


def pair_activations(x_TI: Tensor) -> Tensor:
    """E4m3 activations as the fast NVFP4 product reads them: (T, I) -> (T, I), I % 64 == 0.

    Of 64 features, 16 t + 4 c to 16 t + 4 c + 3 lie at 16 c + 4 t (c, t = 0..3): chunk c meets the
    weights that the lanes t hold of their blocks. Twin of OUT_E4M3_PAIRED.
    """
    tokens, features = x_TI.shape
    fours = x_TI.contiguous().view(torch.uint8).view(tokens, features // 64, 4, 4, 4)
    return fours.transpose(2, 3).reshape(tokens, features).view(x_TI.dtype)


def fast_values(weight: TiledWeight) -> Tensor:
    """Values that the fast product multiplies: code times block scale, rounded to e4m3, (O, I).

    What padding rows hold means nothing.
    """
    codes, scales = untile_nvfp4(weight)
    values = decode_e2m1(codes) * scales.repeat_interleave(16, dim=1)
    return values.to(torch.float8_e4m3fn)


def tile_activations(x_TI: Tensor, num_columns: int) -> Tensor:
    """Activations in the order the streaming product reads them: uint8 (chunks, columns, 16).

    x_TI    rows of 1- or 2-byte elements, a row a multiple of 128 bytes; T <= num_columns
    Twin of what the fused kernels write; chunk-major, so that a K block is one contiguous copy.
    """
    rows = x_TI.contiguous().view(torch.uint8)
    tokens, row_bytes = rows.shape
    target = torch.zeros(row_bytes // 16, num_columns, 16, dtype=torch.uint8, device=rows.device)
    target[:, :tokens] = rows.view(tokens, row_bytes // 16, 16).permute(1, 0, 2)
    return target


def untile_activations(
    data: Tensor, num_columns: int, num_rows: int, row_elements: int, dtype: torch.dtype
) -> Tensor:
    """The first rows of what `tile_activations` made, (num_rows, row_elements).

    row_elements   of `dtype`, a multiple of 16 bytes; what pads a row to whole K blocks is left out
    """
    num_chunks = row_elements * dtype.itemsize // 16
    chunks = data.view(-1)[: num_chunks * num_columns * 16].view(num_chunks, num_columns, 16)
    rows = chunks[:, :num_rows].permute(1, 0, 2).reshape(num_rows, num_chunks * 16)
    return rows.view(dtype)
