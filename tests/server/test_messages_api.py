import base64
import io
import json
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from PIL import Image
from pydantic import ValidationError

from halfbyte.server.api.messages_wire import MessagesRequest
from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
TOOL = {
    "name": "f",
    "description": "Does it.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
USER = [{"role": "user", "content": "Hi"}]


def client_of(bench: Bench, **options: Any) -> Any:
    # This client takes its own successor of httpx only.
    transport = httpx2.ASGITransport(app=bench.app, raise_app_exceptions=False)
    http = httpx2.AsyncClient(transport=transport, base_url="http://test")
    options = {"api_key": "none", **options}
    return anthropic.AsyncAnthropic(
        base_url="http://test", http_client=http, max_retries=0, **options
    )


async def both(bench: Bench, **request: Any) -> Any:
    """Streamed and not: the client's own accumulator must build the message that comes whole."""
    client = client_of(bench)
    request = {"model": "m", "max_tokens": 100, "messages": USER, **request}
    whole = await client.messages.create(**request)
    async with client.messages.stream(**request) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"

    def plain(message: Any) -> dict[str, Any]:
        body: dict[str, Any] = message.model_dump(exclude={"id"})
        for block in body["content"]:
            block.pop("id", None)
        return body

    assert plain(final) == plain(whole)
    return whole


def prompt_of(bench: Bench) -> str:
    return bench.chat.vocabulary.decode(
        bench.service.requests[-1].prompt_token_ids, keep_control=True
    )


async def test_text_and_usage(make_bench: MakeBench) -> None:
    bench = make_bench("Hello é", EOS)
    answer = await both(bench, system=[{"type": "text", "text": "Be kind."}])
    assert answer.content[0].text == "Hello é" and answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == len(bench.ids("Hello é")) + 1
    # The scripted engine finds three tokens in its cache; that wire counts them apart.
    num_prompt = len(bench.service.requests[-1].prompt_token_ids)
    assert answer.usage.cache_read_input_tokens == 3
    assert answer.usage.input_tokens == num_prompt - 3
    assert prompt_of(bench).startswith("<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT]")


@pytest.mark.parametrize(
    "thinking", [{"type": "enabled", "budget_tokens": 50}, {"type": "adaptive"}]
)
async def test_thoughts_are_blocks_when_asked_for(
    make_bench: MakeBench, thinking: dict[str, Any]
) -> None:
    bench = make_bench(THINK, "hm", END_THINK, "Yes", EOS)
    answer = await both(bench, thinking=thinking)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "hm" and answer.content[0].signature == ""
    assert '"high"' in prompt_of(bench)


async def test_without_thinking_none_is_asked_for(make_bench: MakeBench) -> None:
    bench = make_bench("Yes", EOS)
    await both(bench)
    assert '"none"' in prompt_of(bench)
    await both(bench, thinking={"type": "disabled"})
    assert '"none"' in prompt_of(bench)


async def test_a_whole_tool_loop(make_bench: MakeBench) -> None:
    bench = make_bench("See.", CALLS, "f", ARGS, '{"a": 1}', CALLS, "f", ARGS, "{}", EOS)
    answer = await both(bench, tools=[TOOL])
    assert answer.stop_reason == "tool_use"
    assert [block.type for block in answer.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in answer.content[1:]] == [{"a": 1}, {}]
    results = [
        {
            "type": "tool_result",
            "tool_use_id": answer.content[1].id,
            "content": [{"type": "text", "text": "one"}],
        },
        {"type": "tool_result", "tool_use_id": answer.content[2].id, "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    history = [
        *USER,
        {"role": "assistant", "content": [block.model_dump() for block in answer.content]},
        {"role": "user", "content": results},
    ]
    await both(bench, messages=history, tools=[TOOL])
    said = prompt_of(bench)
    assert 'See.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{}</s>' in said
    assert said.endswith(
        "[TOOL_RESULTS]one[/TOOL_RESULTS][TOOL_RESULTS][/TOOL_RESULTS][INST]Go on.[/INST]"
    )


@pytest.mark.parametrize(
    "choice, num_calls",
    [
        ({"type": "any"}, 1),
        ({"type": "tool", "name": "f"}, 1),
        ({"type": "auto", "disable_parallel_tool_use": True}, 1),
        ({"type": "none"}, 0),
    ],
)
async def test_choices_of_tools(
    make_bench: MakeBench, choice: dict[str, Any], num_calls: int
) -> None:
    script = (CALLS, "f", ARGS, '{"a": 1}', EOS) if num_calls else ("no", EOS)
    answer = await both(make_bench(*script), tools=[TOOL], tool_choice=choice)
    assert sum(block.type == "tool_use" for block in answer.content) == num_calls


@pytest.mark.parametrize("kind", ["none", "auto", "any"])
@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["no tools", "a tool"])
def test_a_choice_reaches_the_chat_request_where_there_are_tools(
    kind: str, tools: list[Any]
) -> None:
    """Without tools the wish for one goes on, to be refused; the others ask for nothing."""
    request = MessagesRequest.model_validate(
        {"model": "m", "max_tokens": 5, "messages": USER, "tools": tools,
         "tool_choice": {"type": kind}}
    )  # fmt: skip
    chat, _ = request.chat_request(())
    expected = {"any": "required"}.get(kind, kind) if tools or kind == "any" else "auto"
    assert (chat.tool_choice or "auto") == expected


@pytest.mark.parametrize("is_alone", [True, False])
def test_calls_beside_each_other_can_be_forbidden(is_alone: bool) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": is_alone}
    body = {"model": "m", "max_tokens": 5, "messages": USER, "tools": [TOOL], "tool_choice": choice}
    chat, _ = MessagesRequest.model_validate(body).chat_request(())
    assert chat.parallel_tool_calls is not is_alone


async def test_stops(make_bench: MakeBench) -> None:
    bench = make_bench("one two three", EOS)
    answer = await both(bench, stop_sequences=[" three", "two"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "two")
    assert answer.content[0].text == "one "
    assert (await both(bench, max_tokens=1)).stop_reason == "max_tokens"


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("temperature", [0, 1, 2], [-0.01, 2.01]),
        ("top_p", [0.01, 1], [0, 1.01]),
        ("top_k", [0, 1, 2**31 - 1], [-1, 2**31]),
        ("max_tokens", [1], [0]),
    ],
)
def test_sampling_has_the_bounds_of_that_wire(
    name: str, good: list[float], bad: list[float]
) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": USER}
    for value in good:
        assert getattr(MessagesRequest.model_validate({**body, name: value}), name) == value
    for value in bad:
        with pytest.raises(ValidationError, match=name):
            MessagesRequest.model_validate({**body, name: value})


