"""The FastAPI application: routes, lifespan, error handlers. Other files do the work."""

import asyncio
import contextlib
import dataclasses
import datetime
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

import halfbyte
from halfbyte.chat.tokens import ChatFormat
from halfbyte.errors import CheckpointError, HalfbyteError, RequestError
from halfbyte.server.api import reading, tool_names, wire
from halfbyte.server.api.backend import Backend, Upstream
from halfbyte.server.api.chat import chat_frames, chat_response
from halfbyte.server.api.messages import count_tokens, messages_frames, messages_response
from halfbyte.server.api.messages_wire import CountRequest, MessagesRequest
from halfbyte.server.api.problems import body_for, error_body, response_of
from halfbyte.server.api.prompts import encode_plain, encode_resolved, resolved_messages
from halfbyte.server.api.reader import Read
from halfbyte.server.api.responses import responses_frames, responses_response
from halfbyte.server.api.responses_wire import ResponsesRequest
from halfbyte.server.api.stream import DONE, EventStream, reading_body, until_disconnect
from halfbyte.server.api.text import text_frames, text_response
from halfbyte.server.call import Call
from halfbyte.server.config import ServerConfig
from halfbyte.server.http.gate import OPEN_PATHS, AccessLog, Gate, Keys, log_access
from halfbyte.server.http.openapi import describe, request_body, returns_text
from halfbyte.server.http.origins import Origins
from halfbyte.server.http.pages import add_pages
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.ops.tracing import Tracing

# Rendering Markdown takes up to so many times as long as encoding the same text.
_TEXTS_OF_MARKDOWN = 64
# Reading a body is so many times as fast as encoding a text of its size.
_BYTES_OF_WORK = 8
# Values that a body may hold beside a whole context of token ids.
_FEW_VALUES = 1000

Asked = TypeVar("Asked", bound=reading.Wire)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    service: Supervisor,
    chat: ChatFormat,
    config: ServerConfig,
    *,
    access_log: AccessLog | None = log_access,
    tracing: Tracing | None = None,
    upstream: Upstream | None = None,
) -> FastAPI:
    """The application over a running or startable engine.

    access_log    where its lines go; None for nowhere
    upstream      another server that makes the answers, `service` being its process

    The lifespan starts the service and, at the end, drains it. `app.state.backend` holds the parts.
    Raises CheckpointError if the tokenizer knows more tokens than the model has rows for.
    """
    if chat.vocabulary.size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {chat.vocabulary.size} tokens, the model only {config.vocab_size}"
        )
    backend = Backend(service, chat, config, upstream)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            backend.admission.is_draining = True
            await service.stop(drain_s=config.limits.drain_s)
            backend.aside.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="halfbyte",
        version=halfbyte.__version__,
        lifespan=lifespan,
        # FastAPI's documentation pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.backend = backend
    _add_completions(app, backend)
    _add_tokens(app, backend)
    _add_markdown(app, backend)
    _add_state(app, backend)
    add_health(app, backend)
    add_pages(app)
    add_error_handlers(app, backend)
    app.add_middleware(
        Gate,
        keys=Keys(config.api_keys),
        metrics=backend.metrics,
        access_log=access_log,
        tracing=tracing,
        origins=Origins(config.allowed_hosts, config.allowed_origins),
    )
    app.openapi = lambda: describe(  # type: ignore[method-assign]
        app, asks_for_key=bool(config.api_keys), open_paths=OPEN_PATHS
    )
    return app


