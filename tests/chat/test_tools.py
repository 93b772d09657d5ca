import json
import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from halfbyte.chat.tools import (
    CallIds,
    OpeningBrace,
    checked_arguments,
    new_call_id,
    read_arguments,
    shown_schema,
    with_missing_results,
)
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


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a": 1', {"a": 1}),
        ('{"a": "hel', {"a": "hel"}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": {"b": "c"}, "d', {"a": {"b": "c"}}),
        ('{"', {}),
        ('{"a', {}),
    ],
)
def test_arguments_that_were_cut_off_are_closed(text: str, value: dict[str, Any]) -> None:
    assert read_arguments(text, "x") == value
    assert json.loads(checked_arguments(text, "x")) == value


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    st.data(),
)
def test_every_beginning_of_an_object_is_read(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=False)
    cut = data.draw(st.integers(2, len(text)))
    found = read_arguments(text[:cut], "x")
    assert set(found) <= set(value)


@pytest.mark.parametrize(
    "text", ["{", " {\n", '{"a" 1}', "{a: 1}", '{"a": 1} x', "[1, 2", '"abc', "12", '{"a": NaN']
)
def test_what_was_never_an_object_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        read_arguments(text, "x")


@given(st.text('{} \n"a:1,', max_size=12), st.integers(1, 4))
def test_arguments_are_shown_from_what_follows_their_brace_on(text: str, step: int) -> None:
    brace = OpeningBrace()
    pieces = [brace.feed(text[start : start + step]) for start in range(0, len(text), step)]
    shown = "".join(pieces)
    assert shown == ("" if text.strip() in ("", "{") else text)


def call(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": one} for one in ids]}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "r"}


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "messages, roles, places",
    [
        ([USER, call("a"), result("a"), USER], "uatu", [0, 1, 2, 3]),
        ([USER, call("a"), USER], "uatu", [0, 1, 1, 2]),
        ([USER, call("a", "b"), result("b"), USER], "uattu", [0, 1, 2, 1, 3]),
        ([USER, call("a"), call("b"), result("b")], "uatat", [0, 1, 1, 2, 3]),
        ([USER, call("a", "a"), result("a"), result("a")], "uatt", [0, 1, 2, 3]),
        ([USER, call("a")], "ua", [0, 1]),
    ],
)
def test_calls_without_a_result_get_one(
    messages: list[dict[str, Any]], roles: str, places: list[int]
) -> None:
    settled = with_missing_results(messages)
    assert "".join(message["role"][0] for _, message in settled) == roles
    assert [place for place, _ in settled] == places


@pytest.mark.parametrize(
    "messages, place",
    [
        ([result("a")], 0),
        ([USER, result("a")], 1),
        ([USER, call("a"), result("a"), result("a")], 3),
        ([USER, call("a"), result("b")], 2),
        ([USER, call("a"), USER, result("a")], 3),
    ],
)
def test_results_that_nothing_waits_for_are_refused_by_place(
    messages: list[dict[str, Any]], place: int
) -> None:
    with pytest.raises(RequestError, match=rf"messages\[{place}\].tool_call_id"):
        with_missing_results(messages)
