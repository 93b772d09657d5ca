"""Charts of a load run: curves and dots over one x axis, small enough to be read on a telephone.

Each is 360 units wide, as wide as a telephone's page, so that its words keep their size there; a
wider page sets several beside each other. Hovering a mark shows its values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from halfbyte.page import Mark, drawing, text_mark
from halfbyte.quantize.charts import log_ticks, ticks

Points = Sequence[tuple[float, float]]

_WIDE, _LEFT, _RIGHT, _TOP, _TALL = 360, 52, 20, 10, 180
# Colours that page.css has for series.
_COLOURS = 6


class Axis(NamedTuple):
    """One axis of a chart; its numbers stand at `places`, or at round values."""

    unit: str
    is_log: bool = False
    places: Sequence[float] = ()


def chart(
    series: Mapping[str, Points],
    *,
    title: str,
    x: Axis,
    y: Axis,
    joined: bool = True,
    marks_at: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Named points (x, y), joined to a line or not; nothing if there are none.

    marks_at  upright lines with their words, as (x, words)
    """
    drawn = {
        name: [(a, b) for a, b in points if (a > 0 or not x.is_log) and (b > 0 or not y.is_log)]
        for name, points in series.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return Markup("")
    xs = [at for points in drawn.values() for at, _ in points]
    ys = [value for points in drawn.values() for _, value in points]
    x_ticks = list(x.places) or (log_ticks if x.is_log else ticks)(min(xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if y.is_log else ticks(min(0.0, *ys), max(ys))
    across = _scale((*xs, *x_ticks), _LEFT, _WIDE - _RIGHT, x.is_log)
    down = _scale((*ys, *y_ticks), _TOP + _TALL, _TOP, y.is_log)
    bottom = _TOP + _TALL
    parts: list[Mark] = []
    for tick in y_ticks:
        place = {"x1": _LEFT, "x2": _WIDE - _RIGHT, "y1": down(tick), "y2": down(tick)}
        parts.append(Mark("line", {"class": "grid", **place}))
        parts.append(text_mark(_LEFT - 6, down(tick) + 4, f"{tick:g}", anchor="end", kind="tick"))
    for tick in x_ticks:
        words = f"{tick:g}"
        parts.append(text_mark(across(tick), bottom + 15, words, anchor="middle", kind="tick"))
    for place_x, words in marks_at:
        place = {"x1": across(place_x), "x2": across(place_x), "y1": _TOP, "y2": bottom}
        parts.append(Mark("line", {"class": "grid", "stroke-dasharray": "3 3", **place}))
        is_left = across(place_x) > _WIDE / 2  # its words are, lest they leave the chart
        beside, anchor = (-4, "end") if is_left else (4, "start")
        parts.append(
            text_mark(across(place_x) + beside, _TOP + 10, words, anchor=anchor, kind="tick")
        )
    for number, (name, points) in enumerate(drawn.items()):
        kind = f"series s{number % _COLOURS}"
        places = [(across(at), down(value)) for at, value in points]
        if joined and len(places) > 1:
            path = " ".join(f"{at_x:.1f},{at_y:.1f}" for at_x, at_y in places)
            parts.append(Mark("polyline", {"class": kind, "points": path}))
        for (at, value), (at_x, at_y) in zip(points, places, strict=True):
            note = f"{name}: {_number(value)} {y.unit} at {_number(at)} {x.unit}"
            dot: dict[str, str | float] = {"class": kind, "cx": at_x, "cy": at_y, "r": 3}
            parts.append(Mark("circle", dot, title=note))
    parts.append(text_mark(_WIDE - _RIGHT, bottom + 29, x.unit, anchor="end", kind="tick"))
    height, legend = _legend(list(drawn), bottom + 29)
    return drawing(_WIDE, height, [*parts, *legend], title=f"{title}, {y.unit} over {x.unit}")


def _scale(
    values: Sequence[float], low_at: float, high_at: float, logarithmic: bool
) -> Callable[[float], float]:
    """A value's place between two ends."""
    change = math.log if logarithmic else float
    low, high = change(min(values)), change(max(values))

    def place(value: float) -> float:
        share = (change(value) - low) / (high - low) if high > low else 0.5
        return low_at + (high_at - low_at) * share

    return place


def _legend(names: Sequence[str], y: float) -> tuple[float, list[Mark]]:
    """Draw the legend below the chart, a line a series; returns its lower end and marks."""
    marks: list[Mark] = []
    for number, name in enumerate(names):
        y += 16
        square = {"x": _LEFT, "y": y - 9, "width": 10, "height": 10}
        marks.append(Mark("rect", {"class": f"bar s{number % _COLOURS}", **square}))
        marks.append(text_mark(_LEFT + 15, y, name, kind="tick"))
    return y + 8, marks


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
