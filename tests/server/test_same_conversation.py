"""The APIs for conversations are one request in three forms: the same prompt, the same limits."""

from typing import Any

from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "Does it.", "parameters": SCHEMA}
ARGUMENTS = '{"a": 1}'

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "See.",
            "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": ARGUMENTS}}],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "one"},
        {"role": "user", "content": "And?"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "reasoning_effort": "high",
    "max_tokens": 50,
    "temperature": 0.5,
    "top_p": 0.9,
}
RESPONSES: dict[str, Any] = {
    "instructions": "Be kind.",
    "input": [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "See."}]},
        {"type": "function_call", "call_id": "abcdefghi", "name": "f", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "abcdefghi", "output": "one"},
        {"role": "user", "content": [{"type": "input_text", "text": "And?"}]},
    ],
    "tools": [{"type": "function", **FUNCTION}],
    "reasoning": {"effort": "high"},
    "max_output_tokens": 50,
    "temperature": 0.5,
    "top_p": 0.9,
}
MESSAGES: dict[str, Any] = {
    "system": "Be kind.",
    "messages": [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "See."},
                {"type": "tool_use", "id": "abcdefghi", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "abcdefghi", "content": "one"},
                {"type": "text", "text": "And?"},
            ],
        },
    ],
    "tools": [{"name": "f", "description": "Does it.", "input_schema": SCHEMA}],
    "thinking": {"type": "adaptive"},
    "max_tokens": 50,
    "temperature": 0.5,
    "top_p": 0.9,
}
FORMS = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
}


async def test_prompt_and_parameters_do_not_depend_on_the_api(make_bench: MakeBench) -> None:
    bench: Bench = make_bench(THINK, "x", END_THINK, "Done.", EOS)
    async with bench.http() as http:
        for path, body in FORMS.items():
            for stream in (False, True):
                asked = {"model": "m", "stream": stream, **body}
                answer = await http.post(path, json=asked)
                assert answer.status_code == 200, (path, answer.text)
    requests = bench.service.requests
    assert len(requests) == 2 * len(FORMS)
    assert len({request.prompt_token_ids for request in requests}) == 1
    # Masks are objects of their own; what they hold is compared by what they refuse elsewhere.
    assert len({str(request.params) for request in requests}) == 1
