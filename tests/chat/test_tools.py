import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from halfbyte.chat.tools import CallIds, checked_arguments, new_call_id, shown_schema
from halfbyte.errors import RequestError


@given(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=20))
def test_ids_are_nine_characters_distinct_and_stable(client_ids: list[str]) -> None:
    first, second = CallIds(), CallIds()
    inside = [first.inside(client_id) for client_id in client_ids]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", i) for i in inside)
    assert len(set(inside)) == len(inside)
    assert [first.inside(client_id) for client_id in client_ids] == inside
    assert [second.inside(client_id) for client_id in client_ids] == inside


def test_ids_of_our_kind_stay() -> None:
    assert CallIds().inside("abcDEF123") == "abcDEF123"
    assert re.fullmatch("[a-zA-Z0-9]{9}", new_call_id())
    assert new_call_id() != new_call_id()


def test_deeply_nested_arguments_are_an_error_not_a_crash() -> None:
    assert checked_arguments(" ", "p") == "{}"
    with pytest.raises(RequestError):
        checked_arguments("[" * 100_000, "p")


# --- schemas that a model is shown -----------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({"type": "object", "required": None}, {"type": "object"}),
        ({"type": "STRING"}, {"type": "string"}),
        ({"type": "any", "title": "t"}, {"title": "t"}),
        ({"type": "object", "properties": {"a": {"minimum": "5", "title": 3}}},
         {"type": "object", "properties": {"a": {}}}),
        ({"required": ["a", "a"], "type": "object"}, {"type": "object"}),
        ({"type": "string", "pattern": "("}, {"type": "string"}),
        ({"maximum": 5, "exclusiveMaximum": True}, {"maximum": 5}),
        ({"patternProperties": {"(": {}}, "title": "t"}, {"title": "t"}),
        ({"enum": [1, 1], "type": "integer"}, {"enum": [1, 1], "type": "integer"}),
        ({"type": "string", "pattern": "(" * 4000 + ")" * 4000}, {}),
        ({"type": "string", "pattern": "a{99999999999999999999}"}, {}),
    ],
)  # fmt: skip
def test_a_model_is_shown_a_schema_that_is_one(
    schema: dict[str, Any], shown: dict[str, Any]
) -> None:
    assert shown_schema(schema, "p", "tools", strict=False) == shown


def test_a_good_schema_is_shown_as_it_is() -> None:
    schema = {"type": "integer", "maximum": 2**63 - 1, "$ref": "#/x", "not": {}}
    assert shown_schema(schema, "p", "tools", strict=True) is schema


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"properties": {"a": {"type": "any"}}}, "p.properties.a.type"),
        ({"pattern": "(" * 4000 + ")" * 4000}, "p: a pattern"),
    ],
)
def test_a_strict_schema_that_is_none_is_refused_by_name(schema: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError, match=path):
        shown_schema(schema, "p", "tools", strict=True)
