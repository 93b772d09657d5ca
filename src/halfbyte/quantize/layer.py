"""One decoder layer under a plan: its linears encoded, its norms passed through.

Reads each stored weight once, holds one fused group at a time and the next one. Called by
`pipeline`, which writes what comes out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.calibrate.moments import Want
from halfbyte.calibrate.stream import KEYS, READERS, VALUES, LayerStatistics
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import closeness
from halfbyte.config import ModelConfig
from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import Profile
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4
from halfbyte.modules import WeightFormat, decoder_linears, fused_partners
from halfbyte.quantize.encode import (
    HEAD_ROWS,
    NORMS,
    Inputs,
    SourceWeight,
    declared_scale,
    encode_weight,
    scale_of_inputs,
)
from halfbyte.quantize.scales import (
    cache_scale,
    pinned_cache_scale,
    shared_maxima,
    smoothing_factors,
)
from halfbyte.recipe.plan import Plan
from halfbyte.recipe.schema import NEED_DATA, ActivationScales


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
        inputs = Inputs.of(next(iter(held)), plan, statistics, smoothing)
        if inputs.smoothing_I is not None:
            held = {name: held[name].times(inputs.smoothing_I) for name in held}
        own = {p: held[p].amax() for p in held if plan.formats[p] != "bf16"}
        maxima = shared_maxima(own, plan.formats)
        declared = None if statistics is not None else declared_scale(checkpoint, list(own))
        for name, source in held.items():
            chosen = plan.formats[name]
            budget.check(_made_bytes(source, chosen) if device.type == "cpu" else 0)
            with _naming(name):
                tensors = encode_weight(
                    source, chosen, maxima.get(name), profile, plan, inputs, budget
                )
                if chosen != "bf16":
                    tensors[f"{name}.input_scale"] = scale_of_inputs(
                        name, chosen, inputs.observed, declared, profile, plan.scales.activations
                    )
            if chosen == "nvfp4" and len(held) > 1:
                _check_not_drowned(source, tensors, own, budget)
            yield QuantizedLinear(name, chosen, tensors, source, inputs.smoothing_I)


def quantize_head(
    checkpoint: Checkpoint,
    plan: Plan,
    statistics: LayerStatistics | None,
    profile: Profile,
    device: torch.device,
    budget: MemoryBudget | None = None,
    on_read: Callable[[str, Tensor], None] | None = None,
) -> QuantizedLinear:
    """Encode the head, some rows at a time; the plan must list it.

    Arguments and errors as of `quantize_layer`. The final norm is not smoothed.
    """
    budget = MemoryBudget(None) if budget is None else budget
    name, chosen = "head", plan.formats["head"]
    budget.check(checkpoint.num_bytes("head.weight"))
    source = read_weight(checkpoint, name, device, on_read)
    inputs = Inputs.of(name, plan, statistics, {})
    parts: list[dict[str, Tensor]] = []
    budget.check(_made_bytes(source, chosen) if device.type == "cpu" else 0)
    with _naming(name):
        amax = source.amax()
        for start in range(0, source.stored.shape[0], HEAD_ROWS):
            part = SourceWeight(name, source.stored[start : start + HEAD_ROWS], source.scale)
            parts.append(encode_weight(part, chosen, amax, profile, plan, inputs, budget))
        tensors = _joined(parts)
        tensors[f"{name}.input_scale"] = scale_of_inputs(
            name, chosen, inputs.observed, None, profile, plan.scales.activations
        )
    return QuantizedLinear(name, chosen, tensors, source)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one linear's tensors, one below the other; scalars are the same in all parts."""
    joined = {}
    for name in list(parts[0]):
        pieces = [part.pop(name) for part in parts]
        if pieces[0].dim() == 0 or len(pieces) == 1:
            joined[name] = pieces[0]
        else:
            rows = torch.cat([piece.view(torch.uint8) for piece in pieces])
            joined[name] = rows.view(pieces[0].dtype)
    return joined


def wanted_head_sums(plan: Plan) -> Want | None:
    """What calibration must sum up of the head's input for the plan's rules."""
    if plan.formats.get("head") != "nvfp4" or plan.scales.weights not in NEED_DATA:
        return None
    return "products" if plan.scales.weights == "gptq" else "squares"


def wanted_sums(plan: Plan, layer: int) -> dict[str, Want]:
    """Tap point -> what calibration must sum up there for the plan's rules."""
    wanted: dict[str, Want] = {}
    for tap, readers in READERS.items():
        formats = {plan.formats[f"decoder.{layer}.{reader}"] for reader in readers}
        if formats != {"nvfp4"}:
            continue
        if plan.scales.weights == "gptq":
            wanted[tap] = "products"
        elif plan.scales.weights in NEED_DATA or (plan.scales.smoothing and tap in NORMS):
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
    if wanted_head_sums(plan) == "products":
        found.append((config.text.width,))
    return max(found, key=lambda widths: sum(x * x for x in widths), default=())


def smoothing_of(layer: int, plan: Plan, statistics: LayerStatistics | None) -> dict[str, Tensor]:
    """Norm (canonical module) -> factors f32 (D,) that its weights are divided by."""
    if not plan.scales.smoothing or statistics is None:
        return {}
    return {
        f"decoder.{layer}.{NORMS[tap]}": smoothing_factors(sums.squares_I, plan.scales.smoothing)
        for tap, sums in statistics.sums.items()
        if tap in NORMS
    }


def smoothed_norm(name: str, norm_D: Tensor, factors_D: Tensor) -> Tensor:
    """Norm weights over powers of two. Raises FormatError if bf16 does not hold them exactly."""
    factors_D = factors_D.to(norm_D.device)
    divided_D = norm_D.to(torch.float32).div_(factors_D).to(torch.bfloat16)
    if not torch.equal(divided_D.to(torch.float32) * factors_D, norm_D.to(torch.float32)):
        raise FormatError(f"{name}: weights near the end of bf16 cannot be smoothed; smoothing: 0")
    return divided_D


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
