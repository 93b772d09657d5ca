"""Requests in the shapes that libraries and harnesses send, written by us after recorded ones.

Each is asked as it comes over the wire, by whom, and what its sender reads of the answer is looked
at. The clients themselves run in `make clients`.
"""

import json
from typing import Any

import pytest

from server.conftest import Bench, MakeBench

THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
ARGUMENTS = '{"path": "a"}'
READ = {"type": "function", "function": {"name": "read_file", "parameters": PATH}}
HISTORY = [
    {"role": "system", "content": "Act."},
    {"role": "user", "content": "Read it."},
]
CALL = {"name": "read_file", "arguments": ARGUMENTS}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "read_file", "content": "{}"}
HTTPX = {"user-agent": "python-httpx/0.28.1", "x-affinity": "7bde36ca"}

# mistral-vibe 3.0: its default backend goes through Mistral's client, the others through httpx.
VIBE_MISTRAL = {
    "messages": [
        *HISTORY,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": CALL, "id": "abcdefghi", "type": "function", "index": 0}],
            "prefix": False,
        },
        RESULT,
    ],
    "temperature": 0.2,
    "stream": True,
    "metadata": {"agent_entrypoint": "programmatic", "call_type": "main_call"},
    "tools": [READ],
    "parallel_tool_calls": True,
    "reasoning_effort": "high",
}
VIBE_GENERIC = {
    "messages": [
        *HISTORY,
        {
            "role": "assistant",
            "reasoning_content": "I read it.",
            "tool_calls": [{"id": "abcdefghi", "index": 0, "function": CALL, "type": "function"}],
        },
        RESULT,
    ],
    "temperature": 0.2,
    "reasoning_effort": "low",
    "tools": [READ],
    "stream": True,
    "stream_options": {"include_usage": True},
}
VIBE_REASONING = {
    **VIBE_GENERIC,
    "messages": [
        *HISTORY,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "I read it."}]},
                {"type": "text", "text": ""},
            ],
            "tool_calls": [{"id": "abcdefghi", "index": 0, "function": CALL, "type": "function"}],
        },
        RESULT,
    ],
    "stream_options": {"include_usage": True, "stream_tool_calls": True},
}
VIBE_NAMED = {**VIBE_GENERIC, "stream_options": VIBE_REASONING["stream_options"]}
KEPT = {"type": "ephemeral"}
VIBE_ANTHROPIC = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Read it."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I read it.", "signature": ""},
                {"type": "tool_use", "id": "abcdefghi", "name": "read_file", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "abcdefghi",
                    "content": "{}",
                    "cache_control": KEPT,
                }
            ],
        },
    ],
    "thinking": {"type": "adaptive", "display": "summarized"},
    "output_config": {"effort": "high"},
    "max_tokens": 32_768,
    "system": [{"type": "text", "text": "Act.", "cache_control": KEPT}],
    "tools": [{"name": "read_file", "description": "", "input_schema": PATH}],
    "stream": True,
}
ANTHROPIC_HEADERS = {
    **HTTPX,
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "interleaved-thinking-2025-05-14,prompt-caching-2024-07-31",
    "x-api-key": "none",
}


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/v1/chat/completions", {"user-agent": "mistral-client-python/2.6.0"}, VIBE_MISTRAL),
        ("/v1/chat/completions", HTTPX, VIBE_GENERIC),
        ("/v1/chat/completions", HTTPX, VIBE_REASONING),
        ("/v1/chat/completions", HTTPX, VIBE_NAMED),
        ("/v1/messages", ANTHROPIC_HEADERS, VIBE_ANTHROPIC),
    ],
    ids=["mistral", "generic", "reasoning", "a provider named mistral", "anthropic"],
)
async def test_vibe_reads_thought_and_call_in_each_of_its_styles(
    make_bench: MakeBench, path: str, headers: dict[str, str], body: dict[str, Any]
) -> None:
    bench: Bench = make_bench(
        THINK, "Once more.", END_THINK, CALLS, "read_file", ARGS, ARGUMENTS, EOS,
        unknown_fields="refuse", strict_effort=False,
    )  # fmt: skip
    async with bench.http(headers=headers) as http:
        answer = await http.post(path, json={"model": "m", **body})
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line) for line in lines]
    thought, arguments, names = "", "", []
    # One of vibe's styles reads the parts and nothing else, another the field and nothing else.
    reads_parts = body in (VIBE_MISTRAL, VIBE_REASONING)
    for event in events:
        if path == "/v1/messages":
            delta = event.get("delta", {})
            thought += delta.get("thinking", "")
            arguments += delta.get("partial_json", "")
            block = event.get("content_block", {})
            names += [block["name"]] if block.get("type") == "tool_use" else []
            continue
        for choice in event["choices"]:
            delta = choice["delta"]
            parts = delta.get("content") or []
            if reads_parts and isinstance(parts, list):
                thought += "".join(part["thinking"][0]["text"] for part in parts)
            elif not reads_parts:
                thought += delta.get("reasoning_content") or ""
                # What it makes of parts: their text.
                assert "".join(part["text"] for part in parts) == ""
            for call in delta.get("tool_calls", ()):
                arguments += call["function"]["arguments"]
                names += [call["function"]["name"]] if "name" in call["function"] else []
    assert (thought, names, arguments) == ("Once more.", ["read_file"], ARGUMENTS)
    prompt = bench.chat.vocabulary.decode(
        bench.service.requests[0].prompt_token_ids, keep_control=True
    )
    assert "[TOOL_CALLS]read_file[ARGS]" in prompt and "[TOOL_RESULTS]{}" in prompt
    if body is not VIBE_MISTRAL:
        assert "[THINK]I read it.[/THINK]" in prompt


