"""Charts of a load run: curves and dots over one x axis, small enough to be read on a telephone.

Each is 360 units wide, as wide as a telephone's page, so that its words keep their size there; a
wider page sets several beside each other. Hovering a mark shows its values.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from halfbyte.page import Mark, drawing, text_mark
from halfbyte.quantize.charts import log_ticks, ticks

Points = Sequence[tuple[float, float]]

_WIDE, _LEFT, _RIGHT, _TOP, _TALL = 360, 52, 20, 10, 180
# Colours that page.css has for series.
_COLOURS = 6


def chart(
    series: Mapping[str, Points],
    *,
    title: str,
    x_unit: str,
    y_unit: str,
    x_places: Sequence[float] = (),
    log_x: bool = False,
    log_y: bool = False,
    joined: bool = True,
    marks_at: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Named points (x, y), joined to a line or not; nothing if there are none.

    x_places  where the x axis has its numbers; round ones if left out
    marks_at  upright lines with their words, as (x, words)
    """
    drawn = {
        name: [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
        for name, points in series.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return Markup("")
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    x_ticks = list(x_places) or (log_ticks if log_x else ticks)(min(xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(min(0.0, *ys), max(ys))
    across = _scale((*xs, *x_ticks), _LEFT, _WIDE - _RIGHT, log_x)
    down = _scale((*ys, *y_ticks), _TOP + _TALL, _TOP, log_y)
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
        places = [(across(x), down(y)) for x, y in points]
        if joined and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(Mark("polyline", {"class": kind, "points": path}))
        for (x, y), (at_x, at_y) in zip(points, places, strict=True):
            note = f"{name}: {_number(y)} {y_unit} at {_number(x)} {x_unit}"
            dot: dict[str, str | float] = {"class": kind, "cx": at_x, "cy": at_y, "r": 3}
            parts.append(Mark("circle", dot, title=note))
    parts.append(text_mark(_WIDE - _RIGHT, bottom + 29, x_unit, anchor="end", kind="tick"))
    height, legend = _legend(list(drawn), bottom + 29)
    return drawing(_WIDE, height, [*parts, *legend], title=f"{title}, {y_unit} over {x_unit}")


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
