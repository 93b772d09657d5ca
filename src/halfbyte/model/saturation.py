"""How many activations an FP8 scale clips, by kind of linear, rows of text and of images apart.

An activation counts as saturated if its e4m3 code is the largest, 448: from 432 scales on. A scale
that was measured on a model's own texts gives a few such codes; a scale that clips gives many. Only
linears with a stored input scale are counted: where each token has its own, its largest value
always takes the largest code, and nothing is clipped.

Counted where it is asked for (`EngineConfig.count_saturation`), else nobody makes any of this.

Shapes: T rows, R rows with logits, I features, K kinds of linears.
"""

import time

import torch
from torch import Tensor

from halfbyte.model.linear import Linear

KINDS = ("qkv", "o", "gate_up", "down", "head")
ROWS = ("text", "image")
LARGEST_CODE = 0x7E  # of e4m3, without its sign: 448
# Quotients from here on are rounded or clipped to 448: half way from 416, to the even mantissa.
_LEAST = 432.0
# A device is asked for its counts this often at most: asking waits for the step that runs.
_PAUSE_S = 1.0


class SaturationCounts:
    """Saturated and all activations since loading; each rank counts the features that it has.

    counts_K22  int64 on the device: kind, text or image, saturated or all
    """

    def __init__(self, device: torch.device) -> None:
        self.counts_K22 = torch.zeros(len(KINDS), 2, 2, dtype=torch.int64, device=device)
        self._is_image: dict[int, Tensor] = {}
        self._read_at = -_PAUSE_S
        self._read: tuple[tuple[str, str, int, int], ...] = ()

    def clear(self) -> None:
        """Forget what was counted while the device was tried out and its steps were measured."""
        self.counts_K22.zero_()
        self._read_at = -_PAUSE_S

    def of(self, kind: str) -> Tensor:
        """The four counts of a kind, (2, 2), for a kernel to add to."""
        return self.counts_K22[KINDS.index(kind)]

    def begin(
        self, num_rows: int, image_rows_I: Tensor | None, logit_rows_R: Tensor | None
    ) -> None:
        """Say which rows of the step that comes are of images; the head may see some rows only."""
        is_image_T = torch.zeros(num_rows, dtype=torch.bool, device=self.counts_K22.device)
        if image_rows_I is not None:
            is_image_T[image_rows_I] = True
        self._is_image = {num_rows: is_image_T}
        if logit_rows_R is not None:
            self._is_image.setdefault(len(logit_rows_R), is_image_T[logit_rows_R])

    def add(self, kind: str, x_TI: Tensor, scale: float) -> None:
        """Count what a linear of this input scale is about to round."""
        saturated_T = (x_TI.float().abs() / scale >= _LEAST).sum(-1)
        self._add(kind, saturated_T, x_TI.shape[1])

    def add_codes(self, kind: str, codes_TI: Tensor) -> None:
        """Count how many e4m3 codes of rows of text are the largest one."""
        is_largest_TI = codes_TI.view(torch.uint8) & 0x7F == LARGEST_CODE
        self._add(kind, is_largest_TI.sum(-1), codes_TI.shape[1])

    def _add(self, kind: str, saturated_T: Tensor, width: int) -> None:
        counts_22 = self.of(kind)
        is_image_T = self._is_image.get(len(saturated_T))
        if is_image_T is None:  # rows of no step, as a draft model's guesses
            is_image_T = torch.zeros_like(saturated_T, dtype=torch.bool)
        for row, is_one_T in enumerate((~is_image_T, is_image_T)):
            counts_22[row, 0] += (saturated_T * is_one_T).sum()
            counts_22[row, 1] += is_one_T.sum() * width

    def figures(self) -> tuple[tuple[str, str, int, int], ...]:
        """Kind, "text" or "image", saturated, all; of a GPU as they were up to a second ago."""
        now = time.monotonic()
        if self.counts_K22.is_cuda and now - self._read_at < _PAUSE_S:
            return self._read
        counts = self.counts_K22.tolist()
        self._read_at = now
        self._read = tuple(
            (kind, rows, *counts[k][r])
            for k, kind in enumerate(KINDS)
            for r, rows in enumerate(ROWS)
        )
        return self._read


class CountedLinear:
    """A linear whose input is counted against its scale before it is multiplied."""

    def __init__(self, linear: Linear, counts: SaturationCounts, kind: str, scale: float) -> None:
        self._linear = linear
        self._counts = counts
        self._kind = kind
        self._scale = scale
        self.num_bytes = linear.num_bytes

    def __call__(self, x_TI: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        self._counts.add(self._kind, x_TI, self._scale)
        return self._linear(x_TI, out_dtype)
