"""Exceptions to OpenAI error bodies and statuses: the one file that knows both."""

from typing import Any

from starlette.responses import JSONResponse

from halfbyte.errors import CapacityError, HalfbyteError, RequestError
from halfbyte.log import logger

# OpenAI's `type` by status; clients of other servers switch on it.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
    505: "invalid_request_error",
}
# Messages carry what was sent, which may be megabytes; of longer ones both ends are told.
_MOST_CHARS = 2000
# The rest of the request is not read; what follows on the connection could not be told from it.
_CLOSING_STATUSES = (408, 505)
_CLOSING_CODES = ("invalid_http",)


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The error object that every route answers with, streams included."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if len(message) > _MOST_CHARS:
        half = _MOST_CHARS // 2
        message = f"{message[:half]} [...] {message[-half:]}"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_and_body(error: BaseException) -> tuple[int, dict[str, Any]]:
    """What a client is told about an exception; internals stay inside."""
    if isinstance(error, RequestError):
        body = error_body(str(error), error.status, param=error.param, code=error.code)
        return error.status, body
    if isinstance(error, CapacityError):
        return 503, error_body(str(error), 503, code="over_capacity")
    if isinstance(error, HalfbyteError):
        logger.error("request failed: %s", error)
        return 500, error_body(str(error), 500, code="internal_error")
    logger.exception("request failed", exc_info=error)
    return 500, error_body("the server failed on this request", 500, code="internal_error")


def messages_error_body(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """An error in the form of /v1/messages (Anthropic's wire)."""
    kind = {413: "request_too_large", 503: "overloaded_error"}.get(status)
    if kind is None:
        kind = "api_error" if status >= 500 and status != 504 else body["error"]["type"]
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


def body_for(path: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """An error's body in the form that clients of a path read."""
    return messages_error_body(status, body) if path.startswith("/v1/messages") else body


def response_of(error: BaseException, retry_after_s: int = 2, *, path: str = "") -> JSONResponse:
    """An error as a response; 429 and 503 say when to come back, 401 how to identify."""
    status, body = status_and_body(error)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(retry_after_s)
    if status in _CLOSING_STATUSES or body["error"]["code"] in _CLOSING_CODES:
        headers["Connection"] = "close"
    if status == 401:
        # Not Basic: browsers would ask for a password over the page, which has its own field, and
        # from then on send it along by themselves.
        headers["WWW-Authenticate"] = 'Bearer realm="halfbyte"'
    return JSONResponse(body_for(path, status, body), status_code=status, headers=headers)
