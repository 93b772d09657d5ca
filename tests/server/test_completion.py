"""Choices: how an answer was cut into events never shows in it."""

import itertools
from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.router import CallArguments, CallStart, Content, Reasoning, Router
from halfbyte.engine.request import (
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
    TokensEvent,
)
from halfbyte.server.api.completion import Choice, Message

THINK, END_THINK, CALLS, ARGS, EOS, INST = 34, 35, 9, 32, 2, 3
REQUEST = GenerationRequest("a", (1,), SamplingParams())


def answer(mistral: MistralFormat, events: list[list[int]], stops: tuple[str, ...]) -> Any:
    """Everything a client learns of an answer that came in these events."""
    router = Router(
        mistral.vocabulary, mistral.control, stops=stops, tool_names=frozenset({"f", "get"})
    )
    choice = Choice(0, REQUEST, router, want_entries=True)
    message, kinds = Message(), []
    num_tokens = sum(map(len, events))
    for token_ids in events:
        if not token_ids or router.stopped_by is not None:
            continue
        logprobs = tuple(TokenLogprobs(i, -i / 1000) for i in token_ids)
        for piece in choice.feed(TokensEvent("a", tuple(token_ids), logprobs)):
            kinds.append(type(piece.delta))
            message.add(piece)
    choice.finish = FinishEvent("a", "length", None, 1, 0, num_tokens)
    for piece in choice.end("length"):
        kinds.append(type(piece.delta))
        message.add(piece)
    for call in message.calls:
        assert len(call.pop("id")) == 9
    order = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    counts = (choice.num_completion_tokens, router.num_reasoning_tokens, router.stopped_by)
    return message, order, counts


_structure = st.sampled_from([THINK, END_THINK, CALLS, ARGS, EOS, INST])
_letters = st.sampled_from([64 + byte for byte in b'f{}"aST\xc3\xa9\xe6'])
_words = st.integers(64, 763)
_ids = st.lists(st.one_of(_letters, _structure, _words), max_size=40)


@given(_ids, st.lists(st.integers(0, 40), max_size=8), st.sampled_from([(), ("ST", "a"), ("é",)]))
def test_any_chunking_gives_the_same_answer(
    mistral: MistralFormat, ids: list[int], cuts: list[int], stops: tuple[str, ...]
) -> None:
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    events = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    one_by_one = answer(mistral, [[token_id] for token_id in ids], stops)
    assert answer(mistral, events, stops) == one_by_one
    assert answer(mistral, [ids], stops) == one_by_one


def test_the_property_sees_what_is_said(mistral: MistralFormat) -> None:
    """Lest it compares nothing with nothing."""
    text = mistral.vocabulary.encode_text
    ids = [THINK, *text("hm"), END_THINK, *text("See."), CALLS, *text("get"), ARGS, *text("{}")]
    message, order, counts = answer(mistral, [ids], ())
    assert (message.reasoning, message.content) == ("hm", "See.")
    assert message.calls == [{"type": "function", "function": {"name": "get", "arguments": "{}"}}]
    assert order == [Reasoning, Content, CallStart, CallArguments, type(None)]
    assert counts == (len(ids), 2 + len(text("hm")), None)
    assert len(message.entries) == len(text("See."))
