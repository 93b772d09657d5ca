"""One decoder layer under a plan: its linears encoded, its norms passed through.

Reads each stored weight once, holds one fused group at a time and the next one. Called by
`pipeline`, which writes what comes out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.calibrate.stream import KEYS, VALUES, LayerStatistics
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import closeness
from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import Profile, decode_fp8, encode_fp8, fp8_scale
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.minifloat import E4M3_MAX
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4, nvfp4_tensor_scale
from halfbyte.kernels.dispatch import fp8_to_nvfp4, largest_fp8_code
from halfbyte.modules import WeightFormat, fused_partners
from halfbyte.quantize.scales import (
    cache_scale,
    encode_weight_nvfp4,
    input_scale,
    pinned_cache_scale,
    pinned_input_scale,
    shared_maxima,
)
from halfbyte.recipe.plan import Plan
from halfbyte.recipe.schema import ActivationScales, WeightScales


class QuantizedLinear(NamedTuple):
    """What one linear became: its tensors by canonical name, and what it was."""

    name: str
    format: WeightFormat
    tensors: dict[str, Tensor]
    source: "SourceWeight"


@dataclass(frozen=True, eq=False)
class SourceWeight:
    """A weight as its checkpoint stores it, on the device where it will be encoded.

    stored  bf16, or e4m3 codes with `scale` (f32, 0-d)
    """

    name: str
    stored: Tensor
    scale: Tensor | None

    def amax(self) -> Tensor:
        """Largest magnitude of the decoded weight: bf16, 0-d.

        For FP8 it is that of the largest code, since decoding keeps order: no weight is decoded
        for it. Raises FormatError for NaN, infinity and weights that are all zero.
        """
        largest = self.largest
        if self.scale is not None:
            largest = decode_fp8(largest, self.scale)
        value = float(largest)
        if not torch.isfinite(largest):
            raise FormatError(f"{self.name}: the weight holds NaN or infinity")
        if value == 0:
            raise FormatError(
                f"{self.name}: all weights are zero, so no scale can be computed; keep the linear "
                "in bf16 by a recipe rule of its own"
            )
        return largest

    @cached_property
    def largest(self) -> Tensor:
        """The largest magnitude as stored, 0-d: bf16, or an e4m3 code; NaN comes through."""
        if self.scale is None:
            return largest_magnitude(self.stored)
        return largest_fp8_code(self.stored)

    def decoded(self) -> Tensor:
        """The weight as bf16."""
        return self.stored if self.scale is None else decode_fp8(self.stored, self.scale)

    def typical(self) -> float:
        """Root mean square of a sample of the decoded weight, which an outlier hardly ever enters.

        Strides over the whole weight, so that no row or column of its own is all that is seen.
        """
        flat = self.stored.reshape(-1)
        # The step is odd, so that it shares no factor with widths, which are even.
        part = flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS) | 1]
        values = part if self.scale is None else decode_fp8(part, self.scale)
        return float(values.to(torch.float64).square().mean().sqrt())


def read_weight(
    checkpoint: Checkpoint,
    name: str,
    device: torch.device,
    on_read: Callable[[str, Tensor], None] | None = None,
) -> SourceWeight:
    """Read the weight of a canonical linear onto `device`; FormatError if its scale is none."""
    scale = None
    if checkpoint.format_of(name) == "fp8":
        scale = torch.tensor(checkpoint.scale(f"{name}.weight_scale"), device=device)
    stored = checkpoint.tensor(f"{name}.weight")
    if on_read is not None:
        on_read(f"{name}.weight", stored)
    return SourceWeight(name, stored.to(device), scale)


def quantize_layer(
    checkpoint: Checkpoint,
    layer: int,
    plan: Plan,
    statistics: LayerStatistics | None,
    profile: Profile,
    device: torch.device,
    budget: MemoryBudget | None = None,
    on_read: Callable[[str, Tensor], None] | None = None,
) -> Iterator[QuantizedLinear]:
    """Encode the linears of one layer, one after another, in model order.

    statistics  what calibration saw of this layer; None pins input scales (data-free)
    budget      host memory to stay within
    on_read     told the canonical name and content of every weight as read, on another thread
    Raises FormatError that names the linear, OverBudgetError where the budget has no room for one.
    """
    budget = MemoryBudget(None) if budget is None else budget
    prefix = f"decoder.{layer}."
    names = [name for name in plan.formats if name.startswith(prefix)]
    groups = list(dict.fromkeys(fused_partners(name) for name in names))
    for held in _read_ahead(checkpoint, groups, device, budget, on_read):
        own = {p: held[p].amax() for p in held if plan.formats[p] != "bf16"}
        maxima = shared_maxima(own, plan.formats)
        declared = None if statistics is not None else _declared_scale(checkpoint, list(own))
        for name, source in held.items():
            chosen = plan.formats[name]
            budget.check(_made_bytes(source, chosen) if device.type == "cpu" else 0)
            with _naming(name):
                tensors = _encode(source, chosen, maxima.get(name), profile, plan.scales.weights)
                if chosen != "bf16":
                    tensors[f"{name}.input_scale"] = _input_scale(
                        name, chosen, statistics, declared, profile, plan.scales.activations
                    )
            if chosen == "nvfp4" and len(held) > 1:
                _check_not_drowned(source, tensors, own, budget)
            yield QuantizedLinear(name, chosen, tensors, source)


@contextmanager
def _naming(linear: str) -> Iterator[None]:
    """Put the linear's name before what the formats, which know no names, refuse."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{linear}: {error}") from error


