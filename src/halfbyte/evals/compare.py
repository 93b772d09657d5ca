"""Two runs side by side, item by item: differences with errors, flips, verdicts, guards.

Works on records alone. Source: ../shared/reference/evaluations.md section 8.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evals.config import differing, differing_judges
from halfbyte.evals.records import (
    BenchmarkResult,
    Record,
    RunRecord,
    latest,
    newest,
    read_records,
    read_run,
)
from halfbyte.evals.stats import (
    SMALL_GROUPS,
    Estimate,
    bootstrap_interval,
    decide,
    holm,
    macro_difference,
    mcnemar,
    paired_difference,
    repeat_noise,
    sign_flip,
    unpaired_difference,
)
from halfbyte.evals.tasks.suite import BENCHMARKS

MACRO_MARGIN = 0.01
_LENGTH_SHARE_GAP = 0.01
_UNNAMED_MARGIN = 0.015
_FLIPS_KEPT = 40

# Settings that may differ between arms without changing what is asked.
_IGNORED_SETTINGS = ("repeats", "limit")


@dataclass(frozen=True, slots=True)
class Flip:
    """An item whose score moved; `change` is candidate minus baseline, mean over repeats."""

    item_id: str
    stratum: str
    gold: str
    change: float
    baseline_extracted: str | None
    candidate_extracted: str | None
    baseline_answer: str
    candidate_answer: str


@dataclass(frozen=True, slots=True)
class BenchmarkComparison:
    """Candidate minus baseline on one benchmark; scores in [0, 1].

    difference        paired, clustered; `fixed_error` the part that repeats alone explain
    unpaired_error    what the error would be without pairing
    p_value           exact McNemar on single answers, else sign-flip permutation; Holm beside it
    lost, won         items right in the baseline only, in the candidate only (single answers);
                      with repeats, items whose mean fell or rose
    blockers          why no verdict may be read, empty if it may
    """

    name: str
    title: str
    baseline: float
    candidate: float
    items: int
    repeats: int
    difference: Estimate
    bootstrap: tuple[float, float] | None
    fixed_error: float | None
    unpaired_error: float
    test: str
    p_value: float
    p_value_holm: float
    lost: int
    won: int
    unchanged: int
    verdict: str
    margin: float
    lower_one_sided: float
    items_to_decide: int | None
    repeats_to_decide: int | None
    by_stratum: Mapping[str, Mapping[str, float]]
    flips: Sequence[Flip]
    blockers: Sequence[str]
    remarks: Sequence[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs compared; `verdict` is over all benchmarks and the macro mean."""

    baseline: str
    candidate: str
    baseline_run: str
    candidate_run: str
    is_a_a: bool
    benchmarks: Mapping[str, BenchmarkComparison]
    left_out: Mapping[str, str]
    macro: Estimate
    macro_verdict: str
    macro_margin: float
    verdict: str
    remarks: Sequence[str]


def compare_runs(
    baseline: Path, candidate: Path, margins: Mapping[str, float] | None = None
) -> Comparison:
    """Compare two run folders; margins (benchmark -> score) override the benchmarks' own.

    Raises UsageError if the runs share no benchmark or asked different things.
    """
    b, c = read_run(baseline), read_run(candidate)
    _check_comparable(b, c)
    remarks = _remarks(b, c)
    left_out: dict[str, str] = {}
    compared: dict[str, BenchmarkComparison] = {}
    for name in dict.fromkeys([*b.benchmarks, *c.benchmarks]):
        reason = _why_left_out(b.benchmarks.get(name), c.benchmarks.get(name))
        if reason:
            left_out[name] = reason
            continue
        margin = (margins or {}).get(name, _margin(name))
        compared[name] = _compare_benchmark(
            b.benchmarks[name],
            c.benchmarks[name],
            _records(baseline, name),
            _records(candidate, name),
            margin,
        )
    compared = _with_holm(compared)
    macro = macro_difference([x.difference for x in compared.values()])
    macro_verdict = decide(macro, MACRO_MARGIN).verdict if compared else "INCONCLUSIVE"
    return Comparison(
        baseline=b.arm,
        candidate=c.arm,
        baseline_run=b.run_id,
        candidate_run=c.run_id,
        is_a_a=bool(b.checkpoint) and b.checkpoint == c.checkpoint,
        benchmarks=compared,
        left_out=left_out,
        macro=macro,
        macro_verdict=macro_verdict,
        macro_margin=MACRO_MARGIN,
        verdict=_overall([*(x.verdict for x in compared.values()), macro_verdict]),
        remarks=remarks,
    )


