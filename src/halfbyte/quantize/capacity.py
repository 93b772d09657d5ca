"""`halfbyte plan`: what a quantization will need and give, before any of it is done.

Bytes come from shapes, memory from a model of the pipeline's phases, time from a rehearsal of the
run on this machine (`rehearsal`). Nothing is downloaded, and nothing written but a few megabytes in
a temporary folder. Decisions 0021 and 0113 say what is measured and what is assumed.
"""

import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from halfbyte.calibrate.seeing import NO_PICTURES, PictureBytes
from halfbyte.calibrate.stream import READERS
from halfbyte.checkpoint.shards import bytes_of
from halfbyte.config import ModelConfig, TextConfig
from halfbyte.errors import CapacityError
from halfbyte.files import open_regular
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.nvfp4 import BLOCK, nvfp4_tensor_scale
from halfbyte.modules import LinearSpec, decoder_linears, head_linear
from halfbyte.quantize.gptq import encode_gptq, make_metric
from halfbyte.quantize.layer import wanted_head_sums, wanted_sums, widths_of_products
from halfbyte.quantize.memory import MemoryPlan, Sums, head_bytes, plan_memory, sums_of
from halfbyte.quantize.rehearsal import (
    Kind,
    Rehearsal,
    kinds_of,
    layer_weights,
    median_and_range,
    rehearse,
    text_flops,
)
from halfbyte.quantize.survey import Survey
from halfbyte.recipe.plan import Plan, linear_size, plan_sizes
from halfbyte.recipe.schema import GptqOptions

