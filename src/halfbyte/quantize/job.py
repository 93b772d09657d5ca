"""A quantization job: what is asked, and the proof that it can be done.

`validate` looks at everything that can be wrong before anything heavy begins: the source and its
tensors, the recipe, calibration rows, memory. Called by `pipeline`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte
from halfbyte.calibrate.blend import Blend, load_blend
from halfbyte.calibrate.draw import RowPictures, draw, pixels_digest
from halfbyte.calibrate.seeing import check_pictures, picture_bytes
from halfbyte.calibrate.sources import DataAccess
from halfbyte.calibrate.tokens import Rows, as_rows, check_rows, read_rows
from halfbyte.checkpoint.metadata import Quantization, read_json
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.shard_plan import ShardPlan, plan_shards
from halfbyte.checkpoint.verify import require_tokens_in_vocabulary, require_trusted
from halfbyte.checkpoint.writer import MAX_SHARD_BYTES
from halfbyte.errors import CapacityError, UsageError
from halfbyte.files import is_there
from halfbyte.formats.fp8 import Profile
from halfbyte.quantize import export
from halfbyte.quantize.layer import widths_of_products
from halfbyte.quantize.memory import MemoryPlan, head_bytes, plan_memory, sums_of
from halfbyte.recipe.plan import Plan, make_plan
from halfbyte.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """What to quantize, by which means, and where to write the result.

    origin              `owner/name@commit` of a source that was fetched; goes into the manifest
    calibration_tokens  recorded ids (`calibrate.tokens`); None takes the recipe's blend
    blend               a blend by name or path, instead of the recipe's
    data_folder         where the blend's data sets lie, laid out as on the hub
    allow_hub           fetch what the folder lacks
    memory_bytes        host memory that the run stays within; activations go to disk beyond it.
                        None takes most of what the machine has available
    gpu_memory_bytes    likewise on the GPU, where allocating more fails; None sets no limit
    with_errors         measure every linear's error against the source (about twice the time)
    restart             drop what an earlier, unfinished run left instead of going on with it
    accept              settings of the source to go on with although they are known to ruin a model
    has_vision          False leaves the vision tower out: the output is a text model
    """

    source: Path
    output: Path
    recipe: Recipe
    profile: Profile = "ieee"
    origin: str | None = None
    calibration_tokens: Path | None = None
    blend: str | None = None
    data_folder: Path | None = None
    allow_hub: bool = False
    device: str = "cpu"
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    with_errors: bool = True
    restart: bool = False
    accept: tuple[str, ...] = ()
    has_vision: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """A validated job: nothing in it can be wrong any more, except the weights themselves.

    pictures  of each of the rows; empty where none shows any
    """

    config: QuantizeConfig
    checkpoint: Checkpoint
    plan: Plan
    rows: Rows | None
    memory: MemoryPlan
    tensors: Mapping[str, str]  # canonical -> foreign
    shards: ShardPlan
    files: Mapping[str, bytes]
    fingerprint: Mapping[str, Any]
    pictures: RowPictures = ()


def refuse_export(source: Path, quantization: Quantization) -> None:
    """Raise UsageError for a checkpoint that was quantized already."""
    if quantization.dialect == "modelopt":
        raise UsageError(
            f"{source} is already a Model Optimizer export; quantize its source instead"
        )
    if quantization.dialect == "compressed":
        raise UsageError(
            f"{source} was quantized by llm-compressor already; quantize its source instead"
        )


def open_source(config: QuantizeConfig) -> Checkpoint:
    """Open the source, without its vision tower if that is to be left out."""
    checkpoint = Checkpoint.open(config.source)
    refuse_export(config.source, checkpoint.quantization)
    return checkpoint if config.has_vision else checkpoint.without_vision()


def validate(config: QuantizeConfig) -> Job:
    """Make the job, or raise UsageError, CheckpointError, FormatError or CapacityError."""
    checkpoint = open_source(config)
    require_trusted(checkpoint.config, config.accept)
    require_tokens_in_vocabulary(checkpoint)
    plan = make_plan(config.recipe, checkpoint.config)
    rows, pictures, provenance = calibration_of(config, checkpoint)
    layout = export.export_layout(checkpoint)
    shapes = export.export_tensors(checkpoint, plan)
    names = {name: export.export_name(name, layout) for name in shapes}
    shards = plan_shards({names[n]: shapes[n] for n in shapes}, config.max_shard_bytes)
    return Job(
        config=config,
        checkpoint=checkpoint,
        plan=plan,
        rows=rows,
        memory=plan_memory(
            checkpoint.config.text,
            longest_row_tokens=max((row.numel() for row in rows or ()), default=0),
            activation_bytes=activation_bytes(rows, checkpoint),
            budget_bytes=config.memory_bytes,
            on_gpu=_is_gpu(config),
            gpu_budget_bytes=config.gpu_memory_bytes,
            sums=sums_of(widths_of_products(plan, checkpoint.config)),
            head_bytes=head_bytes(plan, checkpoint.config),
            pictures=picture_bytes(pictures, checkpoint.config),
        ),
        tensors=names,
        shards=shards,
        files=export.export_files(checkpoint, plan),
        fingerprint=_fingerprint(config, checkpoint, plan, provenance),
        pictures=pictures,
    )


def _is_gpu(config: QuantizeConfig) -> bool:
    """Whether layers run on a GPU. Raises UsageError or CapacityError if that cannot be."""
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise UsageError(f"device {config.device!r}: cpu, cuda or cuda:1 was expected") from None
    if device.type == "cpu":
        if config.gpu_memory_bytes is not None:
            raise UsageError("--gpu-memory needs --device cuda")
        return False
    if device.type != "cuda" or not torch.cuda.is_available():
        raise CapacityError(f"device {config.device}: no such GPU here; use --device cpu")
    return True


def calibration_of(
    config: QuantizeConfig, checkpoint: Checkpoint
) -> tuple[Rows | None, RowPictures, Mapping[str, Any] | None]:
    """The calibration rows, their pictures and where they come from; None without data."""
    recipe, tokens = config.recipe, config.calibration_tokens
    if recipe.scales.activations == "none":
        if tokens is not None or config.blend is not None:
            raise UsageError(
                "data-free quantization (activations: none) takes no calibration data; leave it out"
            )
        return None, (), None
    if tokens is not None:
        if config.blend is not None:
            raise UsageError("give recorded tokens or a blend, not both")
        (rows, pictures), where, provenance = read_rows(tokens), str(tokens), _recorded(tokens)
    else:
        blend = wanted_blend(recipe, config.blend)
        access = DataAccess(folder=config.data_folder, allow_hub=config.allow_hub)
        data = draw(blend, config.source, access=access)
        rows, where, provenance = as_rows(data), f"blend {blend.name}", data.provenance
        pictures = data.pictures
    check_rows(rows, checkpoint.config.text, where)
    check_pictures(rows, pictures, checkpoint.config, where)
    return rows, pictures, {**_summary(rows), **_shown(pictures), "provenance": provenance}


def wanted_blend(recipe: Recipe, blend: str | None) -> Blend:
    """The blend that was named, or the recipe's with the recipe's own sizes. Raises UsageError."""
    if blend is not None:
        return load_blend(blend)
    wanted = recipe.calibration
    return replace(
        load_blend(wanted.blend),
        samples=wanted.samples,
        tokens_per_sample=wanted.tokens_per_sample,
        seed=wanted.seed,
    )


def _recorded(tokens: Path) -> Mapping[str, Any] | None:
    """The record that `halfbyte blend` wrote beside a file of tokens, if it did."""
    path = tokens.with_name(f"{tokens.name}.json")
    if not is_there(path):
        return None
    record: Mapping[str, Any] = read_json(path)
    return record


def _fingerprint(
    config: QuantizeConfig,
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that the output's bytes depend on."""
    return {
        **({} if config.origin is None else {"origin": config.origin}),
        "source": export.source_fingerprint(checkpoint),
        **({} if config.has_vision else {"vision": "left out"}),
        "recipe": {
            "name": plan.recipe_name,
            "formats": dict(plan.formats),
            "kv_cache": plan.kv_cache,
            "scales": plan.scales.facts(),
        },
        "profile": config.profile,
        "calibration": calibration,
        "max_shard_bytes": config.max_shard_bytes,
        "device": torch.device(config.device).type,
        "versions": {"halfbyte": halfbyte.__version__, "torch": metadata.version("torch")},
    }


def _summary(rows: Sequence[Tensor]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.numel().to_bytes(8, "little"))
        digest.update(row.numpy().tobytes())
    return {
        "rows": len(rows),
        "tokens": sum(row.numel() for row in rows),
        "longest": max(row.numel() for row in rows),
        "sha256": digest.hexdigest(),
    }


def _shown(pictures: RowPictures) -> dict[str, Any]:
    """What the fingerprint says of pictures; nothing where there are none."""
    images = [image for row in pictures for image in row]
    if not images:
        return {}
    tokens = sum(image.num_tokens for image in images)
    digest = pixels_digest(pictures)
    return {"pictures": {"pictures": len(images), "tokens": tokens, "sha256": digest}}


def activation_bytes(rows: Rows | None, checkpoint: Checkpoint) -> int:
    """Bytes of all rows at one layer boundary."""
    return sum(row.numel() for row in rows or ()) * checkpoint.config.text.width * 2