def _margin(name: str) -> float:
    return BENCHMARKS[name].margin if name in BENCHMARKS else _UNNAMED_MARGIN


def _records(folder: Path, name: str) -> dict[tuple[str, int], Record]:
    file = newest(folder / name, "samples", "jsonl")
    if file is None:
        raise UsageError(f"{folder / name}: no samples.jsonl")
    return latest(read_records(file))


def _check_comparable(b: RunRecord, c: RunRecord) -> None:
    def asked(run: RunRecord) -> dict[str, Any]:
        return {k: v for k, v in run.settings.items() if k not in _IGNORED_SETTINGS}

    changed = differing(asked(b), asked(c))
    changed += [f"judge {text}" for text in differing_judges(b.judge or {}, c.judge or {})]
    if changed:
        raise UsageError(f"the runs differ in {'; '.join(changed)}: not compared")


def _remarks(b: RunRecord, c: RunRecord) -> list[str]:
    remarks = ["The baseline is externally unverified: no independent score of it was given."]
    if b.sandbox and c.sandbox and b.sandbox != c.sandbox:
        remarks.append("Generated code ran under different limits or versions in the two arms.")
    for name, value in b.packages.items():
        if c.packages.get(name) != value and name != "halfbyte":
            remarks.append(f"{name}: {value} in the baseline, {c.packages.get(name)} here.")
    return remarks


def _why_left_out(b: BenchmarkResult | None, c: BenchmarkResult | None) -> str:
    if b is None or c is None:
        return "only in the " + ("candidate" if b is None else "baseline")
    for side, result in (("baseline", b), ("candidate", c)):
        if result.score is None:
            return f"{side}: {result.status}: {result.reason}"
    if b.prompts_sha256 != c.prompts_sha256 and b.items == c.items:
        return "the rendered requests differ between the arms"
    return ""


def _compare_benchmark(
    b: BenchmarkResult,
    c: BenchmarkResult,
    b_records: Mapping[tuple[str, int], Record],
    c_records: Mapping[tuple[str, int], Record],
    margin: float,
) -> BenchmarkComparison:
    pairs, dropped = _pairs(b_records, c_records)
    if not pairs:
        raise UsageError(f"{b.title}: the two runs have no item in common")
    items = sorted(pairs)
    b_scores = [[one.score or 0.0 for one, _ in pairs[i]] for i in items]
    c_scores = [[two.score or 0.0 for _, two in pairs[i]] for i in items]
    b_means = [sum(s) / len(s) for s in b_scores]
    c_means = [sum(s) / len(s) for s in c_scores]
    first = [pairs[i][0][0] for i in items]
    known = BENCHMARKS.get(b.name)
    groups = [r.group for r in first] if known is not None and known.has_groups else None
    difference = paired_difference(b_means, c_means, groups)
    changes = [y - x for x, y in zip(b_means, c_means, strict=True)]
    repeats = min(len(s) for s in b_scores)
    fixed = repeat_noise(b_scores, c_scores)
    decision = decide(difference, margin, repeats=repeats, fixed_error=fixed)
    lost, won = sum(d < 0 for d in changes), sum(d > 0 for d in changes)
    is_single = repeats == 1 and {*b_means, *c_means} <= {0.0, 1.0}
    p_value = mcnemar(lost, won) if is_single else sign_flip(changes, groups)
    blockers = _blockers(b, c, dropped)
    return BenchmarkComparison(
        name=b.name,
        title=b.title,
        baseline=sum(b_means) / len(items),
        candidate=sum(c_means) / len(items),
        items=len(items),
        repeats=repeats,
        difference=difference,
        bootstrap=_bootstrap(changes, groups, difference),
        fixed_error=fixed,
        unpaired_error=unpaired_difference(b_means, c_means, groups).standard_error,
        test="exact McNemar on flips" if is_single else "sign-flip permutation",
        p_value=p_value,
        p_value_holm=p_value,
        lost=lost,
        won=won,
        unchanged=len(items) - lost - won,
        verdict="INCONCLUSIVE" if blockers else decision.verdict,
        margin=margin,
        lower_one_sided=decision.lower_one_sided,
        items_to_decide=decision.items_to_decide,
        repeats_to_decide=decision.repeats_to_decide,
        by_stratum=_strata(first, changes),
        flips=_flips(items, pairs, changes),
        blockers=blockers,
        remarks=_benchmark_remarks(b, c, difference, fixed),
    )


