"""What a verdict is worth: simulated comparisons whose truth is known.

Question: how often does a comparison end GO although the loss is the margin, NO-GO although there
is none, and do intervals and the planner hold what they promise?

Method: made-up answers, no model. An item's chance of a right answer is drawn from a beta
distribution with the score and the mean p(1-p) that the planner supposes for each benchmark, anew
in each run; steps of a problem and questions of a document set share luck (a Gaussian copula, 0.2),
and in `whole_groups` all of it.
Losses are even (in proportion to an item's rate), uneven (and up to ten points either way), or sit
on few items. The rule is the one of `halfbyte.evals`, called on the means. For single answers the
chance of GO is exact, summed over all counts of lost and won answers. Fixed seeds: the same figures
everywhere.

Cost model: runs x items, half a millisecond a comparison; some six minutes on an idle core.

Reading the result: a share of 1,000 runs near 5 % is known to 0.7 points, of 125 to 2.
`wrong_go` is to be at most 5 %, and no more than 6 % with that doubt; a t bound on the same data is
printed beside it to show what it prevents. A row that comes out above 5.5 % is drawn anew with four
times the runs, and that share is the one recorded: the largest of many shares is high by chance.
`concentrated` is the case that no formula over few items can exclude: there the claim is about the
items of the set.

Last record: benchmarks/records/verdicts.json.

Run: PYTHONPATH=src python benchmarks/verdicts.py
"""

import argparse
import functools
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from halfbyte.bench import record
from halfbyte.evals.judging.bounds import LEVEL, PairedItems, pair, rules_out_loss
from halfbyte.evals.judging.looks import MACRO_MARGIN, UNPLANNED_LEVEL
from halfbyte.evals.judging.plan import plan_run, suite_chances
from halfbyte.evals.judging.stats import (
    accuracy_interval,
    decide,
    estimate,
    macro_difference,
    macro_p_beyond,
    paired_difference,
)
from halfbyte.evals.tasks.suite import BENCHMARKS, REPEATS, SUITES
from halfbyte.fidelity.models import interval_of_mean
from halfbyte.figures import Against, Figure

RECORD = Path(__file__).parent / "records" / "verdicts.json"
Floats = NDArray[np.float64]

# Scores of a strong reasoning model, to place the items' rates; the spread is the planner's.
SCORES = {
    "mmlu_pro": 0.82, "gpqa_diamond": 0.77, "aa_lcr": 0.62, "scicode": 0.43, "aime2025": 0.89,
    "ifbench": 0.70, "mmmu_pro": 0.63,
}  # fmt: skip
_LUCK = 0.2


@dataclass(frozen=True)
class Set:
    """A benchmark's items: how many, in how many groups, how often asked, and their rates."""

    name: str
    items: int
    groups: int
    repeats: int
    margin: float
    score: float
    variance: float

    def labels(self, rng: np.random.Generator) -> NDArray[np.intp]:
        """Groups of uneven size, each with an item at least."""
        if self.groups == self.items:
            return np.arange(self.items)
        weights = rng.gamma(2.0, 1.0, self.groups) + 0.3
        rest = rng.choice(self.groups, self.items - self.groups, p=weights / weights.sum())
        return np.sort(np.concatenate([np.arange(self.groups), rest]))

    def rates(self, rng: np.random.Generator) -> Floats:
        """A beta distribution of this mean and this mean of p(1-p)."""
        whole = self.score * (1 - self.score)
        size = self.variance / (whole - self.variance)
        return rng.beta(self.score * size, (1 - self.score) * size, self.items)


def seven(repeats: str) -> list[Set]:
    """The seven benchmarks, asked as by default, once, or as by the suite that can decide."""
    found = []
    for name in SUITES["seed"]:
        known = BENCHMARKS[name]
        count = {"default": known.repeats, "once": 1, "decide": REPEATS["decide"][name]}[repeats]
        groups = known.plan_groups or known.full_items
        values = (known.margin, SCORES[name], known.plan_variance)
        found.append(Set(name, known.full_items, groups, count, *values))
    return found


def nearly_right(given: Set) -> Set:
    """The same set for a model that is right nearly always: few flips."""
    return replace(given, score=0.985, variance=0.006)


