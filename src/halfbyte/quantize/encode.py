"""One linear's weight to the codes and scales of its format, by the recipe's method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.calibrate.moments import InputSums
from halfbyte.calibrate.stream import LayerStatistics
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import closeness
from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import Profile, decode_fp8, encode_fp8, fp8_scale
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.minifloat import E4M3_MAX
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4, nvfp4_tensor_scale
from halfbyte.kernels.dispatch import fp8_to_nvfp4, largest_fp8_code
from halfbyte.log import logger
from halfbyte.modules import WeightFormat
from halfbyte.quantize.gptq import Metric, damped_more, encode_gptq, gptq_bytes, make_metric
from halfbyte.quantize.scales import (
    encode_weight_nvfp4,
    input_scale,
    pinned_input_scale,
)
from halfbyte.recipe.plan import Plan
from halfbyte.recipe.schema import ActivationScales, GptqOptions

# Tap point -> norm whose output it is: what its readers' inputs are divided by can be taken out
# there.
NORMS = {"attention.input": "attention_norm", "mlp.input": "mlp_norm"}
# Rows of the head that are encoded together: in f32 the whole of it would be the largest tensor of
# a run.
HEAD_ROWS = 1 << 14


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
        """The weight's values in bf16, (out_features, in_features), decoded anew."""
        return self.stored if self.scale is None else decode_fp8(self.stored, self.scale)

    def times(self, factors_I: Tensor) -> "SourceWeight":
        """The weight with its columns multiplied by powers of two, which bf16 holds exactly."""
        wide_OI = self.decoded().to(torch.float32).mul_(factors_I)
        return SourceWeight(self.name, wide_OI.to(torch.bfloat16), None)

    def typical(self) -> float:
        """Root mean square of a sample of the decoded weight, which an outlier hardly ever enters.

        Strides over the whole weight, so that no row or column of its own is all that is seen.
        """
        flat = self.stored.reshape(-1)
        # The step is odd, so that it shares no factor with widths, which are even.
        part = flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS) | 1]
        values = part if self.scale is None else decode_fp8(part, self.scale)
        return float(values.to(torch.float64).square().mean().sqrt())


@dataclass(slots=True, eq=False)
class Inputs:
    """What is known of the input that a fused group reads, as the encoded group will get it.

    observed     largest magnitude, 0-d; None without data
    smoothing_I  f32, what the source's input is divided by; None for nothing
    """

    observed: Tensor | None
    sums: InputSums | None
    smoothing_I: Tensor | None
    _metric: Metric | None = None

    @classmethod
    def of(
        cls,
        member: str,
        plan: Plan,
        statistics: LayerStatistics | None,
        smoothing: Mapping[str, Tensor],
    ) -> "Inputs":
        """Collect what a linear needs to know of its inputs."""
        if statistics is None:
            return cls(None, None, None)
        tap = statistics.tap_of(member)
        sums, observed = statistics.sums.get(tap), statistics.input_of(member)
        norm = f"decoder.{statistics.layer}.{NORMS.get(tap)}"  # none for the head
        if norm not in smoothing or plan.formats[member] != "nvfp4" or sums is None:
            return cls(observed, sums, None)
        sums.divide(smoothing[norm])
        return cls(sums.maxima_I.amax().to(torch.bfloat16), sums, smoothing[norm])

    def metric(self, options: GptqOptions) -> Metric:
        """Factor the products of the inputs for GPTQ and drop them, as both are large."""
        if self._metric is None:
            assert self.sums is not None
            # Handed over, so that nobody holds them while they are factored.
            self._metric = make_metric(self.sums.take_products(), options)
        return self._metric

    def damp(self, damping: float) -> None:
        """Damp the metric more, for this linear and those of its group that follow."""
        assert self._metric is not None
        metric, self._metric = self._metric, None
        self._metric = damped_more(metric, damping)

    def energy_I(self) -> Tensor | None:
        """Mean squares over their mean, f32; inputs that were never seen count as the mean."""
        if self.sums is None:
            return None
        squares_I = self.sums.squares_I
        lives_I = squares_I > 0
        mean = squares_I[lives_I].mean() if bool(lives_I.any()) else squares_I.new_ones(())
        return torch.where(lives_I, squares_I / mean, 1.0).to(torch.float32)


