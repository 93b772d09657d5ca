"""Stored tensors -> device memory: parallel reads through pinned memory.

Reader threads fill staging buffers of their own and copy them to the device. Everything runs on a
CPU as well, without pinned memory and streams, which is how it is tested.
"""

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import StoredTensor, bytes_of, fill_columns
from halfbyte.errors import CheckpointError
from halfbyte.files import open_regular

_PIECE_BYTES = 32 << 20


class Arrived(NamedTuple):
    """A piece of a tensor whose bytes are read; on a GPU their copy is enqueued before `event`."""

    event: torch.cuda.Event | None


class _Staging(threading.local):
    """A reader thread's two staging buffers and its stream."""

    buffers: list[Tensor]
    events: list[torch.cuda.Event | None]
    stream: torch.cuda.Stream | None
    turn: int


class TensorReader:
    """Reads stored tensors into device memory, many pieces at a time."""

    def __init__(
        self,
        device: torch.device,
        *,
        num_threads: int | None = None,
        piece_bytes: int | None = None,
    ) -> None:
        self.device = device
        if device.type == "cuda" and device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.num_bytes = 0
        self._piece_bytes = piece_bytes or _PIECE_BYTES
        self._is_cuda = device.type == "cuda"
        threads = num_threads or min(12, max(2, (os.cpu_count() or 2) - 1))
        self._pool = ThreadPoolExecutor(threads, "halfbyte-read", initializer=self._start_thread)
        self._staging = _Staging()

    def _start_thread(self) -> None:
        staging = self._staging
        staging.buffers = [
            torch.empty(self._piece_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
            for _ in range(2)
        ]
        staging.events = [None, None]
        staging.turn = 0
        staging.stream = None
        if self._is_cuda:
            torch.cuda.set_device(self.device)
            staging.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_into(
        self, stored: StoredTensor, target: Tensor, column_bytes: range | None = None
    ) -> list["Future[Arrived]"]:
        """Start reading `stored` into `target`, contiguous and of its size, on the device.

        column_bytes  of each row only these bytes; `target` is as much smaller

        What `target`'s memory was used for before must be enqueued on the current stream.
        """
        flat = target.reshape(-1).view(torch.uint8)
        assert flat.data_ptr() == target.data_ptr()
        part = _Part(stored, column_bytes)
        assert flat.numel() == part.num_bytes, f"{flat.numel()} bytes for {part.num_bytes}"
        self.num_bytes += part.num_bytes
        is_free = None
        if self._is_cuda:
            is_free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            is_free.record()
        step = part.whole_rows(self._piece_bytes)
        return [
            self._pool.submit(self._read_piece, part, start, step, flat, is_free)
            for start in range(0, part.num_bytes, step)
        ]

    @torch.inference_mode()  # a thread's own setting; the targets may have been made under it
    def _read_piece(
        self,
        part: "_Part",
        start: int,
        step: int,
        flat: Tensor,
        is_free: torch.cuda.Event | None,
    ) -> Arrived:
        stop = min(start + step, part.num_bytes)
        staging = self._staging
        staging.turn ^= 1
        used = staging.events[staging.turn]
        if used is not None:
            used.synchronize()
        buffer = staging.buffers[staging.turn][: stop - start]
        part.fill(buffer, start)
        if staging.stream is None:
            flat[start:stop].copy_(buffer)
            return Arrived(None)
        with torch.cuda.stream(staging.stream):
            if is_free is not None:
                staging.stream.wait_event(is_free)
            flat[start:stop].copy_(buffer, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(staging.stream)
        staging.events[staging.turn] = event
        return Arrived(event)

    def wait(self, pieces: Iterable["Future[Arrived]"]) -> None:
        """Return once the pieces are read; the current stream waits for their copies."""
        for piece in pieces:
            event = piece.result().event
            if event is not None:
                torch.cuda.current_stream().wait_event(event)


class _Part(NamedTuple):
    """A stored tensor, or the same bytes of each of its rows, as a run of bytes."""

    stored: StoredTensor
    column_bytes: range | None

    @property
    def num_bytes(self) -> int:
        if self.column_bytes is None:
            return self.stored.num_bytes
        return self.stored.shape[0] * len(self.column_bytes)

    def whole_rows(self, num_bytes: int) -> int:
        """At most so many bytes, but whole rows where rows are cut."""
        if self.column_bytes is None:
            return num_bytes
        width = len(self.column_bytes)
        assert width <= num_bytes, f"rows of {width} bytes, pieces of {num_bytes}"
        return num_bytes // width * width

    def fill(self, buffer: Tensor, start: int) -> None:
        """Read `buffer`'s bytes from byte `start` of the run on."""
        if self.column_bytes is None:
            _fill(self.stored, bytes_of(buffer), start)
            return
        width = len(self.column_bytes)
        rows = buffer.view(-1, width)
        fill_columns(self.stored, rows, start // width, self.column_bytes.start)


def _fill(stored: StoredTensor, buffer: memoryview, start: int) -> None:
    done = 0
    try:
        with open_regular(stored.path, buffering=0) as file:
            while done < len(buffer):
                got = os.preadv(file.fileno(), [buffer[done:]], stored.offset + start + done)
                if got == 0:
                    raise CheckpointError(
                        f"{stored.path.name}: ended within {stored.name}; changed while being read?"
                    )
                done += got
    except OSError as error:
        raise CheckpointError(
            f"{stored.path.name}: {stored.name} cannot be read ({error.strerror})"
        ) from error


def cut(stored: StoredTensor, axis: int, part: range) -> tuple[StoredTensor, range | None]:
    """Rows of a tensor as a tensor of their own; or the tensor, and which bytes of a row."""
    row_bytes = stored.num_bytes // stored.shape[0]
    if axis == 1:
        column_bytes = row_bytes // stored.shape[1]
        return stored, range(part.start * column_bytes, part.stop * column_bytes)
    rows = replace(
        stored,
        shape=(len(part), *stored.shape[1:]),
        offset=stored.offset + part.start * row_bytes,
        num_bytes=len(part) * row_bytes,
    )
    return rows, None


def shape_of(stored: StoredTensor, column_bytes: range | None) -> tuple[int, ...]:
    """Shape of the part of a tensor that `cut` names: (rows, columns), or the tensor's own."""
    if column_bytes is None:
        return stored.shape
    return stored.shape[0], len(column_bytes) // stored.dtype.itemsize