class Arms(NamedTuple):
    """Means by item and the group of each."""

    baseline: Floats
    candidate: Floats
    labels: NDArray[np.intp]


def answers(rng: np.random.Generator, rates: Floats, given: Set, labels: Any, k: int) -> Floats:
    """Means of k answers; groups share luck within a repeat."""
    if given.groups == given.items:
        return np.asarray(rng.binomial(k, rates) / k)
    shared = rng.normal(size=(k, given.groups))[:, labels]
    luck = math.sqrt(_LUCK) * shared + math.sqrt(1 - _LUCK) * rng.normal(size=shared.shape)
    return np.asarray((luck < distributions.norm.ppf(rates)).mean(axis=0))


def lossy(rng: np.random.Generator, rates: Floats, given: Set, loss: float, kind: str) -> Floats:
    """The candidate's rates; on average over items and runs they lie `loss` lower."""
    worse = rates * (1 - loss / given.score)
    if kind == "uneven":
        middle = (rates > 0.15) & (rates < 0.85)
        worse = worse + np.where(middle, rng.uniform(-0.1, 0.1, len(rates)), 0.0)
    return np.clip(worse, 0.0, 1.0)


def draw(rng: np.random.Generator, given: Set, loss: float = 0.0, kind: str = "even") -> Arms:
    """One comparison."""
    labels, rates = given.labels(rng), given.rates(rng)
    worse = lossy(rng, rates, given, loss, kind)
    b, c = (answers(rng, r, given, labels, given.repeats) for r in (rates, worse))
    return Arms(b, c, labels)


def paired(arms: Arms, given: Set) -> PairedItems:
    groups = None if given.groups == given.items else arms.labels.tolist()
    return pair(arms.baseline, arms.candidate, groups, draws=given.repeats)


def t_rules_out(items: PairedItems, margin: float) -> bool:
    """The textbook's clustered t bound (nothing seen: 3 / n), for contrast."""
    n, groups = items.num_items, len(items.sums)
    mean = items.sums.sum() / n
    rests = items.sums - items.sizes * mean
    error = math.sqrt(groups / (groups - 1) * float(np.square(rests).sum())) / n
    reach = 3 / groups if error < 1e-12 else distributions.t.ppf(0.95, groups - 1) * error
    return bool(mean - reach > -margin)


def share(values: Iterable[bool]) -> float:
    """Per cent, to a tenth."""
    found = list(values)
    return float(round(100 * sum(found) / len(found), 1))


SIZES = (
    (30, 0.1), (66, 0.05), (100, 0.05), (100, 0.015), (198, 0.01), (198, 0.02), (284, 0.01),
    (300, 0.01), (300, 0.015), (338, 0.015), (600, 0.01), (1730, 0.015), (12_032, 0.01),
)  # fmt: skip


def single_answers(case: tuple[int, float], runs: int) -> dict[str, Any]:
    """Exact wrong GO for one answer an item: the worst over many rates of won answers."""
    items, margin = case
    worst = {
        name: max(exact_go(rule, items, margin, w) for w in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05))
        for name, rule in (("score bound", score_passes), ("t bound", t_passes))
    }
    return {"items": items, "margin": 100 * margin, "wrong_go": worst}


def exact_go(rule: Any, items: int, margin: float, won: float) -> float:
    """Per cent GO if answers are won at this rate and lost at that rate plus the margin."""
    spread = math.sqrt(items * won)
    chance = 0.0
    for count in range(max(0, int(items * won - 5 * spread)), int(items * won + 5 * spread) + 5):
        passing = rule(items, margin, count)
        p = distributions.binom.pmf(
            np.arange(len(passing)), items - count, (won + margin) / (1 - won)
        )
        chance += float(distributions.binom.pmf(count, items, won) * p[passing].sum())
    return round(100 * chance, 2)


def _most_losses(items: int, margin: float, won: int) -> int:
    """More losses than ever end GO with so many answers won."""
    mean = items * margin + won
    return min(items - won, int(mean + 1))


