"""A table of phrasings of numbers with hand-set expectations, and what must not matter to them."""

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading import numbers
from halfbyte.evals.grading.numbers import grade_number, read_integer

TABLE = Path(__file__).parents[1] / "data" / "evals" / "number_phrasings.txt"
ROWS = [
    tuple(line.replace("⏎", "\n").split("\t", 1))
    for line in TABLE.read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
ZEROS = [
    chr(c) for c in range(sys.maxunicode) if unicodedata.decimal(chr(c), None) == 0 and c > 0x30
]


KINDS = {"ok": "right", "wrong": "wrong", "unparsed": "unclear"}


def test_every_phrasing_is_worth_what_a_reader_gives_it() -> None:
    pytest.importorskip("math_verify", reason="extra 'eval' is not installed")
    assert len({text for _, text in ROWS}) == len(ROWS) >= 190
    wrong = [
        (want, text, score)
        for want, text in ROWS
        # In this process: starting a child for each expression takes longer than comparing it.
        if KINDS[(score := grade_number(70, text, numbers.equals_by_math_verify)).cause] != want
    ]
    assert wrong == []


def digits(number: int, zero: str) -> str:
    return "".join(chr(ord(zero) + int(c)) if c.isdigit() else c for c in str(number))


def never(gold: int, expression: str) -> bool:
    raise AssertionError(f"asked the algebra system about {expression!r}")


WRAPS = [
    "{}", "**{}**", "`{}`", '"{}"', "${}$", r"\({}\)", "({})", r"\text{{{}}}", r"\mathbf{{{}}}",
    r"\textbf{{({})}}", r"\textcolor{{red}}{{{}}}", r"{} \pmod{{1000}}", r"{}^\circ", "0{}", "{}.0",
]  # fmt: skip
LEADS = [
    r"\boxed{{{}}}", r"so $\boxed{{{}}}$.", "Answer: {}", "**Answer:** {}", "Answer:\n{}",
    "Antwort: {}", "答案：{}", "정답: {}", "الإجابة: {}", "<answer>{}</answer>", r"\fbox{{{}}}",
]  # fmt: skip


@given(
    number=st.integers(0, 99_999),
    gold=st.integers(0, 99_999),
    zero=st.sampled_from(["0", *ZEROS]),
    lead=st.sampled_from(LEADS),
    wrap=st.sampled_from(WRAPS),
)
@settings(max_examples=500, deadline=None)
def test_neither_marks_nor_the_script_of_digits_matter(
    number: int, gold: int, zero: str, lead: str, wrap: str
) -> None:
    for value in (number, gold):
        text = lead.format(wrap.format(digits(value, zero)))
        score = grade_number(gold, text, never)
        assert score.extracted == str(value), text
        assert score.value == float(value == gold), text


@given(
    first=st.integers(0, 999),
    second=st.integers(0, 999),
    lead=st.sampled_from(LEADS),
    joint=st.sampled_from([", ", " or ", " and ", "; ", r" \text{ or } ", " or maybe ", "、"]),
)
@settings(max_examples=300, deadline=None)
def test_two_numbers_are_never_an_answer(first: int, second: int, lead: str, joint: str) -> None:
    for gold in (first, second, int(f"{first}{second}")):
        text = lead.format(f"{first}{joint}{second}")
        assert grade_number(gold, text, lambda *_: False).value == 0.0, text


@given(st.text(max_size=100))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_reader(text: str) -> None:
    read_integer(text)
    grade_number(7, text, lambda *_: False)


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "Answer: ", "1,", "1 or ", "\\text{", "7 ", "{", "=", "is 7 wait "]
)
def test_long_texts_are_read_in_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    for whole in (text, f"\\boxed{{{text}}}", f"Answer: {text}"):
        grade_number(7, whole, lambda *_: False)


def test_a_missing_algebra_package_is_said_and_never_a_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such package')")
    source = str(Path(numbers.__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{source}")
    numbers.equals_in_child.cache_clear()
    with pytest.raises(UnsupportedError, match=r"^grading expressions needs math-verify"):
        grade_number(70, r"\boxed{\frac{140}{2}}")
    with pytest.raises(UnsupportedError, match="needs math-verify"):
        numbers.check_algebra()


def test_a_child_that_fails_otherwise_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    numbers.equals_in_child.cache_clear()
    with pytest.raises(UnsupportedError, match="exit code 1"):
        grade_number(70, r"\boxed{\frac{140}{2}}")
