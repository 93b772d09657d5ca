"""From a source checkpoint to a finished quantized one: validate, calibrate, quantize, publish.

Everything that can be wrong is looked for before anything heavy begins (`job`). Then decoder
layers are done one at a time: calibration runs the layer, its linears are encoded and put in their
places on disk, the journal notes it. A run that was killed continues after the last noted layer
(decision 0017). A run that comes to the end of its memory does so by itself, once (decision 0025).
"""

import gc
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.calibrate.activations import Activations
from halfbyte.calibrate.budget import MemoryBudget, OverBudgetError, is_refusal
from halfbyte.calibrate.kinds import KINDS
from halfbyte.calibrate.seeing import picture_bytes
from halfbyte.calibrate.stream import LayerStatistics, head_statistics, stream_layers
from halfbyte.checkpoint.manifest import MANIFEST_NAME, manifest_file
from halfbyte.checkpoint.soundness import require_sound
from halfbyte.checkpoint.writer import FULL, OutputInProgress, check_target
from halfbyte.errors import CapacityError, FormatError
from halfbyte.files import format_bytes, format_gib
from halfbyte.kernels.dispatch import largest_fp8_code
from halfbyte.log import logger, say_once
from halfbyte.machine import trim_heap
from halfbyte.quantize import export
from halfbyte.quantize.clipping import LinearClipping, linear_clipping, warn_clipped
from halfbyte.quantize.encode import declared_scale
from halfbyte.quantize.job import Job, QuantizeConfig, activation_bytes, validate
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.layer import (
    QuantizedLinear,
    cache_scales,
    quantize_head,
    quantize_layer,
    smoothed_norm,
    smoothing_of,
    wanted_head_sums,
    wanted_sums,
)
from halfbyte.quantize.memory import limit_gpu
from halfbyte.quantize.methods import output_errors
from halfbyte.quantize.record import QuantizationRecord, peak_memory_bytes, run_record
from halfbyte.quantize.report import LinearRecord, linear_record
from halfbyte.quantize.source_proof import Reading, require_unchanged
from halfbyte.quantize.staging import locked, work_directory

_FIRST_STEP, _HEAD_STEP = "outside the layers", "head"


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
        _Progress(job, budget, staging, journal, entries).run(on_layer)
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
        _Progress(replace(job, memory=lean), budget, staging, journal, entries).run(on_layer)
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


