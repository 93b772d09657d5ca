"""What a run's records come to: missing attempts with reasons, metrics of each benchmark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evals.test_compare import record
from halfbyte.evals.judging.summary import summarise
from halfbyte.evals.records import BenchmarkResult, GradedAttempt


def row(
    item: str, score: float | None, *, repeat: int = 0, group: str = "", name: str = "", **more: Any
) -> GradedAttempt:
    made = record(item, repeat, score, group or item)
    return replace(made, benchmark=name or "gpqa_diamond", **more)


def summary(
    records: Sequence[GradedAttempt],
    expected: Sequence[tuple[str, int]] | None = None,
    *,
    partial: bool = False,
    has_groups: bool = False,
) -> BenchmarkResult:
    identity: Mapping[str, Any] = {
        "name": records[0].benchmark, "title": "t", "full_items": 198, "prompt_id": "p",
        "prompts_sha256": "h", "scorer": "s", "source": "x", "licence": "y", "notes": [],
        "provenance": {}, "max_tokens": 9,
    }  # fmt: skip
    asked = [(one.item_id, one.repeat) for one in records] if expected is None else list(expected)
    return summarise(
        identity, records, expected=asked, partial=partial, has_groups=has_groups, wall_s=1.0
    )


def test_missing_attempts_are_counted_by_reason_the_most_frequent_first() -> None:
    kinds = [("timed out", 3), ("refused to start", 2), ("no such model", 1), ("out of memory", 1)]
    records = [row("whole", 1.0)]
    for why, count in kinds:
        records += [row(f"{why}{n}", None, error=why) for n in range(count)]
    records.append(
        row("judged", None, cause="ungraded", error=None, details={"reason": "the judge was mute"})
    )
    found = summary(records, [(one.item_id, 0) for one in records] + [("later", 0), ("last", 0)])
    assert found.score is None and found.status != "complete"
    assert "10 of 11 attempts are missing" in found.reason
    shown = found.reason.partition("(")[2]
    assert shown.startswith("3 timed out; 2 ")
    assert "2 refused to start" in found.reason and "2 not asked" in found.reason
    assert shown.endswith("; 3 more reasons)") and shown.count(";") == 3
    two = [row("a", 1.0), row("b", None, error="x" * 300), row("c", None, error="y")]
    said = summary(two).reason
    assert "more reason" not in said and "x" * 200 in said and "x" * 201 not in said
    ungraded = [row("a", 1.0), row("b", None, cause="ungraded", error=None,
                                   details={"reason": "mute"})]  # fmt: skip
    assert "1 ungraded: mute" in summary(ungraded).reason
    bare = [row("a", 1.0), row("b", None, cause="ungraded", error=None)]
    assert "1 ungraded)" in summary(bare).reason


def test_a_partial_run_is_marked_and_scored() -> None:
    found = summary([row("a", 1.0), row("b", None)], partial=True)
    assert found.score == 1.0 and found.status == "partial"


def test_a_problem_is_solved_with_all_its_steps_in_one_repeat() -> None:
    steps = [
        row(f"p{problem}.{step}", float(right), repeat=repeat, group=f"p{problem}", name="scicode")
        for problem, repeat, marks in [
            (1, 0, (1, 1)), (1, 1, (1, 0)), (2, 0, (0, 1)), (2, 1, (0, 0)),
        ]
        for step, right in enumerate(marks)
    ]  # fmt: skip
    found = summary(steps, has_groups=True)
    assert found.metrics["main_problem_accuracy"] == 0.25
    assert "main_problem_accuracy" not in summary([row("a", 1.0)]).metrics


def test_metrics_of_instructions_and_exact_matches() -> None:
    details: list[dict[str, Any]] = [
        {"prompt_strict": True, "strict": [True, True], "loose": [True, True]},
        {"prompt_strict": False, "strict": [False], "loose": [True]},
    ]
    records = [row(f"i{n}", 1.0, name="ifbench", details=d) for n, d in enumerate(details)]
    found = summary(records).metrics
    assert found["prompt_strict"] == 0.5
    assert found["instruction_strict"] == pytest.approx(2 / 3)
    assert found["instruction_loose"] == 1.0
    matched = [row(f"i{n}", 1.0, name="aa_lcr", details={"exact_match": n < 1}) for n in range(4)]
    assert summary(matched).metrics["exact_match"] == 0.25
    plain = summary([row("a", 1.0)]).metrics
    assert not {"prompt_strict", "instruction_strict", "exact_match"} & set(plain)


def test_variance_of_items_is_that_of_their_repeats() -> None:
    marks = [(1, 0), (1, 1), (0, 0), (0, 1)]
    records = [row(f"i{n}", float(m), repeat=r) for n, pair in enumerate(marks)
               for r, m in enumerate(pair)]  # fmt: skip
    assert summary(records).metrics["item_variance"] == pytest.approx(0.25)
    assert "item_variance" not in summary([row("a", 1.0), row("b", 0.0)]).metrics


@pytest.mark.parametrize("shared, low, high", [(1.0, 1.8, 2.2), (0.0, 1.0, 1.2)])
def test_shared_luck_of_groups_widens_the_error_by_its_factor(
    shared: float, low: float, high: float
) -> None:
    """Groups of four that answer as one: a standard error twice as large."""
    random = np.random.default_rng(3)
    luck = random.random((80, 6))
    records = []
    for group in range(80):
        for item in range(4):
            own = luck[group] if shared else random.random(6)
            records += [
                row(f"{group}-{item}", float(own[r] < 0.5), repeat=r, group=f"g{group}",
                    name="aa_lcr")
                for r in range(6)
            ]  # fmt: skip
    assert low <= summary(records, has_groups=True).metrics["design_factor"] <= high
    alone = [replace(one, group=one.item_id) for one in records]
    assert "design_factor" not in summary(alone, has_groups=True).metrics


def test_scores_by_stratum_have_intervals_unless_they_are_one_group() -> None:
    records = [
        replace(row(f"i{n}", float(n % 3 > 0), group=f"g{n // 4}"), stratum="ab"[n >= 4])
        for n in range(16)
    ]
    found = summary(records, has_groups=True).by_stratum
    assert found["a"]["items"] == 4 and found["b"]["items"] == 12
    assert math.isclose(found["b"]["score"], sum(n % 3 > 0 for n in range(4, 16)) / 12)
