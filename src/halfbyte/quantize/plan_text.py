"""An estimate as text for people, as `halfbyte plan` prints it.

No number has more digits than it is good for.
"""

from collections.abc import Mapping, Sequence
from math import floor, log10

from halfbyte.config import ModelConfig
from halfbyte.printable import columns
from halfbyte.quantize.capacity import CalibrationText, CapacityEstimate, Speeds, Time
from halfbyte.quantize.hosting import HERE, Hosting, Quantizing
from halfbyte.quantize.memory import MemoryPlan
from halfbyte.quantize.sensitivity import TOKENS, sensitivity_bytes
from halfbyte.quantize.survey import Survey

# From this share of the processors on, others' work makes a time one of a busy machine.
BUSY = 0.1


def format_estimate(
    source: Survey, made: CapacityEstimate, price_per_hour: float | None = None
) -> str:
    """The estimate as a short text; with a machine's price, what the time costs on it."""
    rows = [
        ("source", f"{source.directory}: {gb(source.num_bytes)}, {source.num_tensors:,} tensors"),
        ("", f"known from {source.basis}{_disagreement(source)}"),
        ("output", f"{gb(sum(made.output.values()))}, recipe {made.recipe_name}"),
        *(("", f"{part:<16} {gb(num_bytes)}") for part, num_bytes in made.output.items()),
        ("text", _said_text(made.text)),
        *([("pictures", _said_pictures(made.text))] if made.text.pictures.pixels else []),
        ("disk", _said_disk(made)),
        ("host memory", f"{gb(made.memory.peak_bytes)} at most; {_said_memory(made.memory)}"),
    ]
    if made.memory.gpu_peak_bytes is not None:
        rows.append(("GPU memory", f"{gb(made.memory.gpu_peak_bytes)} on {made.device}"))
    if made.time is not None and made.speeds is not None:
        rows += _said_time(made.time, made.speeds, made.busy)
        if price_per_hour is not None:
            rows.append(("cost", money(made.time.likely / 3600 * price_per_hour)))
    return "\n".join(f"{name:<13}{value}".rstrip() for name, value in rows)


# Against running the same tokens forward: back through a layer costs three times that, and the
# outputs under two formats twice.
_MEASURED_RUNS = 6
_MEASURED_FORMATS = 2


def format_measuring(config: ModelConfig, made: CapacityEstimate) -> str:
    """What measuring the costs of formats takes before the run that a budget asks for."""
    tokens = min(TOKENS, made.text.num_tokens)
    memory, disk = sensitivity_bytes(config, tokens)
    took = ""
    if made.time is not None:
        parts = made.time.parts
        share = tokens / max(made.text.num_tokens, 1)
        seconds = _MEASURED_RUNS * share * parts.get("running the text", 0.0)
        seconds += _MEASURED_FORMATS * parts.get("encoding", 0.0)
        took = f"about {duration(seconds)}, "
    return (
        f"{'measuring':<13}{took}{gb(memory)} of memory besides the program, {gb(disk)} of disk "
        f"until it is done: costs of formats on {tokens:,} tokens, forward and back, kept for the "
        "next budget"
    )


def gb(num_bytes: float) -> str:
    """Bytes as decimal GB; small amounts with more digits."""
    return f"{num_bytes / 1e9:,.{1 if num_bytes >= 1e10 else 3}f} GB"


def money(amount: float) -> str:
    """An amount in the unit of the price, to the hundredth or with two digits."""
    return f"{amount:,.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"


def _disagreement(source: Survey) -> str:
    if source.stated_bytes is None or source.stated_bytes == source.num_bytes:
        return ""
    return f"; it states {source.stated_bytes:,} bytes, the config's shapes {source.num_bytes:,}"


def _said_text(text: CalibrationText) -> str:
    if not text.rows:
        return "none: data-free"
    if text.not_drawn is None and text.tokens is not None:
        return f"{text.rows} rows, the longest of {text.tokens_per_row}, {text.tokens:,} tokens"
    why = "" if text.not_drawn is None else f" ({text.not_drawn})"
    most = f"{text.rows} rows of up to {text.tokens_per_row}, {text.num_tokens:,} tokens at most"
    return most + why


def _said_pictures(text: CalibrationText) -> str:
    seen = text.pictures
    return (
        f"{gb(seen.pixels)} of pixels held throughout, {gb(seen.patches)} between the tower's "
        f"layers, {gb(seen.tower)} for one of these at work"
    )


def _said_disk(made: CapacityEstimate) -> str:
    said = f"{gb(made.disk)} needed beside the source, {gb(made.disk_free)} free there"
    return said if made.disk <= made.disk_free else f"{said}: NOT ENOUGH"


def _said_memory(memory: MemoryPlan) -> str:
    activations = "in memory" if memory.activations_in_memory else "on disk"
    return f"activations {activations}, next layer {'' if memory.prefetch else 'not '}prefetched"


