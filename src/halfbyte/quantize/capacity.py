"""`halfbyte plan`: what a quantization will need and give, before any of it is done.

Bytes come from shapes, memory from a model of the pipeline's phases, time from a few seconds of
measuring on this machine. Nothing is downloaded or written. Decision 0021 says what is measured
and what is assumed.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.calibrate.stream import READERS
from halfbyte.checkpoint.shards import bytes_of
from halfbyte.config import ModelConfig, TextConfig
from halfbyte.errors import CapacityError
from halfbyte.files import open_regular
from halfbyte.formats.fp8 import decode_fp8, encode_fp8, fp8_scale
from halfbyte.formats.measure import largest_magnitude, relative_error, zero_rate
from halfbyte.formats.nvfp4 import BLOCK, SEARCHED_STEPS, encode_nvfp4, nvfp4_tensor_scale
from halfbyte.kernels import dispatch
from halfbyte.modules import Linear, WeightFormat, decoder_linears
from halfbyte.quantize.gptq import encode_gptq, make_metric
from halfbyte.quantize.layer import wanted_sums, widths_of_products
from halfbyte.quantize.memory import MemoryPlan, Sums, plan_memory, sums_of
from halfbyte.quantize.survey import Survey
from halfbyte.recipe.plan import Plan, linear_size, plan_sizes
from halfbyte.recipe.schema import GptqOptions

# What the measurement works on; a full-width layer has 1.4e9 weights.
_PROBE_WEIGHTS = 1 << 24
_PROBE_TOKENS = 512
_READ_BYTES = 256 << 20
_LEAST_READ_BYTES = 1 << 20
_ASSUMED_READ_BYTES = 2e9


@dataclass(frozen=True, slots=True)
class Text:
    """The calibration text to come: rows and the longest of them; no rows means data-free."""

    rows: int
    tokens_per_row: int

    @property
    def num_tokens(self) -> int:
        """Tokens in all, if every row is full."""
        return self.rows * self.tokens_per_row


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this machine does in a second.

    read_bytes  of the source's disk; measured only if there was something to read
    hash_bytes  of the output, each tensor of which is hashed
    nvfp4       weights encoded from bf16; fp8 likewise
    decode      FP8 weights decoded to bf16
    compare     weights compared with their source, for the report
    flops       of a product with bf16 weights
    wide_flops  of a product in f32, as sums over inputs take them
    gptq        weights a second that GPTQ rounds, its products with other columns left out
    """

    device: str
    read_bytes: float
    is_read_measured: bool
    hash_bytes: float
    nvfp4: float
    fp8: float
    decode: float
    compare: float
    flops: float
    wide_flops: float
    gptq: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a quantization will need and give. Bytes unless the name says otherwise.

    output     by part
    disk       free bytes needed beside the source, activations between layers included
    seconds    by kind of work, one after another; None if nothing was measured
    """

    recipe_name: str
    device: str
    text: Text
    output: Mapping[str, int]
    disk: int
    memory: MemoryPlan
    speeds: Speeds | None
    seconds: Mapping[str, float] | None


def estimate(
    source: Survey,
    plan: Plan,
    text: Text,
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    gpu_memory_bytes: int | None = None,
    speeds: Speeds | None = None,
) -> Estimate:
    """Everything but hosting (see `hosting.host_on`). Raises CapacityError if memory is too small.

    memory_bytes  the budget that the run would get; None as the pipeline decides; likewise
                  gpu_memory_bytes
    speeds        from `measure`; None leaves the time out
    """
    return Estimate(
        recipe_name=plan.recipe_name,
        device=device,
        text=text,
        output=output_bytes(plan, source.config),
        disk=disk_bytes(plan, source.config, text),
        memory=run_memory(
            source.config.text,
            text,
            budget_bytes=memory_bytes,
            device=device,
            gpu_budget_bytes=gpu_memory_bytes,
            sums=sums_of(widths_of_products(plan, source.config)),
        ),
        speeds=speeds,
        seconds=None if speeds is None else durations(source, plan, text, speeds),
    )


def output_bytes(plan: Plan, config: ModelConfig) -> dict[str, int]:
    """Bytes of the output by part; parts that do not occur are left out."""
    sizes = plan_sizes(plan, config)
    return {part: size.num_bytes for part, size in sizes.items() if size.num_tensors}


def disk_bytes(plan: Plan, config: ModelConfig, text: Text) -> int:
    """Free bytes that the run needs beside the source: the output, and activations twice."""
    return sum(output_bytes(plan, config).values()) + 2 * _activation_bytes(config.text, text)


def _activation_bytes(config: TextConfig, text: Text) -> int:
    return text.num_tokens * config.width * 2


# --- memory


def run_memory(
    config: TextConfig,
    text: Text,
    *,
    budget_bytes: int | None = None,
    device: str = "cpu",
    gpu_budget_bytes: int | None = None,
    sums: Sums = Sums(),
) -> MemoryPlan:
    """How the run would spend memory, as the pipeline itself plans it.

    budget_bytes, gpu_budget_bytes  as `--memory` and `--gpu-memory` of `halfbyte quantize`. Raises
                                    CapacityError if one of them holds no layer.
    sums                            what the method holds of a layer's inputs
    """
    return plan_memory(
        config,
        longest_row_tokens=text.tokens_per_row if text.rows else 0,
        activation_bytes=_activation_bytes(config, text),
        budget_bytes=budget_bytes,
        on_gpu=device != "cpu",
        gpu_budget_bytes=gpu_budget_bytes,
        sums=sums,
    )


def _weights(linear: Linear) -> int:
    return linear.out_features * linear.in_features


# --- time


def measure(source: Survey, *, device: str = "cpu", read_bytes: float | None = None) -> Speeds:
    """Work on a slice of one layer for a few seconds and say how fast each kind of work is.

    Real weights are read where there are some, and random ones made otherwise; the speed of
    reading is `read_bytes` where that is given, or 2 GB/s where nothing could be read. Results are
    of this moment: other work on the machine counts. Raises CapacityError for a device that is
    not here.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise CapacityError(f"device {device}: no GPU here; plan with --device cpu")
    place = torch.device(device)
    linear = max(decoder_linears(source.config)[-7:], key=_weights)
    speed = _reading_speed(source, linear)
    w_OI = _probe(source, linear).to(place)
    amax = largest_magnitude(w_OI)
    tensor_scale, scale = nvfp4_tensor_scale(amax, "ieee"), fp8_scale(amax, "ieee")
    codes = encode_fp8(w_OI, scale, "ieee")
    decoded = decode_fp8(codes, scale)
    weight = dispatch.prepare_bf16(w_OI)
    wide_OI = w_OI[:_PROBE_TOKENS].to(torch.float32)
    few_OI = wide_OI[:, : 4 * BLOCK].contiguous()
    metric = make_metric(few_OI.T @ few_OI, GptqOptions(sweeps=0))
    x_TI = torch.randn(_PROBE_TOKENS, w_OI.shape[1], device=place).to(torch.bfloat16)
    count = w_OI.numel()
    stored = bytes_of(w_OI.cpu())

    def seconds(work: Callable[[], object]) -> float:
        return _median_seconds(work, place)

    return Speeds(
        device=device,
        read_bytes=read_bytes or speed or _ASSUMED_READ_BYTES,
        is_read_measured=read_bytes is None and speed is not None,
        hash_bytes=stored.nbytes / seconds(lambda: hashlib.sha256(stored).digest()),
        nvfp4=count / seconds(lambda: encode_nvfp4(w_OI, tensor_scale)),
        fp8=count / seconds(lambda: encode_fp8(w_OI, scale, "ieee")),
        decode=count / seconds(lambda: decode_fp8(codes, scale)),
        compare=count / seconds(lambda: (relative_error(w_OI, decoded), zero_rate(w_OI, decoded))),
        wide_flops=2
        * wide_OI.shape[0] ** 2
        * wide_OI.shape[1]
        / seconds(lambda: wide_OI @ wide_OI.T),
        gptq=few_OI.numel() / seconds(lambda: encode_gptq(few_OI, metric, tensor_scale)),
        flops=2 * _PROBE_TOKENS * count / seconds(lambda: dispatch.linear_bf16(x_TI, weight)),
    )


