"""The middleware around all routes: origins, API keys, request ids, the access log, counters."""

import base64
import binascii
import datetime
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfbyte.errors import RequestError, UsageError, in_words
from halfbyte.log import logger
from halfbyte.server.api.problems import response_of
from halfbyte.server.call import Call
from halfbyte.server.dialect import MISTRAL_PREFIX
from halfbyte.server.http.origins import Origins
from halfbyte.server.ops.metrics import Metrics
from halfbyte.server.ops.tracing import Tracing

# Liveness probes carry no key.
OPEN_PATHS = frozenset({"/health", "/health/ready"})


def is_open(method: str, path: str) -> bool:
    """Whether a path asks for no key: liveness and the page's own files hold no secret."""
    return path in OPEN_PATHS or (method == "GET" and (path == "/" or path.startswith("/web/")))


# Takes a line of JSON.
AccessLog = Callable[[str], None]

# Read by us or by whoever stands in front of us; two of one would be two answers to one question.
_ONCE = (b"authorization", b"x-api-key", b"host", b"origin", b"content-type", b"sec-fetch-site")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")


class Keys:
    """API keys, kept as digests and compared in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def is_open(self) -> bool:
        """Whether the server asks for no key at all."""
        return not self._digests

    def name_of(self, authorization: str) -> str:
        """A short name of the key in an Authorization header, for the log and per-key limits.

        `Bearer KEY`, or `Basic` with the key as password, which is how a browser asks for one.
        Raises RequestError (401) for a missing or wrong key.
        """
        if self.is_open:
            return "anyone"
        presented = hashlib.sha256(_presented_key(authorization).encode()).digest()
        found = False
        # Every key is compared, so that the time says nothing about which one matched.
        for digest in self._digests:
            found |= hmac.compare_digest(digest, presented)
        if not found:
            what = "incorrect API key" if authorization else "no API key was sent"
            raise RequestError(what, code="invalid_api_key", status=401)
        return presented.hex()[:8]


def _presented_key(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(value, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return ""
        return text.partition(":")[2]
    return ""


class Gate:
    """ASGI middleware around all routes: origins, keys, request ids, log, counters."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        metrics: Metrics | None,
        access_log: AccessLog | None,
        tracing: Tracing | None = None,
        origins: Origins,
    ) -> None:
        self._app = app
        self._keys = keys
        self._origins = origins
        self._metrics = metrics
        self._access_log = access_log
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        call = Call(
            "-",
            _request_id(headers),
            path=scope["path"],
            user_agent=headers.get(b"user-agent", b"").decode("latin-1"),
        )
        start = time.perf_counter()
        asked, scope = scope, _as_routed(scope)
        span = None
        if self._tracing is not None:
            span = self._tracing.begin(asked["method"], asked["path"], headers)
        marked = _Marked(
            send,
            [(b"x-request-id", call.request_id.encode()), *self._origins.response_headers(headers)],
            has_body=asked["method"] != "HEAD",
        )
        try:
            try:
                answer: ASGIApp = self._preflight(scope, headers) or self._app
                if answer is self._app and not is_open(scope["method"], scope["path"]):
                    call.key = self._keys.name_of(_sent_key(headers))
                scope.setdefault("state", {})["call"] = call
            except RequestError as error:
                answer = response_of(error, path=scope["path"])
            await answer(scope, receive, marked)
        finally:
            # Only known paths become labels; anything else would let clients grow the page.
            route = getattr(scope.get("route"), "path", "other")
            if self._metrics is not None:
                self._metrics.count_http(route, marked.status)
            if self._tracing is not None:
                self._tracing.end(span, route, marked.status, call)
            if self._access_log is not None:
                seconds = time.perf_counter() - start
                self._access_log(_line(asked, call, marked.status, seconds))

    def _preflight(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        """The answer to a browser that asks what a page may do, without a key; None for others.

        Raises RequestError for a head that is not sound, and for a page that may not ask.
        """
        _check_framing(scope)
        self._origins.check(scope["method"], headers)
        allowed = self._origins.preflight(scope["method"], headers)
        if allowed is None:
            return None
        answer = Response(status_code=204)
        answer.raw_headers += allowed
        return answer


class _Marked:
    """Sends an answer with our headers, without its body if only its head was asked for.

    status   of the answer; 0 until it begins
    """

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], *, has_body: bool) -> None:
        self._send = send
        self._headers = headers
        self._has_body = has_body
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        elif message["type"] == "http.response.body" and not self._has_body:
            message = {**message, "body": b""}
        await self._send(message)


def _as_routed(scope: Scope) -> Scope:
    """The request as the routes know it: HEAD as GET, whose head is the same; no prefix."""
    routed = dict(scope)
    if scope["method"] == "HEAD":
        routed["method"] = "GET"
    if scope["path"].startswith(MISTRAL_PREFIX + "/"):
        routed["path"] = scope["path"].removeprefix(MISTRAL_PREFIX)
    return routed


def _sent_key(headers: dict[bytes, bytes]) -> str:
    """What names the key, in the form of an Authorization header; "" if nothing does."""
    sent = headers.get(b"authorization", b"")
    if not sent and (key := headers.get(b"x-api-key")):
        # Where clients of /v1/messages put it.
        sent = b"Bearer " + key
    return sent.decode("latin-1")


def _check_framing(scope: Scope) -> None:
    """RequestError for a head that two readers could understand in two ways."""
    names = [name for name, _ in scope["headers"]]
    if scope["http_version"] not in ("1.0", "1.1"):
        raise RequestError(
            f"HTTP/{scope['http_version']} is not spoken here; HTTP/1.1 is",
            code="unsupported_http_version",
            status=505,
        )
    if b"content-length" in names and b"transfer-encoding" in names:
        raise RequestError(
            "the request has both Content-Length and Transfer-Encoding; send one of them",
            code="invalid_http",
        )
    for name in _ONCE:
        if names.count(name) > 1:
            shown = name.decode().title()
            raise RequestError(
                f"the request has {names.count(name)} {shown} headers; send one",
                param=shown,
                code="invalid_http",
            )


def _request_id(headers: dict[bytes, bytes]) -> str:
    sent = headers.get(b"x-request-id", b"")
    return sent.decode() if _REQUEST_ID.match(sent) else f"req-{uuid.uuid4().hex[:16]}"


def _line(scope: Scope, call: Call, status: int, seconds: float) -> str:
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "request_id": call.request_id,
        "client": (scope.get("client") or ("-",))[0],
        "key": call.key,
        "method": scope["method"],
        "path": scope["path"],
        # 0: the client left before anything was sent.
        "status": status,
        "ms": round(seconds * 1000, 1),
        **{name: value for name, value in call.facts.items() if value is not None},
    }
    return json.dumps(line)


def log_access(line: str) -> None:
    """Write one access log entry among the other log lines."""
    logger.info("access %s", line)


def file_log(path: Path) -> AccessLog:
    """The access log in a file of its own, one JSON object a line; UsageError if it cannot be.

    Opened for every line, so that the file may be moved away at any time.
    """

    def write(line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.error("access log %s: %s", path, error)

    if path.is_fifo():
        raise UsageError(
            f"cannot write the access log {path}: it is a FIFO, which makes writers wait"
        )
    try:
        path.open("a", encoding="utf-8").close()
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise UsageError(f"cannot write the access log {path}: {in_words(error)}") from error
    return write
