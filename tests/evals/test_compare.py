"""Comparison of two runs from records alone: pairing, guards, flips, verdicts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.errors import UsageError
from halfbyte.evals.compare import compare_runs, write_comparison
from halfbyte.evals.records import (
    FORMAT,
    BenchmarkResult,
    Journal,
    Record,
    RunRecord,
    record_row,
    write_run,
)
from halfbyte.evals.render import format_comparison, what_would_decide
from halfbyte.evals.summary import summarise

Scores = Mapping[tuple[str, int], float | None]


def record(item: str, repeat: int, score: float | None, group: str) -> Record:
    cause = {None: "error", 1.0: "ok"}.get(score, "wrong")
    return Record(
        "r", "a", "gpqa_diamond", "p", "h", item, group, "physics", repeat, 1, "text", "", "stop",
        5, 7, 0, 0.5, "A", "B", score, cause, {}, "gone" if score is None else None, 0,  # type: ignore[arg-type]
    )  # fmt: skip


def write_arm(
    folder: Path, arm: str, scores: Scores, name: str = "gpqa_diamond", **changes: Any
) -> Path:
    records = [
        replace(record(item, repeat, score, item.split("-")[0]), arm=arm, benchmark=name)
        for (item, repeat), score in scores.items()
    ]
    journal = Journal(folder / arm / name / "samples.jsonl")
    for one in records:
        journal.append(record_row(one))
    journal.close()
    identity = {
        "name": name, "title": name, "full_items": 198, "prompt_id": "p", "prompts_sha256": "h",
        "scorer": "s", "source": "x", "licence": "y", "notes": [], "provenance": {},
        "max_tokens": 9,
    }  # fmt: skip
    result: BenchmarkResult = summarise(
        identity, records, expected=list(scores), partial=False, has_groups=False, wall_s=1.0
    )
    run = RunRecord(
        FORMAT, f"{arm}-1", arm, "m", "u", {}, {}, {"temperature": 0.7}, None, None, {}, "x86", "c",
        "", "", {name: result},
    )  # fmt: skip
    write_run(folder / arm / "run.json", replace(run, **changes))
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
