"""Long requests are read, and long texts encoded, in processes of their own.

Readers of JSON and tokenizers hold Python's lock for as long as they work, 30 ms for a text of 31
MB; every token of every running answer would wait for it (decision 0109). So what is long goes to
another process. If that one dies of a request, only this request fails.

The processes are forked from one that has loaded the tokenizer and never sees a request. This side
is `Aside`, which belongs to the event loop; `main` is the other.
"""

import asyncio
import contextlib
import dataclasses
import gc
import mmap
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from halfbyte import processes
from halfbyte.chat.tokens import load_chat
from halfbyte.errors import HalfbyteError, RequestError
from halfbyte.log import logger
from halfbyte.machine import give_way, keep_one_heap, trim_heap
from halfbyte.server.api.reader import Reader
from halfbyte.server.config import ServerConfig

Result = TypeVar("Result")
Lane = Literal["short", "long"]

# Characters of a text or token ids up to which a trip to another process costs more than the work.
_FEW = 4096
# The longest rest between two works here: libraries hold the interpreter for milliseconds.
_REST_S = 0.02
# What takes longer than a moment has processes of its own: short prompts never wait for it.
_MANY = 65_536

_LANES: tuple[Lane, ...] = ("short", "long")
# Beyond it memory is given back after the work.
_LARGE = 1_000_000
# Results up to here are taken up on the event loop: a fraction of a millisecond.
_FEW_BYTES = 16_384
# How one ends when nobody asks any more.
_NOBODY_ASKS = 3
_HEAD = struct.Struct("<Q")
_BEGUN = b"b"


class Aside:
    """One model's reader, here for what is short, in other processes for what is long."""

    def __init__(self, reader: Reader, directory: Path, config: ServerConfig) -> None:
        self._reader = reader
        # No process needs the keys.
        config = dataclasses.replace(config, api_keys=(), facts=())
        self._setting = pickle.dumps((directory, config), pickle.HIGHEST_PROTOCOL)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beside")
        # When the thread has rested from its last work.
        self._rested_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._controls: dict[Lane, socket.socket] = {}
        self._end: Callable[[], Any] = lambda: None
        self._turns = {lane: asyncio.Semaphore(_num_processes()) for lane in _LANES}

    def start(self) -> None:
        """Start the processes, if they are not there; the first questions wait for them."""
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        pairs = {lane: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for lane in _LANES}
        descriptors = [theirs.fileno() for _, theirs in pairs.values()]
        process = processes.start(
            "halfbyte.server.api.aside",
            descriptors,
            setting=self._setting,
            # No threads before a fork.
            environment={"OPENBLAS_NUM_THREADS": "1"},
        )
        for ours, theirs in pairs.values():
            theirs.close()
            ours.setblocking(False)
        self._process = process
        self._controls = {lane: ours for lane, (ours, _) in pairs.items()}
        self._end = weakref.finalize(self, _end, tuple(self._controls.values()), process)

    def close(self) -> None:
        """End the processes, and forget what has not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()
        self._process = None

    async def do(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """What a method of the reader gives for these arguments, of so many characters or ids.

        Raises RequestError as the method does; 500 if the process has died of it, 503 if there is
        none to be had.
        """
        if size <= _FEW:
            return await self.do_beside(work, *arguments)
        return await self.do_apart(size, work, *arguments)

    async def do_beside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do some milliseconds of any work in this process, beside the event loop.

        One thread does all of it: the loop waits for Python's lock behind one other at most. Work
        should be Python's own rather than one long call of a library, which does not give way.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._worked, work, arguments)

    async def do_apart(
        self, size: int, work: Callable[..., Result], *arguments: Any, file: int | None = None
    ) -> Result:
        """The same in another process, whatever the size.

        file  a descriptor whose content is one more argument
        """
        lane: Lane = "short" if size <= _MANY else "long"
        question = pickle.dumps((work.__name__, arguments), pickle.HIGHEST_PROTOCOL)
        async with self._turns[lane]:
            for _ in range(3):
                try:
                    self.start()
                except OSError as error:
                    raise _busy() from error
                try:
                    found = await self._ask(self._controls[lane], question, file)
                except _NotBegunError:
                    # Somebody else's request has ended it.
                    continue
                if isinstance(found, _Broken):
                    logger.error("%s in a process aside has failed:\n%s", work.__name__, found.text)
                    raise RuntimeError(found.text.strip().rpartition("\n")[2])
                if isinstance(found, HalfbyteError):
                    try:
                        raise found
                    finally:
                        # Its traceback has this frame: the request would wait for a collection.
                        del found
                result: Result = found
                return result
        raise _busy()

    def _worked(self, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        """Do it, after a rest as long as the work before: running answers are framed meanwhile."""
        time.sleep(max(0.0, self._rested_s - time.perf_counter()))
        started_s = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            ended_s = time.perf_counter()
            self._rested_s = ended_s + min(ended_s - started_s, _REST_S)

    async def _ask(self, control: socket.socket, question: bytes, file: int | None) -> Any:
        loop = asyncio.get_running_loop()
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise _busy() from error
        with ours:
            ours.setblocking(False)
            with theirs:
                try:
                    sent = [theirs.fileno()] if file is None else [theirs.fileno(), file]
                    socket.send_fds(control, [b"?"], sent)
                except OSError as error:
                    raise _NotBegunError from error
            has_begun = False
            try:
                await loop.sock_sendall(ours, _HEAD.pack(len(question)))
                await loop.sock_sendall(ours, question)
                await _received(ours, len(_BEGUN))
                has_begun = True
                (size,) = _HEAD.unpack(await _received(ours, _HEAD.size))
                answer = await _received(ours, size)
                (count,) = _HEAD.unpack(await _received(ours, _HEAD.size))
                beside = []
                for _ in range(count):
                    (length,) = _HEAD.unpack(await _received(ours, _HEAD.size))
                    beside.append(await _received(ours, length))
            except OSError as error:
                if not has_begun:
                    raise _NotBegunError from error
                raise RequestError(
                    "the process that read the request has died of it; send a smaller one",
                    code="reader_died",
                    status=500,
                ) from error
        if size > _FEW_BYTES:
            return await self.do_beside(partial(pickle.loads, buffers=beside), answer)
        return pickle.loads(answer, buffers=beside)


def _busy() -> RequestError:
    return RequestError(
        "long requests cannot be read just now; try again later", code="readers_busy", status=503
    )


async def _received(connection: socket.socket, size: int) -> bytearray | mmap.mmap:
    """So many bytes; OSError if the other side leaves before."""
    # Zeroing much memory would take the event loop's time; the system does so as it is filled.
    found = mmap.mmap(-1, size) if size > _LARGE else bytearray(size)
    rest = memoryview(found)
    loop = asyncio.get_running_loop()
    while rest:
        count = await loop.sock_recv_into(connection, rest)
        if not count:
            raise ConnectionResetError("the process has ended")
        rest = rest[count:]
    return found


class _NotBegunError(Exception):
    """A process went before it had read the question."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Broken:
    """A fault of our own, as a traceback."""

    text: str


