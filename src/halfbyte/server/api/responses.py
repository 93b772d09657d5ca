"""/v1/responses: the pieces of an answer as output items, and as the events that build them."""

import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.chat.router import CallArguments, CallStart, Content, Delta, Reasoning
from halfbyte.errors import RequestError
from halfbyte.server.api import wire
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.completion import Job
from halfbyte.server.api.paths import Paths
from halfbyte.server.api.pieces import Piece
from halfbyte.server.api.prepare import chat_job, check_sampling
from halfbyte.server.api.problems import status_and_body
from halfbyte.server.api.prompts import beside
from halfbyte.server.api.reading import Wire
from halfbyte.server.api.responses_wire import ResponsesRequest, paths_of
from halfbyte.server.api.running import run
from halfbyte.server.api.stream import frame
from halfbyte.server.call import Call

Event = dict[str, Any]


async def responses_response(
    backend: Backend, request: ResponsesRequest, call: Call
) -> dict[str, Any]:
    """Answer a request to /v1/responses with one whole response."""
    async with contextlib.aclosing(_events(backend, request, call)) as events:
        last: Event = {}
        async for event in events:
            last = event
    body: dict[str, Any] = last["response"]
    return body


async def responses_frames(
    backend: Backend, request: ResponsesRequest, call: Call
) -> AsyncGenerator[bytes, None]:
    """The response as server-sent events; what fails after the start becomes response.failed."""
    number = 0
    body: dict[str, Any] = {}
    async with contextlib.aclosing(_events(backend, request, call)) as events:
        try:
            async for event in events:
                body = event.get("response", body)
                yield _frame(event, number)
                number += 1
        except Exception as error:
            if not number:
                raise
            _, problem = status_and_body(error)
            fault = {"code": "server_error", "message": problem["error"]["message"]}
            failed = {**body, "status": "failed", "error": fault}
            yield _frame({"type": "response.failed", "response": failed}, number)


def _frame(event: Event, number: int) -> bytes:
    return frame({**event, "sequence_number": number}, event["type"])


async def _events(
    backend: Backend, request: ResponsesRequest, call: Call
) -> AsyncGenerator[Event, None]:
    """All events, from response.created to the one that carries the finished response."""
    chat = await beside(backend.preparer, _items(request), lambda: _renamed(request))
    check_sampling(backend.preparer, chat)
    with backend.admission.admit(call.key, 1):
        try:
            job = await chat_job(backend, chat)
        except RequestError as error:
            raise (await _paths(backend, request)).error(error) from error
        call.warn(request.left_out())
        if job.warnings:
            call.warn(map((await _paths(backend, request)).text, job.warnings))
        builder = _Builder(request.called)
        body = _body(backend, request, job)
        yield {"type": "response.created", "response": body}
        yield {"type": "response.in_progress", "response": body}
        reason = "stop"
        async with contextlib.aclosing(run(backend, job, call)) as batches:
            async for batch in batches:
                for piece in batch:
                    reason = piece.finish_reason or reason
                    for event in builder.feed(piece):
                        yield event
        is_cut = reason == "length"
        for event in builder.finish(is_cut=is_cut):
            yield event
        finished = {
            **body,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": builder.output,
            "usage": _usage(job),
        }
        kind = "response.incomplete" if is_cut else "response.completed"
        yield {"type": kind, "response": finished}


def _items(request: ResponsesRequest) -> Sequence[Wire]:
    return () if isinstance(request.input, str) else request.input


async def _paths(backend: Backend, request: ResponsesRequest) -> Paths:
    return await beside(backend.preparer, _items(request), lambda: paths_of(request))


def _renamed(request: ResponsesRequest) -> wire.ChatRequest:
    try:
        return request.chat_request()
    except RequestError as error:
        raise paths_of(request).error(error) from error


@dataclass(slots=True)
class _Builder:
    """Output items so far. A delta goes to the open item of its kind, or opens the next.

    For one item: output_item.added, content_part.added, deltas, done, content_part.done,
    output_item.done; function calls have no parts.
    """

    called: Callable[[str], dict[str, str]]
    output: list[dict[str, Any]] = field(default_factory=list)
    _open: dict[str, Any] | None = None
    _text: str = ""

    def feed(self, piece: Piece) -> Iterator[Event]:
        """Turn one piece into events of a stream of /v1/responses."""
        delta = piece.delta
        if delta is None:
            return
        kind = _kind(delta)
        if self._open is None or self._open["type"] != kind or isinstance(delta, CallStart):
            yield from self.finish(is_cut=False)
            yield from self._begin(delta, kind)
        if isinstance(delta, CallStart):
            return
        self._text += delta.text
        if isinstance(delta, CallArguments):
            yield self._event("function_call_arguments.delta", delta=delta.text)
        elif isinstance(delta, Reasoning):
            yield self._event("reasoning_text.delta", content_index=0, delta=delta.text)
        else:
            yield self._event("output_text.delta", content_index=0, delta=delta.text, logprobs=[])

    def finish(self, *, is_cut: bool) -> Iterator[Event]:
        """Close the item of the stream that is still open."""
        item, text = self._open, self._text
        if item is None:
            return
        item = {**item, "status": "incomplete" if is_cut else "completed"}
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event("function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = _part(item["type"], text)
            item["content"] = [part]
            if item["type"] == "reasoning":
                yield self._event("reasoning_text.done", content_index=0, text=text)
            else:
                yield self._event("output_text.done", content_index=0, text=text, logprobs=[])
            yield self._event("content_part.done", content_index=0, part=part)
        self.output.append(item)
        yield self._item_event("output_item.done", item, len(self.output) - 1)
        self._open, self._text = None, ""

    def _begin(self, delta: Delta, kind: str) -> Iterator[Event]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item: dict[str, Any] = {
            "id": f"{prefix}_{uuid.uuid4().hex}",
            "type": kind,
            "status": "in_progress",
        }
        if isinstance(delta, CallStart):
            item |= {"call_id": delta.call_id, **self.called(delta.name), "arguments": ""}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"role": "assistant", "content": []}
        self._open = item
        yield self._item_event("output_item.added", item, len(self.output))
        if kind != "function_call":
            yield self._event("content_part.added", content_index=0, part=_part(kind, ""))

    def _event(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self.output)}
        return {"type": f"response.{kind}", **place, **fields}

    def _item_event(self, name: str, item: dict[str, Any], index: int) -> Event:
        return {"type": f"response.{name}", "output_index": index, "item": item}


def _kind(delta: Delta) -> str:
    if isinstance(delta, Content):
        return "message"
    return "reasoning" if isinstance(delta, Reasoning) else "function_call"


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(job: Job) -> dict[str, Any]:
    usage = job.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _body(backend: Backend, request: ResponsesRequest, job: Job) -> dict[str, Any]:
    effort = request.reasoning.effort if request.reasoning else None
    form = request.text.format if request.text and request.text.format else None
    choice = request.tool_choice
    params = job.choices[0].request.params
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": job.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": {},
        "model": backend.config.model_names[0],
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": effort or backend.chat.default_effort, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": {"format": form.model_dump(by_alias=True) if form else {"type": "text"}},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in request.tools],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
    }
