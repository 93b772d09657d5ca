"""HTTP mechanics: server-sent events that notice a client leaving, bodies with a limit.

Both kinds of answer stop their work the moment the client disconnects, also while nothing is being
sent: queued, in a prefill, or collecting an answer that is not streamed.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from halfbyte.errors import RequestError
from halfbyte.server.problems import response_of, status_and_body

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


def frame(value: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return (
        f"{name}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
    )


def deadline_error(seconds: float) -> RequestError:
    """What a request over the wall-clock limit gets."""
    return RequestError(f"the answer took longer than {seconds:g} s", code="timeout", status=504)


class EventStream(Response):
    """An ASGI response that sends the frames of a generator.

    The status waits for the first frame, so that what goes wrong before it has its own status. What
    goes wrong later ends the stream with an error frame. A client that leaves closes the generator.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        deadline_s: float,
        headers: dict[str, str],
        on_disconnect: Callable[[], None],
        retry_after_s: int,
        error_tail: bytes = DONE,
    ) -> None:
        super().__init__()
        self._frames = frames
        self._deadline_s = deadline_s
        # Filled by the generator before its first frame, hence not given to the base class.
        self._own_headers = headers
        self._on_disconnect = on_disconnect
        self._retry_after_s = retry_after_s
        self._error_tail = error_tail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(scope, receive, send))
        watch = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                self._on_disconnect()
        finally:
            for task in (pump, watch):
                task.cancel()
            results = await asyncio.gather(pump, watch, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False
        async with contextlib.aclosing(self._frames):
            try:
                async with asyncio.timeout(self._deadline_s):
                    async for piece in self._frames:
                        if not has_started:
                            has_started = True
                            await self._start(send)
                        await _send_body(send, piece)
            except TimeoutError:  # is an OSError, hence first
                await self._fail(
                    deadline_error(self._deadline_s), has_started, scope, receive, send
                )
                return
            except OSError:
                # The connection broke under us; the watcher says the same.
                return
            except Exception as error:
                await self._fail(error, has_started, scope, receive, send)
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self._own_headers,
        }
        raw = [
            (name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()
        ]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _fail(
        self, error: Exception, has_started: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if not has_started:
            await response_of(error, self._retry_after_s)(scope, receive, send)
            return
        _, body = status_and_body(error)
        await _send_body(send, frame(body, "error" if self._error_tail == b"" else None))
        await send({"type": "http.response.body", "body": self._error_tail, "more_body": False})


async def until_disconnect(
    request: Request,
    work: Coroutine[Any, Any, Result],
    *,
    deadline_s: float,
    on_disconnect: Callable[[], None],
) -> Result:
    """Run `work` unless the client leaves first (ClientDisconnect) or the time is over (504)."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_until_disconnect(request.receive))
    try:
        done, _ = await asyncio.wait(
            {task, watch}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if watch in done:
            on_disconnect()
            raise ClientDisconnect
        raise deadline_error(deadline_s)
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body; 413 as soon as it is known to exceed the limit."""
    too_large = RequestError(
        f"the body exceeds {limit_bytes:,} bytes", code="request_too_large", status=413
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
