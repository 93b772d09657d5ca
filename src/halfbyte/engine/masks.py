"""Token masks of a batch, filled by a few threads at once; ahead of their use where that pays.

What a mask allows next hangs on the tokens so far, not on the logits. Where the model runs on
another device, masks are begun before it and filled while it computes; on a CPU the two would only
fight for cores, so they are begun when tokens are chosen. A fill is foreign code that lets other
threads run.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.request import GenerationRequest, TokenMask

_MAX_THREADS = 4


@dataclass(slots=True)
class _Fill:
    """A mask and its words; `error` is what it raised."""

    mask: TokenMask
    bitmask: NDArray[np.uint32]
    error: Exception | None = None

    def run(self) -> None:
        try:
            self.mask.fill(self.bitmask)
        except Exception as error:  # its own request pays for it, in `words`
            self.error = error


class MaskFiller:
    """Fills masks ahead of their use; used by one thread, the engine's."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._buffers: list[NDArray[np.uint32]] = []
        self._threads: ThreadPoolExecutor | None = None
        self._tasks: list[Future[None]] = []
        self._begun: dict[int, _Fill] = {}

    def begin(self, requests: Iterable[GenerationRequest]) -> None:
        """Start filling the masks of those that have one and are not begun; each may be asked for
        once. Only the requests of the last call are remembered.
        """
        masks = [(id(request), request.mask) for request in requests if request.mask is not None]
        if all(key in self._begun and self._begun[key].mask is mask for key, mask in masks):
            return
        self._settle()
        # The first buffer is for masks that were not begun.
        self._begun = {
            key: _Fill(mask, self._buffer(number)) for number, (key, mask) in enumerate(masks, 1)
        }
        if self._threads is None:
            num_threads = min(os.cpu_count() or 1, _MAX_THREADS)
            self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="masks")
        # Each thread takes the next that nobody has taken.
        waiting = iter(list(self._begun.values()))
        num_tasks = min(len(self._begun), os.cpu_count() or 1, _MAX_THREADS)
        self._tasks = [self._threads.submit(_fill_all, waiting) for _ in range(num_tasks)]

    def forget(self) -> None:
        """Drop what was begun and not asked for, as after a step that failed."""
        self._settle()
        self._begun = {}

    def words(self, request: GenerationRequest) -> Tensor:
        """What the mask of this request allows next, int32 (ceil(V / 32),), good until the next
        call of `begin` or `words`. Raises what the mask raised.
        """
        assert request.mask is not None
        fill = self._begun.pop(id(request), None)
        if fill is None:
            # A token further on than the one that was begun: its mask could not be known before.
            fill = _Fill(request.mask, self._buffer(0))
            fill.run()
        self._settle()
        if fill.error is not None:
            raise fill.error
        return torch.from_numpy(fill.bitmask.view(np.int32))

    def close(self) -> None:
        """End the threads."""
        self._settle()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _settle(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()

    def _buffer(self, number: int) -> NDArray[np.uint32]:
        while len(self._buffers) <= number:
            self._buffers.append(np.zeros(self._num_words, dtype=np.uint32))
        return self._buffers[number]


def _fill_all(waiting: Iterator[_Fill]) -> None:
    for fill in waiting:
        fill.run()
