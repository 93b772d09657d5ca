"""The FastAPI application: routes, lifespan, error handlers. Other files do the work."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

import halfbyte
from halfbyte.chat.tokens import ChatFormat
from halfbyte.errors import CheckpointError, HalfbyteError, RequestError
from halfbyte.server.api import reading, tool_names, wire
from halfbyte.server.api.backend import Backend, engine_backend
from halfbyte.server.api.chat import chat_frames, chat_response
from halfbyte.server.api.held import HELD
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
from halfbyte.server.http.openapi import describe, request_body
from halfbyte.server.http.origins import Origins
from halfbyte.server.http.pages import add_pages
from halfbyte.server.http.state import add_health, add_state
from halfbyte.server.ops.supervise import Answerer, Supervisor
from halfbyte.server.ops.tracing import Tracing

# Rendering Markdown takes up to so many times as long as encoding the same text.
_TEXTS_OF_MARKDOWN = 64
# Reading a body is so many times as fast as encoding a text of its size.
_BYTES_OF_WORK = 8

Asked = TypeVar("Asked", bound=reading.Wire)


def create_app(
    service: Supervisor[Answerer],
    chat: ChatFormat,
    config: ServerConfig,
    *,
    access_log: AccessLog | None = log_access,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application over a running or startable engine; see `app_over`."""
    return app_over(engine_backend(service, chat, config), access_log=access_log, tracing=tracing)


def app_over(
    backend: Backend, *, access_log: AccessLog | None = log_access, tracing: Tracing | None = None
) -> FastAPI:
    """The application over a server's parts, which `app.state.backend` holds.

    access_log    where its lines go; None for nowhere

    The lifespan starts the service that answers and, at the end, drains it.
    Raises CheckpointError if the tokenizer knows more tokens than the model has rows for.
    """
    config, service = backend.config, backend.service
    known = backend.chat.vocabulary.size
    if known > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {known} tokens, the model only {config.vocab_size}"
        )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            backend.admission.is_draining = True
            await service.stop(drain_s=config.limits.drain_s)
            backend.preparer.aside.close()
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
    _add_answers(app, backend)
    _add_tokens(app, backend)
    _add_markdown(app, backend)
    add_state(app, backend)
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
    limits, preparer = backend.config.limits, backend.preparer
    call: Call = request.state.call
    async with reading_body(request, limits, backend.body_room) as body:
        read = preparer.reader.read
        found: Read[Asked]
        if body.descriptor is None:
            found = read(kind, call.path, call.user_agent, body.data)
        else:
            size = body.size // _BYTES_OF_WORK
            found = await preparer.aside.do_apart(
                size, read, kind, call.path, call.user_agent, file=body.descriptor
            )
    call.dialect = found.dialect
    call.warn(found.notes)
    HELD.set(found.pictures)
    return found.asked


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


class _Endpoint(NamedTuple):
    """A path that answers with one JSON object or, if the request says so, a stream of events.

    whole, frames  make the object, or the events of a stream
    error_tail     what follows the error that ends a stream
    """

    path: str
    asks: type[Any]
    returns: str
    what: str
    whole: Callable[[Backend, Any, Call], Coroutine[Any, Any, dict[str, Any]]]
    frames: Callable[[Backend, Any, Call], AsyncGenerator[bytes, None]]
    error_tail: bytes = b""


_ENDPOINTS = {
    "chat_completions": _Endpoint(
        "/v1/chat/completions",
        wire.ChatRequest,
        "chat.completion",
        "Continue a conversation.",
        chat_response,
        chat_frames,
        DONE,
    ),
    "completions": _Endpoint(
        "/v1/completions",
        wire.CompletionRequest,
        "text_completion",
        "Continue plain prompts.",
        text_response,
        text_frames,
        DONE,
    ),
    "responses": _Endpoint(
        "/v1/responses",
        ResponsesRequest,
        "response",
        "Answer with output items; nothing is stored.",
        responses_response,
        responses_frames,
    ),
    "messages": _Endpoint(
        "/v1/messages",
        MessagesRequest,
        "message",
        "Continue a conversation, over Anthropic's wire.",
        messages_response,
        messages_frames,
    ),
}


def _add_answers(app: FastAPI, backend: Backend) -> None:
    limits = backend.config.limits

    def add(name: str, endpoint: _Endpoint) -> None:
        async def answer(request: Request) -> Response:
            asked = await read(backend, request, endpoint.asks)
            call: Call = request.state.call
            if not asked.stream:
                return await respond(backend, request, endpoint.whole(backend, asked, call))
            return EventStream(
                endpoint.frames(backend, asked, call),
                deadline_s=limits.request_s,
                headers=call.headers,
                on_disconnect=lambda: count_disconnect(backend),
                retry_after_s=limits.retry_after_s,
                error_tail=endpoint.error_tail,
            )

        described = request_body(endpoint.asks, endpoint.returns)
        route = app.post(endpoint.path, name=name, description=endpoint.what, **described)
        route(answer)

    for name, endpoint in _ENDPOINTS.items():
        add(name, endpoint)

    @app.post("/v1/messages/count_tokens", **request_body(CountRequest, "count_tokens"))
    async def count(request: Request) -> Response:
        """Count the tokens of a prompt, over Anthropic's wire."""
        asked = await read(backend, request, CountRequest)
        with backend.admission.token_request():
            return JSONResponse(await count_tokens(backend, asked))


def _add_tokens(app: FastAPI, backend: Backend) -> None:
    preparer = backend.preparer
    reader, aside = preparer.reader, preparer.aside

    @app.post("/tokenize", **request_body(wire.TokenizeRequest, "tokenize"))
    async def tokenize(request: Request) -> Response:
        """Token ids of a plain prompt, or of a conversation as the model would see it."""
        asked = await read(backend, request, wire.TokenizeRequest)
        preparer.check_model(asked.model)
        with backend.admission.token_request():
            token_ids = await tokens_of(asked)
            body = await aside.do(
                len(token_ids),
                reader.tokens_body,
                token_ids,
                asked.return_token_strs,
            )
            return Response(body, media_type="application/json")

    async def tokens_of(asked: wire.TokenizeRequest) -> Sequence[int]:
        asked = tool_names.for_model(asked)
        if asked.messages is not None:
            encoded = await encode_resolved(
                preparer,
                await resolved_messages(preparer, asked.messages),
                tools=[tool.model_dump() for tool in asked.tools or ()],
                reasoning_effort=asked.reasoning_effort,
                continue_final=asked.continues_final,
            )
            return encoded.token_ids
        prompt = asked.prompt or ""
        return await encode_plain(preparer, prompt, with_start=asked.add_special_tokens)

    @app.post("/detokenize", **request_body(wire.DetokenizeRequest, "detokenize"))
    async def detokenize(request: Request) -> Response:
        """Text of token ids, control tokens by name."""
        asked = await read(backend, request, wire.DetokenizeRequest)
        preparer.check_model(asked.model)
        with backend.admission.token_request():
            size = len(asked.tokens)
            body = await aside.do(size, reader.text_body, asked.tokens)
            return Response(body, media_type="application/json")


def _add_markdown(app: FastAPI, backend: Backend) -> None:
    preparer = backend.preparer

    @app.post("/web/render", include_in_schema=False)
    async def render_markdown(request: Request) -> Response:
        """Markdown of an answer as HTML, for the page."""
        asked = await read(backend, request, wire.RenderRequest)
        with backend.admission.token_request():
            size = len(asked.text) * _TEXTS_OF_MARKDOWN
            made = await preparer.aside.do_apart(size, preparer.reader.page_of, asked.text)
        return JSONResponse({"html": made})


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
