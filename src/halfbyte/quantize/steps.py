"""The steps of a quantization: what lies outside the layers, each layer, the head, publishing.

A step reads from the source, encodes, puts tensors in their places on disk and notes in the journal
what was done; a run that goes on takes those that the journal does not list. Called by `pipeline`.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from halfbyte.calibrate.activations import Activations
from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.calibrate.kinds import KINDS
from halfbyte.calibrate.stream import LayerStatistics, head_statistics, stream_layers
from halfbyte.checkpoint.identity import MANIFEST_NAME
from halfbyte.checkpoint.manifest import manifest_file
from halfbyte.checkpoint.soundness import require_sound
from halfbyte.checkpoint.writer import OutputInProgress
from halfbyte.kernels.dispatch import largest_fp8_code
from halfbyte.log import logger
from halfbyte.quantize import export
from halfbyte.quantize.clipping import LinearClipping, linear_clipping, warn_clipped
from halfbyte.quantize.encode import declared_scale
from halfbyte.quantize.job import Job
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
from halfbyte.quantize.methods import output_errors
from halfbyte.quantize.record import peak_memory_bytes
from halfbyte.quantize.report import LinearRecord, linear_record
from halfbyte.quantize.source_proof import Reading, require_unchanged

_FIRST_STEP, _HEAD_STEP = "outside the layers", "head"


class Steps:
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
