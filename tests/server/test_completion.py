"""Choices: how an answer was cut into events never shows in it."""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
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
from halfbyte.errors import RequestError
from halfbyte.server.api import wire
from halfbyte.server.api.answers import EngineAnswers
from halfbyte.server.api.completion import AnswerMessage, Choice, Job
from halfbyte.server.api.pieces import Usage
from halfbyte.server.ops.metrics import Metrics

THINK, END_THINK, CALLS, ARGS, EOS, INST = 34, 35, 9, 32, 2, 3
REQUEST = GenerationRequest("a", (1,), SamplingParams())


def answer(mistral: MistralFormat, events: list[list[int]], stops: tuple[str, ...]) -> Any:
    """Everything a client learns of an answer that came in these events."""
    router = Router(
        mistral.vocabulary, mistral.control, stops=stops, tool_names=frozenset({"f", "get"})
    )
    choice = Choice(0, REQUEST, router, want_entries=True)
    message, kinds = AnswerMessage(), []
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


# --- Several answers at once, and how they end. ---


class Service:
    """Streams a token a turn; `fails` names the request whose engine ends before it began."""

    is_ready = True

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.num_closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokensEvent, None]:
        try:
            if request.request_id == self.fails:
                await asyncio.sleep(0.01)
                return
            while True:
                yield TokensEvent(request.request_id, (64 + ord("x"),), None)
                await asyncio.sleep(0)
        finally:
            # What an abort waits for.
            await asyncio.sleep(0.02)
            self.num_closed += 1


def answers(service: Any, *, is_draining: bool) -> EngineAnswers:
    admission: Any = SimpleNamespace(is_draining=is_draining)
    return EngineAnswers(service, Metrics(), admission)


@pytest.mark.parametrize("fails", ["a", "b", "c"])
async def test_the_first_failure_of_several_answers_is_told_when_all_have_ended(
    mistral: MistralFormat, fails: str
) -> None:
    service = Service(fails)
    choices = [
        Choice(
            index,
            GenerationRequest(name, (1,), SamplingParams()),
            Router(mistral.vocabulary, mistral.control),
        )
        for index, name in enumerate("abc")
    ]
    asked = wire.CompletionRequest(model="m", prompt="a")
    job = Job("answer", 1, asked, choices, Usage(1))
    with pytest.raises(RequestError, match="the engine has stopped"):
        async for _ in answers(service, is_draining=False).pieces(job):
            pass
    assert service.num_closed == 3, "nothing of it goes on behind the answer's back"


@pytest.mark.parametrize(
    "reason, is_draining, is_ready, code, status, said",
    [
        ("abort", False, True, "engine_error", 503, "the answer was aborted"),
        ("abort", True, True, "shutting_down", 503, "the server is shutting down"),
        ("error", False, True, "engine_error", 500, "the answer was aborted"),
        ("error", True, True, "engine_error", 500, "the answer was aborted"),
        ("error", False, False, "engine_error", 503, "the answer was aborted"),
    ],
)
def test_an_answer_that_did_not_end_by_itself_says_why(
    mistral: MistralFormat,
    reason: Any,
    is_draining: bool,
    is_ready: bool,
    code: str,
    status: int,
    said: str,
) -> None:
    given = answers(SimpleNamespace(is_ready=is_ready), is_draining=is_draining)
    choice = Choice(0, REQUEST, Router(mistral.vocabulary, mistral.control))
    with pytest.raises(RequestError, match=said) as caught:
        given.finish_reason(choice, FinishEvent("a", reason, None, 1, 0, 2))
    assert (caught.value.code, caught.value.status) == (code, status)
    for good in ("stop", "length"):
        assert given.finish_reason(choice, FinishEvent("a", good, None, 1, 0, 2)) == good