def _pairs(
    b: Mapping[tuple[str, int], Record], c: Mapping[tuple[str, int], Record]
) -> tuple[dict[str, list[tuple[Record, Record]]], int]:
    """Items present in both arms with all their repeats scored; how many were left out."""
    repeats = sorted({repeat for _, repeat in b} & {repeat for _, repeat in c})
    names = {item for item, _ in (*b, *c)}
    found: dict[str, list[tuple[Record, Record]]] = {}
    for name in names:
        pair = [(b.get((name, r)), c.get((name, r))) for r in repeats]
        whole = [(x, y) for x, y in pair if x and y and x.score is not None and y.score is not None]
        if repeats and len(whole) == len(repeats):
            found[name] = whole
    return found, len(names) - len(found)


def _blockers(b: BenchmarkResult, c: BenchmarkResult, dropped: int) -> list[str]:
    blockers = []
    if dropped:
        blockers.append(f"{dropped} items are not in both arms with all repeats")
    if b.status != "complete" or c.status != "complete":
        blockers.append(f"baseline {b.status}, candidate {c.status}")
    if b.repeats != c.repeats:
        blockers.append(f"{b.repeats} repeats in the baseline, {c.repeats} in the candidate")
    return blockers


def _benchmark_remarks(
    b: BenchmarkResult, c: BenchmarkResult, difference: Estimate, fixed: float | None
) -> list[str]:
    remarks = []
    cut_b, cut_c = b.metrics.get("length_share", 0.0), c.metrics.get("length_share", 0.0)
    if abs(cut_b - cut_c) > _LENGTH_SHARE_GAP:
        remarks.append(
            f"{100 * cut_b:.1f} % of the baseline's and {100 * cut_c:.1f} % of the candidate's "
            "answers were cut by length: part of the difference may be that"
        )
    if fixed is not None and difference.standard_error > 2 * fixed > 0:
        remarks.append("some items really moved: the error is twice what repeats explain")
    return remarks


def _bootstrap(
    changes: Sequence[float], groups: Sequence[str] | None, difference: Estimate
) -> tuple[float, float] | None:
    if not 1 < difference.num_groups < SMALL_GROUPS:
        return None
    low, high = bootstrap_interval(changes, groups)
    return low, high


def _strata(first: Sequence[Record], changes: Sequence[float]) -> dict[str, dict[str, float]]:
    table: dict[str, list[float]] = {}
    for record, change in zip(first, changes, strict=True):
        table.setdefault(record.stratum, []).append(change)
    rows = {}
    for stratum, values in sorted(table.items()):
        e = paired_difference([0.0] * len(values), values)
        rows[stratum] = {
            "items": len(values), "difference": e.mean, "low": e.low, "high": e.high
        }  # fmt: skip
    return rows


def _flips(
    items: Sequence[str],
    pairs: Mapping[str, Sequence[tuple[Record, Record]]],
    changes: Sequence[float],
) -> list[Flip]:
    """The items that moved most, losses first; with the first repeat in which the arms differ."""
    moved = [(d, i) for d, i in zip(changes, items, strict=True) if d != 0]
    flips = []
    for change, item in sorted(moved, key=lambda pair: (-abs(pair[0]), pair[0], pair[1])):
        one, two = next((x, y) for x, y in pairs[item] if x.score != y.score)
        flips.append(
            Flip(
                item, one.stratum, one.gold, change, one.extracted, two.extracted,
                one.answer, two.answer,
            )
        )  # fmt: skip
    return flips[:_FLIPS_KEPT]


def _with_holm(found: Mapping[str, BenchmarkComparison]) -> dict[str, BenchmarkComparison]:
    adjusted = holm({name: x.p_value for name, x in found.items()})
    rows = {}
    for name, x in found.items():
        row = {field: getattr(x, field) for field in BenchmarkComparison.__dataclass_fields__}
        row["p_value_holm"] = adjusted[name]
        rows[name] = BenchmarkComparison(**row)
    return rows


def _overall(verdicts: Sequence[str]) -> str:
    if "NO-GO" in verdicts:
        return "NO-GO"
    return "GO" if verdicts and all(v == "GO" for v in verdicts) else "INCONCLUSIVE"


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write a comparison as JSON, whole or not at all; NaN becomes null."""
    draft = path.with_suffix(".tmp")
    text = json.dumps(_without_nan(asdict(comparison)), indent=1, ensure_ascii=False)
    draft.write_text(text + "\n")
    os.replace(draft, path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(member) for member in value]
    return value
