"""SVG charts of the quantization report: heatmaps and lines over layers, stacked bars. Text out.

Colours come from the page's style sheet where they mean a series, and are computed where they mean
a value. No script: every mark has a title, which browsers show on hover.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_LEFT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 92, 10, 34, 760, 190


class Cell(NamedTuple):
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


def heatmap(rows: Mapping[str, Sequence[Cell]], *, title: str, unit: str) -> str:
    """Named rows of cells, a column a layer; the scale beside it runs from least to most."""
    values = [cell.value for cells in rows.values() for cell in cells if cell.value is not None]
    columns = max((len(cells) for cells in rows.values()), default=0)
    if not columns:
        return ""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    width, height = min(26.0, _WIDTH / columns), 20
    parts = []
    for number, (name, cells) in enumerate(rows.items()):
        y = _TOP + number * height
        parts.append(_text(_LEFT - 8, y + 14, name, "end"))
        for column, cell in enumerate(cells):
            fill = "var(--rule)"
            if cell.value is not None:
                fill = colour((cell.value - low) / (high - low) if high > low else 1.0)
            parts.append(
                f'<rect class="cell" x="{_LEFT + column * width:.2f}" y="{y}" fill="{fill}" '
                f'width="{width:.2f}" height="{height}"><title>{escape(cell.note)}</title></rect>'
            )
    bottom = _TOP + len(rows) * height
    parts += _layer_ticks(columns, width, bottom, centred=True)
    parts.append(_scale(low, high, unit, bottom + 40, bool(values)))
    return _svg(title, bottom + 76, parts)


def _scale(low: float, high: float, unit: str, y: float, has_values: bool) -> str:
    if not has_values:
        return _text(_LEFT, y + 10, "nothing was lost anywhere", "start")
    steps = 60
    cells = "".join(
        f'<rect x="{_LEFT + 60 + i * 4}" y="{y}" width="4.3" height="10" '
        f'fill="{colour(i / (steps - 1))}"/>'
        for i in range(steps)
    )
    return (
        f"{_text(_LEFT + 52, y + 9, f'{low:.3g}', 'end')}{cells}"
        f"{_text(_LEFT + 68 + steps * 4, y + 9, f'{high:.3g} {unit}', 'start')}"
    )


def lines(
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    unit: str,
    logarithmic: bool,
    from_zero: bool = False,
) -> str:
    """One line a series over the layers; gaps where a value is None."""
    values = [v for line in series.values() for v in line if v is not None and math.isfinite(v)]
    if logarithmic:
        values = [v for v in values if v > 0]
    columns = max((len(line) for line in series.values()), default=0)
    if not values or not columns:
        return ""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def y(value: float) -> float:
        a, b, v = (low, high, value)
        if logarithmic:
            a, b, v = (math.log(x) for x in (low, high, value))
        share = (v - a) / (b - a) if b > a else 0.5
        return _TOP + _HEIGHT * (1 - share)

    step = _WIDTH / max(columns - 1, 1)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f"{_text(_LEFT - 8, y(t) + 4, f'{t:g}', 'end', 'tick')}"
        for t in ticks
    ]
    for number, (name, line) in enumerate(series.items()):
        shown = [v if v is not None and (v > 0 or not logarithmic) else None for v in line]
        for first, points in _runs(shown):
            path = " ".join(
                f"{_LEFT + (first + i) * step:.1f},{y(v):.1f}" for i, v in enumerate(points)
            )
            parts.append(f'<polyline class="series s{number}" points="{path}"/>')
            parts += [
                f'<circle class="series s{number}" cx="{_LEFT + (first + i) * step:.1f}" '
                f'cy="{y(v):.1f}" r="2.6"><title>{escape(name)}, layer {first + i}: {v:.4g} '
                f"{escape(unit)}</title></circle>"
                for i, v in enumerate(points)
            ]
    bottom = _TOP + _HEIGHT
    parts += _layer_ticks(columns, step, bottom, centred=False)
    parts.append(_legend(list(series), bottom + 44))
    return _svg(title, bottom + 60, parts)


def stacked(series: Mapping[str, Sequence[float]], *, title: str, unit: str) -> str:
    """Stacked bars, one a layer: seconds by kind of work."""
    columns = max((len(line) for line in series.values()), default=0)
    if not columns:
        return ""
    sums = [sum(line[i] for line in series.values()) for i in range(columns)]
    ticks = _ticks(0.0, max(sums) or 1.0)
    high = max(ticks[-1], max(sums)) or 1.0
    width = min(26.0, _WIDTH / columns)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" '
        f'y1="{_TOP + _HEIGHT * (1 - t / high):.1f}" y2="{_TOP + _HEIGHT * (1 - t / high):.1f}"/>'
        f"{_text(_LEFT - 8, _TOP + _HEIGHT * (1 - t / high) + 4, f'{t:g}', 'end', 'tick')}"
        for t in ticks
    ]
    for column in range(columns):
        start = 0.0
        for number, (name, line) in enumerate(series.items()):
            tall = line[column] / high * _HEIGHT
            parts.append(
                f'<rect class="bar s{number}" x="{_LEFT + column * width + 0.5:.2f}" '
                f'y="{_TOP + _HEIGHT - start - tall:.2f}" width="{max(width - 1, 0.6):.2f}" '
                f'height="{tall:.2f}"><title>layer {column}, {escape(name)}: {line[column]:.3g} '
                f"{escape(unit)}</title></rect>"
            )
            start += tall
    bottom = _TOP + _HEIGHT
    parts += _layer_ticks(columns, width, bottom, centred=True)
    parts.append(_legend(list(series), bottom + 44))
    return _svg(title, bottom + 60, parts)


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


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    step = next(s * 10**p for p in range(-9, 10) for s in (1, 2, 5) if span / (s * 10**p) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**n for n in range(first, max(last, first + 1) + 1)]


def _layer_ticks(columns: int, step: float, bottom: float, *, centred: bool) -> list[str]:
    every = next(n for n in (1, 2, 4, 5, 8, 10, 20, 50, 100, 500) if columns / n <= 24)
    shift = step / 2 if centred else 0.0
    numbers = [
        _text(_LEFT + n * step + shift, bottom + 15, str(n), "middle", "tick")
        for n in range(0, columns, every)
    ]
    return [*numbers, _text(_LEFT - 8, bottom + 15, "layer", "end", "tick")]


def _legend(names: Sequence[str], y: float) -> str:
    parts, x = [], float(_LEFT)
    for number, name in enumerate(names):
        parts.append(f'<rect class="bar s{number}" x="{x:.0f}" y="{y - 9:.0f}" width="10" '
                     f'height="10"/>{_text(x + 15, y, name, "start", "tick")}')  # fmt: skip
        x += 34 + 7.2 * len(name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 20} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )
