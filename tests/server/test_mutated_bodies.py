"""Requests that were right until somebody changed a value, a name, a type or an order.

Whatever becomes of them, the answer is one of the API's: no 500, nothing in the error log, JSON or
whole events, and a sentence where it is refused.
"""

import copy
import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest

from halfbyte.chat.template_format import TemplateFormat
from halfbyte.log import logger
from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
_GIF = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
_PICTURE = {"type": "image", "source": {
    "type": "base64", "media_type": "image/gif", "data": _GIF.partition(",")[2]}}  # fmt: skip
_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0},
        "b": {"type": "array", "items": {"type": "string", "pattern": "^x+$"}},
        "c": {"$ref": "#/$defs/d"},
    },
    "required": ["a"],
    "$defs": {"d": {"anyOf": [{"enum": [1, None, "z"]}, {"$ref": "#/$defs/d"}]}},
}
_FUNCTION = {"name": "f", "description": "d", "parameters": _SCHEMA, "strict": False}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_SAMPLING = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 5, "stop": ["x"],
    "logit_bias": {"5": 1}, "presence_penalty": 0.1, "repetition_penalty": 1.1, "min_tokens": 1,
    "stop_token_ids": [3], "n": 2, "max_tokens": 5,
}  # fmt: skip
_MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": [
        {"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": _GIF}}]},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": [{"type": "text", "text": "t"}]},
        {"type": "text", "text": "ok"}], "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "1"}]},
    {"role": "assistant", "content": "Done", "reasoning_content": "r"},
    {"role": "user", "content": "go"},
]  # fmt: skip
_HELLO = [{"role": "user", "content": "Hi"}]


def _chat(**change: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": "m", "messages": _HELLO, "max_tokens": 5, **change}


_BEGUN = [*_HELLO, {"role": "assistant", "content": '{"a": ', "prefix": True}]
_FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    _chat(messages=_MESSAGES, tools=[{"type": "function", "function": _FUNCTION}],
          tool_choice="auto", stream=True, stream_options={"include_usage": True}, logprobs=True,
          top_logprobs=2, reasoning_effort="high", max_reasoning_tokens=5, **_SAMPLING),
    _chat(messages=_MESSAGES),
    _chat(messages=_BEGUN, response_format=_FORM, chat_template_kwargs={"enable_thinking": True}),
    _chat(response_format={"type": "regex", "regex": "[a-z]{3}"}),
    _chat(response_format={"type": "choice", "choices": ["a", "b"]}),
    _chat(structured_outputs={"grammar": 'start: "a" b\nb: /x+/'}),
    ("/v1/completions", {"model": "m", "prompt": "Hello", "logprobs": 2, **_SAMPLING}),
    ("/v1/completions", {"model": "m", "prompt": [[1, 5], [7]], "max_tokens": 0, "echo": True}),
    ("/v1/responses", {"model": "m", "instructions": "I", "input": [
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": _GIF}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "o"},
        {"role": "user", "content": "z"}],
        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}}),
    ("/v1/messages", {"model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "S"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "h"}, _PICTURE]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "r"}]}],
        "tools": [{"name": "f", "input_schema": _SCHEMA}], "tool_choice": {"type": "auto"}}),
    ("/v1/messages/count_tokens", {"model": "m", "messages": _HELLO}),
    ("/tokenize", {"model": "m", "messages": _MESSAGES, "return_token_strs": True}),
    ("/detokenize", {"model": "m", "tokens": [1, 2, 3]}),
    ("/web/render", {"text": "# a\n\n$x^2$ | a | b |\n"}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, -0.0, 0.5, 1e308, 5e-324, 1e-46, 2**31, 2**53 + 1, 2**63, -(2**63),
    2**64, 10**30, 10**400, "", " ", "\0", "a" * 600, "é", "\u202e", "\ufeff", "0", "null", "{",
    "[]", '{"a":', '{"a": 1e400}', '{"a": "\\ud800"}', '{"a": NaN}', [], [[]], {}, {"": 1}, [None],
    ["x"], [1], [{}], {"type": "text"}, {"type": None}, {"type": []}, "auto", "none", "required",
    "tool", "object", "(", "[a-", "(?i)x", "\\p{L}+", "\\b", "a{1000}{1000}", "^(a|aa)+$", "$",
    "#/$defs/d", "#", "#/$defs/~1", "http://x", "data:,", "data:image/png;base64,", "file:///x",
]  # fmt: skip


def _walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield path, value
    inner: Any = ()
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        yield from _walk(item, (*path, key))


_NODES = [node for _, body in SEEDS for _, node in _walk(body)]
_NAMES = sorted({name for node in _NODES if isinstance(node, dict) for name in node})
_NAMES += ["const", "not", "format", "maxLength", "minItems", "multipleOf", "prefixItems", "$id"]


def _changed(body: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """A copy with one to four changes."""
    body = copy.deepcopy(body)
    for _ in range(dice.choice([1, 1, 1, 2, 2, 3, 4])):
        paths = [path for path, _ in _walk(body) if path]
        if not paths:
            return body
        *steps, last = dice.choice(paths)
        place: Any = body
        for step in steps:
            place = place[step]
        other = copy.deepcopy(dice.choice([dice.choice(ODD), dice.choice(_NODES)]))
        kind = dice.choice(["value", "value", "value", "gone", "more", "moved", "wrapped"])
        if kind == "value":
            place[last] = other
        elif kind == "gone":
            del place[last]
        elif kind == "wrapped":
            place[last] = (
                [place[last]] if dice.random() < 0.5 else {dice.choice(_NAMES): place[last]}
            )
        elif isinstance(place, list):
            place.insert(last, other) if kind == "more" else dice.shuffle(place)
        elif kind == "more":
            place[dice.choice(_NAMES)] = other
        else:
            place[dice.choice(_NAMES)] = place.pop(last)
    return body


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


async def _check(bench: Bench, dice: random.Random, count: int) -> None:
    errors = _Errors()
    logger.addHandler(errors)
    answered: set[int] = set()
    try:
        async with bench.http(timeout=60) as client:
            for _ in range(count):
                path, body = dice.choice(SEEDS)
                body = _changed(body, dice)
                if dice.random() < 0.4 and path.startswith("/v1/") and not path.endswith("tokens"):
                    body["stream"] = True
                agent = dice.choice(["mistral-client-python/1", "python-httpx/0.2"])
                content = json.dumps(body)
                answer = await client.post(path, content=content, headers={"user-agent": agent})
                said = (path, content[:3000], answer.text[:500], errors.lines[:1])
                assert answer.status_code in (200, 400, 404, 413, 429), said
                assert not errors.lines, said
                answered.add(answer.status_code)
                if "event-stream" in answer.headers.get("content-type", ""):
                    _check_events(answer.text, said)
                else:
                    found = answer.json()
                    message = found["error"]["message"] if answer.status_code >= 400 else "-"
                    assert message and len(message) < 2500 and "\n" not in message, said
    finally:
        logger.removeHandler(errors)
    assert {200, 400} <= answered


def _check_events(text: str, said: object) -> None:
    lines = [line for line in text.splitlines() if line.startswith("data: ")]
    assert lines and text.endswith("\n\n"), said
    for line in lines:
        if line != "data: [DONE]":
            assert json.loads(line.removeprefix("data: ")).get("error") is None, said


def _bench(make_bench: MakeBench, dice: random.Random, **options: Any) -> Bench:
    unknown = dice.choice(["accept", "refuse"])
    return make_bench(
        CALLS, "f", ARGS, '{"a": 1}', EOS, unknown_fields=unknown, strict_effort=False, **options
    )


async def test_changed_bodies_are_answered_or_refused(make_bench: MakeBench) -> None:
    dice = random.Random(1)
    await _check(_bench(make_bench, dice), dice, 150)


async def test_changed_bodies_of_template_models(
    make_bench: MakeBench, chatml: TemplateFormat
) -> None:
    dice = random.Random(2)
    await _check(make_bench("Hello", chat=chatml, strict_effort=False), dice, 100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_changed_bodies_at_length(make_bench: MakeBench, chatml: TemplateFormat) -> None:
    for seed in range(10, 16):
        dice = random.Random(seed)
        await _check(_bench(make_bench, dice), dice, 700)
        await _check(make_bench("Hello", chat=chatml, strict_effort=False), dice, 300)
