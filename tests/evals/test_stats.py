"""Closed forms on small cases, and simulated runs with a known true difference."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from halfbyte.evals.judging.bounds import pair, rules_out_loss
from halfbyte.evals.judging.stats import (
    Estimate,
    accuracy_interval,
    decide,
    estimate,
    holm,
    item_variance,
    macro_difference,
    macro_p_beyond,
    mcnemar,
    paired_difference,
    repeat_noise,
    sign_flip,
    unpaired_difference,
    wilson,
)


def test_standard_error_of_a_small_case() -> None:
    e = estimate([1, 0, 1, 1])
    assert (e.mean, e.standard_error) == (0.75, 0.25)
    assert e.high - e.mean == pytest.approx(3.182446 * 0.25, rel=1e-6)


def test_clusters_of_copies_count_once() -> None:
    # Four items, each copied three times: the error is that of four items, not of twelve.
    values = [1, 0, 1, 1]
    copied = [v for v in values for _ in range(3)]
    groups = [i for i in range(4) for _ in range(3)]
    assert estimate(copied, groups).standard_error == pytest.approx(estimate(values).standard_error)
    assert estimate(copied).standard_error < estimate(values).standard_error


def test_one_group_has_no_error_and_is_never_decided() -> None:
    e = estimate([1, 0, 1], ["a", "a", "a"])
    assert math.isnan(e.standard_error)
    assert decide(e, 0.01).verdict == "INCONCLUSIVE"


def test_order_of_items_and_labels_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    x = rng.random(50)
    groups = rng.integers(0, 9, 50).tolist()
    order = rng.permutation(50)
    shuffled = estimate(x[order], [f"g{groups[i]}" for i in order])
    assert shuffled.standard_error == pytest.approx(estimate(x, groups).standard_error)


def test_a_perfect_score_still_has_an_interval() -> None:
    e = accuracy_interval([1.0] * 10, None)
    assert e.high == pytest.approx(1.0)
    assert e.low == pytest.approx(0.7224672, abs=1e-6)  # 10 of 10 by Wilson
    assert wilson(0, 10).high == pytest.approx(1 - 0.7224672, abs=1e-6)
    assert accuracy_interval([1, 1, 1, 0], None).high <= 1.0


def test_mcnemar_is_the_sign_test_on_flips() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)


def test_sign_flip_agrees_with_mcnemar_on_single_answers() -> None:
    differences = [1.0] * 9 + [-1.0] + [0.0] * 90
    assert sign_flip(differences) == pytest.approx(mcnemar(1, 9), abs=0.005)
    assert sign_flip([0.0, 0.0]) == 1.0


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )


def test_repeat_noise_needs_repeats() -> None:
    assert repeat_noise([[1]], [[0]]) is None
    # One item, two repeats each, variance 1/2 in both arms: sqrt(1/4 + 1/4).
    assert repeat_noise([[1, 0]], [[0, 1]]) == pytest.approx(math.sqrt(0.5))
    assert item_variance([[1, 0], [1, 1], [1]]) == pytest.approx(0.25)


def _difference(mean: float, error: float, items: int = 1000) -> Estimate:
    return Estimate(mean, error, mean - 1.96 * error, mean + 1.96 * error, items, items)


def test_verdicts() -> None:
    assert decide(_difference(0.0, 0.004), 0.01).verdict == "GO"
    assert decide(_difference(-0.03, 0.005), 0.01).verdict == "NO-GO"
    # Not significant, and yet no GO: the noise alone could hide the margin.
    wide = decide(_difference(0.0, 0.02), 0.01)
    assert wide.verdict == "INCONCLUSIVE"
    # A bound at the margin does not lie beyond it, on either side.
    at = Estimate(0.0, 0.005, -0.01, 0.01, 1000, 1000)
    assert decide(at, 0.01).verdict == "INCONCLUSIVE"
    assert decide(replace(at, mean=-0.02, low=-0.03, high=-0.01), 0.01).verdict == "INCONCLUSIVE"
    # Significantly worse, but by less than the margin: still acceptable.
    assert decide(_difference(-0.004, 0.001), 0.01).verdict == "GO"


def test_the_forecast_would_decide() -> None:
    wide = decide(_difference(0.0, 0.02), 0.01, repeats=4, fixed_error=0.02)
    assert wide.items_to_decide is not None
    assert wide.repeats_to_decide is not None
    # Equal arms are decided four times out of five once SE is margin / (1.645 + 0.842).
    assert wide.items_to_decide == pytest.approx(1000 * (2 * 2.487) ** 2, rel=0.03)
    assert wide.repeats_to_decide == pytest.approx(4 * (2 * 2.487) ** 2, rel=0.03)
    # Noise between items is not reduced by asking them again.
    stuck = decide(_difference(0.0, 0.02), 0.01, repeats=4, fixed_error=0.005)
    assert stuck.repeats_to_decide is None
    # At the margin itself no amount of data decides.
    assert decide(_difference(-0.01, 0.02), 0.01).items_to_decide is None
    # A loss of twice the margin is decided the other way.
    assert decide(_difference(-0.02, 0.02), 0.01).items_to_decide == pytest.approx(
        wide.items_to_decide, rel=0.03
    )


def test_the_forecast_respects_the_size_of_the_set() -> None:
    wide = _difference(0.0, 0.02)
    assert decide(wide, 0.01, full_items=20_000).items_to_decide is None
    assert decide(wide, 0.01, full_items=30_000).items_to_decide is not None
    # Four items a group: identical arms need four times the items that items alone would.
    few = [1.0, 0.0] * 20
    alone = decide(paired_difference(few, few), 0.01).items_to_decide
    groups = [i // 4 for i in range(40)]
    grouped = decide(paired_difference(few, few, groups), 0.01).items_to_decide
    assert alone is not None and grouped is not None
    assert 300 < alone < 450
    assert grouped == pytest.approx(4 * alone, rel=0.05)


def test_identical_arms_on_few_items_prove_little() -> None:
    same = paired_difference([1, 0] * 5, [1, 0] * 5)
    assert decide(same, 0.01).verdict == "INCONCLUSIVE"
    # Nothing seen in ten items: a loss of some 3/10 cannot be excluded, and one of 4/10 can.
    assert -0.40 < same.low < -0.27 and 0.27 < same.high < 0.40
    assert -0.40 < macro_difference([same, same]).low < -0.15
    many = paired_difference([1, 0] * 500, [1, 0] * 500)
    assert many.low == pytest.approx(-0.003, abs=1e-4)
    assert decide(many, 0.01).verdict == "GO"


def test_edges_of_intervals() -> None:
    nothing = estimate([])
    assert (nothing.num_items, nothing.num_groups) == (0, 0) and math.isnan(nothing.low)
    assert accuracy_interval([], None).num_items == 0
    one = accuracy_interval([1.0], None)
    assert 0 < one.low < 0.25 and one.high == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)
    # Rounding may not print -0.0 % or more than everything.
    ends = [wilson(k, n) for n in range(1, 200) for k in (0, n)]
    assert min(e.low for e in ends) == 0 and max(e.high for e in ends) == 1
    # Two groups that moved apart: no difference of scores lies beyond one.
    two = paired_difference([1.0, 0.0], [0.0, 1.0])
    assert (two.low, two.high) == (-1.0, 1.0)
    assert math.isnan(paired_difference([1.0], [0.0]).low)
    assert max(holm({"a": 0.4, "b": 0.9, "c": 1.0}).values()) == 1.0


def test_macro_difference_adds_variances() -> None:
    macro = macro_difference([_difference(0.01, 0.003), _difference(-0.01, 0.004)])
    assert macro.mean == pytest.approx(0.0)
    assert macro.standard_error == pytest.approx(0.0025)
    assert macro_p_beyond([_difference(-0.03, 0.005)] * 4, 0.01) < 1e-6
    assert macro_p_beyond([_difference(0.0, 0.005)] * 4, 0.01) > 0.99


def test_macro_of_few_items_is_as_wide_as_they_are() -> None:
    rng = np.random.default_rng(2)
    few = paired_difference(*rng.integers(0, 2, (2, 10)).tolist())
    alone = macro_difference([few])
    assert (alone.low, alone.high) == pytest.approx((few.low, few.high))
    # Three sets of ten items have some 27 degrees of freedom, not infinitely many.
    three = macro_difference([few] * 3)
    assert alone.low < three.low < 0 or alone.low < three.low
    assert three.mean - three.low > 1.69 * three.standard_error


# --- Simulated runs: items with their own success rates, a known true difference. ---


def _arms(
    rng: np.random.Generator, runs: int, items: int, repeats: int, drop: float, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Per-item means of both arms, group labels and the true difference of the population.

    Items are drawn afresh in every run (they stand for the population the claim is about), from a
    U-shaped distribution, with a shift that each group shares.
    """
    labels = np.arange(items) * groups // items
    shared = rng.normal(0, 1.0, (runs, groups))[:, labels]
    logit = shared + rng.normal(0.5, 2.0, (runs, items))
    # The candidate's loss differs from item to item and from group to group.
    effect = drop * (1 + rng.normal(0, 0.5, (runs, groups))[:, labels])
    effect = effect + rng.normal(0, 0.6, (runs, items))
    base, cand = 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(-(logit - effect)))
    b = rng.binomial(repeats, base) / repeats
    c = rng.binomial(repeats, cand) / repeats
    return b, c, labels, float((cand - base).mean())