def _median_seconds(work: Callable[[], object], place: torch.device) -> float:
    """Median seconds of three runs after one to warm up."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[1]


def _reading_speed(source: Survey, linear: Linear) -> float | None:
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


def _probe(source: Survey, linear: Linear) -> Tensor:
    """Some rows of a weight of the model, bf16: real ones where the source has them."""
    rows = max(1, min(linear.out_features, _PROBE_WEIGHTS // linear.in_features))
    checkpoint = source.checkpoint
    if checkpoint is not None and checkpoint.format_of(linear.name) == "fp8":
        scale = torch.tensor(checkpoint.scale(f"{linear.name}.weight_scale"))
        return decode_fp8(checkpoint.rows(f"{linear.name}.weight", 0, rows), scale)
    if checkpoint is not None and checkpoint.format_of(linear.name) == "bf16":
        return checkpoint.rows(f"{linear.name}.weight", 0, rows)
    return torch.randn(rows, linear.in_features).to(torch.bfloat16)


def durations(source: Survey, plan: Plan, text: Text, speeds: Speeds) -> dict[str, float]:
    """Seconds of the whole run by kind of work, from the speeds of one slice.

    Writing is taken to be as fast as reading, since planning writes nothing. Work that the
    pipeline overlaps is counted as if it did not.
    """
    config = source.config
    linears = decoder_linears(config)
    count = sum(map(_weights, linears))
    fp8_source = [x for x in linears if source.quantization.formats[x.name] == "fp8"]
    # Codes of an FP8 source that stay FP8 are kept; they are decoded for the report only.
    to_fp8 = sum(_weights(x) for x in linears if _is_encoded_to(x, "fp8", source, plan))
    to_nvfp4 = sum(_weights(x) for x in linears if plan.formats[x.name] == "nvfp4")
    decodings = sum(map(_weights, fp8_source)) * (3 if text.rows else 2)
    output = sum(output_bytes(plan, config).values())
    # Calibration reads the decoder once more.
    in_decoder = sum(_stored_bytes(source, x) for x in linears)
    boundary = _activation_bytes(config.text, text) * config.text.num_layers
    parts = {
        "reading": (source.num_bytes + (in_decoder if text.rows else 0)) / speeds.read_bytes,
        "writing": (output + boundary) / speeds.read_bytes + output / speeds.hash_bytes,
        "decoding": (decodings + count) / speeds.decode,
        "encoding": to_fp8 / speeds.fp8 + to_nvfp4 / speeds.nvfp4,
        "comparing with the source": count / speeds.compare,
    }
    if text.rows:
        heads = config.text.num_heads * config.text.head_dim
        scores = 2 * heads * text.tokens_per_row * text.num_tokens * config.text.num_layers
        parts |= _weighing(source, plan, text, speeds)
        parts["running the text"] = (2 * count * text.num_tokens + scores) / speeds.flops
    return parts


def _weighing(source: Survey, plan: Plan, text: Text, speeds: Speeds) -> dict[str, float]:
    """Seconds of methods that weigh errors by inputs; nothing for those that do not."""
    linears = {linear.name: linear for linear in decoder_linears(source.config)}
    scales, products, solving, rounded, searched = plan.scales, 0.0, 0.0, 0, 0
    for layer in range(source.config.text.num_layers):
        for tap, want in wanted_sums(plan, layer).items():
            readers = [linears[f"decoder.{layer}.{reader}"] for reader in READERS[tap]]
            width, rows = readers[0].in_features, sum(x.out_features for x in readers)
            if want == "products":
                products += 2.0 * text.num_tokens * width**2
                # Factoring, and each sweep's products as well as those of the first pass.
                solving += width**3 * (1 / 3 + 2 * bool(scales.gptq.sweeps))
                solving += rows * width**2 * (3.0 + 4 * scales.gptq.sweeps)
                rounded += rows * width * (1 + scales.gptq.sweeps)
    if scales.weights in ("mse", "weighted"):
        searched = sum(_weights(linears[n]) for n, f in plan.formats.items() if f == "nvfp4")
    parts = {
        "summing up inputs": products / speeds.wide_flops,
        "GPTQ": solving / speeds.wide_flops + rounded / speeds.gptq,
        "searching scales": len(SEARCHED_STEPS) * searched / speeds.nvfp4,
    }
    return {part: seconds for part, seconds in parts.items() if seconds}


def _is_encoded_to(linear: Linear, chosen: WeightFormat, source: Survey, plan: Plan) -> bool:
    is_kept = source.quantization.formats[linear.name] == chosen
    return plan.formats[linear.name] == chosen and not is_kept


def _stored_bytes(source: Survey, linear: Linear) -> int:
    return linear_size(linear, source.quantization.formats[linear.name]).num_bytes


# --- for people


def format_estimate(source: Survey, made: Estimate) -> str:
    """The estimate as a short text."""
    text = made.text
    rows = [
        ("source", f"{source.directory}: {gb(source.num_bytes)}, {source.num_tensors:,} tensors"),
        ("", f"known from {source.basis}{_disagreement(source)}"),
        ("output", f"{gb(sum(made.output.values()))}, recipe {made.recipe_name}"),
        *(("", f"{part:<16} {gb(num_bytes)}") for part, num_bytes in made.output.items()),
        ("text", _said_text(text)),
        ("disk", f"{gb(made.disk)} free beside the source"),
        ("host memory", f"{gb(made.memory.peak_bytes)} at most; {_said_memory(made.memory)}"),
    ]
    if made.memory.gpu_peak_bytes is not None:
        rows.append(("GPU memory", f"{gb(made.memory.gpu_peak_bytes)} on {made.device}"))
    if made.seconds is not None and made.speeds is not None:
        rows += _said_time(made.seconds, made.speeds)
    return "\n".join(f"{name:<13}{value}".rstrip() for name, value in rows)


def gb(num_bytes: float) -> str:
    """Bytes as decimal GB; small amounts with more digits."""
    return f"{num_bytes / 1e9:,.{1 if num_bytes >= 1e10 else 3}f} GB"


def _disagreement(source: Survey) -> str:
    if source.stated_bytes is None or source.stated_bytes == source.num_bytes:
        return ""
    return f"; it states {source.stated_bytes:,} bytes, the config's shapes {source.num_bytes:,}"


def _said_text(text: Text) -> str:
    if not text.rows:
        return "none: data-free"
    return f"{text.rows} rows of up to {text.tokens_per_row}, {text.num_tokens:,} tokens at most"


def _said_memory(memory: MemoryPlan) -> str:
    activations = "in memory" if memory.activations_in_memory else "on disk"
    return f"activations {activations}, next layer {'' if memory.prefetch else 'not '}prefetched"


def _said_time(seconds: Mapping[str, float], speeds: Speeds) -> list[tuple[str, str]]:
    how = "measured" if speeds.is_read_measured else "assumed"
    rows = [("time", f"{duration(sum(seconds.values()))} on this machine's {speeds.device}, now")]
    rows += [("", f"{part:<26} {duration(value)}") for part, value in seconds.items()]
    rows.append(("", f"disk {gb(speeds.read_bytes)}/s ({how}), writing as fast as reading"))
    return rows


def duration(seconds: float) -> str:
    """`3 h 20 min`, `4.2 min`, `12 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.1f} s"
