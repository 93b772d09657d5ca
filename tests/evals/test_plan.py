"""The planner foretells the verdicts that the tool then gives."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as distributions

from evals.test_compare import grid, write_arm
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.evals.judging.bounds import p_beyond, pair, rules_out_loss
from halfbyte.evals.judging.compare import compare_runs
from halfbyte.evals.judging.plan import PlanLine, _size, format_eval_plan, plan_run, suite_chances
from halfbyte.evals.judging.stats import mcnemar, sign_flip
from halfbyte.evals.tasks.suite import BENCHMARKS, REPEATS, SUITES, find_benchmarks


def test_the_default_suite_says_that_it_cannot_end_go() -> None:
    lines = plan_run(find_benchmarks(["seed"]), None, None, 8000.0, None)
    assert suite_chances(lines, 0.0).go < 0.01
    text = format_eval_plan(lines)
    assert "equal arms are likely to end GO on MMLU Pro;" in text
    assert "IFBench, MMMU Pro will more often than one time in five end INCONCLUSIVE" in text
    assert "ends GO for equal arms in 0 % of runs" in text and "--suite decide can" in text


def test_the_suite_that_decides_ends_go_four_times_of_five_and_names_its_cost() -> None:
    lines = plan_run(find_benchmarks(["decide"]), None, None, 8000.0, None)
    assert [line.title for line in lines] == [BENCHMARKS[n].title for n in SUITES["seed"]]
    chances = suite_chances(lines, 0.0)
    assert chances.go >= 0.8 and chances.no_go < 0.01
    assert suite_chances(lines, 0.01).go < 0.05  # one point is the margin of three of them
    assert suite_chances(lines, 0.03).no_go > 0.95
    assert "likely to end GO on MMLU Pro, GPQA Diamond" in format_eval_plan(lines)
    assert all(
        line.output_tokens == line.items * count * BENCHMARKS[name].plan_output_tokens
        for line, (name, count) in zip(lines, REPEATS["decide"].items(), strict=True)
    )


def simulated(name: str, line: PlanLine, loss: float, runs: int = 250) -> dict[str, float]:
    """Made-up answers of the planner's own variance, by the rules of the comparison."""
    rng = np.random.default_rng([line.items, line.repeats])
    known, score = BENCHMARKS[name], 0.8
    size = known.plan_variance / (score * (1 - score) - known.plan_variance)
    seen = {"go": 0, "no_go": 0, "no_go_of_8": 0, "shown": 0}
    for _ in range(runs):
        rates = rng.beta(score * size, (1 - score) * size, line.items)
        b = rng.binomial(line.repeats, rates) / line.repeats
        c = rng.binomial(line.repeats, rates * (1 - loss / score)) / line.repeats
        items = pair(b, c, draws=line.repeats)
        seen["go"] += rules_out_loss(items, known.margin)
        seen["no_go"] += rules_out_loss(items.swapped(), -known.margin)
        seen["no_go_of_8"] += rules_out_loss(items.swapped(), -known.margin, 0.05 / 8)
        if line.repeats == 1:
            p_value = mcnemar(int((c < b).sum()), int((c > b).sum()))
        else:
            t = (c - b).mean() / ((c - b).std(ddof=1) / len(b) ** 0.5)
            p_value = float(2 * distributions.t.sf(abs(t), len(b) - 1))
        seen["shown"] += p_value < 0.05
    return {kind: count / runs for kind, count in seen.items()}


# 250 runs: one standard error of four in five is 2.5 points.
NEAR = 0.09


