"""What keeps a verdict from being read: answers that are missing, refused or differently ended.

The rules of `compare`, on records alone. A blocker leaves no verdict at all; a stop leaves a
NO-GO, but no GO.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats as distributions

from halfbyte.evals.judging.stats import estimate
from halfbyte.evals.records import BenchmarkResult, GradedAttempt, RunRecord
from halfbyte.evals.tasks.suite import BENCHMARKS

Pairs = Mapping[str, Sequence[tuple[GradedAttempt, GradedAttempt]]]

# How an answer may end besides being right or wrong, and what a reader calls it.
ENDINGS = {
    "length": "cut by the output limit",
    "unparsed": "without an answer that can be read",
    "empty": "empty",
    "refused": "refused by the server",
}
_TOGETHER = "cut, unreadable, empty or refused"
_SHARE_GAP = 0.01
# A gap is chance until it is this unlikely: four endings of seven benchmarks, and all four
# together, are many looks.
_GAP_QUANTILE = 0.995


@dataclass(frozen=True, slots=True)
class Refusals:
    """Shares of the requests that the server refused: questions that were never answered."""

    baseline: float
    candidate: float


def why_left_out(b: BenchmarkResult | None, c: BenchmarkResult | None) -> str:
    """Why a benchmark cannot be compared at all; "" if it can."""
    if b is None or c is None:
        return "only in the " + ("candidate" if b is None else "baseline")
    for side, result in (("baseline", b), ("candidate", c)):
        if result.score is None:
            return f"{side}: {result.status}: {result.reason}"
    if b.prompts_sha256 != c.prompts_sha256 and b.items == c.items:
        return "the rendered requests differ between the arms"
    return ""


def was_asked(b: BenchmarkResult | None, c: BenchmarkResult | None) -> bool:
    """Whether an arm was asked anything, or was to be: absent data in both arms is not."""
    return any(result is not None and (result.items > 0 or result.causes) for result in (b, c))


def blockers(b: BenchmarkResult, c: BenchmarkResult, pairs: Pairs, dropped: int) -> list[str]:
    """Reasons why no verdict may be read; none if it may."""
    found = []
    if dropped:
        found.append(f"{dropped} items are not in both arms with all repeats")
    if b.status != "complete" or c.status != "complete":
        found.append(f"baseline {b.status}, candidate {c.status}")
    if b.repeats != c.repeats:
        found.append(f"{b.repeats} repeats in the baseline, {c.repeats} in the candidate")
    for side, result in (("baseline", b), ("candidate", c)):
        repeats = min(map(len, pairs.values()))
        is_other = len(pairs) != result.items or repeats != min(b.repeats, c.repeats)
        if is_other and not dropped:
            found.append(
                f"the {side}'s run counts {result.items} items x {result.repeats}, its samples "
                f"hold {len(pairs)} x {repeats}"
            )
    if b.name not in BENCHMARKS or not BENCHMARKS[b.name].is_trajectory:
        other = sum(one.prompt_sha256 != two.prompt_sha256 for row in pairs.values()
                    for one, two in row)  # fmt: skip
        if other:
            found.append(f"{other} requests differ between the arms")
    if b.scorer != c.scorer:
        found.append(f"graded by {b.scorer!r} in the baseline, by {c.scorer!r} in the candidate")
    rows = [pair for row in pairs.values() for pair in row]
    if other := sum(one.group != two.group for one, two in rows):
        found.append(f"{other} answers belong to another group of items in the other arm")
    if other := sum(one.gold != two.gold for one, two in rows):
        found.append(f"{other} answers were graded against other gold in the other arm")
    # Not a number is not between them, either.
    if odd := sum(not 0 <= (one.score or 0) <= 1 for pair in rows for one in pair):
        found.append(f"{odd} scores are not between 0 and 1")
    if dict(b.left_out) != dict(c.left_out):
        found.append("the arms leave out different items")
    return found


def refusals(pairs: Pairs) -> Refusals:
    """Share of each arm's attempts that were refused."""
    rows = [pair for row in pairs.values() for pair in row]
    baseline, candidate = (
        sum(pair[side].cause == "refused" for pair in rows) / len(rows) for side in (0, 1)
    )
    return Refusals(baseline, candidate)


def endings_apart(
    pairs: Pairs, items: Sequence[str], groups: Sequence[Hashable] | None
) -> tuple[list[str], list[str]]:
    """Endings whose shares differ by more than a point: those beyond chance, and the others.

    Where none does by itself, all of them together are looked at: small gaps add up.
    """
    beyond: list[str] = []
    chance: list[str] = []
    every = {(cause,): words for cause, words in ENDINGS.items()}
    for causes, words in [*every.items(), (tuple(ENDINGS), _TOGETHER)]:
        if len(causes) > 1 and beyond:
            break
        shares = [
            [sum(pair[side].cause in causes for pair in pairs[i]) / len(pairs[i]) for i in items]
            for side in (0, 1)
        ]
        gap = estimate([y - x for x, y in zip(*shares, strict=True)], groups)
        if abs(gap.mean) <= _SHARE_GAP:
            continue
        b, c = (100 * sum(side) / len(items) for side in shares)
        text = (
            f"{b:.1f} % of the baseline's and {c:.1f} % of the candidate's answers were {words}: "
            "part of the difference may be that"
        )
        reach = math.nan
        if gap.num_groups > 1:
            quantile = float(distributions.t.ppf(_GAP_QUANTILE, gap.num_groups - 1))
            reach = quantile * gap.standard_error
        if not abs(gap.mean) <= reach:
            beyond.append(text)
        elif len(causes) == 1 or not chance:
            chance.append(text)
    return beyond, chance


def remarks_on_runs(b: RunRecord, c: RunRecord) -> list[str]:
    """What a reader should know of two runs that are compared."""
    remarks = ["The baseline is externally unverified: no independent score of it was given."]
    if b.sandbox and c.sandbox and b.sandbox != c.sandbox:
        remarks.append("Generated code ran under different limits or versions in the two arms.")
    for name in dict.fromkeys([*b.packages, *c.packages]):
        one, two = b.packages.get(name), c.packages.get(name)
        if one != two and name != "halfbyte":
            remarks.append(f"{name}: {one} in the baseline, {two} here.")
    return remarks
