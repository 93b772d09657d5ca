"""The output while it is being made: shards of known layout, filled in any order, resumable.

Shapes are known from the plan, so every tensor has its place before the first is computed: files
are allocated at once (a disk that is too small says so now), a killed run goes on where it was,
and the bytes do not depend on what happened in between. `checkpoint.writer` is for tensors that
come once and in order.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import DTYPE_NAMES, INDEX_NAME, bytes_of
from halfbyte.checkpoint.writer import check_target, index_json, shard_header, shard_name
from halfbyte.errors import CapacityError, UsageError
from halfbyte.files import format_bytes, make_directory, sync_directory

_PIECE_BYTES = 16 << 20
# What the system says when a disk, a quota or a file size limit is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor will lie: `offset` counts from the start of the shard's data section."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: int
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Slots of every tensor by foreign name, and the header of every shard, ready to write."""

    slots: Mapping[str, Slot]
    headers: tuple[bytes, ...]
    data_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all shard files together, headers included."""
        return sum(map(len, self.headers)) + sum(self.data_bytes)

    def file_name(self, shard: int) -> str:
        """Name of a shard in the finished checkpoint."""
        return shard_name(shard, len(self.headers))

    def index(self) -> dict[str, Any] | None:
        """The content of the index file; None for a single shard, which has none."""
        if len(self.headers) == 1:
            return None
        return index_json(
            {name: (self.file_name(slot.shard), slot.shape, slot.num_bytes)
             for name, slot in self.slots.items()}
        )  # fmt: skip


def plan_shards(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int
) -> ShardPlan:
    """Lay tensors out in the given order; a shard ends before a tensor would overfill it.

    tensors  foreign name -> shape, dtype
    """
    slots: dict[str, Slot] = {}
    entries: list[dict[str, Any]] = []
    sizes: list[int] = []
    for name, (shape, dtype) in tensors.items():
        num_bytes = prod(shape) * dtype.itemsize
        if not sizes or (sizes[-1] and sizes[-1] + num_bytes > max_shard_bytes):
            entries.append({})
            sizes.append(0)
        slot = Slot(shape, dtype, len(sizes) - 1, sizes[-1])
        slots[name] = slot
        sizes[-1] += num_bytes
        entries[-1][name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [slot.offset, sizes[-1]],
        }
    return ShardPlan(slots, tuple(map(shard_header, entries)), tuple(sizes))


class OutputInProgress:
    """A work directory beside the target: `checkpoint/` becomes the target when it is whole.

    Use it through `open_staging`. The journal and activations of a run lie in `directory` too.
    """

    def __init__(self, directory: Path, target: Path, plan: ShardPlan) -> None:
        self.directory = directory
        self._target = target
        self._plan = plan
        self._output = directory / "checkpoint"
        self._files: list[BinaryIO] = []
        self._touched: set[int] = set()
        self._hashing = ThreadPoolExecutor(1, "halfbyte-hash")

    def exists(self) -> bool:
        """Whether an earlier run has made files here and not published them."""
        return self._output.is_dir()

    def create(self) -> None:
        """Make the files, with headers, at their full size.

        Raises CapacityError if the disk is too small, and then leaves nothing.
        """
        self._output.mkdir()
        with self._disk_full("allocating the output"):
            for shard, header in enumerate(self._plan.headers):
                size = len(header) + self._plan.data_bytes[shard]
                file = (self._output / self._plan.file_name(shard)).open("wb+")
                self._files.append(file)
                os.posix_fallocate(file.fileno(), 0, size)
                os.pwrite(file.fileno(), header, 0)
                self._touched.add(shard)

    def reopen(self) -> None:
        """Go on with files that an earlier run allocated. Raises UsageError if they are not."""
        for shard, header in enumerate(self._plan.headers):
            path = self._output / self._plan.file_name(shard)
            size = len(header) + self._plan.data_bytes[shard]
            if not path.is_file() or path.stat().st_size != size:
                raise UsageError(f"{path} is not as the last run left it; use --restart")
            file = path.open("rb+")
            self._files.append(file)
            if file.read(len(header)) != header:
                raise UsageError(
                    f"{path}: its header is not as the last run left it; use --restart"
                )

    def prove(self, hashes: Mapping[str, str]) -> None:
        """Raise UsageError unless these tensors lie in their slots as an earlier run wrote them.

        hashes   foreign name -> what `write` returned
        """
        for name, wanted in hashes.items():
            slot = self._plan.slots[name]
            offset = len(self._plan.headers[slot.shard]) + slot.offset
            digest, handle = hashlib.sha256(), self._files[slot.shard].fileno()
            for start in range(0, slot.num_bytes, _PIECE_BYTES):
                size = min(_PIECE_BYTES, slot.num_bytes - start)
                digest.update(os.pread(handle, size, offset + start))
            if digest.hexdigest() != wanted:
                path = self._output / self._plan.file_name(slot.shard)
                raise UsageError(
                    f"{path}: {name} is not as the last run left it (sha256 differs); drop that "
                    "run with --restart"
                )

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor into its slot; returns the SHA-256 of its bytes, in hexadecimal."""
        slot = self._plan.slots[name]
        assert tuple(tensor.shape) == slot.shape and tensor.dtype == slot.dtype, (
            f"{name}: {tensor.dtype} {list(tensor.shape)}, planned {slot.dtype} {list(slot.shape)}"
        )
        digest = hashlib.sha256()
        offset = len(self._plan.headers[slot.shard]) + slot.offset
        content = bytes_of(tensor.detach().to("cpu").contiguous())
        handle = self._files[slot.shard].fileno()
        self._touched.add(slot.shard)
        with self._disk_full(f"writing {name}"):
            for start in range(0, len(content), _PIECE_BYTES):
                piece = content[start : start + _PIECE_BYTES]
                # Both release the interpreter's lock: one core hashes, one writes.
                hashing = self._hashing.submit(digest.update, piece)
                try:
                    written = 0
                    while written < len(piece):
                        written += os.pwrite(handle, piece[written:], offset + start + written)
                finally:
                    hashing.result()
        return digest.hexdigest()

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file of the checkpoint, durably."""
        with self._disk_full(f"writing {name}"), (self._output / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """Make everything written so far durable on the disk."""
        with self._disk_full("writing"):
            for shard in sorted(self._touched):
                os.fsync(self._files[shard].fileno())
        self._touched.clear()

    def publish(self) -> None:
        """Turn the finished output into the target in one step, and drop the work directory."""
        index = self._plan.index()
        if index is not None:
            self.write_file(INDEX_NAME, json.dumps(index, indent=2).encode() + b"\n")
        self.sync()
        self.close()
        sync_directory(self._output)
        check_target(self._target)
        os.rename(self._output, self._target)
        sync_directory(self._target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the work directory and everything in it."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Close the files of the output; what is written stays."""
        for file in self._files:
            file.close()
        self._files.clear()
        self._hashing.shutdown()

    @contextmanager
    def _disk_full(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            needed = format_bytes(self._plan.total_bytes)
            raise CapacityError(
                f"{self._target}: disk full while {doing}; the output takes {needed}"
            ) from error


def work_directory(target: Path) -> Path:
    """Where the output of `target` is made: hidden, beside it, so that one rename publishes it."""
    return target.parent / f".{target.name}.halfbyte-work"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process while the body runs; make it first if need be.

    Raises UsageError if another process works in it, or it cannot be made.
    """
    make_directory(directory)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is working in {directory}; wait for it") from None
    else:
        yield
    finally:
        os.close(handle)