def _said_time(time: Time, speeds: Speeds, busy: float | None) -> list[tuple[str, str]]:
    how = "measured" if speeds.is_read_measured else "assumed"
    total = f"about {duration(time.likely)} ({duration(time.least)} to {duration(time.most)})"
    rows = [("time", f"{total} on this machine's {speeds.device}, as busy as it is now")]
    rows += [("", f"{part:<22}{value}") for part, value in shared_out(time).items()]
    rows.append(("", f"disk of {speeds.read_bytes / 1e9:.2g} GB/s ({how}), writing likewise"))
    if busy is not None and busy >= BUSY:
        share = f"{100 * busy:.0f} % of its processors"
        rows.append(("", f"BUSY: other programs took {share} meanwhile; alone it is faster"))
    return rows


def _step(seconds: float) -> float:
    """What a time is rounded to: two digits of it, in the unit that it is told in."""
    if seconds <= 0:
        return 0.1
    unit = 3600.0 if seconds >= 3600 else 60.0 if seconds >= 100 else 1.0
    step = float(unit * 10 ** (floor(log10(seconds / unit)) - 1))
    # An hour's tenth is told in minutes: 3 h 20 min.
    return 600.0 if unit == 3600 and seconds < 36_000 else step


def duration(seconds: float) -> str:
    """`3 h 20 min`, `4.2 min`, `12 s`: two digits."""
    step = _step(seconds)
    return _told(round(seconds / step) * step, step, seconds)


def _told(value: float, step: float, like: float) -> str:
    if like >= 3600:
        hours, minutes = divmod(round(value / 60), 60)
        return f"{hours} h {minutes:02d} min" if step < 3600 else f"{hours} h"
    unit, name = (60, "min") if like >= 100 else (1, "s")
    return f"{value / unit:.{0 if step >= unit else 1}f} {name}"


def shared_out(time: Time) -> dict[str, str]:
    """The parts of a time, rounded as it is, so that what is printed adds up to it."""
    step = _step(time.likely)
    wanted = round(time.likely / step)
    exact = {part: seconds / step for part, seconds in time.parts.items()}
    counts = {part: int(value) for part, value in exact.items()}
    by_rest = sorted(exact, key=lambda part: counts[part] - exact[part])
    for part in by_rest[: max(wanted - sum(counts.values()), 0)]:
        counts[part] += 1
    return {part: _told(count * step, step, time.likely) for part, count in counts.items()}


def format_hosting(hosted: Sequence[Hosting], price_per_hour: float | None = None) -> str:
    """A table of GPUs and what they serve, and what its columns rest on."""
    first = hosted[0]
    priced = price_per_hour is not None
    header = ("GPUs", "weights", "KV/token", "KV tokens", "at once", "tokens/s")
    rows: list[tuple[str, ...]] = [(*header, *(["an hour"] if priced else []), "")]
    for x in hosted:
        cells: tuple[str, ...] = (
            x.gpu if x.gpu == HERE else f"{x.tp} x {x.gpu}",
            f"{x.weight_bytes / 1e9:.1f} GB",
            f"{x.kv_token_bytes:,} B",
            f"{x.kv_tokens:,}",
            f"{min(x.full_requests, x.requests)} of {x.requests}",
            _said_speed(x),
        )
        if price_per_hour is not None:
            cells += ("" if x.gpu == HERE else money(price_per_hour * x.tp),)
        rows.append((*cells, _verdict(x)))
    title = f"serving {first.requests} requests of {first.context:,} tokens; figures are per GPU"
    notes = []
    if any(x.speed_basis == "computed" and x.problem is None for x in hosted):
        notes.append(
            "~ computed: bytes of a step at the GPU's memory speed, and what layers take besides"
        )
    if any(x.speed_basis == "measured" for x in hosted):
        notes.append("! measured: this model's decode step, benchmarks/records/engine-h200.json")
    if notes:
        notes.insert(0, "tokens/s are those of one user with little context:")
    return "\n".join([title, *columns(rows, ends_left=True), *notes])


def format_quantizing(found: Sequence[Quantizing], price_per_hour: float | None = None) -> str:
    """How long the GPUs that were asked about would take to quantize."""
    title = "quantizing on one of these with scales by maxima, computed from the record of an H100"
    rows = [
        (
            x.gpu,
            f"about {duration(x.seconds)}",
            "" if price_per_hour is None else money(x.seconds / 3600 * price_per_hour),
            "",
        )
        for x in found
    ]
    return "\n".join([title, *columns(rows, ends_left=True)])


_MARKS: Mapping[str, str] = {"measured": "!", "computed": "~"}


def _said_speed(x: Hosting) -> str:
    if x.tokens_per_s is None or x.speed_basis is None or x.problem is not None:
        return "-"
    digits = floor(log10(x.tokens_per_s)) - 1
    return f"{_MARKS[x.speed_basis]}{round(x.tokens_per_s, -digits):,.0f}"


def _verdict(x: Hosting) -> str:
    if x.problem is not None:
        return f"no: {x.problem}"
    native = "" if x.has_native_nvfp4 else "; NVFP4 weights decoded, no FP4 arithmetic"
    fewer = "" if x.why_not_fewer is None else f"; {x.tp // 2} would not do: {x.why_not_fewer}"
    if x.full_requests >= x.requests:
        return f"yes{native}{fewer}"
    return f"{x.requests} at once have {x.tokens_per_request:,} tokens each{native}"
