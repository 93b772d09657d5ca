"""Comparison of two runs from records alone: pairing, guards, flips, verdicts."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.errors import UsageError
from halfbyte.evals.judging.bounds import p_beyond, pair
from halfbyte.evals.judging.compare import compare_runs
from halfbyte.evals.judging.comparison import write_comparison
from halfbyte.evals.judging.guards import blockers
from halfbyte.evals.judging.render import format_comparison, what_would_decide
from halfbyte.evals.judging.summary import summarise
from halfbyte.evals.records import (
    FORMAT,
    BenchmarkResult,
    GradedAttempt,
    RunRecord,
    read_run,
    record_row,
    write_run,
)
from halfbyte.json_lines import JsonLines

Scores = Mapping[tuple[str, int], float | None]


def record(
    item: str, repeat: int, score: float | None, group: str, ending: str = ""
) -> GradedAttempt:
    cause = ending or {None: "error", 1.0: "ok"}.get(score, "wrong")
    return GradedAttempt(
        "r", "a", "gpqa_diamond", "p", "h", item, group, "physics", repeat, 1, f"text {repeat}", "",
        "stop", 5, 7, 0, 0.5, "A", "B", score, cause, {}, "gone" if score is None else None, 0,  # type: ignore[arg-type]
    )  # fmt: skip


def write_arm(
    folder: Path,
    arm: str,
    scores: Scores,
    name: str = "gpqa_diamond",
    *,
    endings: Mapping[tuple[str, int], str] | None = None,
    prompts: str = "h",
    result_changes: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """One run of one benchmark; a folder that is there gets the benchmark added."""
    ended = endings or {}
    records = [
        replace(
            record(item, repeat, score, item.split("-")[0], ended.get((item, repeat), "")),
            arm=arm,
            benchmark=name,
        )
        for (item, repeat), score in scores.items()
    ]
    (folder / arm / name / "samples.jsonl").unlink(missing_ok=True)
    journal = JsonLines(folder / arm / name / "samples.jsonl")
    for one in records:
        journal.append(record_row(one))
    journal.close()
    identity = {
        "name": name, "title": name, "full_items": 198, "prompt_id": "p", "prompts_sha256": prompts,
        "scorer": "s", "source": "x", "licence": "y", "notes": [], "provenance": {},
        "max_tokens": 9,
    }  # fmt: skip
    result: BenchmarkResult = summarise(
        identity, records, expected=list(scores), partial=False, has_groups=False, wall_s=1.0
    )
    result = replace(result, **(result_changes or {}))
    file = folder / arm / "run.json"
    others = dict(read_run(file).benchmarks) if file.exists() else {}
    run = RunRecord(
        FORMAT, f"{arm}-1", arm, "m", "u", {}, {}, {"temperature": 0.7}, None, None, {}, "x86", "c",
        "", "", {**others, name: result},
    )  # fmt: skip
    write_run(file, replace(run, **changes))
    return folder / arm


def grid(items: int, repeats: int, score: Callable[[int, int], float | None]) -> Scores:
    return {(f"g{i}-{i}", r): score(i, r) for i in range(items) for r in range(repeats)}


def test_order_of_completion_does_not_matter(tmp_path: Path) -> None:
    scores = grid(40, 2, lambda i, r: float((i * 7 + r) % 3 == 0))
    a = write_arm(tmp_path, "a", scores)
    b = write_arm(tmp_path, "b", dict(reversed(list(scores.items()))))
    row = compare_runs(a, b).benchmarks["gpqa_diamond"]
    assert (row.difference.mean, row.lost, row.won) == (0.0, 0, 0)
    assert row.items == 40


def test_flips_of_single_answers_are_counted_and_tested_exactly(tmp_path: Path) -> None:
    a = write_arm(tmp_path, "a", grid(50, 1, lambda i, r: float(i < 30)))
    b = write_arm(tmp_path, "b", grid(50, 1, lambda i, r: float(3 <= i < 31)))
    comparison = compare_runs(a, b)
    row = comparison.benchmarks["gpqa_diamond"]
    assert (row.lost, row.won, row.unchanged) == (3, 1, 46)
    assert row.test == "exact McNemar on flips"
    assert row.p_value == pytest.approx(0.625)
    assert [flip.change for flip in row.flips] == [-1, -1, -1, 1]
    assert row.verdict == "INCONCLUSIVE"
    assert "would decide" in what_would_decide(row)
    text = format_comparison(comparison)
    assert "-4.00" in text and "INCONCLUSIVE" in text
    d = row.difference
    assert f"[{100 * d.low:+.2f}, {100 * d.high:+.2f}]" in text
    assert d.low == row.lower_one_sided


def test_missing_attempts_block_a_verdict(tmp_path: Path) -> None:
    a = write_arm(tmp_path, "a", grid(400, 1, lambda i, r: 1.0))
    holes = grid(400, 1, lambda i, r: None if i == 0 else 1.0)
    b = write_arm(tmp_path, "b", holes)
    # An incomplete run has no score and is left out with the reason.
    comparison = compare_runs(a, b)
    assert "1 of 400 attempts are missing" in comparison.left_out["gpqa_diamond"]
    assert comparison.verdict == "INCONCLUSIVE"


def test_other_repeats_block_a_verdict(tmp_path: Path) -> None:
    a = write_arm(tmp_path, "a", grid(400, 2, lambda i, r: 1.0))
    b = write_arm(tmp_path, "b", grid(400, 1, lambda i, r: 1.0))
    row = compare_runs(a, b).benchmarks["gpqa_diamond"]
    assert row.verdict == "INCONCLUSIVE"
    assert "repeats" in what_would_decide(row)
    # A blocked benchmark is no part of the mean, and the mean of nothing is no GO.
    comparison = compare_runs(a, b)
    assert comparison.macro.num_items == 0
    assert (comparison.macro_verdict, comparison.reason) == ("INCONCLUSIVE", "blocked")


def test_runs_that_asked_differently_are_not_compared(tmp_path: Path) -> None:
    scores = grid(10, 1, lambda i, r: 1.0)
    a = write_arm(tmp_path, "a", scores)
    b = write_arm(tmp_path, "b", scores, settings={"temperature": 0.0})
    with pytest.raises(UsageError, match="temperature"):
        compare_runs(a, b)
    c = write_arm(tmp_path, "c", scores, judge={"model": "other"})
    with pytest.raises(UsageError, match="judge"):
        compare_runs(a, c)
    # The same judge at two addresses is one judge.
    here, there = (
        write_arm(tmp_path, place, scores, judge={"model": "other", "url": place})
        for place in ("here", "there")
    )
    assert compare_runs(here, there).verdict == "INCONCLUSIVE"


def test_go_and_no_go_are_reached_with_enough_items(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.random(4000) < 0.5
    same = base ^ (rng.random(4000) < 0.01)
    worse = base & (rng.random(4000) > 0.2)
    arms = {
        name: write_arm(tmp_path, name, grid(4000, 1, lambda i, r, x=x: float(x[i])))  # type: ignore[misc]
        for name, x in (("base", base), ("same", same), ("worse", worse))
    }
    assert compare_runs(arms["base"], arms["same"]).verdict == "GO"
    assert compare_runs(arms["base"], arms["worse"]).verdict == "NO-GO"
    # A margin named beforehand replaces the benchmark's own.
    tight = compare_runs(arms["base"], arms["same"], {"gpqa_diamond": 0.0001})
    assert tight.benchmarks["gpqa_diamond"].verdict == "INCONCLUSIVE"


def test_groups_of_a_benchmark_widen_its_interval(tmp_path: Path) -> None:
    def whole_problem(i: int, r: int) -> float:
        return float((i // 10) % 2)

    def scores(f: Callable[[int, int], float]) -> Scores:
        return {(f"p{i // 10}-{i}", r): f(i, r) for i in range(200) for r in range(1)}

    a = write_arm(tmp_path, "a", scores(lambda i, r: 0.0), name="scicode")
    b = write_arm(tmp_path, "b", scores(whole_problem), name="scicode")
    row = compare_runs(a, b).benchmarks["scicode"]
    assert row.difference.num_groups == 20
    # Ten steps that move together count as one.
    assert row.difference.standard_error == pytest.approx(np.std([0, 1] * 10, ddof=1) / 20**0.5)


def test_comparison_file_is_strict_json(tmp_path: Path) -> None:
    scores = grid(1, 1, lambda i, r: 1.0)
    a, b = (write_arm(tmp_path, name, scores) for name in "ab")
    write_comparison(tmp_path / "c.json", compare_runs(a, b))
    text = (tmp_path / "c.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert json.loads(text)["benchmarks"]["gpqa_diamond"]["difference"]["standard_error"] is None
    assert asdict(compare_runs(a, b))["verdict"] == "INCONCLUSIVE"


# --- Nothing that was asked ends in GO unseen. ---


def both(folder: Path, name: str, b: Scores, c: Scores, **changes: Any) -> tuple[Path, Path]:
    return write_arm(folder, "b", b, name, **changes), write_arm(folder, "c", c, name, **changes)


def all_right(items: int, repeats: int = 1) -> Scores:
    return grid(items, repeats, lambda i, r: 1.0)


def test_equal_arms_of_enough_items_end_go(tmp_path: Path) -> None:
    """The control of what follows."""
    assert compare_runs(
        *both(tmp_path, "gpqa_diamond", all_right(400), all_right(400))
    ).verdict == ("GO")


def test_a_benchmark_that_only_one_arm_finished_stops_a_go(tmp_path: Path) -> None:
    both(tmp_path, "gpqa_diamond", all_right(400), all_right(400))
    lost = grid(300, 1, lambda i, r: None if i < 3 else 0.0)
    arms = both(tmp_path, "ifbench", all_right(300), lost)
    comparison = compare_runs(*arms)
    assert comparison.benchmarks["gpqa_diamond"].verdict == "GO"
    assert (comparison.verdict, comparison.reason) == ("INCONCLUSIVE", "blocked")
    assert comparison.macro_verdict == "INCONCLUSIVE"
    text = format_comparison(comparison)
    assert "3 of 300 attempts are missing" in text and "blocked by ifbench" in text


def test_a_benchmark_that_one_arm_was_never_asked_stops_a_go(tmp_path: Path) -> None:
    b, c = both(tmp_path, "gpqa_diamond", all_right(400), all_right(400))
    write_arm(tmp_path, "b", all_right(300), "ifbench")
    comparison = compare_runs(b, c)
    assert comparison.left_out == {"ifbench": "only in the baseline"}
    assert comparison.verdict == "INCONCLUSIVE"


def test_data_that_was_at_hand_for_neither_arm_is_listed_and_stops_nothing(tmp_path: Path) -> None:
    both(tmp_path, "gpqa_diamond", all_right(400), all_right(400))
    empty = {"status": "not measured", "reason": "no file", "score": None}
    b, c = both(tmp_path, "ifbench", {}, {}, result_changes=empty)
    comparison = compare_runs(b, c)
    assert comparison.verdict == "GO"
    assert "no file" in comparison.left_out["ifbench"]


def test_a_no_go_stands_beside_what_is_left_out(tmp_path: Path) -> None:
    worse = grid(400, 1, lambda i, r: float(i >= 80))
    b, c = both(tmp_path, "gpqa_diamond", all_right(400), worse)
    write_arm(tmp_path, "b", all_right(300), "ifbench")
    assert compare_runs(b, c).verdict == "NO-GO"


ENDINGS = ("length", "unparsed", "empty")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("side", ["b", "c"])
def test_answers_that_ended_differently_stop_a_go(tmp_path: Path, ending: str, side: str) -> None:
    scores = grid(1000, 1, lambda i, r: float(i >= 100))
    ended = {key: ending for key, score in scores.items() if not score}
    for arm in "bc":
        write_arm(tmp_path, arm, scores, endings=ended if arm == side else None)
    comparison = compare_runs(tmp_path / "b", tmp_path / "c")
    row = comparison.benchmarks["gpqa_diamond"]
    assert (row.verdict, row.reason, comparison.verdict) == (
        "INCONCLUSIVE", "blocked", "INCONCLUSIVE",
    )  # fmt: skip
    assert "10.0 % of the" in what_would_decide(row)


@pytest.mark.parametrize("ending", ENDINGS)
def test_answers_that_ended_alike_stop_nothing(tmp_path: Path, ending: str) -> None:
    scores = grid(1000, 1, lambda i, r: float(i >= 100))
    ended = {key: ending for key, score in scores.items() if not score}
    comparison = compare_runs(*both(tmp_path, "gpqa_diamond", scores, scores, endings=ended))
    assert comparison.verdict == "GO"
    assert not comparison.benchmarks["gpqa_diamond"].remarks


def test_a_gap_of_endings_that_may_be_chance_is_a_remark(tmp_path: Path) -> None:
    scores = grid(100, 1, lambda i, r: float(i >= 20))
    ended = {(f"g{i}-{i}", 0): "length" for i in range(2)}
    write_arm(tmp_path, "b", scores)
    write_arm(tmp_path, "c", scores, endings=ended)
    row = compare_runs(tmp_path / "b", tmp_path / "c", {"gpqa_diamond": 0.5}).benchmarks
    assert row["gpqa_diamond"].verdict == "GO"
    assert "2.0 % of the candidate" in row["gpqa_diamond"].remarks[0]


def test_refused_requests_are_no_proof_of_anything(tmp_path: Path) -> None:
    scores = grid(1000, 1, lambda i, r: float(i >= 300))
    ended = {key: "refused" for key, score in scores.items() if not score}
    # In the candidate alone: its loss is its server's.
    write_arm(tmp_path, "b", all_right(1000))
    write_arm(tmp_path, "c", scores, endings=ended)
    row = compare_runs(tmp_path / "b", tmp_path / "c").benchmarks["gpqa_diamond"]
    assert (row.verdict, row.reason) == ("INCONCLUSIVE", "blocked")
    assert "30.0 % of the candidate's requests" in what_would_decide(row)
    # In both arms alike: what they would have answered nobody knows.
    write_arm(tmp_path, "d", scores, endings=ended)
    both_refused = compare_runs(tmp_path / "c", tmp_path / "d")
    assert both_refused.verdict == "INCONCLUSIVE"
    # A few cannot change the verdict, and are named.
    one = {next(iter(ended)): "refused"}
    write_arm(tmp_path, "e", scores, endings=one)
    write_arm(tmp_path, "f", scores, endings=one)
    few = compare_runs(tmp_path / "e", tmp_path / "f")
    assert few.verdict == "GO"
    assert "0.1 % of the baseline's" in few.benchmarks["gpqa_diamond"].remarks[0]


@pytest.mark.parametrize("counted", [{"items": 500}, {"items": 300}, {"repeats": 2}])
def test_samples_that_are_not_what_the_run_counts_block(
    tmp_path: Path, counted: Mapping[str, int]
) -> None:
    b, c = both(tmp_path, "gpqa_diamond", all_right(400), all_right(400), result_changes=counted)
    row = compare_runs(b, c).benchmarks["gpqa_diamond"]
    assert row.verdict == "INCONCLUSIVE" and "its samples hold 400 x 1" in row.blockers[0]


def test_requests_that_differ_are_not_compared(tmp_path: Path) -> None:
    a = write_arm(tmp_path, "a", all_right(400))
    b = write_arm(tmp_path, "b", all_right(400), prompts="other")
    comparison = compare_runs(a, b)
    assert comparison.left_out == {"gpqa_diamond": "the rendered requests differ between the arms"}
    assert comparison.verdict == "INCONCLUSIVE"


def test_single_requests_that_differ_block_but_those_of_trajectories_may() -> None:
    """What a later step of a SciCode problem asks holds the model's own earlier answers."""
    one = record("g0-0", 0, 1.0, "g0")
    pairs = {"g0-0": [(one, replace(one, prompt_sha256="other"))]}
    identity = {
        "title": "t", "full_items": 1, "prompt_id": "p", "prompts_sha256": "h", "scorer": "s",
        "source": "x", "licence": "y", "notes": [], "provenance": {}, "max_tokens": 9,
    }  # fmt: skip

    def found(name: str) -> list[str]:
        result = summarise(
            {"name": name, **identity}, [one], expected=[("g0-0", 0)], partial=False,
            has_groups=False, wall_s=1.0,
        )  # fmt: skip
        return blockers(result, result, pairs, num_dropped)

    num_dropped = 2
    assert found("scicode") == ["2 items are not in both arms with all repeats"]
    num_dropped = 0
    assert found("gpqa_diamond") == ["1 requests differ between the arms"]
    assert found("of_ones_own") == ["1 requests differ between the arms"]
    assert found("scicode") == []


