"""Errors, intervals, paired comparisons and verdicts from per-item scores; no files, no harness.

Every function takes one number per item (the mean over its repeats), so that repeats of an item
are never counted as independent. Items of one group (a document set, a problem) share luck;
`groups` holds one label per item.
Source: E. Miller, "Adding Error Bars to Evals", arXiv 2411.00640 (clustered errors, pairing,
power); ../shared/reference/evaluations.md section 8.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

Floats = NDArray[np.float64]

# One-sided 95 % plus 80 % power: 1.645 + 0.842. A true difference this many standard errors away
# from the limit is decided four times out of five.
DECISION_Z = 2.487

SMALL_GROUPS = 20  # below this many groups the t interval gets a bootstrap beside it
_NO_ERROR = 1e-12  # a standard error below this is rounding
# A rate that n trials have not shown once lies below this over n: -ln(0.05), and -ln(0.025).
_UNSEEN_ONE_SIDED, _UNSEEN_TWO_SIDED = 3.0, 3.69
_BOOTSTRAP_DRAWS = 10_000
_PERMUTATIONS = 20_000

Verdict = Literal["GO", "NO-GO", "INCONCLUSIVE"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its uncertainty, in the unit of the scores (1.0 = all right).

    low, high  95 % interval, t with num_groups - 1 degrees of freedom
    """

    mean: float
    standard_error: float
    low: float
    high: float
    num_items: int
    num_groups: int


class Interval(NamedTuple):
    """Ends of an interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Decision:
    """A non-inferiority verdict and what it would take to reach one.

    lower_one_sided  lower end of the one-sided 95 % interval of the difference
    items_to_decide  items (at the same repeats) that would decide four times out of five if the
                     true difference were the measured one; None if no number would
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
    if len(groups) != len(x):
        raise ValueError(f"{len(groups)} group labels for {len(x)} items")
    number: dict[Hashable, int] = {}
    index = [number.setdefault(group, len(number)) for group in groups]
    return np.bincount(index, weights=x, minlength=len(number)).astype(np.float64)


def accuracy_interval(
    values: Sequence[float] | Floats, groups: Sequence[Hashable] | None
) -> Estimate:
    """`estimate` for scores in [0, 1]: never an interval of no width, never beyond 0 or 1.

    Where all items agree the sample error is zero and says nothing; the Wilson score interval over
    groups takes its place. Otherwise the t interval is clipped.
    """
    e = estimate(values, groups)
    if e.num_items == 0:
        return e
    if e.standard_error > _NO_ERROR:
        low, high = max(0.0, e.low), min(1.0, e.high)
    else:
        low, high = wilson(e.mean * e.num_groups, e.num_groups)
    return Estimate(e.mean, e.standard_error, low, high, e.num_items, e.num_groups)


def wilson(successes: float, trials: int) -> Interval:
    """Wilson 95 % score interval of a proportion (Wilson 1927)."""
    if trials == 0:
        return Interval(0.0, 1.0)
    z = 1.959964  # two-sided 95 %
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    reach = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / scale
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
) -> Estimate:
    """Candidate minus baseline, item by item: both lists are in the same item order."""
    b, c = np.asarray(baseline, np.float64), np.asarray(candidate, np.float64)
    if b.shape != c.shape:
        raise ValueError(f"{len(b)} baseline items, {len(c)} candidate items")
    e = estimate(c - b, groups)
    if e.num_groups < 2:
        return e
    if e.standard_error < _NO_ERROR:
        # All differences are equal: the sample shows no spread, which n groups make likely for any
        # rate of change below ln(40)/n (two-sided 95 %).
        reach = _UNSEEN_TWO_SIDED / e.num_groups
        e = replace(e, low=e.mean - reach, high=e.mean + reach)
    # Two scores in [0, 1] differ by one at most.
    return replace(e, low=max(-1.0, e.low), high=min(1.0, e.high))


def bootstrap_interval(
    differences: Sequence[float] | Floats, groups: Sequence[Hashable] | None, seed: int = 0
) -> Interval:
    """95 % percentile interval of the mean over resampled groups (10,000 draws, fixed seed)."""
    x = np.asarray(differences, dtype=np.float64)
    sums = _group_sums(x, groups)
    sizes = _group_sums(np.ones_like(x), groups)
    draws = np.random.default_rng(seed).integers(0, len(sums), (_BOOTSTRAP_DRAWS, len(sums)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))


