"""Whatever a client calls its tools: the model sees names its format takes, the client its own."""

import asyncio
import json
import re
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st

from halfbyte.server.api.tool_names import for_model, model_name
from halfbyte.server.api.wire import ChatRequest
from server.conftest import MakeBench

CALLS, ARGS, EOS = 9, 32, 2
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ARGUMENTS = '{"a": 1}'
# As MCP servers, gateways and people write them, and whatever else JSON holds.
NAMES = st.one_of(
    st.from_regex(r"[a-z]{1,8}([./:-][a-z_]{1,8}){1,3}", fullmatch=True),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=300),
    st.from_regex(r"[a-zA-Z0-9_-]{1,70}", fullmatch=True),
)
SETTINGS = hypothesis.settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def bodies(name: str) -> dict[str, dict[str, Any]]:
    """The same question to the three APIs with tools, an earlier call and a forced one in it."""
    function = {"name": name, "description": "Does it.", "parameters": SCHEMA}
    call = {"id": "abcdefghi", "function": {"name": name, "arguments": ARGUMENTS}}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "one"}
    use = {"type": "tool_use", "id": "abcdefghi", "name": name, "input": {"a": 1}}
    back = {"type": "tool_result", "tool_use_id": "abcdefghi", "content": "one"}
    hi = {"role": "user", "content": "Hi"}
    return {
        "/v1/chat/completions": {
            "messages": [hi, {"role": "assistant", "tool_calls": [call]}, result],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": name}},
        },
        "/v1/responses": {
            "input": [
                hi,
                {"type": "function_call", "call_id": "abcdefghi", "name": name,
                 "arguments": ARGUMENTS},
                {"type": "function_call_output", "call_id": "abcdefghi", "output": "one"},
            ],
            "tools": [{"type": "function", **function}],
            "tool_choice": {"type": "function", "name": name},
        },
        "/v1/messages": {
            "max_tokens": 50,
            "messages": [hi, {"role": "assistant", "content": [use]},
                         {"role": "user", "content": [back]}],
            "tools": [{"name": name, "description": "Does it.", "input_schema": SCHEMA}],
            "tool_choice": {"type": "tool", "name": name},
        },
    }  # fmt: skip


def called(path: str, body: dict[str, Any]) -> str:
    """The name of the tool that an answer calls."""
    if path == "/v1/chat/completions":
        (call,) = body["choices"][0]["message"]["tool_calls"]
        return str(call["function"]["name"])
    items = body["output"] if path == "/v1/responses" else body["content"]
    return str(items[-1]["name"])


def called_in_stream(text: str) -> set[str]:
    """All names of tools in a stream's events."""
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("type") in ("function", "function_call", "tool_use"):
                if "arguments" in value or "input" in value or "call_id" in value:
                    found.add(value["name"])
                elif "arguments" in value.get("function", {}):
                    found.add(value["function"]["name"])
            for key, inner in value.items():
                if key not in ("tools", "tool_choice"):
                    look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    for line in text.split("\n"):
        if line.startswith("data: {"):
            look(json.loads(line[6:]))
    return found


@SETTINGS
@hypothesis.given(name=NAMES)
def test_any_name_comes_back_as_it_was_sent(make_bench: MakeBench, name: str) -> None:
    hypothesis.assume(len(name) <= 255)
    shown = model_name(name)
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", shown)
    bench = make_bench(CALLS, shown, ARGS, ARGUMENTS, EOS)

    async def ask() -> None:
        async with bench.http() as http:
            for path, body in bodies(name).items():
                whole = await http.post(path, json={"model": "m", **body})
                assert whole.status_code == 200, whole.text
                assert called(path, whole.json()) == name
                streamed = await http.post(path, json={"model": "m", "stream": True, **body})
                assert called_in_stream(streamed.text) == {name}
            chat = bodies(name)["/v1/chat/completions"]
            told = await http.post(
                "/tokenize",
                json={"model": "m", "messages": chat["messages"], "tools": chat["tools"]},
            )
            prompt = bench.chat.vocabulary.decode(told.json()["tokens"])
            assert f'"name": "{shown}"' in prompt and f"{shown}{ARGUMENTS}" in prompt, prompt
            assert told.json()["tokens"] == list(bench.service.requests[0].prompt_token_ids)

    asyncio.run(ask())
    assert len({request.prompt_token_ids for request in bench.service.requests}) == 1


@hypothesis.given(one=NAMES, other=NAMES)
@hypothesis.settings(derandomize=True, database=None, deadline=None)
def test_two_names_stay_two(one: str, other: str) -> None:
    assert (model_name(one) == model_name(other)) == (one == other)


def test_a_name_the_format_takes_stays() -> None:
    for name in ("get_weather", "a", "A-b_9", "x" * 64):
        assert model_name(name) == name
    assert model_name("x" * 65) != "x" * 65


@pytest.mark.parametrize("name", ["files.read", "a/b", "größe", "x" * 65])
async def test_allowed_tools_and_refusals_speak_of_the_clients_names(
    make_bench: MakeBench, name: str
) -> None:
    bench = make_bench(CALLS, model_name(name), ARGS, ARGUMENTS, EOS)
    body = bodies(name)["/v1/chat/completions"]
    other = {"type": "function", "function": {"name": "b.c", "parameters": SCHEMA}}
    chosen = {"type": "function", "function": {"name": name}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [chosen]}}
    asked = {"model": "m", **body, "tools": [*body["tools"], other]}
    async with bench.http() as http:
        answer = await http.post("/v1/chat/completions", json={**asked, "tool_choice": allowed})
        assert called("/v1/chat/completions", answer.json()) == name
        (request,) = bench.service.requests
        # The rules let the one be called and not the other.
        assert request.rules is not None
        missing = {"type": "function", "function": {"name": "no.such"}}
        answer = await http.post("/v1/chat/completions", json={**asked, "tool_choice": missing})
        assert answer.status_code == 400 and "'no.such'" in answer.text
        twice = {**asked, "tools": body["tools"] * 2}
        answer = await http.post("/v1/chat/completions", json=twice)
        assert answer.status_code == 400 and "same name" in answer.text


def test_plain_names_stay_beside_others() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("plain", "files.read")]
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    request = ChatRequest.model_validate(body)
    shown = for_model(request)
    assert shown.tools is not None and request.tools is not None
    assert [tool.function.name for tool in shown.tools] == ["plain", model_name("files.read")]
    assert shown.tools[0] is request.tools[0]
