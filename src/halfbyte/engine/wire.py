"""What goes between the engine and whoever asks it, over one socket. No torch.

`service` is the asking side, `host` the engine's. A message is pickled; arrays go beside it as they
are, so that pictures are not copied more often than they must. Both sides trust each other: this is
one program in two processes.
"""

import contextlib
import pickle
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine.options import EngineConfig
from halfbyte.engine.request import Event, GenerationRequest
from halfbyte.engine.stats import EngineStats
from halfbyte.errors import HalfbyteError, RequestError

# Bytes of the pickled message, and number of arrays beside it; then the bytes of each of these.
_HEAD = struct.Struct("<QI")
_SIZE = struct.Struct("<Q")
# What a socket holds of what the other side has not read, as far as the system lets it.
_BUFFER_BYTES = 4_000_000
_PIECE_BYTES = 262_144

# --- to the engine --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """Load a checkpoint; the first message, and answered by Loaded or Failed."""

    directory: Path
    config: EngineConfig
    log_level: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Pixels that requests to come refer to by their digest."""

    digest: bytes
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Forget:
    """Pixels that no request to come refers to."""

    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """An `ImageInput` of a request whose pixels were sent before."""

    digest: bytes
    offset: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Add:
    """A request to run; its images stand in `pictures`."""

    request: GenerationRequest
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class Abort:
    """End an answer; its stream still gets its FinishEvent."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ClearPrefixCache:
    """Forget all cached prefixes between two of the engine's steps."""


@dataclass(frozen=True, slots=True)
class TellStacks:
    """Say where every thread of the engine's process is."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End all answers, close the engine and leave."""


Command = Load | Keep | Forget | Add | Abort | ClearPrefixCache | TellStacks | Stop

# --- from the engine ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine is ready: its resolved configuration and what it says of itself."""

    config: EngineConfig
    max_model_len: int
    vocab_size: int
    facts: Mapping[str, object]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Failed:
    """Loading ended: of `error`, or of something unforeseen that `text` describes."""

    text: str
    error: HalfbyteError | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """All events of a step, or of what commands brought about, and the figures after it."""

    events: tuple[Event, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Refused:
    """A request was refused, since it can never run here."""

    request_id: str
    error: RequestError


@dataclass(frozen=True, slots=True)
class Stacks:
    """Where every thread of the engine's process is now."""

    text: str


@dataclass(frozen=True, slots=True)
class Died:
    """The engine has failed, and its process is about to end."""

    text: str


Report = Loaded | Failed | Stepped | Refused | Stacks | Died

# --- the socket -----------------------------------------------------------------------------


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection with room for what is not read at once."""
    ends = socket.socketpair()
    for one in ends:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return ends


def send(connection: socket.socket, message: Command | Report) -> None:
    """Send a message, waiting for room. OSError if the other side has gone."""
    arrays: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    sizes = b"".join(_SIZE.pack(view.nbytes) for view in views)
    connection.sendall(b"".join((_HEAD.pack(len(data), len(views)), sizes, data)))
    for view in views:
        connection.sendall(view)


def hang_up(connection: socket.socket) -> None:
    """Close a connection, also where a thread waits in it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def receive(connection: socket.socket) -> Command | Report:
    """The next message, waiting for it. EOFError if the other side has gone."""
    size, num_arrays = _HEAD.unpack(_taken(connection, _HEAD.size))
    sizes = _taken(connection, num_arrays * _SIZE.size)
    data = _taken(connection, size)
    arrays = [_taken(connection, array_size) for (array_size,) in _SIZE.iter_unpack(sizes)]
    message: Command | Report = pickle.loads(data, buffers=arrays)
    return message


def _taken(connection: socket.socket, size: int) -> bytearray:
    """So many bytes, waiting for them."""
    found = bytearray(size)
    rest = memoryview(found)
    while rest:
        try:
            count = connection.recv_into(rest)
        except ConnectionResetError:
            count = 0
        if not count:
            raise EOFError("the other side has gone")
        rest = rest[count:]
    return found


class Reader:
    """Messages of a socket as they come, without waiting; they bring no arrays."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = bytearray()

    def read(self) -> list[Report]:
        """The messages that have arrived whole. EOFError if the other side has gone."""
        try:
            piece = self._connection.recv(_PIECE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise EOFError("the other side has gone")
        self._unread += piece
        messages: list[Report] = []
        start = 0
        while len(self._unread) >= start + _HEAD.size:
            size, num_arrays = _HEAD.unpack_from(self._unread, start)
            assert not num_arrays, "reports bring no arrays"
            end = start + _HEAD.size + size
            if len(self._unread) < end:
                break
            with memoryview(self._unread) as view:
                messages.append(pickle.loads(view[start + _HEAD.size : end]))
            start = end
        del self._unread[:start]
        return messages
