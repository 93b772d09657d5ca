"""HTTP mechanics: server-sent events that notice a client leaving, bodies with a limit.

Both kinds of answer stop their work the moment the client disconnects, also while nothing is being
sent: queued, in a prefill, or collecting an answer that is not streamed.
"""

import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, BinaryIO, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from halfbyte.errors import RequestError
from halfbyte.machine import trim_heap
from halfbyte.server.api.problems import body_for, response_of, status_and_body
from halfbyte.server.config import Limits

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
# A comment, which every reader of server-sent events skips.
_KEEP_ALIVE = b": keep-alive\n\n"

# Bytes of a body that is read on the event loop: two milliseconds where every few of them are
# another fault to be told.
SHORT_BODY = 4096
# Bodies up to here are read without asking for room.
_SMALL_BODY = 250_000
# After a large body; its request is mostly answered by then.
_TRIM_S = 0.5
# A body that comes more slowly is given up, some time after its beginning.
_SLOWEST_BYTES_S = 50_000


def frame(value: Any, event: str | None = None) -> bytes:
    """Frame one JSON text as a server-sent event, in bytes."""
    name = f"event: {event}\n" if event else ""
    return (
        f"{name}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
    )


def deadline_error(seconds: float) -> RequestError:
    """The error (504) that a request over the wall-clock limit gets."""
    return RequestError(f"the answer took longer than {seconds:g} s", code="timeout", status=504)


