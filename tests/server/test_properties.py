"""Whatever a model says, in whatever pieces: frames are frames, their sum is the whole answer."""

import asyncio
import itertools
import json
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st

from halfbyte.server.api.stream import frame
from server.conftest import Bench, MakeBench
from server.test_chat_api import HELLO, TOOL

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
SETTINGS = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Mostly what occurs: structure, names, arguments, text with odd bytes; all tokens now and then.
_TOKENS = st.one_of(
    st.sampled_from([THINK, END_THINK, CALLS, ARGS, EOS]),
    st.sampled_from([64 + byte for byte in b'f{}[]"a: 1\n\r\xc3\xa9\xf0\x9f\x98\x80\xff\x00']),
    st.integers(3, 763),
)


def parsed(body: bytes, cuts: list[int]) -> list[str]:
    """The data of each event, read as a client would that gets `body` in pieces."""
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    buffer, events = b"", []
    for begin, end in itertools.pairwise(edges):
        buffer += body[begin:end]
        *whole, buffer = buffer.split(b"\n\n")
        events += whole
    assert buffer == b""
    for event in events:
        assert event.startswith(b"data: ") and event.count(b"\n") == 0 and b"\r" not in event
    return [event[6:].decode() for event in events]


def summed(events: list[str]) -> dict[int, dict[str, Any]]:
    """Messages by choice."""
    assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
    messages: dict[int, dict[str, Any]] = {}
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            mine = messages.setdefault(
                choice["index"],
                {"content": "", "reasoning": "", "calls": [], "finish": None, "tokens": []},
            )
            assert mine["finish"] is None, "something came after the end"
            delta = choice["delta"]
            mine["content"] += delta.get("content") or ""
            mine["reasoning"] += delta.get("reasoning_content") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(mine["calls"])
                    mine["calls"].append([call["function"]["name"], ""])
                mine["calls"][call["index"]][1] += call["function"]["arguments"]
            mine["finish"] = choice["finish_reason"]
            mine["tokens"] += (choice["logprobs"] or {}).get("content") or []
    return messages


@SETTINGS
@hypothesis.given(
    ids=st.lists(_TOKENS, max_size=40),
    per_event=st.integers(1, 7),
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    limit=st.integers(1, 45),
    stop=st.sampled_from([None, "a", "1}", "é"]),
)
def test_streamed_equals_whole_for_any_tokens(
    make_bench: MakeBench, ids: list[int], per_event: int, cuts: list[int], limit: int, stop: Any
) -> None:
    bench = make_bench(service={"tokens_per_event": per_event})
    bench.service.script = lambda request: [*ids, EOS]
    body = {
        "model": "m", "messages": HELLO, "tools": [TOOL], "reasoning_effort": "high", "stop": stop,
        "max_tokens": limit, "n": 2, "logprobs": True, "top_logprobs": 1,
    }  # fmt: skip

    async def ask() -> tuple[dict[str, Any], bytes, dict[str, Any]]:
        async with bench.http() as client:
            whole = await client.post("/v1/chat/completions", json=body)
            options = {"include_usage": True}
            streamed = await client.post(
                "/v1/chat/completions", json={**body, "stream": True, "stream_options": options}
            )
            told = await client.post(
                "/v1/responses",
                json={"model": "m", "input": "Hello", "max_output_tokens": limit},
            )
        assert whole.status_code == streamed.status_code == told.status_code == 200
        return whole.json(), streamed.content, told.json()

    whole, content, told = asyncio.run(ask())
    events = parsed(content, cuts)
    messages = summed(events)
    for choice in whole["choices"]:
        mine, message = messages[choice["index"]], choice["message"]
        assert mine["content"] == (message["content"] or "")
        assert mine["reasoning"] == message.get("reasoning_content", "")
        calls = [
            [c["function"]["name"], c["function"]["arguments"]]
            for c in message.get("tool_calls", ())
        ]
        assert mine["calls"] == calls
        assert mine["finish"] == choice["finish_reason"]
        assert mine["tokens"] == choice["logprobs"]["content"]
    assert json.loads(events[-2])["usage"] == whole["usage"]
    assert told["usage"]["output_tokens"] <= limit
    assert not bench.service.running and not bench.app.state.backend.running


@SETTINGS
@hypothesis.given(
    value=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    event=st.sampled_from([None, "response.created"]),
)
def test_a_frame_is_one_event_whatever_is_in_it(value: Any, event: str | None) -> None:
    try:
        raw = frame(value, event)
    except UnicodeEncodeError:
        hypothesis.assume(False)
        raise
    lines = raw.split(b"\n")
    assert lines[-2:] == [b"", b""] and len(lines) == (4 if event else 3)
    assert json.loads(lines[-3].removeprefix(b"data: ")) == value
    assert event is None or lines[0] == b"event: " + event.encode()


@pytest.mark.parametrize("per_event", [1, 100])
def test_events_of_responses_build_the_response(make_bench: MakeBench, per_event: int) -> None:
    """Items announced, filled and closed in order; numbered without gaps."""
    bench: Bench = make_bench(
        THINK, "hm", END_THINK, "See.", CALLS, "f", ARGS, '{"a": 1}', EOS,
        service={"tokens_per_event": per_event},
    )  # fmt: skip
    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    body = {"model": "m", "input": "Hello", "tools": [tool], "reasoning": {"effort": "high"}}

    async def ask() -> tuple[dict[str, Any], str]:
        async with bench.http() as client:
            whole = await client.post("/v1/responses", json=body)
            return whole.json(), (
                await client.post("/v1/responses", json={**body, "stream": True})
            ).text

    whole, text = asyncio.run(ask())
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    built: list[Any] = []
    texts = ""
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(built)
            texts = ""
        elif kind.endswith(".delta"):
            assert event["output_index"] == len(built)
            texts += event["delta"]
        elif kind == "output_item.done":
            item = event["item"]
            said = (
                item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
            )
            assert said == texts
            built.append(item)
    last = events[-1]["response"]
    assert last["output"] == built and last["status"] == "completed"

    def bare(items: list[Any]) -> list[Any]:
        return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]

    assert bare(whole["output"]) == bare(built) and whole["usage"] == last["usage"]
