"""The activations between two layers: kept in memory, or on disk when they are too large.

On disk they also outlive the process: a run that was killed goes on with the layer it was in.
Files are written by threads of their own, beside the computation.
"""

import os
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import bytes_of
from halfbyte.errors import CheckpointError

# Rows that may wait for the disk; each is held in memory until it is written.
MOST_PENDING = 4
_WRITERS = 2


class Activations:
    """Inputs of the layer at work, and room for its outputs; bf16 (tokens, width) a row.

    row_tokens  length of each row, which says where it lies in a file
    directory   where a file per layer boundary goes, `activations-L` being the inputs of layer L;
                None keeps everything in memory only
    in_memory   with a directory: also keep rows in memory, so that files are written, never read,
                until `release` drops them

    `advance(L)` turns what was written into the inputs of layer L, `settle()` returns when they are
    durable, `forget(L)` drops them. Between `settle` for one layer and `forget` after the next one
    complete file always exists. An error of the disk is raised by whichever call comes next.
    """

    def __init__(
        self,
        row_tokens: Sequence[int],
        width: int,
        directory: Path | None = None,
        *,
        in_memory: bool = True,
    ) -> None:
        assert in_memory or directory is not None, "nowhere to keep activations"
        self.row_tokens = tuple(row_tokens)
        self.width = width
        self._directory = directory
        self._offsets = [0]
        for tokens in self.row_tokens:
            self._offsets.append(self._offsets[-1] + tokens * width * 2)
        self._memory: dict[int, Tensor] | None = {} if in_memory else None
        self._reading: BinaryIO | None = None
        self._writing: BinaryIO | None = None
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="activations")
        self._pending: deque[Future[None]] = deque()
        self._settling: Future[None] | None = None
        self._sums: dict[int, int] = {}
        self.layer: int | None = None  # whose inputs these are; None before there are any
        self.checksum: int | None = None  # of the file that the last `advance` named

    def beside(
        self, name: str, row_tokens: Sequence[int], width: int
    ) -> tuple["Activations", Path | None]:
        """Room for rows of another kind that wait as these do, and the folder where, if any."""
        directory = None if self._directory is None else self._directory / name
        if directory is not None:
            directory.mkdir(exist_ok=True)
        in_memory = self._memory is not None
        return Activations(row_tokens, width, directory, in_memory=in_memory), directory

    @property
    def num_bytes(self) -> int:
        """Bytes of one layer boundary: the activations of all rows between two layers."""
        return self._offsets[-1]

    def read(self, row: int) -> Tensor:
        """The input of the layer at work for one row, on the CPU; not to be modified."""
        memory = self._memory
        return self._load(row) if memory is None else memory[row]

    def release(self) -> None:
        """Keep rows on disk only from now on, if they are there at all; from any thread."""
        if self._directory is not None:
            self._memory = None

    def write(self, row: int, x_TD: Tensor) -> None:
        """Keep the layer's output for one row, which is the next layer's input; x is not copied.

        In memory it replaces the row's input at once, so a row must be read before it is written.
        """
        self._check(row, x_TD)
        memory = self._memory
        if memory is not None:
            memory[row] = x_TD
        if self._directory is not None:
            self._submit(row, x_TD, None, None)

    def write_lent(
        self,
        row: int,
        x_TD: Tensor,
        *,
        ready: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        """Keep the layer's output for one row from a buffer that will be used again.

        `ready()` returns when the buffer is filled, `done()` says that it is free. Another thread
        calls both.
        """
        self._check(row, x_TD)
        self._submit(row, x_TD, ready, done)

    def advance(self, layer: int) -> None:
        """Note that all rows are written: they are the inputs of `layer` from now on."""
        self._wait_for_rows(0)
        self.layer = layer
        if self._directory is None:
            return
        assert self._writing is not None, "no row was written"
        file, self._writing = self._writing, None
        self.checksum, self._sums = self._sum_of_rows(), {}
        self._close_reading()
        # Opened even if nothing is read from it: `release` may come at any time.
        self._reading = self._partial().open("rb")
        self._settling = self._pool.submit(_make_durable, file, self._partial(), self._path(layer))

    def settle(self) -> None:
        """Wait until what the last `advance` named is durable; raises OSError if it cannot be."""
        if self._settling is not None:
            settling, self._settling = self._settling, None
            settling.result()

    def resume(self, layer: int, checksum: int | None = None) -> None:
        """Go on from the stored inputs of `layer`.

        checksum   what `checksum` was when they were written; None does not look

        Raises CheckpointError if they are not whole or not what was written.
        """
        path = self._path(layer)
        if not path.exists() or path.stat().st_size != self.num_bytes:
            raise CheckpointError(f"{path}: the stored inputs of layer {layer} are not whole")
        self._reading = path.open("rb")
        memory = self._memory
        for row in range(len(self.row_tokens)):
            if memory is not None or checksum is not None:
                x_TD = self._load(row)
                self._sums[row] = zlib.crc32(bytes_of(x_TD))
                if memory is not None:
                    memory[row] = x_TD
        if checksum is not None and self._sum_of_rows() != checksum:
            raise CheckpointError(
                f"{path}: the stored inputs of layer {layer} are not what was written; drop that "
                "run with --restart"
            )
        self._sums = {}
        self.layer = layer

    def _sum_of_rows(self) -> int:
        rows = [self._sums.get(row, 0) for row in range(len(self.row_tokens))]
        return zlib.crc32(b"".join(value.to_bytes(4, "little") for value in rows))

    def forget(self, layer: int) -> None:
        """Drop the stored inputs of `layer`, which nobody will ask for again."""
        if self._directory is not None:
            self._path(layer).unlink(missing_ok=True)

    def close(self) -> None:
        """Wait for the threads and close the files; what is stored stays."""
        self._pool.shutdown()
        self._pending.clear()
        self._settling = None
        self._close_reading()
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    def _check(self, row: int, x_TD: Tensor) -> None:
        assert x_TD.shape == (self.row_tokens[row], self.width), f"row {row}: {x_TD.shape}"

    def _submit(
        self,
        row: int,
        x_TD: Tensor,
        ready: Callable[[], object] | None,
        done: Callable[[], object] | None,
    ) -> None:
        if self._directory is not None and self._writing is None:
            self.settle()
            self._writing = self._partial().open("wb")
        self._pending.append(self._pool.submit(self._store, self._writing, row, x_TD, ready, done))
        self._wait_for_rows(MOST_PENDING)

    @torch.inference_mode()
    def _store(
        self,
        file: BinaryIO | None,
        row: int,
        x_TD: Tensor,
        ready: Callable[[], object] | None,
        done: Callable[[], object] | None,
    ) -> None:
        try:
            if ready is not None:
                ready()
                self._remember(row, x_TD)
            if file is not None:
                content, offset, written = bytes_of(x_TD), self._offsets[row], 0
                self._sums[row] = zlib.crc32(content)
                while written < len(content):
                    written += os.pwrite(file.fileno(), content[written:], offset + written)
        finally:
            if done is not None:
                done()

    def _remember(self, row: int, lent_TD: Tensor) -> None:
        memory = self._memory
        if memory is None:
            return
        kept = memory.get(row)
        if kept is None:
            memory[row] = lent_TD.clone()
        else:
            kept.copy_(lent_TD)

    def _wait_for_rows(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.popleft().result()

    def _close_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _partial(self) -> Path:
        assert self._directory is not None
        return self._directory / "activations.partial"

    def _path(self, layer: int) -> Path:
        assert self._directory is not None
        return self._directory / f"activations-{layer}"

    def _load(self, row: int) -> Tensor:
        assert self._reading is not None, "nothing has been written yet"
        x_TD = torch.empty((self.row_tokens[row], self.width), dtype=torch.bfloat16)
        content, offset, done = bytes_of(x_TD), self._offsets[row], 0
        while done < len(content):
            got = os.preadv(self._reading.fileno(), [content[done:]], offset + done)
            assert got > 0, f"row {row}: the file ends after {offset + done} bytes"
            done += got
        return x_TD


def _make_durable(file: BinaryIO, partial: Path, target: Path) -> None:
    try:
        os.fsync(file.fileno())
    finally:
        file.close()
    os.rename(partial, target)
