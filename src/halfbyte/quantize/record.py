"""A whole quantization as one JSON record: what `page` shows and what programs read.

Holds no paths. Times and memory are those of the steps, whichever run took them.
"""

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import torch

from halfbyte.calibrate.kinds import Kind
from halfbyte.machine import held
from halfbyte.quantize.clipping import LinearClipping
from halfbyte.quantize.job import Job
from halfbyte.quantize.report import LinearRecord
from halfbyte.recipe.plan import plan_sizes

VERSION = 1


class FileFacts(TypedDict):
    """A file of the source; the hash of a shard is that of its header and samples."""

    bytes: int
    sha256: str


class SourceFacts(TypedDict):
    """The checkpoint that was quantized: its name, size and files."""

    name: str
    dialect: str
    bytes: int
    files: Mapping[str, FileFacts]


class OutputFacts(TypedDict):
    """The checkpoint that was written, its bytes by part."""

    name: str
    bytes: int
    parts: Mapping[str, int]


class RecipeFacts(TypedDict):
    """By which recipe, and the rules of its scales by what they scale."""

    name: str
    scales: Mapping[str, str]
    kv_cache: str


class PictureFacts(TypedDict):
    """The pictures that rows showed: how many, of how many tokens, and their pixels' hash."""

    pictures: int
    tokens: int
    sha256: str


class CalibrationFacts(TypedDict):
    """The rows that were run; `provenance` is what `calibrate.draw` says of them."""

    rows: int
    tokens: int
    longest: int
    sha256: str
    provenance: Mapping[str, Any] | None
    pictures: NotRequired[PictureFacts]


class LayerFacts(TypedDict):
    """One decoder layer: seconds by kind of work, peaks by place, largest magnitude by tap.

    observed_by_kind  the latter of text and image rows apart, where rows showed pictures
    """

    layer: int
    seconds: Mapping[str, float]
    peak_memory_bytes: Mapping[str, int]
    observed: Mapping[str, float]
    observed_by_kind: NotRequired[Mapping[Kind, Mapping[str, float]]]


class QuantizationRecord(TypedDict):
    """The whole record; JSON values throughout, since a resumed run reads its part from a file.

    clipping  what static input scales cut off, where calibration rows showed pictures
    """

    halfbyte_quantization_record: int
    source: SourceFacts
    output: OutputFacts
    recipe: RecipeFacts
    profile: str
    device: str
    versions: Mapping[str, str]
    calibration: CalibrationFacts | None
    planned_memory_bytes: Mapping[str, int]
    layers: Sequence[LayerFacts]
    linears: Sequence[LinearRecord]
    clipping: NotRequired[Sequence[LinearClipping]]


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """The most that this process has held so far: on the host, and on a GPU if it uses one."""
    peaks = {"host": _host_peak_bytes()}
    if device.type == "cuda":
        peaks["gpu"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _host_peak_bytes() -> int:
    """VmHWM where the system states it: ru_maxrss may be that of the process we came from."""
    holds = held()
    if holds is not None:
        return holds.peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_record(job: Job, entries: Sequence[Mapping[str, Any]]) -> QuantizationRecord:
    """Build the record of a finished run as JSON values.

    entries  the journal's, one a step; those of the layers hold `linears`, `observed` (tap point ->
             largest magnitude), `seconds` and `peak_memory_bytes`, that of the head `linears`
    """
    config, checkpoint, fingerprint = job.config, job.checkpoint, job.fingerprint
    layers = [entry for entry in entries if "observed" in entry]
    sizes = plan_sizes(job.plan, checkpoint.config)
    clipping = [one for entry in layers for one in entry.get("clipping", ())]
    record: QuantizationRecord = {
        "halfbyte_quantization_record": VERSION,
        "source": {
            "name": config.origin or checkpoint.directory.resolve().name,
            "dialect": checkpoint.quantization.dialect,
            "bytes": sum(map(checkpoint.num_bytes, checkpoint.names())),
            "files": fingerprint["source"],
        },
        "output": {
            "name": config.output.name,
            "bytes": job.shards.total_bytes,
            "parts": {part: size.num_bytes for part, size in sizes.items() if size.num_tensors},
        },
        "recipe": {
            "name": job.plan.recipe_name,
            "scales": fingerprint["recipe"]["scales"],
            "kv_cache": job.plan.kv_cache,
        },
        "profile": config.profile,
        "device": fingerprint["device"],
        "versions": fingerprint["versions"],
        "calibration": fingerprint["calibration"],
        "planned_memory_bytes": {
            "host": job.memory.peak_bytes,
            **({} if job.memory.gpu_peak_bytes is None else {"gpu": job.memory.gpu_peak_bytes}),
        },
        "layers": [_layer_facts(number, entry) for number, entry in enumerate(layers)],
        "linears": [linear for entry in entries for linear in entry.get("linears", ())],
    }
    if clipping:
        record["clipping"] = clipping
    return record


def _layer_facts(number: int, entry: Mapping[str, Any]) -> LayerFacts:
    facts: LayerFacts = {
        "layer": number,
        "seconds": entry.get("seconds", {}),
        "peak_memory_bytes": entry.get("peak_memory_bytes", {}),
        "observed": entry["observed"],
    }
    if "observed_by_kind" in entry:
        facts["observed_by_kind"] = entry["observed_by_kind"]
    return facts
