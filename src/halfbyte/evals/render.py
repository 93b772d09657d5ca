"""Runs and comparisons as text for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.evals.compare import BenchmarkComparison, Comparison
from halfbyte.evals.records import BenchmarkResult, RunRecord


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def percent(value: float | None, digits: int = 2) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if value is None or value != value else f"{100 * value:.{digits}f}"


def score_cell(result: BenchmarkResult) -> str:
    """Score with its 95 % interval, or the reason why there is none."""
    if result.score is None:
        return result.status
    return f"{percent(result.score)} [{percent(result.low, 1)}, {percent(result.high, 1)}]"


def format_run(run: RunRecord, file: Path) -> str:
    """The table of one run; `file` is where its record stands."""
    rows = [["benchmark", "score [95 %]", "items", "repeats", "cut", "unextracted", "missing"]]
    rows += [
        [
            result.title,
            score_cell(result),
            str(result.items),
            str(result.repeats),
            percent(result.metrics.get("length_share"), 1),
            percent(result.metrics.get("unparsed_share"), 1),
            str(len(result.missing)),
        ]
        for result in run.benchmarks.values()
    ]
    reasons = [f"{r.title}: {r.reason}" for r in run.benchmarks.values() if r.reason]
    end = f"record: {file} ({run.run_id})"
    return "\n".join([f"{run.arm} ({run.model})", table(rows), *reasons, end])


def points(value: float, digits: int = 2) -> str:
    """A difference in points, signed."""
    return "-" if value != value else f"{100 * value:+.{digits}f}"


def what_would_decide(row: BenchmarkComparison) -> str:
    """How many items or repeats would settle an inconclusive comparison."""
    if row.verdict != "INCONCLUSIVE":
        return ""
    if row.blockers:
        return "; ".join(row.blockers)
    ways = []
    if row.items_to_decide is not None:
        unchanged = " without a change" if row.lost + row.won == 0 else ""
        ways.append(f"{row.items_to_decide:,} items{unchanged}")
    if row.repeats_to_decide is not None:
        ways.append(f"{row.repeats_to_decide:,} repeats")
    if not ways:
        return "no number of items would: the difference lies at the margin"
    return " or ".join(ways) + " would decide"


def format_comparison(comparison: Comparison) -> str:
    """The table of a comparison, in points."""
    rows = [["benchmark", "baseline", "candidate", "D [95 %]", "SE", "lost/won", "p (Holm)",
             "margin", "verdict"]]  # fmt: skip
    for row in comparison.benchmarks.values():
        d = row.difference
        rows.append(
            [
                row.title, percent(row.baseline), percent(row.candidate),
                f"{points(d.mean)} [{points(d.low, 1)}, {points(d.high, 1)}]",
                percent(d.standard_error), f"{row.lost}/{row.won}", f"{row.p_value_holm:.3f}",
                percent(row.margin, 1), row.verdict,
            ]
        )  # fmt: skip
    m = comparison.macro
    macro = f"{points(m.mean)} [{points(m.low, 1)}, {points(m.high, 1)}]"
    error, margin = percent(m.standard_error), percent(comparison.macro_margin, 1)
    rows.append(["macro mean", "", "", macro, error, "", "", margin, comparison.macro_verdict])
    lines = [f"{comparison.candidate} against {comparison.baseline} (points)", table(rows)]
    for row in comparison.benchmarks.values():
        notes = [note for note in (what_would_decide(row), *row.remarks) if note]
        lines += [f"{row.title}: {note}" for note in notes]
    lines += [f"{name} left out: {why}" for name, why in comparison.left_out.items()]
    lines += list(comparison.remarks)
    lines.append(f"verdict: {comparison.verdict}")
    return "\n".join(lines)
