"""Two runs side by side, item by item: differences with errors, flips, verdicts, guards.

Works on records alone. What blocks a verdict is in `guards`, margins and further looks in `looks`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evals.config import differing, differing_judges
from halfbyte.evals.judging.bounds import p_beyond, pair, unseen_share
from halfbyte.evals.judging.comparison import BenchmarkComparison, Comparison, Reason
from halfbyte.evals.judging.guards import (
    Refusals,
    blockers,
    endings_apart,
    refusals,
    remarks_on_runs,
    was_asked,
    why_left_out,
)
from halfbyte.evals.judging.looks import (
    MACRO,
    Look,
    Margin,
    check_names,
    first_look,
    margin_of,
    next_look,
    read_comparison,
    seed_shifts,
)
from halfbyte.evals.judging.paired import pair_answers
from halfbyte.evals.judging.stats import (
    Estimate,
    Verdict,
    decide,
    holm,
    macro_difference,
    macro_p_beyond,
    paired_difference,
    repeat_noise,
    unpaired_difference,
)
from halfbyte.evals.records import (
    BenchmarkResult,
    GradedAttempt,
    RunRecord,
    latest,
    newest,
    read_records,
    read_run,
)
from halfbyte.evals.tasks.suite import BENCHMARKS

# Settings that may differ between arms without changing what is asked.
_IGNORED_SETTINGS = ("repeats", "limit", "seed_shift")


def compare_runs(
    baseline: Path,
    candidate: Path,
    margins: Mapping[str, float | Margin] | None = None,
    *,
    looks: int = 1,
    after: Path | None = None,
) -> Comparison:
    """Compare the runs of two folders item by item.

    margins  benchmark (or "macro") -> score, or a `Margin` that says where it came from; they
             override the defaults
    looks    how many looks at these arms are planned in all
    after    JSON of the earlier comparison, where this is a further look

    Raises UsageError if the runs share no benchmark or asked different things, if a margin is
    nobody's, and for a further look that would not be honest (`looks.next_look`).
    """
    b, c = read_run(baseline), read_run(candidate)
    _check_comparable(b, c)
    given = {
        name: value if isinstance(value, Margin) else Margin(value, "flag")
        for name, value in (margins or {}).items()
    }
    names = list(dict.fromkeys([*b.benchmarks, *c.benchmarks]))
    check_names(given, names)
    every_margin = {name: margin_of(name, given) for name in (*names, MACRO)}
    earlier = None if after is None else read_comparison(after)
    look = first_look(looks)
    if after is not None and earlier is not None:
        if looks != 1:
            raise UsageError(
                f"--looks {looks} with --after {after}: how many looks there are was settled with "
                "the first one; leave --looks out"
            )
        look = next_look(after, earlier, every_margin, seed_shifts(b, c))
    left_out, not_asked = _left_out(b, c, earlier)
    compared = {
        name: _compare_benchmark(
            b.benchmarks[name],
            c.benchmarks[name],
            _records(baseline, name),
            _records(candidate, name),
            every_margin[name],
            look,
            draws_repeats=b.settings.get("temperature") != 0,
            graded_apart=_graded_apart(baseline, candidate, name),
        )
        for name in names
        if name not in left_out
    }
    return _concluded(b, c, look, compared, left_out, not_asked, every_margin)


def _left_out(
    b: RunRecord, c: RunRecord, earlier: Mapping[str, Any] | None
) -> tuple[dict[str, str], list[str]]:
    """Benchmarks that cannot be compared, and which of them neither arm was asked."""
    left_out: dict[str, str] = {}
    not_asked = []
    for name in dict.fromkeys([*b.benchmarks, *c.benchmarks]):
        one, two = b.benchmarks.get(name), c.benchmarks.get(name)
        if reason := why_left_out(one, two):
            left_out[name] = reason
            if not was_asked(one, two):
                not_asked.append(name)
    if earlier is not None:
        before = {*earlier["benchmarks"], *earlier["left_out"]} - set(earlier["not_asked"])
        for name in sorted(before - {*b.benchmarks, *c.benchmarks}):
            left_out[name] = "asked at the earlier look, not at this one"
    return left_out, not_asked


def _records(folder: Path, name: str) -> dict[tuple[str, int], GradedAttempt]:
    file = newest(folder / name, "samples", "jsonl")
    if file is None:
        raise UsageError(f"{folder / name} has no samples.jsonl")
    return latest(read_records(file))


def _graded_apart(baseline: Path, candidate: Path, name: str) -> list[str]:
    """What blocks where `halfbyte grade` has gone over one arm alone: its rules may be newer."""
    plain = "samples.jsonl"
    b, c = (getattr(newest(x / name, "samples", "jsonl"), "name", plain) == plain
            for x in (baseline, candidate))  # fmt: skip
    if b == c:
        return []
    one, other = ("candidate", "baseline") if b else ("baseline", "candidate")
    return [f"only the {one} was graded again; run `halfbyte grade` on the {other}, too"]


def _check_comparable(b: RunRecord, c: RunRecord) -> None:
    def asked(run: RunRecord) -> dict[str, Any]:
        return {k: v for k, v in run.settings.items() if k not in _IGNORED_SETTINGS}

    changed = differing(asked(b), asked(c))
    changed += [f"judge {text}" for text in differing_judges(b.judge or {}, c.judge or {})]
    if changed:
        raise UsageError(f"the runs differ in {'; '.join(changed)}: not compared")


def _compare_benchmark(
    b: BenchmarkResult,
    c: BenchmarkResult,
    b_records: Mapping[tuple[str, int], GradedAttempt],
    c_records: Mapping[tuple[str, int], GradedAttempt],
    margin: Margin,
    look: Look,
    *,
    draws_repeats: bool,
    graded_apart: Sequence[str],
) -> BenchmarkComparison:
    """One row, its verdict not yet corrected for the looks at other benchmarks (`_judged`).

    draws_repeats  repeats are answers of their own; at temperature 0 they are copies of one
    graded_apart   blockers: graded by the rules of different days
    """
    paired = pair_answers(b.name, b_records, c_records, draws_repeats=draws_repeats)
    if paired is None:
        raise UsageError(f"{b.title}: the two runs have no item in common")
    b_means, c_means, groups = paired.b_means, paired.c_means, paired.groups
    difference = paired_difference(b_means, c_means, groups, repeats=paired.draws, level=look.level)
    fixed = repeat_noise(paired.b_scores, paired.c_scores) if paired.is_drawn else None
    decision = decide(
        difference,
        margin.value,
        repeats=paired.draws,
        fixed_error=fixed,
        full_items=_most_items(b),
        level=look.next_level or look.level,
    )
    test, p_value = paired.no_difference()
    num_items = len(paired.items)
    beyond = p_beyond(pair(b_means, c_means, groups, draws=paired.draws), margin.value)
    apart, by_chance = endings_apart(paired.answers, paired.items, groups)
    unanswered, remarks = _refused(refusals(paired.answers), difference, margin.value)
    return BenchmarkComparison(
        name=b.name,
        title=b.title,
        baseline=sum(b_means) / num_items,
        candidate=sum(c_means) / num_items,
        items=num_items,
        repeats=paired.repeats,
        difference=difference,
        fixed_error=fixed,
        unpaired_error=unpaired_difference(b_means, c_means, groups).standard_error,
        test=test,
        p_value=p_value,
        p_value_holm=p_value,
        lost=paired.lost,
        won=paired.won,
        unchanged=num_items - paired.lost - paired.won,
        p_beyond=beyond,
        p_beyond_holm=beyond,
        verdict="INCONCLUSIVE",
        reason="",
        margin=margin.value,
        margin_origin=margin.origin,
        lower_one_sided=decision.lower_one_sided,
        items_to_decide=decision.items_to_decide,
        repeats_to_decide=decision.repeats_to_decide,
        full_items=b.full_items,
        unseen_share=unseen_share(difference.num_groups),
        by_stratum=paired.by_stratum(),
        flips=paired.flips(),
        blockers=[*blockers(b, c, paired.answers, paired.num_dropped), *graded_apart, *unanswered],
        stops=apart,
        remarks=[*remarks, *by_chance, *_remarks(b, c, difference, fixed, paired.copied)],
    )


def _most_items(result: BenchmarkResult) -> int | None:
    """Items that a benchmark has in all; None for generated ones, as many as one likes."""
    known = BENCHMARKS.get(result.name)
    return None if known is not None and known.is_generated else result.full_items


def _refused(share: Refusals, difference: Estimate, margin: float) -> tuple[list[str], list[str]]:
    """What refused requests block, or else leave to be said.

    They count as wrong, but were never answered: a verdict stands only if it would with every one
    of them answered the other way.
    """
    if share.baseline == share.candidate == 0:
        return [], []
    text = (
        f"the server refused {100 * share.baseline:.1f} % of the baseline's and "
        f"{100 * share.candidate:.1f} % of the candidate's requests; they count as wrong"
    )
    may_hide = difference.low > -margin >= difference.low - share.baseline
    may_feign = difference.high < -margin <= difference.high + share.candidate
    if may_hide or may_feign:
        return [f"{text}, and the verdict could be another had they been answered"], []
    return [], [text]


def _remarks(
    b: BenchmarkResult,
    c: BenchmarkResult,
    difference: Estimate,
    fixed: float | None,
    copied: Sequence[str],
) -> list[str]:
    remarks = []
    if b.max_tokens != c.max_tokens:
        remarks.append(
            f"at most {b.max_tokens:,} output tokens in the baseline, {c.max_tokens:,} in the "
            "candidate"
        )
    if b.left_out:
        remarks.append(f"{len(b.left_out)} items were asked in neither arm: no grader scores them")
    if fixed is not None and difference.standard_error > 2 * fixed > 0:
        remarks.append("some items really moved: the error is twice what repeats explain")
    if copied:
        remarks.append(
            f"asked again, the server of the {' and the '.join(copied)} gave every answer letter "
            "by letter: the repeats are copies and count once"
        )
    return remarks


def _concluded(
    b: RunRecord,
    c: RunRecord,
    look: Look,
    compared: Mapping[str, BenchmarkComparison],
    left_out: Mapping[str, str],
    not_asked: Sequence[str],
    margins: Mapping[str, Margin],
) -> Comparison:
    """Corrections over all benchmarks, verdicts, and the verdict of the whole."""
    free = {name: row for name, row in compared.items() if not row.blockers}
    differences = [row.difference for row in free.values()]
    macro, macro_margin = macro_difference(differences, look.level), margins[MACRO].value
    macro_p = macro_p_beyond(differences, macro_margin, look.level)
    looked_at = {name: row.p_beyond for name, row in free.items()}
    # The mean of one benchmark is no further look.
    if len(free) > 1:
        looked_at[MACRO] = macro_p
    beyond = holm({name: p for name, p in looked_at.items() if not math.isnan(p)})
    macro_p = beyond.get(MACRO, macro_p)
    equal = holm({name: row.p_value for name, row in compared.items()})
    rows = {
        name: _judged(row, equal[name], beyond.get(name, math.nan), look.level)
        for name, row in compared.items()
    }
    is_whole = bool(free) and len(free) == len(compared) and set(left_out) <= set(not_asked)
    macro_verdict: Verdict = "INCONCLUSIVE"
    if macro_p < look.level and macro.high < -macro_margin:
        macro_verdict = "NO-GO"
    elif is_whole and macro.low > -macro_margin:
        macro_verdict = "GO"
    verdict = _overall([*(x.verdict for x in rows.values()), macro_verdict], is_whole)
    return Comparison(
        baseline=b.arm,
        candidate=c.arm,
        baseline_run=b.run_id,
        candidate_run=c.run_id,
        is_a_a=bool(b.checkpoint) and b.checkpoint == c.checkpoint,
        seed_shifts=seed_shifts(b, c),
        look=look,
        benchmarks=rows,
        left_out=left_out,
        not_asked=not_asked,
        macro=macro,
        macro_p_beyond_holm=macro_p,
        macro_verdict=macro_verdict,
        macro_margin=macro_margin,
        macro_margin_origin=margins[MACRO].origin,
        margins={name: margins[name].value for name in (*compared, MACRO)},
        verdict=verdict,
        reason=_whole_reason(rows, macro, is_whole) if verdict == "INCONCLUSIVE" else "",
        remarks=remarks_on_runs(b, c),
    )


def _judged(
    row: BenchmarkComparison, p_value_holm: float, p_beyond_holm: float, level: float
) -> BenchmarkComparison:
    """The row with its corrected p values, verdict and reason."""
    verdict: Verdict = "INCONCLUSIVE"
    reason: Reason = ""
    d = row.difference
    if not row.blockers:
        if d.low > -row.margin and not row.stops:
            verdict = "GO"
        elif d.high < -row.margin and p_beyond_holm < level:
            verdict = "NO-GO"
    if verdict == "INCONCLUSIVE":
        is_stopped = bool(row.stops) and d.low > -row.margin
        shown: Reason = "loss shown" if d.high < 0 else "too wide"
        reason = "blocked" if row.blockers or is_stopped else shown
    return replace(
        row,
        p_value_holm=p_value_holm,
        p_beyond_holm=p_beyond_holm,
        verdict=verdict,
        reason=reason,
    )


def _whole_reason(
    rows: Mapping[str, BenchmarkComparison], macro: Estimate, is_whole: bool
) -> Reason:
    reasons = {row.reason for row in rows.values()}
    if not is_whole or "blocked" in reasons:
        return "blocked"
    # Many losses that are too small to be shown one by one may show in their mean.
    return "loss shown" if "loss shown" in reasons or macro.high < 0 else "too wide"


def _overall(verdicts: Sequence[Verdict], is_whole: bool) -> Verdict:
    if "NO-GO" in verdicts:
        return "NO-GO"
    return "GO" if is_whole and all(v == "GO" for v in verdicts) else "INCONCLUSIVE"
