"""The judge's prompt and verdicts."""

import pytest

from halfbyte.evals.grading.judge import grade_judged, judge_prompt, read_verdict, same_text


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("CORRECT", True),
        ("correct.", True),
        (" **CORRECT** because", True),
        ("INCORRECT", False),
        ("Incorrect, it is not", False),
        ("The answer is CORRECT", None),
        ("CORRECTLY", None),
        ("CORRECT / INCORRECT", None),
        ("Incorrect, no, correct", None),
        ("", None),
    ],
)
def test_only_an_exact_first_word_is_a_verdict(reply: str, verdict: bool | None) -> None:
    assert read_verdict(reply) is verdict


def test_unreadable_or_absent_verdict_is_missing_not_wrong() -> None:
    for reply in ("hm", None):
        score = grade_judged("x", "y", reply)
        assert score.value is None
        assert score.cause == "ungraded"
    assert grade_judged("x", "x", "CORRECT").value == 1.0
    assert grade_judged("x", "y", "INCORRECT").cause == "wrong"


def test_braces_in_texts_do_not_reach_the_template() -> None:
    prompt = judge_prompt("what is {official}?", "{candidate}", "{}")
    assert "what is {official}?" in prompt
    assert "OFFICIAL ANSWER: {candidate}" in prompt


def test_exact_match_folds_what_does_not_matter() -> None:
    assert same_text("1. Café (12)", "1 cafe 12")
    assert not same_text("", "")
    assert not same_text("12", "13")


@pytest.mark.parametrize(
    "reply",
    [
        "Correct answer is 7", "CORRECT ANSWER: 7", "correct answer: 5, the candidate says 6",
        "CORRECT: no", "CORRECT - no", "CORRECT: false", "CORRECT=false", "CORRECT. Wait, no.",
        "Correct, but incomplete", "CORRECT except for the unit", "CORRECT if rounded",
        "CORRECT. However, the unit is missing", "correct ❌", "!CORRECT", "¬CORRECT",
        "INCORRECT. Wait, it fits", "CORRECT — no, wrong.",
    ],
)  # fmt: skip
def test_a_verdict_that_goes_on_as_something_else_is_none(reply: str) -> None:
    assert read_verdict(reply) is None


@pytest.mark.parametrize(
    "reply",
    [
        "CORRECT\n\nThe candidate matches.", "CORRECT - same figure", "CORRECT (both say 5%)",
        "CORRECT, the figures agree", "CORRECT ✅", "[[CORRECT]]",
        "CORRECT<|im_end|>", "ＣＯＲＲＥＣＴ",
    ],
)  # fmt: skip
def test_a_verdict_may_be_explained(reply: str) -> None:
    assert read_verdict(reply) is True
