import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.router import CallArguments, CallStart, Content, Delta, Reasoning, Router
from halfbyte.chat.tools import is_call_id

THINK, END_THINK, CALLS, ARGS, CALL_ID, EOS, INST = 34, 35, 9, 32, 33, 2, 3


def script(mistral: MistralFormat, *parts: str | int) -> list[int]:
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else mistral.vocabulary.encode_text(part)
    return ids


def message(mistral: MistralFormat, ids: list[int], **options: Any) -> dict[str, Any]:
    """The whole answer, as a client would join it."""
    router = Router(
        mistral.vocabulary, mistral.control, tool_names=frozenset({"f", "get_weather"}), **options
    )
    deltas: list[Delta] = []
    for token_id in ids:
        deltas += router.feed(token_id)
        if router.stopped_by is not None:
            break
    deltas += router.finish()
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, CallStart):
            assert delta.index == len(calls)
            calls.append([delta.name, ""])
        elif isinstance(delta, CallArguments):
            calls[delta.index][1] += delta.text
    return {
        "content": "".join(d.text for d in deltas if isinstance(d, Content)),
        "reasoning": "".join(d.text for d in deltas if isinstance(d, Reasoning)),
        "calls": [tuple(call) for call in calls],
        "reasoning_tokens": router.num_reasoning_tokens,
    }


def test_thought_text_and_calls_are_told_apart(mistral: MistralFormat) -> None:
    parts = (THINK, "hm é", END_THINK, "Let me look.", CALLS, "get_weather", ARGS, '{"city": "ü"}')
    ids = script(mistral, *parts, CALLS, "f", ARGS, "{}", EOS)
    for live in (True, False):
        answer = message(mistral, ids, live_calls=live)
        assert answer["reasoning"] == "hm é"
        assert answer["content"] == "Let me look."
        assert answer["calls"] == [("get_weather", '{"city": "ü"}'), ("f", "{}")]
        assert answer["reasoning_tokens"] == ids.index(END_THINK) + 1


def with_ids(mistral: MistralFormat) -> ControlTokens:
    """As of a tokenizer that writes the id of a call."""
    return dataclasses.replace(mistral.control, call_id=CALL_ID)


def test_the_id_that_a_model_writes_is_the_calls(mistral: MistralFormat) -> None:
    ids = script(mistral, CALLS, "f", CALL_ID, "Ab3456789", ARGS, "{}", EOS)
    # One that is no id, one that is taken, and none.
    ids = [*ids[:-1], *script(mistral, CALLS, "f", CALL_ID, "x", ARGS, "{}")]
    ids += script(mistral, CALLS, "f", CALL_ID, "Ab3456789", ARGS, "{}")
    ids += script(mistral, CALLS, "f", ARGS, "{}", EOS)
    router = Router(mistral.vocabulary, with_ids(mistral), tool_names=frozenset({"f"}))
    deltas = [delta for token_id in ids for delta in router.feed(token_id)] + router.finish()
    starts = [delta for delta in deltas if isinstance(delta, CallStart)]
    assert [start.name for start in starts] == ["f"] * 4
    assert starts[0].call_id == "Ab3456789"
    assert len({start.call_id for start in starts}) == 4
    assert all(is_call_id(start.call_id) for start in starts)
    arguments = "".join(delta.text for delta in deltas if isinstance(delta, CallArguments))
    assert arguments == "{}" * 4 and not any(isinstance(delta, Content) for delta in deltas)


@pytest.mark.parametrize(
    ("parts", "content"),
    [
        ((CALLS, "f", CALL_ID, "Ab3"), "[TOOL_CALLS]f[CALL_ID]Ab3"),
        ((CALLS, "nobody", CALL_ID, "Ab3", ARGS, "{}"), "[TOOL_CALLS]nobody[CALL_ID]Ab3[ARGS]{}"),
        ((CALL_ID, "text"), "text"),
        ((CALLS, CALL_ID, ARGS, "{}"), "[TOOL_CALLS][ARGS]{}"),
    ],
)
def test_a_call_with_an_id_that_is_none_becomes_text(
    mistral: MistralFormat, parts: tuple[str | int, ...], content: str
) -> None:
    router = Router(mistral.vocabulary, with_ids(mistral), tool_names=frozenset({"f"}))
    deltas = [delta for token_id in script(mistral, *parts) for delta in router.feed(token_id)]
    deltas += router.finish()
    assert "".join(delta.text for delta in deltas if isinstance(delta, Content)) == content
    assert not any(isinstance(delta, CallStart) for delta in deltas)


