import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from halfbyte.chat.tools import CallIds, checked_arguments, new_call_id
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
