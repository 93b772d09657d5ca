"""Streams tensors into shards and publishes a whole directory at once.

Everything is written to a hidden directory beside the target, synced, and renamed to the target's
name in one step; a run that fails or is killed leaves no target. Tensors are written as they come,
so memory holds one of them; a shard's header is put into space left at its start.
"""

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from torch import Tensor

from halfbyte.checkpoint.manifest import MANIFEST_NAME, HashingWriter, manifest_file
from halfbyte.checkpoint.names import is_scale
from halfbyte.checkpoint.shards import DTYPE_NAMES, INDEX_NAME
from halfbyte.errors import CapacityError, FormatError, UsageError
from halfbyte.files import format_bytes, make_directory, read_bounded, sync_directory

MAX_SHARD_BYTES = 10_000_000_000  # decimal, the reference's default
# Small files that we copy are at most this large; a tokenizer has tens of MB.
MAX_COPIED_BYTES = 256 << 20

# A big shard keeps this much room for its header (about 1,500 tensors) and pads what is left, as
# the format allows; a small one is moved up to its header afterwards, which costs nothing.
_RESERVED_BYTES = 256 << 10
_SMALL_BYTES = 64 << 20
_CHUNK_BYTES = 64 << 20


class ShardWriter:
    """Writes one checkpoint directory; use it in a `with` block and call `finish` at its end.

    directory        the target; must not exist, or be empty
    max_shard_bytes  a shard is closed before a tensor would take it past this

    Leaving the block without `finish`, by an error or not, removes everything that was written.
    Raises UsageError if the target exists, CapacityError if the disk is full, FormatError for a
    tensor that holds no data.
    """

    def __init__(self, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.directory = Path(directory)
        self._max_shard_bytes = max_shard_bytes
        check_target(self.directory)
        make_directory(self.directory.parent)
        self._partial = self.directory.parent / f".{self.directory.name}.partial-{os.getpid()}"
        shutil.rmtree(self._partial, ignore_errors=True)
        make_directory(self._partial)
        self._shards: list[dict[str, dict[str, Any]]] = []
        self._entries: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        self._data_bytes = 0
        self._total_bytes = 0
        self._hashes: dict[str, str] = {}
        self._file_hashes: dict[str, str] = {}
        self._hashing = HashingWriter()
        self._is_published = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_published:
            self.discard()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"{self.directory}: disk full after {format_bytes(self._total_bytes)} of tensors; "
                "nothing was left behind"
            ) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor under its foreign `name`; a full shard is closed first.

        The tensor is not modified and not kept. Names must be unique.
        """
        if tensor.is_meta:
            raise FormatError(f"{name}: a tensor on the meta device has no data to write")
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(f"{name}: {tensor.dtype} cannot be stored")
        assert name not in self._hashes, f"{name} was added twice"
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        if self._file is not None and self._data_bytes + num_bytes > self._max_shard_bytes:
            self._close_shard()
        if self._file is None:
            self._file = self._shard_path(len(self._shards)).open("wb+")
            self._file.seek(_RESERVED_BYTES)
        self._hashes[name] = self._hashing.write(self._file, tensor)
        self._entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._data_bytes, self._data_bytes + num_bytes],
        }
        self._data_bytes += num_bytes
        self._total_bytes += num_bytes

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file into the directory, in the reference's spelling (4 spaces)."""
        self.write_file(
            name, json.dumps(value, indent=4, ensure_ascii=False).encode(errors="backslashreplace")
        )

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file into the directory, durably, and remember its hash."""
        with self._inside(name).open("wb") as file:
            file.write(content)
            _sync(file)
        self._file_hashes[name] = hashlib.sha256(content).hexdigest()

    def copy_file(self, source: Path, name: str | None = None) -> None:
        """Copy a file of the source (tokenizer, chat template) into the directory."""
        self.write_file(name or source.name, read_bounded(source, MAX_COPIED_BYTES))

    def finish(self, made_of: Mapping[str, Any] | None = None) -> Path:
        """Close the last shard, write index and manifest, publish; returns the target.

        made_of   facts for the manifest: what the checkpoint was made of, and how
        """
        if self._file is not None:
            self._close_shard()
        count = len(self._shards)
        if count == 1:
            os.rename(self._shard_path(0), self._partial / "model.safetensors")
        else:
            self._write_index(count)
        manifest = manifest_file(made_of or {}, self._hashes, self._file_hashes)
        self.write_file(MANIFEST_NAME, manifest)
        sync_directory(self._partial)
        check_target(self.directory)
        os.rename(self._partial, self.directory)
        self._is_published = True
        self._hashing.close()
        sync_directory(self.directory.parent)
        return self.directory

    def discard(self) -> None:
        """Remove the unfinished directory with everything that was written."""
        self._hashing.close()
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._partial, ignore_errors=True)

    def _inside(self, name: str) -> Path:
        assert name == Path(name).name, f"{name} is no plain file name"
        return self._partial / name

    def _shard_path(self, number: int) -> Path:
        return self._partial / f"shard-{number + 1:05d}.safetensors"

    def _close_shard(self) -> None:
        assert self._file is not None
        header = shard_header(self._entries)
        if self._data_bytes <= _SMALL_BYTES or len(header) > _RESERVED_BYTES:
            _move_data(self._file, _RESERVED_BYTES, len(header), self._data_bytes)
        else:
            header = shard_header(self._entries, _RESERVED_BYTES)
        self._file.seek(0)
        self._file.write(header)
        _sync(self._file)
        self._file.close()
        self._file = None
        self._shards.append(self._entries)
        self._entries, self._data_bytes = {}, 0

    def _write_index(self, count: int) -> None:
        tensors: dict[str, tuple[str, Sequence[int], int]] = {}
        for number, entries in enumerate(self._shards):
            shard = shard_name(number, count)
            os.rename(self._shard_path(number), self._partial / shard)
            for name, entry in entries.items():
                start, end = entry["data_offsets"]
                tensors[name] = shard, entry["shape"], end - start
        self.write_file(INDEX_NAME, json.dumps(index_json(tensors), indent=2).encode() + b"\n")


def shard_name(number: int, count: int) -> str:
    """File name of a shard, counted from 0, among `count`."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def shard_header(entries: Mapping[str, Any], num_bytes: int = 0) -> bytes:
    """What a shard begins with: its length, its tensors, blanks to a multiple of 8.

    entries    foreign name -> dtype, shape, data_offsets
    num_bytes  pad with blanks to this many bytes in all, as the format allows
    """
    header = {"__metadata__": {"format": "pt"}, **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % 8, num_bytes - 8 - len(text))
    return struct.pack("<Q", len(text)) + text


def index_json(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> dict[str, Any]:
    """The content of the index of a checkpoint in several shards.

    tensors  foreign name -> its shard's file name, its shape, its bytes
    """
    # Scales are no parameters to Model Optimizer; a packed byte is one.
    counted = [shape for name, (_, shape, _) in tensors.items() if not is_scale(name)]
    return {
        "metadata": {
            "total_parameters": sum(map(prod, counted)),
            "total_size": sum(num_bytes for _, _, num_bytes in tensors.values()),
        },
        "weight_map": {name: tensors[name][0] for name in sorted(tensors)},
    }


def check_target(directory: Path) -> None:
    """Raise UsageError if something is there already; an empty directory may be."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise UsageError(f"{directory} exists; choose another name, or remove it first")


def _move_data(file: BinaryIO, source: int, target: int, num_bytes: int) -> None:
    """Move the data section of an open file and cut the file behind it."""
    backwards = range(0, num_bytes, _CHUNK_BYTES)
    for start in backwards if target <= source else reversed(backwards):
        file.seek(source + start)
        piece = file.read(min(_CHUNK_BYTES, num_bytes - start))
        file.seek(target + start)
        file.write(piece)
    file.truncate(target + num_bytes)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
