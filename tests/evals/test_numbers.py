"""Integer answers: extraction, what counts as the same integer, bounded algebra."""

import time

import pytest

from halfbyte.evals.grading import numbers
from halfbyte.evals.grading.numbers import extract_number, grade_number, read_integer


@pytest.mark.parametrize(
    "text, found",
    [
        (r"so \boxed{070}.", "070"),
        (r"\boxed{1} no, \boxed{\frac{140}{2}} since {x}", r"\frac{140}{2}"),
        (r"\fbox{12}", "12"),
        ("Answer: 12\nAnswer: 13", "13"),
        ("**Answer:** 13", "13"),
        ("it is 12", None),
        ("", None),
    ],
)
def test_last_box_then_last_answer_line(text: str, found: str | None) -> None:
    assert extract_number(text) == found


@pytest.mark.parametrize(
    "expression, value",
    [
        ("70", 70),
        ("070", 70),
        ("70.0", 70),
        ("70.", 70),
        (r"\text{70}", 70),
        (r"70\text{ degrees}", 70),
        (r"70\ ", 70),
        (r"70^\circ", 70),
        (r"70^{\circ}", 70),
        ("$70$", 70),
        ("1,024", 1024),
        ("1{,}024", 1024),
        (r"1\,024", 1024),
        ("m + n = 70", 70),
        ("x=70", 70),
        (r"\mathbf{70}", 70),
        ("{70}", 70),
        ("-70", -70),
        ("7,0", None),
        ("70.5", None),
        (r"\frac{140}{2}", None),
        ("2x = 70", None),
        ("", None),
    ],
)
def test_what_reads_as_an_integer(expression: str, value: int | None) -> None:
    assert read_integer(expression) == value


def test_integers_never_reach_the_algebra_system() -> None:
    def refuse(gold: int, expression: str) -> bool:
        raise AssertionError(expression)

    assert grade_number(70, r"\boxed{070}", refuse).value == 1.0
    assert grade_number(70, r"\boxed{71}", refuse).cause == "wrong"
    assert grade_number(70, r"\boxed{x}", refuse).cause == "wrong"
    assert grade_number(70, "nothing", refuse).cause == "unparsed"
    assert grade_number(70, r"\boxed{}", refuse).cause == "unparsed"


def test_expressions_are_compared_by_value() -> None:
    pytest.importorskip("math_verify", reason="extra 'eval' is not installed")
    assert grade_number(70, r"\boxed{\frac{140}{2}}").value == 1.0
    assert grade_number(70, r"\boxed{\frac{141}{2}}").value == 0.0
    # The other boxes do not make a set with the last one.
    assert grade_number(70, r"\boxed{1}, \boxed{2}, so \boxed{35 \cdot 2}").value == 1.0


def test_endless_expression_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="extra 'eval' is not installed")
    monkeypatch.setattr(numbers, "TIME_LIMIT_S", 3)
    started = time.monotonic()
    assert grade_number(70, r"\boxed{9^{9^{9^{9}}}+1}").value == 0.0
    assert time.monotonic() - started < 4.5