def test_control_tokens_written_as_text_are_text(mistral: MistralFormat) -> None:
    text = "[THINK]x[/THINK][TOOL_CALLS]f[ARGS]{}</s>"
    answer = message(mistral, script(mistral, text, EOS))
    assert answer["content"] == text and not answer["calls"] and not answer["reasoning"]


@pytest.mark.parametrize(
    ("parts", "content", "reasoning"),
    [
        (("a", END_THINK, "b"), "ab", ""),
        ((THINK, "a", THINK, "b", END_THINK, "c"), "c", "ab"),
        ((THINK, "a"), "", "a"),
        (("a", INST, "b", ARGS, "c"), "abc", ""),
        ((CALLS, "f"), "[TOOL_CALLS]f", ""),
        ((CALLS, CALLS), "[TOOL_CALLS][TOOL_CALLS]", ""),
        ((CALLS, "nobody", ARGS, '{"a": 1}'), '[TOOL_CALLS]nobody[ARGS]{"a": 1}', ""),
        ((THINK, CALLS, "g", ARGS, "x", END_THINK), "[TOOL_CALLS]g[ARGS]x", ""),
    ],
)
def test_broken_structure_keeps_what_was_said(
    mistral: MistralFormat, parts: tuple[str | int, ...], content: str, reasoning: str
) -> None:
    answer = message(mistral, script(mistral, *parts))
    assert (answer["content"], answer["reasoning"]) == (content, reasoning)
    assert not answer["calls"]


def test_call_that_does_not_parse_becomes_text_unless_a_grammar_vouches(
    mistral: MistralFormat,
) -> None:
    ids = script(mistral, CALLS, "f", ARGS, '{"a": ')
    assert message(mistral, ids, live_calls=False)["content"] == '[TOOL_CALLS]f[ARGS]{"a": '
    assert message(mistral, ids, live_calls=True)["calls"] == [("f", '{"a": ')]


def test_arguments_cut_off_at_their_brace_are_none(mistral: MistralFormat) -> None:
    for cut, shown in (("{", ""), (" {\n", ""), ("{}", "{}"), ('{"', '{"'), ("", "")):
        ids = script(mistral, CALLS, "f", ARGS, '{"a": 1}', CALLS, "f", ARGS, cut)
        assert message(mistral, ids)["calls"] == [("f", '{"a": 1}'), ("f", shown)]


def test_stop_strings_work_across_tokens_but_not_in_thoughts_or_arguments(
    mistral: MistralFormat,
) -> None:
    ids = script(mistral, THINK, "STOP", END_THINK, "one ST", "OP two", EOS)
    answer = message(mistral, ids, stops=("STOP",))
    assert answer["reasoning"] == "STOP" and answer["content"] == "one "
    ids = script(mistral, CALLS, "f", ARGS, '{"a": "STOP"}', EOS)
    assert message(mistral, ids, stops=("STOP",))["calls"] == [("f", '{"a": "STOP"}')]


def test_held_text_comes_before_what_follows_it(mistral: MistralFormat) -> None:
    """A partial stop string must not be overtaken by a thought or lost at the end."""
    assert message(mistral, script(mistral, "a ST"), stops=("STOP",))["content"] == "a ST"
    ids = script(mistral, "a ST", THINK, "x", END_THINK, "OP b")
    assert message(mistral, ids, stops=("STOP",))["content"] == "a "


_ids = st.lists(
    st.one_of(
        st.sampled_from([THINK, END_THINK, CALLS, ARGS, EOS, INST]),
        st.integers(64, 763),
        st.sampled_from([64 + ord(c) for c in '{}f"S']),
    ),
    max_size=30,
)


@given(_ids, st.booleans())
def test_no_stream_breaks_the_router_or_loses_text(
    mistral: MistralFormat, ids: list[int], live: bool
) -> None:
    answer = message(mistral, ids, live_calls=live)
    spoken = b"".join(mistral.vocabulary.token_bytes[i] for i in ids).decode(errors="ignore")
    kept = "".join(
        [answer["content"], answer["reasoning"], *(name + args for name, args in answer["calls"])]
    )
    # Control tokens split characters and calls move; every character that was whole is somewhere.
    # A brace is held back where nothing follows it.
    for character in set(spoken) - set(" \t\n\r{"):
        assert kept.count(character) >= 1 or len(character.encode()) > 1
