"""NVFP4 products on FP4 tensor cores, which exist from Blackwell on: data preparation and the call.

Not run on such a device: none was at hand. What is prepared here is tested on the CPU against
`formats`; the call itself follows torch's contract for float4 operands and is reached only where
`unavailable` says nothing. Activations are quantized to NVFP4 too, by the checkpoint's input scale,
as the checkpoint declares them.

Shapes: T tokens, O, I features, B 16-blocks along I.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.layout import swizzle_128x4
from halfbyte.formats.nvfp4 import encode_nvfp4

_FIRST_CAPABILITY = (10, 0)
# Features a row must be a multiple of: 32 codes are the 16 bytes that the hardware loads.
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Fp4Operand:
    """One side of the product, as `torch._scaled_mm` takes it.

    codes_RI2     uint8, two codes a byte, the even feature in the low nibble
    scales        e4m3, flat, in the order of `swizzle_128x4`
    tensor_scale  f32, multiplies everything
    """

    codes_RI2: Tensor
    scales: Tensor
    tensor_scale: Tensor


def unavailable(device_type: str) -> str | None:
    """Why FP4 products cannot run on a device of this type; None when they can."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _FIRST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}; FP4 products need 10.0"
    if not hasattr(torch, "float4_e2m1fn_x2"):
        return f"torch {torch.__version__} has no float4_e2m1fn_x2"
    return None


def prepare_weight(codes_OI2: Tensor, scale_OB: Tensor, tensor_scale: Tensor) -> Fp4Operand:
    """A stored NVFP4 weight; its codes are shared, its scales reordered.

    Raises FormatError if a row is not a multiple of 32 features.
    """
    in_features = codes_OI2.shape[1] * 2
    if in_features % _ALIGNMENT:
        raise FormatError(
            f"the weight has {in_features} input features; FP4 products need a multiple of 32"
        )
    return Fp4Operand(codes_OI2.contiguous(), swizzle_128x4(scale_OB), tensor_scale.float())


def prepare_activations(x_TI: Tensor, input_scale: Tensor) -> Fp4Operand:
    """Activations quantized to NVFP4 by the checkpoint's input scale."""
    encoded = encode_nvfp4(x_TI, input_scale)
    return prepare_weight(encoded.codes_OI2, encoded.scale_OB, input_scale)


def multiply(x_TI: Tensor, weight: Fp4Operand, input_scale: Tensor) -> Tensor:
    """X @ w^T in bf16 on FP4 tensor cores; see the module on what of this has run."""
    reason = unavailable(x_TI.device.type)
    if reason is not None:
        raise UnsupportedError(f"FP4 products: {reason}")
    x = prepare_activations(x_TI, input_scale)
    packed = torch.float4_e2m1fn_x2
    y_TO: Tensor = torch._scaled_mm(
        x.codes_RI2.view(packed),
        weight.codes_RI2.view(packed).t(),
        scale_a=x.scales,
        scale_b=weight.scales,
        out_dtype=torch.bfloat16,
    )
    return (y_TO.float() * (x.tensor_scale * weight.tensor_scale)).to(torch.bfloat16)
