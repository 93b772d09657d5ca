"""The rule behind GO and NO-GO: how large a loss do the paired scores rule out?

Works on sums of differences by group. `stats` makes intervals and verdicts of it, `compare`
applies them to two runs, `plan` to arms that do not exist yet.

The bound is a score bound: the variance is the one that the loss under test would cause, not the
one that happened to be seen, so that few changes never pass for certainty. For single answers it
is Tango's (Statist. Med. 17, 891, 1998) for small rates, written in the mean and the sum of
squares of the differences, which makes it one formula for repeats and groups as well:

    x = sum of differences + items * margin      V = sum over groups of (differences + margin)^2
    variance under test = V/2 + sqrt(V^2/4 + unit^2 * items * margin * x)
    GO at the level whose t quantile is q:   x^2 > q^2 V + q^4 unit^2 * items * margin / x

`unit` is the change that one flip makes. Three things keep a verdict from hanging on one answer:
a fifth of a flip is taken off as a correction for counts, the largest gain counts one flip less,
and gains are capped where a larger one would only add noise. The bound is monotone: a better answer
never lowers it.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions
from scipy.optimize import brentq

Floats = NDArray[np.float64]

LEVEL = 0.05  # the chance that a candidate which loses exactly the margin ends GO
# Counts of lost answers move in whole flips: with this share of a flip taken off, the bound for
# losses alone keeps the exact Poisson level for any count (no loss seen: items * margin > 3.1).
_CORRECTION = 0.2
_LARGEST_QUANTILE = 10.0


@dataclass(frozen=True, slots=True)
class PairedItems:
    """Candidate minus baseline, summed over the items of each group.

    sums   in scores, (groups,); sizes  items of each group, (groups,)
    unit   the change of a sum that one flip makes: 1 for single answers, 1/k where items were asked
           k times; for groups it is a whole group that flips in one repeat
    """

    sums: Floats
    sizes: Floats
    unit: float

    @property
    def num_items(self) -> float:
        """Number of items in all groups together, as a float."""
        return float(self.sizes.sum())

    def swapped(self) -> "PairedItems":
        """The same differences with the arms swapped: baseline minus candidate."""
        return PairedItems(-self.sums, self.sizes, self.unit)


def group_index(groups: Sequence[Hashable] | None, count: int) -> NDArray[np.intp]:
    """The number of each item's group, in order of appearance; no labels: each its own."""
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} group labels for {count} items")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups], dtype=np.intp)


def pair(
    baseline: Sequence[float] | Floats,
    candidate: Sequence[float] | Floats,
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = 1,
) -> PairedItems:
    """Differences of the items' means, both lists in one order.

    draws  independent answers behind each mean: the repeats, or 1 where they are copies
    """
    b, c = np.asarray(baseline, np.float64), np.asarray(candidate, np.float64)
    if b.shape != c.shape:
        raise ValueError(f"{len(b)} baseline items, {len(c)} candidate items")
    index = group_index(groups, len(b))
    sums = np.bincount(index, weights=c - b).astype(np.float64)
    sizes = np.bincount(index).astype(np.float64)
    unit = float(np.square(sizes).sum() / max(1, len(b))) / draws
    return PairedItems(sums, sizes, unit)


def rules_out_loss(items: PairedItems, margin: float, level: float = LEVEL) -> bool:
    """Whether a loss of the margin or more is ruled out at a one-sided level.

    A negative margin asks whether a gain of its size is shown. Fewer than two groups: never.
    """
    groups = len(items.sums)
    if groups < 2:
        return False
    q2 = _about_the_margin(float(distributions.t.ppf(1 - level, groups - 1)), groups)
    if _excess(items, margin, q2) > 0:
        return True
    # Where no loss at all is left, none of any size is: few flips suffice to show a gain.
    return margin > 0 and float(items.sums.sum()) > 0 and _excess(items, 0.0, q2) > 0


def _about_the_margin(quantile: float, groups: float) -> float:
    """The square of a t quantile for sums of squares about the margin instead of the mean."""
    return groups * quantile**2 / (groups - 1 + quantile**2)


def _excess(items: PairedItems, margin: float, q2: float) -> float:
    """How far the squared sum exceeds what the level asks for, with the best cap on gains.

    The better of two ways to doubt gains: none counts at all, or the largest value counts one flip
    less. Each by itself never falls when a sum rises, so neither does the better one; and a single
    flip of gain is worth nothing in either. (To take the flip off the group with the largest gain
    would be neither: its place changes between groups of unequal sizes.)
    """
    constant = q2 * q2 * items.unit**2 * max(0.0, items.num_items * margin)
    correction = _CORRECTION * items.unit
    unchanged = items.sizes * margin
    found = _best_cap(np.minimum(items.sums, 0.0) + unchanged, correction, constant, q2)
    if (items.sums <= 0).all():
        return found
    values = np.sort(items.sums + unchanged)[::-1]
    # In groups of unequal sizes the largest value may be large by its size alone.
    least = float(unchanged.min())
    one_flip_less = values[0] - items.unit - (float(unchanged.max()) - least)
    values[0] = min(values[0], max(least, one_flip_less))
    return max(found, _best_cap(values, correction, constant, q2))