def _num_processes() -> int:
    """The number of processes of a lane: few, for they share the processors with the engine."""
    return max(1, min(4, (os.cpu_count() or 1) // 8))


def _end(controls: tuple[socket.socket, ...], process: "subprocess.Popen[bytes]") -> None:
    """Let the processes go: they leave when their sockets close."""
    for control in controls:
        control.close()
    processes.end(process, 0.5)


# --- the other side -------------------------------------------------------------------------


def main() -> None:
    """Load the tokenizer, then keep a process ready for each place; run by `Aside.start`."""
    # The server closes the sockets.
    processes.ignore_signals()
    keep_one_heap()
    controls = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    directory, config = pickle.loads(sys.stdin.buffer.read())
    reader = Reader(load_chat(directory), config)
    give_way()
    # Pages that no collection touches stay shared.
    gc.collect()
    gc.freeze()
    missing = controls * _num_processes()
    children: dict[int, socket.socket] = {}
    while True:
        while missing:
            control = missing.pop()
            child = os.fork()
            if child == 0:
                _serve(control, reader)
            children[child] = control
        child, status = os.wait()
        missing.append(children.pop(child))
        if os.waitstatus_to_exitcode(status) == _NOBODY_ASKS:
            # The others see the same.
            os._exit(0)


def _serve(control: socket.socket, reader: Reader) -> None:
    """Answer questions until nobody asks any more."""
    status = 1
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
            if not message or not descriptors:
                status = _NOBODY_ASKS
                break
            # A client that has left is nobody's fault.
            with socket.socket(fileno=descriptors[0]) as connection, contextlib.suppress(OSError):
                _answer(connection, descriptors[1:], reader)
    finally:
        os._exit(status)


def _answer(connection: socket.socket, files: Sequence[int], reader: Reader) -> None:
    contents = [_content(file) for file in files]
    (size,) = _HEAD.unpack(_taken(connection, _HEAD.size))
    name, arguments = pickle.loads(_taken(connection, size))
    size += sum(map(len, contents))
    arguments = (*arguments, *contents)
    del contents
    connection.sendall(_BEGUN)
    answer: object
    try:
        answer = getattr(reader, name)(*arguments)
    except HalfbyteError as error:
        answer = error.with_traceback(None)
    # A panic of foreign code is no Exception.
    except BaseException:
        answer = _Broken(traceback.format_exc())
    del arguments
    beside: list[pickle.PickleBuffer] = []
    data = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL, buffer_callback=beside.append)
    connection.sendall(_HEAD.pack(len(data)))
    connection.sendall(data)
    connection.sendall(_HEAD.pack(len(beside)))
    for buffer in beside:
        with buffer.raw() as view:
            connection.sendall(_HEAD.pack(len(view)))
            connection.sendall(view)
    if size + len(data) > _LARGE:
        del answer, data, beside
        trim_heap()


def _content(file: int) -> bytes:
    """All of an open file, which is closed."""
    with open(file, "rb", buffering=0) as opened:
        opened.seek(0)
        return opened.readall()


def _taken(connection: socket.socket, size: int) -> bytearray:
    """So many bytes, waiting for them; OSError if the other side leaves before."""
    found = bytearray(size)
    rest = memoryview(found)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionResetError("the server has left")
        rest = rest[count:]
    return found
