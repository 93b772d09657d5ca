"""Instruction-following verifiers where the package and the benchmark's later code differ."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("if_verifiable", reason="extra 'eval' is not installed")

from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading import constraints
from halfbyte.evals.grading.constraints import (
    grade_constraints,
    loose_variants,
    missing_resources,
)


@pytest.fixture(autouse=True)
def _needs_language_data() -> None:
    if reason := missing_resources([]):
        pytest.skip(reason)


@pytest.mark.parametrize(
    "kind, arguments, text, follows",
    [
        # Demonstratives count since 2026; "I'm" holds one pronoun.
        ("count:pronouns", {"N": 3}, "This is what I'm after.", True),
        ("count:pronouns", {"N": 2}, "she/her", True),
        # Whole words only.
        ("count:person_names", {"N": 1}, "Evasion is bad", False),
        ("count:person_names", {"N": 2}, "Ava met Leo", True),
        ("sentence:keyword", {"word": "cat", "N": 2}, "One. The category.", False),
        ("sentence:keyword", {"word": "cat", "N": 2}, "One. The Cat.", True),
        # Case does not matter and marks are no words.
        (
            "words:keywords_specific_position",
            {"keyword": "moon", "n": 1, "m": 3},
            "Yes, the Moon.",
            True,
        ),
        # A sentence or a word that is not there is no keyword.
        (
            "words:keywords_specific_position",
            {"keyword": "moon", "n": 1, "m": 3},
            "The moon.",
            False,
        ),
        (
            "words:keywords_specific_position",
            {"keyword": "moon", "n": 2, "m": 1},
            "Moon.",
            False,
        ),
        (
            "words:keywords_specific_position",
            {"keyword": "moon", "n": 1, "m": 2},
            "Oh, stars.",
            False,
        ),
        ("words:words_position", {"keyword": "sun"}, "The Sun shines; the sun sets.", True),
        ("words:words_position", {"keyword": "sun"}, "The moon shines.", False),
        # Without a closing mark the last word is the last word.
        ("words:words_position", {"keyword": "sun"}, "The sun may sun us", True),
        ("words:words_position", {"keyword": "sun"}, "The sun does sun us all", False),
        ("words:words_position", {"keyword": "sun"}, "", False),
        # Indices are of characters and the end is included.
        (
            "repeat:repeat_span",
            {"prompt_to_repeat": "abcdef ghi", "n_start": 0, "n_end": 2},
            "ABC",
            True,
        ),
        # Punkt knows that "Dr." ends no sentence.
        ("ratio:sentence_type", {}, "Dr. Who came. Dr. Who left. Did he?", True),
        ("format:title_case", {}, "The iPhone Is 3 Things", True),
        ("format:title_case", {}, "The A b", False),
        ("format:quote_unquote", {}, '"', False),
        ("format:quote_unquote", {}, '"so" it is', True),
        # The word "text" alone would be an index error in the package.
        ("custom:sentence_alphabet", {}, "   .", False),
    ],
)
def test_later_behaviour(kind: str, arguments: dict[str, Any], text: str, follows: bool) -> None:
    score = grade_constraints([kind], [arguments], "", text)
    assert score.details["strict"] == [follows]


def test_null_arguments_are_dropped() -> None:
    nulls = {"N": None, "keyword": None, "small_n": 2, "sep": None}
    assert grade_constraints(["words:repeats"], [nulls], "", "a b a b").value == 1.0
    assert grade_constraints(["words:repeats"], [nulls], "", "a a a").value == 0.0


def test_loose_lets_each_constraint_choose_its_own_variant() -> None:
    text = "Sure!\n14 21 28 35 42 49"
    score = grade_constraints(["custom:multiples"], [{}], "", f"Here are 6:\n{text[6:]}")
    assert score.details["strict"] == [False]
    assert score.value == 1.0
    assert len(loose_variants("a\nb\nc")) == 8


def test_empty_answer_follows_nothing() -> None:
    # Vacuously true constraints must not turn silence into success.
    assert grade_constraints(["format:sub-bullets"], [{}], "", "").value == 0.0
    assert grade_constraints(["format:sub-bullets"], [{}], "", " \n ").value == 0.0


def test_prompt_counts_only_if_every_constraint_holds() -> None:
    kinds = ["format:no_whitespace", "count:numbers"]
    assert grade_constraints(kinds, [{}, {"N": 1}], "", "a1").value == 1.0
    score = grade_constraints(kinds, [{}, {"N": 2}], "", "a1")
    assert score.value == 0.0
    assert score.extracted == "+-"


def test_missing_tagger_refuses_instead_of_scoring_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "_has_resource", lambda path: "tagger" not in path)
    assert "averaged_perceptron_tagger_eng" in str(missing_resources([constraints.VERB_KIND]))
    with pytest.raises(UnsupportedError, match="tagger"):
        grade_constraints([constraints.VERB_KIND], [{}], "", "Run.")


@pytest.mark.parametrize(
    "text, follows",
    [
        ("Take the road to the hills.", True),
        # The tagger takes it for a name, and the benchmark counts what the tagger says.
        ("Run to the hills.", False),
        ("Is it so?", True),
        # A sentence of the same words that does not begin with its verb.
        ("The hills run.", False),
        ("Hills are steep.", False),
        # Loose: without the first line, or without stars.
        ("Answer:\nWrite it down.", True),
        ("**Consider** this.", True),
        ("", False),
    ],
)
def test_first_word_is_judged_by_the_tagger(text: str, follows: bool) -> None:
    if reason := missing_resources([constraints.VERB_KIND]):
        pytest.skip(reason)
    assert grade_constraints([constraints.VERB_KIND], [{}], "", text).value == follows


def test_a_package_with_another_tagger_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    assert not constraints._is_the_known_tagger(tmp_path)
    for part in constraints._TAGGER_SHA256:
        (folder / f"averaged_perceptron_tagger_eng.{part}.json").write_text("{}")
    assert not constraints._is_the_known_tagger(tmp_path)


def test_the_requirements_file_pins_the_tagger_that_the_message_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (Path(__file__).parents[2] / "requirements/tagger-data.txt").read_text()
    assert f"{constraints.TAGGER_PACKAGE} --hash=sha256:" in text
    monkeypatch.setattr(constraints, "_has_resource", lambda path: "tagger" not in path)
    assert f"--no-deps {constraints.TAGGER_PACKAGE} " in str(
        missing_resources([constraints.VERB_KIND])
    )


def test_the_package_itself_stays_as_installed() -> None:
    from if_verifiable.ifbench import instructions_util

    constraints.grade_constraints(["ratio:sentence_balance"], [{}], "", "A. B? C!")
    assert instructions_util.split_into_sentences.__module__ == instructions_util.__name__


def test_all_58_kinds_are_there_and_twelve_split_with_punkt() -> None:
    registry = constraints._registry()
    assert len(registry) == 58
    own = [v for v in registry.values() if "check_following" in vars(v) and not v.__doc__]
    assert len(own) == 12
