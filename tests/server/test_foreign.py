"""What clients of other servers send: understood, left out by name, or refused by name."""

import json
from typing import Any

import pytest

from halfbyte.server.api import foreign, wire
from halfbyte.server.api.responses_wire import ResponsesRequest
from halfbyte.server.defaults import SamplingDefaults
from server.conftest import Bench, MakeBench

CALLS, ARGS, EOS = 9, 32, 2
HELLO = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


async def ask(bench: Bench, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    body = {"model": "m", **fields}
    if "chat" in path:
        body.setdefault("messages", HELLO)
    async with bench.http() as http:
        return await http.post(path, json=body)


def open_bench(make_bench: MakeBench, *script: str | int, **config: Any) -> Bench:
    return make_bench(*script, unknown_fields="accept", strict_effort=False, **config)


@pytest.mark.parametrize(
    "fields",
    [
        {"safe_prompt": False},
        {"prompt_mode": None},
        {"skip_special_tokens": True, "add_generation_prompt": True, "best_of": 1},
        {"functions": [], "function_call": "none", "echo": False, "use_beam_search": False},
        {"prediction": {"type": "content", "content": "x"}, "length_penalty": 1.0},
        {"spaces_between_special_tokens": True, "return_token_ids": False, "priority": 0},
        {"chat_template_kwargs": {}, "documents": [], "include_reasoning": True},
        {"stream": True, "stream_options": {"stream_tool_calls": True, "include_usage": True}},
    ],
)
async def test_what_happens_anyway_may_be_asked_for(
    make_bench: MakeBench, fields: dict[str, Any]
) -> None:
    answer = await ask(open_bench(make_bench, "ok", EOS), **fields)
    assert answer.status_code == 200, answer.text
    assert "x-halfbyte-warning" not in answer.headers


@pytest.mark.parametrize(("sent", "meant"), [(0, 0), (7, 7), (1000, 1000), (-3, 0)])
async def test_a_priority_is_a_place_behind_others(
    make_bench: MakeBench, sent: int, meant: int
) -> None:
    bench = open_bench(make_bench, "ok", EOS)
    answer = await ask(bench, priority=sent)
    assert answer.status_code == 200, answer.text
    assert bench.service.requests[0].priority == meant
    assert ("x-halfbyte-warning" in answer.headers) == (sent < 0)
    assert (await ask(bench, priority=1001)).json()["error"]["param"] == "priority"


async def test_names_of_other_servers_mean_ours(make_bench: MakeBench) -> None:
    bench = open_bench(make_bench, CALLS, "f", ARGS, '{"a": 1}', EOS)
    answer = await ask(bench, random_seed=7, tool_choice="any", tools=[tool("f")])
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert bench.service.requests[0].params.seed == 7
    both = await ask(bench, random_seed=7, seed=8)
    assert both.status_code == 400 and both.json()["error"]["param"] == "random_seed"


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA), "guided_decoding_backend": "xgrammar"},
        {"guided_regex": r'\{"a": \d\}'},
        {"structured_outputs": {"choice": ['{"a": 1}', "no"]}},
        {"guided_grammar": 'start: "{" "\\"a\\": 1" "}"'},
        {"structured_outputs": {"json_object": True}},
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_formats_of_vllm_are_held(
    make_bench: MakeBench, fields: dict[str, Any], path: str
) -> None:
    bench = open_bench(make_bench, '{"a": 1}', EOS)
    prompt = {} if "chat" in path else {"prompt": "x", "max_tokens": 20}
    answer = await ask(bench, path, **fields, **prompt)
    assert answer.status_code == 200, answer.text
    assert bench.service.requests[0].rules is not None


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"safe_prompt": True}, "safe_prompt"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"best_of": 4}, "best_of"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "x"}, "chat_template"),
        ({"logits_processors": ["os.system"]}, "logits_processors"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"structured_outputs": 3}, "structured_outputs"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_with_advice(
    make_bench: MakeBench, fields: dict[str, Any], param: str
) -> None:
    bench = open_bench(make_bench, "x", EOS)
    answer = await ask(bench, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert not bench.service.requests


async def test_settings_of_a_chat_template_are_ours_where_we_have_them(
    make_bench: MakeBench,
) -> None:
    bench = open_bench(make_bench, " more", EOS)
    begun = [*HELLO, {"role": "assistant", "content": "Some"}]
    for settings in (
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        answer = await ask(bench, messages=begun, chat_template_kwargs=settings)
        assert answer.status_code == 200, answer.text
        assert "x-halfbyte-warning" not in answer.headers
    own = await ask(bench, messages=begun, continue_final_message=True)
    assert own.status_code == 200
    prompts = {request.prompt_token_ids for request in bench.service.requests}
    assert len(prompts) == 1 and bench.chat.vocabulary.decode(prompts.pop()).endswith("Some")
    other = await ask(bench, chat_template_kwargs={"date": "today", "empty": None})
    assert "chat_template_kwargs.date" in other.headers["x-halfbyte-warning"]
    assert "empty" not in other.headers["x-halfbyte-warning"]


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/chat/completions", {"verbosity": "low"}),
        ("/v1/responses", {"input": "Hi", "text": {"verbosity": "high"}}),
    ],
)
async def test_a_wish_for_brevity_is_named_and_left_out(
    make_bench: MakeBench, path: str, fields: dict[str, Any]
) -> None:
    strict = make_bench("ok", EOS, strict_effort=False)  # what is unknown would be refused
    answer = await ask(strict, path, **fields)
    assert answer.status_code == 200, answer.text
    assert "verbosity" in answer.headers["x-halfbyte-warning"]


