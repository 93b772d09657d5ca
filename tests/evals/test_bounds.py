"""The bound behind a verdict: monotone in every answer, and right at the margin for any data."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from halfbyte.evals.judging.bounds import (
    Design,
    PairedItems,
    _about_the_margin,
    _best_cap,
    _excess,
    lower_end,
    p_beyond,
    pair,
    rules_out_loss,
    unseen_share,
    would_rule_out,
)
from halfbyte.evals.judging.stats import decide, estimate, paired_difference

SIZES = (30, 40, 100, 198, 284, 300, 338, 1730, 12_032)


def singles(lost: int, won: int, items: int) -> PairedItems:
    """One answer an item, so many of them lost and won."""
    sums = np.concatenate([-np.ones(lost), np.ones(won), np.zeros(items - lost - won)])
    return PairedItems(sums, np.ones(items), 1.0)


@pytest.mark.parametrize("margin", [0.01, 0.05, 0.2])
def test_a_lost_answer_never_helps_and_a_won_one_never_hurts(margin: float) -> None:
    """Every (lost, won, items) of small sets."""
    for items in (2, 3, 7, 20, 66):
        most = min(items, 8)
        go = {
            (lost, won): rules_out_loss(singles(lost, won, items), margin)
            for lost in range(most + 1)
            for won in range(min(most, items - lost) + 1)
        }
        for (lost, won), passes in go.items():
            assert passes >= go.get((lost + 1, won), False), (items, lost, won)
            assert passes <= go.get((lost, won + 1), True), (items, lost, won)


@pytest.mark.parametrize("margin", [0.01, 0.015, 0.05])
def test_one_flip_never_gives_go_where_none_gives_inconclusive(margin: float) -> None:
    edge = round(3.1 / margin)
    for items in {*SIZES, 10, 70, 280, *range(edge - 5, edge + 6)}:
        if not rules_out_loss(singles(0, 0, items), margin):
            assert not rules_out_loss(singles(1, 0, items), margin), items
            assert not rules_out_loss(singles(0, 1, items), margin), items


@given(
    st.integers(2, 12), st.integers(1, 4), st.integers(0, 2**31),
    st.floats(0.005, 0.5), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_better_answer_never_lowers_the_bound(
    items: int, repeats: int, seed: int, margin: float, is_grouped: bool, is_baseline: bool
) -> None:
    """Any data with repeats and groups of any size; one answer is flipped in either arm."""
    rng = np.random.default_rng(seed)
    arms = rng.random((2, items, repeats)) < rng.random((2, items, 1))
    groups = rng.integers(0, max(2, items // 2), items).tolist() if is_grouped else None
    better = arms.copy()
    arm, right = (0, False) if is_baseline else (1, True)
    better[arm, rng.integers(items), rng.integers(repeats)] = right
    (b, c), (other_b, other_c) = arms.mean(axis=2), better.mean(axis=2)
    one = pair(b, c, groups, draws=repeats)
    two = pair(other_b, other_c, groups, draws=repeats)
    assert rules_out_loss(one, margin) <= rules_out_loss(two, margin)
    assert lower_end(one) <= lower_end(two) + 1e-9 or math.isnan(lower_end(one))
    # The other end, by symmetry: a better answer never makes a loss more certain.
    assert rules_out_loss(one.swapped(), -margin) >= rules_out_loss(two.swapped(), -margin)


def wrong_go(items: int, margin: float, won: float) -> float:
    """Exact chance of GO for single answers that lose `margin` more often than they win."""
    chance = 0.0
    for count in range(int(items * won + 6 * math.sqrt(items * won) + 5)):
        largest = -1  # losses with which so many wins still end GO
        if rules_out_loss(singles(0, count, items), margin):
            low, high = 0, int(items * margin + count) + 1
            while high - low > 1:
                middle = (low + high) // 2
                if rules_out_loss(singles(middle, count, items), margin):
                    low = middle
                else:
                    high = middle
            largest = low
        if largest >= 0:
            chance += distributions.binom.pmf(count, items, won) * distributions.binom.cdf(
                largest, items - count, (won + margin) / (1 - won)
            )
    return float(chance)


@pytest.mark.parametrize(
    "items, margin",
    [(30, 0.1), (66, 0.05), (100, 0.05), (198, 0.02), (284, 0.01), (300, 0.015), (600, 0.01)],
)
def test_a_loss_of_the_margin_ends_go_at_most_one_time_in_twenty(items: int, margin: float) -> None:
    """Exact, for any number of flips. A t bound gives 15 to 17 % here where nothing is won."""
    for won in (0.0, 0.002, 0.01, 0.05):
        assert wrong_go(items, margin, won) <= 0.05, won
    # And it is no bound that never says GO.
    assert rules_out_loss(singles(0, 0, math.ceil(3.4 / margin)), margin)


def _arms(
    rng: np.random.Generator,
    items: int,
    repeats: int,
    labels: np.ndarray,
    logit: float,
    loss: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Means of both arms; groups share half of a repeat's luck, the candidate loses `loss`."""
    rate = 1 / (1 + np.exp(-(logit + rng.normal(0, 1.5, items))))
    rates = np.stack([rate, rate * (1 - loss / rate.mean())])
    shared = rng.normal(0, 1, (2, repeats, labels.max() + 1))[:, :, labels]
    luck = math.sqrt(0.5) * shared + math.sqrt(0.5) * rng.normal(0, 1, shared.shape)
    if labels.max() + 1 == items:
        luck = shared
    scores = (distributions.norm.cdf(luck) < rates[:, None, :]).mean(axis=1)
    return scores[0], scores[1]


