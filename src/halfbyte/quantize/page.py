"""The report of a quantization as one HTML file: no script, nothing fetched.

Shows what `record` holds and computes nothing that is not in it but sums and means. Written by
`halfbyte quantize --report`. A section is words, charts and tables in their order, as plain text;
`quantize.html` lays them out and escapes all of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from halfbyte.calibrate.kinds import KINDS
from halfbyte.calibrate.stream import READERS
from halfbyte.files import write_json
from halfbyte.modules import ATTENTION_LINEARS, MLP_LINEARS
from halfbyte.page import Cell, Table, render_page
from halfbyte.quantize import charts
from halfbyte.quantize.charts import heatmap, lines, stacked
from halfbyte.quantize.clipping import LinearClipping, Whose
from halfbyte.quantize.record import QuantizationRecord
from halfbyte.quantize.report import LinearRecord

_PROJECTIONS = (*ATTENTION_LINEARS, *MLP_LINEARS)


class _Words(NamedTuple):
    """A paragraph."""

    text: str
    is_soft: bool = False


class _Facts(NamedTuple):
    """Names and what is said of them."""

    rows: Sequence[tuple[str, str | Cell]]


class _Rows(NamedTuple):
    """Which rows of a split were taken: folded away."""

    splits: Sequence[Mapping[str, str]]


_Part = _Words | _Facts | _Rows | Table | Markup


def write_report(record: QuantizationRecord, path: Path) -> tuple[Path, Path]:
    """Write the page to `path` as .html, and the record it shows beside it as .json."""
    page, data = path.with_suffix(".html"), path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(record), encoding="utf-8")
    write_json(data, record)
    return page, data


def render(record: QuantizationRecord) -> str:
    """The report of one quantization as the text of an HTML page."""
    output, source = record["output"], record["source"]
    sections = (
        ("Sizes", _sizes(record)),
        ("Error of the weights", _errors(record)),
        ("Error of the outputs, by method", _methods(record)),
        ("Clipped and zeroed weights", _clipped(record)),
        ("Ranges of the activations", _ranges(record)),
        *([("Text and image rows", _by_kind(record))] if record.get("clipping") else []),
        ("Time", _time(record)),
        ("Memory", _memory(record)),
        ("Calibration", _calibration(record)),
        ("Made of", _made_of(record)),
    )
    return render_page(
        "halfbyte.quantize",
        "quantize.html",
        "page.css",
        title=f"{output['name']}: {record['recipe']['name']}",
        source=source,
        profile=record["profile"],
        device=record["device"],
        versions=record["versions"],
        facts=_facts(record),
        sections=sections,
    )


def _facts(record: QuantizationRecord) -> list[tuple[str, str]]:
    output, source = record["output"]["bytes"], record["source"]["bytes"]
    seconds = sum(sum(layer["seconds"].values()) for layer in record["layers"])
    calibration = record["calibration"]
    tokens = "none" if calibration is None else f"{calibration['tokens']:,}"
    return [
        ("output", _size(output)),
        ("of the source", f"{output / source:.1%}"),
        ("layers", str(len(record["layers"]))),
        ("calibration tokens", tokens),
        ("time in layers", _duration(seconds)),
        ("peak memory", _size(max(_peaks(record, "host"), default=0))),
    ]


def _sizes(record: QuantizationRecord) -> list[_Part]:
    total = record["output"]["bytes"]
    rows = [[part, _size(size), f"{size / total:.1%}"] for part, size in
            record["output"]["parts"].items()]  # fmt: skip
    rows.append(["in all, headers included", _size(total), ""])
    return [Table(["part", "bytes", "share"], rows)]


def _errors(record: QuantizationRecord) -> list[_Part]:
    linears = record["linears"]
    if not linears:
        return [_Words("Errors were not measured in this run.", is_soft=True)]
    measured = min(linear["measured"] for linear in linears)
    by_format: dict[str, list[float | None]] = {}
    for linear in sorted(linears, key=lambda linear: linear["format"]):
        by_format.setdefault(linear["format"], []).append(linear["sqnr_db"])
    table = Table(
        ["format", "linears", "least dB", "mean dB", "most dB"],
        [[name, str(len(v)), *_spread(v)] for name, v in by_format.items()],
    )
    chart = heatmap(
        _grid(linears, lambda x: x["sqnr_db"], _error_note),
        title="SQNR of each weight",
        unit="dB",
    )
    return [
        _Words(
            "Signal to quantization noise of every weight against its source, decoded: 6 dB are a "
            "factor of two in error. Grey cells lost nothing. An FP8 weight of an FP8 source keeps "
            "its codes; where its scale is derived anew, as Model Optimizer does, all its values "
            "move by the same 0.4 % at most, which shows as 47 dB and more."
        ),
        chart,
        table,
        _Words(
            f"Measured on evenly spaced rows, at least {measured:.1%} of each weight. A format's "
            "own error is about 31 dB for FP8 and 20 dB for NVFP4 on bell-shaped weights.",
            is_soft=True,
        ),
    ]


def _error_note(linear: LinearRecord) -> str:
    value = linear["sqnr_db"]
    said = "nothing lost" if value is None else f"{value:.2f} dB"
    return f"{linear['name']}: {linear['format']}, {said}"


def _methods(record: QuantizationRecord) -> list[_Part]:
    linears = [linear for linear in record["linears"] if linear.get("output_db")]
    if not linears:
        return [_Words("No data was run, so there are no outputs to compare.", is_soft=True)]
    # One that only some linears have, as `chosen` of NVFP4 ones, is left blank in the others.
    methods = list(dict.fromkeys(m for linear in linears for m in linear["output_db"]))
    series = {m: _layer_means(linears, m, len(record["layers"])) for m in methods}
    chart = lines(series, title="SQNR of outputs by method", unit="dB", logarithmic=False)
    rows = []
    for chosen in sorted({linear["format"] for linear in linears}):
        some = [linear for linear in linears if linear["format"] == chosen]
        cells = [
            _mean(linear["output_db"][m] for linear in some if m in linear["output_db"])
            for m in methods
        ]
        rows.append([chosen, *("–" if c is None else f"{c:.2f}" for c in cells)])
    scales = record["recipe"]["scales"]
    return [
        _Words(
            "Each linear's output on sampled calibration inputs, weights and inputs rounded as the "
            "method would, against the product in f32; the mean over a layer's linears."
        ),
        chart,
        Table(["format", *methods], rows),
        _Words(
            f"This checkpoint: weights {scales['weights']}, activations {scales['activations']}. "
            "max is the default because its bytes are those of Model Optimizer, so that others can "
            "make the same file and compare; mse, weighted and gptq lose less in the same layout, "
            "and are for whoever needs no such comparison (--method). headroom doubles the input "
            "scales against inputs larger than any that was seen; none runs no data. "
            "Inputs are those that were calibrated on, so that headroom can only lose here; its "
            "use shows on other text.",
            is_soft=True,
        ),
    ]


def _clipped(record: QuantizationRecord) -> list[_Part]:
    linears = record["linears"]
    if not linears:
        return [_Words("Not measured in this run.", is_soft=True)]
    return [
        _Words(
            "Clipped: weights beyond the largest value that their block or tensor holds under its "
            "scale, which become that value. In NVFP4 about one in sixteen is to be expected: the "
            "scale of a block of 16 is itself rounded to e4m3, and where it was rounded down, the "
            "largest weight of the block loses at most 1/17 of itself. That is rounding like any "
            "other, and the error above counts it. Zeroed: weights that became zero."
        ),
        _shares(linears, "clipped"),
        _shares(linears, "zeroed"),
    ]


def _shares(linears: Sequence[LinearRecord], key: Literal["clipped", "zeroed"]) -> Markup:
    cells = _grid(
        linears,
        lambda linear: 100 * linear[key] or None,
        lambda linear: f"{linear['name']}: {100 * linear[key]:.3f} % {key}",
    )
    return heatmap(cells, title=f"share of weights {key}", unit=f"% {key}")


def _ranges(record: QuantizationRecord) -> list[_Part]:
    layers = record["layers"]
    taps = list(layers[0]["observed"]) if layers else []
    if not taps:
        return [_Words("No data was run: input scales are pinned.", is_soft=True)]
    series = {tap: [layer["observed"][tap] for layer in layers] for tap in taps}
    chart = lines(series, title="largest magnitude by layer", unit="", logarithmic=True)
    return [
        _Words("Largest magnitude that calibration saw at each point of a layer (logarithmic)."),
        chart,
    ]


_WHOSE: Mapping[Whose, str] = {
    "chosen": "this checkpoint's scales",
    "source": "the source's own scales",
    "text": "the scales that text rows alone would give",
}


def _by_kind(record: QuantizationRecord) -> list[_Part]:
    """What each static scale cuts off of text and of image rows."""
    clipping = record.get("clipping", ())
    rows = []
    for whose, words in _WHOSE.items():
        some = [one for one in clipping if whose in one["clipped"]]
        if not some:
            continue
        shares = {kind: [one["clipped"][whose][kind]["tokens"] for one in some] for kind in KINDS}
        hit = sum(share > 0 for share in shares["image"])
        most = max(some, key=lambda one: one["clipped"][whose]["image"]["tokens"])
        cells = [f"{max(shares[kind]):.2%}" for kind in KINDS]
        rows.append([words, str(len(some)), str(hit), *cells, most["name"] if hit else "–"])
    series = {
        f"{tap}, {kind}": [layer["observed_by_kind"][kind][tap] for layer in record["layers"]]
        for tap in READERS
        for kind in KINDS
        if all("observed_by_kind" in layer for layer in record["layers"])
    }
    parts: list[_Part] = [
        _Words(
            "Rows of pictures are vectors of the tower where text has embeddings. A token is "
            "clipped where one of its values lies so far beyond a linear's static input scale "
            "that it loses more than rounding does; shares are of the calibration rows."
        ),
        Table(
            ["scales", "linears", "clip image tokens", "most text tokens clipped",
             "most image tokens clipped", "where"],
            rows,
        ),
    ]  # fmt: skip
    if series:
        chart = lines(series, title="largest magnitude by kind of row", unit="", logarithmic=True)
        parts.append(chart)
    parts += [_clipped_grid(clipping, whose) for whose in _WHOSE if _is_clipped(clipping, whose)]
    return parts


def _is_clipped(clipping: Sequence[LinearClipping], whose: Whose) -> bool:
    return any(one["clipped"][whose]["image"]["tokens"] for one in clipping
               if whose in one["clipped"])  # fmt: skip


def _clipped_grid(clipping: Sequence[LinearClipping], whose: Whose) -> Markup:
    rows: dict[str, list[charts.HeatCell]] = {}
    for projection in _PROJECTIONS:
        cells = []
        for one in clipping:
            if one["name"].rpartition(".")[2] != projection:
                continue
            shares = one["clipped"].get(whose)
            share = 0.0 if shares is None else shares["image"]["tokens"]
            text = 0.0 if shares is None else shares["text"]["tokens"]
            note = f"{one['name']}: {share:.2%} of image tokens, {text:.2%} of text tokens"
            cells.append(charts.HeatCell(100 * share or None, note))
        if cells:
            rows[projection] = cells
    title = f"image tokens clipped by {_WHOSE[whose]}"
    return heatmap(rows, title=title, unit="% of image tokens")


def _time(record: QuantizationRecord) -> list[_Part]:
    layers = record["layers"]
    kinds = list(dict.fromkeys(kind for layer in layers for kind in layer["seconds"]))
    series = {kind: [float(x["seconds"].get(kind, 0.0)) for x in layers] for kind in kinds}
    chart = stacked(series, title="seconds by layer", unit="s")
    rows = [[kind, _duration(sum(v)), f"{sum(v) / len(v):.2f} s"] for kind, v in series.items()]
    return [chart, Table(["work", "in all", "a layer"], rows)]


def _memory(record: QuantizationRecord) -> list[_Part]:
    planned = record["planned_memory_bytes"]
    series = {
        place: [p / 2**30 for p in _peaks(record, place)]
        for place in ("host", "gpu")
        if _peaks(record, place)
    }
    chart = lines(series, title="peak memory so far", unit="GiB", logarithmic=False, from_zero=True)
    rows = [
        [
            place,
            f"{planned[place] / 2**30:.2f} GiB" if place in planned else "",
            f"{max(v):.2f} GiB",
        ]
        for place, v in series.items()
    ]
    return [
        _Words("The most that the process had held when a layer was done."),
        chart,
        Table(["where", "planned", "taken"], rows),
    ]


def _calibration(record: QuantizationRecord) -> list[_Part]:
    calibration = record["calibration"]
    if calibration is None:
        return [_Words("None: data-free, input scales are the source's own or pinned.")]
    facts: list[tuple[str, str | Cell]] = [
        ("rows", f"{calibration['rows']:,}"),
        ("tokens", f"{calibration['tokens']:,}, none of them padding"),
        ("longest row", f"{calibration['longest']:,}"),
        ("SHA-256 of the ids", Cell(calibration["sha256"], kind="code")),
    ]
    made = calibration.get("provenance")
    if not made:
        facts.append(("from", "recorded token ids; nothing says how they were made"))
        return [_Facts(facts)]
    for key in ("blend", "mode", "select", "seed", "tokenizer_sha256", "template_sha256"):
        facts.append((key.replace("_", " "), Cell(str(made.get(key)), kind="code")))
    rows = [
        [
            member["name"],
            member["dataset"] or member["origin"],
            (member["revision"] or "")[:12],
            f"{member['taken_rows']:,} of {member['requested_rows']:,}",
            f"{member['num_tokens']:,}",
        ]
        for member in made.get("members", ())
    ]
    table = Table(["member", "data set", "revision", "rows", "tokens"], rows)
    return [_Facts(facts), table, _rows_taken(made.get("members", ()))]


def _rows_taken(members: Iterable[Mapping[str, Any]]) -> _Rows:
    return _Rows(
        [
            {
                "name": f"{member['name']}, {split['name']}",
                "read": f"{split['read']['rows']:,}",
                "sha256": split["read"]["sha256"][:16],
                "rows": ", ".join(map(str, split["rows"])),
            }
            for member in members
            for split in member["splits"]
        ]
    )


def _made_of(record: QuantizationRecord) -> list[_Part]:
    rows: list[list[str | Cell]] = [
        [name, f"{facts['bytes']:,}", Cell(facts["sha256"], kind="code")]
        for name, facts in record["source"]["files"].items()
    ]
    return [Table(["file of the source", "bytes", "fingerprint"], rows)]


# --- pieces


def _grid(
    linears: Sequence[LinearRecord],
    value: Callable[[LinearRecord], float | None],
    note: Callable[[LinearRecord], str],
) -> dict[str, list[charts.HeatCell]]:
    """Projection -> a cell for every layer."""
    rows: dict[str, list[charts.HeatCell]] = {}
    for projection in _PROJECTIONS:
        some = [x for x in linears if x["name"].rpartition(".")[2] == projection]
        rows[projection] = [charts.HeatCell(value(x), note(x)) for x in some]
    return {name: cells for name, cells in rows.items() if cells}


def _spread(values: Sequence[float | None]) -> list[str]:
    finite = [v for v in values if v is not None]
    if not finite:
        return ["nothing lost", "", ""]
    return [f"{v:.2f}" for v in (min(finite), sum(finite) / len(finite), max(finite))]


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [v for v in values if v is not None]
    return sum(finite) / len(finite) if finite else None


def _layer_means(
    linears: Sequence[LinearRecord], method: str, num_layers: int
) -> list[float | None]:
    layers: list[list[float | None]] = [[] for _ in range(num_layers)]
    for linear in linears:
        if linear["name"] == "head":
            continue  # in the table, but of no layer
        layers[int(linear["name"].split(".")[1])].append(linear["output_db"].get(method))
    return [_mean(values) for values in layers]


def _peaks(record: QuantizationRecord, place: str) -> list[int]:
    peaks = [layer["peak_memory_bytes"].get(place) for layer in record["layers"]]
    return [peak for peak in peaks if peak is not None]


def _size(num_bytes: float) -> str:
    unit = next((u for u in (10**9, 10**6) if num_bytes >= u), 10**3)
    return f"{num_bytes / unit:.3g} {({10**9: 'GB', 10**6: 'MB'}).get(unit, 'kB')}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.1f} s"
