"""What a comparison of two runs is: its types, and the file it is kept in."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from halfbyte.evals.judging.looks import Look
from halfbyte.evals.judging.stats import Estimate, Verdict
from halfbyte.files import write_json

# Why an INCONCLUSIVE is one: no verdict may be read; a loss is shown, but not whether it is beyond
# the margin; the interval holds both no loss and one beyond the margin.
Reason = Literal["", "blocked", "loss shown", "too wide"]


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

    difference        paired, clustered; its ends are those that the verdict uses; `fixed_error` is
                      the part of the error that repeats alone explain
    unpaired_error    what the error would be without pairing
    p_value           of no difference, two-sided: exact McNemar on single answers that stand
                      alone, else sign flips of items or groups; Holm beside it
    p_beyond          of a loss no larger than the margin, one-sided; NO-GO needs Holm's below the
                      level
    lost, won         items right in the baseline only, in the candidate only (single answers);
                      with repeats, items whose mean fell or rose
    reason            why it is INCONCLUSIVE; `blockers` and `stops` (of a GO only) say what blocks
    unseen_share      share of items of this kind of which the set may hold none (`bounds`)
    """

    name: str
    title: str
    baseline: float
    candidate: float
    items: int
    repeats: int
    difference: Estimate
    fixed_error: float | None
    unpaired_error: float
    test: str
    p_value: float
    p_value_holm: float
    lost: int
    won: int
    unchanged: int
    p_beyond: float
    p_beyond_holm: float
    verdict: Verdict
    reason: Reason
    margin: float
    margin_origin: str
    lower_one_sided: float
    items_to_decide: int | None
    repeats_to_decide: int | None
    full_items: int
    unseen_share: float
    by_stratum: Mapping[str, Mapping[str, float | None]]
    flips: Sequence[Flip]
    blockers: Sequence[str]
    stops: Sequence[str]
    remarks: Sequence[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs compared; `verdict` is over all benchmarks and the macro mean.

    left_out  benchmarks that were not compared, with the reason; `not_asked` names those of them
              that neither arm was asked
    macro     over the benchmarks that nothing blocks
    reason    why the whole is INCONCLUSIVE: blocked comes before a loss, a loss before too wide
    margins   of every benchmark compared and of the macro mean
    """

    baseline: str
    candidate: str
    baseline_run: str
    candidate_run: str
    is_a_a: bool
    seed_shifts: Sequence[int]
    look: Look
    benchmarks: Mapping[str, BenchmarkComparison]
    left_out: Mapping[str, str]
    not_asked: Sequence[str]
    macro: Estimate
    macro_p_beyond_holm: float
    macro_verdict: Verdict
    macro_margin: float
    macro_margin_origin: str
    margins: Mapping[str, float]
    verdict: Verdict
    reason: Reason
    remarks: Sequence[str]


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write a comparison as JSON, whole or not at all; NaN becomes null."""
    write_json(path, _without_nan(asdict(comparison)))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(member) for member in value]
    return value