@pytest.mark.parametrize(
    "name, repeats, limit",
    [("ifbench", 8, None), ("gpqa_diamond", 16, 40), ("mmmu_pro", 1, 300), ("aime2025", 32, None)],
)
def test_what_one_benchmark_is_promised_comes_true(
    name: str, repeats: int, limit: int | None
) -> None:
    (line,) = plan_run(find_benchmarks([name]), repeats, limit, 8000.0, None)
    assert simulated(name, line, 0.0)["go"] == pytest.approx(line.go_if_equal, abs=NEAR)
    assert simulated(name, line, line.shown)["shown"] == pytest.approx(0.8, abs=NEAR)
    assert simulated(name, line, line.fails)["no_go"] == pytest.approx(0.8, abs=NEAR)
    among = {x.title: x for x in plan_run(find_benchmarks(["seed"]), repeats, limit, 1.0, None)}
    fails = among[line.title].fails
    assert simulated(name, line, fails)["no_go_of_8"] == pytest.approx(0.8, abs=NEAR)


def test_repeats_for_a_go_are_enough_for_one() -> None:
    (line,) = plan_run(find_benchmarks(["ifbench"]), 8, None, 8000.0, None)
    assert line.repeats_for_go is not None
    (again,) = plan_run(find_benchmarks(["ifbench"]), line.repeats_for_go, None, 8000.0, None)
    assert again.go_if_equal == pytest.approx(0.8, abs=0.02)
    assert simulated("ifbench", again, 0.0)["go"] == pytest.approx(0.8, abs=NEAR)


def test_hours_are_tokens_by_their_rates() -> None:
    known = BENCHMARKS["ifbench"]
    (line,) = plan_run([known], 2, 50, 100.0, None, 1000.0)
    tokens = (known.plan_output_tokens * 100, known.plan_prompt_tokens * 100)
    assert (line.output_tokens, line.prompt_tokens) == tokens
    assert line.hours == pytest.approx((tokens[0] / 100 + tokens[1] / 1000) / 3600, rel=1e-9)


def test_a_loss_that_not_even_everything_lost_would_show_has_no_number() -> None:
    (line,) = plan_run(find_benchmarks(["mmlu_pro"]), 1, 4, 8000.0, None)
    assert math.isnan(line.shown) and math.isnan(line.shown_holm)
    assert " - " in format_eval_plan([line])


def test_few_groups_and_more_looks_ask_for_larger_losses() -> None:
    (alone,) = plan_run(find_benchmarks(["aime2025"]), 32, None, 8000.0, None)
    among = plan_run(find_benchmarks(["seed"]), None, None, 8000.0, None)[4]
    assert alone.standard_error == among.standard_error == pytest.approx(0.0099, abs=1e-4)
    # The loss brings variance of its own, so that it has to be a little larger.
    error = alone.error_at(alone.shown)
    assert 1.05 < error / alone.standard_error < 1.25
    assert alone.error_at(0.0) == alone.standard_error
    assert alone.shown == among.shown == pytest.approx((2.045 + 0.8416) * error, rel=0.01)
    assert among.shown_holm > alone.shown_holm == alone.shown
    assert among.fails > alone.fails > 0.015 + (1.699 + 0.8416) * alone.error_at(alone.fails)
    # Document sets and problems share luck.
    lcr, scicode = among, plan_run(find_benchmarks(["scicode"]), 8, None, 1.0, None)[0]
    assert lcr.groups == 30 and scicode.groups == 80
    assert scicode.standard_error > 1.1 * (2 * 0.0931 / 338 / 8) ** 0.5


def test_a_limit_counts_problems_where_they_are_trajectories() -> None:
    scicode, lcr = plan_run(find_benchmarks(["scicode", "aa_lcr"]), None, 10, 8000.0, None)
    assert (scicode.items, scicode.groups) == (42, 10)
    assert (lcr.items, lcr.groups) == (10, 3)
    (one,) = plan_run(find_benchmarks(["gpqa_diamond"]), 1, 1, 8000.0, None)
    assert one.repeats_for_go is None and one.go_if_equal == 0


def test_a_limit_is_kept_exactly_and_groups_never_outnumber_items() -> None:
    for benchmark in BENCHMARKS.values():
        for limit in range(1, min(400, benchmark.full_items)):
            items, groups = _size(benchmark, limit)
            assert 1 <= groups <= items <= benchmark.full_items, (benchmark.name, limit)
            assert benchmark.is_trajectory or items == limit


