"""What is shown of a run while it goes on."""

import io
from typing import Any

import pytest

from halfbyte.evals.judging.stats import accuracy_interval
from halfbyte.evals.records import GradedAttempt
from halfbyte.evals.running.progress import RunProgress


def record(item: str, score: float | None, cause: Any = "ok", repeat: int = 0) -> GradedAttempt:
    return GradedAttempt(
        "run", "arm", "pocket", "p", "0" * 8, item, item, "", repeat, 1, "answer", "", "stop",
        30, 12, 0, 0.5, None, "A", score, cause, {}, None, 0,
    )  # fmt: skip


def test_the_line_says_how_far_how_well_how_fast_and_how_long_yet() -> None:
    progress = RunProgress("Pocket", 10, io.StringIO())
    assert progress.line(5.0) == "Pocket  0/10"
    for item, score in (("a", 1.0), ("b", 0.0), ("c", 1.0), ("d", 1.0)):
        progress.add(record(item, score, "ok" if score else "wrong"))
    e = accuracy_interval([1.0, 0.0, 1.0, 1.0], list("abcd"))
    score_text = f"75.0 % [{100 * e.low:.1f}, {100 * e.high:.1f}]"
    # Four attempts of 42 tokens in two seconds; six are left.
    assert progress.line(2.0) == (
        f"Pocket  4/10  {score_text}  2.0 items/s  84 tokens/s  168 tokens  ETA 0:00:03"
    )
    assert "6.0 items/min" in progress.line(40.0)
    assert "1.0 items/s" in progress.line(4.0)
    assert "items/s" not in progress.line(0.0)


def test_the_line_says_how_long_the_benchmarks_that_follow_take() -> None:
    progress = RunProgress("Pocket", 2, io.StringIO(), later=58)
    progress.add(record("a", 1.0))
    # One attempt in two seconds; one is left here, 59 in all.
    assert progress.line(2.0).endswith("ETA 0:00:02  whole run about 0:01:58")
    progress.add(record("b", 1.0))
    assert progress.line(4.0).endswith("4 tokens  whole run about 0:01:56")


def test_repeats_of_an_item_count_as_one_mean_and_troubles_are_named() -> None:
    progress = RunProgress("Pocket", 5, io.StringIO())
    for repeat, score in enumerate((1.0, 0.0)):
        progress.add(record("a", score, repeat=repeat))
    progress.add(record("b", 0.0, "length"))
    progress.add(record("c", None, "error"))
    progress.add(record("d", 0.0, "length"))
    line = progress.line(1.0)
    assert line.startswith("Pocket  5/5  16.7 % [")  # of 0.5, 0 and 0; a missing one is none
    assert line.endswith("  1 error, 2 length")
    assert "ETA" not in line


def test_what_an_earlier_run_left_is_no_speed() -> None:
    progress = RunProgress("Pocket", 10, io.StringIO())
    progress.resume([record("a", 1.0), record("b", 1.0)])
    assert progress.line(1.0).startswith("Pocket  2/10  100.0 %")
    assert "items" not in progress.line(1.0)
    progress.add(record("c", 1.0))
    assert progress.line(1.0).endswith("1.0 items/s  42 tokens/s  42 tokens  ETA 0:00:07")


@pytest.mark.parametrize("num_shown", [1, 3])
def test_a_log_does_not_say_the_end_twice(num_shown: int) -> None:
    stream = io.StringIO()
    progress = RunProgress("Pocket", 1, stream)
    progress.add(record("a", 1.0))
    progress.show()
    for _ in range(num_shown):
        progress.show(last=True)
    assert len(stream.getvalue().splitlines()) == 1
    progress.add(record("b", 1.0))
    progress.show(last=True)
    assert len(stream.getvalue().splitlines()) == 2
    unseen = RunProgress("Pocket", 1, stream)
    unseen.add(record("a", 1.0))
    unseen.show(last=True)
    assert len(stream.getvalue().splitlines()) == 3
