"""Before a run: how likely each verdict is, which loss would show, and what it would cost.

Uses planning values, or those that a pilot run measured. The verdicts are those of the rule that
`compare` applies (`bounds`), on measured differences drawn around the true one.
Source of the idea: E. Miller, arXiv 2411.00640.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from halfbyte.errors import UsageError
from halfbyte.evals.judging.bounds import LEVEL, Design, would_rule_out
from halfbyte.evals.judging.looks import MACRO_MARGIN
from halfbyte.evals.judging.render import percent, table
from halfbyte.evals.judging.stats import POWER_Z, is_decided, smallest
from halfbyte.evals.records import BenchmarkResult, read_run
from halfbyte.evals.tasks.benchmark import Benchmark

LOSSES = (0.0, 0.005, 0.01, 0.02)
_DRAWS = 10_000
# The group that an item is in is larger than the mean group by this factor where sizes differ: 1.4
# for SciCode's 65 test problems of 1 to 15 steps; AA-LCR's document sets are taken to be like them.
_UNEVEN = 1.4
_OFTEN = 0.8  # what is promised comes true four times out of five
_MOST_REPEATS = 100_000


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One benchmark of a planned comparison; losses in scores (0.01 = one point), costs per arm.

    standard_error   of the difference, groups included
    variance         mean p(1-p) of an item's answers; design_factor widens the error for groups
    shown            loss at which the two-sided p value is below 5 % four times out of five; NaN if
                     not even the loss of every point would
    shown_holm       the same once p is corrected for all benchmarks of the plan (Holm's first step)
    fails            loss that ends NO-GO four times out of five, corrected likewise
    go_if_equal      chance of GO for equal arms
    repeats_for_go   repeats at which equal arms end GO four times out of five; None if none would
    """

    title: str
    items: int
    groups: int
    repeats: int
    is_measured: bool
    variance: float
    design_factor: float
    standard_error: float
    shown: float
    shown_holm: float
    fails: float
    margin: float
    go_if_equal: float
    repeats_for_go: int | None
    prompt_tokens: float
    output_tokens: float
    hours: float

    @property
    def design(self) -> Design:
        """The plan's design in the form that the rule of verdicts takes."""
        return _design(self.items, self.groups, self.repeats)

    def error_at(self, loss: float) -> float:
        """Standard error of the difference where the candidate truly loses so much.

        A loss brings variance of its own: with p(1-p) = v before, it is at most that of an item
        that was sure and now is lost with this chance.
        """
        after = (1 - loss) ** 2 * self.variance + loss * (1 - loss)
        total = (self.variance + after) / (self.items * self.repeats)
        return self.design_factor * math.sqrt(total)


class Chances(NamedTuple):
    """How often the whole comparison ends in each verdict."""

    go: float
    inconclusive: float
    no_go: float


class _Values(NamedTuple):
    """What is known of a benchmark before the run: planning values, or a pilot's."""

    variance: float
    design_factor: float
    prompt_tokens: float
    output_tokens: float
    is_measured: bool


def plan_run(
    benchmarks: Sequence[Benchmark],
    repeats: int | None,
    limit: int | None,
    throughput: float,
    pilot: Path | None,
    prompt_throughput: float | None = None,
) -> list[PlanLine]:
    """Plan each benchmark of a run: what it would show and cost.

    throughput         output tokens per second, all requests together
    prompt_throughput  prompt tokens per second; None: prompts take no time
    pilot              folder of a run whose variances and lengths are used instead

    Raises UsageError for a rate that is not positive.
    """
    for rate in (throughput, prompt_throughput):
        if rate is not None and rate <= 0:
            raise UsageError(
                f"a throughput of {rate:g} tokens/s plans nothing; give a positive one"
            )
    measured = read_run(pilot).benchmarks if pilot is not None else {}
    return [
        _line(
            benchmark,
            _values(benchmark, measured.get(benchmark.name)),
            repeats or benchmark.repeats,
            limit,
            # The macro mean is a look as well, unless it is the mean of one.
            looks=len(benchmarks) + (len(benchmarks) > 1),
            rates=(throughput, prompt_throughput),
        )
        for benchmark in benchmarks
    ]


def _values(benchmark: Benchmark, result: BenchmarkResult | None) -> _Values:
    attempts = result.items * result.repeats if result else 0
    if result is None or not attempts or "item_variance" not in result.metrics:
        return _Values(
            benchmark.plan_variance,
            benchmark.plan_design,
            benchmark.plan_prompt_tokens,
            benchmark.plan_output_tokens,
            is_measured=False,
        )
    return _Values(
        result.metrics["item_variance"],
        result.metrics.get("design_factor", benchmark.plan_design),
        result.prompt_tokens // attempts,
        result.completion_tokens // attempts,
        is_measured=True,
    )


def _size(benchmark: Benchmark, limit: int | None) -> tuple[int, int]:
    """Items and groups; a limit counts problems where a problem is a trajectory."""
    items, groups = benchmark.full_items, benchmark.plan_groups or benchmark.full_items
    wanted = items if limit is None else limit
    if benchmark.is_trajectory:
        share = min(1.0, wanted / groups)
    else:
        share = min(1.0, wanted / items)
    return round(items * share), max(1, min(round(items * share), math.ceil(groups * share)))


