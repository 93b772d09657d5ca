"""A recipe made to measure: the formats of least estimated loss in so many bytes, or on one GPU.

`sensitivity` measures what each format would cost, `knapsack` chooses, `recipe.written` writes the
choice down with its reasons. Called by `halfbyte quantize` and `halfbyte plan`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.shard_plan import plan_shards
from halfbyte.checkpoint.verify import require_tokens_in_vocabulary, require_trusted
from halfbyte.checkpoint.writer import MAX_SHARD_BYTES
from halfbyte.config import ModelConfig
from halfbyte.errors import UsageError
from halfbyte.modules import CacheFormat, Mode, WeightFormat, quantizable_linears
from halfbyte.quantize import export
from halfbyte.quantize.groups import Group, unmeasured_groups
from halfbyte.quantize.hosting import GPUS, room_for_weights
from halfbyte.quantize.job import QuantizeConfig, calibration_of, open_source
from halfbyte.quantize.knapsack import Choice, Item, choose
from halfbyte.quantize.sensitivity import (
    Measuring,
    Progress,
    measure_sensitivity,
    read_losses,
    some_rows,
    text_digest,
)
from halfbyte.quantize.survey import Survey
from halfbyte.recipe.plan import Plan, plan_size, plan_sizes
from halfbyte.recipe.schema import Calibration, Recipe, Scales, parse_recipe
from halfbyte.recipe.written import recipe_text

_KV_CACHE: CacheFormat = "fp8"


@dataclass(frozen=True, slots=True)
class Asked:
    """How many bytes the weight files may take, and how that is said.

    said  `--budget 84GB`, or `--fit rtx-pro-6000 --context 65536`
    """

    num_bytes: int
    said: str


@dataclass(frozen=True, slots=True)
class Budgeted:
    """A recipe that was chosen within a budget of bytes, and why.

    file_bytes   of the weight files that it gives, headers included
    fixed_bytes  of those, what no choice changes: embedding, norms, vision, headers
    """

    recipe: Recipe
    text: str
    groups: Sequence[Group]
    choice: Choice
    asked: Asked
    file_bytes: int
    fixed_bytes: int


def room_on(gpu: str, context: int | None, config: ModelConfig) -> Asked:
    """Bytes of weights that leave room on one GPU for a request of `context` tokens.

    Raises UsageError for a GPU that is not known and a context that the model does not have.
    """
    if gpu not in GPUS:
        raise UsageError(f"--fit {gpu}: there are {', '.join(GPUS)}")
    wanted = config.text.max_positions if context is None else context
    if wanted > config.text.max_positions:
        raise UsageError(f"--context {wanted}: the model has {config.text.max_positions} positions")
    room = room_for_weights(GPUS[gpu], config, _KV_CACHE, context=wanted)
    return Asked(max(room, 0), f"--fit {gpu} --context {wanted}")


def made_to_measure(
    config: QuantizeConfig,
    asked: Asked,
    scales: Scales,
    *,
    mode: Mode = "declared",
    on_step: Progress | None = None,
    owns_process: bool = False,
) -> Budgeted:
    """Measure what formats cost, choose those that fit, and write the recipe beside the output.

    config  what will be quantized; its recipe gives calibration text and KV cache, no formats
    mode    what linears compute where the result will run

    The measured costs are kept beside the output and taken again when source, text and mode are
    the same. Raises UsageError that says what is possible for a budget below the smallest formats
    or above the widest, before anything is measured.
    """
    checkpoint = open_source(config)
    require_trusted(checkpoint.config, config.accept)
    require_tokens_in_vocabulary(checkpoint)
    if scales.activations == "none":
        raise UsageError(
            f"{asked.said} measures on text, and --method none runs none; choose another method"
        )
    possible = Possible.of(checkpoint, config.max_shard_bytes)
    stored = sum(map(checkpoint.num_bytes, checkpoint.names()))
    possible.require(asked, checkpoint.config, stored)
    measuring = _measuring(config, checkpoint, asked, mode)
    budget = MemoryBudget(
        config.memory_bytes,
        owns_process=owns_process,
        limit_data=owns_process and config.device == "cpu",
    )
    with budget:
        groups = measure_sensitivity(measuring, budget, on_step)
    found = fitted(
        checkpoint,
        groups,
        asked,
        scales,
        config.recipe.calibration,
        possible,
        config.max_shard_bytes,
    )
    recipe_file(config.output).write_text(found.text, encoding="utf-8")
    return found


def _measuring(
    config: QuantizeConfig, checkpoint: Checkpoint, asked: Asked, mode: Mode
) -> Measuring:
    """What is measured: some of the rows of text on which the job calibrates."""
    rows, pictures, made = calibration_of(config, checkpoint)
    assert rows is not None, "a method with data has rows"
    # Rows with pictures enter by their vectors, which this pass does not make.
    is_text = [not images for images in pictures] or [True] * len(rows)
    some = some_rows([row for row, is_one in zip(rows, is_text, strict=True) if is_one])
    if not some:
        raise UsageError(f"{asked.said} measures on rows of text, and all of these have pictures")
    return Measuring(
        checkpoint,
        some,
        {"sha256": text_digest(some), "of": made},
        export.source_fingerprint(checkpoint),
        sensitivity_file(config.output),
        mode,
        config.device,
        config.restart,
    )


def sensitivity_file(output: Path) -> Path:
    """Where the measured costs are kept: beside the output."""
    return output.parent / f"{output.name}.sensitivity.json"


def recipe_file(output: Path) -> Path:
    """Where the chosen recipe is written: beside the output."""
    return output.parent / f"{output.name}.recipe.yaml"


@dataclass(frozen=True, slots=True)
class Possible:
    """What a source can become: bytes of its weight files in its smallest and widest formats.

    fixed_bytes  of both, what no choice changes
    """

    least_bytes: int
    most_bytes: int
    fixed_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, max_shard_bytes: int) -> "Possible":
        """Work out the bounds of a source from the shapes of its tensors alone."""
        groups = unmeasured_groups(checkpoint.config, checkpoint.quantization)
        smallest = {group.members: _smallest(group) for group in groups}
        least = _file_bytes(checkpoint, _formats(groups, smallest), max_shard_bytes)
        fixed = least - sum(min(group.sizes.values()) for group in groups)
        return cls(least, fixed + sum(max(group.sizes.values()) for group in groups), fixed)

    def require(self, asked: Asked, config: ModelConfig, stored_bytes: int) -> None:
        """Raise UsageError, saying what is possible, for a budget that leaves nothing to choose.

        stored_bytes  of the source
        """
        if asked.num_bytes < self.least_bytes:
            vision = plan_sizes(_plan({}, config), config)["vision"].num_bytes
            part = f" ({_gb(vision)} of it the vision tower: --no-vision)" if vision else ""
            raise UsageError(
                f"{asked.said}: room for {_gb(asked.num_bytes)} of weights, but with every linear "
                f"in its smallest format they take {_gb(self.least_bytes)}{part}; ask for that "
                "much, a shorter --context, or a larger GPU"
            )
        if asked.num_bytes >= self.most_bytes:
            raise UsageError(
                f"{asked.said}: room for {_gb(asked.num_bytes)} of weights, and the widest formats "
                f"take {_gb(self.most_bytes)} (the source {_gb(stored_bytes)}): nothing has to be "
                "chosen. Serve the source, or give --recipe fp8"
            )


def _smallest(group: Group) -> WeightFormat:
    return min(group.sizes, key=lambda chosen: group.sizes[chosen])


def _formats(
    groups: Sequence[Group], chosen: Mapping[tuple[str, ...], WeightFormat]
) -> dict[str, WeightFormat]:
    return {name: chosen[group.members] for group in groups for name in group.members}


def _plan(formats: Mapping[str, WeightFormat], config: ModelConfig) -> Plan:
    known: dict[str, WeightFormat] = {
        linear.name: formats.get(linear.name, "bf16") for linear in quantizable_linears(config)
    }
    if known.get("head") == "bf16":
        del known["head"]
    return Plan("budget", known, _KV_CACHE)


def _file_bytes(
    checkpoint: Checkpoint, formats: Mapping[str, WeightFormat], max_shard_bytes: int
) -> int:
    """Bytes of the weight files under these formats, headers included."""
    layout = export.export_layout(checkpoint)
    shapes = export.export_tensors(checkpoint, _plan(formats, checkpoint.config))
    named = {export.export_name(name, layout): shape for name, shape in shapes.items()}
    return plan_shards(named, max_shard_bytes).total_bytes


def fitted(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    asked: Asked,
    scales: Scales,
    calibration: Calibration,
    possible: Possible,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Budgeted:
    """Choose within the budget and write the recipe's text; the files never exceed it."""
    items = _items(groups)
    reserve = possible.fixed_bytes
    while True:
        choice = choose(items, asked.num_bytes - reserve)
        chosen = {g.members: cast("WeightFormat", choice.options[g.name]) for g in groups}
        formats = _formats(groups, chosen)
        file_bytes = _file_bytes(checkpoint, formats, max_shard_bytes)
        if file_bytes <= asked.num_bytes:
            break
        # Headers take a few bytes more than with the smallest formats.
        reserve += file_bytes - asked.num_bytes
    text = recipe_text(
        f"budget-{asked.num_bytes}",
        formats,
        checkpoint.config,
        kv_cache=_KV_CACHE,
        scales=scales,
        calibration=calibration,
        reasons=_reasons(groups, choice, asked, file_bytes, possible),
    )
    recipe = parse_recipe(text, "the budget's recipe")
    return Budgeted(recipe, text, groups, choice, asked, file_bytes, possible.fixed_bytes)