async def test_guidellm_counts_tokens_in_each_chunk(make_bench: MakeBench) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    part = [{"type": "text", "text": "Count."}]
    bench: Bench = make_bench("One", " two", EOS, unknown_fields="refuse")
    async with bench.http(headers=HTTPX) as http:
        for path, asked in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": part}]}),
            ("/v1/completions", {"prompt": "Count."}),
        ):
            body = {"model": "m", "stream": True, "stream_options": options, **asked}
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            counts = [json.loads(line)["usage"]["completion_tokens"] for line in lines]
            assert counts == sorted(counts) and counts[0] < counts[-1]
            assert counts[-1] == len(bench.ids("One", " two")) + 1


async def test_lm_eval_scores_batches_of_ids_and_generates_until_a_line_ends(
    make_bench: MakeBench,
) -> None:
    """Its slice of log-probs runs from the context's length to the last entry but one."""
    bench: Bench = make_bench(EOS, unknown_fields="refuse")
    context, continuation = bench.ids("Q: sky?\nA:"), bench.ids(" blue.")
    prompts = [[*context, *continuation], [*context, *continuation[:1]]]
    scoring = {
        "model": "m", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    generating = {
        "model": "m", "prompt": ["Q: sky?\nA:"], "max_tokens": 12, "temperature": 0,
        "stop": ["\n"], "seed": 1234,
    }  # fmt: skip
    async with bench.http() as http:
        info = (await http.get("/tokenizer_info")).json()
        assert info["eos_token"] and info["bos_token"]
        text = {"prompt": "Q: sky?\nA: blue.", "add_special_tokens": False, "model": "m"}
        assert (await http.post("/tokenize", json=text)).json()["tokens"] == prompts[0]
        answer = (await http.post("/v1/completions", json=scoring)).json()
        for prompt, choice in zip(prompts, answer["choices"], strict=True):
            scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
            assert scores == [-token_id / 1000 for token_id in prompt[len(context) :]]
        made = await http.post("/v1/completions", json=generating)
        assert made.status_code == 200 and "text" in made.json()["choices"][0]


@pytest.mark.parametrize("agent", ["lm15/stdlib", "OpenAI/Python 2.20.0"])
async def test_dspy_and_aider_ask_with_few_fields(make_bench: MakeBench, agent: str) -> None:
    bench: Bench = make_bench(CALLS, "read_file", ARGS, ARGUMENTS, EOS, unknown_fields="refuse")
    body = {"model": "m", "messages": HISTORY, "temperature": 0, "tools": [READ]}
    async with bench.http(headers={"user-agent": agent}) as http:
        answer = await http.post("/v1/chat/completions", json=body)
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "read_file", "arguments": ARGUMENTS}


async def test_llama_index_asks_for_a_stream_with_tools(make_bench: MakeBench) -> None:
    bench: Bench = make_bench(CALLS, "read_file", ARGS, ARGUMENTS, EOS, unknown_fields="refuse")
    tool = {"type": "function", "function": {**READ["function"], "strict": False}}  # type: ignore[dict-item]
    body = {
        "model": "m", "messages": HISTORY, "parallel_tool_calls": True, "stream": True,
        "temperature": 0.1, "tool_choice": "auto", "tools": [tool],
    }  # fmt: skip
    async with bench.http(headers={"user-agent": "AsyncOpenAI/Python 2.54.0"}) as http:
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    last = json.loads(lines[-1])["choices"][0]
    assert last["finish_reason"] == "tool_calls"