# What is measured beside the rehearsal works on.
_PROBE_VALUES = 1 << 22
_PROBE_TOKENS = 512
_SAMPLES = 5
_READ_BYTES = 256 << 20
_LEAST_READ_BYTES = 1 << 20
_ASSUMED_READ_BYTES = 2e9
# A range is never told narrower than this: what a machine does changes within a run, too.
_LEAST_RANGE = 1.25


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The calibration text to come: rows and the longest of them; no rows means data-free.

    tokens      in all, where the rows were drawn; None if every row may be full
    not_drawn   why they were not drawn; None if they were, and without rows
    pictures    what the pictures of drawn rows take
    """

    rows: int
    tokens_per_row: int
    tokens: int | None = None
    not_drawn: str | None = None
    pictures: PictureBytes = NO_PICTURES

    @property
    def num_tokens(self) -> int:
        """Tokens in all; at most so many if the rows were not drawn."""
        return self.rows * self.tokens_per_row if self.tokens is None else self.tokens


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this machine does in a second, and what a rehearsal took.

    read_bytes  of the source's disk; measured only if there was something to read
    hash_bytes  of the output, each tensor of which is hashed
    wide_flops  of a product in f32, as sums over inputs take them
    gptq        weights a second that GPTQ rounds, its products with other columns left out
    rehearsal   seconds of layers as wide as the source's, with the text to come
    """

    device: str
    read_bytes: float
    is_read_measured: bool
    hash_bytes: float
    wide_flops: float
    gptq: float
    rehearsal: Rehearsal


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of a run: what is likely, and between what it will end.

    parts  by kind of work, one after another; they add up to `likely`
    """

    likely: float
    least: float
    most: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CapacityEstimate:
    """What a quantization will need and give. Bytes unless the name says otherwise.

    output      by part
    disk        free bytes needed beside the source, activations between layers included
    disk_free   free bytes there now
    time        None if nothing was measured
    busy        share of this machine's processors that others took while it was measured; None if
                nothing was, or the system does not say
    """

    recipe_name: str
    device: str
    text: CalibrationText
    output: Mapping[str, int]
    disk: int
    disk_free: int
    memory: MemoryPlan
    speeds: Speeds | None
    time: Time | None
    busy: float | None = None


def estimate_run(
    source: Survey,
    plan: Plan,
    text: CalibrationText,
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    gpu_memory_bytes: int | None = None,
    speeds: Speeds | None = None,
    starting_s: float = 0.0,
) -> CapacityEstimate:
    """Everything but hosting (see `hosting.host_on`). Raises CapacityError if memory is too small.

    memory_bytes  the budget that the run would get; None as the pipeline decides; likewise
                  gpu_memory_bytes
    speeds        from `measure_speeds`; None leaves the time out
    starting_s    of a command until its first step: libraries loaded, text drawn
    """
    return CapacityEstimate(
        recipe_name=plan.recipe_name,
        device=device,
        text=text,
        output=output_bytes(plan, source.config),
        disk=disk_bytes(plan, source.config, text),
        disk_free=shutil.disk_usage(source.directory.resolve().parent).free,
        memory=run_memory(
            source.config.text,
            text,
            budget_bytes=memory_bytes,
            device=device,
            gpu_budget_bytes=gpu_memory_bytes,
            sums=sums_of(widths_of_products(plan, source.config)),
            head_bytes=head_bytes(plan, source.config),
        ),
        speeds=speeds,
        time=None if speeds is None else duration_of(source, plan, text, speeds, starting_s),
    )


def output_bytes(plan: Plan, config: ModelConfig) -> dict[str, int]:
    """Bytes of the output by part; parts that do not occur are left out."""
    sizes = plan_sizes(plan, config)
    return {part: size.num_bytes for part, size in sizes.items() if size.num_tensors}


def disk_bytes(plan: Plan, config: ModelConfig, text: CalibrationText) -> int:
    """Free bytes that the run needs beside the source: the output, and activations twice."""
    between = max(_activation_bytes(config.text, text), text.pictures.patches)
    return sum(output_bytes(plan, config).values()) + 2 * between


def _activation_bytes(config: TextConfig, text: CalibrationText) -> int:
    return text.num_tokens * config.width * 2


# --- memory


def run_memory(
    config: TextConfig,
    text: CalibrationText,
    *,
    budget_bytes: int | None = None,
    device: str = "cpu",
    gpu_budget_bytes: int | None = None,
    sums: Sums = Sums(),
    head_bytes: int = 0,
) -> MemoryPlan:
    """How the run would spend memory, as the pipeline itself plans it.

    budget_bytes, gpu_budget_bytes  as `--memory` and `--gpu-memory` of `halfbyte quantize`. Raises
                                    CapacityError if one of them holds no layer.
    sums, head_bytes                what the method holds of a layer's inputs, and of the head
    """
    return plan_memory(
        config,
        longest_row_tokens=text.tokens_per_row if text.rows else 0,
        activation_bytes=_activation_bytes(config, text),
        budget_bytes=budget_bytes,
        on_gpu=device != "cpu",
        gpu_budget_bytes=gpu_budget_bytes,
        sums=sums,
        head_bytes=head_bytes,
        pictures=text.pictures,
    )


def _weights(linear: LinearSpec) -> int:
    return linear.out_features * linear.in_features


# --- time


def measure_speeds(
    source: Survey,
    plan: Plan,
    text: CalibrationText,
    *,
    device: str = "cpu",
    read_bytes: float | None = None,
    with_errors: bool = False,
) -> Speeds:
    """Rehearse the run for some seconds on `device` and say how fast each kind of work is.

    The speed of reading is `read_bytes` where that is given, or 2 GB/s where nothing could be read.
    Results are of this moment: other work on the machine counts. Raises CapacityError for a device
    that is not here.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise CapacityError(
            f"device {device}: there is no GPU here; plan with --device cpu, and see what "
            "one would take "
            "with --gpu"
        )
    place = torch.device(device)
    linear = max(decoder_linears(source.config)[-7:], key=_weights)
    speed = None if read_bytes is not None else _reading_speed(source, linear)
    wide_TI = torch.randn(_PROBE_TOKENS, _PROBE_VALUES // _PROBE_TOKENS, device=place)
    few_OI = wide_TI[:, : 4 * BLOCK].contiguous()
    metric = make_metric(few_OI.T @ few_OI, GptqOptions(sweeps=0))
    tensor_scale = nvfp4_tensor_scale(largest_magnitude(few_OI), "ieee")
    stored = bytes_of(wide_TI.cpu())

    def seconds(work: Callable[[], object]) -> float:
        return _median_seconds(work, place)

    return Speeds(
        device=device,
        read_bytes=read_bytes or speed or _ASSUMED_READ_BYTES,
        is_read_measured=speed is not None,
        hash_bytes=stored.nbytes / seconds(lambda: hashlib.sha256(stored).digest()),
        wide_flops=2 * _PROBE_TOKENS * wide_TI.numel() / seconds(lambda: wide_TI @ wide_TI.T),
        gptq=few_OI.numel() / seconds(lambda: encode_gptq(few_OI, metric, tensor_scale)),
        rehearsal=rehearse(
            source,
            plan,
            num_tokens=text.num_tokens,
            longest_row=text.tokens_per_row if text.rows else 0,
            device=device,
            with_errors=with_errors,
        ),
    )


def _median_seconds(work: Callable[[], object], place: torch.device) -> float:
    """Median seconds of some runs after one to warm up."""
    times = []
    for _ in range(_SAMPLES + 1):
        started = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _reading_speed(source: Survey, linear: LinearSpec) -> float | None:
    """Bytes a second of the source's disk; None if there is too little to read.

    The pages are dropped from the system's cache first where it lets us, so that the disk is asked.
    """
    checkpoint, name = source.checkpoint, f"{linear.name}.weight"
    if checkpoint is None or checkpoint.num_bytes(name) < _LEAST_READ_BYTES:
        return None
    row_bytes = checkpoint.num_bytes(name) // linear.out_features
    rows = min(linear.out_features, max(1, _READ_BYTES // row_bytes))
    with open_regular(checkpoint.shard(name)) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    checkpoint.rows(name, 0, rows)
    return rows * row_bytes / (time.perf_counter() - started)


def duration_of(
    source: Survey, plan: Plan, text: CalibrationText, speeds: Speeds, starting_s: float = 0.0
) -> Time:
    """Seconds of the whole run by kind of work, from the rehearsal of some layers.

    The disk counts where it is slower than the work beside it: reading and writing are hidden by
    encoding and running, making things durable is not. Writing is taken to be as fast as reading.
    """
    config = source.config
    kinds = kinds_of(plan, config.text.num_layers)
    done = speeds.rehearsal
    # Embedding and head are read, hashed twice and written; the decoder's encoding is rehearsed.
    made, decoder = sum(output_bytes(plan, config).values()), _decoder_bytes(source)
    outside = max(source.num_bytes - decoder, 0)
    copying = 2 * outside / speeds.hash_bytes
    ranges = {"copying the rest": (copying, copying, copying)}
    if text.rows:
        ranges["running the text"] = _times(median_and_range(done.running), len(kinds))
        weighing = _seeing(source.config, text, median_and_range(done.running)[0])
        weighing |= _weighing(source, plan, text, speeds)
        ranges |= {part: (seconds, seconds, seconds) for part, seconds in weighing.items()}
    encoding = [median_and_range(done.encoding.get(k) or _any(done.encoding)) for k in kinds]
    if "head" in plan.formats:
        # As fast as a layer's weights, of which it has so many times as many.
        times = _weights(head_linear(config)) / layer_weights(config)
        encoding.append(_times(median_and_range(_any(done.encoding)), times))
    ranges["encoding"] = _summed(encoding)
    worked = sum(likely for likely, _, _ in ranges.values())
    boundary = _activation_bytes(config.text, text) * len(kinds)
    moved = source.num_bytes + (decoder if text.rows else 0) + made + boundary
    synced = _times(median_and_range(done.syncing), len(kinds))
    waited = max(moved / speeds.read_bytes - worked, 0.0)
    ranges["waiting for the disk"] = _summed([synced, (waited, waited, waited)])
    ranges = {"starting": (starting_s, starting_s, starting_s), **ranges}
    likely, least, most = _summed(list(ranges.values()))
    return Time(
        likely=likely,
        least=min(least, likely / _LEAST_RANGE),
        most=max(most, likely * _LEAST_RANGE),
        parts={part: seconds for part, (seconds, _, _) in ranges.items()},
    )


_Range = tuple[float, float, float]  # likely, least, most


def _times(one: _Range, count: float) -> _Range:
    return one[0] * count, one[1] * count, one[2] * count


def _summed(ranges: Sequence[_Range]) -> _Range:
    likely, least, most = (sum(column) for column in zip(*ranges, strict=True))
    return likely, least, most


def _any(samples: Mapping[Kind, tuple[float, ...]]) -> tuple[float, ...]:
    """All samples, for a kind of layer that was too rare to be rehearsed."""
    return tuple(value for kind in samples.values() for value in kind)


def _decoder_bytes(source: Survey) -> int:
    return sum(_stored_bytes(source, linear) for linear in decoder_linears(source.config))


def _seeing(config: ModelConfig, text: CalibrationText, layer_s: float) -> dict[str, float]:
    """Seconds of the tower over the pictures, as fast as the text runs through a decoder layer.

    Of each patch the tower's weights are counted, not what it attends to, which depends on sizes.
    """
    vision = config.vision
    if vision is None or not text.pictures.patches or not layer_s:
        return {}
    attention = 4 * vision.num_heads * vision.head_dim * vision.width
    weights = vision.num_layers * (attention + 3 * vision.mlp_width * vision.width)
    patches = text.pictures.patches / (2 * vision.width)
    of_layer = text_flops(config.text, layer_weights(config), text.num_tokens, text.tokens_per_row)
    return {"seeing the pictures": 2 * patches * weights / of_layer * layer_s}


def _weighing(
    source: Survey, plan: Plan, text: CalibrationText, speeds: Speeds
) -> dict[str, float]:
    """Seconds of methods that weigh errors by inputs; nothing for those that do not."""
    linears = {linear.name: linear for linear in decoder_linears(source.config)}
    scales, products, solving, rounded = plan.scales, 0.0, 0.0, 0
    groups = [
        [linears[f"decoder.{layer}.{reader}"] for reader in READERS[tap]]
        for layer in range(source.config.text.num_layers)
        for tap, want in wanted_sums(plan, layer).items()
        if want == "products"
    ]
    if wanted_head_sums(plan) == "products":
        groups.append([head_linear(source.config)])
    for readers in groups:
        width, rows = readers[0].in_features, sum(x.out_features for x in readers)
        products += 2.0 * text.num_tokens * width**2
        # Factoring, and each sweep's products as well as those of the first pass.
        solving += width**3 * (1 / 3 + 2 * bool(scales.gptq.sweeps))
        solving += rows * width**2 * (3.0 + 4 * scales.gptq.sweeps)
        rounded += rows * width * (1 + scales.gptq.sweeps)
    parts = {
        "summing up inputs": products / speeds.wide_flops,
        "GPTQ": solving / speeds.wide_flops + rounded / speeds.gptq,
    }
    return {part: seconds for part, seconds in parts.items() if seconds}


def _stored_bytes(source: Survey, linear: LinearSpec) -> int:
    return linear_size(linear, source.quantization.formats[linear.name]).num_bytes
