"""Closed forms on small cases, and simulated runs with a known true difference."""

import math

import numpy as np
import pytest

from halfbyte.evals.stats import (
    Decision,
    Estimate,
    accuracy_interval,
    bootstrap_interval,
    decide,
    detectable_drop,
    estimate,
    holm,
    item_variance,
    macro_difference,
    mcnemar,
    paired_difference,
    repeat_noise,
    repeats_to_see,
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
    # Significantly worse, but by less than the margin: still acceptable.
    assert decide(_difference(-0.004, 0.001), 0.01).verdict == "GO"


def test_the_forecast_would_decide() -> None:
    wide = decide(_difference(0.0, 0.02), 0.01, repeats=4, fixed_error=0.02)
    assert wide.items_to_decide is not None
    assert wide.repeats_to_decide is not None
    error = 0.02 * math.sqrt(1000 / wide.items_to_decide)
    assert decide(_difference(0.0, error), 0.01).verdict == "GO"
    assert error == pytest.approx(0.01 / 2.487, rel=0.01)
    assert wide.repeats_to_decide == pytest.approx(4 * (0.02 / (0.01 / 2.487)) ** 2, abs=1)
    # Noise between items is not reduced by asking them again.
    stuck = decide(_difference(0.0, 0.02), 0.01, repeats=4, fixed_error=0.005)
    assert stuck.repeats_to_decide is None
    # At the margin itself no amount of data decides.
    assert decide(_difference(-0.01, 0.02), 0.01).items_to_decide is None


def test_identical_arms_on_few_items_prove_little() -> None:
    same = paired_difference([1, 0] * 5, [1, 0] * 5)
    assert decide(same, 0.01).verdict == "INCONCLUSIVE"
    assert same.low < -0.3 < 0.3 < same.high
    assert macro_difference([same, same]).standard_error > 0.1
    many = paired_difference([1, 0] * 500, [1, 0] * 500)
    assert decide(many, 0.01).verdict == "GO"


def test_plan_gives_the_published_table() -> None:
    # SE of D 0.70 and drop 1.8 points for GPQA Diamond at 16 repeats; 50 repeats to see 1.0.
    variance = 0.0776
    assert detectable_drop(198, 16, variance) == pytest.approx(0.0174, abs=2e-4)
    assert repeats_to_see(0.01, 198, variance) in (49, 50)
    assert repeats_to_see(0.005, 198, variance) in range(190, 200)


def test_macro_difference_adds_variances() -> None:
    macro = macro_difference([_difference(0.01, 0.003), _difference(-0.01, 0.004)])
    assert macro.mean == pytest.approx(0.0)
    assert macro.standard_error == pytest.approx(0.0025)


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


def _covers(b: np.ndarray, c: np.ndarray, labels: np.ndarray | None, truth: float) -> float:
    hits = 0
    groups = None if labels is None else labels.tolist()
    for run in range(len(b)):
        e = paired_difference(b[run], c[run], groups)
        hits += e.low <= truth <= e.high
    return hits / len(b)


@pytest.mark.parametrize(
    "items, repeats, groups",
    [(198, 4, 198), (300, 1, 300), (30, 32, 30), (338, 4, 80), (100, 8, 30)],
    ids=["gpqa", "single answers", "aime", "scicode problems", "aa-lcr document sets"],
)
def test_interval_covers_the_true_difference_95_percent_of_the_time(
    items: int, repeats: int, groups: int
) -> None:
    rng = np.random.default_rng(items + repeats)
    b, c, labels, truth = _arms(rng, 6000, items, repeats, drop=0.2, groups=groups)
    assert truth < -0.01
    coverage = _covers(b, c, labels, truth)
    # 6,000 runs: the coverage itself is known to 0.28 points (one standard error).
    assert abs(coverage - 0.95) <= 0.01, coverage


def test_ignoring_clusters_covers_too_rarely() -> None:
    rng = np.random.default_rng(0)
    items, groups = 338, 20
    labels = np.arange(items) * groups // items
    d = rng.normal(0, 0.1, (1500, groups))[:, labels] + rng.normal(0, 0.2, (1500, items))
    zeros = np.zeros_like(d)
    assert _covers(zeros, d, None, 0.0) < 0.85
    assert abs(_covers(zeros, d, labels, 0.0) - 0.95) < 0.02


def test_pairing_needs_visibly_fewer_items() -> None:
    rng = np.random.default_rng(3)
    b, c, _, _ = _arms(rng, 200, 300, 4, drop=0.2, groups=300)
    paired = np.mean([paired_difference(x, y).standard_error for x, y in zip(b, c, strict=True)])
    unpaired = np.mean(
        [unpaired_difference(x, y).standard_error for x, y in zip(b, c, strict=True)]
    )
    # Items needed grow with the square of the error.
    assert (unpaired / paired) ** 2 > 3


def test_baseline_against_itself_fails_at_most_one_time_in_twenty() -> None:
    rng = np.random.default_rng(4)
    rates = 1 / (1 + np.exp(-rng.normal(0.5, 2.0, 198)))
    verdicts: list[Decision] = []
    for _ in range(1500):
        b, c = rng.binomial(4, rates) / 4, rng.binomial(4, rates) / 4
        verdicts.append(decide(paired_difference(b, c), 0.01))
    fails = sum(v.verdict == "NO-GO" for v in verdicts)
    assert fails <= 0.05 * len(verdicts)
    assert {v.verdict for v in verdicts} <= {"GO", "INCONCLUSIVE", "NO-GO"}


def test_a_drop_of_the_margin_passes_at_most_one_time_in_twenty() -> None:
    rng = np.random.default_rng(5)
    passes = 0
    for _ in range(2000):
        d = rng.normal(-0.01, 0.2, 2000)
        passes += decide(estimate(d), 0.01).verdict == "GO"
    assert passes / 2000 <= 0.05 + 0.011


def test_bootstrap_agrees_with_t_where_both_hold() -> None:
    rng = np.random.default_rng(6)
    d = rng.normal(0.0, 0.2, 400)
    low, high = bootstrap_interval(d, None)
    e = estimate(d)
    assert low == pytest.approx(e.low, abs=0.002)
    assert high == pytest.approx(e.high, abs=0.002)
