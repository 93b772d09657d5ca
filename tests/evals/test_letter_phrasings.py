"""A table of phrasings with hand-set expectations, and what must not matter to any of them."""

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.evals.grading.letters import extract_letter, grade_letter

LETTERS = "ABCDEFGHIJ"
TABLE = Path(__file__).parents[1] / "data" / "evals" / "letter_phrasings.txt"
ROWS = [
    (want, text.replace("⏎", "\n"))
    for want, text in (
        line.split("\t", 1)
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
]
STATED = [text for want, text in ROWS if want == "C"]
UNSTATED = [text for want, text in ROWS if want == "-"]


def with_letter(text: str, letter: str) -> str:
    """The phrasing with another letter: each C that stands alone, in each of its forms."""
    forms = (("C", 0x41), ("Ｃ", 0xFF21), ("Ⓒ", 0x24B6), ("🅒", 0x1F150), ("𝐂", 0x1D400),
             ("𝗖", 0x1D5D4), ("⒞", 0x249C), ("🄲", 0x1F130), ("🇨", 0x1F1E6))  # fmt: skip
    offset = ord(letter) - ord("A")
    out = []
    for place, character in enumerate(text):
        first = next((first for form, first in forms if form == character), None)
        around = text[place - 1 : place] + text[place + 1 : place + 2]
        is_in_word = any(c in string.ascii_letters for c in around) or around == "//"
        out.append(character if first is None or is_in_word else chr(first + offset))
    return "".join(out)


def test_the_table_is_as_long_as_it_claims_to_be() -> None:
    assert len(ROWS) >= 400
    assert len(STATED) >= 250 and len(UNSTATED) >= 80
    assert len({text for _, text in ROWS}) == len(ROWS)


def test_every_phrasing_states_what_a_reader_sees() -> None:
    wrong = [
        (want, text, found)
        for want, text in ROWS
        if (found := extract_letter(text, LETTERS)) != (None if want == "-" else want)
    ]
    assert wrong == []


@pytest.mark.parametrize("letter", LETTERS)
def test_the_score_does_not_depend_on_which_letter_is_right(letter: str) -> None:
    """Every phrasing, with the letter exchanged; where it names other letters, not with those."""
    wrong = []
    for text in STATED:
        others = {c for c in "AB" if f"{c}" in with_letter(text, "C")}
        if letter in others and with_letter(text, letter) != text:
            continue
        changed = with_letter(text, letter)
        if extract_letter(changed, LETTERS) != letter:
            wrong.append((changed, extract_letter(changed, LETTERS)))
    assert wrong == []


WRAPS = [
    "{}", "**{}**", "*{}*", "`{}`", '"{}"', "“{}”", "'{}'", "«{}»", "${}$", r"\({}\)", "({})",
    "[{}]", r"\boxed{{{}}}", r"\text{{{}}}", r"\textbf{{{}}}", r"\mathbf{{{}}}", "__{}__",
    r"$\boxed{{\text{{{}}}}}$", "<b>{}</b>", "**({})**", r"\textcolor{{red}}{{{}}}", "```{}```",
]  # fmt: skip
LEADS = [
    "Answer: {}", "**Answer:** {}", "Final answer: {}", "The answer is {}", "The answer is {}.",
    "So the correct option is {}.", "Antwort: {}", "La réponse est {}.", "答案：{}", "正解は{}です",
    "정답: {}", "الإجابة: {}", "Answer:\n{}", "{}", "Some words.\n\n{}", "Answer = {}",
    "Answer: Option {}", "<answer>{}</answer>", '{{"answer": "{}"}}',
]  # fmt: skip
TAILS = ["", "\n", "\n\nThe other options are too heavy.", " "]


@given(
    lead=st.sampled_from(LEADS),
    inner=st.sampled_from(WRAPS),
    outer=st.sampled_from(WRAPS[:8]),
    tail=st.sampled_from(TAILS),
    letter=st.sampled_from(LETTERS),
    gold=st.sampled_from(LETTERS),
)
@settings(max_examples=400, deadline=None)
def test_surrounding_marks_do_not_matter(
    lead: str, inner: str, outer: str, tail: str, letter: str, gold: str
) -> None:
    is_lone = lead in ("{}", "Some words.\n\n{}")
    text = lead.format(outer.format(inner.format(letter))) + ("" if is_lone else tail)
    score = grade_letter(gold, LETTERS, text)
    assert score.extracted == letter, text
    assert score.value == float(letter == gold)


@given(
    lead=st.sampled_from(LEADS[:10]),
    wrap=st.sampled_from(WRAPS[:9]),
    letters=st.lists(st.sampled_from(LETTERS), min_size=2, max_size=4, unique=True),
    joint=st.sampled_from([", ", " and ", " or ", "/", " & ", "; ", " und ", " et ", "、", "和"]),
)
@settings(max_examples=300, deadline=None)
def test_several_letters_are_never_an_answer(
    lead: str, wrap: str, letters: list[str], joint: str
) -> None:
    text = lead.format(joint.join(wrap.format(letter) for letter in letters))
    score = grade_letter(letters[0], LETTERS, text)
    assert (score.cause, score.value) == ("unparsed", 0.0), text


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_extractor(text: str) -> None:
    found = extract_letter(text, "ABCD")
    assert found is None or found in "ABCD"


@pytest.mark.parametrize(
    "unit", ["Answer: ", "\\boxed{", "the answer is ", "(A) ", "C, ", "**", "~"]
)
def test_long_texts_are_read_in_time(unit: str) -> None:
    assert extract_letter(unit * (200_000 // len(unit)), LETTERS) in (None, *LETTERS)