async def read(backend: Backend, request: Request, kind: type[Asked]) -> Asked:
    """The validated body of a request, none of whose texts and lists is beyond all bounds."""
    limits = backend.config.limits
    counted = limits
    if not _has_prompts(kind):
        # Reading values takes the interpreter from running answers, 30 ns each. Only batches of
        # prompts need so many.
        most_values = max(limits.body_values // 2, backend.config.max_model_len + _FEW_VALUES)
        most_values = min(limits.body_values, most_values)
        counted = dataclasses.replace(limits, body_values=most_values)
    call: Call = request.state.call
    most_text = backend.reader.texts.most_bytes * (limits.prompts if _has_prompts(kind) else 1)
    async with reading_body(request, counted, backend.body_room, most_text) as body:
        read = backend.reader.read
        found: Read[Asked]
        if body.descriptor is None:
            found = read(kind, call.path, call.user_agent, body.data)
        else:
            size = body.size // _BYTES_OF_WORK
            found = await backend.aside.do_apart(
                size, read, kind, call.path, call.user_agent, file=body.descriptor
            )
    call.dialect = found.dialect
    call.warn(found.notes)
    return found.asked


def _has_prompts(kind: type[reading.Wire]) -> bool:
    return issubclass(kind, wire.CompletionRequest)


async def respond(
    backend: Backend, request: Request, work: Coroutine[Any, Any, dict[str, Any]]
) -> Response:
    """The JSON that `work` makes, unless the client leaves first."""
    try:
        body = await until_disconnect(
            request,
            work,
            deadline_s=backend.config.limits.request_s,
            on_disconnect=lambda: count_disconnect(backend),
        )
    except ClientDisconnect:
        # Nobody reads this; 499 is what access logs call a client that left.
        return Response(status_code=499)
    call: Call = request.state.call
    return JSONResponse(body, headers=call.headers)


def count_disconnect(backend: Backend) -> None:
    """Count one client that left before its answer ended."""
    backend.metrics.disconnects += 1


def _add_completions(app: FastAPI, backend: Backend) -> None:
    deadline_s = backend.config.limits.request_s

    @app.post("/v1/chat/completions", **request_body(wire.ChatRequest, "chat.completion"))
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation."""
        asked = await read(backend, request, wire.ChatRequest)
        call = request.state.call
        if not asked.stream:
            return await respond(backend, request, chat_response(backend, asked, call))
        return _stream(chat_frames(backend, asked, call), call)

    @app.post("/v1/completions", **request_body(wire.CompletionRequest, "text_completion"))
    async def completions(request: Request) -> Response:
        """Continue plain prompts."""
        asked = await read(backend, request, wire.CompletionRequest)
        call = request.state.call
        if not asked.stream:
            return await respond(backend, request, text_response(backend, asked, call))
        return _stream(text_frames(backend, asked, call), call)

    @app.post("/v1/responses", **request_body(ResponsesRequest, "response"))
    async def responses(request: Request) -> Response:
        """Answer with output items; nothing is stored."""
        asked = await read(backend, request, ResponsesRequest)
        call = request.state.call
        if not asked.stream:
            return await respond(backend, request, responses_response(backend, asked, call))
        return _stream(responses_frames(backend, asked, call), call, error_tail=b"")

    @app.post("/v1/messages", **request_body(MessagesRequest, "message"))
    async def messages(request: Request) -> Response:
        """Continue a conversation, over Anthropic's wire."""
        asked = await read(backend, request, MessagesRequest)
        call = request.state.call
        if not asked.stream:
            return await respond(backend, request, messages_response(backend, asked, call))
        return _stream(messages_frames(backend, asked, call), call, error_tail=b"")

    @app.post("/v1/messages/count_tokens", **request_body(CountRequest, "count_tokens"))
    async def count(request: Request) -> Response:
        """Count the tokens of a prompt, over Anthropic's wire."""
        asked = await read(backend, request, CountRequest)
        with backend.token_request():
            return JSONResponse(await count_tokens(backend, asked))

    def _stream(
        frames: AsyncGenerator[bytes, None], call: Call, error_tail: bytes = DONE
    ) -> Response:
        return EventStream(
            frames,
            deadline_s=deadline_s,
            headers=call.headers,
            on_disconnect=lambda: count_disconnect(backend),
            retry_after_s=backend.config.limits.retry_after_s,
            error_tail=error_tail,
        )


def _add_tokens(app: FastAPI, backend: Backend) -> None:
    @app.post("/tokenize", **request_body(wire.TokenizeRequest, "tokenize"))
    async def tokenize(request: Request) -> Response:
        """Token ids of a plain prompt, or of a conversation as the model would see it."""
        asked = await read(backend, request, wire.TokenizeRequest)
        backend.check_model(asked.model)
        with backend.token_request():
            token_ids = await tokens_of(asked)
            body = await backend.aside.do(
                len(token_ids), backend.reader.tokens_body, token_ids, asked.return_token_strs
            )
            return Response(body, media_type="application/json")

    async def tokens_of(asked: wire.TokenizeRequest) -> Sequence[int]:
        asked = tool_names.for_model(asked)
        if asked.messages is not None:
            encoded = await encode_resolved(
                backend,
                await resolved_messages(backend, asked.messages),
                tools=[tool.model_dump() for tool in asked.tools or ()],
                reasoning_effort=asked.reasoning_effort,
                continue_final=asked.continues_final,
            )
            return encoded.token_ids
        prompt = asked.prompt or ""
        return await encode_plain(backend, prompt, with_start=asked.add_special_tokens)

    @app.post("/detokenize", **request_body(wire.DetokenizeRequest, "detokenize"))
    async def detokenize(request: Request) -> Response:
        """Text of token ids, control tokens by name."""
        asked = await read(backend, request, wire.DetokenizeRequest)
        backend.check_model(asked.model)
        with backend.token_request():
            size = len(asked.tokens)
            body = await backend.aside.do(size, backend.reader.text_body, asked.tokens)
            return Response(body, media_type="application/json")


def _add_markdown(app: FastAPI, backend: Backend) -> None:
    @app.post("/web/render", include_in_schema=False)
    async def render_markdown(request: Request) -> Response:
        """Markdown of an answer as HTML, for the page."""
        asked = await read(backend, request, wire.RenderRequest)
        with backend.token_request():
            size = len(asked.text) * _TEXTS_OF_MARKDOWN
            made = await backend.aside.do_apart(size, backend.reader.page_of, asked.text)
        return JSONResponse({"html": made})


def _is_anthropic(request: Request) -> bool:
    """Whether a client of Anthropic's API asks: each request of one names a version."""
    return "anthropic-version" in request.headers


def _add_state(app: FastAPI, backend: Backend) -> None:
    config = backend.config
    started = int(time.time())

    chat = backend.chat

    def model_card(name: str, request: Request) -> dict[str, Any]:
        if _is_anthropic(request):
            made = datetime.datetime.fromtimestamp(started, datetime.UTC)
            return {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": made.isoformat().replace("+00:00", "Z"),
            }
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "halfbyte",
            "max_model_len": config.max_model_len,
            # What Mistral's clients read, and programs that list local models.
            "type": "base",
            "name": name,
            "aliases": [other for other in config.model_names if other != name],
            "max_context_length": config.max_model_len,
            "context_length": config.max_model_len,
            "default_model_temperature": config.sampling.temperature,
            "capabilities": {
                "completion_chat": True,
                "completion_fim": False,
                "function_calling": chat.control.has_tools,
                "fine_tuning": False,
                "vision": chat.image_layout is not None,
                "reasoning": chat.control.has_thinking,
            },
        }

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The names this server answers to."""
        cards = [model_card(name, request) for name in config.model_names]
        if _is_anthropic(request):
            ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
            return JSONResponse({"data": cards, "has_more": False, **ends})
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        """One of the names this server answers to."""
        backend.check_model(name)
        return JSONResponse(model_card(name, request))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What harnesses ask before they send token ids: the special tokens by name."""
        vocabulary = chat.vocabulary

        def named(token_id: int | None) -> str | None:
            return None if token_id is None else vocabulary.piece(token_id)

        ends = vocabulary.eos_token_ids
        return JSONResponse(
            {
                "tokenizer_class": type(chat).__name__,
                "vocab_size": vocabulary.size,
                "model_max_length": config.max_model_len,
                "bos_token": named(vocabulary.bos_token_id),
                "bos_token_id": vocabulary.bos_token_id,
                "eos_token": named(ends[0] if ends else None),
                "eos_token_id": ends[0] if ends else None,
                "eos_token_ids": list(ends),
                "chat_template": None,
            }
        )

    @app.get("/metrics", response_class=PlainTextResponse, responses=returns_text(METRICS_TYPE))
    async def metrics() -> Response:
        """Counters and histograms in Prometheus text."""
        return PlainTextResponse(backend.metrics_text(), media_type=METRICS_TYPE)