def _best_cap(values: Floats, correction: float, constant: float, q2: float) -> float:
    """The largest excess over all caps on the values.

    It is the largest over all data that are no better (of those with one sum, the capped ones have
    the smallest squares), so that it never falls when a value rises.
    """
    y = np.sort(values)[::-1]
    # Position j - 1 has the j largest set to the j-th: x and V of every cap at a value that occurs.
    count = np.arange(1, len(y) + 1)
    rest = y.sum() - np.cumsum(y) - correction
    rest_squares = np.square(y).sum() - np.cumsum(np.square(y))
    x = rest + count * y
    found = -math.inf
    is_above = x > 0
    if is_above.any():
        x, squares = x[is_above], (rest_squares + count * np.square(y))[is_above]
        found = float((x * x - q2 * squares - constant / x).max())
    # Between two such values the best cap lies inside only while fewer than q2 groups are capped.
    for j in range(1, min(len(y), math.ceil(q2))):
        if y[j - 1] > y[j]:
            found = max(found, _between(y[j - 1], y[j], rest[j - 1], rest_squares[j - 1], j, q2,
                                        constant))  # fmt: skip
    return found


def _between(
    high: float, low: float, rest: float, squares: float, count: int, q2: float, constant: float
) -> float:
    """The largest excess with `count` groups capped at one value between low and high."""
    ratio = q2 / count

    def slope(x: float) -> float:
        """The excess is concave here; this has the sign of its derivative."""
        return 2 * (1 - ratio) * x**3 + 2 * ratio * rest * x**2 + constant

    first, last = max(1e-12, rest + count * low), rest + count * high
    if last <= first or slope(first) <= 0 or slope(last) >= 0:
        return -math.inf  # the best cap is one of the two values
    x = float(brentq(slope, first, last, xtol=1e-12))
    cap = (x - rest) / count
    return x * x - q2 * (squares + count * cap * cap) - constant / x


def lower_end(items: PairedItems, level: float = LEVEL) -> float:
    """The largest loss that is not ruled out, as a difference: the lower end of the interval.

    NaN for fewer than two groups.
    """
    if len(items.sums) < 2:
        return math.nan
    low, high = -1.0, 1.0  # differences of scores in [0, 1]
    if not rules_out_loss(items, 1.0, level):
        return low
    for _ in range(40):
        middle = (low + high) / 2
        if rules_out_loss(items, -middle, level):
            low = middle
        else:
            high = middle
    return low


def p_beyond(items: PairedItems, margin: float) -> float:
    """One-sided p value of a loss beyond the margin: small says the loss is larger than it.

    NaN for fewer than two groups.
    """
    groups = len(items.sums)
    if groups < 2:
        return math.nan
    backwards = items.swapped()
    low, high = 0.0, _LARGEST_QUANTILE  # the largest quantile at which the loss still shows
    if _excess(backwards, -margin, 0.0) <= 0:
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _excess(backwards, -margin, _about_the_margin(middle, groups)) > 0:
            low = middle
        else:
            high = middle
    return float(distributions.t.sf(low, groups - 1))


def unseen_share(groups: int) -> float:
    """The largest share of items like these of which the set may hold none, one time in twenty.

    A loss that sits on fewer items than that cannot be excluded by any number of repeats.
    Example: 30 items: 9.5 %.
    """
    return 1.0 - LEVEL ** (1.0 / groups) if groups else 1.0


# --- Arms that do not exist yet: the same rule on a mean and an error. ---


@dataclass(frozen=True, slots=True)
class Design:
    """What a comparison will have: items, groups (= items if alone) and draws of each item.

    uneven  size of the group that an item is in on average, by the mean size of the groups
    """

    items: float
    groups: float
    draws: int = 1
    uneven: float = 1.0

    @property
    def unit(self) -> float:
        """The change of the sum that one flip makes."""
        return self.uneven * self.items / self.groups / self.draws


def would_rule_out(
    means: NDArray[np.float64],
    errors: NDArray[np.float64],
    design: Design,
    margin: float,
    level: float = LEVEL,
) -> NDArray[np.bool_]:
    """`rules_out_loss` for measured differences of these means and standard errors."""
    n, groups, unit = design.items, design.groups, design.unit
    q2 = _about_the_margin(float(distributions.t.ppf(1 - level, max(1.0, groups - 1))), groups)
    # One flip of gain does not count, and where there is noise there are gains.
    x = n * (means + margin) - (1 + _CORRECTION) * unit
    squares = np.square(n * errors) * (groups - 1) / groups + x * x / groups
    constant = q2 * q2 * unit**2 * max(0.0, n * margin)
    with np.errstate(divide="ignore"):
        passes: NDArray[np.bool_] = (x > 0) & (x * x > q2 * squares + constant / np.abs(x))
    return passes
