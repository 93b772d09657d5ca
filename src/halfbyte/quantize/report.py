"""What quantization did to every linear, as records: error against the source, scales, coverage."""

import math
from typing import Any

from halfbyte.formats.fp8 import decode_fp8
from halfbyte.formats.measure import relative_error, zero_rate
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4
from halfbyte.quantize.layer import QuantizedLinear

Record = dict[str, Any]


def linear_record(linear: QuantizedLinear) -> Record:
    """Error of one encoded linear against its source, decoded: the decoded weight is compared.

    name, format, sqnr_db (None if nothing changed), zeroed (share of weights that became zero),
    and the scalars of the linear under their role.
    """
    name, tensors = linear.name, linear.tensors
    source = linear.source.decoded()
    weight = tensors[f"{name}.weight"]
    match linear.format:
        case "bf16":
            decoded = weight
        case "fp8":
            decoded = decode_fp8(weight, tensors[f"{name}.weight_scale"], source.dtype)
        case "nvfp4":
            scales = tensors[f"{name}.weight_scale"], tensors[f"{name}.tensor_scale"]
            decoded = decode_nvfp4(EncodedNVFP4(weight, *scales), source.dtype)
    error = relative_error(source, decoded)
    record: Record = {
        "name": name,
        "format": linear.format,
        "sqnr_db": None if error == 0 else round(-20 * math.log10(error), 3),
        "zeroed": round(zero_rate(source, decoded), 6),
    }
    for tensor_name, tensor in tensors.items():
        if tensor.numel() == 1:
            record[tensor_name.rpartition(".")[2]] = float(tensor)
    return record
