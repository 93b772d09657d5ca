"""Messages of every form in which servers send them, and addresses as people type them."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("inspect_ai", reason="extra 'eval' is not installed")

from inspect_ai.model import GenerateConfig
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from openai.types.chat import ChatCompletion

from halfbyte.errors import UsageError
from halfbyte.evals.running.endpoint import base_address
from halfbyte.evals.running.provider import (
    AnswerReader,
    ServerFaultError,
    check_completion,
    read_message,
)


@pytest.mark.parametrize(
    "message, text, reasoning",
    [
        ({"content": "B"}, "B", ""),
        ({"content": None}, "", ""),
        ({}, "", ""),
        ({"content": []}, "", ""),
        ({"content": "B", "reasoning_content": "hm"}, "B", "hm"),
        ({"content": "B", "reasoning": "hm"}, "B", "hm"),
        ({"content": "B", "reasoning": "hm", "reasoning_content": "hm"}, "B", "hm"),
        ({"content": "B", "reasoning_content": None}, "B", ""),
        ({"content": [{"type": "text", "text": "B"}]}, "B", ""),
        ({"content": [{"type": "text", "text": "Answer: "}, {"type": "text", "text": "B"}]},
         "Answer: B", ""),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                      {"type": "text", "text": "B"}]}, "B", "hm"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "B"}]},
         "B", "hm"),
        ({"content": [{"type": "reasoning", "reasoning": "hm"}, "B"]}, "B", "hm"),
        ({"content": [{"type": "thinking", "thinking": ["a", {"text": "b"}]}]}, "", "ab"),
        ({"content": [{"type": "output_text", "text": "B"}]}, "B", ""),
        ({"content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "B"}]},
         "B", ""),
        ({"content": [None, {"type": "text", "text": None}, {"text": "B"}]}, "B", ""),
        ({"content": {"type": "text", "text": "B"}}, "B", ""),
        ({"content": None, "refusal": "I will not."}, "I will not.", ""),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no", ""),
        ({"content": 7}, "", ""),
    ],
)  # fmt: skip
def test_text_and_thoughts_are_told_apart(
    message: dict[str, object], text: str, reasoning: str
) -> None:
    assert read_message(message) == (text, reasoning)


async def test_a_completion_comes_back_with_text_and_thoughts_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "B"}]
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
    sent = ChatCompletion.model_validate(
        {"id": "i", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    )
    sent.choices[0].message.content = parts  # type: ignore[assignment]

    async def answer(*_: Any) -> Any:
        return sent

    monkeypatch.setattr(OpenAICompatibleAPI, "_generate_completion", answer)
    client = AnswerReader("m", base_url="http://127.0.0.1:9/v1", api_key="none")
    found = await client._generate_completion({}, GenerateConfig())
    message = found.choices[0].message
    assert (message.content, message.reasoning_content) == ("B", "hm")
    (kept,) = client.chat_choices_from_completion(found, [])
    assert kept.message.text == "B" and kept.stop_reason == "stop"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["type", "text", "thinking", "content"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["content", "reasoning", "refusal"]), anything))
def test_no_message_breaks_the_reader(message: dict[str, object]) -> None:
    answer = read_message(message)
    assert isinstance(answer.text, str) and isinstance(answer.reasoning, str)


@pytest.mark.parametrize(
    "given, base",
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("h:8000", "http://h:8000/v1"),
        ("127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://h/v1", "http://h/v1"),
        ("http://h/v1/", "http://h/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/api/paas/v4", "https://h/api/paas/v4"),
        ("https://h/openai/v1/chat/completions", "https://h/openai/v1"),
        ("https://h/v2?key=1", "https://h/v2"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_a_version_is_added_to_a_bare_host_only(given: str, base: str) -> None:
    assert base_address(given) == base


@pytest.mark.parametrize("given", ["ftp://h", "http://", "file:///x", "http://h:port", ""])
def test_what_is_no_address_is_said(given: str) -> None:
    with pytest.raises(UsageError, match="not the address"):
        base_address(given)


ANSWERED = SimpleNamespace(message=SimpleNamespace(content="B"))


def test_a_completion_is_a_completion() -> None:
    check_completion(SimpleNamespace(choices=[ANSWERED], error=None))
    check_completion(SimpleNamespace(choices=[ANSWERED, ANSWERED]))


@pytest.mark.parametrize(
    "body, said, status",
    [
        ({"error": {"message": "overloaded", "code": 529}}, "overloaded", 529),
        ({"error": {"message": "overloaded", "code": "503"}}, "overloaded", 503),
        ({"error": {"message": "", "status": 500}}, "'status': 500", 500),
        ({"error": {"message": "bad", "code": "rate_limit"}}, "bad", None),
        ({"error": "down"}, "down", None),
        ({"error": {"message": "x"}, "choices": [ANSWERED]}, "error with status 200: x", None),
        ({"choices": []}, "no choices", None),
        ({"choices": None}, "no choices", None),
        ({"choices": {"0": 1}}, "no choices", None),
        ({"model_extra": {"detail": "not found"}}, "not found", None),
        ({"choices": [SimpleNamespace(message=None)]}, "without a message", None),
        ({"choices": [ANSWERED, SimpleNamespace()]}, "without a message", None),
    ],
)
def test_an_error_under_status_200_is_no_answer(
    body: dict[str, Any], said: str, status: int | None
) -> None:
    with pytest.raises(ServerFaultError) as caught:
        check_completion(SimpleNamespace(**body))
    assert said in str(caught.value)
    assert caught.value.status_code == status


def test_a_page_of_text_is_shown_in_part() -> None:
    with pytest.raises(ServerFaultError, match="no choices: <html>"):
        check_completion("<html>" + "x" * 1000)
