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
from halfbyte.calibrate.moments import InputSums, Want
from halfbyte.calibrate.stream import KEYS, READERS, VALUES, LayerStatistics
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import closeness
from halfbyte.config import ModelConfig
from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import Profile, decode_fp8, encode_fp8, fp8_scale
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.minifloat import E4M3_MAX
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4, nvfp4_tensor_scale
from halfbyte.kernels.dispatch import fp8_to_nvfp4, largest_fp8_code
from halfbyte.log import logger
from halfbyte.modules import WeightFormat, decoder_linears, fused_partners
from halfbyte.quantize.gptq import Metric, damped_more, encode_gptq, gptq_bytes, make_metric
from halfbyte.quantize.scales import (
    cache_scale,
    encode_weight_nvfp4,
    input_scale,
    pinned_cache_scale,
    pinned_input_scale,
    shared_maxima,
    smoothing_factors,
)
from halfbyte.recipe.plan import Plan
from halfbyte.recipe.schema import NEED_DATA, ActivationScales, GptqOptions

# Tap point -> norm whose output it is: what its readers' inputs are divided by can be taken out
# there.
_NORMS = {"attention.input": "attention_norm", "mlp.input": "mlp_norm"}


class QuantizedLinear(NamedTuple):
    """What one linear became: its tensors by canonical name, and what it was.

    source       the weight that was encoded; under smoothing the source's times `smoothing_I`
    smoothing_I  f32, what its inputs are divided by; None for nothing
    """

    name: str
    format: WeightFormat
    tensors: dict[str, Tensor]
    source: "SourceWeight"
    smoothing_I: Tensor | None = None


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
    smoothing = smoothing_of(layer, plan, statistics)
    for held in _read_ahead(checkpoint, groups, device, budget, on_read):
        inputs = _Inputs.of(next(iter(held)), plan, statistics, smoothing)
        if inputs.smoothing_I is not None:
            held = {name: held[name].times(inputs.smoothing_I) for name in held}
        own = {p: held[p].amax() for p in held if plan.formats[p] != "bf16"}
        maxima = shared_maxima(own, plan.formats)
        declared = None if statistics is not None else _declared_scale(checkpoint, list(own))
        for name, source in held.items():
            chosen = plan.formats[name]
            budget.check(_made_bytes(source, chosen) if device.type == "cpu" else 0)
            with _naming(name):
                tensors = _encode(source, chosen, maxima.get(name), profile, plan, inputs, budget)
                if chosen != "bf16":
                    tensors[f"{name}.input_scale"] = _input_scale(
                        name, chosen, inputs.observed, declared, profile, plan.scales.activations
                    )
            if chosen == "nvfp4" and len(held) > 1:
                _check_not_drowned(source, tensors, own, budget)
            yield QuantizedLinear(name, chosen, tensors, source, inputs.smoothing_I)


def wanted_sums(plan: Plan, layer: int) -> dict[str, Want]:
    """Tap point -> what calibration must sum up there for the plan's rules."""
    wanted: dict[str, Want] = {}
    for tap, readers in READERS.items():
        formats = {plan.formats[f"decoder.{layer}.{reader}"] for reader in readers}
        if formats != {"nvfp4"}:
            continue
        if plan.scales.weights == "gptq":
            wanted[tap] = "products"
        elif plan.scales.weights in NEED_DATA or (plan.scales.smoothing and tap in _NORMS):
            wanted[tap] = "squares"
    return wanted


def widths_of_products(plan: Plan, config: ModelConfig) -> tuple[int, ...]:
    """Widths of the inputs whose products are summed up in the layer that has most of them."""
    width = {linear.name: linear.in_features for linear in decoder_linears(config)}
    found = [
        tuple(
            width[f"decoder.{layer}.{READERS[tap][0]}"]
            for tap, want in wanted_sums(plan, layer).items()
            if want == "products"
        )
        for layer in range(config.text.num_layers)
    ]
    return max(found, key=lambda widths: sum(x * x for x in widths), default=())


def smoothing_of(layer: int, plan: Plan, statistics: LayerStatistics | None) -> dict[str, Tensor]:
    """Norm (canonical module) -> factors f32 (D,) that its weights are divided by."""
    if not plan.scales.smoothing or statistics is None:
        return {}
    return {
        f"decoder.{layer}.{_NORMS[tap]}": smoothing_factors(sums.squares_I, plan.scales.smoothing)
        for tap, sums in statistics.sums.items()
        if tap in _NORMS
    }


def smoothed_norm(name: str, norm_D: Tensor, factors_D: Tensor) -> Tensor:
    """Norm weights over powers of two. Raises FormatError if bf16 does not hold them exactly."""
    factors_D = factors_D.to(norm_D.device)
    divided_D = norm_D.to(torch.float32).div_(factors_D).to(torch.bfloat16)
    if not torch.equal(divided_D.to(torch.float32) * factors_D, norm_D.to(torch.float32)):
        raise FormatError(f"{name}: weights near the end of bf16 cannot be smoothed; smoothing: 0")
    return divided_D


@dataclass(slots=True, eq=False)
class _Inputs:
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
    ) -> "_Inputs":
        if statistics is None:
            return cls(None, None, None)
        tap = statistics.tap_of(member)
        sums, observed = statistics.sums.get(tap), statistics.input_of(member)
        norm = f"decoder.{statistics.layer}.{_NORMS.get(tap)}"
        if norm not in smoothing or plan.formats[member] != "nvfp4" or sums is None:
            return cls(observed, sums, None)
        sums.divide(smoothing[norm])
        return cls(sums.maxima_I.amax().to(torch.bfloat16), sums, smoothing[norm])

    def metric(self, options: GptqOptions) -> Metric:
        """The metric of the products, which are given up for it: both are large."""
        if self._metric is None:
            assert self.sums is not None and self.sums.products_II is not None
            products_II, self.sums.products_II = self.sums.products_II, None
            # Handed over, so that nobody holds them while they are factored.
            held = [products_II]
            del products_II
            self._metric = make_metric(held.pop(), options)
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
    plan: Plan,
    inputs: _Inputs,
    budget: MemoryBudget,
) -> dict[str, Tensor]:
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
    inputs: _Inputs,
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
    inputs: _Inputs,
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
    observed: Tensor | None,
    declared: Tensor | None,
    profile: Profile,
    rule: ActivationScales,
) -> Tensor:
    if observed is not None:
        return input_scale(name, chosen, observed, profile, rule)
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