def test_a_run_whose_answers_are_gone_is_refused_by_its_file(tmp_path: Path) -> None:
    scores = grid(3, 1, lambda i, r: 1.0)
    b, c = write_arm(tmp_path, "b", scores), write_arm(tmp_path, "c", scores)
    (c / "gpqa_diamond" / "samples.jsonl").unlink()
    with pytest.raises(UsageError, match=r"c/gpqa_diamond has no samples\.jsonl"):
        compare_runs(b, c)


def test_runs_without_a_common_item_are_refused(tmp_path: Path) -> None:
    a = write_arm(tmp_path, "a", {("one-1", 0): 1.0})
    b = write_arm(tmp_path, "b", {("two-2", 0): 1.0})
    with pytest.raises(UsageError, match="no item in common"):
        compare_runs(a, b)


def test_other_sandboxes_and_packages_are_remarked_on(tmp_path: Path) -> None:
    a = write_arm(
        tmp_path,
        "a",
        all_right(400),
        sandbox={"limits": 1},
        packages={"numpy": "1", "halfbyte": "1"},
    )
    b = write_arm(
        tmp_path,
        "b",
        all_right(400),
        sandbox={"limits": 2},
        packages={"numpy": "2", "halfbyte": "2"},
    )
    remarks = compare_runs(a, b).remarks
    assert sum("different limits or versions" in text for text in remarks) == 1
    assert "numpy: 1 in the baseline, 2 here." in remarks
    assert not any("halfbyte" in text for text in remarks)
    assert not any("limits" in text for text in compare_runs(a, a).remarks)
    c = write_arm(tmp_path, "c", all_right(400), packages={"math-verify": "0.9"})
    assert "math-verify: None in the baseline, 0.9 here." in compare_runs(a, c).remarks