async def test_what_the_context_leaves(make_bench: MakeBench) -> None:
    """Clients of this wire send the most they would ever take; it is no reason to refuse."""
    bench = make_bench(*["word "] * 300, max_model_len=64)
    answer = await both(bench, max_tokens=8_000)
    assert answer.stop_reason == "model_context_window_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="context"):
        await both(bench, messages=[{"role": "user", "content": "word " * 300}])


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


async def test_pictures_and_documents(make_bench: MakeBench) -> None:
    bench = make_bench("ok", EOS)
    source = {"type": "base64", "media_type": "image/png", "data": picture()}
    blocks = [
        {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}},
        {
            "type": "document",
            "title": "Notes",
            "source": {"type": "text", "media_type": "text/plain", "data": "Rome."},
        },
        {"type": "text", "text": "What is it?"},
    ]
    await both(bench, messages=[{"role": "user", "content": blocks}])
    assert len(bench.service.requests[-1].images) == 1
    assert "Notes\n\nRome." in prompt_of(bench)
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]\.source"):
        await both(
            bench,
            messages=[{"role": "user", "content": [{"type": "document", "source": pdf}]}],
        )


async def test_answers_begun_by_the_client_are_continued(make_bench: MakeBench) -> None:
    bench = make_bench(" is Paris.", EOS)
    answer = await both(bench, messages=[*USER, {"role": "assistant", "content": "It"}])
    assert answer.content[0].text == " is Paris."
    assert prompt_of(bench).endswith("[/INST]It")


async def test_what_only_their_servers_have_is_left_out_and_named(make_bench: MakeBench) -> None:
    bench = make_bench("ok", EOS)
    request = {
        "model": "m",
        "max_tokens": 10,
        "messages": [
            *USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Hm."},
                ],
            },
            {"role": "user", "content": "And?"},
        ],
        "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}],
    }
    async with bench.http() as http:
        answer = await http.post("/v1/messages", json=request)
        assert answer.status_code == 200
        warning = answer.headers["x-halfbyte-warning"]
        assert "redacted_thinking" in warning and "web_search_20250305" in warning
        chosen = {**request, "tool_choice": {"type": "tool", "name": "web_search"}}
        refused = await http.post("/v1/messages", json=chosen)
    assert refused.status_code == 400
    assert "web_search" in refused.json()["error"]["message"]


