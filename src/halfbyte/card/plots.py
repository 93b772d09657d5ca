"""Small SVG plots for the report: intervals on a common axis, stacked shares. Text out."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_ROW, _LEFT, _WIDTH, _RIGHT, _TOP = 26, 200, 420, 190, 8


class Interval(NamedTuple):
    """A labelled estimate; `note` is printed to the right, `kind` is a class for the colour."""

    label: str
    low: float
    mid: float
    high: float
    note: str
    kind: str = ""


def intervals(
    rows: Sequence[Interval], *, title: str, unit: str, marks: Sequence[float] = (0.0,)
) -> str:
    """One line per estimate with its interval; vertical lines at `marks`."""
    if not rows:
        return ""
    values = [v for r in rows for v in (r.low, r.mid, r.high) if v == v] + list(marks)
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * _WIDTH

    height = _TOP + _ROW * len(rows) + 34
    parts = []
    bottom = _TOP + _ROW * len(rows)
    for tick in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" '
                     f'y2="{bottom}"/><text class="tick" x="{x(tick):.1f}" y="{bottom + 16}" '
                     f'text-anchor="middle">{tick:g}</text>')  # fmt: skip
    for index, mark in enumerate(marks):
        name = "zero" if index == 0 else "margin"
        parts.append(f'<line class="{name}" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{_TOP}" '
                     f'y2="{bottom}"/>')  # fmt: skip
    for index, row in enumerate(rows):
        y = _TOP + _ROW * index + _ROW / 2
        label = row.label if len(row.label) <= 28 else row.label[:27] + "…"
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}'
                     "</text>")  # fmt: skip
        if row.low == row.low and row.high == row.high:
            parts.append(f'<line class="bar {row.kind}" x1="{x(row.low):.1f}" '
                         f'x2="{x(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')  # fmt: skip
        if row.mid == row.mid:
            parts.append(
                f'<circle class="dot {row.kind}" cx="{x(row.mid):.1f}" cy="{y:.1f}" r="4"/>'
            )
        parts.append(f'<text class="note" x="{_LEFT + _WIDTH + 12}" y="{y + 4:.1f}">'
                     f"{escape(row.note)}</text>")  # fmt: skip
    parts.append(f'<text class="tick" x="{_LEFT + _WIDTH / 2}" y="{bottom + 31}" '
                 f'text-anchor="middle">{escape(unit)}</text>')  # fmt: skip
    total = _LEFT + _WIDTH + _RIGHT
    return (f'<svg viewBox="0 0 {total} {height}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{''.join(parts)}</svg>")  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    span = high - low
    step = next(s * 10**p for p in range(-4, 6) for s in (1, 2, 5) if span / (s * 10**p) <= 6)
    first = -(-low // step)
    count = int((high - first * step) / step) + 1
    return [round((first + i) * step, 10) for i in range(count)]


def shares(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, title: str) -> str:
    """Stacked bars of shares that add up to at most one; each share's kind is its CSS class."""
    if not rows:
        return ""
    height = _TOP + _ROW * len(rows) + 8
    parts = []
    for index, (label, members) in enumerate(rows):
        y = _TOP + _ROW * index + 4
        parts.append(
            f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
        )
        start = 0.0
        for kind, share in members:
            if share > 0:
                parts.append(f'<rect class="share {kind}" x="{_LEFT + start * _WIDTH:.1f}" y="{y}" '
                             f'width="{share * _WIDTH:.1f}" height="18"><title>{escape(kind)} '
                             f"{100 * share:.1f} %</title></rect>")  # fmt: skip
            start += share
    total = _LEFT + _WIDTH + _RIGHT
    return (f'<svg viewBox="0 0 {total} {height}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{''.join(parts)}</svg>")  # fmt: skip