def test_arms_that_were_graded_by_other_rules_block(tmp_path: Path) -> None:
    arms = both(tmp_path, "gpqa_diamond", all_right(400), all_right(400))
    (file,) = (arms[1] / "gpqa_diamond").glob("samples.jsonl")
    again = file.with_name("samples.regrade-1.jsonl")
    again.write_text(file.read_text())
    comparison = compare_runs(*arms)
    (row,) = comparison.benchmarks.values()
    assert (comparison.verdict, comparison.reason) == ("INCONCLUSIVE", "blocked")
    assert "only the candidate was graded again" in row.blockers[0]
    (row,) = compare_runs(arms[1], arms[0]).benchmarks.values()
    assert "only the baseline was graded again" in row.blockers[0]
    (arms[0] / "gpqa_diamond" / again.name).write_text(file.read_text())
    assert compare_runs(*arms).verdict == "GO"
    write_arm(tmp_path, "c", all_right(400), result_changes={"scorer": "another"})
    (row,) = compare_runs(*arms).benchmarks.values()
    assert row.blockers == ["graded by 's' in the baseline, by 'another' in the candidate"]


def test_items_that_really_moved_are_told_from_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    noise = {name: rng.random((100, 8)) < 0.5 for name in "ab"}
    arms = {
        name: write_arm(tmp_path, name, grid(100, 8, lambda i, r, x=x: float(x[i, r])))  # type: ignore[misc]
        for name, x in noise.items()
    }
    moved = noise["a"].copy()
    moved[:50], moved[50:] = True, False
    arms["c"] = write_arm(tmp_path, "c", grid(100, 8, lambda i, r: float(moved[i, r])))

    def says_so(other: str) -> bool:
        row = compare_runs(arms["a"], arms[other]).benchmarks["gpqa_diamond"]
        return any("really moved" in text for text in row.remarks)

    assert says_so("c") and not says_so("b")