def _design(items: int, groups: int, repeats: int) -> Design:
    return Design(items, groups, repeats, 1.0 if groups == items else _UNEVEN)


def _line(
    benchmark: Benchmark,
    values: _Values,
    repeats: int,
    limit: int | None,
    *,
    looks: int,
    rates: tuple[float, float | None],
) -> PlanLine:
    items, groups = _size(benchmark, limit)

    def error_of(count: int) -> float:
        return values.design_factor * math.sqrt(2 * values.variance / (items * count))

    def decides(count: int) -> bool:
        design = _design(items, groups, count)
        return is_decided(0.0, error_of(count), design, benchmark.margin, LEVEL)

    requests = items * repeats
    seconds = values.output_tokens / rates[0]
    if rates[1] is not None:
        seconds += values.prompt_tokens / rates[1]
    line = PlanLine(
        title=benchmark.title,
        items=items,
        groups=groups,
        repeats=repeats,
        is_measured=values.is_measured,
        variance=values.variance,
        design_factor=values.design_factor,
        standard_error=error_of(repeats),
        shown=math.nan,
        shown_holm=math.nan,
        fails=math.nan,
        margin=benchmark.margin,
        go_if_equal=math.nan,
        repeats_for_go=smallest(decides, 0, _MOST_REPEATS) if groups > 1 else None,
        prompt_tokens=values.prompt_tokens * requests,
        output_tokens=values.output_tokens * requests,
        hours=seconds * requests / 3600,
    )
    return replace(
        line,
        shown=_smallest_loss(lambda loss: _is_shown(line, loss, 0.05)),
        shown_holm=_smallest_loss(lambda loss: _is_shown(line, loss, 0.05 / looks)),
        fails=_smallest_loss(
            lambda loss: _Measured([line], loss).no_go(LEVEL / looks).mean() >= _OFTEN,
            line.margin,
        ),
        go_if_equal=float(_Measured([line], 0.0).go[:, 0].mean()),
    )


def _smallest_loss(is_enough: Callable[[float], bool], low: float = 0.0) -> float:
    """The smallest loss above `low` that is enough, supposing that all larger ones are."""
    high = 1.0
    if not is_enough(high):
        return math.nan
    while high - low > 1e-5:
        middle = (low + high) / 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


def _is_shown(line: PlanLine, loss: float, level: float) -> bool:
    """Whether a two-sided p value is below the level four times out of five."""
    if line.repeats == 1 and line.groups == line.items:
        return _flips_show(line, loss, level) >= _OFTEN
    quantile = float(distributions.t.ppf(1 - level / 2, max(1, line.groups - 1)))
    return (quantile + POWER_Z) * line.error_at(loss) <= loss


def _flips_show(line: PlanLine, loss: float, level: float) -> float:
    """Chance that the exact test on flips finds the loss, which it does in whole flips only."""
    changed = min(1.0, line.error_at(loss) ** 2 * line.items + loss**2)
    flips = np.arange(line.items + 1)
    # The most answers won among so many flips with which the loss is still shown.
    most_won = distributions.binom.ppf(level / 2, flips, 0.5)
    most_won -= distributions.binom.cdf(most_won, flips, 0.5) > level / 2
    finds = distributions.binom.cdf(most_won, flips, max(0.0, (1 - loss / changed) / 2))
    return float((distributions.binom.pmf(flips, line.items, changed) * finds).sum())


