"""Host memory that a GPU reads or writes while the host goes on.

Shapes: R rows.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Steps whose memory may be in use at once: one runs, one waits, and one to spare.
_IN_FLIGHT = 3


class PendingTokens(NamedTuple):
    """Tokens on their way to the host; read them before `_IN_FLIGHT` further steps are launched."""

    buffer: Tensor
    event: Any

    def wait(self) -> list[int]:
        """Wait until the tokens of a launched step have arrived; return them."""
        if self.event is not None:
            self.event.synchronize()
        token_ids: list[int] = self.buffer.tolist()
        return token_ids


class PinnedRing:
    """A ring of pinned host buffers (plain memory without a GPU).

    A buffer is used again only when the copy that last used it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._ring: deque[tuple[Tensor, Any]] = deque()

    def _take(self, num_values: int) -> Tensor:
        """A buffer of at least so many int64 values that no copy uses any more."""
        buffer = None
        if len(self._ring) > _IN_FLIGHT * 4:
            buffer, event = self._ring.popleft()
            if event is not None:
                event.synchronize()
        if buffer is None or buffer.numel() < num_values:
            count = max(1024, 1 << (num_values - 1).bit_length())
            buffer = torch.empty(count, dtype=torch.int64, pin_memory=self._is_cuda)
        return buffer

    def _mark(self, buffer: Tensor) -> Any:
        """Put a buffer into the ring behind the copies enqueued so far; returns their event."""
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._ring.append((buffer, event))
        return event

    def send(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Copy arrays of 8-byte values to the device, all in one transfer."""
        total = sum(array.size for array in arrays)
        buffer = self._take(max(total, 1))
        host = buffer.numpy()
        start = 0
        for array in arrays:
            assert array.dtype.itemsize == 8, array.dtype
            host[start : start + array.size] = array.reshape(-1).view(np.int64)
            start += array.size
        device = torch.empty(total, dtype=torch.int64, device=self._device)
        device.copy_(buffer[:total], non_blocking=True)
        self._mark(buffer)
        sent, start = [], 0
        for array in arrays:
            part = device[start : start + array.size]
            if array.dtype == np.float64:
                part = part.view(torch.float64)
            sent.append(part.view(array.shape))
            start += array.size
        return sent

    def fetch(self, tokens_R: Tensor) -> PendingTokens:
        """Start to copy chosen tokens from the device to the host."""
        count = tokens_R.numel()
        buffer = torch.empty(0, dtype=torch.int64) if count == 0 else self._take(count)
        buffer[:count].copy_(tokens_R, non_blocking=True)
        return PendingTokens(buffer[:count], self._mark(buffer) if count else None)
