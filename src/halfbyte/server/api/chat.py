"""/v1/chat/completions: jobs to chunks and to the one response, in OpenAI's form."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import halfbyte
from halfbyte.chat.router import CallArguments, CallStart, Content, Delta, Reasoning
from halfbyte.engine.request import TokenLogprobs
from halfbyte.server.api import wire
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.completion import AnswerMessage, Choice, Job, token_text
from halfbyte.server.api.pieces import Piece, TokenEntry
from halfbyte.server.api.prepare import admitted
from halfbyte.server.api.running import collect, run
from halfbyte.server.api.stream import DONE, frame
from halfbyte.server.call import Call
from halfbyte.server.dialect import Dialect

# JSON has no infinity; OpenAI's own floor stands in.
_LEAST_LOGPROB = -9999.0
FINGERPRINT = f"halfbyte-{halfbyte.__version__}"


async def chat_response(backend: Backend, request: wire.ChatRequest, call: Call) -> dict[str, Any]:
    """Answer a chat request with all messages in one piece."""
    async with admitted(backend, request, call) as job:
        messages = await collect(backend, job, call)
    prompt = job.choices[0]
    told: dict[str, Any] = {}
    if request.return_token_ids:
        told["prompt_token_ids"] = list(prompt.request.prompt_token_ids)
    if request.prompt_logprobs is not None:
        told["prompt_logprobs"] = prompt_entries(backend, prompt, request.prompt_logprobs)
    return {
        "id": job.answer_id,
        "object": "chat.completion",
        "created": job.created,
        "model": backend.config.model_names[0],
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {
                "index": index,
                "message": message_body(message, request, call.dialect),
                "logprobs": (
                    {"content": _entries(backend, tuple(message.entries)), "refusal": None}
                    if request.logprobs
                    else None
                ),
                "finish_reason": message.finish_reason,
                **_token_ids(request, message.token_ids),
            }
            for index, message in enumerate(messages)
        ],
        "usage": job.usage.chat_body(),
        **told,
    }


def _token_ids(request: wire.Sampling, token_ids: Sequence[int]) -> dict[str, Any]:
    return {"token_ids": list(token_ids)} if request.return_token_ids else {}


def prompt_entries(backend: Backend, choice: Choice, num_top: int) -> list[Any]:
    """Log-probs of a prompt in vLLM's form: by token id, the prompt's own token first.

    Its rank is only known where it is among the `num_top` most likely ones. The first token of a
    prompt has no distribution.
    """
    vocabulary = backend.chat.vocabulary

    def told(logprobs: TokenLogprobs) -> dict[str, Any]:
        ranks = {one: rank for rank, (one, _) in enumerate(logprobs.top[:num_top], 1)}
        scores = {logprobs.token_id: logprobs.logprob, **dict(logprobs.top[:num_top])}
        return {
            str(one): {
                "logprob": max(score, _LEAST_LOGPROB),
                "rank": ranks.get(one),
                "decoded_token": token_text(vocabulary, one),
            }
            for one, score in scores.items()
        }

    return [None, *map(told, choice.prompt_logprobs)]


def message_body(
    message: AnswerMessage, request: wire.ChatRequest, dialect: Dialect
) -> dict[str, Any]:
    """An assistant message; fields that have nothing to say are absent or null as OpenAI's are."""
    content: Any = message.content if message.content or not message.calls else None
    body: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if message.reasoning and request.include_reasoning:
        if dialect.thought_parts:
            text = [{"type": "text", "text": message.content}] if message.content else []
            body["content"] = [_thought_part(message.reasoning, dialect), *text]
        if dialect.thought_field:
            # Both names are in use by clients.
            body["reasoning_content"] = body["reasoning"] = message.reasoning
    if message.calls:
        body["tool_calls"] = message.calls
    return body


def _thought_part(text: str, dialect: Dialect) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "thinking", "thinking": [{"type": "text", "text": text}]}
    if dialect.thought_field:
        # Who reads the field takes a part for its text, which has been told there.
        part["text"] = ""
    return part


