import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from halfbyte.pictures import Picture
from halfbyte.server.api.responses_wire import joined_name
from halfbyte.server.api.tool_names import model_name
from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}


async def both(bench: Bench, **request: Any) -> Any:
    """Streamed and not; the events must build the response that the last one carries."""
    client: Any = bench.openai()
    whole = await client.responses.create(model="m", **request)
    stream = await client.responses.create(model="m", stream=True, **request)
    items: dict[int, dict[str, Any]] = {}
    texts: dict[int, str] = {}
    numbers = []
    kinds = []
    last: Any = None
    async for event in stream:
        numbers.append(event.sequence_number)
        kinds.append(event.type)
        if event.type == "response.output_item.added":
            assert event.output_index == len(items)
            items[event.output_index], texts[event.output_index] = event.item.model_dump(), ""
        elif event.type.endswith(".delta"):
            assert event.item_id == items[event.output_index]["id"]
            texts[event.output_index] += event.delta
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert event.text == texts[event.output_index]
            assert event.content_index == 0, "the one part that each item has"
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == texts[event.output_index]
        elif event.type == "response.output_item.done":
            items[event.output_index] = event.item.model_dump()
        last = event
    assert numbers == list(range(len(numbers)))
    assert kinds[:2] == ["response.created", "response.in_progress"]
    final = last.response
    assert last.type == f"response.{final.status}"
    assert [item.model_dump() for item in final.output] == list(items.values())
    assert final.usage == whole.usage

    def plain(response: Any) -> list[dict[str, Any]]:
        return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]

    assert plain(final) == plain(whole) and final.status == whole.status
    return whole


async def test_text_and_thought(make_bench: MakeBench) -> None:
    bench = make_bench(THINK, "hm", END_THINK, "Hello é", EOS)
    answer = await both(bench, input="Hi", instructions="Be kind.", reasoning={"effort": "high"})
    assert answer.output_text == "Hello é" and answer.status == "completed"
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == "hm"
    assert answer.usage.output_tokens_details.reasoning_tokens == len(bench.ids("hm")) + 2
    prompt = bench.chat.vocabulary.decode(
        bench.service.requests[0].prompt_token_ids, keep_control=True
    )
    assert prompt.startswith("<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT]")
    assert '"high"' in prompt


async def test_calls_and_their_results(make_bench: MakeBench) -> None:
    bench = make_bench("See.", CALLS, "f", ARGS, '{"a": 1}', CALLS, "f", ARGS, "{}", EOS)
    answer = await both(bench, input="Hi", tools=[TOOL])
    assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
    assert answer.output[1].arguments == '{"a": 1}'
    history = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        *[item.model_dump() for item in answer.output],
        *[
            {"type": "function_call_output", "call_id": item.call_id, "output": str(number)}
            for number, item in enumerate(answer.output[1:])
        ],
    ]
    client: Any = bench.openai()
    await client.responses.create(model="m", input=history, tools=[TOOL])
    prompt = bench.chat.vocabulary.decode(
        bench.service.requests[-1].prompt_token_ids, keep_control=True
    )
    assert prompt.endswith(
        '[INST]Hi[/INST][THINK]hm[/THINK]See.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{}</s>'
        "[TOOL_RESULTS]0[/TOOL_RESULTS][TOOL_RESULTS]1[/TOOL_RESULTS]"
    )


