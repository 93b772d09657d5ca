"""The letter extractor: the cases of docs/reference/scoring.md#letters, and recorded answers."""

import json
from pathlib import Path

import pytest

from halfbyte.evals.grading.letters import extract_letter, grade_letter, last_boxed
from halfbyte.evals.grading.statements import without_marks

DATA = Path(__file__).parents[1] / "data" / "evals"
LETTERS = "ABCDEFGHIJ"


@pytest.mark.parametrize(
    "text, letter",
    [
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("Answer: **B**", "B"),
        ("Answer: (B)", "B"),
        ("Answer: [B]", "B"),
        (r"Answer: \boxed{B}", "B"),
        (r"Answer: $\boxed{\text{B}}$", "B"),
        (r"Answer: \( D \)", "D"),
        ("Answer: A/B/C/D\nso\nAnswer: D", "D"),
        ("Answer: A/B/C/D", None),
        ("Answer: B? or A?", None),
        ("Answer: B! or A", None),
        ("Antwort: B? oder D?", None),
        ("答案：B？或A？", None),
        ("Answer: B?", "B"),
        ("Answer: B! Or so I think.", "B"),
        ("Answer: B? Yes, and B it is.", "B"),
        ("Answer: I think it is C", None),
        ("answer: a function of x", None),
        ("Answer: A function", None),
        ("Final answer: C) 12", "C"),
        ("answer : b", "B"),
        ("Answer: J", None),
        ("Answer: Because", None),
        ("First Answer: A.\nNo. Answer: C.", "C"),
        ("Answer: B\n\n(The form was 'Answer: X'.)", "B"),
        ("must have the form 'Answer: A/B/C/D' (for example 'Answer: A'). Think.", None),
        (r"the form 'Answer: \boxed{A/B/C/D}' (for example 'Answer: \boxed{A}').", None),
        (r"Answer: \boxed{\textbf{B}}", "B"),
        (r"thus \boxed{C}", "C"),
        (r"thus \boxed{(C)}", "C"),
        (r"thus \boxed{C. 12 m}", "C"),
        (r"thus \boxed{Cat}", None),
        (r"\boxed{A} and \boxed{B}", None),
        ("The answer is (D).", "D"),
        ("The answer is D", "D"),
        ("the answer is a matter of taste", None),
        ("the answer is (b) 0.15, as in part (b)", None),
        ("The answer is (D). The answer is (C) is incorrect.", "D"),
        ("The answer is I think none", None),
        ("B is the correct answer, I believe", "B"),
        ("Correct option: C", "C"),
        ("Some thoughts.\n\n(B).", "B"),
        ("Some thoughts.\n\nB", "B"),
        ("B\nbut then more prose", None),
        ("It may be A. Or B. Hard to say", None),
        ("", None),
    ],
)
def test_stated_letter_is_found_and_prose_is_not_guessed_from(
    text: str, letter: str | None
) -> None:
    assert extract_letter(text, "ABCD") == letter


def test_letters_end_where_the_options_of_the_item_end() -> None:
    assert extract_letter("Answer: J", LETTERS) == "J"
    assert extract_letter("Answer: E", "ABCDE") == "E"
    assert extract_letter("Answer: F", "ABCDE") is None
    # I is a letter of a ten-option item, and a word.
    assert extract_letter("Answer: I", LETTERS) == "I"
    assert extract_letter("Answer: I think it is C", LETTERS) is None


def test_a_text_without_letter_is_unparsed_not_merely_wrong() -> None:
    assert grade_letter("B", "ABCD", "no idea").cause == "unparsed"
    assert grade_letter("B", "ABCD", "Answer: C").cause == "wrong"
    assert grade_letter("B", "ABCD", "Answer: B").value == 1.0


def test_box_is_closed_by_counting_not_by_the_last_brace() -> None:
    assert last_boxed(r"\boxed{\frac{1}{2}} and {more}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{7} then \boxed{8") == "7"
    assert last_boxed("none") is None


@pytest.mark.parametrize(
    "inner",
    [r"a \{ b", r"a \} b", r"\{1, 2\}", r"1 \\{2}", r"7 \\", r"x \\\} y", r"\}", r"{\{}", r"\\\\"],
)
def test_an_escaped_brace_is_text_and_one_behind_a_line_break_is_not(inner: str) -> None:
    assert last_boxed(rf"so \boxed{{{inner}}} {{and}} more") == inner


def test_recorded_answers_give_the_letter_of_the_official_script() -> None:
    lines = (DATA / "mmlu_pro" / "items.jsonl").read_text().splitlines()
    assert len(lines) == 28
    for row in map(json.loads, lines):
        letters = LETTERS[: len(row["options"])]
        assert extract_letter(row["sample_output"], letters) == row["upstream_pred"]


LATER = "I looked at the units and the signs of each term once more. "


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # What stood before the answer is not what the correction leaves.
        (f"The answer is A.\nAnswer: B\n{LATER}Wait, that is wrong.", None),
        (f"It is (A), they say.\nAnswer: B\n{LATER}Wait, it is C.", "C"),
        (f"The answer is A.\nAnswer: B\n{LATER}Wait, the answer is C.", "C"),
        # Nor what stands between it and the correction.
        (f"Answer: B\nSo it is D in other books. {LATER}Wait, that is wrong.", None),
        (f"The answer is A.\nAnswer: B\n{LATER}But the way there was long.", "B"),
        # Nor what is said of another option.
        ("Answer: B\n\n- A: no, this is incorrect\n- C: no, that is wrong", "B"),
        ("The answer is B. No, that's wrong. I do not know.", None),
        ("C'est donc B.", "B"),
    ],
)
def test_a_correction_looks_behind_itself_only(text: str, letter: str | None) -> None:
    assert extract_letter(text, LETTERS) == letter


@pytest.mark.parametrize(
    "text, bare",
    [
        ("\u061b", ";"), ("\u060c", ","), ("\u066b", "."), ("\u066c", ","), ("\u2212", "-"),
        ("\U0001f150", "A"), ("\U0001f169", "Z"), ("\U0001f170", "A"), ("\U0001f189", "Z"),
        ("\U0001f1e6", "A"), ("\U0001f1ff", "Z"),
    ],
)  # fmt: skip
def test_marks_and_badges_of_other_scripts_are_their_plain_ones(text: str, bare: str) -> None:
    assert without_marks(f"x {text} x") == f"x {bare} x"