@pytest.mark.parametrize("rates", [(0.0, None), (-1.0, None), (8000.0, 0.0)])
def test_a_rate_that_is_not_positive_plans_nothing(rates: tuple[float, float | None]) -> None:
    with pytest.raises(UsageError, match="give a positive one"):
        plan_run(find_benchmarks(["quick"]), None, None, rates[0], None, rates[1])


def test_a_pilot_measures_how_groups_share_luck(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    luck = rng.random((80, 4)) < 0.5

    def score(i: int, r: int) -> float:
        return float(luck[i // 4, r])

    scores = {(f"p{i // 4}-{i}", r): score(i, r) for i in range(320) for r in range(4)}
    folder = write_arm(tmp_path, "pilot", scores, "scicode")
    (line,) = plan_run(find_benchmarks(["scicode"]), 8, None, 8000.0, folder)
    # Four steps that always agree are one: twice the error of steps alone.
    assert line.is_measured
    assert line.standard_error == pytest.approx(2 * (2 * 0.25 / 338 / 8) ** 0.5, rel=0.1)
    alone = write_arm(tmp_path, "alone", grid(50, 4, lambda i, r: float((i + r) % 2)))
    (line,) = plan_run(find_benchmarks(["gpqa_diamond"]), 8, None, 8000.0, alone)
    assert line.standard_error == pytest.approx((2 * (1 / 3) / 198 / 8) ** 0.5, rel=0.1)


def test_a_plan_of_one_has_no_macro_look() -> None:
    (line,) = plan_run(find_benchmarks(["mmlu_pro"]), None, None, 8000.0, None)
    chances = suite_chances([line], 0.0)
    assert chances.go == pytest.approx(line.go_if_equal, abs=1e-3)
    assert sum(chances) == pytest.approx(1.0)


def test_the_command_prints_chances_for_given_losses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "plan", "--suite", "decide", "--loss", "0.3", "3"]) == 0
    text = capsys.readouterr().out
    assert "0.3 points" in text and "3 points" in text and "equal arms)" not in text
    assert "hours per arm" in text


def test_the_command_prints_what_an_arm_costs(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "plan", "--suite", "quick", "--throughput", "1"]
    assert main([*command, "--price-per-hour", "4.5"]) == 0
    printed = capsys.readouterr().out
    hours = float(printed.split(" tokens and ")[1].split(" hours per arm")[0])
    cost = float(printed.split("cost: ")[1].split(" per arm at 4.50 an hour")[0])
    assert hours > 0 and cost == pytest.approx(4.5 * hours, abs=0.03)


def test_a_suite_may_ask_more_often_than_its_benchmarks_do() -> None:
    repeats = {b.name: b.repeats for b in find_benchmarks(["decide"])}
    assert repeats == REPEATS["decide"]
    assert {b.name: b.repeats for b in find_benchmarks(["seed"])} == {
        name: BENCHMARKS[name].repeats for name in SUITES["seed"]
    }
    # The first name that brings a benchmark decides.
    (first, *_) = find_benchmarks(["mmlu_pro", "decide"])
    assert first == replace(BENCHMARKS["mmlu_pro"])


def test_p_values_are_those_of_the_comparison(tmp_path: Path) -> None:
    b = write_arm(tmp_path, "b", grid(60, 1, lambda i, r: 1.0))
    c = write_arm(tmp_path, "c", grid(60, 1, lambda i, r: float(i >= 7)))
    row = compare_runs(b, c).benchmarks["gpqa_diamond"]
    assert row.p_value == mcnemar(7, 0)
    assert row.p_beyond == p_beyond(pair([1.0] * 60, [0.0] * 7 + [1.0] * 53), row.margin)
    assert sign_flip([-1.0] * 7) == pytest.approx(mcnemar(7, 0), abs=0.005)