# What a header says of a tensor, at most; `quantize` counts the bytes.
_HEADER_BYTES = 180
# Where nothing has been measured, losses are taken to go by bytes, these shares of them.
_ASSUMED: Mapping[WeightFormat, float] = {"bf16": 0.0, "fp8": 0.04, "nvfp4": 1.0}


def outline(source: Survey, asked: Asked, sensitivity: Path | None = None) -> tuple[Plan, str]:
    """A plan of the size that was asked for, and a sentence about it, without running anything.

    sensitivity  costs that an earlier run has measured; without them the plan is a stand-in of the
                 right size, and says so

    Raises UsageError for a budget that leaves nothing to choose, CheckpointError for another file.
    """
    config = source.config
    groups = unmeasured_groups(config, source.quantization)
    smallest = _formats(groups, {group.members: _smallest(group) for group in groups})
    size = plan_size(_plan(smallest, config), config)
    least = size.num_bytes + _HEADER_BYTES * size.num_tensors
    fixed = least - sum(min(group.sizes.values()) for group in groups)
    most = fixed + sum(max(group.sizes.values()) for group in groups)
    Possible(least, most, fixed).require(asked, config, source.num_bytes)
    losses: Mapping[str, Mapping[WeightFormat, float]] = {
        group.members[0]: {f: _ASSUMED[f] * group.sizes["fp8"] for f in group.sizes}
        for group in groups
    }
    said = (
        f"{asked.said}: {_gb(least)} to {_gb(most)} are possible. Which linears get which format "
        "is known once their costs are measured; until then a stand-in of that size is planned"
    )
    if sensitivity is not None:
        losses = read_losses(sensitivity, groups)
    measured = [replace(group, losses=losses[group.members[0]]) for group in groups]
    choice = choose(_items(measured), asked.num_bytes - fixed)
    if sensitivity is not None:
        said = f"{asked.said}: {_told(choice)}"
    chosen = {g.members: cast("WeightFormat", choice.options[g.name]) for g in groups}
    name = f"budget-{asked.num_bytes}"
    return replace(_plan(_formats(groups, chosen), config), recipe_name=name), said


