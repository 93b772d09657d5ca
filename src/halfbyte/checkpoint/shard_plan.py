"""Where every tensor of a checkpoint will lie: shards, their headers and the index beside them.

Shapes are known before the first tensor is computed, so every tensor has its place from the start.
Nothing here touches a disk; `writer` fills the places.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from halfbyte.checkpoint.names import is_scale
from halfbyte.checkpoint.shards import DTYPE_NAMES
from halfbyte.errors import FormatError

# Foreign name -> shape and dtype of what is stored under it, in the order of the file.
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


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
        count = len(self.headers)
        if count == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def index(self) -> dict[str, Any] | None:
        """The content of the index file; None for a single shard, which has none."""
        if len(self.headers) == 1:
            return None
        # Scales are no parameters to Model Optimizer; a packed byte is one.
        counted = [slot.shape for name, slot in self.slots.items() if not is_scale(name)]
        return {
            "metadata": {
                "total_parameters": sum(map(prod, counted)),
                "total_size": sum(self.data_bytes),
            },
            "weight_map": {name: self.file_name(self.slots[name].shard)
                           for name in sorted(self.slots)},
        }  # fmt: skip

    def index_file(self) -> bytes | None:
        """The bytes of the index file; None for a single shard."""
        index = self.index()
        return None if index is None else json.dumps(index, indent=2).encode() + b"\n"


def plan_shards(tensors: Shapes, max_shard_bytes: int) -> ShardPlan:
    """Lay tensors out in the given order; a shard ends before a tensor would overfill it.

    Raises FormatError for a dtype that the format does not have.
    """
    slots: dict[str, Slot] = {}
    entries: list[dict[str, Any]] = []
    sizes: list[int] = []
    for name, (shape, dtype) in tensors.items():
        if dtype not in DTYPE_NAMES:
            raise FormatError(f"{name}: {dtype} cannot be stored")
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
    return ShardPlan(slots, tuple(map(_header, entries)), tuple(sizes))


def _header(entries: Mapping[str, Any]) -> bytes:
    """What a shard begins with: its length, its tensors, blanks to a multiple of 8.

    entries   foreign name -> dtype, shape, data_offsets
    """
    header = {"__metadata__": {"format": "pt"}, **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
