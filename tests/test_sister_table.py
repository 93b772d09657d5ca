"""The table of docs/guide/sister-models.md is what the configs give."""

import json

from tools.sister_table import _MODELS, CONFIGS, PAGE, page, table

from sisters import SISTERS


def test_the_page_is_fresh() -> None:
    text = PAGE.read_text("utf-8")
    assert page(text) == text, "run python -m tools.sister_table"


def test_every_model_of_the_tests_is_in_the_table() -> None:
    forms = {"ministral-3-14b-reasoning", "pixtral-large-124b-llava"}  # of models that are there
    assert {one.name for one in SISTERS} - forms == set(_MODELS)
    assert len(table().splitlines()) == len(_MODELS) + 2
    for path in CONFIGS.glob("*.json"):
        assert json.loads(path.read_text()), path