@pytest.mark.parametrize("name", ["previous_response_id", "conversation"])
async def test_nothing_is_stored_and_the_refusal_says_so(make_bench: MakeBench, name: str) -> None:
    bench = open_bench(make_bench, "x", EOS)
    answer = await ask(bench, "/v1/responses", input="Hi", **{name: "resp_1"})
    assert answer.status_code == 400 and "send the whole conversation" in answer.text


async def test_unknown_fields_are_left_out_and_named(make_bench: MakeBench) -> None:
    lines: list[str] = []
    bench = open_bench(make_bench, "ok", EOS)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "x": 1}], "timestamp": 3},
    ]
    answer = await ask(
        bench, messages=messages, frobnicate={"a": [1]}, tools=[{**tool("f"), "süß\n": 1}]
    )
    assert answer.status_code == 200, answer.text
    warning = answer.headers["x-halfbyte-warning"]
    for name in ("frobnicate", "messages[0].timestamp", "messages[0].content[0].x", "tools[0].'s"):
        assert name in warning
    assert warning.isascii() and "\n" not in warning
    assert not lines
    strict = make_bench("ok", EOS, unknown_fields="refuse")
    refused = await ask(strict, messages=messages)
    assert refused.status_code == 400 and "unknown field: messages[0]" in refused.text


async def test_a_body_full_of_unknown_fields_is_refused(make_bench: MakeBench) -> None:
    bench = open_bench(make_bench, "ok", EOS)
    fields: dict[str, Any] = {f"field{number}": number for number in range(5000)}
    answer = await ask(bench, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    "asked, taken",
    [
        ("none", "none"),
        ("minimal", "none"),
        ("low", "high"),
        ("medium", "high"),
        ("high", "high"),
        ("xhigh", "high"),
        ("max", "high"),
    ],
)
async def test_efforts_become_the_nearest_one(
    make_bench: MakeBench, asked: str, taken: str
) -> None:
    bench = open_bench(make_bench, "ok", EOS)
    answer = await ask(bench, reasoning_effort=asked)
    assert answer.status_code == 200, answer.text
    prompt = bench.service.requests[0].prompt_token_ids
    same = await ask(bench, reasoning_effort=taken)
    assert same.status_code == 200
    assert bench.service.requests[1].prompt_token_ids == prompt
    assert ("x-halfbyte-warning" in answer.headers) is (asked != taken)
    responses = await ask(bench, "/v1/responses", input="Hi", reasoning={"effort": asked})
    assert responses.status_code == 200
    assert bench.service.requests[2].prompt_token_ids == prompt
    nonsense = await ask(bench, reasoning_effort="very")
    assert nonsense.status_code == 400
    strict = make_bench("ok", EOS, strict_effort=True)
    refused = await ask(strict, reasoning_effort=asked)
    assert refused.status_code == (200 if asked == taken else 400)


async def test_models_without_efforts_ignore_them(make_bench: MakeBench, chatml: Any) -> None:
    bench = open_bench(make_bench, "ok", chat=chatml)
    answer = await ask(bench, reasoning_effort="high")
    assert answer.status_code == 200
    assert "no efforts" in answer.headers["x-halfbyte-warning"]


async def test_switches_of_thinking_are_efforts(make_bench: MakeBench) -> None:
    bench = open_bench(make_bench, "ok", EOS)
    for settings, effort in (
        ({"enable_thinking": True}, "high"),
        ({"thinking": False}, "none"),
        ({"reasoning_effort": "high"}, "high"),
    ):
        await ask(bench, chat_template_kwargs=settings)
        await ask(bench, reasoning_effort=effort)
        first, second = bench.service.requests[-2:]
        assert first.prompt_token_ids == second.prompt_token_ids
    answer = await ask(bench, chat_template_kwargs={"tone": "kind"})
    assert "chat_template_kwargs.tone" in answer.headers["x-halfbyte-warning"]


async def test_the_checkpoints_sampling_fills_what_is_not_said(make_bench: MakeBench) -> None:
    sampling = SamplingDefaults(temperature=0.7, top_p=0.95, top_k=40, min_p=0.1)
    bench = open_bench(make_bench, "ok", EOS, sampling=sampling)
    await ask(bench)
    await ask(bench, "/v1/completions", prompt="x")
    await ask(bench, "/v1/responses", input="x")
    await ask(bench, "/v1/messages", messages=HELLO, max_tokens=3)
    for request in bench.service.requests:
        params = request.params
        assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.95, 40)
        assert params.min_p == 0.1
    await ask(bench, temperature=0, top_p=1, top_k=-1, min_p=0)
    params = bench.service.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


