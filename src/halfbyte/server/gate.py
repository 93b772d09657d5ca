"""The middleware around all routes: request ids, API keys, the access log, HTTP counters."""

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfbyte.errors import RequestError
from halfbyte.log import logger
from halfbyte.server.metrics import Metrics
from halfbyte.server.problems import response_of

# Liveness probes carry no key.
OPEN_PATHS = frozenset({"/health", "/health/ready"})

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")


class Keys:
    """API keys, kept as digests and compared in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
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
    """ASGI middleware; see the file's first line."""

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: Metrics, access_log: bool) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        request_id = (
            sent_id.decode() if _REQUEST_ID.match(sent_id) else f"req-{uuid.uuid4().hex[:16]}"
        )
        start = time.perf_counter()
        status, key = 0, "-"

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": marked}
            await send(message)

        try:
            try:
                if scope["path"] not in OPEN_PATHS:
                    key = self._keys.name_of(headers.get(b"authorization", b"").decode("latin-1"))
            except RequestError as error:
                await response_of(error)(scope, receive, send_marked)
                return
            scope.setdefault("state", {})
            scope["state"]["key"] = key
            scope["state"]["request_id"] = request_id
            await self._app(scope, receive, send_marked)
        finally:
            self._finish(scope, request_id, key, status, time.perf_counter() - start)

    def _finish(self, scope: Scope, request_id: str, key: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        # Only known paths become labels; anything else would let clients grow the page.
        self._metrics.count_http(getattr(route, "path", "other"), status)
        if self._access_log:
            line = {
                "request_id": request_id,
                "client": (scope.get("client") or ("-",))[0],
                "key": key,
                "method": scope["method"],
                "path": scope["path"],
                # 0: the client left before anything was sent.
                "status": status,
                "ms": round(seconds * 1000, 1),
            }
            logger.info("access %s", json.dumps(line))