async def test_cut_is_incomplete(make_bench: MakeBench) -> None:
    answer = await both(make_bench("Hello you", EOS), input="Hi", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


async def test_schema_holds_the_answer(make_bench: MakeBench) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    bench = make_bench('{"a": 1}', EOS)
    answer = await both(bench, input="Hi", text={"format": form})
    assert json.loads(answer.output_text) == {"a": 1}
    assert bench.service.requests[0].rules is not None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "always"}, "truncation"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"reasoning": {"effort": "medium"}}, "reasoning.effort"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input[0]"),
    ],
)
async def test_bad_requests(make_bench: MakeBench, change: dict[str, Any], param: str) -> None:
    bench = make_bench("x", EOS)
    async with bench.http() as client:
        for stream in (False, True):
            body = {"model": "m", "input": "Hi", "stream": stream, **change}
            answer = await client.post("/v1/responses", json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param


async def test_failure_after_the_start_is_an_event(make_bench: MakeBench) -> None:
    bench = make_bench("Hello", EOS, service={"fail_at": 1})
    client: Any = bench.openai()
    stream = await client.responses.create(model="m", input="Hi", stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert "lost its mind" in events[-1].response.error.message


async def test_tools_that_only_their_servers_have_are_left_out_and_named(
    make_bench: MakeBench,
) -> None:
    bench = make_bench("ok", EOS)
    tools = [TOOL, {"type": "web_search", "filters": {}}, {"type": "custom", "name": "apply_patch"}]
    history = [
        {"role": "user", "content": "Hi"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"q": "x"}},
    ]
    body = {"model": "m", "input": history, "tools": tools, "client_metadata": {"a": "b"}}
    async with bench.http() as client:
        answer = await client.post("/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        warning = answer.headers["x-halfbyte-warning"]
        assert "custom, web_search" in warning and "web_search_call" in warning
        only = {"model": "m", "input": "Hi", "tools": tools[:1]}
        await client.post("/v1/responses", json=only)
        chosen = {**body, "tool_choice": {"type": "web_search"}}
        refused = await client.post("/v1/responses", json=chosen)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"
    first, second = bench.service.requests
    assert first.prompt_token_ids == second.prompt_token_ids


@pytest.mark.parametrize("namespace", ["mcp__files__", "files", "n" * 100, "files.example"])
async def test_functions_in_namespaces_are_called_and_answered_by_both_names(
    make_bench: MakeBench, namespace: str
) -> None:
    joined = model_name(joined_name(namespace, "read"))
    bench = make_bench(CALLS, joined, ARGS, '{"a": 1}', EOS)
    inner = [{**TOOL, "name": "read"}, {"type": "web_search"}]
    tools = [TOOL, {"type": "namespace", "name": namespace, "description": "", "tools": inner}]
    answer = await both(bench, input="Hi", tools=tools)
    call = answer.output[0]
    assert call.name == "read" and call.namespace == namespace
    history = [
        {"role": "user", "content": "Hi"},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    chosen = {"type": "function", "name": "read", "namespace": namespace}
    await both(bench, input=history, tools=tools, tool_choice=chosen)
    prompt = bench.chat.vocabulary.decode(
        bench.service.requests[-1].prompt_token_ids, keep_control=True
    )
    assert f"[TOOL_CALLS]{joined}[ARGS]" in prompt


async def test_allowed_tools_of_this_wire(make_bench: MakeBench) -> None:
    bench = make_bench(CALLS, "f", ARGS, "{}", EOS)
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "f"}],
    }
    answer = await both(bench, input="Hi", tools=[TOOL, {**TOOL, "name": "g"}], tool_choice=choice)
    assert answer.output[0].name == "f"


