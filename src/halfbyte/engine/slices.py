"""A chunk of prompts carried through the layers in slices, between the steps of running answers.

The longer the context, the more a chunk costs: at 32k tokens one row's attention in one layer takes
as long as a whole step that generates. So a chunk beside running answers stops wherever its time is
up - between rows of a linear part, between spans of the context - and goes on in the next step.
The context is still read once a chunk and layer. What stands between two slices is the residual
stream and the attention of one layer; K and V go to their pages as ever. The bits are those of a
chunk computed in one piece (decision 0016).

Shapes: T tokens of the chunk, D model width, N query heads, K key/value heads, H head size,
R rows with logits, V vocabulary.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.engine.cache import PagedAttend
from halfbyte.engine.scheduler import Work
from halfbyte.kernels.dispatch import SPAN_TOKENS
from halfbyte.model.decoder import Decoder, Step

# Rows a chunk has at most: enough that the context's keys and values are decoded for many queries
# at once, few enough that a new prompt is soon begun.
CHUNK_TOKENS = 32
# Fewer rows than this read a weight for too little.
_LEAST_ROWS = 8
# Weight of the newest measurement of a cost.
_GAIN = 0.3
_MANY = 2**30


class Costs:
    """Seconds that parts of a chunk take, as measured; outlives the chunks."""

    def __init__(self) -> None:
        self._unit_s: dict[tuple[str, int], float] = {}

    def num_fitting(self, kind: tuple[str, int], seconds: float) -> int | None:
        """Units of a part that take about so long; None where nothing is known."""
        unit_s = self._unit_s.get(kind)
        return None if unit_s is None else int(min(seconds / unit_s, _MANY))

    def note(self, kind: tuple[str, int], count: int, seconds: float) -> None:
        """Learn what `count` units took."""
        old = self._unit_s.get(kind)
        new = max(seconds / count, 1e-9)
        self._unit_s[kind] = new if old is None else old + _GAIN * (new - old)


class Finished(NamedTuple):
    """A chunk behind the last layer.

    logits_RV  as `Runner.run` gives them
    hidden_TD  of all rows, behind the final norm
    """

    works: SequenceOf[Work]
    logits_RV: Tensor
    hidden_TD: Tensor


class Chunk:
    """Tokens of one or several prompts on their way through a decoder, in one process on a CPU."""

    def __init__(
        self,
        works: SequenceOf[Work],
        decoder: Decoder,
        step: Step,
        attend: PagedAttend,
        costs: Costs,
    ) -> None:
        """`step` computes `works`; their sequences keep their blocks until it is over."""
        self.works = works
        self._decoder = decoder
        self._layers = decoder.decoder_layers()
        self._logit_rows_R = step.logit_rows_R
        self._attend = attend
        self._costs = costs
        self._rotation = decoder.rotary.at(step.positions_T)
        # What a part of a layer reads, and what it leaves to the next one.
        self._delta_TD: Tensor | None = None
        self._residual_TD = decoder.embed(step)
        self._next_delta_TD = torch.empty_like(self._residual_TD)
        self._next_residual_TD = torch.empty_like(self._residual_TD)
        config = decoder.config
        self._num_rows = len(self._residual_TD)
        rows_R = step.logit_rows_R
        self._num_logits = self._num_rows if rows_R is None else len(rows_R)
        self._q_TNH = self._residual_TD.new_empty(
            (self._num_rows, config.num_heads, config.head_dim)
        )
        self._out_TNH = self._q_TNH
        self._totals = torch.empty((self._num_rows, config.num_heads, 2 + config.head_dim))
        self._num_spans = -(-int(attend.context_lengths_S.max()) // SPAN_TOKENS)
        # Where it stands: the layer, the part of it, how much of that is done.
        self._layer = 0
        self._part = 0
        self._num_done = 0

    @torch.inference_mode()
    def advance(self, deadline: float) -> Finished | None:
        """Go on about until then, a little in any case; the result once all layers are through.

        deadline  by `time.perf_counter`
        """
        is_first = True
        while self._layer < len(self._layers):
            if not self._advance_part(deadline, is_first=is_first):
                return None
            is_first = False
        started = time.perf_counter()
        kind = ("conclude", self._num_logits.bit_length())
        if not is_first and self._costs.num_fitting(kind, deadline - started) == 0:
            return None
        computed = self._decoder.concluded(self._delta_TD, self._residual_TD, self._logit_rows_R)
        self._costs.note(kind, 1, time.perf_counter() - started)
        return Finished(self.works, *computed)

    def _advance_part(self, deadline: float, *, is_first: bool) -> bool:
        """Some of the present part, as much as fits; False if the least of it does not."""
        name, num_units, least, compute = self._parts()[self._part]
        started = time.perf_counter()
        kind = (name, self._num_rows.bit_length())
        left = num_units - self._num_done
        least = min(least, left)
        fitting = self._costs.num_fitting(kind, deadline - started)
        if fitting is not None and fitting < least and not is_first:
            return False
        count = min(max(fitting or 0, least), left)
        compute(self._num_done, self._num_done + count)
        self._costs.note(kind, count, time.perf_counter() - started)
        self._num_done += count
        if count == left:
            self._num_done = 0
            self._part += 1
        if self._part == len(self._parts()):
            self._part = 0
            self._layer += 1
            self._delta_TD = self._next_delta_TD
            self._next_delta_TD = torch.empty_like(self._delta_TD)
        return True

    def _parts(self) -> tuple[tuple[str, int, int, Callable[[int, int], None]], ...]:
        """Of a layer: name, units, the fewest of them that are worth a call, what computes them."""
        return (
            ("project", self._num_rows, _LEAST_ROWS, self._project),
            ("attend", self._num_spans, 1, self._attend_spans),
            ("transform", self._num_rows, _LEAST_ROWS, self._transform),
        )

    def _project(self, start: int, stop: int) -> None:
        rows = slice(start, stop)
        delta_TD = None if self._delta_TD is None else self._delta_TD[rows]
        layer = self._layers[self._layer]
        q_TNH, k_TKH, v_TKH, residual_TD = layer.project(delta_TD, self._residual_TD[rows])
        self._next_residual_TD[rows] = residual_TD
        rotation = self._rotation.rows(rows)
        self._q_TNH[rows] = self._attend.store(self._layer, q_TNH, k_TKH, v_TKH, rotation, rows)

    def _attend_spans(self, start: int, stop: int) -> None:
        spans = range(start, stop)
        self._out_TNH = self._attend.attend_spans(self._layer, self._q_TNH, spans, self._totals)

    def _transform(self, start: int, stop: int) -> None:
        rows = slice(start, stop)
        layer = self._layers[self._layer]
        delta_TD, residual_TD = layer.transform(self._out_TNH[rows], self._next_residual_TD[rows])
        self._next_delta_TD[rows] = delta_TD
        # Read for the last time by `_project`, before any row came here.
        self._residual_TD[rows] = residual_TD
