"""From a source checkpoint to a finished quantized one: validate, calibrate, quantize, publish.

Everything that can be wrong is looked for before anything heavy begins (`job`). Then decoder
layers are done one at a time (`steps`): calibration runs the layer, its linears are encoded and put
in their places on disk, the journal notes it. A run that was killed continues after the last noted
layer (decision 0017). A run that comes to the end of its memory does so by itself, once (decision
0025).
"""

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibrate.budget import MemoryBudget, OverBudgetError, is_refusal
from halfbyte.calibrate.seeing import picture_bytes
from halfbyte.checkpoint.writer import FULL, OutputInProgress, check_target
from halfbyte.errors import CapacityError, FormatError
from halfbyte.files import format_bytes, format_gib
from halfbyte.log import logger, say_once
from halfbyte.machine import trim_heap
from halfbyte.quantize.job import Job, QuantizeConfig, activation_bytes, validate
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.memory import limit_gpu
from halfbyte.quantize.record import QuantizationRecord, run_record
from halfbyte.quantize.report import LinearRecord
from halfbyte.quantize.source_proof import require_unchanged
from halfbyte.quantize.staging import locked, work_directory
from halfbyte.quantize.steps import Steps


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a quantization gives; `linears` holds one record a linear (see `report`).

    record  everything that the report shows (see `record`), as JSON values
    """

    output: Path
    num_bytes: int
    num_source_bytes: int
    num_calibration_tokens: int
    seconds: float
    linears: tuple[LinearRecord, ...]
    record: QuantizationRecord


def quantize(
    config: QuantizeConfig,
    on_layer: Callable[[int, int], None] | None = None,
    *,
    owns_process: bool = False,
) -> QuantizeResult:
    """Quantize a checkpoint; `on_layer(done, total)` is called after each layer.

    owns_process  this process does nothing else, as with `halfbyte quantize`: all that it holds
                  counts against `memory_bytes`, and on a CPU the system is told to refuse more.
                  Otherwise what it held before is left out, and nothing but the run is kept back

    `memory_bytes` is kept (decision 0025): when memory gets tight, what is held for speed is given
    up; if that is not enough the run goes on once after its last finished step with nothing besides
    the layer at work, and then ends with CapacityError, its finished steps kept.

    Raises UsageError, CheckpointError or CapacityError before anything heavy begins if the job
    cannot be done, FormatError that names the tensor if a weight or a scale turns out to be none
    (NaN, infinity, nothing but zeros) or does not survive its format. What is published is what
    `verify` finds sound: every tensor is looked at when it is written. The output
    directory appears when it is complete and not before. What a run leaves behind when it dies is
    one hidden directory beside the output, with which the next run goes on; errors that would
    come again leave nothing.
    """
    started = time.perf_counter()
    check_target(config.output)
    job = validate(config)
    budget = MemoryBudget(
        config.memory_bytes,
        owns_process=owns_process,
        limit_data=owns_process and torch.device(config.device).type == "cpu",
    )
    with locked(work_directory(config.output)) as _, budget:
        entries = _run(job, budget, on_layer)
        _warn_over(budget)
    checkpoint = job.checkpoint
    record = run_record(job, entries)
    return QuantizeResult(
        output=config.output,
        num_bytes=job.shards.total_bytes,
        num_source_bytes=sum(checkpoint.num_bytes(name) for name in checkpoint.names()),
        num_calibration_tokens=sum(row.numel() for row in job.rows or ()),
        seconds=time.perf_counter() - started,
        linears=tuple(record["linears"]),
        record=record,
    )


def _run(
    job: Job, budget: MemoryBudget, on_layer: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    """Run the heavy part; keep the work directory if a later run can continue from it.

    Returns the journal's entries, those of earlier runs included.
    """
    work = work_directory(job.config.output)
    staging = OutputInProgress(work, job.config.output, job.shards)
    journal = Journal(work / "journal")
    entries: list[dict[str, Any]] = []
    try:
        # A journal without files was left by a run that died after publishing them.
        if journal.exists() and staging.exists() and not job.config.restart:
            entries = journal.resume(job.fingerprint)
            staging.reopen()
            for entry in entries:
                staging.prove(entry["tensors"])
            require_unchanged(job.checkpoint, (entry["read"] for entry in entries), budget)
            logger.info("going on after %d finished steps of an earlier run", len(entries))
        else:
            _begin(job, staging, journal)
        if job.config.gpu_memory_bytes is not None:
            limit_gpu(torch.device(job.config.device), job.config.gpu_memory_bytes)
        _finish(job, budget, staging, journal, entries, on_layer)
    except FormatError:
        # A weight that cannot be encoded will be the same next time.
        staging.discard()
        raise
    except torch.OutOfMemoryError as error:
        raise CapacityError(_gpu_full(job, error, work if entries else None)) from error
    except (CapacityError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        if not entries:
            staging.discard()
            raise CapacityError(_full(job, error, "nothing was left behind")) from error
        do = "" if isinstance(error, OverBudgetError) else "make room and "
        kept = f"{len(entries)} finished steps are kept in {work}: {do}run again"
        raise CapacityError(_full(job, error, kept)) from error
    finally:
        staging.close()
        journal.close()
    return entries


def _finish(
    job: Job,
    budget: MemoryBudget,
    staging: OutputInProgress,
    journal: Journal,
    entries: list[dict[str, Any]],
    on_layer: Callable[[int, int], None] | None,
) -> None:
    """Run all remaining steps; if memory ends, run them once more with nothing held for speed.

    Raises OverBudgetError if it ends even so.
    """
    try:
        Steps(job, budget, staging, journal, entries).run(on_layer)
        return
    except Exception as error:
        if not is_refusal(error):
            raise
        said = _said(error, budget)
    # After the handler, since the error held all that its frames held.
    budget.give_up()
    gc.collect()
    trim_heap()
    logger.warning(
        "%s; going on after %d finished steps with nothing in memory besides the layer at work",
        said,
        len(entries),
    )
    lean = replace(job.memory, prefetch=False, activations_in_memory=False)
    try:
        Steps(replace(job, memory=lean), budget, staging, journal, entries).run(on_layer)
    except Exception as error:
        if not is_refusal(error):
            raise
        raise OverBudgetError(_out_of_memory(job, budget, error)) from error


def _out_of_memory(job: Job, budget: MemoryBudget, error: Exception) -> str:
    longest = max((row.numel() for row in job.rows or ()), default=0)
    do = "quantize where more is free" if budget.budget_bytes is None else "give it more"
    shorter = f", or rows shorter than {longest} tokens" if longest else ""
    return (
        f"{_said(error, budget)}, with nothing in memory besides the layer at work (peak "
        f"{budget.peak_bytes / 2**30:.2f} GiB): {do}{shorter}"
    )


def _said(error: Exception, budget: MemoryBudget) -> str:
    if isinstance(error, OverBudgetError):
        return str(error)
    given = "out of memory"
    if budget.budget_bytes is not None:
        given = f"--memory {format_gib(budget.budget_bytes)}"
    return f"{given}: the system refuses more"


def _warn_over(budget: MemoryBudget) -> None:
    """Warn if the run held more than `memory_bytes` all the same, which is a mistake of ours."""
    if budget.budget_bytes is not None and budget.peak_bytes > budget.budget_bytes:
        say_once(
            f"this process has held {budget.peak_bytes / 2**30:.2f} GiB, more than --memory "
            f"{budget.budget_bytes / 2**30:.2f} GiB; please report it"
        )


def _full(job: Job, error: Exception, what_is_left: str) -> str:
    said = str(error)
    if isinstance(error, OSError):
        said = f"{job.config.output}: disk full while writing activations or the journal"
    return f"{said}; {what_is_left}"


def _gpu_full(job: Job, error: Exception, work: Path | None) -> str:
    limit = job.config.gpu_memory_bytes
    given = "" if limit is None else f" (--gpu-memory {format_gib(limit)})"
    planned = (job.memory.gpu_peak_bytes or 0) / 2**30
    kept = "" if work is None else f"; finished layers are kept in {work}: run again"
    return (
        f"the GPU is full{given}; the run was planned to take {planned:.2f} GiB. Is something else "
        f"on it?{kept} ({str(error).splitlines()[0]})"
    )


def _begin(job: Job, staging: OutputInProgress, journal: Journal) -> None:
    """Empty the work directory, check the disk, allocate the output, start the journal."""
    for path in staging.directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    needed = job.shards.total_bytes + sum(map(len, job.files.values()))
    if job.rows is not None:
        patches = picture_bytes(job.pictures, job.checkpoint.config).patches
        needed += 2 * max(activation_bytes(job.rows, job.checkpoint), patches)
    free = shutil.disk_usage(staging.directory).free
    if free < needed:
        raise CapacityError(
            f"{job.config.output.parent}: {format_bytes(free)} free; the output and the "
            f"activations between layers take {format_bytes(needed)}"
        )
    staging.create()
    staging.sync()
    journal.start(job.fingerprint)
