"""Bytes against what is lost: which formats and methods nothing else beats in both.

Called by `docs`, which draws `benchmarks/records/quantize_quality.json` for the guide.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from halfbyte.page import Mark, drawing, text_mark

_LEFT, _TOP, _WIDTH, _HEIGHT, _RIGHT, _BOTTOM = 56, 16, 420, 300, 190, 44
# Colours of themselves: the drawing is a file of its own, shown on light and dark pages.
_SVG = "http://www.w3.org/2000/svg"
_GRID, _INK, _BEST = "#b8b8b8", "#777777", "#3b7dd8"


class Point(NamedTuple):
    """A checkpoint in one mode: its size and its KL from the base per token, with an interval."""

    name: str
    mode: str
    megabytes: float
    kl: float
    low: float
    high: float
    perplexity: float
    top1: float


def points_of(results: Mapping[str, Any], mode: str) -> list[Point]:
    """What results of `benchmarks/quantize_quality.py` say of one mode, smallest first."""
    points = []
    for row in results["rows"]:
        if row["mode"] == mode:
            low, high = row["kl_interval"] or (row["kl_mean"], row["kl_mean"])
            values = row["megabytes"], row["kl_mean"], low, high
            points.append(
                Point(row["name"], mode, *values, row["perplexity"], row["top1_agreement"])
            )
    return sorted(points, key=lambda point: (point.megabytes, point.kl))


def joined(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """Points of several runs; of a checkpoint that more than one measured the last run's."""
    found = {point.name: point for run in runs for point in run}
    return sorted(found.values(), key=lambda point: (point.megabytes, point.kl))


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats: as few bytes and less lost, or fewer and as little."""

    def beats(a: Point, b: Point) -> bool:
        is_no_worse = a.megabytes <= b.megabytes and a.kl <= b.kl
        return is_no_worse and (a.megabytes, a.kl) != (b.megabytes, b.kl)

    return [point for point in points if not any(beats(other, point) for other in points)]


def table(results: Mapping[str, Any], modes: Sequence[str]) -> str:
    """All points as Markdown, those of the front in bold."""
    head = [
        "| checkpoint | mode | MB | KL from bf16, 95 % interval | perplexity | same best token |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    rows = []
    for mode in modes:
        points = points_of(results, mode)
        best = front(points)
        for point in points:
            name = f"**{point.name}**" if point in best else point.name
            kl = f"{point.kl:.4f}, {point.low:.4f} to {point.high:.4f}"
            rows.append(
                f"| {name} | {mode} | {point.megabytes:.1f} | {kl} | {point.perplexity:.2f} | "
                f"{100 * point.top1:.1f} % |"
            )
    return "\n".join([*head, *rows])


def plot(points: Sequence[Point], *, title: str) -> str:
    """An SVG file: megabytes to the right, KL upwards, the front joined; "" without points."""
    if not points:
        return ""
    low, high = (f(p.megabytes for p in points) for f in (min, max))
    margin = 0.08 * (high - low) or 1.0
    low, high, top = low - margin, high + margin, 1.08 * max(p.high for p in points)

    def x(megabytes: float) -> float:
        return _LEFT + (megabytes - low) / (high - low) * _WIDTH

    def y(kl: float) -> float:
        return _TOP + _HEIGHT * (1 - kl / top)

    marks = _axes(low, high, top)
    best = front(points)
    for a, b in pairwise(best):
        # A step: with fewer bytes than b has, a is the best there is.
        ends = (x(a.megabytes), y(a.kl)), (x(b.megabytes), y(a.kl)), (x(b.megabytes), y(b.kl))
        marks += [_line(*ends[0], *ends[1], _BEST), _line(*ends[1], *ends[2], _BEST)]
    for point in points:
        colour = _BEST if point in best else _INK
        marks.append(
            _line(x(point.megabytes), y(point.low), x(point.megabytes), y(point.high), colour)
        )
        place: dict[str, str | float] = {
            "cx": x(point.megabytes),
            "cy": y(point.kl),
            "r": 4,
            "fill": colour,
        }
        said = f"{point.name}: {point.megabytes:.1f} MB, KL {point.kl:.4f}"
        marks.append(Mark("circle", place, title=said))
    for point, level in zip(points, _levels([y(p.kl) for p in points]), strict=True):
        marks.append(_words(x(point.megabytes) + 8, level + 4, f"{point.name} {point.kl:.3f}"))
    drawn = drawing(_LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM, marks, title=title)
    # Within a page HTML names the namespace; a file must.
    return str(drawn).strip().replace("<svg ", f'<svg xmlns="{_SVG}" ', 1) + "\n"


def _axes(low: float, high: float, top: float) -> list[Mark]:
    marks = []
    for number in range(5):
        kl = top * number / 4
        level = _TOP + _HEIGHT * (1 - number / 4)
        marks.append(_line(_LEFT, level, _LEFT + _WIDTH, level, _GRID, "0.5"))
        marks.append(_words(_LEFT - 6, level + 4, f"{kl:.2f}", "end"))
        megabytes, place = low + (high - low) * number / 4, _LEFT + _WIDTH * number / 4
        marks.append(_words(place, _TOP + _HEIGHT + 16, f"{megabytes:.0f}", "middle"))
    middle = _LEFT + _WIDTH / 2
    marks.append(_words(middle, _TOP + _HEIGHT + 34, "MB of weights; KL per token, nats", "middle"))
    return marks


def _levels(wanted: Sequence[float]) -> list[float]:
    """Heights of labels near the wanted ones, at least 12 apart, in the same order."""
    levels = list(wanted)
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    for before, after in pairwise(order):
        levels[after] = max(levels[after], levels[before] + 12)
    return levels


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: str = "1.5") -> Mark:
    ends: dict[str, str | float] = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return Mark("line", {**ends, "stroke": colour, "stroke-width": width})


def _words(x: float, y: float, text: str, anchor: str = "start") -> Mark:
    mark = text_mark(x, y, text, anchor=anchor)
    style = {"fill": _INK, "font-size": "11", "font-family": "sans-serif"}
    return Mark("text", {**mark.place, **style}, text)
