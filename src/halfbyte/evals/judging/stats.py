"""Errors, intervals, paired comparisons and verdicts from per-item scores; no files, no harness.

Every function takes one number per item (the mean over its repeats), so that repeats of an item
are never counted as independent. Items of one group (a document set, a problem) share luck;
`groups` holds one label per item. The bound behind a verdict is in `bounds`.
Source: E. Miller, "Adding Error Bars to Evals", arXiv 2411.00640 (clustered errors, pairing,
power).
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats as distributions

from halfbyte.evals.judging.bounds import (
    LEVEL,
    Design,
    Floats,
    group_index,
    lower_end,
    pair,
    would_rule_out,
)

POWER_Z = 0.8416  # an outcome this many errors below the expected one is reached 4 times out of 5
_NO_ERROR = 1e-12  # a standard error below this is rounding
_PERMUTATIONS = 20_000
_MOST_ITEMS, _MOST_REPEATS = 10_000_000, 100_000

Verdict = Literal["GO", "NO-GO", "INCONCLUSIVE"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its uncertainty, in the unit of the scores (1.0 = all right).

    low, high  of a score: 95 % interval. Of a difference between arms: the two one-sided bounds
               that verdicts use, each wrong at most 5 % of the time (a 90 % interval)
    """

    mean: float
    standard_error: float
    low: float
    high: float
    num_items: int
    num_groups: int


class Interval(NamedTuple):
    """Lower and upper end of an interval, in the estimate's unit."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A non-inferiority verdict and what it would take to reach one.

    lower_one_sided  lower end of the interval of the difference
    items_to_decide  items (at the same repeats) that would decide four times out of five if the
                     true difference were the measured one; None if the set has not so many
    repeats_to_decide  the same with the items fixed and more repeats; None if none would
    """

    verdict: Verdict
    margin: float
    lower_one_sided: float
    items_to_decide: int | None
    repeats_to_decide: int | None


def estimate(
    values: Sequence[float] | Floats, groups: Sequence[Hashable] | None = None
) -> Estimate:
    """Mean of per-item values with a cluster-robust standard error.

    ``SE^2 = G/(G-1) / n^2 * sum_g (sum_{i in g} (x_i - mean))^2``; with every item its own group
    this is ``var(x, ddof=1)/n``. One group only: the error is unknown, NaN.
    Example: ``estimate([1, 0, 1, 1]).standard_error == 0.25``.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0)
    mean = float(x.mean())
    sums = _group_sums(x - mean, groups)
    num_groups = len(sums)
    if num_groups < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, n, num_groups)
    variance = num_groups / (num_groups - 1) * float(np.square(sums).sum()) / n**2
    error = math.sqrt(variance)
    reach = float(distributions.t.ppf(0.975, num_groups - 1)) * error
    return Estimate(mean, error, mean - reach, mean + reach, n, num_groups)


def _group_sums(x: Floats, groups: Sequence[Hashable] | None) -> Floats:
    if groups is None:
        return x
    return np.bincount(group_index(groups, len(x)), weights=x).astype(np.float64)


def accuracy_interval(
    values: Sequence[float] | Floats, groups: Sequence[Hashable] | None
) -> Estimate:
    """`estimate` for scores in [0, 1] with Wilson's score interval: never of no width, in [0, 1].

    Its trials are as many as would give this error: the items for single answers, fewer where
    groups share luck, more where repeats steady the means; the groups where all items agree, and
    one where there is one group.
    """
    e = estimate(values, groups)
    if e.num_items == 0:
        return e
    x = np.asarray(values, dtype=np.float64)
    trials = float(e.num_groups)
    quantile = float(distributions.norm.ppf(0.975))
    if e.standard_error > _NO_ERROR:
        spread = e.num_groups / (e.num_groups - 1) * e.mean * (1 - e.mean)
        trials = spread / e.standard_error**2
        if len(np.unique(x)) > 2 or e.num_groups < e.num_items:
            # The error was estimated from few means, not implied by the score.
            quantile = float(distributions.t.ppf(0.975, e.num_groups - 1))
    low, high = wilson(e.mean * trials, trials, quantile)
    return Estimate(e.mean, e.standard_error, low, high, e.num_items, e.num_groups)


def wilson(successes: float, trials: float, quantile: float = 1.959964) -> Interval:
    """Wilson score interval of a proportion, 95 % by default (Wilson 1927)."""
    if trials == 0:
        return Interval(0.0, 1.0)
    z = quantile
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    reach = z * math.sqrt(max(0.0, p * (1 - p)) / trials + z * z / (4 * trials**2)) / scale
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def unpaired_difference(
    baseline: Sequence[float] | Floats,
    candidate: Sequence[float] | Floats,
    groups: Sequence[Hashable] | None = None,
) -> Estimate:
    """Candidate minus baseline as if the items were unrelated; for showing what pairing saves."""
    b, c = estimate(baseline, groups), estimate(candidate, groups)
    error = math.hypot(b.standard_error, c.standard_error)
    reach = float(distributions.t.ppf(0.975, b.num_groups + c.num_groups - 2)) * error
    mean = c.mean - b.mean
    return Estimate(mean, error, mean - reach, mean + reach, b.num_items, b.num_groups)


def paired_difference(
    baseline: Sequence[float] | Floats,
    candidate: Sequence[float] | Floats,
    groups: Sequence[Hashable] | None = None,
    *,
    repeats: int = 1,
    level: float = LEVEL,
) -> Estimate:
    """Candidate minus baseline, item by item: both lists are in the same item order.

    repeats    independent answers behind each mean; 1 where repeats are copies of each other
    low, high  the score bounds of `bounds`, each wrong at most `level` of the time
    """
    items = pair(baseline, candidate, groups, draws=repeats)
    e = estimate(np.asarray(candidate, np.float64) - np.asarray(baseline, np.float64), groups)
    low, high = lower_end(items, level), -lower_end(items.swapped(), level)
    return Estimate(e.mean, e.standard_error, low, high, e.num_items, e.num_groups)


def repeat_noise(
    baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]
) -> float | None:
    """Standard error of the difference with the items taken as fixed.

    It says whether the same items would give this difference again. One sequence of repeats per
    item and arm. None when any item has fewer than two repeats.
    """
    if any(len(r) < 2 for arm in (baseline, candidate) for r in arm):
        return None
    variance = sum(float(np.var(r, ddof=1)) / len(r) for arm in (baseline, candidate) for r in arm)
    return math.sqrt(variance) / len(baseline)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p value of the flips: right in the baseline only, in the candidate only.

    For one answer per item only; repeats of an item are not independent (`sign_flip`).
    """
    if lost + won == 0:
        return 1.0
    return float(distributions.binomtest(lost, lost + won, 0.5).pvalue)


