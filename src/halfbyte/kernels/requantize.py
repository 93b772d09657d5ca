"""What an FP8 weight becomes in NVFP4, as a table over its codes; `cpu/requantize.c` reads it.

Every entry is made by `formats` itself, so rounding is stated there and nowhere else. A weight with
one scale has 127 magnitudes; a block's scale follows from its largest one, and so 127 x 127
quotients are all that can occur.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.formats.fp8 import decode_fp8
from halfbyte.formats.layout import unpack_nibbles
from halfbyte.formats.nvfp4 import BLOCK, block_scales, encode_nvfp4_with

_CODES = 128  # e4m3 magnitudes; the last is NaN
_LARGEST_CODE = 0x7E
_E2M1_CODES = 8


class RequantizingTable(NamedTuple):
    """Indexed by the largest magnitude code M of a block.

    limits_MKB        int8, (128, 8, 16): the largest magnitude code that stays below e2m1 code
                      k + 1 for k < 7, and for k = 7 the largest that loses its sign, in all lanes
    block_scale_M     e4m3
    decoded_M         bf16: what the magnitude codes themselves stand for
    """

    limits_MKB: Tensor
    block_scale_M: Tensor
    decoded_M: Tensor


def requantizing_table(scale: Tensor, tensor_scale: Tensor) -> RequantizingTable:
    """The table of one weight; its scale must be positive and finite, or order is not kept.

    scale, tensor_scale   as in `dispatch.fp8_to_nvfp4`
    Raises FormatError if the tensor scale is not positive and finite.
    """
    codes_M = torch.arange(_CODES, dtype=torch.uint8).clamp_(max=_LARGEST_CODE)
    decoded_M = decode_fp8(codes_M.view(torch.float8_e4m3fn), scale)
    block_scale_M = block_scales(decoded_M.to(torch.float32), tensor_scale)
    scale_OB = block_scale_M[:, None].repeat(1, _CODES // BLOCK)
    negative_OI = decoded_M.neg().repeat(_CODES, 1)
    signed_OI = unpack_nibbles(encode_nvfp4_with(negative_OI, scale_OB, tensor_scale).codes_OI2)
    magnitude_OI, is_signed_OI = signed_OI[:, :-1] & 7, signed_OI[:, :-1] >= _E2M1_CODES
    below = [(magnitude_OI < code).sum(1) for code in range(1, _E2M1_CODES)]
    limits_MK = torch.stack((*below, is_signed_OI.logical_not().sum(1)), 1) - 1
    limits_MKB = limits_MK.to(torch.int8)[:, :, None].repeat(1, 1, BLOCK)
    return RequantizingTable(limits_MKB, block_scale_M, decoded_M)
