"""Moves calibration rows between where they wait and the device where layers run.

On a CPU there is nothing to move. On a GPU a row travels each way beside the computation of
another: copies have streams of their own, results land in page-locked buffers that are lent to the
threads which store them. Called by `stream`.
"""

from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.calibrate.activations import MOST_PENDING, Activations


class Lane(Protocol):
    """The way of a row to its layer and back, either `HostLane` or `CudaLane`."""

    def fetch(self, row: int) -> Tensor:
        """Start bringing in a row; returns at once with a tensor that `arrive` makes usable."""

    def arrive(self, x_TD: Tensor) -> Tensor:
        """Make a fetched row usable: work enqueued from here on waits for its copy."""

    def store(self, row: int, x_TD: Tensor) -> None:
        """Start keeping the layer's output for a row."""


def make_lane(device: torch.device, activations: Activations) -> Lane:
    """Make the lane that moves rows to and from a device."""
    if device.type == "cuda":
        return CudaLane(device, activations)
    return HostLane(activations)


class HostLane:
    """A lane that moves nothing, for devices that compute on host memory."""

    def __init__(self, activations: Activations) -> None:
        self._activations = activations

    def fetch(self, row: int) -> Tensor:
        """Read the row where it lies: in memory or on the disk."""
        return self._activations.read(row)

    def arrive(self, x_TD: Tensor) -> Tensor:
        """Return the row as it is: nothing had to be copied."""
        return x_TD

    def store(self, row: int, x_TD: Tensor) -> None:
        """Keep the layer's output for a row where rows wait."""
        self._activations.write(row, x_TD)


class CudaLane:
    """Copies rows beside the computation, through pinned buffers for all rows on the way."""

    def __init__(self, device: torch.device, activations: Activations) -> None:
        self._device = device
        self._activations = activations
        self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        shape = (max(activations.row_tokens), activations.width)
        for _ in range(min(MOST_PENDING + 2, len(activations.row_tokens))):
            self._free.put(torch.empty(shape, dtype=torch.bfloat16, pin_memory=True))

    def fetch(self, row: int) -> Tensor:
        """Start to copy a row to the device; from pageable memory, return once it is copied."""
        host_TD = self._activations.read(row)
        with torch.cuda.stream(self._inward):
            return host_TD.to(self._device, non_blocking=True)

    def arrive(self, x_TD: Tensor) -> Tensor:
        """Make the current stream wait for the copy of this row."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._inward)
        x_TD.record_stream(computing)
        return x_TD

    def store(self, row: int, x_TD: Tensor) -> None:
        """Start to copy a row to the host; waits if all buffers are on their way to the disk."""
        buffer = self._free.get()
        lent_TD = buffer[: x_TD.shape[0]]
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            lent_TD.copy_(x_TD, non_blocking=True)
            x_TD.record_stream(self._outward)
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            landed.record(self._outward)
        self._activations.write_lent(
            row, lent_TD, ready=landed.synchronize, done=lambda: self._free.put(buffer)
        )