BROKEN = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "[1]"}
DONE_CALL = {**BROKEN, "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "y"}
USER = {"role": "user", "content": "hi"}
TEXT = {"type": "input_text", "text": "x"}
NO_IMAGE = {"type": "input_image", "image_url": "data:,x"}


@pytest.mark.parametrize("instructions", [None, "Be brief."])
@pytest.mark.parametrize(
    ("items", "path"),
    [
        ([USER, BROKEN, OUTPUT], "input[1].arguments"),
        ([USER, {"role": "assistant", "content": "x"}, BROKEN, OUTPUT], "input[2].arguments"),
        ([USER, DONE_CALL, {**BROKEN, "call_id": "b"}, OUTPUT], "input[2].arguments"),
        ([USER, {"type": "reasoning", "summary": []}, BROKEN, OUTPUT], "input[2].arguments"),
        (
            [USER, {"role": "user", "content": [NO_IMAGE]}],
            "input[1].content[0].image_url",
        ),
        (
            [
                USER,
                DONE_CALL,
                {**OUTPUT, "output": [{"type": "input_text", "text": "x"}, NO_IMAGE]},
            ],
            "input[2].output[1].image_url",
        ),
        ([USER, {"role": "assistant", "content": "x"}], "input[1]"),
    ],
)
async def test_errors_name_the_item_that_was_sent(
    make_bench: MakeBench, instructions: str | None, items: list[Any], path: str
) -> None:
    bench = make_bench("x", EOS)
    body = {"model": "m", "input": items}
    if instructions is not None:
        body["instructions"] = instructions
    async with bench.http() as client:
        answer = await client.post("/v1/responses", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == path and "messages" not in error["message"]


async def test_tools_may_answer_with_images(make_bench: MakeBench) -> None:
    """As Responses outputs and as parts of a chat tool message: the same prompt."""
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    bench = make_bench("x", EOS)
    output = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": url}]
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    async with bench.http() as client:
        body = {"model": "m", "input": [USER, DONE_CALL, {**OUTPUT, "output": output}]}
        assert (await client.post("/v1/responses", json=body)).status_code == 200
        messages = [
            USER,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": parts},
        ]
        body = {"model": "m", "messages": messages}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    one, two = bench.service.requests
    assert one.prompt_token_ids == two.prompt_token_ids
    assert len(one.images) == len(two.images) == 1


async def test_images_beyond_the_context_are_never_decoded(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Picture, "decode", fail)
    buffer = io.BytesIO()
    Image.new("1", (1540, 1540)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    bench = make_bench("x", EOS)
    async with bench.http() as client:
        for route in ("/v1/chat/completions", "/tokenize"):
            body = {"model": "m", "messages": [{"role": "user", "content": [part] * 32}]}
            answer = await client.post(route, json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{**USER, "role": "system"}]}, "input"),
        ({"input": [USER, DONE_CALL, {**OUTPUT, "call_id": "b"}]}, "input[2].call_id"),
        ({"input": [{"type": "no_such_item"}]}, "input[0]"),
        (
            {
                "input": "x",
                "tools": [
                    {"type": "web_search"},
                    {
                        "type": "namespace",
                        "name": "n",
                        "tools": [
                            {"type": "custom", "name": "c"},
                            {**TOOL, "parameters": {"type": "string"}},
                        ],
                    },
                ],
            },
            "tools[1].tools[1].parameters",
        ),
        (
            {
                "input": "x",
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "n",
                        "schema": {"type": "banana"},
                        "strict": True,
                    }
                },
            },
            "text.format",
        ),
        ({"input": "x" * 100, "max_output_tokens": 10**6}, "max_output_tokens"),
    ],
)
async def test_errors_are_in_the_words_of_this_route(
    make_bench: MakeBench, body: dict[str, Any], path: str
) -> None:
    async with make_bench("x", EOS).http() as client:
        answer = await client.post("/v1/responses", json={"model": "m", **body})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert path in message or answer.json()["error"]["param"] == path
    for foreign in ("messages", "tool_call_id", "function.", "response_format", "_item_form"):
        assert foreign not in message


SAID = {"role": "assistant", "content": "said"}
THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}


@pytest.mark.parametrize("between", [[THOUGHT], [SAID], [SAID, THOUGHT], [THOUGHT, THOUGHT, SAID]])
async def test_what_stands_between_a_call_and_its_output_is_of_the_same_turn(
    make_bench: MakeBench, between: list[dict[str, Any]]
) -> None:
    second = {**DONE_CALL, "call_id": "b"}
    outputs = [OUTPUT, {**OUTPUT, "call_id": "b"}]
    bench = make_bench("x", EOS)
    async with bench.http() as client:
        body = {"model": "m", "input": [USER, DONE_CALL, *between, second, *outputs, USER]}
        assert (await client.post("/v1/responses", json=body)).status_code == 200
        body["input"] = [USER, *between, DONE_CALL, second, *outputs, USER]
        if THOUGHT not in between[1:]:
            assert (await client.post("/v1/responses", json=body)).status_code == 200
    assert len({request.prompt_token_ids for request in bench.service.requests}) == 1