def add_health(app: FastAPI, backend: Backend) -> None:
    """Add the routes that say whether the server lives and is ready."""
    config = backend.config

    @app.get("/health")
    async def health() -> Response:
        """Liveness, and what this server is: limits, capacity, formats."""
        alive = backend.service.is_alive
        body = {
            "status": "ok" if alive else "dead",
            "ready": backend.is_ready,
            "version": halfbyte.__version__,
            "models": list(config.model_names),
            "max_model_len": config.max_model_len,
            "reasoning_efforts": list(backend.chat.reasoning_efforts),
            "tools": backend.chat.control.has_tools,
            "images": backend.chat.image_layout is not None,
            "limits": dataclasses.asdict(config.limits),
            "sampling": dataclasses.asdict(config.sampling),
            "unknown_fields": config.unknown_fields,
            "strict_effort": config.strict_effort,
            "dialect": config.dialect,
            "image_url_hosts": list(config.image_fetch.hosts),
            "engine": backend.engine_figures(),
            "engine_restarts": backend.service.num_restarts,
            **dict(config.facts),
        }
        return JSONResponse(body, status_code=200 if alive else 503)

    @app.get("/ready")
    @app.get("/health/ready")
    async def ready() -> Response:
        """Whether new requests are welcome; 503 while draining or after the engine died."""
        is_ready = backend.is_ready
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)


def add_error_handlers(app: FastAPI, backend: Backend) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return response_of(error, backend.config.limits.retry_after_s, path=request.url.path)

    async def http(request: Request, error: Exception) -> Response:
        """Answer errors that Starlette raises itself: an unknown path, an unknown method."""
        assert isinstance(error, HTTPException)
        path = request.url.path
        routes = {getattr(route, "path", "") for route in app.routes}
        # A base URL without /v1, or with a slash too many.
        meant = "/v1/" + path.strip("/").removeprefix("v1").lstrip("/")
        hint = f"; did you mean {meant}?" if meant in routes else ""
        message = {
            404: f"no such path: {path}{hint}",
            405: f"{request.method} is not allowed on {request.url.path}",
        }.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        body = error_body(message, error.status_code, code=code)
        body = body_for(request.url.path, error.status_code, body)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    async def left(request: Request, error: Exception) -> Response:
        """Count a client that left while its body was being read."""
        count_disconnect(backend)
        return Response(status_code=499)

    app.add_exception_handler(HalfbyteError, known)
    app.add_exception_handler(RequestError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, known)
