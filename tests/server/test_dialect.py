"""Forms of chat answers: what Mistral's clients read, and that OpenAI's stays as it is."""

import json
from typing import Any

import pytest

from halfbyte.server.dialect import BARE, MISTRAL, OPENAI, VIBE, Dialect, dialect_of
from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
HELLO = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SCRIPT = (THINK, "hm", END_THINK, "See.", CALLS, "f", ARGS, '{"a": 1}', CALLS, "f", ARGS, "{}", EOS)
PYTHON = "mistral-client-python/3.7.0"


async def stream_of(
    bench: Bench, agent: str, path: str = "/v1/chat/completions", **fields: Any
) -> list[Any]:
    body = {
        "model": "m",
        "messages": HELLO,
        "tools": TOOLS,
        "reasoning_effort": "high",
        "stream": True,
        **fields,
    }
    async with bench.http(headers={"user-agent": agent}) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    frames = answer.text.split("\n\n")
    assert frames[-2] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def calls_of(chunks: list[Any]) -> list[Any]:
    return [
        call
        for chunk in chunks
        for choice in chunk["choices"]
        for call in choice["delta"].get("tool_calls", ())
    ]


async def test_a_call_comes_whole_with_thoughts_as_parts_and_usage(make_bench: MakeBench) -> None:
    bench = make_bench(*SCRIPT)
    for agent, path in (
        (PYTHON, "/v1/chat/completions"),
        ("curl/8", "/mistral/v1/chat/completions"),
    ):
        chunks = await stream_of(bench, agent, path)
        calls = calls_of(chunks)
        assert [call["function"] for call in calls] == [
            {"name": "f", "arguments": '{"a": 1}'},
            {"name": "f", "arguments": "{}"},
        ]
        assert [call["index"] for call in calls] == [0, 1] and all(call["id"] for call in calls)
        thoughts = [
            part["thinking"][0]["text"]
            for chunk in chunks
            for choice in chunk["choices"]
            if isinstance(choice["delta"].get("content"), list)
            for part in choice["delta"]["content"]
        ]
        assert "".join(thoughts) == "hm"
        assert not any("reasoning" in choice["delta"] for c in chunks for choice in c["choices"])
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        usage = chunks[-1]["usage"]
        assert usage["completion_tokens"] > 0
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_pieces_when_they_are_asked_for(make_bench: MakeBench) -> None:
    bench = make_bench(*SCRIPT)
    for agent, in_pieces in ((PYTHON, True), ("OpenAI/Python", False)):
        options = {"stream_tool_calls": in_pieces}
        calls = calls_of(await stream_of(bench, agent, stream_options=options))
        assert (len(calls) > 2) is in_pieces


async def test_others_get_openais_form(make_bench: MakeBench) -> None:
    chunks = await stream_of(make_bench(*SCRIPT), "OpenAI/Python 3.57.0")
    assert len(calls_of(chunks)) > 2
    assert all("usage" not in chunk for chunk in chunks)
    thoughts = [choice["delta"].get("reasoning") for c in chunks for choice in c["choices"]]
    assert "".join(thought or "" for thought in thoughts) == "hm"


async def test_whole_answers_too(make_bench: MakeBench) -> None:
    bench = make_bench(THINK, "hm", END_THINK, "Yes", EOS)
    body = {"model": "m", "messages": HELLO, "reasoning_effort": "high"}
    async with bench.http() as http:
        ours = (await http.post("/v1/chat/completions", json=body)).json()
        theirs = (await http.post("/mistral/v1/chat/completions", json=body)).json()
        hidden = await http.post("/v1/chat/completions", json={**body, "include_reasoning": False})
    message = ours["choices"][0]["message"]
    assert message["content"] == "Yes" and message["reasoning"] == "hm"
    assert theirs["choices"][0]["message"]["content"] == [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "Yes"},
    ]
    assert "reasoning" not in hidden.json()["choices"][0]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_keep_their_calls_apart(make_bench: MakeBench, stream: bool) -> None:
    bench = make_bench(CALLS, "f", ARGS, '{"a": 1}', EOS)
    if stream:
        chunks = await stream_of(bench, PYTHON, n=3)
        assert [call["function"]["arguments"] for call in calls_of(chunks)] == ['{"a": 1}'] * 3
        assert [bool(chunk.get("usage")) for chunk in chunks].count(True) == 1
        assert chunks[-1]["usage"]


@pytest.mark.parametrize(
    "setting, path, agent, body, dialect",
    [
        ("auto", "/v1/chat/completions", "mistral-client-typescript/2.7.0", {}, MISTRAL),
        ("auto", "/v1/chat/completions", "ai/6 ai-sdk/mistral/3.0.69 runtime/node", {}, MISTRAL),
        ("auto", "/v1/chat/completions", "python-httpx/0.28.1", {}, BARE),
        ("auto", "/x", "python-httpx/0.28.1", {"stream_options": {}}, OPENAI),
        (
            "auto",
            "/x",
            "python-httpx/0.28.1",
            {"stream_options": {"stream_tool_calls": True}},
            VIBE,
        ),
        ("auto", "/x", "OpenAI/Python", {"stream_options": {"stream_tool_calls": True}}, OPENAI),
        ("auto", "/x", "python-httpx/0.28.1", {"stream_options": [1]}, OPENAI),
        ("auto", "/x", "OpenAI/Python", {"random_seed": 3}, BARE),
        ("auto", "/x", "OpenAI/Python", {"random_seed": None}, OPENAI),
        ("openai", "/x", PYTHON, {}, OPENAI),
        ("openai", "/mistral/v1/models", PYTHON, {}, MISTRAL),
        ("mistral", "/x", "OpenAI/Python", {}, MISTRAL),
        ("auto", "/mistralish", "curl", {}, OPENAI),
    ],
)
def test_whose_dialect(
    setting: Any, path: str, agent: str, body: dict[str, Any], dialect: Dialect
) -> None:
    assert dialect_of(setting, path, agent, body) == dialect


def test_what_each_dialect_says_otherwise() -> None:
    shown = {
        "openai": (OPENAI.whole_calls, OPENAI.thought_parts, OPENAI.closing_usage),
        "mistral": (MISTRAL.whole_calls, MISTRAL.thought_parts, MISTRAL.closing_usage),
        "bare": (BARE.whole_calls, BARE.thought_parts, BARE.closing_usage),
    }
    assert shown == {
        "openai": (False, False, False),
        "mistral": (True, True, True),
        "bare": (True, False, True),
    }
