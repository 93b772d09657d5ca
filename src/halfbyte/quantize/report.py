"""What quantization did to every linear, as records: error against the source, scales, coverage."""

import math
from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from halfbyte.formats.fp8 import decode_fp8
from halfbyte.formats.measure import chunk_values, clip_rate, relative_error, zero_rate
from halfbyte.formats.minifloat import E2M1_MAX, E4M3_MAX, decode_e4m3
from halfbyte.formats.nvfp4 import BLOCK, EncodedNVFP4, decode_nvfp4
from halfbyte.modules import WeightFormat
from halfbyte.quantize.encode import SourceWeight
from halfbyte.quantize.layer import QuantizedLinear


class LinearRecord(TypedDict):
    """What a run's record says of one linear, as JSON values.

    measured   share of the weight's rows that were looked at
    sqnr_db    None if nothing was lost
    clipped    share of weights beyond the largest value that the format holds under their scale
    zeroed     share of weights that became zero
    *_scale    the scalars of the linear, each if there is one
    output_db  what each method would have lost on sampled inputs, if data was run
    """

    name: str
    format: WeightFormat
    measured: float
    sqnr_db: float | None
    zeroed: float
    clipped: float
    weight_scale: NotRequired[float]
    tensor_scale: NotRequired[float]
    input_scale: NotRequired[float]
    output_db: NotRequired[Mapping[str, float | None]]


# Errors of larger weights are measured on evenly spaced rows that hold about this many: 4 M weights
# tell the error to 0.01 dB, and measuring all of a full-width layer would double the run.
SAMPLED_WEIGHTS = 1 << 22
_SCALARS: tuple[Literal["weight_scale", "tensor_scale", "input_scale"], ...] = (
    "weight_scale", "tensor_scale", "input_scale",
)  # fmt: skip


def linear_record(linear: QuantizedLinear) -> LinearRecord:
    """Error of one encoded linear against its source, decoded: the decoded weight is compared."""
    name, tensors = linear.name, linear.tensors
    step = max(1, math.ceil(linear.source.stored.numel() / SAMPLED_WEIGHTS))
    stored = linear.source.stored[::step]
    source = SourceWeight(name, stored, linear.source.scale).decoded()
    weight = tensors[f"{name}.weight"][::step]
    clipped = 0.0
    match linear.format:
        case "bf16":
            decoded = weight
        case "fp8":
            scale = tensors[f"{name}.weight_scale"]
            decoded = decode_fp8(weight, scale, source.dtype)
            clipped = clip_rate(source, float(scale) * E4M3_MAX)
        case "nvfp4":
            scales = tensors[f"{name}.weight_scale"][::step], tensors[f"{name}.tensor_scale"]
            decoded = decode_nvfp4(EncodedNVFP4(weight, *scales), source.dtype)
            clipped = _clipped_in_blocks(source, *scales)
    error = relative_error(source, decoded)
    record: LinearRecord = {
        "name": name,
        "format": linear.format,
        "measured": round(stored.shape[0] / linear.source.stored.shape[0], 6),
        "sqnr_db": None if error == 0 else round(-20 * math.log10(error), 3),
        "zeroed": round(zero_rate(source, decoded), 6),
        "clipped": round(clipped, 6),
    }
    for role in _SCALARS:
        tensor = tensors.get(f"{name}.{role}")
        if tensor is not None and tensor.numel() == 1:
            record[role] = float(tensor)
    return record


def _clipped_in_blocks(w_OI: Tensor, scale_OB: Tensor, tensor_scale: Tensor) -> float:
    """Share of weights beyond the largest that their block can hold.

    A block scale that was rounded down to e4m3 cuts its largest weights by up to 1/17, so some
    clip even under amax scales.
    """
    limits = decode_e4m3(scale_OB).mul_(tensor_scale.to(torch.float32)).mul_(E2M1_MAX)
    blocks, limits_B1 = w_OI.reshape(-1, BLOCK), limits.view(-1, 1)
    rows = chunk_values(w_OI.device) // BLOCK
    beyond = sum(
        int((blocks[start : start + rows].float().abs() > limits_B1[start : start + rows]).sum())
        for start in range(0, blocks.shape[0], rows)
    )
    return beyond / max(w_OI.numel(), 1)