# A block scale of a member keeps its three bits of mantissa down to 2 ** -6, that is for weights
# down to group maximum / 2 ** 15; from a tenth of that on it is looked at closely.
_DROWNING_RATIO = 4096.0
_SAMPLED_WEIGHTS = 1 << 16


def _check_not_drowned(
    source: SourceWeight,
    tensors: Mapping[str, Tensor],
    maxima: Mapping[str, Tensor],
    budget: MemoryBudget,
) -> None:
    """Raise FormatError if a far larger partner left too little of an NVFP4 weight.

    maxima   the largest weight of each member of the fused group, which share one tensor scale
    """
    name = source.name
    loudest = max(maxima, key=lambda member: float(maxima[member]))
    if loudest == name or float(maxima[loudest]) < _DROWNING_RATIO * source.typical():
        return
    budget.check(6 * source.stored.numel() if source.stored.device.type == "cpu" else 0)
    encoded = EncodedNVFP4(
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], tensors[f"{name}.tensor_scale"]
    )
    near = closeness("nvfp4", source.decoded(), decode_nvfp4(encoded, torch.float32))
    if near.is_far:
        raise FormatError(
            f"{name}: its largest weight is {float(maxima[name]):.3g}, that of {loudest} "
            f"{float(maxima[loudest]):.3g}: under the scale that the two share in nvfp4 only "
            f"{near.sqnr_db:.1f} dB of it are left, of {near.floor_db:.3g} at least. Look at the "
            "larger one in the source, or keep both in fp8 or bf16 by a recipe rule"
        )


def _read_ahead(
    checkpoint: Checkpoint,
    groups: Sequence[tuple[str, ...]],
    device: torch.device,
    budget: MemoryBudget,
    on_read: Callable[[str, Tensor], None] | None,
) -> Iterator[dict[str, SourceWeight]]:
    """The groups one after another, the next one read while one is encoded."""

    def read(group: tuple[str, ...]) -> dict[str, SourceWeight]:
        weights = {}
        for name in group:
            budget.check(checkpoint.num_bytes(f"{name}.weight"))
            weights[name] = read_weight(checkpoint, name, device, on_read)
        return weights

    with ThreadPoolExecutor(1, thread_name_prefix="next-group") as pool:
        reading = pool.submit(read, groups[0])
        for following in (*groups[1:], None):
            held = reading.result()
            if following is not None:
                reading = pool.submit(read, following)
            yield held


def _made_bytes(source: SourceWeight, chosen: WeightFormat) -> int:
    """Bytes of what a weight becomes; 0 if its bytes are kept as they are."""
    if chosen == ("bf16" if source.scale is None else "fp8"):
        return 0
    bits = {"bf16": 16, "fp8": 8, "nvfp4": 4.5}[chosen]
    return int(source.stored.numel() * bits / 8)