async def test_schemas(make_bench: MakeBench) -> None:
    bench = make_bench('{"a": 1}', EOS)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer = await both(bench, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(answer.content[0].text) == {"a": 1}
    assert bench.service.requests[-1].rules is not None


async def test_counts_are_those_of_answers(make_bench: MakeBench) -> None:
    bench = make_bench("ok", EOS)
    client = client_of(bench)
    asked = {"model": "m", "messages": USER, "system": "Be kind.", "tools": [TOOL]}
    count = await client.messages.count_tokens(**asked)
    await client.messages.create(**asked, max_tokens=5)
    assert count.input_tokens == len(bench.service.requests[-1].prompt_token_ids)


async def test_errors_have_that_wires_form(make_bench: MakeBench) -> None:
    bench = make_bench("ok", EOS, api_keys=("secret",))
    with pytest.raises(anthropic.AuthenticationError):
        await both(bench)
    client = client_of(bench, api_key="secret")
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(model="other", max_tokens=1, messages=USER)
    body: Any = missing.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await client.messages.create(model="m", max_tokens=0, messages=USER)
    async with bench.http(headers={"x-api-key": "secret"}) as http:
        lost = await http.get("/v1/messages/batches")
    assert lost.status_code == 404 and lost.json()["type"] == "error"


async def test_a_fault_within_the_stream_is_an_error_event(make_bench: MakeBench) -> None:
    bench = make_bench("one two three", EOS, service={"fail_at": 2})
    client = client_of(bench)
    asked = {"model": "m", "max_tokens": 9, "messages": USER, "stream": True}
    events = await client.messages.create(**asked)
    with pytest.raises(anthropic.APIStatusError, match="lost its mind"):
        _ = [event async for event in events]


async def test_a_fault_before_the_stream_is_a_status(make_bench: MakeBench) -> None:
    bench = make_bench("one", EOS)
    asked = {"model": "other", "max_tokens": 9, "messages": USER, "stream": True}
    async with bench.http() as http:
        answer = await http.post("/v1/messages", json=asked)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    assert answer.headers["content-type"] == "application/json"


async def test_head_answers_on_every_page_that_get_does(make_bench: MakeBench) -> None:
    bench = make_bench("ok", EOS)
    async with bench.http() as http:
        for path in ("/", "/health", "/v1/models"):
            got: httpx.Response = await http.get(path)
            head = await http.head(path)
            assert head.status_code == got.status_code == 200
            assert (
                head.content == b"" and head.headers["content-type"] == got.headers["content-type"]
            )
        assert (await http.head("/v1/messages")).status_code == 405


def _use(call_id: str, name: str = "f", **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def _result(call_id: str, *content: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": list(content)}


_TEXT = {"type": "text", "text": "x"}
_LEFT_OUT = {"type": "redacted_thinking", "data": "x"}
_NO_IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "eHh4"},
}


@pytest.mark.parametrize("system", [None, "Be brief.", [_TEXT, _TEXT]])
@pytest.mark.parametrize(
    ("turns", "path"),
    [
        ([[_TEXT], [_use("a")], [_result("b")]], "messages[2].content[0].tool_use_id"),
        ([[_TEXT], [_use("a")], [_TEXT, _result("a"), _result("a")]],
         "messages[2].content[2].tool_use_id"),
        ([[_LEFT_OUT, _TEXT, _NO_IMAGE]], "messages[0].content[2].source"),
        ([[_TEXT], [_LEFT_OUT, _use("a"), _use("b", "c" * 600)], [_result("a"), _result("b")]],
         "messages[1].content[2].name"),
        ([[_TEXT], [_use("a"), _use("b")], [_result("a"), _result("b", _TEXT, _NO_IMAGE)]],
         "messages[2].content[1].content[1].source"),
        ([[_TEXT], [_use("a")], [_TEXT, _result("a"), _NO_IMAGE]],
         "messages[2].content[2].source"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_errors_name_the_block_that_was_sent(
    make_bench: MakeBench, turns: list[Any], path: str, system: Any, route: str
) -> None:
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(turns)
    ]
    body: dict[str, Any] = {"model": "m", "messages": messages, "system": system}
    if route == "/v1/messages":
        body["max_tokens"] = 5
    async with make_bench("x", EOS).http() as client:
        answer = await client.post(route, json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(path + ": ")
    assert "tool_call" not in message and "image_url" not in message


async def test_errors_and_warnings_name_the_tool_and_the_format_that_were_sent(
    make_bench: MakeBench,
) -> None:
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    loose = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    ask = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
    async with make_bench("x", EOS).http() as client:
        tools = [hosted, {"name": "f", "input_schema": loose}]
        held = await client.post("/v1/messages", json={**ask, "tools": tools})
        assert "tools[1].input_schema.properties.a" in held.headers["x-halfbyte-warning"]
        tools = [hosted, {"name": "f" * 600, "input_schema": {}}]
        refused = await client.post("/v1/messages", json={**ask, "tools": tools})
        assert "tools[1].name: " in refused.text
        form = {"format": {"type": "json_schema", "schema": {"type": "banana"}}}
        refused = await client.post("/v1/messages", json={**ask, "output_config": form})
        assert "output_config.format.schema" in refused.text
        assert "response_format" not in refused.text
