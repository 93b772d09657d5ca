"""Runs and comparisons as text for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.evals.judging.comparison import BenchmarkComparison, Comparison
from halfbyte.evals.records import BenchmarkResult, RunRecord
from halfbyte.evals.tasks.suite import BENCHMARKS
from halfbyte.printable import columns


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first to the left, the others to the right."""
    return "\n".join(columns(rows))


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
    """Format a difference in percentage points, with its sign."""
    return "-" if value != value else f"{100 * value:+.{digits}f}"


def why_inconclusive(row: BenchmarkComparison) -> str:
    """Why a comparison is inconclusive: blocked, a loss of unknown size, or nothing shown."""
    if row.reason == "blocked":
        return "blocked: " + "; ".join([*row.blockers, *row.stops])
    if row.reason == "loss shown":
        text = "a loss is shown, but not whether it is beyond the margin"
        if row.difference.high < -row.margin:
            text = "a loss is shown, beyond the margin were this the only look, not for all of them"
        return text
    if row.reason == "too wide":
        return "the interval is too wide: neither equality nor a loss has been shown"
    return ""


def what_would_decide(row: BenchmarkComparison) -> str:
    """Why a comparison is inconclusive, and how many items or repeats would settle it."""
    if row.verdict != "INCONCLUSIVE":
        return ""
    why = why_inconclusive(row)
    if row.reason == "blocked" or row.difference.high < -row.margin:
        return why
    ways = []
    if row.items_to_decide is not None:
        unchanged = " without a change" if row.lost + row.won == 0 else ""
        ways.append(f"{row.items_to_decide:,} items{unchanged}")
    if row.repeats_to_decide is not None:
        ways.append(f"{row.repeats_to_decide:,} fresh repeats")
    if ways:
        return f"{why}; {' or '.join(ways)} would decide"
    known = BENCHMARKS.get(row.name)
    if known is not None and known.is_generated:
        return f"{why}; no number of repeats or items would decide"
    return f"{why}; no number of repeats, nor of the set's {row.full_items:,} items, would decide"


def format_look(comparison: Comparison) -> list[str]:
    """Which look this was and which intervals that gives; what another one would need."""
    look = comparison.look
    lines = [
        f"D [{level_text(comparison)}]: each end is wrong at most {100 * look.level:g} % of the "
        "time. GO: the lower end lies above minus the margin, NO-GO: the upper end below it, "
        "corrected for all benchmarks."
    ]
    if look.planned > 1:
        lines.append(f"Look {look.number} of {look.planned} planned ones.")
    elif look.number > 1:
        lines.append(
            f"Look {look.number}, not planned from the start: fresh repeats alone, at "
            f"{100 * look.level:g} %."
        )
    if comparison.verdict == "INCONCLUSIVE":
        if look.next_level is None:
            lines.append("There is no further look at these arms.")
        elif look.planned == 1:
            lines.append(
                "A second look needs fresh repeats of both arms (evaluate --seed-shift, then "
                "compare-evals --after this comparison's file); more of the same would err more "
                "often than it says."
            )
    return lines


def format_comparison(comparison: Comparison) -> str:
    """Format a comparison as a table in percentage points."""
    rows = [["benchmark", "baseline", "candidate", f"D [{level_text(comparison)}]", "SE",
             "lost/won", "p (Holm)", "p beyond (Holm)", "margin", "verdict"]]  # fmt: skip
    for row in comparison.benchmarks.values():
        d = row.difference
        rows.append(
            [
                row.title, percent(row.baseline), percent(row.candidate),
                f"{points(d.mean)} [{points(d.low)}, {points(d.high)}]",
                percent(d.standard_error), f"{row.lost}/{row.won}", p_text(row.p_value_holm),
                p_text(row.p_beyond_holm), margin_text(row.margin, row.margin_origin), row.verdict,
            ]
        )  # fmt: skip
    m = comparison.macro
    macro = f"{points(m.mean)} [{points(m.low)}, {points(m.high)}]"
    rows.append(
        ["macro mean", "", "", macro, percent(m.standard_error), "", "",
         p_text(comparison.macro_p_beyond_holm),
         margin_text(comparison.macro_margin, comparison.macro_margin_origin),
         comparison.macro_verdict]
    )  # fmt: skip
    lines = [f"{comparison.candidate} against {comparison.baseline} (points)", table(rows)]
    for row in comparison.benchmarks.values():
        stops = [] if row.reason == "blocked" else row.stops
        notes = [note for note in (what_would_decide(row), *stops, *row.remarks) if note]
        lines += [f"{row.title}: {note}" for note in notes]
    lines += [f"{name} left out: {why}" for name, why in comparison.left_out.items()]
    lines += [*unseen_lines(comparison), *format_look(comparison), *comparison.remarks]
    if about := a_a(comparison):
        lines.append(f"This is {about}.")
    lines.append(f"verdict: {comparison.verdict}{conclusion(comparison)}")
    return "\n".join(lines)


def level_text(comparison: Comparison) -> str:
    """The confidence of the intervals of a comparison."""
    return f"{100 * (1 - 2 * comparison.look.level):g} %"


def p_text(value: float) -> str:
    """A p value, a dash where it is not known."""
    return "-" if value != value else f"{value:.3f}"


def margin_text(margin: float, origin: str) -> str:
    """A margin in points, and where it came from unless it is the benchmark's own."""
    return percent(margin, 1) + ("" if origin == "default" else f" ({origin})")


def unseen_lines(comparison: Comparison) -> list[str]:
    """Which sets are too small to hold a rare loss, whatever their repeats."""
    small = [
        f"{100 * row.unseen_share:.1f} % ({row.title}, {row.difference.num_groups:,})"
        for row in comparison.benchmarks.values()
        if row.unseen_share > row.margin
    ]
    if not small:
        return []
    return [
        "Verdicts suppose that a loss is spread over many items. One that sits on few may be "
        "missing from a small set, however often it is asked: on up to " + ", ".join(small) + " of "
        "items (or groups) of that kind."
    ]


def conclusion(comparison: Comparison) -> str:
    """What the verdict of the whole rests on, to be set behind it."""
    if comparison.verdict != "INCONCLUSIVE":
        return ""
    rows = comparison.benchmarks.values()
    if comparison.reason == "blocked":
        names = [row.title for row in rows if row.reason == "blocked"]
        names += [name for name in comparison.left_out if name not in comparison.not_asked]
        return f" (blocked by {', '.join(names)})" if names else " (nothing could be compared)"
    about = ", ".join(undecided(comparison))
    if comparison.reason == "loss shown":
        return f" (a loss is shown on {about}, not whether it is beyond the margin)"
    return f" (neither equality nor a loss has been shown on {about})"


def undecided(comparison: Comparison) -> list[str]:
    """What the reason of an INCONCLUSIVE whole is about: benchmarks, or their mean."""
    reason = comparison.reason
    names = [row.title for row in comparison.benchmarks.values() if row.reason == reason]
    is_shown = comparison.macro.high < 0
    if comparison.macro_verdict == "INCONCLUSIVE" and is_shown == (reason == "loss shown"):
        names += ["the mean"] if len(comparison.benchmarks) > 1 or not names else []
    return names


def a_a(comparison: Comparison) -> str | None:
    """What a comparison of a checkpoint with itself shows; None for others."""
    if not comparison.is_a_a:
        return None
    if len(set(comparison.seed_shifts)) == 1:
        return (
            "an A/A run with the same seeds in both arms: it shows what the server itself adds, "
            "and nothing of what answers drawn anew would (--seed-shift in one arm does)"
        )
    return "an A/A run, which shows the noise floor"