class _Progress:
    """Takes the steps of a run that the journal does not list yet, in order."""

    def __init__(
        self,
        job: Job,
        budget: MemoryBudget,
        staging: OutputInProgress,
        journal: Journal,
        entries: list[dict[str, Any]],
    ) -> None:
        self._job = job
        self._budget = budget
        self._staging = staging
        self._journal = journal
        self._entries = entries
        self._device = torch.device(job.config.device)
        self._num_layers = job.checkpoint.config.text.num_layers
        self._activations: Activations | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="output")

    def run(self, on_layer: Callable[[int, int], None] | None) -> None:
        """Run all remaining steps, then publish the output."""
        with self._writer:
            self._run(on_layer)

    def _run(self, on_layer: Callable[[int, int], None] | None) -> None:
        if not self._entries:
            names = export.passed_through(self._job.checkpoint, self._job.plan)
            reading = Reading(self._job.checkpoint, names)
            self._finish_step(_FIRST_STEP, self._copy(names, reading), reading)
        first = len(self._entries) - 1
        self._activations = self._open_activations(first)
        try:
            mark = time.perf_counter()
            for layer, statistics in self._layers(first):
                self._layer(layer, statistics, time.perf_counter() - mark)
                mark = time.perf_counter()
                if on_layer is not None:
                    on_layer(layer + 1, self._num_layers)
            if self._is_head_left():
                self._head()
        finally:
            if self._activations is not None:
                self._activations.close()
        for name, content in self._job.files.items():
            self._staging.write_file(name, content)
        hashes = {k: v for entry in self._entries for k, v in entry["tensors"].items()}
        read = (entry["read"] for entry in self._entries)
        require_unchanged(self._job.checkpoint, read, self._budget)
        self._warn_clipped()
        missing = set(self._job.shards.slots) - set(hashes)
        assert not missing, f"never written: {sorted(missing)[:3]}"
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self._job.files.items()}
        self._staging.write_file(MANIFEST_NAME, manifest_file(self._job.fingerprint, hashes, files))
        self._staging.publish()

    def _warn_clipped(self) -> None:
        """Say whose static FP8 scales clip image rows, where these were run."""
        clipping = [one for entry in self._entries for one in entry.get("clipping", ())]
        config = self._job.config
        warn_clipped(clipping, "chosen", f"the FP8 input scales of {config.output}")
        warn_clipped(clipping, "source", f"the source's own FP8 input scales, {config.source},")

    def _layers(self, first: int) -> Iterator[tuple[int, LayerStatistics | None]]:
        """Yield the layers that are left, with their statistics if there are calibration rows."""
        if first >= self._num_layers:
            return
        rows, activations = self._job.rows, self._activations
        if rows is None or activations is None:
            yield from ((layer, None) for layer in range(first, self._num_layers))
            return
        for statistics in stream_layers(
            self._job.checkpoint,
            rows,
            device=self._device,
            activations=activations,
            first_layer=first,
            prefetch=self._job.memory.prefetch,
            budget=self._budget,
            wants=lambda layer: wanted_sums(self._job.plan, layer),
            pictures=self._job.pictures,
        ):
            yield statistics.layer, statistics
            activations.forget(statistics.layer)

    def _is_head_left(self) -> bool:
        """Whether the plan quantizes the head and no earlier run has done it."""
        is_done = any(entry["step"] == _HEAD_STEP for entry in self._entries)
        return "head" in self._job.plan.formats and not is_done

    def _open_activations(self, first: int) -> Activations | None:
        """Where rows wait, with the inputs of layer `first`; None if none is to be run."""
        rows = self._job.rows
        if rows is None or (first >= self._num_layers and not self._is_head_left()):
            return None
        activations = Activations(
            [row.numel() for row in rows],
            self._job.checkpoint.config.text.width,
            self._staging.directory,
            in_memory=self._job.memory.activations_in_memory,
        )
        if first > 0:
            try:
                activations.resume(first, self._entries[-1]["activations"])
            except BaseException:
                activations.close()
                raise
        return activations

    def _head(self) -> None:
        """Calibrate and encode the head, behind the last layer."""
        job, started = self._job, time.perf_counter()
        reading = Reading(job.checkpoint, ["head.weight"])
        statistics = None
        if self._activations is not None:
            statistics = head_statistics(
                job.checkpoint,
                self._activations,
                device=self._device,
                budget=self._budget,
                wants=wanted_head_sums(job.plan),
            )
        head = quantize_head(
            job.checkpoint,
            job.plan,
            statistics,
            job.config.profile,
            self._device,
            self._budget,
            reading.note,
        )
        hashes = self._write_all(head.tensors)
        records = [self._record(head, statistics)] if job.config.with_errors else []
        self._finish_step(_HEAD_STEP, hashes, reading, linears=records)
        logger.info("head: done in %.1f s", time.perf_counter() - started)

    def _record(self, linear: QuantizedLinear, statistics: LayerStatistics | None) -> LinearRecord:
        record = linear_record(linear)
        if statistics is not None:
            record["output_db"] = output_errors(
                linear,
                statistics.sample_of(linear.name),
                statistics.input_of(linear.name),
                self._job.config.profile,
                self._job.plan.scales,
            )
        return record

    def _layer(self, layer: int, statistics: LayerStatistics | None, calibrated_s: float) -> None:
        job, started = self._job, time.perf_counter()
        reading = Reading(job.checkpoint, export.layer_tensors(job.checkpoint, layer))
        smoothing = smoothing_of(layer, job.plan, statistics)
        hashes = self._copy(export.layer_norms(job.checkpoint, layer), reading, smoothing)
        linears = quantize_layer(
            job.checkpoint,
            layer,
            job.plan,
            statistics,
            job.config.profile,
            self._device,
            self._budget,
            reading.note,
        )
        written, records, clipping = self._write_linears(linears, statistics)
        hashes |= written | self._write_cache_scales(layer, statistics)
        observed = {} if statistics is None else statistics.observed
        encoded_s = time.perf_counter() - started
        self._make_durable()
        peaks = peak_memory_bytes(self._device)
        self._finish_step(
            f"layer {layer}",
            hashes,
            reading,
            activations=None if self._activations is None else self._activations.checksum,
            linears=records,
            observed={tap: float(magnitude) for tap, magnitude in observed.items()},
            seconds={
                "calibrating": round(calibrated_s, 3),
                "encoding": round(encoded_s, 3),
                "syncing": round(time.perf_counter() - started - encoded_s, 3),
            },
            peak_memory_bytes=peaks,
            **(
                {"clipping": clipping, "observed_by_kind": _by_kind(statistics)} if clipping else {}
            ),
        )
        logger.info(
            "layer %d of %d: calibrated in %.1f s, encoded in %.1f s",
            layer,
            self._num_layers,
            calibrated_s,
            encoded_s,
        )

    def _stated_scale(self, name: str) -> Tensor | None:
        """The static input scale that the source states for a linear in FP8."""
        checkpoint = self._job.checkpoint
        if not self._job.pictures or checkpoint.format_of(name) != "fp8":
            return None
        return declared_scale(checkpoint, [name])

    def _copy(
        self, names: Sequence[str], reading: Reading, smoothing: Mapping[str, Tensor] | None = None
    ) -> dict[str, str]:
        """Write tensors as the source has them, smoothed norms over their factors."""
        hashes: dict[str, str] = {}
        for name in names:
            # One at a time: the embedding is as large as a layer.
            self._budget.check(self._job.checkpoint.num_bytes(name))
            tensor = self._job.checkpoint.tensor(name)
            noting = self._writer.submit(reading.note, name, tensor)
            factors_D = (smoothing or {}).get(name.removesuffix(".weight"))
            written = tensor if factors_D is None else smoothed_norm(name, tensor, factors_D)
            hashes |= self._write(name, written)
            noting.result()
        return hashes

    def _write_all(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for name, tensor in tensors.items():
            hashes |= self._write(name, tensor)
        return hashes

    def _write_linears(
        self, linears: Iterable[QuantizedLinear], statistics: LayerStatistics | None
    ) -> tuple[dict[str, str], list[LinearRecord], list[LinearClipping]]:
        """Write linears as they are encoded.

        Returns hashes of their tensors, their records, and what is known of their clipping.
        """
        job = self._job
        hashes: dict[str, str] = {}
        records = []
        clipping = []
        rule = job.plan.scales.activations
        writing: Future[dict[str, str]] | None = None
        for linear in linears:
            # One linear is on its way to the disk while the next one is encoded.
            hashes |= {} if writing is None else writing.result()
            writing = self._writer.submit(self._write_all, linear.tensors)
            stated = self._stated_scale(linear.name)
            seen = linear_clipping(linear, statistics, stated, job.config.profile, rule)
            clipping += [] if seen is None else [seen]
            if job.config.with_errors:
                records.append(self._record(linear, statistics))
        hashes |= {} if writing is None else writing.result()
        return hashes, records, clipping

    def _write_cache_scales(self, layer: int, statistics: LayerStatistics | None) -> dict[str, str]:
        """Write the scales of the layer's keys and values, where the cache is FP8."""
        job = self._job
        if job.plan.kv_cache != "fp8":
            return {}
        seen = statistics if job.plan.scales.cache == "measured" else None
        rule = job.plan.scales.activations
        hashes: dict[str, str] = {}
        for name, scale in cache_scales(layer, seen, job.config.profile, rule).items():
            hashes |= self._write(name, scale)
        return hashes

    def _write(self, name: str, tensor: Tensor) -> dict[str, str]:
        foreign = self._job.tensors[name]
        require_sound(name, foreign, tensor, largest_fp8_code)
        return {foreign: self._staging.write(foreign, tensor)}

    def _make_durable(self) -> None:
        self._staging.sync()
        if self._activations is not None:
            self._activations.settle()

    def _finish_step(
        self, step: str, hashes: Mapping[str, str], reading: Reading, **facts: Any
    ) -> None:
        """Make the step durable, then note it in the journal."""
        self._make_durable()
        entry = {"step": step, "tensors": dict(hashes), "read": reading.entry(), **facts}
        self._journal.append(entry)
        self._entries.append(entry)


def _by_kind(statistics: LayerStatistics | None) -> dict[str, dict[str, float]]:
    """Kind of row -> tap point -> largest magnitude, as JSON values."""
    kinds = {} if statistics is None else statistics.kinds
    return {
        kind: {tap: float(found.largest()[kind]) for tap, found in kinds.items()} for kind in KINDS
    }