async def chat_frames(
    backend: Backend, request: wire.ChatRequest, call: Call
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, ending with usage if asked and [DONE]."""
    options = request.stream_options or wire.StreamOptions()
    async with admitted(backend, request, call) as job:
        head = {
            "id": job.answer_id,
            "object": "chat.completion.chunk",
            "created": job.created,
            "model": backend.config.model_names[0],
            "system_fingerprint": FINGERPRINT,
        }
        if options.include_usage:
            head["usage"] = None
        prompt_ids: dict[str, Any] = {}
        if request.return_token_ids:
            prompt_ids["prompt_token_ids"] = list(job.choices[0].request.prompt_token_ids)
        chunks = _Chunks(backend, request, call.dialect)
        num_running = len(job.choices)
        async with contextlib.aclosing(run(backend, job, call)) as batches:
            async for batch in batches:
                frames = []
                for choice in (one for piece in batch for one in chunks.feed(piece)):
                    usage = running_usage(options, job)
                    num_running -= choice["finish_reason"] is not None
                    if call.dialect.closing_usage and not num_running:
                        usage = {"usage": job.usage.chat_body()}
                    frames.append(frame({**head, "choices": [choice], **prompt_ids, **usage}))
                    prompt_ids = {}
                yield b"".join(frames)
        if options.include_usage:
            yield frame({**head, "choices": [], "usage": job.usage.chat_body()})
        yield DONE


class _Chunks:
    """Pieces to the `choices` of chunks, in the client's dialect."""

    def __init__(self, backend: Backend, request: wire.ChatRequest, dialect: Dialect) -> None:
        options = request.stream_options
        in_pieces = options.stream_tool_calls if options is not None else None
        self._whole_calls = dialect.whole_calls if in_pieces is None else not in_pieces
        self._dialect = dialect
        self._backend = backend
        self._request = request
        self._begun: set[int] = set()
        # Of each choice the call that is held until it is whole.
        self._held: dict[int, dict[str, Any]] = {}
        # Of each choice the tokens that no chunk has told of yet.
        self._token_ids: dict[int, list[int]] = {}

    def feed(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a piece, after the one that opens its choice."""
        chunks = self._chunks(piece)
        if self._request.return_token_ids:
            waiting = self._token_ids.setdefault(piece.index, [])
            waiting += piece.token_ids
            for chunk in chunks:
                chunk["token_ids"] = []
            if chunks:
                chunks[-1]["token_ids"] = self._token_ids.pop(piece.index)
        return chunks

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        index = piece.index
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(_choice(index, {"role": "assistant", "content": ""}, None, None))
        delta = piece.delta
        if isinstance(delta, Reasoning) and not self._request.include_reasoning:
            return chunks
        if isinstance(delta, CallArguments) and index in self._held:
            self._held[index]["function"]["arguments"] += delta.text
            return chunks
        if index in self._held:
            chunks.append(_choice(index, {"tool_calls": [self._held.pop(index)]}, None, None))
        if isinstance(delta, CallStart) and self._whole_calls:
            self._held[index] = _call_start(delta)
            return chunks
        logprobs = None
        if self._request.logprobs and piece.entries:
            logprobs = {"content": _entries(self._backend, piece.entries), "refusal": None}
        body = _delta(delta, self._dialect)
        chunks.append(_choice(index, body, logprobs, piece.finish_reason))
        return chunks


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _delta(delta: Delta | None, dialect: Dialect) -> dict[str, Any]:
    if isinstance(delta, Content):
        return {"content": delta.text}
    if isinstance(delta, Reasoning):
        parts = {"content": [_thought_part(delta.text, dialect)]} if dialect.thought_parts else {}
        if not dialect.thought_field:
            return parts
        return {**parts, "reasoning_content": delta.text, "reasoning": delta.text}
    if isinstance(delta, CallStart):
        return {"tool_calls": [_call_start(delta)]}
    if isinstance(delta, CallArguments):
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
    return {}


def _call_start(delta: CallStart) -> dict[str, Any]:
    function = {"name": delta.name, "arguments": ""}
    return {"index": delta.index, "id": delta.call_id, "type": "function", "function": function}


def running_usage(options: wire.StreamOptions, job: Job) -> dict[str, Any]:
    """Usage so far as a field of a chunk, if it was asked for in each of them."""
    if not options.continuous_usage_stats:
        return {}
    body = job.usage.chat_body()
    body["completion_tokens"] = sum(choice.num_completion_tokens for choice in job.choices)
    body["total_tokens"] = body["prompt_tokens"] + body["completion_tokens"]
    return {"usage": body}


def _entries(backend: Backend, entries: tuple[TokenEntry, ...]) -> list[dict[str, Any]]:
    vocabulary = backend.chat.vocabulary

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(vocabulary, token_id)
        known = token_id < vocabulary.size and not vocabulary.is_control(token_id)
        raw = vocabulary.token_bytes[token_id] if known else text.encode()
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(raw)}

    return [
        {
            **one(entry.logprobs.token_id, entry.logprobs.logprob),
            "top_logprobs": [one(*alternative) for alternative in entry.logprobs.top],
        }
        for entry in entries
    ]
