"""Requests in the shapes that agents of the command line send, and what they read of answers."""

import json
from typing import Any

import pytest

from server.conftest import Bench, MakeBench

CALLS, ARGS, EOS = 9, 32, 2
PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
ARGUMENTS = '{"path": "a"}'


def claude_code(name: str) -> dict[str, Any]:
    """As claude-code 2.1 asks: blocks with cache marks, adaptive thoughts, edits of the context."""
    kept = {"type": "ephemeral"}
    return {
        "model": "m",
        "stream": True,
        "max_tokens": 32_000,
        "system": [
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Be brief.", "cache_control": kept},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>None.</system-reminder>"},
                    {"type": "text", "text": "Read it.", "cache_control": kept},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "toolu_1", "name": name, "input": {}}],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": "no path",
                        "is_error": True,
                        "cache_control": kept,
                    }
                ],
            },
        ],
        "tools": [{"name": name, "description": "Reads.", "input_schema": PATH}],
        "metadata": {"user_id": "x"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }


@pytest.mark.parametrize("length", [4, 64, 65, 128])
async def test_claude_code_calls_a_tool_whatever_the_length_of_its_name(
    make_bench: MakeBench, length: int
) -> None:
    """Names of MCP tools have up to 128 characters on that wire; the model's format takes 64."""
    name = ("mcp__server__" + "read_" * 30)[:length]
    short = name if length <= 64 else None
    bodies: list[dict[str, Any]] = [claude_code(name)]
    bodies.append({**claude_code(name), "tool_choice": {"type": "tool", "name": name}})
    for body in bodies:
        probe: Bench = make_bench("x", EOS)
        async with probe.http() as http:
            probed = await http.post("/v1/messages", json=body)
        assert probed.status_code == 200, probed.text
        prompt = probe.chat.vocabulary.decode(probe.service.requests[0].prompt_token_ids)
        seen = short or prompt.split('"name": "')[1].split('"')[0]
        assert len(seen) <= 64
        bench: Bench = make_bench(CALLS, seen, ARGS, ARGUMENTS, EOS)
        headers = {"anthropic-beta": "claude-code-20250219", "anthropic-version": "2023-06-01"}
        async with bench.http() as http:
            answer = await http.post("/v1/messages?beta=true", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        lines = answer.text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        starts = [event["content_block"] for event in events if "content_block" in event]
        assert [(block["type"], block.get("name")) for block in starts] == [("tool_use", name)]


async def test_codex_calls_functions_beside_tools_that_are_not_here(make_bench: MakeBench) -> None:
    body: dict[str, Any] = {
        "model": "m",
        "stream": True,
        "instructions": "You are an agent.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Rules."}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "Read it."}],
            },
        ],
        "tools": [
            {"type": "function", "name": "read", "strict": False, "parameters": PATH},
            {
                "type": "namespace",
                "name": "agents",
                "description": "Others.",
                "tools": [{"type": "function", "name": "ask", "parameters": PATH}],
            },
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"session_id": "s"},
    }
    bench: Bench = make_bench(CALLS, "agents__ask", ARGS, ARGUMENTS, EOS)
    async with bench.http() as http:
        answer = await http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    assert "web_search" in answer.headers["x-halfbyte-warning"]
    last = json.loads(answer.text.strip().splitlines()[-1][6:])["response"]
    assert last["status"] == "completed"
    (call,) = last["output"]
    assert (call["namespace"], call["name"], call["arguments"]) == ("agents", "ask", ARGUMENTS)
