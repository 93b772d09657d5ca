"""The report of a quantization as one HTML file: no script, nothing fetched.

Shows what `record` holds and computes nothing that is not in it but sums and means. Written by
`halfbyte quantize --report`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from halfbyte.modules import ATTENTION_LINEARS, MLP_LINEARS
from halfbyte.quantize.charts import Cell, heatmap, lines, stacked

Record = Mapping[str, Any]

_PROJECTIONS = (*ATTENTION_LINEARS, *MLP_LINEARS)
_STYLE = """
:root { --ink: #1c2430; --soft: #5d6a7a; --rule: #dde3ea; --page: #fff; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf2; --soft: #9aa7b8; --rule: #323c4a; --page: #12171f; --alarm: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 900px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 38px 0 6px; }
p { margin: 6px 0; } .soft { color: var(--soft); } .alarm { color: var(--alarm); }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--rule);
         vertical-align: top; }
th { font-weight: 600; } td.n, th.n { text-align: right; }
code { font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 18px 0 4px; }
.facts div { min-width: 110px; } .facts b { display: block; font-size: 21px; }
.scroll { overflow-x: auto; }
svg { width: 100%; height: auto; display: block; margin: 8px 0; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg text.tick { fill: var(--soft); font-size: 11px; }
.cell { stroke: var(--page); stroke-width: .6; } .grid { stroke: var(--rule); }
.series { fill: none; stroke-width: 1.8; } circle.series { stroke-width: 0; }
.s0 { stroke: #3b78c2; fill: #3b78c2; } .s1 { stroke: #d1711f; fill: #d1711f; }
.s2 { stroke: #2d9a6b; fill: #2d9a6b; } .s3 { stroke: #a45cc0; fill: #a45cc0; }
.s4 { stroke: #c24056; fill: #c24056; } .s5 { stroke: #8a7d2b; fill: #8a7d2b; }
polyline.series { fill: none; } .bar { stroke: none; }
details summary { cursor: pointer; color: var(--soft); }
"""


def write_report(record: Record, path: Path) -> tuple[Path, Path]:
    """Write the page to `path` as .html, and the record it shows beside it as .json."""
    page, data = path.with_suffix(".html"), path.with_suffix(".json")
    page.write_text(render(record), encoding="utf-8")
    data.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return page, data


def render(record: Record) -> str:
    """The page."""
    output, source = record["output"], record["source"]
    title = f"{output['name']}: {record['recipe']['name']}"
    sections = (
        ("Sizes", _sizes(record)),
        ("Error of the weights", _errors(record)),
        ("Error of the outputs, by method", _methods(record)),
        ("Clipped and zeroed weights", _clipped(record)),
        ("Ranges of the activations", _ranges(record)),
        ("Time", _time(record)),
        ("Memory", _memory(record)),
        ("Calibration", _calibration(record)),
        ("Made of", _made_of(record)),
    )
    body = "\n".join(f"<section><h2>{name}</h2>\n{text}</section>" for name, text in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="soft">from {escape(source["name"])} ({escape(source["dialect"])}), arithmetic profile
{escape(record["profile"])}, on {escape(record["device"])}, halfbyte
{escape(record["versions"]["halfbyte"])}, torch {escape(record["versions"]["torch"])}</p>
{_facts(record)}
{body}
</body></html>
"""


def _facts(record: Record) -> str:
    output, source = record["output"]["bytes"], record["source"]["bytes"]
    seconds = sum(sum(layer["seconds"].values()) for layer in record["layers"])
    calibration = record["calibration"]
    tokens = "none" if calibration is None else f"{calibration['tokens']:,}"
    facts = [
        ("output", _size(output)),
        ("of the source", f"{output / source:.1%}"),
        ("layers", str(len(record["layers"]))),
        ("calibration tokens", tokens),
        ("time in layers", _duration(seconds)),
        ("peak memory", _size(max(_peaks(record, "host"), default=0))),
    ]
    shown = "".join(f"<div><b>{escape(v)}</b><span class='soft'>{k}</span></div>" for k, v in facts)
    return f'<div class="facts">{shown}</div>'


def _sizes(record: Record) -> str:
    total = record["output"]["bytes"]
    rows = [[part, _size(size), f"{size / total:.1%}"] for part, size in
            record["output"]["parts"].items()]  # fmt: skip
    rows.append(["in all, headers included", _size(total), ""])
    return _table(["part", "bytes", "share"], rows)


def _errors(record: Record) -> str:
    linears = record["linears"]
    if not linears:
        return "<p class='soft'>Errors were not measured in this run.</p>"
    measured = min(linear["measured"] for linear in linears)
    by_format = _means(linears, "sqnr_db")
    table = _table(
        ["format", "linears", "least dB", "mean dB", "most dB"],
        [[name, str(len(v)), *_spread(v)] for name, v in by_format.items()],
    )
    chart = heatmap(
        _grid(linears, lambda x: x["sqnr_db"], _error_note),
        title="SQNR of each weight",
        unit="dB",
    )
    return (
        "<p>Signal to quantization noise of every weight against its source, decoded: 6 dB are a "
        "factor of two in error. Grey cells lost nothing (codes of an FP8 source, kept).</p>"
        f"<div class='scroll'>{chart}</div>{table}"
        f"<p class='soft'>Measured on evenly spaced rows, at least {measured:.1%} of each weight. "
        "A format's own error is about 31 dB for FP8 and 20 dB for NVFP4 on bell-shaped "
        "weights.</p>"
    )


def _error_note(linear: Record) -> str:
    value = linear["sqnr_db"]
    said = "nothing lost" if value is None else f"{value:.2f} dB"
    return f"{linear['name']}: {linear['format']}, {said}"


def _methods(record: Record) -> str:
    linears = [linear for linear in record["linears"] if linear.get("output_db")]
    if not linears:
        return "<p class='soft'>No data was run, so there are no outputs to compare.</p>"
    methods = list(linears[0]["output_db"])
    series = {m: _layer_means(linears, m, len(record["layers"])) for m in methods}
    chart = lines(series, title="SQNR of outputs by method", unit="dB", logarithmic=False)
    rows = []
    for chosen in sorted({linear["format"] for linear in linears}):
        some = [linear for linear in linears if linear["format"] == chosen]
        cells = [_mean(linear["output_db"][m] for linear in some) for m in methods]
        rows.append([chosen, *("–" if c is None else f"{c:.2f}" for c in cells)])
    scales = record["recipe"]["scales"]
    return (
        "<p>Each linear's output on sampled calibration inputs, weights and inputs rounded as the "
        "method would, against the product in f32; the mean over a layer's linears.</p>"
        f"<div class='scroll'>{chart}</div>{_table(['format', *methods], rows)}"
        f"<p class='soft'>This checkpoint: weights {escape(scales['weights'])}, activations "
        f"{escape(scales['activations'])}. Inputs are those that were calibrated on, so that "
        "headroom can only lose here; its use shows on other text.</p>"
    )


def _clipped(record: Record) -> str:
    linears = record["linears"]
    if not linears:
        return "<p class='soft'>Not measured in this run.</p>"
    charts = [
        heatmap(
            _grid(
                linears,
                lambda x, key=key: 100 * x[key] if x[key] else None,
                lambda x, key=key: f"{x['name']}: {100 * x[key]:.3f} % {key}",
            ),
            title=f"share of weights {key}",
            unit=f"% {key}",
        )
        for key in ("clipped", "zeroed")
    ]
    return (
        "<p>Weights beyond the largest value of their block or tensor under its scale, and weights "
        "that became zero.</p>" + "".join(f"<div class='scroll'>{chart}</div>" for chart in charts)
    )


def _ranges(record: Record) -> str:
    layers = record["layers"]
    taps = list(layers[0]["observed"]) if layers else []
    if not taps:
        return "<p class='soft'>No data was run: input scales are pinned.</p>"
    series = {tap: [layer["observed"][tap] for layer in layers] for tap in taps}
    chart = lines(series, title="largest magnitude by layer", unit="", logarithmic=True)
    return (
        "<p>Largest magnitude that calibration saw at each point of a layer (logarithmic).</p>"
        f"<div class='scroll'>{chart}</div>"
    )


def _time(record: Record) -> str:
    layers = record["layers"]
    kinds = list(dict.fromkeys(kind for layer in layers for kind in layer["seconds"]))
    series = {kind: [float(x["seconds"].get(kind, 0.0)) for x in layers] for kind in kinds}
    chart = stacked(series, title="seconds by layer", unit="s")
    rows = [[kind, _duration(sum(v)), f"{sum(v) / len(v):.2f} s"] for kind, v in series.items()]
    return f"<div class='scroll'>{chart}</div>{_table(['work', 'in all', 'a layer'], rows)}"


def _memory(record: Record) -> str:
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
    return (
        "<p>The most that the process had held when a layer was done.</p>"
        f"<div class='scroll'>{chart}</div>{_table(['where', 'planned', 'taken'], rows)}"
    )


def _calibration(record: Record) -> str:
    calibration = record["calibration"]
    if calibration is None:
        return "<p>None: data-free, input scales are the source's own or pinned.</p>"
    facts = [
        ["rows", f"{calibration['rows']:,}"],
        ["tokens", f"{calibration['tokens']:,}, none of them padding"],
        ["longest row", f"{calibration['longest']:,}"],
        ["SHA-256 of the ids", f"<code>{escape(calibration['sha256'])}</code>"],
    ]
    made = calibration.get("provenance")
    if not made:
        facts.append(["from", "recorded token ids; nothing says how they were made"])
        return _facts_table(facts)
    for key in ("blend", "mode", "select", "seed", "tokenizer_sha256", "template_sha256"):
        facts.append([key.replace("_", " "), f"<code>{escape(str(made.get(key)))}</code>"])
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
    table = _table(["member", "data set", "revision", "rows", "tokens"], rows)
    return _facts_table(facts) + table + _rows_taken(made.get("members", ()))


def _rows_taken(members: Iterable[Record]) -> str:
    """Row numbers of every split, folded away."""
    parts = [
        f"<p><b>{escape(member['name'])}, {escape(split['name'])}</b>, of "
        f"{split['read']['rows']:,} rows read (<code>{escape(split['read']['sha256'][:16])}</code>)"
        f": <code>{escape(', '.join(map(str, split['rows'])))}</code></p>"
        for member in members
        for split in member["splits"]
    ]
    return f"<details><summary>Which rows were taken</summary>{''.join(parts)}</details>"


def _made_of(record: Record) -> str:
    rows = [
        [name, f"{facts['bytes']:,}", f"<code>{escape(facts['sha256'])}</code>"]
        for name, facts in record["source"]["files"].items()
    ]
    table = _table(["file of the source", "bytes", "fingerprint"], rows, raw=(2,))
    return f"<div class='scroll'>{table}</div>"


# --- pieces


def _grid(linears: Sequence[Record], value: Any, note: Any) -> dict[str, list[Cell]]:
    """Projection -> a cell for every layer."""
    rows: dict[str, list[Cell]] = {}
    for projection in _PROJECTIONS:
        some = [x for x in linears if x["name"].rpartition(".")[2] == projection]
        rows[projection] = [Cell(value(x), note(x)) for x in some]
    return {name: cells for name, cells in rows.items() if cells}


def _means(linears: Sequence[Record], key: str) -> dict[str, list[float | None]]:
    by_format: dict[str, list[float | None]] = {}
    for linear in linears:
        by_format.setdefault(linear["format"], []).append(linear[key])
    return dict(sorted(by_format.items()))


def _spread(values: Sequence[float | None]) -> list[str]:
    finite = [v for v in values if v is not None]
    if not finite:
        return ["nothing lost", "", ""]
    return [f"{v:.2f}" for v in (min(finite), sum(finite) / len(finite), max(finite))]


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [v for v in values if v is not None]
    return sum(finite) / len(finite) if finite else None


def _layer_means(linears: Sequence[Record], method: str, num_layers: int) -> list[float | None]:
    layers: list[list[float | None]] = [[] for _ in range(num_layers)]
    for linear in linears:
        layers[int(linear["name"].split(".")[1])].append(linear["output_db"][method])
    return [_mean(values) for values in layers]


def _peaks(record: Record, place: str) -> list[int]:
    peaks = [layer["peak_memory_bytes"].get(place) for layer in record["layers"]]
    return [peak for peak in peaks if peak is not None]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: Sequence[int] = ()) -> str:
    """A table; columns in `raw` hold HTML, all others text. Numbers stand to the right."""
    top = "".join(f"<th{'' if n == 0 else _right(name)}>{escape(name)}</th>"
                  for n, name in enumerate(head))  # fmt: skip
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{'' if n == 0 else _right(cell)}>{cell if n in raw else escape(cell)}</td>"
            for n, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _right(cell: str) -> str:
    return ' class="n"' if cell[:1].isdigit() else ""


def _facts_table(rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{text}</td></tr>" for name, text in rows)
    return f"<table>{body}</table>"


def _size(num_bytes: float) -> str:
    unit = next((u for u in (10**9, 10**6) if num_bytes >= u), 10**3)
    return f"{num_bytes / unit:.3g} {({10**9: 'GB', 10**6: 'MB'}).get(unit, 'kB')}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.1f} s"
