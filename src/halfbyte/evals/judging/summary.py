"""From graded records to the numbers of a benchmark; the same code for a run and for a regrade."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halfbyte.evals.judging.stats import accuracy_interval, item_variance
from halfbyte.evals.records import BenchmarkResult, GradedAttempt
from halfbyte.evals.tasks import bfcl
from halfbyte.evals.types import MISSING_CAUSES


def scores_by_item(records: Iterable[GradedAttempt]) -> dict[str, list[float]]:
    """Scores of each item in order of repeats; missing attempts are left out."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        if record.score is not None:
            found[record.item_id].append((record.repeat, record.score))
    return {item: [score for _, score in sorted(pairs)] for item, pairs in found.items()}


def summarise(
    identity: Mapping[str, Any],
    records: Sequence[GradedAttempt],
    *,
    expected: Sequence[tuple[str, int]],
    partial: bool,
    has_groups: bool,
    wall_s: float,
) -> BenchmarkResult:
    """Sum up the graded records of one benchmark.

    identity  the fields of BenchmarkResult that do not depend on answers
    records   one per (item, repeat), the last of each
    expected  every (item, repeat) that the run was to ask
    partial   print a score although attempts are missing
    """
    known = {(r.item_id, r.repeat): r for r in records}
    missing = [
        (item, repeat, _why(known.get((item, repeat))))
        for item, repeat in expected
        if (item, repeat) not in known or known[item, repeat].cause in MISSING_CAUSES
    ]
    scored = scores_by_item(records)
    means = {item: sum(values) / len(values) for item, values in scored.items()}
    groups = {r.item_id: r.group for r in records} if has_groups else None
    items = sorted(means)
    result = accuracy_interval(
        [means[i] for i in items], [groups[i] for i in items] if groups else None
    )
    refused = [r for r in records if r.cause == "refused"]
    status, reason = "complete", ""
    if records and len(refused) == len(records):
        # A model that was never asked has not been measured, however many refusals were counted.
        status, reason = "not measured", f"the server refused every request: {refused[0].error}"
    elif missing:
        status = "partial" if partial and means else "incomplete"
        reason = _missing_reason(missing, len(expected))
    has_score = status in ("complete", "partial") and bool(means)
    return BenchmarkResult(
        **identity,
        status=status,
        reason=reason,
        items=len({item for item, _ in expected}),
        repeats=len({repeat for _, repeat in expected}),
        score=result.mean if has_score else None,
        standard_error=result.standard_error if has_score else None,
        low=result.low if has_score else None,
        high=result.high if has_score else None,
        groups=result.num_groups,
        causes=dict(Counter(record.cause for record in records)),
        missing=missing[:1000],
        by_stratum=_strata(records, means, groups),
        metrics=_metrics(records, scored),
        prompt_tokens=sum(r.prompt_tokens for r in records),
        completion_tokens=sum(r.completion_tokens for r in records),
        reasoning_tokens=sum(r.reasoning_tokens for r in records),
        wall_s=wall_s,
    )


def _why(record: GradedAttempt | None) -> str:
    if record is None:
        return "not asked"
    reason = record.details.get("reason")
    return record.error or (f"{record.cause}: {reason}" if reason else record.cause)


def _missing_reason(missing: Sequence[tuple[str, int, str]], expected: int) -> str:
    """How many attempts are missing and why, the most frequent reason first."""
    why = Counter(text for _, _, text in missing)
    shown = "; ".join(f"{count} {text[:200]}" for text, count in why.most_common(3))
    more = f"; {len(why) - 3} more reasons" if len(why) > 3 else ""
    return f"{len(missing)} of {expected} attempts are missing ({shown}{more})"


def _strata(
    records: Sequence[GradedAttempt], means: Mapping[str, float], groups: Mapping[str, str] | None
) -> dict[str, dict[str, float]]:
    members: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.item_id in means:
            members[record.stratum].add(record.item_id)
    table = {}
    for stratum, found in sorted(members.items()):
        items = sorted(found)
        labels = None if groups is None else [groups[i] for i in items]
        values = accuracy_interval([means[i] for i in items], labels)
        table[stratum] = {
            "items": len(items), "score": values.mean, "low": values.low, "high": values.high
        }  # fmt: skip
    return table


def _metrics(
    records: Sequence[GradedAttempt], scored: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Numbers beside the score: shares of what went wrong, and what some benchmarks report more."""
    count = len(records)
    if count == 0:
        return {}
    shares: Counter[str] = Counter(record.cause for record in records)
    metrics = {
        f"{cause}_share": shares[cause] / count
        for cause in ("length", "unparsed", "empty", "refused")
    }
    design = _design_factor(records)
    if design is not None:
        metrics["design_factor"] = design
    metrics["retried_attempts"] = float(sum(record.retries > 0 for record in records))
    variance = item_variance(list(scored.values()))
    if variance is not None:
        metrics["item_variance"] = variance
    name = records[0].benchmark
    if name.split("_")[0] == bfcl.NAME:
        averages = bfcl.leaderboard_averages(_by_stratum(records, scored))
        metrics |= {f"leaderboard_{group}": value for group, value in averages.items()}
    if name == "ifbench":
        metrics["prompt_strict"] = (
            sum(bool(r.details.get("prompt_strict")) for r in records) / count
        )
        for kind in ("strict", "loose"):
            verdicts = [v for r in records for v in r.details.get(kind, ())]
            if verdicts:
                metrics[f"instruction_{kind}"] = sum(verdicts) / len(verdicts)
    if name == "aa_lcr":
        metrics["exact_match"] = sum(bool(r.details.get("exact_match")) for r in records) / count
    if name == "scicode":
        problems: dict[tuple[str, int], bool] = defaultdict(lambda: True)
        for record in records:
            problems[record.group, record.repeat] &= record.score == 1.0
        metrics["main_problem_accuracy"] = sum(problems.values()) / len(problems)
    return metrics


def _by_stratum(
    records: Sequence[GradedAttempt], scored: Mapping[str, Sequence[float]]
) -> dict[str, tuple[int, float]]:
    """Number of items and mean score of each stratum."""
    members: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.item_id in scored:
            members[record.stratum].add(record.item_id)
    return {
        stratum: (len(found), sum(sum(scored[i]) / len(scored[i]) for i in found) / len(found))
        for stratum, found in members.items()
    }


def _design_factor(records: Sequence[GradedAttempt]) -> float | None:
    """By how much luck shared within groups widens the standard error; None without repeats.

    Compares, over what a repeat deviates from its item's mean, the square of the groups' sums with
    the sum of squares: 1 where items of a group are independent.
    """
    by_item: dict[str, list[GradedAttempt]] = defaultdict(list)
    for record in records:
        if record.score is not None:
            by_item[record.item_id].append(record)
    sums: dict[tuple[str, int], float] = defaultdict(float)
    squares = 0.0
    for rows in by_item.values():
        mean = sum(row.score or 0.0 for row in rows) / len(rows)
        for row in rows:
            rest = (row.score or 0.0) - mean
            sums[row.group, row.repeat] += rest
            squares += rest * rest
    if squares == 0 or len(sums) == sum(len(rows) for rows in by_item.values()):
        return None
    return max(1.0, math.sqrt(sum(value * value for value in sums.values()) / squares))