class Ends(NamedTuple):
    """How often each end of the intervals was wrong."""

    too_high: float
    too_low: float


def _wrong_ends(
    b: np.ndarray, c: np.ndarray, labels: np.ndarray | None, truth: float, repeats: int
) -> Ends:
    low = high = 0
    groups = None if labels is None else labels.tolist()
    for run in range(len(b)):
        items = pair(b[run], c[run], groups, draws=repeats)
        low += rules_out_loss(items, -truth)
        high += rules_out_loss(items.swapped(), truth)
    return Ends(low / len(b), high / len(b))


@pytest.mark.parametrize(
    "items, repeats, groups",
    [(198, 4, 198), (300, 1, 300), (30, 32, 30), (338, 4, 80), (100, 8, 30)],
    ids=["gpqa", "single answers", "aime", "scicode problems", "aa-lcr document sets"],
)
def test_each_end_of_the_interval_is_wrong_one_time_in_twenty(
    items: int, repeats: int, groups: int
) -> None:
    rng = np.random.default_rng(items + repeats)
    b, c, labels, truth = _arms(rng, 1500, items, repeats, drop=0.2, groups=groups)
    assert truth < -0.01
    ends = _wrong_ends(b, c, labels, truth, repeats)
    # 1,500 runs: each share is known to 0.6 points (one standard error).
    assert 0.02 <= ends.too_high <= 0.065, ends
    assert 0.02 <= ends.too_low <= 0.065, ends


