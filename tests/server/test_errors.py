"""Everything a client can do wrong: the right status, one form of error, nothing run."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from server.conftest import MakeBench

HELLO = [{"role": "user", "content": "Hello"}]
WARNING = "x-halfbyte-warning"
CHAT = {"model": "m", "messages": HELLO}


def assert_error(body: dict[str, Any], param: str | None = None) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    if param is not None:
        assert body["error"]["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "clown", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0]"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 50}, "stop"),
        ({"stop": ["a" * 5000]}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "medium"}, "reasoning_effort"),
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, None),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a"}}],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tool_choice",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, None),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"response_format": {"type": "grammar", "grammar": "x"}}, "response_format"),
        ({"response_format": {"type": "choice", "choices": []}}, "response_format.choices"),
        ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
        ({"modalities": ["audio"]}, None),
    ],
)
async def test_bad_values_are_400_and_name_the_field(
    make_bench: MakeBench, change: dict[str, Any], param: str | None
) -> None:
    bench = make_bench("x", 2)
    async with bench.http() as client:
        for stream in (False, True):
            body = {**CHAT, **change, "stream": stream}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400, answer.text
            assert_error(answer.json(), param)
    assert not bench.service.requests


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "m", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
    ],
)
async def test_malformed_bodies_are_400(make_bench: MakeBench, body: bytes) -> None:
    bench = make_bench("x", 2)
    async with bench.http() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            answer = await client.post(path, content=body)
            assert answer.status_code == 400, answer.text
            assert_error(answer.json())


async def test_messages_begin_with_the_path_of_what_is_wrong(make_bench: MakeBench) -> None:
    bench = make_bench("x", 2)
    async with bench.http() as client:
        for change, path in (
            ({"temperature": "hot"}, "temperature"),
            ({"messages": [{"role": "user"}]}, "messages[0].content"),
            ({"stop": [1]}, "stop"),
        ):
            answer = await client.post("/v1/chat/completions", json={**CHAT, **change})
            error = answer.json()["error"]
            assert error["message"].startswith(f"{path}") and error["param"].startswith(path)
            assert ": " in error["message"]


async def test_statuses_of_the_official_client(make_bench: MakeBench) -> None:
    client: Any = make_bench("x", 2).openai()
    with pytest.raises(openai.NotFoundError, match="this server has: m"):
        await client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError, match="context is 4096") as caught:
        await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "1 2 3 4 " * 2000}],
        )
    assert caught.value.code == "context_length_exceeded"


async def test_paths_and_methods(make_bench: MakeBench) -> None:
    async with make_bench("x").http() as client:
        missing = await client.get("/nowhere")
        assert missing.status_code == 404
        assert_error(missing.json())
        wrong = await client.get("/v1/chat/completions")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
        assert_error(wrong.json())


async def test_large_bodies_are_413_before_they_are_read(make_bench: MakeBench) -> None:
    from halfbyte.server.config import Limits

    bench = make_bench("x", 2, limits=Limits(body_bytes=1000))
    async with bench.http() as client:
        whole = await client.post("/v1/chat/completions", content=b" " * 1001)
        assert whole.status_code == 413
        assert_error(whole.json())

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(10_000):
                yield b" " * 100

        chunked = await client.post("/v1/chat/completions", content=endless())
        assert chunked.status_code == 413


async def test_text_model_refuses_tools_and_images(make_bench: MakeBench, chatml: Any) -> None:
    bench = make_bench("x", 2, chat=chatml)
    image = {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "user", "content": [image]}]}, "messages[0].content[0].image_url"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"max_reasoning_tokens": 5}, "max_reasoning_tokens"),
    ]
    async with bench.http() as client:
        for change, param in changes:
            answer = await client.post("/v1/chat/completions", json={**CHAT, **change})
            assert answer.status_code == 400
            assert_error(answer.json(), param)
        allowed = {**CHAT, "tools": changes[0][0]["tools"], "tool_choice": "none"}
        assert (await client.post("/v1/chat/completions", json=allowed)).status_code == 200


async def test_unexpected_exceptions_are_500_and_say_nothing(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench("x", 2)

    def explode(request: object) -> list[int]:
        raise KeyError("secret")

    bench.service.script = explode
    async with bench.http() as client:
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert answer.status_code == 500 and "secret" not in answer.text
            assert_error(answer.json())


async def test_options_of_streams_need_a_stream(make_bench: MakeBench) -> None:
    async with make_bench("x", 2).http() as client:
        body = {**CHAT, "stream_options": {"include_usage": True}}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 400


async def test_nulls_and_bookkeeping_fields_change_nothing(make_bench: MakeBench) -> None:
    bench = make_bench("x", 2)
    body = {
        **CHAT,
        "messages": [{"role": "user", "content": "Hello", "name": "me"}],
        "functions": None,
        "stop": None,
        "store": True,
        "service_tier": "auto",
        "user": "u",
    }
    async with bench.http() as client:
        answer = await client.post("/v1/chat/completions", content=json.dumps(body))
        assert answer.status_code == 200, answer.text


LONG = "x" * 50_000


@pytest.mark.parametrize(
    "change",
    [
        {"model": LONG},
        {LONG: 1},
        {"messages": [{"role": "user", "content": "x", LONG: {}}]},
        {"messages": [{"role": LONG, "content": "x"}]},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a" * 500}]},
        {"reasoning_effort": LONG},
        {"tools": [{"type": "function", "function": {"name": LONG}}]},
        {"tool_choice": {"type": "function", "function": {"name": LONG}}, "tools": []},
        {"logit_bias": {LONG: 1}},
        {"response_format": {"type": LONG}},
        {"response_format": {"type": "regex", "regex": "(" + LONG}},
        {"response_format": {"type": "grammar", "grammar": "start: " + LONG}},
    ],
)
async def test_messages_stay_short_whatever_was_sent(
    make_bench: MakeBench, change: dict[str, Any]
) -> None:
    async with make_bench("x", 2).http() as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code in (400, 404)
    assert_error(answer.json())
    assert len(answer.content) < 3000


@pytest.mark.parametrize("name", ["", " ", "\0", "a\nb", "\x85", "é", "\U0001f600", "x " * 400])
async def test_odd_names_of_fields_are_named_in_sound_headers(
    make_bench: MakeBench, name: str
) -> None:
    body = {**CHAT, name: 1, "user": {name: 1}}
    async with make_bench("x", 2, unknown_fields="accept").http() as client:
        warning = (await client.post("/v1/chat/completions", json=body)).headers[WARNING]
    assert warning == warning.strip() and warning.isascii() and warning.isprintable()
    async with make_bench("x", 2).http() as client:
        error = (await client.post("/v1/chat/completions", json=body)).json()["error"]
    assert error["code"] == "unknown_parameter" and error["param"].strip()
    assert error["message"].isprintable()
