"""/v1/messages: the pieces of an answer as content blocks, in one message or as its events.

A block has a content_block_start, its deltas and a content_block_stop. Around all blocks stand
message_start, message_delta (why it ended, what it cost) and message_stop. A message that is not
streamed is what its events build.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from halfbyte.chat.router import CallArguments, CallStart, Content, Delta, Reasoning
from halfbyte.errors import RequestError
from halfbyte.server.api import tool_names, wire
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.completion import Job
from halfbyte.server.api.messages_wire import CountRequest, MessagesRequest, paths_of
from halfbyte.server.api.paths import Paths
from halfbyte.server.api.pieces import Piece
from halfbyte.server.api.prepare import chat_job, check_sampling
from halfbyte.server.api.problems import messages_error_body, status_and_body
from halfbyte.server.api.prompts import beside, chat_prompt
from halfbyte.server.api.running import run
from halfbyte.server.api.stream import frame
from halfbyte.server.call import Call

Event = dict[str, Any]


async def messages_response(
    backend: Backend, request: MessagesRequest, call: Call
) -> dict[str, Any]:
    """Answer a request to /v1/messages with one whole message."""
    message: dict[str, Any] = {}
    inputs: dict[int, str] = {}
    async with contextlib.aclosing(_events(backend, request, call)) as events:
        async for event in events:
            _build(message, inputs, event)
    for index, text in inputs.items():
        message["content"][index]["input"] = _read_input(text)
    return message


def _build(message: dict[str, Any], inputs: dict[int, str], event: Event) -> None:
    """Apply one event to the message, as a client does."""
    kind = event["type"]
    if kind == "message_start":
        message |= event["message"]
    elif kind == "content_block_start":
        message["content"].append(dict(event["content_block"]))
        if event["content_block"]["type"] == "tool_use":
            inputs[event["index"]] = ""
    elif kind == "content_block_delta":
        delta = event["delta"]
        if delta["type"] == "input_json_delta":
            inputs[event["index"]] += delta["partial_json"]
        else:
            name = delta["type"].removesuffix("_delta")
            message["content"][event["index"]][name] += delta[name]
    elif kind == "message_delta":
        message |= event["delta"]
        message["usage"] = event["usage"]


def _read_input(text: str) -> Any:
    """Arguments of a call. One that was cut off is no JSON: an empty object, as clients do."""
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return {}


async def messages_frames(
    backend: Backend, request: MessagesRequest, call: Call
) -> AsyncGenerator[bytes, None]:
    """The message as server-sent events; what fails after the start becomes an error event."""
    has_started = False
    async with contextlib.aclosing(_events(backend, request, call)) as events:
        try:
            async for event in events:
                has_started = True
                yield frame(event, event["type"])
        except Exception as error:
            if not has_started:
                raise
            yield frame(messages_error_body(*status_and_body(error)), "error")


async def count_tokens(backend: Backend, request: CountRequest) -> dict[str, Any]:
    """Number of tokens that the prompt of a request would have."""
    chat, _ = await _renamed(backend, request)
    backend.preparer.check_model(chat.model)
    try:
        prompt, _ = await chat_prompt(backend.preparer, tool_names.for_model(chat))
    except RequestError as error:
        raise (await _paths(backend, request)).error(error) from error
    return {"input_tokens": len(prompt.token_ids)}


async def _renamed(
    backend: Backend, request: CountRequest
) -> tuple[wire.ChatRequest, tuple[str, ...]]:
    efforts = backend.chat.reasoning_efforts
    return await beside(backend.preparer, request.messages, lambda: request.chat_request(efforts))


async def _paths(backend: Backend, request: CountRequest) -> Paths:
    return await beside(backend.preparer, request.messages, lambda: paths_of(request))


async def _events(
    backend: Backend, request: MessagesRequest, call: Call
) -> AsyncGenerator[Event, None]:
    chat, warnings = await _renamed(backend, request)
    try:
        check_sampling(backend.preparer, chat)
        with backend.admission.admit(call.key, 1):
            # Clients always send the most that they would take; the context may leave less.
            job = await chat_job(backend, chat, clamp_max_tokens=True)
            if job.warnings:
                warnings = (*warnings, *map((await _paths(backend, request)).text, job.warnings))
            job.warnings = warnings
            call.warn(job.warnings)
            async for event in _job_events(backend, request, job, call):
                yield event
    except RequestError as error:
        raise (await _paths(backend, request)).error(error) from error


async def _job_events(
    backend: Backend, request: MessagesRequest, job: Job, call: Call
) -> AsyncGenerator[Event, None]:
    yield {
        "type": "message_start",
        "message": {
            "id": "msg_" + job.answer_id.partition("-")[2],
            "type": "message",
            "role": "assistant",
            "model": backend.config.model_names[0],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(job),
        },
    }
    blocks = _Blocks(shows_thoughts=request.may_think)
    reason = "stop"
    async with contextlib.aclosing(run(backend, job, call)) as batches:
        async for batch in batches:
            for piece in batch:
                reason = piece.finish_reason or reason
                for event in blocks.feed(piece):
                    yield event
    for event in blocks.finish():
        yield event
    choice = job.choices[0]
    stopped_by = choice.router.stopped_by
    if stopped_by is not None:
        why = "stop_sequence"
    elif reason == "length":
        given = choice.request.params.max_tokens
        is_context = given is not None and given < request.max_tokens
        why = "model_context_window_exceeded" if is_context else "max_tokens"
    else:
        why = "tool_use" if reason == "tool_calls" else "end_turn"
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": why, "stop_sequence": stopped_by},
        "usage": _usage(job),
    }
    yield {"type": "message_stop"}


@dataclass(slots=True)
class _Blocks:
    """Content blocks so far. A delta goes to the open block of its kind, or opens the next."""

    shows_thoughts: bool
    _num_blocks: int = 0
    _open: str | None = None
    _call: CallStart | None = field(default=None)

    def feed(self, piece: Piece) -> Iterator[Event]:
        """Turn one piece into events of Anthropic's stream."""
        delta = piece.delta
        if delta is None or (isinstance(delta, Reasoning) and not self.shows_thoughts):
            return
        kind = _kind(delta)
        if kind != self._open or isinstance(delta, CallStart):
            yield from self.finish()
            self._open = kind
            yield {
                "type": "content_block_start",
                "index": self._num_blocks,
                "content_block": _empty_block(delta),
            }
        if isinstance(delta, CallStart) or not delta.text:
            return
        yield {
            "type": "content_block_delta",
            "index": self._num_blocks,
            "delta": _block_delta(delta),
        }

    def finish(self) -> Iterator[Event]:
        """Close the open block. A thought gets an empty signature: nothing here checks one."""
        if self._open is None:
            return
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": ""}
            yield {"type": "content_block_delta", "index": self._num_blocks, "delta": delta}
        yield {"type": "content_block_stop", "index": self._num_blocks}
        self._open = None
        self._num_blocks += 1


def _kind(delta: Delta) -> str:
    if isinstance(delta, Content):
        return "text"
    return "thinking" if isinstance(delta, Reasoning) else "tool_use"


def _empty_block(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, CallStart):
        return {"type": "tool_use", "id": delta.call_id, "name": delta.name, "input": {}}
    if isinstance(delta, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _block_delta(delta: Content | Reasoning | CallArguments) -> dict[str, Any]:
    if isinstance(delta, CallArguments):
        return {"type": "input_json_delta", "partial_json": delta.text}
    if isinstance(delta, Reasoning):
        return {"type": "thinking_delta", "thinking": delta.text}
    return {"type": "text_delta", "text": delta.text}


def _usage(job: Job) -> dict[str, Any]:
    """Tokens so far. That wire counts what was found in the cache apart from the rest."""
    usage = job.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
