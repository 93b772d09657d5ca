"""One HTML page from one run, or from a baseline and a candidate; no external assets.

What it says comes from `facts`; a figure without a record does not get here. Here is what each
section says, as plain text and tables; `report.html` lays it out and escapes all of it.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from halfbyte.card.facts import PRIVATE, Arm, UseFacts, columns, title_of
from halfbyte.card.plots import LabelledInterval, intervals, shares
from halfbyte.evals.judging.comparison import BenchmarkComparison, Comparison, Flip
from halfbyte.evals.judging.render import (
    a_a,
    format_look,
    level_text,
    margin_text,
    p_text,
    percent,
    points,
    unseen_lines,
    what_would_decide,
)
from halfbyte.evals.records import BenchmarkResult
from halfbyte.page import Cell, Table, render_page

_CAUSES = ("ok", "wrong", "length", "unparsed", "empty", "refused", "ungraded", "error")
_CAUSE_NAMES = {
    "ok": "right", "wrong": "wrong", "length": "truncated (cut by the output limit)",
    "unparsed": "unextracted (no answer found in the text)", "empty": "empty",
    "refused": "refused by the server", "error": "failed or ungraded, not scored",
}  # fmt: skip
_ANSWER_CHARS = 1_600


class _Flip(NamedTuple):
    """One item whose score changed; `answers` are arm and text, none where they stay private."""

    summary: str
    answers: Sequence[tuple[str, str]]


def render_report(arms: Sequence[Arm], comparison: Comparison | None) -> str:
    """Render the page of a comparison as HTML."""
    return render_page(
        "halfbyte.card",
        "report.html",
        "report.css",
        title="Evaluation: " + " against ".join(arm.run.arm for arm in reversed(arms)),
        models=sorted({arm.run.model for arm in arms}),
        finished=arms[-1].run.finished,
        notes=list(dict.fromkeys(n for arm in arms if (n := arm.run.checkpoint.get("note")))),
        verdict=None if comparison is None else comparison.verdict,
        conclusion=None if comparison is None else _conclusion(comparison),
        scores=_scores(arms),
        score_notes=_score_notes(arms),
        difference=_difference(comparison),
        domains=_domains(arms),
        cause_names=_CAUSE_NAMES,
        causes=_causes(arms),
        usage=_usage(arms),
        flips=None if comparison is None else _flips(comparison),
        a_a=None if comparison is None else a_a(comparison),
        asked=_asked(arms[0]),
        provenance=[(arm.run.arm, _provenance(arm)) for arm in arms],
    )


def _conclusion(comparison: Comparison) -> str:
    """What the comparison lets one say, in two or three sentences."""
    rows = comparison.benchmarks.values()
    if not rows:
        return "No benchmark was measured in both arms: nothing can be concluded."
    by_kind: dict[str, list[str]] = {}
    for row in rows:
        by_kind.setdefault(row.reason or row.verdict, []).append(row.title)
    said = {
        "GO": "A loss larger than the margin is ruled out on {}.",
        "NO-GO": "A loss larger than the margin is shown on {}.",
        "loss shown": "On {} a loss is shown, but not whether it is larger than the margin.",
        "too wide": "On {} the interval is too wide to say either: neither equality nor a loss has "
        "been shown.",
        "blocked": "On {} no verdict may be read; the reason stands in the table below.",
    }
    parts = [
        text.format(", ".join(by_kind[kind])) for kind, text in said.items() if kind in by_kind
    ]
    missing = [title_of(n) for n in comparison.left_out if n not in comparison.not_asked]
    if missing:
        parts.append(f"{', '.join(missing)} could not be compared, so that there is no GO.")
    m = comparison.macro
    free = sum(not row.blockers for row in rows)
    counted = "one benchmark" if free == 1 else f"{free} benchmarks"
    parts.append(
        f"Mean difference over {counted}: {points(m.mean)} points, {level_text(comparison)} "
        f"interval {points(m.low)} to {points(m.high)}; its margin is "
        f"{margin_text(comparison.macro_margin, comparison.macro_margin_origin)}."
    )
    return " ".join(parts)


def _scores(arms: Sequence[Arm]) -> Table:
    names = columns(arms)
    rows = [
        [Cell(arm.run.arm, kind="strong"), *(_score(arm.run.benchmarks.get(n)) for n in names)]
        for arm in arms
    ]
    counted = [Cell("items × repeats")]
    for name in names:
        found = [arm.run.benchmarks[name] for arm in arms if name in arm.run.benchmarks]
        lines = dict.fromkeys(f"{r.items} of {r.full_items} × {r.repeats}" for r in found)
        counted.append(Cell("\n".join(lines) or "-"))
    return Table(
        ["arm", *(title_of(name) for name in names)],
        [*rows, counted],
        "Accuracy in percent with its 95 % interval over items; wrong answers include truncated, "
        "unextracted, empty and refused ones.",
    )


def _score_notes(arms: Sequence[Arm]) -> list[str]:
    """What is to be known of a score: each says of whose."""
    said: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        for result in arm.run.benchmarks.values():
            for note in filter(None, (*result.notes, result.reason)):
                said.setdefault((result.title, note), []).append(arm.run.arm)
    everybody = [arm.run.arm for arm in arms]
    return sorted(
        f"{title}, {'both arms' if whose == everybody and len(arms) > 1 else ' and '.join(whose)}: "
        f"{note}"
        for (title, note), whose in said.items()
    )


def _score(result: BenchmarkResult | None) -> Cell:
    if result is None or result.score is None:
        why = "not measured" if result is None else result.status
        return Cell(why, kind="missing")
    interval = f"{percent(result.low, 1)} to {percent(result.high, 1)}"
    extra = " (partial)" if result.status == "partial" else ""
    return Cell(f"{percent(result.score)}{extra}", interval)


def _difference(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None or not comparison.benchmarks:
        return None
    rows = list(comparison.benchmarks.values())
    drawn = [_difference_row(row) for row in rows]
    m = comparison.macro
    drawn.append(
        LabelledInterval("macro mean", 100 * m.low, 100 * m.mean, 100 * m.high,
                 f"{points(m.mean)}  {comparison.macro_verdict}")
    )  # fmt: skip
    plot = intervals(
        drawn, title="Difference per benchmark", unit="candidate minus baseline, points",
        marks=(0.0, -100 * min(row.margin for row in rows)),
    )  # fmt: skip
    head = ["benchmark", "difference", "SE", "SE repeats", "SE unpaired", "lost / won", "p (Holm)",
            "p beyond (Holm)", "margin", "verdict", "what would decide"]  # fmt: skip
    cells: list[list[str | Cell]] = [
        [
            row.title,
            Cell(
                points(row.difference.mean),
                f"{points(row.difference.low)} to {points(row.difference.high)}",
            ),
            percent(row.difference.standard_error), percent(row.fixed_error),
            percent(row.unpaired_error), f"{row.lost} / {row.won}", p_text(row.p_value_holm),
            p_text(row.p_beyond_holm), margin_text(row.margin, row.margin_origin),
            Cell(row.verdict, kind="verdict"),
            Cell(what_would_decide(row), kind="wrap"),
        ]
        for row in rows
    ]  # fmt: skip
    table = Table(
        head,
        cells,
        f"Paired by item, in points, with {level_text(comparison)} intervals; errors are clustered "
        "where items share a source. GO: the lower end lies above minus the margin. NO-GO: the "
        "upper end lies below it, corrected for all benchmarks (p beyond). p: of no difference, "
        "exact McNemar or sign flips.",
    )
    remarks = [*format_look(comparison)[1:], *unseen_lines(comparison), *comparison.remarks]
    remarks += [f"{r.title}: {t}" for r in rows for t in (*r.stops, *r.remarks)]
    remarks += [f"{title_of(n)} left out: {why}" for n, why in comparison.left_out.items()]
    return {"plot": plot, "table": table, "remarks": remarks}


def _difference_row(row: BenchmarkComparison) -> LabelledInterval:
    d = row.difference
    note = f"{points(d.mean)}  {row.verdict}"
    return LabelledInterval(row.title, 100 * d.low, 100 * d.mean, 100 * d.high, note)


def _domains(arms: Sequence[Arm]) -> list[tuple[str, Markup]]:
    """Title and plot of each benchmark that has more than one domain."""
    parts = []
    for name in columns(arms):
        drawn = []
        strata = list(
            dict.fromkeys(
                s for arm in arms if name in arm.run.benchmarks
                for s in arm.run.benchmarks[name].by_stratum
            )
        )  # fmt: skip
        if len(strata) < 2:
            continue
        for stratum in strata[:40]:
            for index, arm in enumerate(arms):
                row = arm.run.benchmarks[name].by_stratum.get(stratum)
                if row is None:
                    continue
                label = f"{stratum}" if index == 0 else ""
                counted = f"{int(row['items'])} item{'s' * (row['items'] != 1)}"
                note = f"{100 * row['score']:.0f}  {arm.run.arm}, {counted}"
                kind = "second" if index else ""
                low, mid, high = (100 * row[key] for key in ("low", "score", "high"))
                drawn.append(LabelledInterval(label, low, mid, high, note, kind))
        plot = intervals(
            drawn, title=f"{title_of(name)} by domain", unit="accuracy, percent", marks=(0.0,)
        )
        parts.append((title_of(name), plot))
    return parts


def _causes(arms: Sequence[Arm]) -> dict[str, Any]:
    rows = []
    for name in columns(arms):
        for arm in arms:
            result = arm.run.benchmarks.get(name)
            if result is None or not result.causes:
                continue
            total = sum(result.causes.values())
            members = [(cause, result.causes.get(cause, 0) / total) for cause in _CAUSES]
            rows.append((f"{title_of(name)}, {arm.run.arm}", members))
    plot = shares(rows, title="How attempts ended")
    cells = []
    for arm in arms:
        for result in arm.run.benchmarks.values():
            counted = [str(result.causes.get(cause, 0)) for cause in _CAUSES]
            cells.append([f"{result.title}, {arm.run.arm}", *counted])
    head = ["benchmark", "right", "wrong", "truncated", "unextracted", "empty", "refused",
            "ungraded", "failed"]  # fmt: skip
    return {"plot": plot, "table": Table(head, cells, "Attempts by ending.")}


def _usage(arms: Sequence[Arm]) -> Table | None:
    rows = [
        [f"{title_of(name)}, {arm.run.arm}", *_usage_cells(arm.usage[name])]
        for name in columns(arms)
        for arm in arms
        if name in arm.usage
    ]
    if not rows:
        return None
    head = ["benchmark", "attempts", "prompt tokens", "output tokens", "of it reasoning",
            "output per answer", "wall", "output tokens/s", "latency median", "p90"]  # fmt: skip
    return Table(
        head,
        rows,
        "As the server counted them, answered attempts only. Speed is that of this evaluation "
        "(its concurrency, this machine), not a benchmark of the server.",
    )


def _usage_cells(usage: UseFacts) -> list[str]:
    return [
        f"{usage.attempts:,}", f"{usage.prompt_tokens:,}", f"{usage.completion_tokens:,}",
        f"{usage.reasoning_tokens:,}", f"{usage.mean_completion_tokens:,.0f}",
        f"{usage.wall_s:,.0f} s", f"{usage.tokens_per_s:,.1f}", f"{usage.median_latency_s:.2f} s",
        f"{usage.p90_latency_s:.2f} s",
    ]  # fmt: skip


def _flips(comparison: Comparison) -> list[tuple[str, list[_Flip]]]:
    """Heading and items of each benchmark in which an item changed its score."""
    return [
        (
            f"{row.title}: {row.lost} lost, {row.won} won, {row.unchanged} unchanged",
            [_flip(row.name, flip, comparison) for flip in row.flips],
        )
        for row in comparison.benchmarks.values()
        if row.flips
    ]


def _flip(name: str, flip: Flip, comparison: Comparison) -> _Flip:
    direction = "lost" if flip.change < 0 else "won"
    summary = (
        f"{flip.item_id} {direction} ({points(flip.change, 0)}), {flip.stratum}: "
        f"right {flip.gold[:60]}, {comparison.baseline} "
        f"{_short(flip.baseline_extracted)}, {comparison.candidate} "
        f"{_short(flip.candidate_extracted)}"
    )
    if name in PRIVATE:
        return _Flip(summary, ())
    answers = (
        (comparison.baseline, _tail(flip.baseline_answer)),
        (comparison.candidate, _tail(flip.candidate_answer)),
    )
    return _Flip(summary, answers)


def _short(extracted: str | None) -> str:
    if extracted is None:
        return "none"
    line = " ".join(extracted.split())
    return line if len(line) <= 40 else line[:39] + "…"


def _tail(answer: str) -> str:
    if not answer:
        return "(no answer text)"
    cut = "" if len(answer) <= _ANSWER_CHARS else "…"
    return cut + answer[-_ANSWER_CHARS:]


def _provenance(arm: Arm) -> dict[str, str]:
    run = arm.run
    return {
        "run": run.run_id,
        "record": str(arm.folder / "run.json"),
        "command": run.command,
        "settings": json.dumps(run.settings),
        "judge": json.dumps(run.judge) if run.judge else "none",
        "generated code": json.dumps(run.sandbox) if run.sandbox else "none ran",
        "packages": json.dumps(run.packages),
        "machine": run.machine,
        "started, finished": f"{run.started}, {run.finished}",
        "checkpoint": str(run.checkpoint.get("headers sha256", "not known, only its endpoint")),
    }


def _asked(arm: Arm) -> Table:
    rows: list[list[str | Cell]] = [
        [r.title, r.source, r.licence, r.prompt_id, Cell(r.prompts_sha256[:16], kind="code"),
         r.scorer, str(r.provenance.get("revision") or _compared(r)),
         Cell(_hashes(r), kind="wrap code")]
        for r in arm.run.benchmarks.values()
    ]  # fmt: skip
    head = ["benchmark", "set", "licence", "prompt", "requests sha256", "scored by", "revision",
            "files"]  # fmt: skip
    return Table(head, rows, "What was asked and how it was scored.")


def _compared(result: BenchmarkResult) -> str:
    """Which items they are, where no revision says it."""
    checked = result.provenance.get("checked")
    return f"by content ({checked})" if checked else "none; by hash of the files"


def _hashes(result: BenchmarkResult) -> str:
    found = result.provenance.get("sha256", {})
    return ", ".join(f"{name} {digest[:12]}" for name, digest in found.items())