def test_ignoring_clusters_is_wrong_too_often() -> None:
    rng = np.random.default_rng(0)
    items, groups = 338, 20
    labels = np.arange(items) * groups // items
    d = rng.normal(0, 0.1, (800, groups))[:, labels] + rng.normal(0, 0.2, (800, items))
    zeros = np.zeros_like(d)
    assert _wrong_ends(zeros, d, None, 0.0, 8).too_high > 0.1
    assert _wrong_ends(zeros, d, labels, 0.0, 8).too_high < 0.07


@pytest.mark.parametrize(
    "items, repeats, rate", [(198, 1, 0.98), (198, 1, 0.995), (30, 1, 0.9), (30, 8, 0.9)]
)
def test_intervals_of_scores_near_all_right_cover(items: int, repeats: int, rate: float) -> None:
    rng = np.random.default_rng(9)
    hits = 0
    spread = rng.beta(rate * 4, (1 - rate) * 4, (4000, items)) if repeats > 1 else rate
    scores = rng.binomial(repeats, spread, (4000, items)) / repeats
    for run in scores:
        e = accuracy_interval(run, None)
        assert 0 <= e.low < e.high <= 1
        hits += e.low <= rate <= e.high
    assert hits / 4000 >= 0.915


def test_pairing_needs_visibly_fewer_items() -> None:
    rng = np.random.default_rng(3)
    b, c, _, _ = _arms(rng, 200, 300, 4, drop=0.2, groups=300)
    paired = np.mean([estimate(y - x).standard_error for x, y in zip(b, c, strict=True)])
    unpaired = np.mean(
        [unpaired_difference(x, y).standard_error for x, y in zip(b, c, strict=True)]
    )
    # Items needed grow with the square of the error.
    assert (unpaired / paired) ** 2 > 3


def test_baseline_against_itself_fails_at_most_one_time_in_twenty() -> None:
    rng = np.random.default_rng(4)
    rates = 1 / (1 + np.exp(-rng.normal(0.5, 2.0, 198)))
    fails = 0
    for _ in range(1500):
        b, c = rng.binomial(4, rates) / 4, rng.binomial(4, rates) / 4
        fails += rules_out_loss(pair(c, b, draws=4), -0.01)
    assert fails <= 0.05 * 1500
