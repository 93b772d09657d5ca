"""/v1/chat/completions: jobs to chunks and to the one response, in OpenAI's form."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import halfbyte
from halfbyte.chat.router import CallArguments, CallStart, Content, Reasoning
from halfbyte.server import wire
from halfbyte.server.backend import Backend
from halfbyte.server.call import Call
from halfbyte.server.completion import Job, Message, collect, run, token_text
from halfbyte.server.pieces import Piece, TokenEntry
from halfbyte.server.prepare import chat_job, check_sampling
from halfbyte.server.stream import DONE, frame

FINGERPRINT = f"halfbyte-{halfbyte.__version__}"


async def chat_response(backend: Backend, request: wire.ChatRequest, call: Call) -> dict[str, Any]:
    """The answer in one piece."""
    check_sampling(backend, request)
    with backend.admission.admit(call.key, request.n):
        job = await chat_job(backend, request)
        call.headers |= warning_headers(job)
        messages = await collect(backend, job, call)
    return {
        "id": job.answer_id,
        "object": "chat.completion",
        "created": job.created,
        "model": backend.config.model_names[0],
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {
                "index": index,
                "message": message_body(message),
                "logprobs": (
                    {"content": _entries(backend, tuple(message.entries)), "refusal": None}
                    if request.logprobs
                    else None
                ),
                "finish_reason": message.finish_reason,
            }
            for index, message in enumerate(messages)
        ],
        "usage": job.usage.chat_body(),
    }


def message_body(message: Message) -> dict[str, Any]:
    """An assistant message; fields that have nothing to say are absent or null as OpenAI's are."""
    body: dict[str, Any] = {
        "role": "assistant",
        "content": message.content if message.content or not message.calls else None,
        "refusal": None,
    }
    if message.reasoning:
        # Both names are in use by clients.
        body["reasoning_content"] = body["reasoning"] = message.reasoning
    if message.calls:
        body["tool_calls"] = message.calls
    return body


async def chat_frames(
    backend: Backend, request: wire.ChatRequest, call: Call
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, ending with usage if asked and [DONE]."""
    options = request.stream_options or wire.StreamOptions()
    check_sampling(backend, request)
    with backend.admission.admit(call.key, request.n):
        job = await chat_job(backend, request)
        call.headers |= warning_headers(job)
        head = {
            "id": job.answer_id,
            "object": "chat.completion.chunk",
            "created": job.created,
            "model": backend.config.model_names[0],
            "system_fingerprint": FINGERPRINT,
        }
        if options.include_usage:
            head["usage"] = None
        begun: set[int] = set()
        async with contextlib.aclosing(run(backend, job, call)) as batches:
            async for batch in batches:
                yield b"".join(
                    frame({**head, "choices": [choice], **_running_usage(options, job)})
                    for piece in batch
                    for choice in _choices(backend, request, piece, begun)
                )
        if options.include_usage:
            yield frame({**head, "choices": [], "usage": job.usage.chat_body()})
        yield DONE


def _choices(
    backend: Backend, request: wire.ChatRequest, piece: Piece, begun: set[int]
) -> list[dict[str, Any]]:
    """The chunk of a piece, after the one that opens its choice."""
    chunks = []
    if piece.index not in begun:
        begun.add(piece.index)
        chunks.append(_choice(piece.index, {"role": "assistant", "content": ""}, None, None))
    logprobs = None
    if request.logprobs and piece.entries:
        logprobs = {"content": _entries(backend, piece.entries), "refusal": None}
    chunks.append(_choice(piece.index, _delta(piece), logprobs, piece.finish_reason))
    return chunks


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _delta(piece: Piece) -> dict[str, Any]:
    delta = piece.delta
    if isinstance(delta, Content):
        return {"content": delta.text}
    if isinstance(delta, Reasoning):
        return {"reasoning_content": delta.text, "reasoning": delta.text}
    if isinstance(delta, CallStart):
        function = {"name": delta.name, "arguments": ""}
        call = {"index": delta.index, "id": delta.call_id, "type": "function"}
        return {"tool_calls": [{**call, "function": function}]}
    if isinstance(delta, CallArguments):
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
    return {}


def _running_usage(options: wire.StreamOptions, job: Job) -> dict[str, Any]:
    if not options.continuous_usage_stats:
        return {}
    body = job.usage.chat_body()
    body["completion_tokens"] = sum(choice.num_tokens for choice in job.choices)
    body["total_tokens"] = body["prompt_tokens"] + body["completion_tokens"]
    return {"usage": body}


def _entries(backend: Backend, entries: tuple[TokenEntry, ...]) -> list[dict[str, Any]]:
    vocabulary = backend.chat.vocabulary

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(vocabulary, token_id)
        known = token_id < vocabulary.size and not vocabulary.is_control(token_id)
        raw = vocabulary.token_bytes[token_id] if known else text.encode()
        # JSON has no infinity; OpenAI's own floor stands in.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return [
        {
            **one(entry.logprobs.token_id, entry.logprobs.logprob),
            "top_logprobs": [one(*alternative) for alternative in entry.logprobs.top],
        }
        for entry in entries
    ]


def warning_headers(job: Job) -> dict[str, str]:
    """Keywords of a lenient schema that are not enforced, in a header."""
    if not job.warnings:
        return {}
    return {"x-halfbyte-warning": "; ".join(job.warnings).replace("\n", " ")[:500]}