class _Measured:
    """Comparisons drawn at random around one true loss on every benchmark; (draws, benchmarks)."""

    def __init__(self, lines: Sequence[PlanLine], loss: float) -> None:
        generator = np.random.default_rng(0)
        shape = (_DRAWS, len(lines))
        self.freedom = np.array([max(1, line.groups - 1) for line in lines], dtype=np.float64)
        true = np.array([line.error_at(loss) for line in lines])
        self.means = -loss + true * generator.standard_normal(shape)
        self.errors = true * np.sqrt(generator.chisquare(self.freedom, shape) / self.freedom)
        self.go = np.stack(
            [
                would_rule_out(self.means[:, i], self.errors[:, i], line.design, line.margin, LEVEL)
                & (line.groups > 1)
                for i, line in enumerate(lines)
            ],
            axis=1,
        )
        self.lines = lines

    def no_go(self, level: float) -> NDArray[np.bool_]:
        """Whether a loss beyond the margin is shown at this level."""
        return np.stack(
            [
                would_rule_out(
                    -self.means[:, i], self.errors[:, i], line.design, -line.margin, level
                )
                & (line.groups > 1)
                for i, line in enumerate(self.lines)
            ],
            axis=1,
        )

    def macro(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """GO and p value of the macro mean."""
        mean = self.means.mean(axis=1)
        total = np.square(self.errors).sum(axis=1)
        error = np.sqrt(total) / self.means.shape[1]
        freedom = total**2 / (self.errors**4 / self.freedom).sum(axis=1)
        t = (mean + MACRO_MARGIN) / error
        p = np.asarray(distributions.t.cdf(t, freedom))
        return p > 1 - LEVEL, p


def suite_chances(lines: Sequence[PlanLine], loss: float) -> Chances:
    """Chances of the whole comparison's verdicts if every benchmark truly loses so much.

    GO needs every benchmark and the macro mean; one NO-GO after Holm is one for all. Supposes that
    no attempt is missing and answers end alike. Example: loss 0 is equal arms.
    """
    drawn = _Measured(lines, loss)
    # Holm rejects something exactly if the smallest p value passes its first step.
    first_step = LEVEL / (len(lines) + (len(lines) > 1))
    go, no_go = drawn.go.all(axis=1), drawn.no_go(first_step).any(axis=1)
    if len(lines) > 1:
        macro_go, macro_p = drawn.macro()
        go, no_go = go & macro_go, no_go | (macro_p < first_step)
    go &= ~no_go
    return Chances(float(go.mean()), float((~go & ~no_go).mean()), float(no_go.mean()))


def format_eval_plan(
    lines: Sequence[PlanLine],
    *,
    with_prompts: bool = False,
    losses: Sequence[float] = LOSSES,
    price_per_hour: float | None = None,
) -> str:
    """The plan as a table, points and hours per arm; `with_prompts`: hours count those too.

    price_per_hour  of all that makes the throughput, in any currency
    """
    head = [
        "benchmark", "items", "repeats", "SE of D", "loss shown", "after Holm", "NO-GO from",
        "margin", "GO if equal", "repeats for GO", "prompt Mtok", "output Mtok", "hours", "values",
    ]  # fmt: skip
    rows = [head]
    for line in lines:
        rows.append(
            [
                line.title, str(line.items), str(line.repeats), percent(line.standard_error),
                percent(line.shown), percent(line.shown_holm), percent(line.fails),
                percent(line.margin, 1), f"{100 * line.go_if_equal:.0f} %",
                "none" if line.repeats_for_go is None else str(line.repeats_for_go),
                f"{line.prompt_tokens / 1e6:.1f}", f"{line.output_tokens / 1e6:.1f}",
                f"{line.hours:.2f}", "pilot" if line.is_measured else "planning",
            ]
        )  # fmt: skip
    output = sum(line.output_tokens for line in lines) / 1e6
    hours = sum(line.hours for line in lines)
    macro = math.sqrt(sum(line.standard_error**2 for line in lines)) / len(lines)
    told = [
        table(rows),
        f"all: {output:.1f} M output tokens and {hours:.2f} hours per arm; "
        f"SE of the macro difference {percent(macro)} points",
    ]
    if price_per_hour is not None:
        cost = hours * price_per_hour
        told.append(f"cost: {cost:,.2f} per arm at {price_per_hour:,.2f} an hour")
    prompts = "; reading prompts comes on top (--prompt-throughput counts it)"
    return "\n".join(
        [
            *told,
            "",
            "the verdict of the whole comparison:",
            table(_chances(lines, losses)),
            *_can_decide(lines),
            "",
            *_MEANINGS,
            "hours: output tokens at the given throughput"
            + (", and prompts at theirs" if with_prompts else prompts),
        ]
    )


_MEANINGS = (
    "loss shown: the smallest true loss, in points, whose two-sided p value is below 5 % "
    "four times out of five; after Holm: with all benchmarks counted as looks",
    "NO-GO from: the true loss that ends NO-GO four times out of five, after Holm",
    "GO if equal, repeats for GO: chance of GO for equal arms, and the repeats that make "
    "it 80 %, for that benchmark alone",
)


def _chances(lines: Sequence[PlanLine], losses: Sequence[float]) -> list[list[str]]:
    """The verdicts that true losses end in: a head, then a row for each loss."""
    rows = [["true loss on every benchmark", "GO", "INCONCLUSIVE", "NO-GO"]]
    for loss in losses:
        name = "none (equal arms)" if loss == 0 else f"{100 * loss:g} points"
        rows.append([name, *(f"{100 * share:.0f} %" for share in suite_chances(lines, loss))])
    return rows


def _can_decide(lines: Sequence[PlanLine]) -> list[str]:
    """Say in words what the plan can show and what it cannot."""
    can = [line.title for line in lines if line.go_if_equal >= 0.8]
    cannot = [line.title for line in lines if line.go_if_equal < 0.8]
    go = suite_chances(lines, 0.0).go
    said = []
    if can:
        said.append(f"equal arms are likely to end GO on {', '.join(can)}")
    if cannot:
        said.append(
            f"{', '.join(cannot)} will more often than one time in five end INCONCLUSIVE although "
            "the arms are equal"
        )
    if go < 0.8:
        said.append(
            f"as a whole this plan ends GO for equal arms in {100 * go:.0f} % of runs: it can show "
            "a large loss, hardly that there is none (--suite decide can)"
        )
    return ["; ".join(said)] if said else []
