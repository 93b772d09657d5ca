"""GPTQ over NVFP4 blocks: each rounding error is made good by the weights that are rounded later.

What counts is a linear's output on calibration inputs: (W - Q) H (W - Q)^T, H the second moments of
the inputs. With H = L L^T, L lower triangular, that is the squared norm of (W - Q) L, whose column
j holds errors of columns from j on only. So columns are rounded from the last to the first, each to
the value nearest to its weight plus what the columns behind it have cost. A 16-block shares a
scale: several e4m3 scales are tried when the block is reached, and the one that costs least is
kept. Afterwards every block may be chosen anew, with all others fixed.

Ideas: GPTQ (Frantar et al. 2022), in the form of Babai's nearest plane; block-wise descent as in
QuantEase (Behdin et al. 2023). Pure: knows tensors, no files. Called by `layer`.

Legend: O out features · I in features · B 16-blocks along I · S the 16 columns of a block ·
C candidate scales. Weights are held transposed: a column of a weight is contiguous.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.layout import pack_nibbles
from halfbyte.formats.minifloat import (
    codes_of_ranks,
    decode_e4m3,
    nearest_e2m1,
    nearest_rising_e2m1,
)
from halfbyte.formats.nvfp4 import (
    BLOCK,
    SEARCHED_STEPS,
    EncodedNVFP4,
    block_maxima,
    block_scales,
    nearest_scales,
    neighbour_scales,
)
from halfbyte.recipe.schema import GptqOptions

# What a failed factorization adds to the damping, in shares of the mean moment.
_MORE_DAMPING = 10.0
_LEAST_DAMPING = 1e-6
_MOST_DAMPING = 100.0
# Rows of a weight that are rounded together on a CPU; more would only take more memory.
_ROWS = 1024
# Weights that are rounded together on a GPU, where a step costs the same for any number of rows:
# the largest linear of the largest model at once.
GPU_VALUES = 360_000_000
# Bytes held of each weight that is at work.
_WORK_BYTES = 8 * 4


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """How errors of weights that read one input are weighed.

    order_I     int64: the columns as they are laid out here; the last is rounded first
    moments_II  f32, in that order: second moments over their mean, damped
    factor_II   f32, lower triangular: L L^T are the moments
    options     what it was made by; `damping` may be more than the options'
    """

    order_I: Tensor
    moments_II: Tensor
    factor_II: Tensor
    options: GptqOptions
    damping: float


def make_metric(products_II: Tensor, options: GptqOptions) -> Metric:
    """Factor the products of inputs: f32, symmetric, sums or means alike; not modified.

    Inputs that were never anything but zero weigh as the mean and couple to nothing, so their
    weights are rounded to nearest. Where damping is too little to factor it is raised tenfold.
    Holds two matrices of this size at a time, the products included if nobody else holds them.
    Raises FormatError for NaN and infinity.
    """
    diagonal_I = products_II.diagonal().clone()
    if not bool(torch.isfinite(diagonal_I).all()):
        raise FormatError("the second moments of its inputs hold NaN or infinity")
    is_dead_I = diagonal_I <= 0
    mean = float(diagonal_I[~is_dead_I].double().mean()) if not bool(is_dead_I.all()) else 1.0
    order_I = _layout(diagonal_I, options)
    by_rows_II = products_II.index_select(0, order_I)
    del products_II
    moments_II = by_rows_II.index_select(1, order_I).div_(mean)
    del by_rows_II
    moments_II.diagonal()[is_dead_I[order_I]] = 1.0
    return _factored(order_I, moments_II, options, options.damping, 0.0)


def damped_more(metric: Metric, damping: float) -> Metric:
    """The metric with more damping, in the memory of `metric`, which is of no use afterwards."""
    return _factored(metric.order_I, metric.moments_II, metric.options, damping, metric.damping)


def _factored(
    order_I: Tensor, moments_II: Tensor, options: GptqOptions, wanted: float, there: float
) -> Metric:
    """Add what damping is wanted beyond what is there; tenfold where that cannot be factored."""
    while True:
        moments_II.diagonal().add_(wanted - there)
        there = wanted
        factor_II, info = torch.linalg.cholesky_ex(moments_II)
        if int(info) == 0 and bool(torch.isfinite(factor_II.diagonal()).all()):
            return Metric(order_I, moments_II, factor_II, options, there)
        wanted = max(there, _LEAST_DAMPING) * _MORE_DAMPING
        if wanted > _MOST_DAMPING:
            raise FormatError("the second moments of its inputs hold NaN or infinity")


def _layout(diagonal_I: Tensor, options: GptqOptions) -> Tensor:
    """Where columns lie: reversed, so that what is to be rounded first is last."""
    columns_BS = torch.arange(diagonal_I.numel(), device=diagonal_I.device).view(-1, BLOCK)
    if options.order == "energy":
        energy_B = diagonal_I.view(-1, BLOCK).sum(1)
        columns_BS = columns_BS[energy_B.argsort(descending=True, stable=True)]
    return columns_BS.flatten().flip(0)


def encode_gptq(w_OI: Tensor, metric: Metric, tensor_scale: Tensor) -> EncodedNVFP4:
    """Encode a weight to NVFP4 with as little output error as rounding in order finds.

    w_OI          bf16 or f32, I % 16 == 0; not modified
    tensor_scale  f32 scalar > 0, shared by a fused group

    In this metric no row is worse than amax scales and rounding to nearest leave it; with moments
    that are diagonal the codes are the nearest ones. Rows do not influence each other. Raises
    FormatError as `encode_nvfp4`.
    """
    scale = tensor_scale.to(torch.float32)
    block_scales(block_maxima(w_OI[:1]), scale)  # refuses a scale that is none
    block_maxima(w_OI)  # refuses what NVFP4 cannot hold
    order_I = metric.order_I
    place_I = torch.empty_like(order_I)
    place_I[order_I] = torch.arange(order_I.numel(), device=order_I.device)
    # Columns of a block lie together, reversed: the last of them tells where the block is.
    place_B = place_I[::BLOCK] // BLOCK
    codes, scales = [], []
    rows = _rows_together(w_OI)
    for start in range(0, w_OI.shape[0], rows):
        part_OI = w_OI[start : start + rows].to(torch.float32)
        found = _encode_rows(part_OI[:, order_I].T.contiguous(), metric, scale)
        codes.append(pack_nibbles(found.codes_IO[place_I].T))
        scales.append(found.scales_BO[place_B].T)
    scale_OB = torch.cat(scales).contiguous().view(torch.float8_e4m3fn)
    return EncodedNVFP4(torch.cat(codes).contiguous(), scale_OB, scale)


def _encode_rows(w_IO: Tensor, metric: Metric, tensor_scale: Tensor) -> "_Rounded":
    factor_II = metric.factor_II
    rounded = _Rounded(w_IO, tensor_scale)
    round_block = _Rounder(w_IO, tensor_scale)
    _round_in_order(rounded, factor_II, metric.options.block, round_block)
    plain = _Rounded(w_IO, tensor_scale)
    _round_plainly(plain)
    rounded.take(plain, _losses(rounded, factor_II) > _losses(plain, factor_II))
    for _ in range(metric.options.sweeps):
        _sweep(rounded, metric.moments_II, metric.options.block, round_block)
    return rounded


def gptq_bytes(width: int) -> int:
    """Bytes that encoding takes beside the weight and the products of its inputs.

    Another matrix as large as the products, and what is held of the rows at work.
    """
    return 4 * width * width + _WORK_BYTES * width * _ROWS


def gptq_bytes_more(num_weights: int) -> int:
    """Bytes that encoding takes beyond `gptq_bytes` where a GPU has room for many rows at once."""
    return _WORK_BYTES * min(num_weights, GPU_VALUES)


def _rows_together(w_OI: Tensor) -> int:
    """Rows to round together: as many on a GPU as fit what the process may still take of it."""
    width = w_OI.shape[1]
    if w_OI.device.type != "cuda":
        return _ROWS
    device = w_OI.device
    free, total = torch.cuda.mem_get_info(device)
    taken, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    room = min(free + held, allowed) - taken
    rows = min(w_OI.shape[0], max(_ROWS, GPU_VALUES // width))
    return rows if room > _WORK_BYTES * rows * width else _ROWS


class _Rounded:
    """Some rows of a weight while they are rounded, in the metric's order of columns.

    w_IO       what is to be reached, f32
    errors_IO  w - q of what has been rounded, f32; zero elsewhere
    codes_IO   e2m1 codes, uint8;  scales_BO  e4m3 codes, as uint8
    """

    def __init__(self, w_IO: Tensor, tensor_scale: Tensor) -> None:
        columns, rows = w_IO.shape
        self.w_IO = w_IO
        self.tensor_scale = tensor_scale
        self.errors_IO = torch.zeros_like(w_IO)
        self.codes_IO = w_IO.new_zeros((columns, rows), dtype=torch.uint8)
        self.scales_BO = w_IO.new_zeros((columns // BLOCK, rows), dtype=torch.uint8)

    def blocks(self, start: int, stop: int) -> Iterator[slice]:
        """Columns of the blocks between two columns, from the last block to the first."""
        for first in range(stop - BLOCK, start - 1, -BLOCK):
            yield slice(first, first + BLOCK)

    def put(self, block: slice, found: "_Block") -> None:
        """Keep a block of columns whose codes are chosen."""
        self.codes_IO[block] = found.codes_SO
        self.errors_IO[block] = found.errors_SO
        self.scales_BO[block.start // BLOCK] = found.scales_O

    def take(self, other: "_Rounded", is_taken_O: Tensor) -> None:
        """Take over some rows that another rank or thread has rounded."""
        self.codes_IO[:, is_taken_O] = other.codes_IO[:, is_taken_O]
        self.errors_IO[:, is_taken_O] = other.errors_IO[:, is_taken_O]
        self.scales_BO[:, is_taken_O] = other.scales_BO[:, is_taken_O]


class _Block(NamedTuple):
    """A block rounded with one scale a row, and its share of the loss."""

    scales_O: Tensor
    codes_SO: Tensor
    errors_SO: Tensor
    loss_O: Tensor


def _amax_scales(target_SO: Tensor, tensor_scale: Tensor) -> Tensor:
    """e4m3 codes (O,) that map the largest magnitudes of a block to 6."""
    return nearest_scales(target_SO.abs().amax(0), tensor_scale).view(torch.uint8)


def _steps(scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """What one unit of a code stands for under e4m3 codes, f32."""
    return decode_e4m3(scales.view(torch.float8_e4m3fn)).mul_(tensor_scale)


def _round_block(
    w_SO: Tensor, wanted_SO: Tensor, factor_SS: Tensor, tensor_scale: Tensor
) -> _Block:
    """Round one block under each candidate scale, column after column, and keep the best.

    w_SO       the weights, from which errors count
    wanted_SO  where their values should lie, given the errors of the blocks behind
    factor_SS  the block's part of L
    """
    first_O = _amax_scales(wanted_SO, tensor_scale)
    scales_CO = torch.stack([neighbour_scales(first_O, step) for step in SEARCHED_STEPS])
    steps_CO = _steps(scales_CO, tensor_scale)
    diagonal_S = factor_SS.diagonal()
    coupling_SS = factor_SS / diagonal_S
    weight_S = diagonal_S.square()
    wanted_SCO = wanted_SO[:, None].expand(-1, *scales_CO.shape).clone()
    on_gpu = w_SO.is_cuda
    nearest = nearest_rising_e2m1 if on_gpu else nearest_e2m1
    kind = torch.int32 if on_gpu else torch.uint8
    codes_SCO = torch.empty(wanted_SCO.shape, dtype=kind, device=w_SO.device)
    loss_CO = torch.zeros_like(steps_CO)
    for j in range(BLOCK - 1, -1, -1):
        codes_SCO[j], values_CO = nearest(wanted_SCO[j] / steps_CO)
        values_CO.mul_(steps_CO)
        loss_CO.addcmul_((wanted_SCO[j] - values_CO).square_(), weight_S[j])
        error_CO = torch.sub(w_SO[j], values_CO, out=values_CO)
        if j:
            wanted_SCO[:j].addcmul_(coupling_SS[j, :j, None, None], error_CO)
        wanted_SCO[j] = error_CO  # not wanted any more: errors take its place
    loss_O, best_O = loss_CO.min(0)
    pick_S1O = best_O.expand(BLOCK, 1, -1)
    codes_SO = codes_SCO.gather(1, pick_S1O)[:, 0]
    return _Block(
        scales_CO.gather(0, best_O[None])[0],
        codes_of_ranks(codes_SO) if on_gpu else codes_SO,
        wanted_SCO.gather(1, pick_S1O)[:, 0],
        loss_O,
    )


class _Rounder:
    """`_round_block` for blocks of some rows: on a GPU one graph, as it is 400 short kernels.

    What a call gives lies in memory that the next call overwrites.
    """

    def __init__(self, w_IO: Tensor, tensor_scale: Tensor) -> None:
        self._scale = tensor_scale
        self._graph: torch.cuda.CUDAGraph | None = None
        if w_IO.device.type != "cuda":
            return
        w_SO = torch.zeros_like(w_IO[:BLOCK])
        factor_SS = torch.eye(BLOCK, device=w_IO.device)
        self._given = (w_SO, torch.zeros_like(w_SO), factor_SS)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is made when first used does not belong in a graph
            _round_block(*self._given, tensor_scale)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._found = _round_block(*self._given, tensor_scale)

    def __call__(self, w_SO: Tensor, wanted_SO: Tensor, factor_SS: Tensor) -> _Block:
        """A block rounded: weights, wanted values and factor as `_round_block` takes them."""
        if self._graph is None:
            return _round_block(w_SO, wanted_SO, factor_SS, self._scale)
        for held, new in zip(self._given, (w_SO, wanted_SO, factor_SS), strict=True):
            held.copy_(new)
        self._graph.replay()
        return self._found


def _round_in_order(
    rounded: _Rounded, factor_II: Tensor, panel: int, round_block: _Rounder
) -> None:
    """All blocks, from the last; errors reach further panels by one product a panel."""
    columns = rounded.w_IO.shape[0]
    diagonal_I1 = factor_II.diagonal()[:, None]
    errors_IO = rounded.errors_IO
    for stop in range(columns, 0, -panel):
        start = max(0, stop - panel)
        cost_PO = factor_II[stop:, start:stop].T @ errors_IO[stop:]
        for block in rounded.blocks(start, stop):
            behind = slice(block.stop, stop)
            cost_SO = cost_PO[block.start - start : block.stop - start]
            cost_SO = cost_SO + factor_II[behind, block].T @ errors_IO[behind]
            w_SO = rounded.w_IO[block]
            wanted_SO = w_SO + cost_SO / diagonal_I1[block]
            rounded.put(block, round_block(w_SO, wanted_SO, factor_II[block, block]))


def _round_plainly(rounded: _Rounded) -> None:
    """Amax scales and nearest values."""
    for block in rounded.blocks(0, rounded.w_IO.shape[0]):
        w_SO = rounded.w_IO[block]
        scales_O = _amax_scales(w_SO, rounded.tensor_scale)
        steps_O = _steps(scales_O, rounded.tensor_scale)
        codes_SO, values_SO = nearest_e2m1(w_SO / steps_O)
        rounded.put(block, _Block(scales_O, codes_SO, w_SO - values_SO.mul_(steps_O), scales_O))


def _losses(rounded: _Rounded, factor_II: Tensor) -> Tensor:
    """(W - Q) H (W - Q)^T of each row, f32 (O,)."""
    return _squares(factor_II.T @ rounded.errors_IO)


def _squares(x_SO: Tensor) -> Tensor:
    return x_SO.square_().sum(0)


def _sweep(rounded: _Rounded, moments_II: Tensor, panel: int, round_block: _Rounder) -> None:
    """Choose every block anew, all others fixed; changes reach further panels by one product."""
    gradient_IO = moments_II @ rounded.errors_IO
    # All at once: every factorization waits for a GPU.
    blocks = moments_II.shape[0] // BLOCK
    own_BSS = moments_II.view(blocks, BLOCK, blocks, BLOCK).diagonal(dim1=0, dim2=2)
    own_BSS = own_BSS.permute(2, 0, 1).contiguous()
    factor_BSS = torch.linalg.cholesky(own_BSS)
    columns = rounded.w_IO.shape[0]
    for stop in range(columns, 0, -panel):
        start = max(0, stop - panel)
        before_PO = rounded.errors_IO[start:stop].clone()
        for block in rounded.blocks(start, stop):
            number = block.start // BLOCK
            own = own_BSS[number], factor_BSS[number]
            change_SO = _choose_anew(rounded, block, gradient_IO[block], own, round_block)
            ahead = slice(start, block.start)
            gradient_IO[ahead].addmm_(moments_II[ahead, block], change_SO)
        change_PO = rounded.errors_IO[start:stop] - before_PO
        gradient_IO[:start].addmm_(moments_II[:start, start:stop], change_PO)


def _choose_anew(
    rounded: _Rounded,
    block: slice,
    gradient_SO: Tensor,
    own: tuple[Tensor, Tensor],
    round_block: _Rounder,
) -> Tensor:
    """Round a block with all others fixed; a row keeps what it has unless it gains.

    gradient_SO  what all errors, the block's own too, ask for
    own          the block's part of the moments, and its factor
    returns      how its errors change, (S, O)
    """
    own_SS, factor_SS = own
    w_SO, had_SO = rounded.w_IO[block], rounded.errors_IO[block].clone()
    # e H e + 2 e a is least where e = -H^-1 a, a being what the other blocks' errors ask for.
    asked_SO = gradient_SO - own_SS @ had_SO
    away_SO = torch.cholesky_solve(asked_SO, factor_SS)
    wanted_SO = w_SO + away_SO
    found = round_block(wanted_SO, wanted_SO, factor_SS)
    gains_O = found.loss_O < _squares(factor_SS.T @ (had_SO + away_SO))
    change_SO = torch.where(gains_O, found.errors_SO - away_SO - had_SO, 0.0)
    number = block.start // BLOCK
    rounded.put(
        block,
        _Block(
            torch.where(gains_O, found.scales_O, rounded.scales_BO[number]),
            torch.where(gains_O, found.codes_SO, rounded.codes_IO[block]),
            had_SO + change_SO,
            found.loss_O,
        ),
    )
    return change_SO
