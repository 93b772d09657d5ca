"""/v1/completions: plain continuations, with echo and the older form of log-probs."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from halfbyte.chat.detokenize import TextStream
from halfbyte.chat.vocabulary import Vocabulary
from halfbyte.engine.request import TokenLogprobs
from halfbyte.server.api import wire
from halfbyte.server.api.backend import Backend
from halfbyte.server.api.chat import prompt_entries, running_usage
from halfbyte.server.api.completion import AnswerMessage, Choice, Job, token_text
from halfbyte.server.api.pieces import TokenEntry
from halfbyte.server.api.prepare import admitted
from halfbyte.server.api.running import collect, run
from halfbyte.server.api.stream import DONE, frame
from halfbyte.server.call import Call


async def text_response(
    backend: Backend, request: wire.CompletionRequest, call: Call
) -> dict[str, Any]:
    """Answer a request to /v1/completions with all texts in one piece."""
    async with admitted(backend, request, call) as job:
        messages = await collect(backend, job, call)
    choices = []
    for choice, message in zip(job.choices, messages, strict=True):
        echo = _echo(backend, request, choice)
        answer = _answer(backend, request, message, len(echo["text"]))
        body = _body(choice.index, _sum(echo, answer), message.finish_reason)
        choices.append({**body, **_of_prompt(backend, request, choice), **_ids(request, message)})
    return {**_head(backend, job), "choices": choices, "usage": _usage(request, job)}


async def text_frames(
    backend: Backend, request: wire.CompletionRequest, call: Call
) -> AsyncGenerator[bytes, None]:
    """Answer a request to /v1/completions as server-sent events."""
    options = request.stream_options or wire.StreamOptions()
    async with admitted(backend, request, call) as job:
        head = _head(backend, job)
        lengths: dict[int, int] = {}
        async with contextlib.aclosing(run(backend, job, call)) as batches:
            async for batch in batches:
                frames = []
                for piece in batch:
                    message = AnswerMessage()
                    message.add(piece)
                    part = _answer(backend, request, message, lengths.get(piece.index, 0))
                    told = _ids(request, message)
                    if piece.index not in lengths:
                        choice = job.choices[piece.index]
                        echo = _echo(backend, request, choice)
                        told |= _of_prompt(backend, request, choice)
                        lengths[piece.index] = len(echo["text"])
                        part = _sum(echo, _answer(backend, request, message, lengths[piece.index]))
                    body = {**_body(piece.index, part, piece.finish_reason), **told}
                    frames.append(frame({**head, "choices": [body], **running_usage(options, job)}))
                yield b"".join(frames)
        if options.include_usage:
            yield frame({**head, "choices": [], "usage": _usage(request, job)})
        yield DONE


def _head(backend: Backend, job: Job) -> dict[str, Any]:
    return {
        "id": job.answer_id,
        "object": "text_completion",
        "created": job.created,
        "model": backend.config.model_names[0],
    }


def _body(index: int, part: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": part["text"],
        "logprobs": part["logprobs"],
        "finish_reason": reason,
    }


def _of_prompt(backend: Backend, request: wire.CompletionRequest, choice: Choice) -> dict[str, Any]:
    """What vLLM's fields ask to be told of a choice's prompt."""
    told: dict[str, Any] = {}
    if request.return_token_ids:
        told["prompt_token_ids"] = list(choice.request.prompt_token_ids)
    if request.prompt_logprobs is not None:
        told["prompt_logprobs"] = prompt_entries(backend, choice, request.prompt_logprobs)
    return told


def _ids(request: wire.CompletionRequest, message: AnswerMessage) -> dict[str, Any]:
    if not request.return_token_ids:
        return {}
    return {"token_ids": [] if request.max_tokens == 0 else list(message.token_ids)}


def _usage(request: wire.CompletionRequest, job: Job) -> dict[str, Any]:
    usage = job.usage.chat_body()
    if request.max_tokens == 0:
        usage["completion_tokens"] = 0
        usage["total_tokens"] = usage["prompt_tokens"]
    return usage


def _answer(
    backend: Backend, request: wire.CompletionRequest, message: AnswerMessage, offset: int
) -> dict[str, Any]:
    """Text and log-probs of generated tokens; nothing when only the prompt was to be scored."""
    hide = request.max_tokens == 0
    entries = [] if hide else message.entries
    return {
        "text": "" if hide else message.content,
        "logprobs": _logprobs(backend, request, entries, offset),
    }


def _echo(backend: Backend, request: wire.CompletionRequest, choice: Choice) -> dict[str, Any]:
    """Text and log-probs of the prompt, if they were asked for. The first token has none."""
    if not request.echo:
        return {"text": "", "logprobs": _logprobs(backend, request, [], 0)}
    vocabulary = backend.chat.vocabulary
    token_ids = choice.request.prompt_token_ids
    text = vocabulary.decode(token_ids)
    if request.logprobs is None:
        return {"text": text, "logprobs": None}
    entries: list[TokenEntry] = []
    position = 0
    stream = TextStream(vocabulary)
    scored = [None, *choice.prompt_logprobs]
    for token_id, logprobs in zip(token_ids, scored, strict=True):
        one = logprobs or TokenLogprobs(token_id, float("nan"))
        # Part of a character begins where the character will stand.
        entries.append(TokenEntry(one, position))
        position += len(stream.feed(token_id))
    return {"text": text, "logprobs": _logprobs(backend, request, entries, 0)}


def _logprobs(
    backend: Backend, request: wire.CompletionRequest, entries: list[TokenEntry], offset: int
) -> dict[str, Any] | None:
    if request.logprobs is None:
        return None
    vocabulary = backend.chat.vocabulary
    num_top = request.logprobs

    def text(token_id: int) -> str:
        return token_text(vocabulary, token_id)

    def finite(logprob: float) -> float | None:
        return None if logprob != logprob else max(logprob, -9999.0)

    return {
        "tokens": [text(entry.logprobs.token_id) for entry in entries],
        "token_logprobs": [finite(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": [
            {
                name: finite(value)
                for name, value in _by_name(vocabulary, entry.logprobs.top[:num_top])
            }
            or None
            for entry in entries
        ],
        "text_offset": [offset + entry.offset_chars for entry in entries],
    }


def _by_name(vocabulary: Vocabulary, top: tuple[tuple[int, float], ...]) -> list[tuple[str, float]]:
    """Log-probs under names of which no two are equal, as keys of an object must be.

    Tokens are named by their text; parts of characters, which have none, by their bytes as OpenAI
    wrote them (bytes:\\xf0), and what is still named alike by its id.
    """
    named: dict[str, float] = {}
    for token_id, logprob in top:
        name = token_text(vocabulary, token_id)
        if token_id < vocabulary.size and "\ufffd" in name:
            raw = vocabulary.token_bytes[token_id]
            if raw and raw != name.encode():
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        if name in named:
            name = f"token_id:{token_id}"
        named[name] = logprob
    return list(named.items())


def _sum(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two neighbouring parts of one choice."""
    logprobs = first["logprobs"]
    if logprobs is not None:
        logprobs = {key: values + second["logprobs"][key] for key, values in logprobs.items()}
    return {"text": first["text"] + second["text"], "logprobs": logprobs}