def _encode(
    source: SourceWeight,
    chosen: WeightFormat,
    amax: Tensor | None,
    profile: Profile,
    rule: WeightScales,
) -> dict[str, Tensor]:
    name = source.name
    if chosen == "bf16" or amax is None:
        return {f"{name}.weight": source.decoded()}
    if chosen == "nvfp4":
        tensor_scale = nvfp4_tensor_scale(amax, profile)
        return nvfp4_tensors(name, _encode_nvfp4(source, tensor_scale, rule))
    codes, scale = _encode_fp8(source, amax, profile)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


def _encode_nvfp4(source: SourceWeight, tensor_scale: Tensor, rule: WeightScales) -> EncodedNVFP4:
    if source.scale is not None and rule == "amax":
        return fp8_to_nvfp4(source.stored, source.scale, tensor_scale)
    return encode_weight_nvfp4(source.decoded(), tensor_scale, rule)


def nvfp4_tensors(name: str, encoded: EncodedNVFP4) -> dict[str, Tensor]:
    """The three tensors of an NVFP4 weight by canonical name."""
    return {
        f"{name}.weight": encoded.codes_OI2,
        f"{name}.weight_scale": encoded.scale_OB,
        f"{name}.tensor_scale": encoded.tensor_scale,
    }


# Rounding the largest weight to bf16 moves a scale by half a step, and a reciprocal by less;
# more means that it lies among bf16's subnormals.
_MOST_MOVED = 2.0**-8


def _encode_fp8(source: SourceWeight, amax: Tensor, profile: Profile) -> tuple[Tensor, Tensor]:
    """Codes and scale of an FP8 linear; codes of an FP8 source are kept as they are.

    A source that uses code 448, as max-scaled ones do, would encode to the same codes again (its
    scale moves by 0.3 % at most, a code's neighbours are 6 % away); it gets the scale that
    Model-Optimizer derives. Any other keeps its own scale, and so its exact values; so does
    profile `direct`, and a weight whose largest value is too small for bf16 to say exactly.
    """
    if source.scale is None:
        scale = fp8_scale(amax, profile)
        return encode_fp8(source.stored, scale, profile), scale
    own = source.scale.reshape(())
    is_max_scaled = float(source.largest.to(torch.float32)) == E4M3_MAX
    if is_max_scaled and profile != "direct":
        derived = fp8_scale(amax, profile)
        if abs(float(derived) / float(own) - 1) <= _MOST_MOVED:
            return source.stored, derived
    return source.stored, own


def _declared_scale(checkpoint: Checkpoint, members: Sequence[str]) -> Tensor | None:
    """The input scale that a source states for a fused group: the largest of its members', f32.

    They read one input and engines take one scale for all, as Model Optimizer's export does. None
    if the source states none; FormatError if one of them is no scale.
    """
    names = [f"{member}.input_scale" for member in members]
    stated = [checkpoint.scale(name) for name in names if name in checkpoint]
    return torch.tensor(max(stated)) if stated else None


def _input_scale(
    name: str,
    chosen: WeightFormat,
    statistics: LayerStatistics | None,
    declared: Tensor | None,
    profile: Profile,
    rule: ActivationScales,
) -> Tensor:
    if statistics is not None:
        return input_scale(name, chosen, statistics.input_of(name), profile, rule)
    return pinned_input_scale(chosen, declared, profile)


def cache_scales(
    layer: int,
    statistics: LayerStatistics | None,
    profile: Profile,
    rule: ActivationScales,
) -> dict[str, Tensor]:
    """k_scale and v_scale of one layer by canonical name; 1 without statistics."""
    names = {f"decoder.{layer}.attention.{x}_scale": tap for x, tap in (("k", KEYS), ("v", VALUES))}
    if statistics is None:
        return {name: pinned_cache_scale() for name in names}
    return {
        name: cache_scale(name, statistics.observed[tap], profile, rule)
        for name, tap in names.items()
    }
