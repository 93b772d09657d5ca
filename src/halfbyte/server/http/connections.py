"""TCP and HTTP below the application: how many connections there are, and for how long.

Uvicorn and h11 read HTTP. What they leave open is here: a listening socket that survives running
out of file descriptors, time limits for a request's head, for the rest of a body that nobody wants
and for a client that takes nothing, room for new connections at the cost of idle ones, and turns
for what arrives at once, so that answers under way do not wait for a crowd.
"""

import asyncio
import collections
import contextlib
import errno
import http
import json
import os
import resource
import socket
import time
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from halfbyte.log import logger
from halfbyte.server.api.problems import error_body
from halfbyte.server.config import Limits

# Connections that the kernel may hold for us; what it refuses tries again a second later.
_QUEUE = 1024
# Those that asyncio takes at once before any is looked at, and before it does anything else.
BACKLOG = 4
# Descriptors for files, pipes and what the server itself connects to, beyond those open already.
_SPARE_FILES = 64
# More than these serve nothing here.
_MOST_FILES = 65_536
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Between two lines about the same trouble.
_QUIET_S = 60.0


class Listener(socket.socket):
    """A listening TCP socket whose `accept` does not fail for want of file descriptors.

    Asyncio answers such a failure with a traceback and another try, for each place of the backlog
    and every second more of them. Here a descriptor held back for it is given up for a moment: the
    connection is taken and closed, its client knows at once, and the log has one line a minute.
    """

    def __init__(self, family: int) -> None:
        # The protocol is named because asyncio sets TCP_NODELAY only where it is; without, the
        # head and the body of an answer meet Nagle's algorithm and delayed acknowledgements.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._say = _Seldom()

    def accept(self) -> tuple[socket.socket, Any]:
        """A connection; BlockingIOError if there is none, or none that could be kept."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _OUT_OF_FILES:
                raise
            self._say.warn(f"connections are closed unanswered: {error.strerror}")
            self._shed()
            raise BlockingIOError(errno.EAGAIN, "out of descriptors") from error

    def listen(self, backlog: int = _QUEUE, /) -> None:
        """Listen with a long queue; asyncio takes as many connections in one go as it names."""
        super().listen(max(backlog, _QUEUE))

    def close(self) -> None:
        """Close the socket and what was held back."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        super().close()

    def _shed(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            super().accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


class _Seldom:
    """Says something once a minute at most."""

    def __init__(self) -> None:
        self._last_s = -_QUIET_S

    def warn(self, message: str) -> None:
        """Log it, unless something was said lately."""
        now = time.monotonic()
        if now - self._last_s >= _QUIET_S:
            self._last_s = now
            logger.warning("%s", message)


def raise_file_limit() -> int:
    """Allow this process more open files, if it may have more; returns how many it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the connections of one listener may take.

    connections  at once; the kernel's limit of open files may leave fewer than configured
    backlog      waiting to be accepted
    head_s       for a request's head, and for the rest of a body after its answer
    stall_s      in which a client must take something of what waits for it
    """

    connections: int
    backlog: int
    head_s: float
    stall_s: float

    @classmethod
    def of(cls, limits: Limits, *, share: float = 1.0) -> "Bounds":
        """A share of the limits, within the file descriptors that are left."""
        open_now = len(os.listdir("/proc/self/fd"))
        free = int((raise_file_limit() - open_now) * share)
        # Few files allowed: keep a quarter of what there is for other uses.
        spare = min(_SPARE_FILES, free // 4)
        # Those accepted in one go are open before the first is counted.
        backlog = max(min(BACKLOG, (free - spare) // 4), 1)
        connections = min(int(limits.connections * share), free - spare - backlog)
        return cls(max(connections, 1), backlog, limits.head_s, limits.stall_s)


def bounded(bounds: Bounds) -> type[H11Protocol]:
    """A protocol class for uvicorn that refuses what exceeds the bounds."""
    say, turns = _Seldom(), _Turns()

    class Connection(_Connection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.bounds = bounds
            self.say = say
            self.turns = turns

    return Connection


class _Turns:
    """Spreads what arrives at once over several turns of the event loop, first come, first served.

    A loop does everything that is ready before it looks again: with 300 requests at once, the next
    token of a stream would wait for all of them. Here each turn reads one piece of one connection,
    which may begin a request: up to a millisecond of work. The others wait, unread in the kernel
    but for one piece each, so that few are in work. A GET goes first: it brings no body, and
    whoever watches the server asks so.
    """

    def __init__(self) -> None:
        self._first: collections.deque[tuple[_Connection, bytes]] = collections.deque()
        self._then: collections.deque[tuple[_Connection, bytes]] = collections.deque()
        # This turn of the loop has had its piece.
        self._is_taken = False

    def take(self, connection: "_Connection", data: bytes) -> None:
        """Give a connection what it received, now or in its turn."""
        if not self._is_taken:
            self._read(connection, data)
            return
        # Nothing more comes of it meanwhile, so that its pieces stay in order.
        connection.transport.pause_reading()
        (self._first if data.startswith(b"GET ") else self._then).append((connection, data))

    def _read(self, connection: "_Connection", data: bytes) -> None:
        self._is_taken = True
        connection.loop.call_soon(self._next)
        connection.read(data)

    def _next(self) -> None:
        """Begin another turn, with whatever has waited longest."""
        self._is_taken = False
        while not self._is_taken and (waiting := self._first or self._then):
            connection, data = waiting.popleft()
            if not connection.transport.is_closing():
                connection.transport.resume_reading()
                self._read(connection, data)


class _Connection(H11Protocol):
    """One connection. Timers run on the event loop; every method is called there."""

    bounds: Bounds
    say: _Seldom
    turns: _Turns

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self.idle_since_s = time.monotonic()

    # --- what a connection may take ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections and not self._make_room():
            self.say.warn(f"{len(self.connections) - 1} connections are busy; others get 503")
            self._refuse(503, "every connection of this server is busy; try again", "too_busy")
            return
        self._watch_head()

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for its client; False if none does."""
        others = [one for one in self.connections if one is not self]
        waiting = [one for one in others if isinstance(one, _Connection) and one.awaits_client]
        if not waiting:
            return False
        # Those that owe a head go before those that owe the rest of a body.
        oldest = min(waiting, key=lambda one: (one.is_receiving_body, one.idle_since_s))
        oldest.transport.abort()
        # Its own end comes with the next turn of the loop; until then it counts no more.
        self.connections.discard(oldest)
        return True

    @property
    def is_receiving_body(self) -> bool:
        """A request's head is here, its body is not."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and cycle.more_body

    @property
    def awaits_client(self) -> bool:
        """The next move is the client's."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    # --- time limits ---

    def data_received(self, data: bytes) -> None:
        self.turns.take(self, data)

    def read(self, data: bytes) -> None:
        """Read what arrived, in its turn."""
        super().data_received(data)
        if self._owes_something():
            self._watch_head()
        else:
            self._unwatch_head()

    def on_response_complete(self) -> None:
        self.idle_since_s = time.monotonic()
        super().on_response_complete()
        # A pipelined request may have begun, or a body be left that is dropped as it comes.
        if self._owes_something() and (self._has_begun() or not self._is_between()):
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_head()
        self._unwatch_stall()
        super().connection_lost(exc)

    def _is_between(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _has_begun(self) -> bool:
        return self._is_between() and bool(self.conn.trailing_data[0])

    def _owes_something(self) -> bool:
        """A head, or the rest of a body whose request is answered."""
        if self._is_between():
            return True
        is_answered = self.cycle is not None and self.cycle.response_complete
        return is_answered and self.conn.their_state is h11.SEND_BODY

    def _watch_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.bounds.head_s, self._head_is_late)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._has_begun():
            seconds = self.bounds.head_s
            self._refuse(408, f"the request's head took longer than {seconds:g} s", "timeout")
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.bounds.stall_s, self._is_stalled)

    def resume_writing(self) -> None:
        self._unwatch_stall()
        super().resume_writing()

    def _unwatch_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _is_stalled(self) -> None:
        self._stall_timer = None
        self.transport.abort()

    # --- refusals without the application ---

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read, in the one form of errors."""
        if self.cycle is not None and self.cycle.response_started:
            # An answer is under way or was the last word: nothing can be added to it.
            self.transport.close()
            return
        self._refuse(400, "the request is not valid HTTP", "invalid_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        body = json.dumps(error_body(message, status, code=code)).encode()
        again = "retry-after: 2\r\n" if status == 503 else ""
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"{again}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
