"""The OpenAPI document: bodies are read by `wire` itself, so they are described here."""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from halfbyte.server.api import wire
from halfbyte.server.api.messages_wire import CountRequest, MessagesRequest
from halfbyte.server.api.reading import Wire
from halfbyte.server.api.responses_wire import ResponsesRequest


def _error(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": "An error, always of this form", "content": content}


# Errors of /v1/messages, in its own wire's form.
_MESSAGES_ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

BODIES: tuple[type[Wire], ...] = (
    wire.ChatRequest,
    wire.CompletionRequest,
    wire.TokenizeRequest,
    wire.DetokenizeRequest,
    ResponsesRequest,
    MessagesRequest,
    CountRequest,
)
STATUSES = (400, 401, 404, 405, 413, 429, 500, 503, 504)


def request_body(kind: type[Wire], returns: str) -> dict[str, Any]:
    """Keyword arguments of a POST route that takes `kind`; `returns` names its answer."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    success = {"application/json": {"schema": {"type": "object", "title": returns}}}
    if "stream" in kind.model_fields:
        success["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "openapi_extra": {
            "x-body": kind.__name__,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": reference}},
            },
        },
        "responses": {200: {"description": returns, "content": success}},
    }


def returns_text(media_type: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with text."""
    return {200: {"description": "text", "content": {media_type: {"schema": {"type": "string"}}}}}


def describe(app: FastAPI, *, asks_for_key: bool, open_paths: Collection[str]) -> dict[str, Any]:
    """The OpenAPI document, made once: routes, the bodies they take, the error they give."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.clear()
    schemas |= {"Error": _ERROR_SCHEMA, "MessagesError": _MESSAGES_ERROR_SCHEMA}
    bodies = {kind.__name__: kind for kind in BODIES}
    for route, path in document["paths"].items():
        error = _error("MessagesError" if route.startswith("/v1/messages") else "Error")
        for operation in path.values():
            name = operation.pop("x-body", None)
            if name is not None:
                kind = bodies[name]
                schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                for part, said in {**schema.pop("$defs", {}), kind.__name__: schema}.items():
                    assert schemas.setdefault(part, said) == said, f"two types are called {part}"
            operation["responses"].pop("422", None)
            for status in STATUSES:
                operation["responses"].setdefault(str(status), error)
    if asks_for_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in open_paths:
            for operation in document["paths"].get(path, {}).values():
                operation["security"] = []
    app.openapi_schema = document
    return document
