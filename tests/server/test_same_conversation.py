"""The APIs are one request in several forms: the same prompt, limits, tokens, streamed or whole."""

import asyncio
from typing import Any

import hypothesis
from hypothesis import strategies as st

from server.conftest import Bench, MakeBench
from server.conversations import CONVERSATIONS, Answer, asked, read_stream, read_whole
from server.test_properties import SETTINGS

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


WORDS = st.text("ab é{}[]\n😀", min_size=1, max_size=12)
# A text in which nothing is held back at its end.
ANSWERS = st.builds(
    Answer,
    thought=st.none() | WORDS,
    text=st.none() | WORDS,
    calls=st.lists(st.tuples(st.sampled_from(["f", "g.h"]), st.just('{"a": 1}')), max_size=2).map(
        tuple
    ),
).filter(lambda answer: answer.text or answer.calls)


@hypothesis.settings(SETTINGS, max_examples=8)
@hypothesis.given(
    conversation=CONVERSATIONS, answer=ANSWERS, per_event=st.integers(1, 9), seed=st.integers(0, 9)
)
def test_any_conversation_has_the_same_tokens_in_each_api(
    make_bench: MakeBench, conversation: Any, answer: Answer, per_event: int, seed: int
) -> None:
    bench: Bench = make_bench(service={"tokens_per_event": per_event})
    ids = bench.ids(*answer.tokens(THINK, END_THINK, CALLS, ARGS), EOS)
    bench.service.script = lambda request: ids

    async def ask() -> None:
        async with bench.http() as http:
            for path, body in asked(conversation).items():
                body = {"model": "m", "temperature": 0.5, "top_p": 0.9, **body}
                whole = await http.post(path, json=body)
                assert whole.status_code == 200, (path, whole.text)
                assert read_whole(path, whole.json()) == answer, path
                streamed = await http.post(path, json={**body, "stream": True})
                assert read_stream(path, streamed.text) == answer, path
            requests = bench.service.requests
            assert len({request.prompt_token_ids for request in requests}) == 1
            pictures = {tuple(image.digest for image in one.images) for one in requests}
            assert len(pictures) == 1
            assert len(next(iter(pictures))) == conversation.num_images
            assert len({str(request.params) for request in requests}) == 1
            if conversation.num_images or answer.thought or answer.calls:
                return
            # A plain continuation of the same tokens; it has no names for thoughts and calls.
            path = "/v1/completions"
            prompt = list(requests[0].prompt_token_ids)
            body = {"model": "m", "prompt": prompt, "max_tokens": 100, "temperature": 0.5}
            whole = await http.post(path, json=body)
            assert whole.json()["choices"][0]["text"] == answer.text
            assert whole.json()["usage"]["completion_tokens"] == len(ids)
            streamed = await http.post(path, json={**body, "stream": True})
            assert read_stream(path, streamed.text) == answer
            assert bench.service.requests[-1].prompt_token_ids == tuple(prompt)

    asyncio.run(ask())
