"""Token masks of a batch, filled ahead of their use where that pays.

What a mask allows next hangs on the tokens so far, not on the logits. Where the model runs on
another device, masks are begun before it and filled by a thread while it computes. On a CPU the two
would only fight for cores, so they are filled when they are asked for. One thread, because more of
them take longer than one does for the same masks: eight of a nested schema 0.92 ms with two threads
of two cores, 0.72 with one (what fills a mask is foreign code of some 50 us).
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.request import GenerationRequest, TokenMask


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
    """Fills token masks ahead of their use; only the engine's thread calls it."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._buffers: list[NDArray[np.uint32]] = []
        self._thread: ThreadPoolExecutor | None = None
        self._task: Future[None] | None = None
        self._begun: dict[int, _Fill] = {}

    def begin(self, requests: Iterable[GenerationRequest]) -> None:
        """Start filling the masks of these requests, where one is there and not begun.

        Each is good for one token. Only the requests of the last call are remembered.
        """
        masks = [(id(request), request.mask) for request in requests if request.mask is not None]
        if all(key in self._begun and self._begun[key].mask is mask for key, mask in masks):
            return
        self._settle()
        # The first buffer is for masks that were not begun.
        self._begun = {
            key: _Fill(mask, self._buffer(number)) for number, (key, mask) in enumerate(masks, 1)
        }
        if not masks:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._task = self._thread.submit(_fill_all, list(self._begun.values()))

    def forget(self) -> None:
        """Drop what was begun and not asked for, as after a step that failed."""
        self._settle()
        self._begun = {}

    def allows(self, request: GenerationRequest, token_id: int) -> bool:
        """`TokenMask.allows`; if so, the token counts as chosen. Raises what the mask raised."""
        assert request.mask is not None
        # It may be at work on this mask.
        self._settle()
        allowed = request.mask.allows(token_id)
        if allowed:
            # What was begun is of the token before the next one.
            self._begun.pop(id(request), None)
        return allowed

    def words(self, request: GenerationRequest) -> Tensor:
        """What this request's mask allows next: int32 (ceil(V / 32),), a bit per token.

        Good until the next call of `begin` or `words`. Raises what the mask raised.
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
        """End the thread that fills masks; begun masks are finished first."""
        self._settle()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _settle(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def _buffer(self, number: int) -> NDArray[np.uint32]:
        while len(self._buffers) <= number:
            self._buffers.append(np.zeros(self._num_words, dtype=np.uint32))
        return self._buffers[number]


def _fill_all(fills: Sequence[_Fill]) -> None:
    for fill in fills:
        fill.run()