@functools.cache
def score_passes(items: int, margin: float, won: int) -> NDArray[np.bool_]:
    """Which numbers of lost answers end GO; the rule is monotone: 0 to some number."""
    low, high = -1, _most_losses(items, margin, won) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if rules_out_loss(_flips(items, middle, won), margin):
            low = middle
        else:
            high = middle
    return np.arange(_most_losses(items, margin, won) + 1) <= low


def t_passes(items: int, margin: float, won: int) -> NDArray[np.bool_]:
    """`t_rules_out` for every number of lost answers at once; it is not monotone."""
    lost = np.arange(_most_losses(items, margin, won) + 1)
    mean = (won - lost) / items
    variance = ((won + lost) / items - mean**2) / (items - 1)
    reach = distributions.t.ppf(0.95, items - 1) * np.sqrt(variance)
    return np.asarray(mean - np.where(won + lost == 0, 3 / items, reach) > -margin)


def _flips(items: int, lost: int, won: int) -> PairedItems:
    sums = np.zeros(items)
    sums[:lost], sums[lost : lost + won] = -1.0, 1.0
    return PairedItems(sums, np.ones(items), 1.0)


def cases() -> list[tuple[Set, str]]:
    """The benchmarks asked once, by default and by the suite that decides; many flips and few."""
    found = []
    for repeats in ("once", "default", "decide"):
        for given in seven(repeats):
            if given.repeats > 1 or repeats == "once":
                found += [(given, "many"), (nearly_right(given), "few")]
    return found


def repeats_and_groups(case: tuple[Set, str], runs: int) -> dict[str, Any]:
    """Wrong GO at a true loss of the margin for one benchmark."""
    given, flips = case
    count = runs if given.items < 10_000 else runs // 5
    row: dict[str, Any] = {
        "benchmark": given.name, "repeats": given.repeats, "flips": flips, "runs": count
    }  # fmt: skip
    for kind in ("even", "uneven"):
        found = wrong_go(given, kind, count, 0)
        if found["score"] > 5.5:
            found = wrong_go(given, kind, 4 * count, 1)
            row[f"runs_{kind}"] = 4 * count
        row[f"wrong_go_{kind}"] = found["score"]
        row[f"t_bound_{kind}"] = found["t"]
    return row


def wrong_go(given: Set, kind: str, runs: int, seed: int) -> dict[str, float]:
    """Per cent GO by the rule and by a t bound at a true loss of the margin."""
    rng = np.random.default_rng([given.items, given.repeats, round(1000 * given.score), seed])
    drawn = (paired(draw(rng, given, given.margin, kind), given) for _ in range(runs))
    found = [
        (rules_out_loss(items, given.margin), t_rules_out(items, given.margin)) for items in drawn
    ]
    return {"score": share(go for go, _ in found), "t": share(go for _, go in found)}


# Groups, items of each, repeats, margin, share of answers that change at a loss of the margin.
WHOLE_GROUPS = (
    (80, 5, 8, 0.03, 0.3), (80, 5, 8, 0.015, 0.1), (80, 5, 1, 0.03, 0.3), (200, 2, 4, 0.02, 0.3),
    (60, 5, 8, 0.01, 0.3), (30, 4, 16, 0.015, 0.3), (10, 4, 8, 0.05, 0.3), (4, 10, 32, 0.05, 0.3),
)  # fmt: skip


def whole_groups(case: tuple[int, int, int, float, float], runs: int) -> dict[str, Any]:
    """Wrong GO where the items of a group are all lost, won or kept together in each repeat."""
    groups, each, repeats, margin, changed = case
    rng = np.random.default_rng([groups, each, repeats, round(1000 * margin)])
    count = 10 * runs
    lost, won = (changed + margin) / 2, (changed - margin) / 2
    sizes, unit = np.full(groups, float(each)), each / repeats
    passing = []
    for _ in range(count):
        drawn = rng.random((groups, repeats))
        changes = (drawn > 1 - won).mean(axis=1) - (drawn < lost).mean(axis=1)
        passing.append(rules_out_loss(PairedItems(each * changes, sizes, unit), margin))
    found = {"groups": groups, "items_of_each": each, "repeats": repeats, "margin": 100 * margin}
    return {**found, "changed": 100 * changed, "runs": count, "wrong_go": share(passing)}