def summary(found: Budgeted) -> str:
    """What was chosen, in two sentences for people."""
    return (
        f"{found.asked.said}: {_gb(found.file_bytes)} of {_gb(found.asked.num_bytes)} taken, "
        f"{_gb(found.fixed_bytes)} of it whatever is chosen; {_told(found.choice)}"
    )


def _items(groups: Sequence[Group]) -> list[Item]:
    return [
        Item(
            group.name,
            cast("Mapping[str, int]", group.sizes),
            cast("Mapping[str, float]", group.losses),
        )
        for group in groups
    ]


def _told(choice: Choice) -> str:
    counts: dict[str, int] = {}
    for option in choice.options.values():
        counts[option] = counts.get(option, 0) + 1
    shares = ", ".join(f"{count} {option}" for option, count in sorted(counts.items()))
    best = "no choice has less by the same estimate"
    if choice.gap:
        best = (
            f"none has less than {choice.lower_bound:.5f}, a gap of {choice.gap / choice.loss:.2%}"
        )
    return (
        f"of {len(choice.options)} groups of linears {shares}. Estimated KL divergence "
        f"{choice.loss:.5f} nats a token; {best}."
    )


def _reasons(
    groups: Sequence[Group], choice: Choice, asked: Asked, file_bytes: int, possible: Possible
) -> list[str]:
    """Why every group has its format: what each of its formats would lose and weigh."""
    lines = [
        f"Made by halfbyte quantize {asked.said}: {file_bytes:,} of {asked.num_bytes:,} bytes,",
        f"{possible.fixed_bytes:,} of them whatever is chosen. The estimated KL divergence from",
        f"the source is {choice.loss:.6f} nats a token, and no choice of formats has less than",
        f"{choice.lower_bound:.6f} by the same estimate. Per group, the format chosen and what",
        "each one would add to the estimate, in millionths of a nat, and weigh in bytes:",
        "",
    ]
    for group in groups:
        told = "; ".join(
            f"{name} {group.losses[name] * 1e6:.1f}, {group.sizes[name]:,}" for name in group.sizes
        )
        lines.append(f"{group.name}: {choice.options[group.name]} ({told})")
    return [*lines, ""]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3f} MB"
