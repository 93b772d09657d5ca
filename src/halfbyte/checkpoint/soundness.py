"""Whether the values of one tensor can be what they claim: the one statement of it.

`verify` asks it of a finished checkpoint, whoever writes one asks it of every tensor on its way to
the disk. So nothing is published that `verify` would refuse for its values.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import decode_fp8, encode_fp8, fp8_scale
from halfbyte.formats.measure import chunk_values, largest_fp8_code, largest_magnitude, sqnr_db
from halfbyte.formats.nvfp4 import decode_nvfp4, encode_nvfp4, nvfp4_tensor_scale
from halfbyte.log import logger

Severity = Literal["error", "warning"]
LargestCode = Callable[[Tensor], Tensor]

# Worst SQNR that each format gives on weights as they occur. A uniform 3-bit mantissa gives 31 dB
# on anything bell-shaped, 16-blocks of e2m1 20 dB; half a scale off leaves 6 dB, the block scales
# of another layer about 11 dB.
MIN_SQNR_DB = {"fp8": 25.0, "nvfp4": 15.0}
# Below those, a weight may still be as near as its own best scales bring it, give or take this.
_SLACK_DB = 1.0

_NAN_CODE = 0x7F  # of e4m3, without its sign
# Magnitude bits of two packed e2m1 codes.
_NIBBLE_MAGNITUDES = 0x77


class Fault(NamedTuple):
    """What is wrong with a tensor. An error must not be served; a warning is worth a look."""

    severity: Severity
    what: str


def faults(
    name: str, tensor: Tensor, largest_code: LargestCode = largest_fp8_code
) -> Iterator[Fault]:
    """What is wrong with the values of one tensor, judged without any other tensor.

    name          canonical tensor name
    tensor        as stored, on any device; 0-d tensors are scales
    largest_code  how to find the largest magnitude among e4m3 codes; a faster way than the plain
                  one, with the same result
    """
    if tensor.dim() == 0:
        value = float(tensor)
        if not (math.isfinite(value) and value > 0):
            yield Fault("error", f"is {value:g}; a scale is above 0")
    elif tensor.dtype == torch.float8_e4m3fn:
        yield from _code_faults(name, tensor, largest_code)
    elif tensor.dtype == torch.uint8:
        if not _any_nonzero(tensor):
            yield Fault("error", "is all zero")
    else:
        largest = largest_magnitude(tensor)
        if not bool(torch.isfinite(largest)):
            yield Fault("error", "holds NaN or infinity")
        elif tensor.shape[0] > 1 and largest == 0:
            yield Fault("warning" if _may_be_zero(name) else "error", "is all zero")


def _may_be_zero(name: str) -> bool:
    """Whether a bf16 tensor of zeros is odd, yet a model: a pruned linear, a bias left at 0."""
    if name.endswith(".bias"):
        return True
    is_table = name in ("embedding.weight", "head.weight", "encoder.patch.weight")
    return not (is_table or "norm" in name)


def _code_faults(name: str, codes: Tensor, largest_code: LargestCode) -> Iterator[Fault]:
    largest = int(largest_code(codes).view(torch.uint8))
    if largest == _NAN_CODE:
        yield Fault("error", "holds e4m3 codes that mean NaN")
    if name.endswith(".weight_scale") and bool((codes.view(torch.uint8) & 0x80).any()):
        yield Fault("error", "holds negative block scales")
    if largest == 0:
        yield Fault("error", "is all zero")


def _any_nonzero(packed: Tensor) -> bool:
    """Whether any of the packed codes is not zero; looks no further than the first."""
    flat, chunk = packed.reshape(-1), chunk_values(packed.device)
    return any(
        bool((flat[start : start + chunk] & _NIBBLE_MAGNITUDES).any())
        for start in range(0, flat.numel(), chunk)
    )


def require_sound(
    name: str, where: str, tensor: Tensor, largest_code: LargestCode = largest_fp8_code
) -> None:
    """Raise FormatError for a tensor that must not be published; log what is worth a look.

    name    canonical tensor name
    where   the name that people know it by: as the files spell it
    """
    for fault in faults(name, tensor, largest_code):
        if fault.severity == "error":
            raise FormatError(f"{where}: {fault.what}; `halfbyte verify` would refuse it")
        logger.warning("%s: %s", where, fault.what)


class Closeness(NamedTuple):
    """How near an encoded weight is to its source, and how near its format must bring it, in dB."""

    sqnr_db: float
    floor_db: float

    @property
    def is_far(self) -> bool:
        """Whether the distance from the source means that codes or scales are wrong."""
        return self.sqnr_db < self.floor_db


def closeness(chosen: Literal["fp8", "nvfp4"], original: Tensor, decoded: Tensor) -> Closeness:
    """Compare what an encoded weight stands for with its source.

    original   bf16, finite
    decoded    f32, of the same shape

    The floor is what the format gives on weights as they occur, or what it gives on this one with
    scales of its own, whichever is lower: a weight may be of such values that no scale suits it.
    """
    ratio, usual = sqnr_db(original, decoded), MIN_SQNR_DB[chosen]
    if ratio >= usual:
        return Closeness(ratio, usual)
    return Closeness(ratio, min(usual, _own_sqnr_db(chosen, original) - _SLACK_DB))


def _own_sqnr_db(chosen: Literal["fp8", "nvfp4"], original: Tensor) -> float:
    largest = largest_magnitude(original)
    if largest == 0:
        return math.inf  # nothing but zeros stands for zeros
    try:
        if chosen == "fp8":
            scale = fp8_scale(largest)
            return sqnr_db(original, decode_fp8(encode_fp8(original, scale), scale, torch.float32))
        encoded = encode_nvfp4(original, nvfp4_tensor_scale(largest))
    except FormatError:
        return -math.inf  # so small that no scale can be stored
    return sqnr_db(original, decode_nvfp4(encoded, torch.float32))