def change_samples(arm: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = arm / "gpqa_diamond" / "samples.jsonl"
    rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("copied", ["", "b", "c", "bc"])
def test_repeats_that_are_copies_count_once(
    tmp_path: Path, temperature: float, copied: str
) -> None:
    """At temperature 0, and where a server gives the same text whatever the seed."""
    sampling = {"temperature": temperature}
    b, c = both(tmp_path, "gpqa_diamond", all_right(100, 8), all_right(100, 8), settings=sampling)
    for arm in (b, c):
        if arm.name in copied:
            change_samples(arm, lambda row: {**row, "answer": "text"})
    comparison = compare_runs(b, c)
    (row,) = comparison.benchmarks.values()
    assert any("copies" in text for text in row.remarks) == bool(copied)
    is_go = temperature > 0 and not copied
    assert comparison.verdict == ("GO" if is_go else "INCONCLUSIVE")
    if is_go:
        # One answer that differs is proof that the server draws.
        change_samples(
            b, lambda r: {**r, "answer": "t" if (r["item_id"], r["repeat"]) == ("g0-0", 3) else ""}
        )
        assert compare_runs(b, c).verdict == "GO"


# --- Several benchmarks are several looks. ---

SEVEN = ("mmlu_pro", "gpqa_diamond", "aa_lcr", "scicode", "aime2025", "ifbench", "mmmu_pro")


def test_p_values_are_corrected_for_all_benchmarks(tmp_path: Path) -> None:
    for name in SEVEN:
        # 15 lost and 4 won: p = 0.019 on its own.
        lost = 15 if name == "ifbench" else 4
        b = grid(300, 1, lambda i, r: float(i >= 4))
        c = grid(300, 1, lambda i, r, lost=lost: float(i < 4 or i >= 4 + lost))  # type: ignore[misc]
        arms = both(tmp_path, name, b, c)
    row = compare_runs(*arms).benchmarks["ifbench"]
    assert row.p_value == pytest.approx(0.0192, abs=1e-3)
    assert row.p_value_holm == pytest.approx(7 * row.p_value)


def test_a_loss_that_is_beyond_only_as_the_single_look_is_no_no_go(tmp_path: Path) -> None:
    base = all_right(300)
    # Ten lost of 300 at a margin of 1 point: p beyond is between 0.05 / 8 and 0.05.
    lost = grid(300, 1, lambda i, r: float(i >= 10))
    alone = compare_runs(*both(tmp_path / "one", "ifbench", base, lost))
    row = alone.benchmarks["ifbench"]
    assert 0.05 / 8 < row.p_beyond < 0.05 and row.verdict == "NO-GO"
    for name in SEVEN:
        arms = both(tmp_path / "all", name, base, lost if name == "ifbench" else base)
    row = compare_runs(*arms).benchmarks["ifbench"]
    assert row.p_beyond_holm == pytest.approx(8 * row.p_beyond)
    assert (row.verdict, row.reason) == ("INCONCLUSIVE", "loss shown")
    assert "only look" in what_would_decide(row)
    assert "would decide" not in what_would_decide(row)


def test_groups_reach_the_p_value(tmp_path: Path) -> None:
    """Three of forty problems fail as wholes: steps that move together are one."""

    def scores(f: Callable[[int], float]) -> Scores:
        return {(f"p{i // 8}-{i}", 0): f(i // 8) for i in range(320)}

    b, c = both(tmp_path, "scicode", scores(lambda problem: 1.0), scores(lambda p: float(p >= 3)))
    row = compare_runs(b, c).benchmarks["scicode"]
    assert row.test == "sign-flip permutation"
    assert row.p_value == pytest.approx(0.25, abs=0.02)
    right, left = np.ones(320), np.repeat(np.arange(40) >= 3, 8).astype(float)
    problems = [str(i // 8) for i in range(320)]
    assert row.p_beyond == pytest.approx(p_beyond(pair(right, left, problems), row.margin))
    assert row.p_beyond > 10 * p_beyond(pair(right, left), row.margin)
    for stratum in row.by_stratum.values():
        assert stratum["low"] is not None  # one stratum of forty groups
    gpqa = compare_runs(
        *both(tmp_path / "g", "gpqa_diamond", all_right(40), grid(40, 1, lambda i, r: float(i > 5)))
    )
    assert gpqa.benchmarks["gpqa_diamond"].test == "exact McNemar on flips"


def test_a_stratum_of_one_group_has_no_interval(tmp_path: Path) -> None:
    scores = {(f"p{i % 1}-{i}", 0): float(i % 2) for i in range(10)}
    b, c = both(tmp_path, "scicode", scores, scores)
    (stratum,) = compare_runs(b, c).benchmarks["scicode"].by_stratum.values()
    assert (stratum["items"], stratum["low"], stratum["high"]) == (10, None, None)


# --- The three kinds of INCONCLUSIVE. ---


def test_a_loss_that_is_shown_is_not_denied(tmp_path: Path) -> None:
    """50 lost and 14 won of 4,000: worse beyond doubt, though perhaps by less than the margin."""
    b = grid(4000, 1, lambda i, r: float(i >= 14))
    c = grid(4000, 1, lambda i, r: float(i < 14 or i >= 64))
    comparison = compare_runs(*both(tmp_path, "gpqa_diamond", b, c))
    row = comparison.benchmarks["gpqa_diamond"]
    assert (row.verdict, row.reason) == ("INCONCLUSIVE", "loss shown")
    text = format_comparison(comparison)
    assert "a loss is shown" in text and "neither equality" not in text
    assert comparison.reason == "loss shown"


def test_too_little_data_is_told_as_such(tmp_path: Path) -> None:
    comparison = compare_runs(*both(tmp_path, "gpqa_diamond", all_right(20), all_right(20)))
    assert comparison.reason == "too wide"
    assert "neither equality nor a loss has been shown" in format_comparison(comparison)
    assert "9.5 %" not in format_comparison(comparison)
    assert "13.9 % (gpqa_diamond, 20)" in format_comparison(comparison)


def test_small_gaps_of_several_endings_add_up(tmp_path: Path) -> None:
    """A baseline that answers less often hides a loss, though no ending differs by a point."""
    items = 2_000
    kinds = ("length", "unparsed", "empty")
    ended = {(f"g{i}-{i}", 0): kinds[i % 3] for i in range(54)}

    def arm(folder: str, name: str, endings: Mapping[tuple[str, int], str], lost: int) -> Path:
        scores = {
            (f"g{i}-{i}", 0): float((f"g{i}-{i}", 0) not in endings and i < items - lost)
            for i in range(items)
        }
        return write_arm(tmp_path / folder, name, scores, endings=endings)

    baseline = arm("a", "base", ended, 0)
    hidden = compare_runs(baseline, arm("a", "cand", {}, 54))
    row = hidden.benchmarks["gpqa_diamond"]
    assert row.difference.mean == 0.0
    assert hidden.verdict == "INCONCLUSIVE" and row.reason == "blocked"
    (said,) = row.stops
    assert "2.7 % of the baseline's and 0.0 % of the candidate's" in said
    # The same endings in the candidate, spread over its own items: nothing to say.
    others = {(f"g{i}-{i}", 0): kinds[i % 3] for i in range(100, 154)}
    assert (
        compare_runs(baseline, arm("b", "cand", others, 0)).benchmarks["gpqa_diamond"].stops == []
    )


def test_losses_that_show_only_in_their_mean_are_not_denied(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    names = ("gpqa_diamond", "ifbench", "mmmu_pro", "aime2025")
    for name in names:
        flips = random.permutation(np.array([-1.0] * 32 + [1.0] * 20 + [0.0] * 948))
        b = (flips <= 0).astype(float)
        for arm, scores in (("base", b), ("cand", b + flips)):
            marks = {(f"g{i}-{i}", 0): float(mark) for i, mark in enumerate(scores)}
            write_arm(tmp_path, arm, marks, name=name)
    found = compare_runs(tmp_path / "base", tmp_path / "cand")
    assert {row.reason for row in found.benchmarks.values()} == {"too wide"}
    assert found.macro.high < 0 and found.macro_verdict == "INCONCLUSIVE"
    assert found.reason == "loss shown"
    text = format_comparison(found)
    assert text.endswith("a loss is shown on the mean, not whether it is beyond the margin)")


def test_looks_are_settled_with_the_first(tmp_path: Path) -> None:
    file = tmp_path / "first.json"
    scores = grid(50, 1, lambda i, _: float(i % 2))
    arms = write_arm(tmp_path, "base", scores), write_arm(tmp_path, "cand", scores)
    write_comparison(file, compare_runs(*arms, looks=2))
    with pytest.raises(UsageError, match="--looks 3 with --after"):
        compare_runs(*arms, looks=3, after=file)


@pytest.mark.parametrize("shift, said", [(0, "with the same seeds"), (1, "the noise floor")])
def test_a_checkpoint_against_itself_is_told(tmp_path: Path, shift: int, said: str) -> None:
    scores = grid(50, 1, lambda i, _: float(i % 2))
    checkpoint = {"identity": "tensors:1"}
    settings = {"temperature": 0.7, **({"seed_shift": shift} if shift else {})}
    baseline = write_arm(tmp_path, "base", scores, checkpoint=checkpoint)
    again = write_arm(tmp_path, "again", scores, checkpoint=checkpoint, settings=settings)
    assert "A/A run" in (text := format_comparison(compare_runs(baseline, again)))
    assert said in text
    other = write_arm(tmp_path, "other", scores, checkpoint={"identity": "tensors:2"})
    assert "A/A" not in format_comparison(compare_runs(baseline, other))


@pytest.mark.parametrize("arm", ["base", "cand"])
@pytest.mark.parametrize(
    "change, said",
    [
        ({"gold": "C"}, "1 answers were graded against other gold in the other arm"),
        ({"group": "g9"}, "1 answers belong to another group of items in the other arm"),
        ({"score": 500.0}, "1 scores are not between 0 and 1"),
        ({"score": -0.5}, "1 scores are not between 0 and 1"),
        ({"score": math.nan}, "1 scores are not between 0 and 1"),
    ],
)
def test_other_gold_and_odd_scores_block(
    tmp_path: Path, arm: str, change: dict[str, Any], said: str
) -> None:
    scores = grid(800, 1, lambda i, _: 1.0)
    base, cand = (write_arm(tmp_path, name, scores) for name in ("base", "cand"))
    assert compare_runs(base, cand).verdict == "GO"
    file = tmp_path / arm / "gpqa_diamond" / "samples.jsonl"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]) + "\n")
    found = compare_runs(base, cand)
    assert found.verdict == "INCONCLUSIVE"
    assert said in found.benchmarks["gpqa_diamond"].blockers


def test_a_look_says_which_one_it_is_and_what_another_needs(tmp_path: Path) -> None:
    scores = grid(50, 1, lambda i, _: float(i % 2))
    arms = write_arm(tmp_path, "base", scores), write_arm(tmp_path, "cand", scores)
    files = [tmp_path / f"{n}.json" for n in range(3)]

    def said(**options: Any) -> str:
        found = compare_runs(*arms, **options)
        write_comparison(files[0], found)
        return format_comparison(found)

    text = said()
    assert "D [90 %]: each end is wrong at most 5 % of the time" in text
    assert "A second look needs fresh repeats" in text
    assert "Look " not in text and "no further look" not in text
    text = said(looks=2)
    assert "D [95 %]: each end is wrong at most 2.5 %" in text
    assert "Look 1 of 2 planned ones." in text and "fresh repeats of both" not in text
    assert "There is no further look" not in text
    text = said(after=files[0])
    assert "Look 2 of 2 planned ones." in text
    assert "There is no further look at these arms." in text
    said()
    settings = {"temperature": 0.7, "seed_shift": 1}
    base, cand = (
        write_arm(tmp_path / "fresh", arm, scores, settings=settings) for arm in ("base", "cand")
    )
    text = format_comparison(compare_runs(base, cand, after=files[0]))
    assert "D [98 %]" in text
    assert "Look 2, not planned from the start: fresh repeats alone, at 1 %." in text
    assert "There is no further look at these arms." in text


def test_why_and_what_would_decide_are_told_apart(tmp_path: Path) -> None:
    def text(lost: int, won: int, items: int) -> str:
        random = np.random.default_rng(1)
        flips = random.permutation(np.array([-1] * lost + [1] * won + [0] * (items - lost - won)))
        folder = tmp_path / f"{lost}-{won}-{items}"
        more = {"full_items": 20_000}
        base = write_arm(
            folder, "base", grid(items, 1, lambda i, _: float(flips[i] <= 0)), result_changes=more
        )
        cand = write_arm(
            folder, "cand", grid(items, 1, lambda i, _: float(flips[i] >= 0)), result_changes=more
        )
        (row,) = compare_runs(base, cand).benchmarks.values()
        return what_would_decide(row)

    none = text(0, 0, 100)
    assert "neither equality nor a loss has been shown" in none
    assert "items without a change would decide" in none
    few = text(3, 3, 150)
    assert "neither equality nor a loss" in few and "without a change" not in few
    assert "a loss is shown, but not whether it is beyond the margin" in text(60, 20, 3000)
    assert text(0, 0, 1000) == ""