def sign_flip(
    differences: Sequence[float] | Floats, groups: Sequence[Hashable] | None = None
) -> float:
    """Two-sided permutation p value: the sign of each group's difference is as good as random."""
    sums = _group_sums(np.asarray(differences, dtype=np.float64), groups)
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    observed = abs(float(sums.sum()))
    # A flip changes nothing that rounding can show.
    limit = observed - 1e-9 * max(1.0, observed)
    generator = np.random.default_rng(0)
    hits = drawn = 0
    while drawn < _PERMUTATIONS:
        draws = min(_PERMUTATIONS - drawn, max(1, 2_000_000 // len(sums)))
        signs = generator.integers(0, 2, (draws, len(sums)), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ sums) >= limit).sum())
        drawn += draws
    return (hits + 1) / (drawn + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust several p values by Holm's step-down rule; the result is by name, too."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        worst = max(worst, min(1.0, p_values[name] * (len(ordered) - rank)))
        adjusted[name] = worst
    return adjusted


def macro_difference(differences: Sequence[Estimate], level: float = LEVEL) -> Estimate:
    """Plain mean of the benchmarks' differences, with bounds of the same level.

    The error of each end is made of the distances that the benchmarks' own ends have from their
    means, in t quantiles, so that a benchmark without spread does not count as certain; the mean's
    quantile has Welch and Satterthwaite's degrees of freedom. One benchmark keeps its interval.
    """
    count = len(differences)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0)
    mean = sum(d.mean for d in differences) / count
    items, groups = sum(d.num_items for d in differences), sum(d.num_groups for d in differences)
    if any(d.num_groups < 2 for d in differences):
        return Estimate(mean, math.nan, math.nan, math.nan, items, groups)
    error = math.sqrt(sum(d.standard_error**2 for d in differences)) / count
    below, below_freedom = _end_error(differences, [d.mean - d.low for d in differences], level)
    above, above_freedom = _end_error(differences, [d.high - d.mean for d in differences], level)
    low = mean - float(distributions.t.ppf(1 - level, below_freedom)) * below
    high = mean + float(distributions.t.ppf(1 - level, above_freedom)) * above
    return Estimate(mean, error, low, high, items, groups)


