"""Routes that say what this server is and how it fares: models, tokens by name, metrics, health."""

import dataclasses
import datetime
import time
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

import halfbyte
from halfbyte.server.api.backend import Backend
from halfbyte.server.http.openapi import returns_text

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _is_anthropic(request: Request) -> bool:
    """Whether a client of Anthropic's API asks: each request of one names a version."""
    return "anthropic-version" in request.headers


def add_state(app: FastAPI, backend: Backend) -> None:
    """Add the routes that describe the models, their tokenizer and the figures of operators."""
    config = backend.config
    started = int(time.time())

    def card(name: str, request: Request) -> dict[str, Any]:
        if not _is_anthropic(request):
            return _model_card(backend, name, started)
        made = datetime.datetime.fromtimestamp(started, datetime.UTC)
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": made.isoformat().replace("+00:00", "Z"),
        }

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The names this server answers to."""
        cards = [card(name, request) for name in config.model_names]
        if _is_anthropic(request):
            ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
            return JSONResponse({"data": cards, "has_more": False, **ends})
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        """One of the names this server answers to."""
        backend.preparer.check_model(name)
        return JSONResponse(card(name, request))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What harnesses ask before they send token ids: the special tokens by name."""
        return JSONResponse(_tokenizer_facts(backend))

    @app.get("/metrics", response_class=PlainTextResponse, responses=returns_text(METRICS_TYPE))
    async def metrics() -> Response:
        """Counters and histograms in Prometheus text."""
        return PlainTextResponse(backend.metrics_text(), media_type=METRICS_TYPE)


def _model_card(backend: Backend, name: str, started: int) -> dict[str, Any]:
    """A model in OpenAI's form; `started` is when the server was, in Unix seconds."""
    config, chat = backend.config, backend.chat
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


def _tokenizer_facts(backend: Backend) -> dict[str, Any]:
    vocabulary = backend.chat.vocabulary

    def named(token_id: int | None) -> str | None:
        return None if token_id is None else vocabulary.piece(token_id)

    ends = vocabulary.eos_token_ids
    end = ends[0] if ends else None
    return {
        "tokenizer_class": type(backend.chat).__name__,
        "vocab_size": vocabulary.size,
        "model_max_length": backend.config.max_model_len,
        "bos_token": named(vocabulary.bos_token_id),
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token": named(end),
        "eos_token_id": end,
        "eos_token_ids": list(ends),
        "chat_template": None,
    }


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
