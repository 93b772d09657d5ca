"""Runs an application on a socket: in the foreground until a signal, or behind a caller.

Uvicorn does HTTP, within the bounds of `connections`. What is ours: the moment of readiness, and an
orderly end - on SIGTERM or SIGINT the server stops accepting, lets running answers finish for the
drain time, ends the others with an error that says so, and returns normally.
"""

import asyncio
import contextlib
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from halfbyte.errors import UsageError
from halfbyte.log import logger
from halfbyte.machine import settle_heap
from halfbyte.server.api.backend import Backend
from halfbyte.server.http.connections import Bounds, Listener, bounded

# In which answers that were ended say so, before their connections are closed.
_LAST_WORDS_S = 3

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


# The admin application and its listening socket.
Admin = tuple[FastAPI, socket.socket]


class _Quiet(uvicorn.Server):
    """Uvicorn inside another: signals are not its business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server(uvicorn.Server):
    """Uvicorn, with our start, our signals and our end."""

    def __init__(
        self,
        config: uvicorn.Config,
        backend: Backend,
        on_ready: Callable[[str], None],
        admin: Admin | None,
    ) -> None:
        super().__init__(config)
        self._backend = backend
        self._on_ready = on_ready
        self._admin = admin
        self._admin_server: uvicorn.Server | None = None
        self._admin_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started or not sockets:
            return
        if self._admin is not None:
            app, listener = self._admin
            bounds = Bounds.of(self._backend.config.limits, share=0.1)
            self._admin_server = _Quiet(_config(app, bounds, drain_s=1))
            self._admin_task = asyncio.create_task(
                self._admin_server.serve(sockets=[listener]), name="admin listener"
            )
        self._on_ready(address(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The admin listener goes last: draining is when it is wanted."""
        ending = asyncio.create_task(self._end_answers(), name="end of draining")
        await super().shutdown(sockets)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        if self._admin_server is not None and self._admin_task is not None:
            self._admin_server.should_exit = True
            await self._admin_task

    async def _end_answers(self) -> None:
        """When the drain time is over: end what runs, so that every stream gets its last frame."""
        await asyncio.sleep(self._backend.config.limits.drain_s)
        await self._backend.service.stop(drain_s=0.0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Our handlers while serving. Uvicorn would raise the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: now."""
        if not self.should_exit:
            num_running = self._backend.metrics.running
            logger.info("stopping: %d answers may finish", num_running)
        self._backend.admission.is_draining = True
        super().handle_exit(signal.SIGINT if self.should_exit else sig, frame)


def address(listener: socket.socket) -> str:
    """The URL of a listening socket; a wildcard address is shown as the local host's."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes a free one. UsageError if it cannot be had."""
    listener = Listener(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    listener.set_inheritable(True)
    return listener


def serve(
    app: FastAPI,
    listener: socket.socket,
    on_ready: Callable[[str], None],
    admin: Admin | None = None,
) -> bool:
    """Serve until a signal; False if the application did not start or its engine died."""
    server = _server(app, on_ready, admin)
    settle_heap()
    # A thread gives Python's lock up after so long, much sooner than by default: what reads
    # requests in a thread must not hold up the loop that frames running answers.
    sys.setswitchinterval(0.00005)
    asyncio.run(server.serve(sockets=[listener]))
    return server.started


@contextlib.contextmanager
def serving(app: FastAPI, admin: Admin | None = None) -> Iterator[str]:
    """Serve on a free local port from a thread while the body runs; yields the URL."""
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = _server(app, lambda url: ready.set(), admin)

    def work() -> None:
        asyncio.run(server.serve(sockets=[listener]))
        ready.set()

    thread = threading.Thread(target=work, name="halfbyte-server")
    thread.start()
    try:
        ready.wait()
        if not server.started:
            raise UsageError("the server did not start; see the log")
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join()


def _server(app: FastAPI, on_ready: Callable[[str], None], admin: Admin | None = None) -> _Server:
    backend: Backend = app.state.backend
    limits = backend.config.limits
    # The admin listener has a share of its own: it is wanted most when the other one is full.
    bounds = Bounds.of(limits, share=1.0 if admin is None else 0.9)
    config = _config(app, bounds, drain_s=limits.drain_s + _LAST_WORDS_S)
    return _Server(config, backend, on_ready, admin)


def _config(app: FastAPI, bounds: Bounds, *, drain_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded(bounds),
        backlog=bounds.backlog,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(math.ceil(drain_s), 1),
    )
