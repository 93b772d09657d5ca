"""A chunk of prompts carried through the layers in slices, between the steps of running answers.

The longer the context, the more a chunk costs: at 32k tokens one row's attention in one layer takes
as long as a whole step that generates. So a chunk beside running answers stops wherever its time is
up - between rows of a linear part, between spans of the context - and goes on in the next step.
The context is still read once a chunk and layer. What stands between two slices is the residual
stream and the attention of one layer; K and V go to their pages as ever. The bits are those of a
chunk computed in one piece (decision 0016). Images that a chunk shows are encoded first, in slices
as well (decision 0075).

Shapes: T tokens of the chunk, D model width, N query heads, K key/value heads, H head size,
R rows with logits, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from halfbyte.engine.cache import PagedAttend
from halfbyte.engine.device import Results
from halfbyte.engine.images import Placement, Placing
from halfbyte.engine.walk import Costs, Walk
from halfbyte.kernels.dispatch import SPAN_TOKENS
from halfbyte.model.decoder import Decoder, DecoderLayer, Step
from halfbyte.model.parts import Part

# Rows a chunk has at most: enough that the context's keys and values are decoded for many queries
# at once, few enough that a new prompt is soon begun.
CHUNK_TOKENS = 32
# Fewer rows than this read a weight for too little.
_LEAST_ROWS = 8


class DecoderSlices:
    """A step of prompts on its way through a decoder, in one process on a CPU."""

    def __init__(
        self,
        decoder: Decoder,
        step_of: Callable[[Placement | None], Step],
        attend: PagedAttend,
        placing: Placing | None,
        costs: Costs,
    ) -> None:
        """Take `step_of`, which gives the step that attends by `attend` once images are there."""
        self._placing = placing
        # It knows nothing of the walk, so that both go with the step that is dropped.
        self._passage = _Passage(decoder, step_of, attend, placing)
        self._walk = Walk(self._passage.parts(), costs)

    def encode(self, deadline: float) -> bool:
        return self._placing is None or self._placing.advance(deadline)

    @torch.inference_mode()
    def advance(self, deadline: float) -> Results | None:
        if not self.encode(deadline) or not self._walk.advance(deadline):
            return None
        return Results(*self._passage.concluded)


class _Passage:
    """What stands between the slices of a chunk.

    concluded  the results, once all parts are computed
    """

    concluded: tuple[Tensor, Tensor]
    # Made by `_make_room`, once the step is known.
    _num_rows: int
    _delta_TD: Tensor | None
    _residual_TD: Tensor
    _next_delta_TD: Tensor
    _next_residual_TD: Tensor
    _q_TNH: Tensor
    _out_TNH: Tensor
    _totals: Tensor

    def __init__(
        self,
        decoder: Decoder,
        step_of: Callable[[Placement | None], Step],
        attend: PagedAttend,
        placing: Placing | None,
    ) -> None:
        self._decoder = decoder
        self._step_of = step_of
        self._attend = attend
        self._placing = placing
        self._layer = 0

    def parts(self) -> Iterator[Part]:
        """Made one by one, the first when all images are there."""
        step = self._step_of(None if self._placing is None else self._placing.placement())
        self._make_room(step)
        num_rows, size = self._num_rows, self._num_rows.bit_length()
        num_spans = -(-int(self._attend.context_lengths_S.max()) // SPAN_TOKENS)
        for index, layer in enumerate(self._decoder.decoder_layers()):
            self._layer = index
            yield Part("project", size, num_rows, _LEAST_ROWS, partial(self._project, layer))
            yield Part("attend", size, num_spans, 1, self._attend_spans)
            yield Part("transform", size, num_rows, _LEAST_ROWS, partial(self._transform, layer))
            self._delta_TD = self._next_delta_TD
            self._next_delta_TD = torch.empty_like(self._residual_TD)
        rows_R = step.logit_rows_R
        num_logits = num_rows if rows_R is None else len(rows_R)
        yield Part("conclude", num_logits.bit_length(), 1, 1, partial(self._conclude, rows_R))

    def _make_room(self, step: Step) -> None:
        """For what a part of a layer reads, and what it leaves to the next one."""
        config = self._decoder.config
        self._rotation = self._decoder.rotary.at(step.positions_T)
        self._delta_TD = None
        self._residual_TD = self._decoder.embed(step)
        self._next_delta_TD = torch.empty_like(self._residual_TD)
        self._next_residual_TD = torch.empty_like(self._residual_TD)
        self._num_rows = len(self._residual_TD)
        self._q_TNH = self._residual_TD.new_empty(
            (self._num_rows, config.num_heads, config.head_dim)
        )
        self._out_TNH = self._q_TNH
        self._totals = torch.empty((self._num_rows, config.num_heads, 2 + config.head_dim))

    def _project(self, layer: DecoderLayer, start: int, stop: int) -> None:
        rows = slice(start, stop)
        delta_TD = None if self._delta_TD is None else self._delta_TD[rows]
        q_TNH, k_TKH, v_TKH, residual_TD = layer.project(delta_TD, self._residual_TD[rows])
        self._next_residual_TD[rows] = residual_TD
        rotation = self._rotation.rows(rows)
        self._q_TNH[rows] = self._attend.store(self._layer, q_TNH, k_TKH, v_TKH, rotation, rows)

    def _attend_spans(self, start: int, stop: int) -> None:
        spans = range(start, stop)
        self._out_TNH = self._attend.attend_spans(self._layer, self._q_TNH, spans, self._totals)

    def _transform(self, layer: DecoderLayer, start: int, stop: int) -> None:
        rows = slice(start, stop)
        delta_TD, residual_TD = layer.transform(self._out_TNH[rows], self._next_residual_TD[rows])
        self._next_delta_TD[rows] = delta_TD
        # Read for the last time by `_project`, before any row came here.
        self._residual_TD[rows] = residual_TD

    def _conclude(self, logit_rows_R: Tensor | None, start: int, stop: int) -> None:
        self.concluded = self._decoder.concluded(self._delta_TD, self._residual_TD, logit_rows_R)
