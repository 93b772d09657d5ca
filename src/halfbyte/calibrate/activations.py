"""The activations between two layers: kept in memory, or on disk when they are too large.

On disk they also outlive the process: a run that was killed goes on with the layer it was in.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import bytes_of
from halfbyte.errors import CheckpointError


class Activations:
    """Inputs of the layer at work, and room for its outputs; bf16 (tokens, width) a row.

    row_tokens  length of each row, which says where it lies in a file
    directory   where a file per layer boundary goes, `activations-L` being the inputs of layer L;
                None keeps everything in memory only
    in_memory   with a directory: also keep rows in memory, so that files are written, never read

    `advance(L)` makes the inputs of layer L durable; `forget(L)` drops them. Between the two calls
    for consecutive layers one complete file always exists.
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
        self._width = width
        self._directory = directory
        self._offsets = [0]
        for tokens in self.row_tokens:
            self._offsets.append(self._offsets[-1] + tokens * width * 2)
        self._memory: dict[int, Tensor] | None = {} if in_memory else None
        self._reading: BinaryIO | None = None
        self._writing: BinaryIO | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of one layer boundary."""
        return self._offsets[-1]

    def read(self, row: int) -> Tensor:
        """The input of the layer at work for one row, on the CPU; not to be modified."""
        return self._load(row) if self._memory is None else self._memory[row]

    def write(self, row: int, x_TD: Tensor) -> None:
        """Keep the layer's output for one row, which is the next layer's input.

        In memory it replaces the row's input at once, so a row must be read before it is written.
        """
        assert x_TD.shape == (self.row_tokens[row], self._width), f"row {row}: {x_TD.shape}"
        if self._directory is not None:
            if self._writing is None:
                self._writing = (self._directory / "activations.partial").open("wb")
            self._writing.seek(self._offsets[row])
            self._writing.write(bytes_of(x_TD))
        if self._memory is not None:
            self._memory[row] = x_TD

    def advance(self, layer: int) -> None:
        """All rows are written: they are the inputs of `layer` from now on, durably if on disk."""
        if self._directory is None:
            return
        assert self._writing is not None, "no row was written"
        self._writing.flush()
        os.fsync(self._writing.fileno())
        self.close()
        os.rename(self._directory / "activations.partial", self._path(layer))
        if self._memory is None:
            self._reading = self._path(layer).open("rb")

    def resume(self, layer: int) -> None:
        """Go on from the stored inputs of `layer`. Raises CheckpointError if they are not whole."""
        path = self._path(layer)
        if not path.exists() or path.stat().st_size != self.num_bytes:
            raise CheckpointError(f"{path}: the stored inputs of layer {layer} are not whole")
        self._reading = path.open("rb")
        if self._memory is not None:
            for row in range(len(self.row_tokens)):
                self._memory[row] = self._load(row)

    def forget(self, layer: int) -> None:
        """Drop the stored inputs of `layer`, which nobody will ask for again."""
        if self._directory is not None:
            self._path(layer).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; what is stored stays."""
        for file in (self._reading, self._writing):
            if file is not None:
                file.close()
        self._reading = self._writing = None

    def _path(self, layer: int) -> Path:
        assert self._directory is not None
        return self._directory / f"activations-{layer}"

    def _load(self, row: int) -> Tensor:
        assert self._reading is not None, "nothing has been written yet"
        self._reading.seek(self._offsets[row])
        stored = self._reading.read(self._offsets[row + 1] - self._offsets[row])
        return torch.frombuffer(bytearray(stored), dtype=torch.bfloat16).view(-1, self._width)