async def test_allowed_tools_are_all_shown_and_only_they_may_be_called(
    make_bench: MakeBench,
) -> None:
    bench = open_bench(make_bench, CALLS, "g", ARGS, '{"a": 1}', EOS)
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "g"}}],
        },
    }
    tools = [tool("f"), tool("g")]
    answer = await ask(bench, tools=tools, tool_choice=allowed)
    call = answer.json()["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "g"
    await ask(bench, tools=tools)
    first, second = bench.service.requests
    assert first.prompt_token_ids == second.prompt_token_ids
    wrong = json.loads(json.dumps(allowed).replace('"g"', '"h"'))
    assert (await ask(bench, tools=tools, tool_choice=wrong)).status_code == 400


async def test_a_format_beside_a_forced_call_is_void(make_bench: MakeBench) -> None:
    bench = open_bench(make_bench, CALLS, "f", ARGS, '{"a": 1}', EOS)
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        answer = await ask(
            bench,
            tools=[tool("f")],
            tool_choice=choice,
            response_format={"type": "regex", "regex": "x"},
        )
        assert answer.json()["choices"][0]["message"]["tool_calls"], answer.text


def test_bodies_that_are_no_objects_and_other_routes_are_left_alone() -> None:
    for kind in (wire.ChatRequest, wire.CompletionRequest, ResponsesRequest):
        assert foreign.translate(kind, [1], print) == [1]
    body = {"random_seed": 3}
    assert foreign.translate(wire.DetokenizeRequest, body, print) is body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_an_interrupted_call_goes_on(make_bench: MakeBench, path: str) -> None:
    bench = open_bench(make_bench, "ok", EOS)
    cut = '{"city": "Ro'
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": cut}}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "messages": [
                *HELLO,
                {"role": "assistant", "tool_calls": [call]},
                {"role": "user", "content": "Stop"},
            ]
        },
        "/v1/responses": {
            "input": [
                *HELLO,
                {"type": "function_call", "call_id": "abcdefghi", "name": "f", "arguments": cut},
                {"role": "user", "content": "Stop"},
            ]
        },
        "/v1/messages": {
            "max_tokens": 5,
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "content": [
                        {
                            "type": "tool_use",
                            "id": "abcdefghi",
                            "name": "f",
                            "input": {"city": "Ro"},
                        }
                    ],
                },
                {"role": "user", "content": "Stop"},
            ],
        },
    }
    answer = await ask(bench, path, **bodies[path])
    assert answer.status_code == 200, answer.text
    place = "input[1]" if path == "/v1/responses" else "messages[1]"
    assert f"interrupted: {place}" in answer.headers["x-halfbyte-warning"]
    prompt = bench.chat.vocabulary.decode(
        bench.service.requests[0].prompt_token_ids, keep_control=True
    )
    assert '[ARGS]{"city": "Ro"}' in prompt and "interrupted" in prompt


@pytest.mark.parametrize("num_tokens", range(3, 9))
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_met_its_limit_anywhere_can_be_sent_back(
    make_bench: MakeBench, num_tokens: int, stream: bool
) -> None:
    bench = open_bench(make_bench, CALLS, "f", ARGS, '{"a": 1}', EOS)
    options: dict[str, Any] = {"messages": HELLO, "tools": [tool("f")], "stream": stream}
    options["max_tokens"] = num_tokens
    client: Any = bench.openai()
    if stream:
        arguments = ""
        async for chunk in await client.chat.completions.create(model="m", **options):
            for call in chunk.choices[0].delta.tool_calls or ():
                arguments += call.function.arguments or ""
    else:
        answer = await client.chat.completions.create(model="m", **options)
        assert answer.choices[0].finish_reason == "length"
        arguments = answer.choices[0].message.tool_calls[0].function.arguments
    function = {"name": "f", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    item = {"type": "function_call", "call_id": "abcdefghi", "name": "f", "arguments": arguments}
    user = {"role": "user", "content": "Go on"}
    message = {"role": "assistant", "tool_calls": [call]}
    chat = await ask(bench, "/v1/chat/completions", messages=[*HELLO, message, user])
    told = await ask(bench, "/v1/responses", input=[*HELLO, item, user])
    assert (chat.status_code, told.status_code) == (200, 200), chat.text + told.text


@pytest.mark.parametrize("arguments", ["{", " { ", '{"a" 1', "[", '{"a": NaN}', "x"])
async def test_arguments_that_no_answer_ends_in_are_named(
    make_bench: MakeBench, arguments: str
) -> None:
    bench = open_bench(make_bench, "ok", EOS)
    item = {"type": "function_call", "call_id": "a", "name": "f", "arguments": arguments}
    output = {"type": "function_call_output", "call_id": "a", "output": "y"}
    told = await ask(bench, "/v1/responses", instructions="I", input=[*HELLO, item, output])
    assert told.status_code == 400
    assert "input[1].arguments" in told.text and "messages[" not in told.text
