"""Small SVG plots for the report: intervals on a common axis, stacked shares."""

from collections.abc import Callable, Sequence
from math import floor, isfinite, log10
from typing import NamedTuple

from markupsafe import Markup

from halfbyte.page import Mark, drawing, text_mark

_ROW, _LEFT, _WIDTH, _RIGHT, _TOP = 26, 200, 420, 190, 8


class LabelledInterval(NamedTuple):
    """A labelled estimate; `note` is printed to the right, `kind` is a class for the colour."""

    label: str
    low: float
    mid: float
    high: float
    note: str
    kind: str = ""


def intervals(
    rows: Sequence[LabelledInterval], *, title: str, unit: str, marks: Sequence[float] = (0.0,)
) -> Markup:
    """One line per estimate with its interval; vertical lines at `marks`."""
    if not rows:
        return Markup("")
    values = [v for r in rows for v in (r.low, r.mid, r.high) if isfinite(v)] + list(marks)
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * _WIDTH

    bottom = _TOP + _ROW * len(rows)

    def upright(kind: str, value: float) -> Mark:
        return Mark(
            "line", {"class": kind, "x1": x(value), "x2": x(value), "y1": _TOP, "y2": bottom}
        )

    marks_drawn = []
    for tick in _ticks(low, high):
        words = text_mark(x(tick), bottom + 16, f"{tick:g}", anchor="middle", kind="tick")
        marks_drawn += [upright("grid", tick), words]
    marks_drawn += [upright("margin" if n else "zero", mark) for n, mark in enumerate(marks)]
    for index, row in enumerate(rows):
        marks_drawn += _estimate(row, x, _TOP + _ROW * index + _ROW / 2)
    middle = _LEFT + _WIDTH / 2
    marks_drawn.append(text_mark(middle, bottom + 31, unit, anchor="middle", kind="tick"))
    return drawing(_LEFT + _WIDTH + _RIGHT, bottom + 34, marks_drawn, title=title)


def _estimate(row: LabelledInterval, x: Callable[[float], float], y: float) -> list[Mark]:
    """One line of a plot: its name, its interval, its point and its note; no number, no mark."""
    label = row.label if len(row.label) <= 28 else row.label[:27] + "…"
    marks = [text_mark(_LEFT - 10, y + 4, label, anchor="end")]
    if isfinite(row.low) and isfinite(row.high):
        ends = {"x1": x(row.low), "x2": x(row.high), "y1": y, "y2": y}
        marks.append(Mark("line", {"class": f"bar {row.kind}", **ends}))
    if isfinite(row.mid):
        marks.append(
            Mark(
                "circle",
                {"class": f"dot {row.kind}", "cx": x(row.mid), "cy": y, "r": 4},
                title=_hover(row),
            )
        )
    return [*marks, text_mark(_LEFT + _WIDTH + 12, y + 4, row.note, kind="note")]


def _hover(row: LabelledInterval) -> str:
    """The numbers behind a mark, for whoever points at it."""
    ends = f" ({row.low:.4g} to {row.high:.4g})" if row.low == row.low else ""
    return f"{row.label}: {row.mid:.4g}{ends}; {row.note}"


def _ticks(low: float, high: float) -> list[float]:
    span = high - low
    power = floor(log10(span / 6))
    steps = (s * 10.0**p for p in (power, power + 1) for s in (1, 2, 5))
    step = next(s for s in steps if span / s <= 6)
    first = -(-low // step)
    count = int((high - first * step) / step) + 1
    return [round((first + i) * step, 2 - power) for i in range(count)]


def shares(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, title: str) -> Markup:
    """Stacked bars of shares that add up to at most one; each share's kind is its CSS class."""
    if not rows:
        return Markup("")
    marks = []
    for index, (label, members) in enumerate(rows):
        y = _TOP + _ROW * index + 4
        marks.append(text_mark(_LEFT - 10, y + 13, label, anchor="end"))
        start = 0.0
        for kind, share in members:
            if share > 0:
                place = {"x": _LEFT + start * _WIDTH, "y": y, "width": share * _WIDTH, "height": 18}
                title_of_share = f"{kind} {100 * share:.1f} %"
                marks.append(
                    Mark("rect", {"class": f"share {kind}", **place}, title=title_of_share)
                )
            start += share
    return drawing(_LEFT + _WIDTH + _RIGHT, _TOP + _ROW * len(rows) + 8, marks, title=title)