def macro_p_beyond(differences: Sequence[Estimate], margin: float, level: float = LEVEL) -> float:
    """One-sided p value of a mean loss beyond the margin; NaN where it is not known.

    level  that of the differences' intervals
    """
    macro = macro_difference(differences, level)
    if math.isnan(macro.high):
        return math.nan
    error, freedom = _end_error(differences, [d.high - d.mean for d in differences], level)
    return float(distributions.t.cdf((macro.mean + margin) / error, freedom))


def _end_error(
    differences: Sequence[Estimate], reaches: Sequence[float], level: float
) -> tuple[float, float]:
    """Error of the mean's one end and its degrees of freedom."""
    freedom = [d.num_groups - 1 for d in differences]
    # An end that was clipped at the largest possible difference still has a reach.
    errors = [
        max(reach, 1e-9) / float(distributions.t.ppf(1 - level, f))
        for reach, f in zip(reaches, freedom, strict=True)
    ]
    total = sum(e**2 for e in errors)
    fourth = sum(e**4 / f for e, f in zip(errors, freedom, strict=True))
    return math.sqrt(total) / len(errors), total**2 / fourth


def decide(
    difference: Estimate,
    margin: float,
    *,
    repeats: int = 1,
    fixed_error: float | None = None,
    full_items: int | None = None,
    level: float = LEVEL,
) -> Decision:
    """Non-inferiority at a margin fixed beforehand; all in the unit of the scores.

    GO            the lower end of the interval lies above -margin
    NO-GO         its upper end lies below -margin (several benchmarks: see `compare`)
    INCONCLUSIVE  neither; "no significant difference" is never a GO

    repeats, fixed_error  how often each item was asked and `repeat_noise`, for the forecast
    full_items            items that the whole set has; None: as many as one likes
    level                 of the next look, for the forecast
    """
    lower = difference.low
    if math.isnan(lower) or math.isnan(difference.high):
        return Decision("INCONCLUSIVE", margin, math.nan, None, None)
    if lower > -margin:
        return Decision("GO", margin, lower, None, None)
    if difference.high < -margin:
        return Decision("NO-GO", margin, lower, None, None)
    return Decision(
        "INCONCLUSIVE",
        margin,
        lower,
        _items_to_decide(difference, margin, repeats, full_items or _MOST_ITEMS, level),
        _repeats_to_decide(difference, margin, repeats, fixed_error, level),
    )


def is_decided(mean: float, error: float, design: Design, margin: float, level: float) -> bool:
    """Whether arms with this true difference get GO or NO-GO at least four times out of five."""
    if mean > -margin:
        measured, limit = mean - POWER_Z * error, margin
    else:
        measured, limit = -mean - POWER_Z * error, -margin
    return bool(would_rule_out(np.array([measured]), np.array([error]), design, limit, level)[0])


def _items_to_decide(
    d: Estimate, margin: float, repeats: int, full_items: int, level: float
) -> int | None:
    """Groups grow in number, not in size."""

    def decides(items: int) -> bool:
        design = Design(items, d.num_groups * items / d.num_items, repeats)
        error = d.standard_error * math.sqrt(d.num_items / items)
        return is_decided(d.mean, error, design, margin, level)

    return smallest(decides, d.num_items, min(full_items, _MOST_ITEMS))


def _repeats_to_decide(
    d: Estimate, margin: float, repeats: int, fixed_error: float | None, level: float
) -> int | None:
    if fixed_error is None or fixed_error < _NO_ERROR:
        return None
    # What the items themselves differ by is not reduced by asking them again.
    between = max(0.0, d.standard_error**2 - fixed_error**2)

    def decides(count: int) -> bool:
        error = math.sqrt(between + fixed_error**2 * repeats / count)
        design = Design(d.num_items, d.num_groups, count)
        return is_decided(d.mean, error, design, margin, level)

    return smallest(decides, 0, _MOST_REPEATS)


def smallest(decides: Callable[[int], bool], above: int, last: int) -> int | None:
    """The smallest count in (above, last] that decides, supposing that all larger ones do."""
    if last <= above or not decides(last):
        return None
    low, high = above, last
    while high - low > 1:
        middle = (low + high) // 2
        if decides(middle):
            high = middle
        else:
            low = middle
    return high


def item_variance(repeats_by_item: Sequence[Sequence[float]]) -> float | None:
    """Mean unbiased p(1-p) over items with two or more repeats; what a pilot run measures."""
    variances = [float(np.var(r, ddof=1)) for r in repeats_by_item if len(r) > 1]
    return sum(variances) / len(variances) if variances else None