def repeat_noise(
    baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]
) -> float | None:
    """Standard error of the difference with the items taken as fixed: would they do it again?

    One sequence of repeats per item and arm. None when any item has fewer than two repeats.
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
    differences: Sequence[float] | Floats, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> float:
    """Two-sided permutation p value: the sign of each group's difference is as good as random."""
    sums = _group_sums(np.asarray(differences, dtype=np.float64), groups)
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    observed = abs(float(sums.sum()))
    # A flip changes nothing that rounding can show.
    limit = observed - 1e-9 * max(1.0, observed)
    generator = np.random.default_rng(seed)
    hits = drawn = 0
    while drawn < _PERMUTATIONS:
        draws = min(_PERMUTATIONS - drawn, max(1, 2_000_000 // len(sums)))
        signs = generator.integers(0, 2, (draws, len(sums)), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ sums) >= limit).sum())
        drawn += draws
    return (hits + 1) / (drawn + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of several p values."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        worst = max(worst, min(1.0, p_values[name] * (len(ordered) - rank)))
        adjusted[name] = worst
    return adjusted


def macro_difference(differences: Sequence[Estimate]) -> Estimate:
    """Plain mean of the benchmarks' differences; ``SE = sqrt(sum SE_b^2) / count``, normal.

    A benchmark without spread counts with the error that its interval stands for, not with none.
    """
    count = len(differences)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0)
    mean = sum(d.mean for d in differences) / count
    errors = [
        d.standard_error if d.standard_error > _NO_ERROR else (d.high - d.low) / (2 * 1.959964)
        for d in differences
    ]
    error = math.sqrt(sum(e**2 for e in errors)) / count
    reach = 1.959964 * error
    items = sum(d.num_items for d in differences)
    groups = sum(d.num_groups for d in differences)
    return Estimate(mean, error, mean - reach, mean + reach, items, groups)


def decide(
    difference: Estimate, margin: float, *, repeats: int = 1, fixed_error: float | None = None
) -> Decision:
    """Non-inferiority at a margin fixed beforehand; all in the unit of the scores.

    GO            the lower end of the one-sided 95 % interval lies above -margin
    NO-GO         the upper end of the two-sided 95 % interval lies below -margin
    INCONCLUSIVE  neither; "no significant difference" is never a GO

    repeats, fixed_error  how often each item was asked and `repeat_noise`, for the forecast
    """
    error = difference.standard_error
    if math.isnan(error):
        return Decision("INCONCLUSIVE", margin, math.nan, None, None)
    quantile = float(distributions.t.ppf(0.95, difference.num_groups - 1))
    lower = difference.mean - quantile * error
    # Identical arms have no measured error; equality on n items still leaves a rate below 3/n.
    if error < _NO_ERROR:
        lower = difference.mean - _UNSEEN_ONE_SIDED / difference.num_groups
    if lower > -margin:
        return Decision("GO", margin, lower, None, None)
    if difference.high < -margin:
        return Decision("NO-GO", margin, lower, None, None)
    return Decision(
        "INCONCLUSIVE",
        margin,
        lower,
        _items_to_decide(difference, margin),
        _repeats_to_decide(difference, margin, repeats, fixed_error),
    )


def _needed_error(difference: Estimate, margin: float) -> float:
    """The standard error at which this difference would be decided four times out of five."""
    gap = difference.mean + margin
    return gap / DECISION_Z if gap > 0 else -gap / (1.959964 + 0.842)


def _items_to_decide(difference: Estimate, margin: float) -> int | None:
    if difference.standard_error < _NO_ERROR:
        return math.ceil(_UNSEEN_ONE_SIDED / margin) + 1 if margin > 0 else None
    needed = _needed_error(difference, margin)
    if needed <= 0:
        return None
    items = difference.num_items * (difference.standard_error / needed) ** 2
    return math.ceil(items) if items < 1e7 else None


def _repeats_to_decide(
    difference: Estimate, margin: float, repeats: int, fixed_error: float | None
) -> int | None:
    if fixed_error is None or fixed_error < _NO_ERROR:
        return None
    needed = _needed_error(difference, margin)
    between = max(0.0, difference.standard_error**2 - fixed_error**2)
    if needed**2 <= between:
        return None  # the items themselves differ too much; only more items would help
    count = repeats * fixed_error**2 / (needed**2 - between)
    return math.ceil(count) if count < 1e5 else None


def detectable_drop(num_items: int, repeats: int, item_variance: float) -> float:
    """Smallest true drop that is seen 80 % of the time (one-sided 5 %).

    item_variance  mean of p(1-p) over the items, p an item's chance of being answered right
    """
    return DECISION_Z * math.sqrt(2 * item_variance / (num_items * repeats))


def repeats_to_see(drop: float, num_items: int, item_variance: float) -> int:
    """Repeats per arm at which a drop is seen 80 % of the time; the inverse of the above."""
    return max(1, math.ceil(2 * item_variance * (DECISION_Z / drop) ** 2 / num_items))


def item_variance(repeats_by_item: Sequence[Sequence[float]]) -> float | None:
    """Mean unbiased p(1-p) over items with two or more repeats; what a pilot run measures."""
    variances = [float(np.var(r, ddof=1)) for r in repeats_by_item if len(r) > 1]
    return sum(variances) / len(variances) if variances else None