_SAMPLED_WEIGHTS = 1 << 16


def encode_weight(
    source: SourceWeight,
    chosen: WeightFormat,
    amax: Tensor | None,
    profile: Profile,
    plan: Plan,
    inputs: Inputs,
    budget: MemoryBudget,
) -> dict[str, Tensor]:
    """Tensors of one linear in the format chosen for it, by canonical name."""
    name = source.name
    if chosen == "bf16" or amax is None:
        return {f"{name}.weight": source.decoded()}
    if chosen == "nvfp4":
        tensor_scale = nvfp4_tensor_scale(amax, profile)
        return nvfp4_tensors(name, _encode_nvfp4(source, tensor_scale, plan, inputs, budget))
    codes, scale = _encode_fp8(source, amax, profile)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


def _encode_nvfp4(
    source: SourceWeight,
    tensor_scale: Tensor,
    plan: Plan,
    inputs: Inputs,
    budget: MemoryBudget,
) -> EncodedNVFP4:
    rule = plan.scales.weights
    if rule == "gptq" and inputs.sums is not None:
        return _encode_by_gptq(source, tensor_scale, plan, inputs, budget)
    if source.scale is not None and rule == "amax":
        return fp8_to_nvfp4(source.stored, source.scale, tensor_scale)
    return encode_weight_nvfp4(source.decoded(), tensor_scale, rule, inputs.energy_I())


# Damping is raised tenfold from and up to here before a weight is rounded without GPTQ.
_LEAST_DAMPING = 0.01


_MOST_DAMPING = 10.0


def _encode_by_gptq(
    source: SourceWeight,
    tensor_scale: Tensor,
    plan: Plan,
    inputs: Inputs,
    budget: MemoryBudget,
) -> EncodedNVFP4:
    """GPTQ, damped until the weight is as near to its source as `verify` asks.

    Few or alike calibration rows leave directions in which nothing is seen to matter; what GPTQ
    moves there would be taken for damage, and other text might look there.
    """
    weight_OI = source.decoded()
    if weight_OI.device.type == "cpu":
        budget.check(gptq_bytes(weight_OI.shape[1]) + 4 * weight_OI.numel())
    while True:
        metric = inputs.metric(plan.scales.gptq)
        encoded = encode_gptq(weight_OI, metric, tensor_scale)
        if not closeness("nvfp4", weight_OI, decode_nvfp4(encoded, torch.float32)).is_far:
            return encoded
        damping = metric.damping
        del metric
        logger.info("%s: damping %g moves it too far from its source", source.name, damping)
        if damping >= _MOST_DAMPING:
            break
        inputs.damp(max(damping, _LEAST_DAMPING) * 10)
    return encode_weight_nvfp4(weight_OI, tensor_scale, "weighted", inputs.energy_I())


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


def declared_scale(checkpoint: Checkpoint, members: Sequence[str]) -> Tensor | None:
    """The input scale that a source states for a fused group: the largest of its members', f32.

    They read one input and engines take one scale for all, as Model Optimizer's export does. None
    if the source states none; FormatError if one of them is no scale.
    """
    names = [f"{member}.input_scale" for member in members]
    stated = [checkpoint.scale(name) for name in names if name in checkpoint]
    return torch.tensor(max(stated)) if stated else None


def scale_of_inputs(
    name: str,
    chosen: WeightFormat,
    observed: Tensor | None,
    declared: Tensor | None,
    profile: Profile,
    rule: ActivationScales,
) -> Tensor:
    """Scale of the activations that enter a linear, f32 0-d: measured, or as declared."""
    if observed is not None:
        return input_scale(name, chosen, observed, profile, rule)
    return pinned_input_scale(chosen, declared, profile)
