"""What holds an answer: an effort that the model knows, and a mask where one is needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.chat.grammar_masks import ThoughtMask
from halfbyte.errors import RequestError
from halfbyte.server.api import rules as subject
from halfbyte.server.api.rules import Rules, mask_of, settle_effort


def backend(efforts: tuple[str, ...] = (), *, strict: bool = False) -> Any:
    return SimpleNamespace(
        chat=SimpleNamespace(reasoning_efforts=efforts, vocabulary="words", control="marks"),
        config=SimpleNamespace(strict_effort=strict),
        compiler=SimpleNamespace(mask=lambda compiled, banned: ("inner", compiled, banned)),
    )


@pytest.mark.parametrize("compiled", [None, "grammar"])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("budget", [None, 0, 5])
def test_a_thought_is_masked_where_something_bounds_it_or_follows(
    compiled: Any, thinking: bool, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "ThoughtMask", lambda *given: ("thought", *given))
    found: Any = mask_of(backend(), Rules(compiled), (7,), thinking, budget)
    inner = None if compiled is None else ("inner", "grammar", (7,))
    if thinking and (inner is not None or budget is not None):
        assert found == ("thought", "words", "marks", inner, budget)
    else:
        assert found == inner
    assert ThoughtMask.__init__.__code__.co_varnames[1:5] == (
        "vocabulary", "control", "inner", "budget",
    )  # fmt: skip


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
