"""Writes checkpoint directories: shards of known layout, published whole in one step.

Every tensor has its place before the first is computed (`shard_plan`): files are allocated at once
(a disk that is too small says so now), tensors come in any order, memory holds one of them, and the
bytes depend on nothing that happened in between. Everything is made in a hidden directory beside
the target and renamed to its name at the end.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

from torch import Tensor

from halfbyte.checkpoint.identity import MANIFEST_NAME
from halfbyte.checkpoint.manifest import hash_stored, manifest_file
from halfbyte.checkpoint.shard_plan import Shapes, ShardPlan, Slot, plan_shards
from halfbyte.checkpoint.shards import INDEX_NAME, StoredTensor, bytes_of
from halfbyte.errors import CapacityError, FormatError, UsageError
from halfbyte.files import (
    check_place,
    format_bytes,
    make_directory,
    read_bounded,
    sync_directory,
)

MAX_SHARD_BYTES = 10_000_000_000  # decimal, the reference's default
# Small files that we copy are at most this large; a tokenizer has tens of MB.
MAX_COPIED_BYTES = 256 << 20
_PIECE_BYTES = 16 << 20
# What the system says when a disk, a quota or a file size limit is reached.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputInProgress:
    """A work directory beside the target: `checkpoint/` becomes the target when it is whole.

    A run that can go on where it was killed uses it as it is and keeps its journal and activations
    in `directory` too; `ShardWriter` is for those that start anew.
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
            slot, offset = self._place(name)
            path = self._output / self._plan.file_name(slot.shard)
            stored = StoredTensor(name, path, slot.dtype, slot.shape, offset, slot.num_bytes)
            if hash_stored(stored) != wanted:
                raise UsageError(
                    f"{path}: {name} is not as the last run left it (sha256 differs); drop that "
                    "run with --restart"
                )

    def _place(self, name: str) -> tuple[Slot, int]:
        """The slot of a tensor and the byte of its file at which it begins."""
        slot = self._plan.slots[name]
        return slot, len(self._plan.headers[slot.shard]) + slot.offset

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor into its slot; returns the SHA-256 of its bytes, in hexadecimal."""
        slot, offset = self._place(name)
        assert tuple(tensor.shape) == slot.shape and tensor.dtype == slot.dtype, (
            f"{name}: {tensor.dtype} {list(tensor.shape)}, planned {slot.dtype} {list(slot.shape)}"
        )
        digest = hashlib.sha256()
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
        assert name == Path(name).name, f"{name} is no plain file name"
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
        index = self._plan.index_file()
        if index is not None:
            self.write_file(INDEX_NAME, index)
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


class ShardWriter:
    """Writes one checkpoint directory in one go; use it in a `with` block, `finish` at its end.

    directory        the target; must not exist, or be empty
    tensors          what will be added: foreign name -> shape and dtype, in the order of the files
    max_shard_bytes  a shard ends before a tensor would take it past this

    Leaving the block without `finish`, by an error or not, removes everything that was written.
    Raises UsageError if the target exists, CapacityError if the disk is full, FormatError for a
    tensor that holds no data.
    """

    def __init__(
        self, directory: str | Path, tensors: Shapes, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.directory = Path(directory)
        check_target(self.directory)
        self._partial = self.directory.parent / f".{self.directory.name}.partial-{os.getpid()}"
        self._plan = plan_shards(tensors, max_shard_bytes)
        self._output = OutputInProgress(self._partial, self.directory, self._plan)
        self._hashes: dict[str, str] = {}
        self._file_hashes: dict[str, str] = {}

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        make_directory(self._partial)
        try:
            self._output.create()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self._output.discard()
        if isinstance(error, CapacityError):
            raise CapacityError(f"{error}; nothing was left behind") from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor under its foreign `name`, once. It is not modified and not kept."""
        if tensor.is_meta:
            raise FormatError(f"{name}: a tensor on the meta device has no data to write")
        assert name not in self._hashes, f"{name} was added twice"
        self._hashes[name] = self._output.write(name, tensor)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file into the directory, in the reference's spelling (4 spaces)."""
        self.write_file(
            name, json.dumps(value, indent=4, ensure_ascii=False).encode(errors="backslashreplace")
        )

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file into the directory, durably, and remember its hash."""
        self._output.write_file(name, content)
        self._file_hashes[name] = hashlib.sha256(content).hexdigest()

    def copy_file(self, source: Path) -> None:
        """Copy a file of the source (tokenizer, chat template) into the directory."""
        self.write_file(source.name, read_bounded(source, MAX_COPIED_BYTES))

    def finish(self, made_of: Mapping[str, Any] | None = None) -> Path:
        """Write index and manifest and publish; returns the target.

        made_of   facts for the manifest: what the checkpoint was made of, and how
        """
        missing = self._plan.slots.keys() - self._hashes.keys()
        assert not missing, f"never added: {sorted(missing)[:3]}"
        index = self._plan.index_file()
        if index is not None:
            self._file_hashes[INDEX_NAME] = hashlib.sha256(index).hexdigest()
        manifest = manifest_file(made_of or {}, self._hashes, self._file_hashes)
        self.write_file(MANIFEST_NAME, manifest)
        self._output.publish()
        return self.directory


def check_target(directory: Path) -> None:
    """Raise UsageError if something is there already or nothing can be; an empty directory may.

    Nor can one be inside another checkpoint, which would no longer be what it was made or copied
    as: whoever uploads or removes it would take both.
    """
    check_place(directory)
    try:
        parents = directory.resolve().parents
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UsageError(f"{directory} exists, as a link that leads nowhere; remove it") from error
    for parent in parents:
        if _is_checkpoint(parent):
            raise UsageError(
                f"{directory}: lies inside the checkpoint {parent}; choose a place outside of it"
            )
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise UsageError(f"{directory} exists; choose another name, or remove it first")


def _is_checkpoint(directory: Path) -> bool:
    """Whether a folder holds a configuration and weights."""
    configured = any((directory / name).is_file() for name in ("config.json", "params.json"))
    return configured and any(directory.glob("*.safetensors"))