class EventStream(Response):
    """An ASGI response that sends the frames of a generator.

    The status waits a few seconds for the first frame, so that what goes wrong before it has its
    own status. What goes wrong later ends the stream with an error frame. While there is nothing to
    send, comments keep proxies from taking the connection for dead. A client that leaves closes the
    generator.

    head_wait_s     how long the status waits
    keep_alive_s    the longest silence after it
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
        head_wait_s: float = 3.0,
        keep_alive_s: float = 10.0,
    ) -> None:
        super().__init__()
        self._head_wait_s = head_wait_s
        self._keep_alive_s = keep_alive_s
        self._has_started = False
        self._sent_s = time.monotonic()
        # A head is sent once, and by whoever comes first.
        self._sending = asyncio.Lock()
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
        alive = asyncio.create_task(self._keep_alive(send))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                self._on_disconnect()
        finally:
            for task in (pump, watch, alive):
                task.cancel()
            results = await asyncio.gather(pump, watch, alive, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._frames):
            try:
                async with asyncio.timeout(self._deadline_s):
                    async for piece in self._frames:
                        if piece:
                            await self._send(send, piece)
            except TimeoutError:  # is an OSError, hence first
                await self._fail(deadline_error(self._deadline_s), scope, receive, send)
                return
            except OSError:
                # The connection broke under us; the watcher says the same.
                return
            except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
                raise
            # A panic of foreign code is no Exception, and must not cut the stream off.
            except BaseException as error:
                await self._fail(error, scope, receive, send)
                return
        async with self._sending:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Send the head if nothing came for a while, and a comment into each long silence."""
        await asyncio.sleep(self._head_wait_s)
        if not self._has_started:
            await self._send(send, _KEEP_ALIVE)
        while True:
            silent_s = time.monotonic() - self._sent_s
            if silent_s >= self._keep_alive_s:
                await self._send(send, _KEEP_ALIVE)
                silent_s = 0.0
            await asyncio.sleep(self._keep_alive_s - silent_s)

    async def _send(self, send: Send, body: bytes) -> None:
        async with self._sending:
            if not self._has_started:
                self._has_started = True
                await self._start(send)
            self._sent_s = time.monotonic()
            await _send_body(send, body)

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

    async def _fail(self, error: BaseException, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_started:
            # From here on the status is this error's.
            self._has_started = True
            respond = response_of(error, self._retry_after_s, path=scope["path"])
            async with self._sending:
                await respond(scope, receive, send)
            return
        body = body_for(scope["path"], *status_and_body(error))
        await self._send(send, frame(body, "error" if self._error_tail == b"" else None))
        async with self._sending:
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


class BodyRoom:
    """Bytes of large bodies that are read at once; more of them wait, first come, first served."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._trim: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def hold(self, num_bytes: int, patience_s: float) -> AsyncIterator[None]:
        """Keep room for so many bytes while the body runs; RequestError (503) if none is free."""
        num_bytes = min(num_bytes, self._size)
        try:
            async with asyncio.timeout(patience_s), self._turn:
                while self._free < num_bytes:
                    self._freed.clear()
                    await self._freed.wait()
                self._free -= num_bytes
        except TimeoutError as error:
            message = "the server is reading as many large requests as it can; try again"
            raise RequestError(message, code="too_busy", status=503) from error
        try:
            yield
        finally:
            self._free += num_bytes
            self._freed.set()
            self.trim_soon()

    def trim_soon(self) -> None:
        """Give freed memory back to the system soon; the C library would keep it."""
        if self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(_TRIM_S, self._give_back)

    def _give_back(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, trim_heap)


class Body:
    """A request's body as it comes: in memory while short, then in a nameless file.

    A long one is read by another process. Here it would be copied as it grows, and what it leaves
    would be given back under a lock that the engine's allocations wait for.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.size = 0
        self._file: BinaryIO | None = None

    @property
    def descriptor(self) -> int | None:
        """Descriptor of the file that holds the whole body; None while `data` holds it."""
        return None if self._file is None else self._file.fileno()

    def add(self, chunk: bytes) -> None:
        """Append the next bytes of the body, to memory or to the file."""
        self.size += len(chunk)
        if self._file is None and self.size <= SHORT_BODY:
            self.data += chunk
            return
        if self._file is None:
            self._file = _nameless_file()
            self._file.write(self.data)
            self.data.clear()
        self._file.write(chunk)

    def close(self) -> None:
        """Close the nameless file, which removes it from the disk."""
        if self._file is not None:
            self._file.close()


def _nameless_file() -> BinaryIO:
    """Open an unbuffered file without a name, in memory if possible; RequestError if none."""
    try:
        if hasattr(os, "memfd_create"):
            return open(os.memfd_create("body"), "wb", buffering=0)
        return cast("BinaryIO", tempfile.TemporaryFile(buffering=0))
    except OSError as error:
        raise RequestError(
            f"the server has no file left for a long body ({error.strerror}); try again later",
            code="too_busy",
            status=503,
        ) from error


@contextlib.asynccontextmanager
async def reading_body(request: Request, limits: Limits, room: BodyRoom) -> AsyncIterator[Body]:
    """The whole body; a large one has its room while this is open.

    RequestError: 413 as soon as it is known to exceed the limit, 408 when it does not come in time.
    """
    most = limits.body_bytes
    sent = request.headers.get("content-length", "")
    # 20 digits are what h11 lets through.
    length = int(sent) if sent.isascii() and sent.isdigit() else None
    if length is not None and length > most:
        raise _too_large(most)
    body = Body()
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + limits.body_s
    chunks = request.stream()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(body.close)
        has_room = False
        while True:
            try:
                async with asyncio.timeout_at(deadline_s + body.size / _SLOWEST_BYTES_S):
                    chunk = await anext(chunks, None)
            except TimeoutError as error:
                raise RequestError(
                    f"the request's body did not come within {limits.body_s:g} s and "
                    f"{_SLOWEST_BYTES_S:,} bytes a second",
                    code="timeout",
                    status=408,
                ) from error
            if chunk is None:
                break
            if body.size + len(chunk) > most:
                raise _too_large(most)
            body.add(chunk)
            if not has_room and body.size > _SMALL_BODY:
                has_room = True
                waiting_since_s = loop.time()
                await stack.enter_async_context(
                    room.hold(most if length is None else length, limits.body_s)
                )
                deadline_s += loop.time() - waiting_since_s
        yield body


def _too_large(limit_bytes: int) -> RequestError:
    return RequestError(
        f"the body exceeds {limit_bytes:,} bytes", code="request_too_large", status=413
    )


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
