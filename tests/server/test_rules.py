"""What holds an answer: an effort that the model knows, and a mask where one is needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.chat.grammar_masks import CheckedGrammar
from halfbyte.chat.mask_plan import MaskPlan
from halfbyte.errors import RequestError
from halfbyte.server.api.rules import Rules, mask_plan, settle_effort


def backend(efforts: tuple[str, ...] = (), *, strict: bool = False) -> Any:
    return SimpleNamespace(
        chat=SimpleNamespace(reasoning_efforts=efforts, vocabulary="words", control="marks"),
        config=SimpleNamespace(strict_effort=strict),
    )


GRAMMAR = CheckedGrammar("start: /a/", False, 1, (), "p")


@pytest.mark.parametrize("grammar", [None, GRAMMAR])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("budget", [None, 0, 5])
def test_a_thought_is_masked_where_something_bounds_it_or_follows(
    grammar: CheckedGrammar | None, thinking: bool, budget: int | None
) -> None:
    found = mask_plan(Rules(grammar), (7,), thinking=thinking, budget=budget)
    if grammar is not None or (thinking and budget is not None):
        assert found == MaskPlan(grammar, (7,), thinking, budget)
    else:
        assert found is None


@pytest.mark.parametrize(
    "asked, known, taken",
    [
        (None, ("none", "high"), None),
        ("high", ("none", "high"), "high"),
        ("minimal", ("none", "high"), "none"),
        ("medium", ("low", "high"), "high"),  # of two as near the higher
        ("none", (), "none"),
        ("high", (), None),
        ("high", ("much",), None),
    ],
)
def test_the_nearest_effort_is_taken_and_said(
    asked: str | None, known: tuple[str, ...], taken: str | None
) -> None:
    found, warnings = settle_effort(backend(known), asked)
    assert found == taken
    assert bool(warnings) == (found != asked)
    if found != asked:
        assert str(asked) in warnings[0]
        with pytest.raises(RequestError, match="is not one this model knows"):
            settle_effort(backend(known, strict=True), asked)


def test_a_name_that_is_no_effort_is_refused() -> None:
    with pytest.raises(RequestError, match="'loud' is not one this model knows: high"):
        settle_effort(backend(("high",)), "loud")