FEW_ITEMS = (
    ("aime2025", 0.5), ("aime2025", 0.3), ("gpqa_diamond", 0.5), ("ifbench", 0.5), ("scicode", 0.5),
)  # fmt: skip


def concentrated(case: tuple[str, float], runs: int) -> dict[str, Any]:
    """A loss of the margin on a few items: for the kind of item, and for the items of the set."""
    name, each = case
    given = next(one for one in seven("default") if one.name == name)
    rng = np.random.default_rng(given.items)
    of_kind = of_set = 0
    for _ in range(runs):
        labels, rates = given.labels(rng), np.clip(given.rates(rng), each, 1.0)
        b = answers(rng, rates, given, labels, given.repeats)
        hit = rng.random(given.items) < given.margin / each
        c = answers(rng, rates - each * hit, given, labels, given.repeats)
        of_kind += int(rules_out_loss(paired(Arms(b, c, labels), given), given.margin))
        # The same loss on items of this very set: their mean loss is the margin exactly.
        count = max(1, round(given.margin / each * given.items))
        few = np.zeros(given.items)
        few[rng.choice(given.items, count, replace=False)] = given.margin * given.items / count
        c = answers(rng, np.clip(rates - few, 0, 1), given, labels, given.repeats)
        of_set += int(rules_out_loss(paired(Arms(b, c, labels), given), given.margin))
    return (
        {"benchmark": name, "share_of_items": round(100 * given.margin / each, 1),
         "loss_of_each": 100 * each,
         "wrong_go_for_such_items": share([True] * of_kind + [False] * (runs - of_kind)),
         "wrong_go_for_the_set": share([True] * of_set + [False] * (runs - of_set))}
    )  # fmt: skip


def verdict(sets: list[Set], drawn: list[Arms]) -> str:
    """Of seven benchmarks at once, as `compare` concludes; NO-GO says of what.

    Margins of 1.0 and 1.5 lost everywhere are a mean loss beyond its margin of 1.0: there a NO-GO
    of the mean is right, and only one of a benchmark is wrong.

    Holm rejects something exactly if the smallest p value passes its first step, so one question a
    benchmark is enough; the macro mean is computed where it can matter.
    """
    items = [paired(arms, given) for given, arms in zip(sets, drawn, strict=True)]
    margins = [given.margin for given in sets]
    first_step = LEVEL / (len(sets) + 1)
    is_go = all(map(rules_out_loss, items, margins))
    is_no_go = any(
        rules_out_loss(one.swapped(), -margin, first_step)
        for one, margin in zip(items, margins, strict=True)
    )
    mean = sum(float(one.sums.sum() / one.num_items) for one in items) / len(items)
    if is_no_go or not (is_go or mean < -MACRO_MARGIN):
        return "NO-GO of a benchmark" if is_no_go else "INCONCLUSIVE"
    differences = [
        paired_difference(
            arms.baseline,
            arms.candidate,
            None if given.groups == given.items else arms.labels.tolist(),
            repeats=given.repeats,
        )
        for given, arms in zip(sets, drawn, strict=True)
    ]
    if macro_p_beyond(differences, MACRO_MARGIN) < first_step:
        return "NO-GO of the mean"
    macro = macro_difference(differences)
    return "GO" if is_go and macro.low > -MACRO_MARGIN else "INCONCLUSIVE"


SUITE_CASES = (
    ("30 items, once", 0.0), ("default repeats", 0.0), ("default repeats", 1.0),
    ("suite decide", 0.0),
)  # fmt: skip