@pytest.mark.parametrize(
    "items, repeats, groups, margin",
    [(198, 4, 198, 0.02), (30, 8, 30, 0.04), (338, 2, 80, 0.03), (100, 4, 30, 0.04)],
    ids=["gpqa", "aime", "scicode", "aa-lcr"],
)
@pytest.mark.parametrize("logit", [0.5, 4.0], ids=["many flips", "few flips"])
def test_wrong_go_with_repeats_and_groups(
    items: int, repeats: int, groups: int, margin: float, logit: float
) -> None:
    rng = np.random.default_rng(items)
    labels = np.sort(np.concatenate([np.arange(groups), rng.integers(0, groups, items - groups)]))
    passes = 0
    for _ in range(400):
        b, c = _arms(rng, items, repeats, labels, logit, margin)
        passes += rules_out_loss(pair(b, c, labels.tolist(), draws=repeats), margin)
    # 400 runs: one standard error is 1.1 points, so a rule of 6 % ends below 9 % always.
    assert passes / 400 <= 0.09


@given(st.integers(2, 9), st.integers(0, 2**31), st.floats(0.01, 0.3), st.floats(1.5, 7.0))
@settings(max_examples=100, deadline=None)
def test_the_excess_is_that_of_the_best_cap(
    groups: int, seed: int, margin: float, q2: float
) -> None:
    """Caps on a fine grid, one by one: none does better, and the best nearly as well."""
    random = np.random.default_rng(seed)
    values = random.integers(-3, 6, groups) / 2.0 + random.integers(1, 5, groups) * margin
    constant = q2**2 * 0.25 * 2.5 * groups * margin
    # Gains alone are capped: the smallest value is never lifted.
    caps = np.linspace(values.min(), values.max(), 4001)
    capped = np.minimum(values, caps[:, None])
    x = capped.sum(axis=1) - 0.1
    squares = np.square(capped).sum(axis=1)
    positive = x > 0
    x, squares = x[positive], squares[positive]
    tried = (x * x - q2 * squares - constant / x).tolist()
    found = _best_cap(values, 0.1, constant, q2)
    # Where none passes, only the sign matters.
    if max([found, *tried]) > 0:
        assert found >= max(tried, default=0.0) - 1e-9
        assert found == pytest.approx(max(tried), abs=0.01 * (1 + max(tried)))


