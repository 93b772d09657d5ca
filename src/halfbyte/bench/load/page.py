"""A load run as one HTML file: words, tables and charts, no script, nothing fetched.

It shows what a record holds, so that it can be made again of it, and beside another run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from halfbyte.bench.load.charts import Axis, Points, chart
from halfbyte.bench.load.report import (
    SATURATING,
    LoadRecord,
    comparison,
    failure_lines,
    notes,
    told,
)
from halfbyte.bench.load.results import saturation
from halfbyte.bench.record import percentile
from halfbyte.figures import number
from halfbyte.page import Table, render_page

_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 1.0)


class _Words(NamedTuple):
    """A paragraph; `kind` is "", soft or alarm."""

    text: str
    kind: str = ""


class _Charts(NamedTuple):
    """Charts side by side, each with its heading."""

    charts: Sequence[tuple[str, Markup]]


_Part = _Words | _Charts | Table


def write_page(run: LoadRecord, path: Path, against: LoadRecord | None = None) -> None:
    """Write the page of a run, beside another if one is given."""
    path.write_text(render(run, against), encoding="utf-8")


def render(run: LoadRecord, against: LoadRecord | None = None) -> str:
    """Render the page of a run as HTML."""
    sections: list[tuple[str, list[_Part]]] = [
        ("In short", _in_short(run)),
        ("Levels", _levels(run)),
    ]
    if against is not None:
        sections.append((f"Against {against.title}", _against(run, against)))
    sections += [
        ("More users at once", _saturation(run)),
        ("Between tokens", _gaps(run)),
        ("Agents", _agents(run)),
        ("A long prompt beside running answers", _beside(run)),
        ("How it was measured", _how(run)),
    ]
    return render_page(
        "halfbyte.bench.load",
        "load.html",
        "page.css",
        style_room="halfbyte.quantize",
        title=f"{run.model} under load",
        subtitle=f"{run.record.date}, on {run.record.machine.text}; {run.checkpoint_text}",
        facts=_facts(run),
        sections=[(name, parts) for name, parts in sections if parts],
    )


def _facts(run: LoadRecord) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    rates = [one for one in run.levels if one.output_rate is not None and one.profile == "fixed"]
    if rates:
        best = max(rates, key=lambda one: one.output_rate or 0.0)
        found.append((f"tokens/s written at most, {best.title}", number(best.output_rate or 0.0)))
    for one in run.levels:
        if one.users == 1 and one.first_token is not None and one.profile == "fixed":
            found.append(("ms to the first token, 1 user", number(one.first_token.p50)))
            if one.per_token is not None:
                found.append(("ms per token, 1 user", number(one.per_token.p50)))
    found.append(("requests that failed", str(sum(one.failed for one in run.levels))))
    return found


def _in_short(run: LoadRecord) -> list[_Part]:
    parts: list[_Part] = []
    for profile, name in SATURATING:
        words = saturation(run.levels, profile)
        if words:
            parts.append(_Words(f"{name}: {words}"))
    parts += [_Words(line, "alarm") for line in failure_lines(run.levels)]
    parts += [_Words(line, "soft") for line in notes(run)]
    return parts


def _levels(run: LoadRecord) -> list[_Part]:
    head = ("level", "answers", "first token p50, ms", "p99", "gap p50, ms", "p99", "longest",
            "per token, ms", "written, tokens/s", "taken in, tokens/s", "found, %",
            "failed")  # fmt: skip
    rows = [
        (
            one.title, f"{one.answered} of {one.planned}", *told(one.first_token, "p50", "p99"),
            *told(one.beside or one.gaps, "p50", "p99", "most"), *told(one.per_token, "p50"),
            _shown(one.output_rate), _shown(one.prompt_rate),
            _shown(None if one.found_share is None else 100 * one.found_share), str(one.failed),
        )
        for one in run.levels
    ]  # fmt: skip
    words = (
        "First token: from sending to the first piece of text. Gap: between two pieces of text of "
        "an answer. Taken in: prompt tokens, those found in the prefix cache included; found: "
        "their share. – is what the server does not count, or what was not measured."
    )
    return [Table(head, rows), _Words(words, "soft")]


def _against(run: LoadRecord, other: LoadRecord) -> list[_Part]:
    found = comparison(run, other)
    parts: list[_Part] = [_Words(line, "alarm") for line in found.warnings]
    if found.rows:
        # Conditions in a column of their own would leave the ratio no room on a telephone.
        head = ("what", "this run", "the other", "this over the other")
        cells = [
            (f"{name} ({under})", *values)
            for name, under, *values in (row.cells for row in found.rows)
        ]
        parts.append(Table(head, cells))
        parts.append(
            _Words(
                "One run each: what differs by less than two runs of the same server do is noise. "
                "Measure each twice to know it.",
                "soft",
            )
        )
    return parts


def _saturation(run: LoadRecord) -> list[_Part]:
    charts: list[tuple[str, Markup]] = []
    for profile, unit in (("fixed", "users"), ("agents", "agents")):
        levels = [one for one in run.levels if one.profile == profile]
        if len(levels) < 2:
            continue
        places = [one.users for one in levels]
        rates = [(one.users, one.output_rate) for one in levels if one.output_rate is not None]
        charts.append(
            (
                f"Tokens/s written, {unit}",
                chart(
                    {"tokens/s": rates}, title="Output", x=Axis(unit, True, places),
                    y=Axis("tokens/s"),
                ),
            )
        )  # fmt: skip
        waits = [(one.users, one.first_token) for one in levels if one.first_token is not None]
        series: dict[str, Points] = {
            "median": [(users, spread.p50) for users, spread in waits],
            "99th percentile": [(users, spread.p99) for users, spread in waits],
        }
        charts.append(
            (
                f"Wait for the first token, ms, {unit}",
                chart(
                    series, title="First token", x=Axis(unit, True, places), y=Axis("ms", True),
                ),
            )
        )  # fmt: skip
    return _charts(charts)


def _gaps(run: LoadRecord) -> list[_Part]:
    charts = []
    for profile, name in SATURATING:
        series: dict[str, Points] = {}
        for one in run.levels:
            gaps = run.samples(one, "gap, ms")
            if one.profile == profile and gaps:
                series[one.title] = [(percentile(gaps, s), 100 * s) for s in _SHARES]
        drawn = chart(series, title=name, x=Axis("ms", True), y=Axis("% of gaps are shorter"))
        charts.append((f"{name}: share of gaps that are shorter, %", drawn))
    return _charts(charts)


def _agents(run: LoadRecord) -> list[_Part]:
    series: dict[str, Points] = {}
    for one in run.levels:
        waits = run.samples(one, "first token, ms")
        sizes = run.samples(one, "prompt, tokens")
        if one.profile == "agents" and len(waits) == len(sizes):
            series[one.title] = list(zip(sizes, waits, strict=True))
    parts = _charts(
        [
            (
                "Wait for the first token by the length of the prompt, ms",
                chart(
                    series, title="First token by length", x=Axis("prompt tokens"),
                    y=Axis("ms", True), joined=False,
                ),
            )
        ]
    )  # fmt: skip
    ratios = [
        f"{one.title}: {one.prompt_per_answer:,.0f} prompt tokens for each answer token"
        + ("" if one.found_share is None else f", {one.found_share:.1%} found in the prefix cache")
        for one in run.levels
        if one.profile == "agents" and one.prompt_per_answer is not None
    ]
    if ratios:
        parts.append(_Words("; ".join(ratios) + "."))
    return parts


def _beside(run: LoadRecord) -> list[_Part]:
    parts: list[_Part] = []
    for one in run.levels:
        if one.profile != "beside" or one.beside is None or one.first_token is None:
            continue
        first_s = one.first_token.p50 / 1000
        drawn = chart(
            {"longest gap of any stream": one.timeline},
            title=one.title, x=Axis("s since the long prompt was sent"), y=Axis("ms", True),
            marks_at=((0.0, "sent"), (first_s, "its first token")),
        )  # fmt: skip
        parts += _charts([("Longest gap of the streams, ms", drawn)])
        words = (
            f"The prompt of {one.prompt_tokens or one.asked_prompt:,.0f} tokens had its first "
            f"token after {first_s:,.2f} s. Gaps of the {one.users} streams meanwhile: p99 "
            f"{one.beside.p99:,.1f} ms, longest {one.beside.most:,.1f} ms"
        )
        if one.alone is not None:
            words += f"; alone before: {one.alone.p99:,.1f} and {one.alone.most:,.1f} ms"
        parts.append(_Words(words + "."))
    return parts


def _how(run: LoadRecord) -> list[_Part]:
    rows = [(name, value) for name, value in run.facts]
    late = max((one.late_ms for one in run.levels), default=0.0)
    words = (
        f"The program that asked was late by up to {late:.1f} ms (99th percentile of its clock's "
        "ticks in the worst level); what it sees late it times late."
    )
    return [Table(("what", "value"), rows), _Words(words, "alarm" if late > 20 else "soft")]


def _charts(found: Sequence[tuple[str, Markup]]) -> list[_Part]:
    drawn = [(name, one) for name, one in found if one]
    return [_Charts(drawn)] if drawn else []


def _shown(value: float | None) -> str:
    return "–" if value is None else number(value)