def suites(case: tuple[str, float], runs: int) -> dict[str, Any]:
    """The whole suite: equal arms, and arms that all lose their margin."""
    name, loss = case
    is_small = name == "30 items, once"
    sets = seven("default" if name == "default repeats" else "decide")
    if is_small:
        sets = [
            replace(s, items=30, groups=10 if s.groups < s.items else 30, repeats=1) for s in sets
        ]
    rng = np.random.default_rng([len(name), round(loss)])
    count = runs if is_small or loss else max(20, runs // 4)
    found = [verdict(sets, [draw(rng, s, loss * s.margin) for s in sets]) for _ in range(count)]
    row: dict[str, Any] = {"sizes": name, "loss": f"{loss:g} x margin", "runs": count}
    words = ("GO", "INCONCLUSIVE", "NO-GO of a benchmark", "NO-GO of the mean")
    row |= {word: share(v == word for v in found) for word in words}
    if not is_small and loss == 0.0:
        planned = [replace(BENCHMARKS[s.name], repeats=s.repeats) for s in sets]
        chances = suite_chances(plan_run(planned, None, None, 1.0, None), 0.0)
        row["planned_go"] = round(100 * chances.go, 1)
    return row


LOOK_CASES = ("gpqa_diamond", "ifbench", "scicode")


def looks(name: str, runs: int) -> dict[str, Any]:
    """GO at a true loss of the margin when an INCONCLUSIVE is followed by more repeats."""
    given = next(one for one in seven("default") if one.name == name)
    rng = np.random.default_rng(given.items)
    found = np.array([_looked_twice(rng, given) for _ in range(runs)])
    shares = dict(zip(_WAYS, (100 * found.mean(axis=0)).round(1).tolist(), strict=True))
    return {"benchmark": given.name, "runs": runs, **shares}


_WAYS = ("first_look", "pooled_again_at_5", "two_planned_looks", "fresh_at_1")


def _looked_twice(rng: np.random.Generator, given: Set) -> tuple[bool, bool, bool, bool]:
    """Whether GO was said by the first look, or by it or the second in each of three ways."""
    labels, rates, k = given.labels(rng), given.rates(rng), given.repeats
    groups = None if given.groups == given.items else labels.tolist()
    worse = lossy(rng, rates, given, given.margin, "even")

    def ask(count: int) -> tuple[Floats, Floats]:
        return answers(rng, rates, given, labels, count), answers(rng, worse, given, labels, count)

    b, c = ask(k)
    d = paired_difference(b, c, groups, repeats=k)
    decision = decide(d, given.margin, repeats=k, fixed_error=d.standard_error)
    is_go = decision.verdict == "GO"
    is_planned_go = rules_out_loss(pair(b, c, groups, draws=k), given.margin, LEVEL / 2)
    # The advice is followed up to thirty times the repeats; a planned second look doubles them.
    more = min(decision.repeats_to_decide or (2 * k if is_go else 0), 30 * k)
    if decision.verdict == "NO-GO" or more <= k:
        return is_go, is_go, is_planned_go, is_go
    again_b, again_c = ask(more - k)
    whole_b, whole_c = (
        (one * k + two * (more - k)) / more for one, two in ((b, again_b), (c, again_c))
    )
    whole = pair(whole_b, whole_c, groups, draws=more)
    return (
        is_go,
        is_go or rules_out_loss(whole, given.margin),
        is_planned_go or rules_out_loss(whole, given.margin, LEVEL / 2),
        is_go
        or rules_out_loss(pair(*ask(more), groups, draws=more), given.margin, UNPLANNED_LEVEL),
    )


SCORE_CASES = (
    (30, 1, 0.89), (30, 8, 0.89), (40, 1, 0.95), (100, 1, 0.99), (198, 1, 0.98), (198, 16, 0.77),
)  # fmt: skip


def score_intervals(case: tuple[int, int, float], runs: int) -> dict[str, Any]:
    """Coverage of the 95 % interval of one arm's score."""
    items, repeats, rate = case
    rng = np.random.default_rng(items + repeats)
    hits: dict[str, list[bool]] = {"score interval": [], "t interval": []}
    for _ in range(runs):
        rates = rng.beta(4 * rate, 4 * (1 - rate), items) if repeats > 1 else rate
        scores = rng.binomial(repeats, rates, items) / repeats
        e, plain = accuracy_interval(scores, None), estimate(scores)
        hits["score interval"].append(e.low <= rate <= e.high)
        hits["t interval"].append(plain.low <= rate <= plain.high)
    covered = {name: share(found) for name, found in hits.items()}
    return {"items": items, "repeats": repeats, "score": rate, "covers": covered}


WINDOW_CASES = tuple((alike, windows) for alike in (0.0, 0.6) for windows in (3, 4, 6, 8, 32))


def kl_intervals(case: tuple[float, int], runs: int) -> dict[str, Any]:
    """Coverage of the interval of the mean KL over windows, and along one continuing text."""
    alike, windows = case
    rng = np.random.default_rng(windows)
    hits: dict[str, list[bool]] = {"t": [], "bootstrap": []}
    spread, log_sd = (0.3, 1.5) if alike == 0 else (0.5, 2.0)
    truth = math.exp(spread**2 / 2 + log_sd**2 / 2)
    for _ in range(runs):
        levels = _chain(rng, alike, (windows,)) * spread
        tokens = _chain(rng, 0.5, (256, windows)) * log_sd
        values = np.exp(levels + tokens)
        found = interval_of_mean(list(values.T), range(windows))
        assert found is not None
        hits["t"].append(found.low <= truth <= found.high)
        means = values.mean(axis=0)
        again = means[rng.integers(0, windows, (500, windows))].mean(axis=1)
        low, high = np.quantile(again, [0.025, 0.975])
        hits["bootstrap"].append(low <= truth <= high)
    covered = {name: share(marks) for name, marks in hits.items()}
    return {"windows": windows, "alike": alike, "covers": covered}


def _chain(rng: np.random.Generator, ratio: float, shape: tuple[int, ...]) -> Floats:
    """A standard normal autoregressive process along the first axis."""
    noise = rng.normal(size=shape)
    for step in range(1, shape[0]):
        noise[step] = ratio * noise[step - 1] + math.sqrt(1 - ratio**2) * noise[step]
    return noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    parts: dict[str, tuple[Any, Sequence[Any]]] = {
        "single_answers": (single_answers, SIZES),
        "repeats_and_groups": (repeats_and_groups, cases()),
        "whole_groups": (whole_groups, WHOLE_GROUPS),
        "concentrated": (concentrated, FEW_ITEMS),
        "suites": (suites, SUITE_CASES),
        "looks": (looks, LOOK_CASES),
        "score_intervals": (score_intervals, SCORE_CASES),
        "kl_intervals": (kl_intervals, WINDOW_CASES),
    }
    results: dict[str, Any] = {"runs": args.runs}
    with ProcessPoolExecutor(args.jobs) as pool:
        started = {
            name: [pool.submit(part, case, args.runs) for case in given]
            for name, (part, given) in parts.items()
        }
        for name, waiting in started.items():
            results[name] = [one.result() for one in waiting]
            print(name, *results[name], sep="\n   ", flush=True)
    publish(results, args.out)


def publish(results: dict[str, Any], out: Path) -> None:
    """Write the record with what its rows come to."""
    exact = max(row["wrong_go"]["score bound"] for row in results["single_answers"])
    drawn = max(
        row[f"wrong_go_{kind}"]
        for row in results["repeats_and_groups"]
        for kind in ("even", "uneven")
    )
    together = max(row["wrong_go"] for row in results["whole_groups"])
    results["largest_wrong_go"] = {
        "single answers, exact": exact, "simulated": drawn, "whole groups": together
    }  # fmt: skip
    record.write(
        out,
        name="verdicts",
        question="What is a verdict worth, on made-up comparisons whose truth is known?",
        command="PYTHONPATH=src python benchmarks/verdicts.py",
        figures=verdict_figures(results),
        results=results,
    )


def verdict_figures(results: dict[str, Any]) -> list[Figure]:
    """How often GO is wrong, at worst over all sizes and kinds."""
    largest = results["largest_wrong_go"]
    t_bound = max(row["wrong_go"]["t bound"] for row in results["single_answers"])
    nominal = Against("nominally at most", 5, is_bound=True)
    name = "GO although the loss is the margin"
    exact = {"worst of": f"{len(results['single_answers'])} sizes", "answers": "one an item"}
    drawn = {"worst of": f"{2 * len(results['repeats_and_groups'])} cases", "answers": "repeated"}
    count = len(results["whole_groups"])
    wholes = {"worst of": f"{count} cases", "answers": "in groups that change as wholes"}
    return [
        Figure(name, largest["single answers, exact"], "%", "evaluation", exact,
               (nominal, Against("with a t bound", t_bound)), is_headline=True),
        Figure(name, largest["simulated"], "%", "evaluation", drawn, (nominal,)),
        Figure(name, largest["whole groups"], "%", "evaluation", wholes, (nominal,)),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