@given(st.integers(0, 2**31), st.floats(0.01, 0.3))
@settings(max_examples=100, deadline=None)
def test_a_single_flip_of_gain_is_worth_nothing(seed: int, margin: float) -> None:
    """Any groups; losses anywhere, and one item better in one repeat: as if it were not."""
    random = np.random.default_rng(seed)
    items, repeats = int(random.integers(3, 80)), int(random.integers(1, 9))
    groups = random.integers(0, max(2, items // 3), items)
    change = np.where(random.random(items) < 0.1, -1.0, 0.0)
    won = change.copy()
    won[random.integers(items)] += 1 / repeats
    one, two = (pair(np.ones(items), 1 + c, groups.tolist(), draws=repeats) for c in (change, won))
    where = int(np.argmax(two.sums - one.sums))
    if one.sums[where] == 0:  # not one that makes good what was lost
        assert rules_out_loss(one, margin) == rules_out_loss(two, margin)


@given(st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_what_rules_out_a_loss_rules_out_larger_ones(seed: int) -> None:
    """So that the interval's end and the verdict at a margin are one rule."""
    items = groups_of_any_size(np.random.default_rng(seed))[0]
    passes = [rules_out_loss(items, m) for m in (-0.1, -0.01, 0.0, *np.geomspace(0.003, 1.0, 25))]
    assert passes == sorted(passes)


def groups_of_any_size(random: np.random.Generator) -> tuple[PairedItems, PairedItems]:
    """Two comparisons, the second with one answer that is worse; partial scores as well."""
    items, repeats = int(random.integers(3, 140)), int(random.integers(1, 9))
    weights = random.gamma(random.choice([0.3, 1.0, 5.0]), 1.0, max(2, items // 4)) + 1e-3
    labels = random.choice(len(weights), items, p=weights / weights.sum()).tolist()
    b = random.integers(0, repeats + 1, items) / repeats
    steps = random.choice([-1, 0, 1], items, p=random.dirichlet([1.0, random.choice([1, 9]), 1.0]))
    c = np.clip(b + steps * random.integers(1, repeats + 1, items) / repeats, 0.0, 1.0)
    if random.random() < 0.3:
        b, c = np.round(4 * random.random((2, items))) / 4
    worse = c.copy()
    lost = random.integers(items)
    worse[lost] = max(0.0, c[lost] - random.choice([1.0, random.random()]) / repeats)
    return pair(b, c, labels, draws=repeats), pair(b, worse, labels, draws=repeats)


@given(st.integers(0, 2**31), st.floats(0.005, 0.1))
@settings(max_examples=60, deadline=None)
def test_a_lost_answer_never_helps_in_groups_of_any_size(seed: int, margin: float) -> None:
    better, worse = groups_of_any_size(np.random.default_rng(seed))
    if len(better.sums) < 2:
        return
    assert rules_out_loss(worse, margin) <= rules_out_loss(better, margin)
    assert lower_end(worse) <= lower_end(better) + 1e-9
    assert lower_end(worse.swapped()) >= lower_end(better.swapped()) - 1e-9
    assert p_beyond(worse, margin) <= p_beyond(better, margin) + 1e-9


def test_a_group_that_overtakes_the_largest_gain_lowers_no_bound() -> None:
    """Small groups of unequal sizes, half a flip below the largest gain and half a flip above."""
    random, num_tried = np.random.default_rng(0), 0
    while num_tried < 30:
        sizes = random.integers(1, 9, random.integers(5, 14)).astype(float)
        sums = np.round(random.normal(0.0, 0.6, len(sizes)) * sizes) / 2
        second = random.integers(len(sizes))
        sums[second] = sums.max() - 0.5
        more = sums.copy()
        more[second] += 1.0
        if (np.abs(more) <= sizes).all():
            num_tried += 1
            unit = float(np.square(sizes).sum() / sizes.sum()) / 2
            one, two = PairedItems(sums, sizes, unit), PairedItems(more, sizes, unit)
            assert lower_end(one) <= lower_end(two) + 1e-9
            assert lower_end(one.swapped()) >= lower_end(two.swapped()) - 1e-9


@pytest.mark.parametrize("count", [2, 3, 12, 200])
def test_sums_about_the_margin_ask_for_the_same_as_t(count: int) -> None:
    x = np.random.default_rng(count).normal(0.3, 1.0, count)
    t = x.mean() / (x.std(ddof=1) / math.sqrt(count))
    # The value of t itself is what lies exactly at the bound.
    assert x.sum() ** 2 == pytest.approx(_about_the_margin(t, count) * np.square(x).sum())


def test_few_groups_have_the_quantile_of_their_number() -> None:
    """Data that would pass with two groups more, and do not with those that there are."""
    random, num_between = np.random.default_rng(1), 0
    for _ in range(300):
        items = PairedItems(random.normal(0.0, 1.0, 4), np.full(4, 20.0), 0.05)
        right, wrong = (
            _excess(items, 0.05, _about_the_margin(distributions.t.ppf(0.95, freedom), 4))
            for freedom in (3, 5)
        )
        if right <= 0 < wrong:
            assert not rules_out_loss(items, 0.05)
            num_between += 1
        elif right > 0:
            assert rules_out_loss(items, 0.05)
    assert num_between > 3


def test_the_interval_is_the_one_of_the_verdict() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        b, c = rng.integers(0, 2, (2, 60)).astype(float)
        c = np.where(rng.random(60) < 0.9, b, c)
        d = paired_difference(b, c)
        for margin in (d.low * -1 + 1e-6, d.low * -1 - 1e-6):
            if margin > 0:
                expected = "GO" if d.low > -margin else "INCONCLUSIVE"
                assert decide(d, margin).verdict == expected
                assert rules_out_loss(pair(b, c), margin) == (expected == "GO")
        beyond = p_beyond(pair(b, c), max(1e-3, -d.high))
        assert beyond == pytest.approx(0.05, abs=1e-3) or d.high > 0


def test_many_answers_agree_with_t() -> None:
    rng = np.random.default_rng(4)
    b = (rng.random(4000) < 0.7).astype(float)
    c = np.where(rng.random(4000) < 0.1, 1 - b, b)
    d, e = paired_difference(b, c), estimate(c - b)
    reach = float(distributions.t.ppf(0.95, 3999)) * e.standard_error
    assert d.low == pytest.approx(e.mean - reach, abs=0.0008)
    assert d.high == pytest.approx(e.mean + reach, abs=0.0008)


def test_p_of_a_loss_beyond_the_margin() -> None:
    assert p_beyond(singles(0, 0, 300), 0.01) == 1.0
    assert p_beyond(singles(60, 0, 300), 0.01) < 1e-6
    assert math.isnan(p_beyond(singles(1, 0, 1), 0.01))
    rng = np.random.default_rng(5)
    small = [
        p_beyond(pair(np.zeros(200), rng.normal(-0.02, 0.2, 200), draws=8), 0.02) <= 0.05
        for _ in range(600)
    ]
    assert np.mean(small) <= 0.08


def test_the_plans_rule_is_the_rule_of_the_data() -> None:
    rng = np.random.default_rng(6)
    agree = 0
    for _ in range(200):
        b = rng.binomial(8, 0.8, 198) / 8
        c = rng.binomial(8, 0.8, 198) / 8
        e = estimate(c - b)
        means, errors = np.array([e.mean]), np.array([e.standard_error])
        planned = would_rule_out(means, errors, Design(198, 198, 8), 0.03)[0]
        agree += planned == rules_out_loss(pair(b, c, draws=8), 0.03)
    assert agree >= 195  # they differ in the cap on gains only


def test_a_set_may_hold_none_of_a_rare_kind_of_item() -> None:
    assert unseen_share(30) == pytest.approx(0.095, abs=5e-4)
    assert (1 - unseen_share(300)) ** 300 == pytest.approx(0.05)
    assert unseen_share(0) == 1.0
