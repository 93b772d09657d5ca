"""One linear, `y = linear(x)`, whatever the weight is stored in; fused groups as one product.

`weight_only` decodes weights exactly and leaves activations alone; `declared` also rounds
activations to FP8 or NVFP4 by the checkpoint's input scale, as hardware with such products would
(decision 0004); `fp8_declared` does so for FP8 linears only, as the Hopper kernels do (decision
0038). FP8 linears without an input scale, or all of them if so told, round each token by its own
largest value (decision 0157). Who reads files is `load`; the products are ops of
`kernels.dispatch`.

Shapes: T tokens, O, I features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.formats.fp8 import round_to_fp8
from halfbyte.formats.nvfp4 import round_to_nvfp4
from halfbyte.kernels import dispatch
from halfbyte.kernels.dispatch import PreparedWeight
from halfbyte.modules import Fp8Activations, WeightFormat
from halfbyte.modules import Mode as Mode

_PRODUCTS: dict[WeightFormat, Callable[..., Tensor]] = {
    "bf16": dispatch.linear_bf16,
    "fp8": dispatch.linear_fp8,
    "nvfp4": dispatch.linear_nvfp4,
}
_ROUNDINGS = {"fp8": round_to_fp8, "nvfp4": round_to_nvfp4}


@dataclass(frozen=True, slots=True, eq=False)
class StoredLinear:
    """One linear as a checkpoint holds it, on the device where it is to run.

    weight        bf16 (O, I), e4m3 codes (O, I) or packed e2m1 codes (O, I / 2)
    weight_scale  FP8: f32 scalar, or (O, 1) of each row; NVFP4: e4m3 (O, I / 16)
    tensor_scale  NVFP4: f32 scalar
    input_scale   f32 scalar, None where the checkpoint has none
    """

    name: str
    format: WeightFormat
    weight: Tensor
    weight_scale: Tensor | None = None
    tensor_scale: Tensor | None = None
    input_scale: float | None = None


class Linear(Protocol):
    """A product as the decoder calls it: rows in, rows out."""

    num_bytes: int

    def __call__(self, x_TI: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Multiply rows: y_TO in `out_dtype` (None: x's), members of a fused group side by side."""


class FusedLinear:
    """One product over the stacked rows of a group in one format."""

    def __init__(
        self,
        weight: PreparedWeight,
        format: WeightFormat,
        round_input: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.weight = weight
        self.num_bytes = weight.num_bytes
        self._product = _PRODUCTS[format]
        self._round_input = round_input

    def __call__(self, x_TI: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        if self._round_input is not None:
            x_TI = self._round_input(x_TI)
        return self._product(x_TI, self.weight, out_dtype)


class TokenScaledLinear:
    """One product of FP8 codes: activations rounded by the largest value of each token."""

    def __init__(self, weight: PreparedWeight) -> None:
        self.weight = weight
        self.num_bytes = weight.num_bytes

    def __call__(self, x_TI: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        codes_TI, scale_T = dispatch.round_tokens(x_TI)
        return dispatch.linear_fp8(codes_TI, self.weight, out_dtype or x_TI.dtype, scale_T)


class SplitLinear:
    """A group whose members cannot share a product: formats or input scales differ."""

    def __init__(self, members: Sequence[Linear]) -> None:
        self._members = tuple(members)
        self.num_bytes = sum(member.num_bytes for member in members)

    def __call__(self, x_TI: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([member(x_TI, out_dtype) for member in self._members], dim=-1)


def make_linear(
    group: Sequence[StoredLinear], mode: Mode, fp8_activations: Fp8Activations = "auto"
) -> Linear:
    """The linear of a group that reads one input: a single product where the members allow it."""
    if len({member.format for member in group}) > 1:
        return SplitLinear([make_linear([member], mode, fp8_activations) for member in group])
    input_scales = [member.input_scale for member in group]
    rounds_fp8 = mode != "weight_only" and group[0].format == "fp8"
    if rounds_fp8 and is_per_token(input_scales, fp8_activations):
        return TokenScaledLinear(_prepare(group))
    scales = {member.input_scale for member in group if mode == "declared"}
    if len(scales) > 1:
        return SplitLinear([make_linear([member], mode, fp8_activations) for member in group])
    return FusedLinear(_prepare(group), group[0].format, _rounding(group, mode))


def is_per_token(input_scales: Sequence[float | None], fp8_activations: Fp8Activations) -> bool:
    """Whether an FP8 group with these input scales rounds each token by its largest value."""
    return fp8_activations == "per-token" or (fp8_activations == "auto" and None in input_scales)


def _prepare(group: Sequence[StoredLinear]) -> PreparedWeight:
    weight = _stack([member.weight for member in group])
    if group[0].format == "bf16":
        return dispatch.prepare_bf16(weight)
    if group[0].format == "fp8":
        return dispatch.prepare_fp8(weight, _per_row(group, "weight_scale"))
    scale_OB = _stack([_present(member, "weight_scale") for member in group])
    return dispatch.prepare_nvfp4(weight, scale_OB, _per_row(group, "tensor_scale"))


def _rounding(group: Sequence[StoredLinear], mode: Mode) -> Callable[[Tensor], Tensor] | None:
    format = group[0].format
    if mode == "weight_only" or format == "bf16" or (mode == "fp8_declared" and format != "fp8"):
        return None
    scales = []
    for linear in group:
        if linear.input_scale is None:
            do = "; --fp8-activations per-token does without" if format == "fp8" else ""
            raise CheckpointError(f"{linear.name} has no input_scale, which mode {mode} needs{do}")
        scales.append(linear.input_scale)
    rounding = _ROUNDINGS[format]
    # They differ in fp8_declared only, where one product serves the group.
    device = group[0].weight.device
    scale_tensor = torch.tensor(max(scales), dtype=torch.float32, device=device)
    return lambda x_TI: rounding(x_TI, scale_tensor)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Rows one below the other; through bytes where torch cannot concatenate the dtype."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    if dtype != torch.float8_e4m3fn:
        return torch.cat(list(tensors))
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)


def _present(linear: StoredLinear, role: Literal["weight_scale", "tensor_scale"]) -> Tensor:
    scale = linear.weight_scale if role == "weight_scale" else linear.tensor_scale
    if scale is None:
        raise CheckpointError(f"{linear.name}.{role} is missing; format {linear.format} needs it")
    return scale


def _per_row(
    group: Sequence[StoredLinear], role: Literal["weight_scale", "tensor_scale"]
) -> Tensor:
    """Each member's scalar, repeated for its rows, or its rows' own scales: f32 (O,)."""
    return torch.cat(
        [
            _present(linear, role).float().reshape(-1).expand(linear.weight.shape[0])
            for linear in group
        ]
    )
