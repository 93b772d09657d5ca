"""SVG charts of the quantization report: heatmaps and lines over layers, stacked bars.

Colours come from the page's style sheet where they mean a series, and are computed where they mean
a value. No script: every mark has a title, which browsers show on hover.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from halfbyte.page import Mark, drawing, text_mark

_LEFT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 92, 10, 34, 760, 190


class HeatCell(NamedTuple):
    """One cell of a heatmap: `value` is None where there is nothing to show, `note` its title."""

    value: float | None
    note: str


# Dark to light, readable in grey and for the colour-blind: five stops of a viridis-like ramp.
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def colour(share: float) -> str:
    """A colour for a share of 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    part = place - low
    mixed = (round(a + (b - a) * part) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def heatmap(rows: Mapping[str, Sequence[HeatCell]], *, title: str, unit: str) -> Markup:
    """Named rows of cells, a column a layer; the scale beside it runs from least to most."""
    values = [cell.value for cells in rows.values() for cell in cells if cell.value is not None]
    columns = max((len(cells) for cells in rows.values()), default=0)
    if not columns:
        return Markup("")
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    width, height = min(26.0, _WIDTH / columns), 20
    parts = []
    for number, (name, cells) in enumerate(rows.items()):
        y = _TOP + number * height
        parts.append(text_mark(_LEFT - 8, y + 14, name, anchor="end"))
        for column, cell in enumerate(cells):
            fill = "var(--rule)"
            if cell.value is not None:
                fill = colour((cell.value - low) / (high - low) if high > low else 1.0)
            place = {"x": _LEFT + column * width, "y": y, "width": width, "height": height}
            parts.append(Mark("rect", {"class": "cell", "fill": fill, **place}, title=cell.note))
    bottom = _TOP + len(rows) * height
    parts += _layer_ticks(columns, width, bottom, centred=True)
    parts += _scale(low, high, unit, bottom + 40, bool(values))
    return _drawing(title, bottom + 76, parts)


def _scale(low: float, high: float, unit: str, y: float, has_values: bool) -> list[Mark]:
    if not has_values:
        return [text_mark(_LEFT, y + 10, "nothing was lost anywhere")]
    steps = 60
    size = {"y": y, "width": 4.3, "height": 10}
    cells = [
        Mark("rect", {"x": _LEFT + 60 + i * 4, **size, "fill": colour(i / (steps - 1))})
        for i in range(steps)
    ]
    return [
        text_mark(_LEFT + 52, y + 9, f"{low:.3g}", anchor="end"),
        *cells,
        text_mark(_LEFT + 68 + steps * 4, y + 9, f"{high:.3g} {unit}"),
    ]


def lines(
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    unit: str,
    logarithmic: bool,
    from_zero: bool = False,
) -> Markup:
    """One line a series over the layers; gaps where a value is None."""
    values = [v for line in series.values() for v in line if v is not None and math.isfinite(v)]
    if logarithmic:
        values = [v for v in values if v > 0]
    columns = max((len(line) for line in series.values()), default=0)
    if not values or not columns:
        return Markup("")
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    places = log_ticks(low, high) if logarithmic else ticks(low, high)
    low, high = min(low, places[0]), max(high, places[-1])

    def y(value: float) -> float:
        a, b, v = (low, high, value)
        if logarithmic:
            a, b, v = (math.log(x) for x in (low, high, value))
        share = (v - a) / (b - a) if b > a else 0.5
        return _TOP + _HEIGHT * (1 - share)

    step = _WIDTH / max(columns - 1, 1)
    parts = [mark for tick in places for mark in _grid_line(y(tick), tick)]
    for number, (name, line) in enumerate(series.items()):
        shown = [v if v is not None and (v > 0 or not logarithmic) else None for v in line]
        for first, points in _runs(shown):
            dots = [(_LEFT + (first + i) * step, y(v)) for i, v in enumerate(points)]
            path = " ".join(f"{across:.1f},{down:.1f}" for across, down in dots)
            parts.append(Mark("polyline", {"class": f"series s{number}", "points": path}))
            for i, (across, down) in enumerate(dots):
                place = {"cx": across, "cy": down, "r": 2.6}
                note = f"{name}, layer {first + i}: {points[i]:.4g} {unit}"
                parts.append(Mark("circle", {"class": f"series s{number}", **place}, title=note))
    bottom = _TOP + _HEIGHT
    parts += _layer_ticks(columns, step, bottom, centred=False)
    parts += _legend(list(series), bottom + 44)
    return _drawing(title, bottom + 60, parts)


def stacked(series: Mapping[str, Sequence[float]], *, title: str, unit: str) -> Markup:
    """Stacked bars, one a layer: seconds by kind of work."""
    columns = max((len(line) for line in series.values()), default=0)
    if not columns:
        return Markup("")
    sums = [sum(line[i] for line in series.values()) for i in range(columns)]
    places = ticks(0.0, max(sums) or 1.0)
    high = max(places[-1], max(sums)) or 1.0
    width = min(26.0, _WIDTH / columns)
    parts = [m for t in places for m in _grid_line(_TOP + _HEIGHT * (1 - t / high), t)]
    for column in range(columns):
        start = 0.0
        for number, (name, line) in enumerate(series.items()):
            tall = line[column] / high * _HEIGHT
            place = {
                "x": _LEFT + column * width + 0.5, "y": _TOP + _HEIGHT - start - tall,
                "width": max(width - 1, 0.6), "height": tall,
            }  # fmt: skip
            note = f"layer {column}, {name}: {line[column]:.3g} {unit}"
            parts.append(Mark("rect", {"class": f"bar s{number}", **place}, title=note))
            start += tall
    bottom = _TOP + _HEIGHT
    parts += _layer_ticks(columns, width, bottom, centred=True)
    parts += _legend(list(series), bottom + 44)
    return _drawing(title, bottom + 60, parts)


def _runs(line: Sequence[float | None]) -> list[tuple[int, list[float]]]:
    """Stretches without gaps: index of the first value, values."""
    runs: list[tuple[int, list[float]]] = []
    for number, value in enumerate(line):
        if value is None:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == number:
            runs[-1][1].append(value)
        else:
            runs.append((number, [value]))
    return runs


def ticks(low: float, high: float) -> list[float]:
    """Round values of an axis that has these ends, five steps at most, the ends inside."""
    span = (high - low) or abs(high) or 1.0
    step = next(s * 10**p for p in range(-9, 10) for s in (1, 2, 5) if span / (s * 10**p) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two ends, which are included."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**n for n in range(first, max(last, first + 1) + 1)]


def _grid_line(y: float, value: float) -> list[Mark]:
    """A line across the chart and its value at the left."""
    line = Mark("line", {"class": "grid", "x1": _LEFT, "x2": _LEFT + _WIDTH, "y1": y, "y2": y})
    return [line, text_mark(_LEFT - 8, y + 4, f"{value:g}", anchor="end", kind="tick")]


def _layer_ticks(columns: int, step: float, bottom: float, *, centred: bool) -> list[Mark]:
    every = next(n for n in (1, 2, 4, 5, 8, 10, 20, 50, 100, 500) if columns / n <= 24)
    shift = step / 2 if centred else 0.0
    numbers = [
        text_mark(_LEFT + n * step + shift, bottom + 15, str(n), anchor="middle", kind="tick")
        for n in range(0, columns, every)
    ]
    return [*numbers, text_mark(_LEFT - 8, bottom + 15, "layer", anchor="end", kind="tick")]


def _legend(names: Sequence[str], y: float) -> list[Mark]:
    marks, x = [], float(_LEFT)
    for number, name in enumerate(names):
        place = {"x": x, "y": y - 9, "width": 10, "height": 10}
        marks.append(Mark("rect", {"class": f"bar s{number}", **place}))
        marks.append(text_mark(x + 15, y, name, kind="tick"))
        x += 34 + 7.2 * len(name)
    return marks


def _drawing(title: str, height: float, marks: Sequence[Mark]) -> Markup:
    return drawing(_LEFT + _WIDTH + 20, height, marks, title=title)
