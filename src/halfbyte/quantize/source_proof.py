"""The proof that a source stayed the same from the first tensor read to the last.

A run that was killed goes on days later, and what it had read by then must be what is there now:
otherwise it publishes a mixture of two models. Every step notes a checksum of each tensor as it was
read, and what the system said of the files just before. As long as the system still says the same
(a write changes it, even one that puts the old time back), nothing is read again; otherwise, as
after the files were moved, content decides.
"""

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.shards import bytes_of
from halfbyte.errors import UsageError


class Reading:
    """What one step has read of its source; made before anything is read.

    Hand `note` to whoever reads. Called from several threads, a tensor once.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        self._checkpoint = checkpoint
        self._names = tuple(names)
        self._files = _file_states({checkpoint.shard(name) for name in self._names})
        self._sums: dict[str, int] = {}

    def note(self, name: str, tensor: Tensor) -> None:
        """Sum up a tensor as `Checkpoint.tensor` gave it."""
        self._sums[name] = _checksum(tensor)

    def entry(self) -> dict[str, Any]:
        """The journal's entry of this step: checksums by canonical name, state of the files.

        What nobody noted is read for it: the scales of the layer, which are single numbers.
        """
        for name in self._names:
            if name not in self._sums:
                self.note(name, self._checkpoint.tensor(name))
        return {"tensors": self._sums, "files": self._files}


def require_unchanged(
    checkpoint: Checkpoint, entries: Iterable[Mapping[str, Any]], budget: MemoryBudget
) -> None:
    """Raise UsageError that names the tensor if the source is not what these steps have read.

    entries   what `Reading.entry` gave
    """
    for entry in entries:
        sums, then = entry["tensors"], entry["files"]
        now = _file_states({checkpoint.shard(name) for name in sums})
        for name, wanted in sums.items():
            shard = checkpoint.shard(name)
            if then.get(shard.name) == now[shard.name]:
                continue
            budget.check(checkpoint.num_bytes(name))
            if _checksum(checkpoint.tensor(name)) != wanted:
                raise UsageError(
                    f"{shard}: {checkpoint.foreign(name)} has changed since an unfinished run read "
                    "it. Go back to what it was, or drop that run with --restart"
                )


def _checksum(tensor: Tensor) -> int:
    """CRC-32: to notice a change, not to withstand one who forges; thrice as fast as SHA-256."""
    return zlib.crc32(bytes_of(tensor.contiguous()))


def _file_states(paths: Iterable[Path]) -> dict[str, list[int]]:
    """File name -> which file it is, its size and when it was last written or otherwise changed."""
    states = {}
    for path in sorted(paths):
        found = os.stat(path)
        states[path.name] = [
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        ]
    return states
