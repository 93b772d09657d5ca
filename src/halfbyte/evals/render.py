"""Runs and comparisons as text for a terminal."""

from collections.abc import Sequence
from pathlib import Path

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


def format_run(run: RunRecord, folder: Path) -> str:
    """The table of one run."""
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
    end = f"record: {folder / 'run.json'} ({run.run_id})"
    return "\n".join([f"{run.arm} ({run.model})", table(rows), *reasons, end])
