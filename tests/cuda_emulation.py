"""The CUDA kernels in plain torch, launch by launch, on a CPU.

What a launch is told (strides, scales, kinds, which buffer) is taken literally, so that a decode
step or a prefill that wires its kernels wrongly gives wrong numbers here. What happens inside a
kernel - its threads, its order of sums - is not emulated; the GPU tests are about that.

Shapes: T tokens, F features, O, I out and in features of a product, P pages, Z slots of a page.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_plain import values_of
from halfbyte.config import TextConfig
from halfbyte.kernels.cuda import ops
from halfbyte.kernels.cuda.driver import LinearResult
from halfbyte.kernels.cuda.library import (
    PREFILL_CONFIGS,
    HeadShape,
    KernelLibrary,
    StreamConfig,
    choose_config,
    plan_stream,
)
from halfbyte.kernels.repack import (
    K_BLOCK,
    TiledWeight,
    TileFormat,
    pair_activations,
    untile_rows,
)
from halfbyte.model.cuda import decode, launches
from halfbyte.model.cuda.decode import DecodeStep
from halfbyte.model.cuda.launches import CudaModel, SharedBuffers
from halfbyte.model.cuda.weights import CudaWeights, KvCache, make_cache
from halfbyte.model.rope import RotaryTable

PAGE, PAGES = 16, 4  # slots of a page, pages of a row
_DTYPES = {"nvfp4": torch.float16, "bf16": torch.bfloat16}


def use_emulation(monkeypatch: pytest.MonkeyPatch) -> "EmulatedLibrary":
    """Have launches of decode steps and prefills computed here; the library to make them with."""
    for module in (decode, launches, ops):
        monkeypatch.setattr(module, "Launch", EmulatedLaunch)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch, "_scaled_mm", _scaled_mm)
    return EmulatedLibrary()


def make_step(
    library: "EmulatedLibrary", weights: CudaWeights, cache: KvCache, size: int, **more: Any
) -> DecodeStep:
    """A step whose rows have pages of their own, in scattered order."""
    rotary = RotaryTable(weights.config, torch.device("cpu")).at
    step = DecodeStep(
        CudaModel(library, weights, cache, rotary, SharedBuffers(), **more),
        size,
        max_context_tokens=PAGE * PAGES,
        prepare=lambda step: None,
        logits_TV=torch.full((size, weights.head.weight.out_features), torch.nan),
    )
    table = torch.randperm(size * PAGES).int().view(size, PAGES)
    step.block_table_TP.copy_(table)
    return step


def new_cache(config: TextConfig, size: int) -> KvCache:
    """A cache for so many rows, in which nothing unwritten may be read: NaN."""
    cache = make_cache(config, size * PAGES, PAGE, torch.device("cpu"))
    for part in (*cache.keys, *cache.values):
        part.fill_(0x7F)
    return cache


def put(step: DecodeStep, tokens_T: Tensor, position: int) -> None:
    """A row of each sequence at this position."""
    step.token_ids_T.copy_(tokens_T)
    step.positions_T.fill_(position)
    step.context_lengths_T.fill_(position + 1)
    pages_T = step.block_table_TP[:, position // PAGE].long()
    step.slots_T.copy_(pages_T * PAGE + position % PAGE)


@dataclass
class EmulatedLaunch:
    """A launch that calls a function of its grid and arguments."""

    kernel: Callable[..., None]
    grid: tuple[int, int, int]
    num_threads: int
    arguments: Any
    cluster: int = 1
    overlaps: bool = True

    def run(self, stream: int) -> None:
        del stream
        plain = [a.value if isinstance(a, ctypes.c_int64) else a for a in self.arguments]
        self.kernel(self.grid, *plain)


class EmulatedLibrary(KernelLibrary):
    """Kernels as functions; as many multiprocessors as an H100 has."""

    device = torch.device("cpu")
    num_multiprocessors = 132

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}

    def linear(
        self, format_: TileFormat, columns: int, config: StreamConfig | None = None
    ) -> tuple[Any, StreamConfig]:
        config = config or choose_config(format_, columns)

        def run(
            grid: Any,
            data: Tensor,
            x: Tensor,
            row_scale_O: Tensor,
            out: Tensor | None,
            partial: Tensor,
            num_out: int,
            k_blocks: int,
            num_tokens: int,
        ) -> None:
            weight = self._weight(format_, data, row_scale_O, num_out, k_blocks)
            x_TI = _chunks(x, columns * 16, num_tokens, k_blocks, format_)
            y_TO = self._product(x_TI, weight)
            plan = plan_stream(weight, config, self.num_multiprocessors)
            counts = torch.tensor(plan.slot_counts).repeat_interleave(config.tile_rows)
            slots = partial.view(-1)[: plan.num_slots * y_TO.numel()].view(-1, *y_TO.shape)
            is_whole_O = (counts == 1) & torch.tensor(out is not None)
            slots.fill_(torch.nan)
            for slot in range(plan.num_slots):  # an equal share of the sum in each
                shares_TO = torch.where(counts > slot, y_TO / counts, torch.nan)
                slots[slot] = torch.where(is_whole_O, torch.nan, shares_TO)
            if out is not None:
                rows = torch.where(is_whole_O, y_TO, torch.nan).bfloat16()
                out.view(-1)[: y_TO.numel()].view(y_TO.shape).copy_(rows)

        return run, config

    def prefill_linear(self, format_: TileFormat, columns: int) -> tuple[Any, StreamConfig]:
        def run(
            grid: Any,
            data: Tensor,
            x: Tensor,
            chunk_stride: int,
            row_scale_O: Tensor,
            out_TO: Tensor,
            num_out: int,
            k_blocks: int,
            num_tokens: int,
            *room: Any,
        ) -> None:
            weight = self._weight(format_, data, row_scale_O, num_out, k_blocks)
            x_TI = _chunks(x, chunk_stride, num_tokens, k_blocks, format_)
            out_TO.copy_(self._product(x_TI, weight))

        return run, PREFILL_CONFIGS[format_, columns]

    def _weight(
        self, format_: TileFormat, data: Tensor, row_scale_O: Tensor, num_out: int, k_blocks: int
    ) -> TiledWeight:
        assert data.shape[:2] == (num_out // 64, k_blocks)
        return TiledWeight(format_, data, row_scale_O, num_out, k_blocks * K_BLOCK[format_])

    def _product(self, x_TI: Tensor, weight: TiledWeight) -> Tensor:
        assert bool(torch.isfinite(x_TI.float()).all())
        if weight.data.data_ptr() not in self._values:
            self._values[weight.data.data_ptr()] = values_of(weight)
        w_OI = self._values[weight.data.data_ptr()]
        return ((x_TI.double() @ w_OI.T) * weight.row_scale_O.double()).float()

    def elementwise(
        self, width: int, mlp_width: int, norm_blocks: int, heads: HeadShape
    ) -> dict[str, Any]:
        return _Elementwise(width, mlp_width, heads)

    def attention(self, heads: HeadShape, page_slots: int, out: str, num_warps: int = 8) -> Any:
        assert out in ("f16", "e4m3", "bf16")

        def run(
            grid: Any,
            q: Tensor,
            keys: Tensor,
            values: Tensor,
            table: Tensor,
            table_stride: int,
            lengths: Tensor,
            scale: float,
            v_scale: float,
            workspace: Tensor,
            counters: Tensor,
            target: Tensor,
            *place: Any,
        ) -> None:
            count = grid[2]
            q_SNH = q.view(-1)[: count * heads.num_heads * heads.head_dim]
            q_SNH = q_SNH.view(count, heads.num_heads, heads.head_dim).double()
            rows = []
            for sequence in range(count):
                length = int(lengths[sequence])
                pages = table[sequence, : -(-length // page_slots)].long()
                k, v = (_stored(cache, pages)[:length] for cache in (keys, values))
                rows.append(_attended(q_SNH[sequence][None], k, v, scale, length - 1)[0])
            out_TF = (torch.stack(rows) * v_scale).flatten(1).bfloat16().float()
            _store(out, out_TF, target, *place)

        return run

    def chunk_attention(self, heads: HeadShape, page_slots: int) -> dict[str, Any]:
        shape = (2, heads.num_kv_heads, -1, heads.head_dim)

        def lay_out(
            grid: Any, keys: Tensor, values: Tensor, pages: Tensor, count: int, context: Tensor
        ) -> None:
            room = context.view(torch.float16)
            for part, cache in enumerate((keys, values)):
                stored_CKH = _stored(cache, pages.long())[:count]
                each = stored_CKH.numel()
                room[part * each : (part + 1) * each] = stored_CKH.transpose(0, 1).flatten()

        def attend(
            grid: Any, q: Tensor, context: Tensor, start: int, count: int, scale: float, *rest: Any
        ) -> None:
            num_keys = start + count
            size = 2 * heads.num_kv_heads * num_keys * heads.head_dim
            k, v = context.view(torch.float16)[:size].view(shape).double().transpose(1, 2)
            out_TNH = rest[-1]
            for row in range(count):
                seen = slice(0, start + row + 1)
                out = _attended(q[row : row + 1].double(), k[seen], v[seen], scale, start + row)
                out_TNH[row] = out[0].to(out_TNH.dtype)

        return {"lay_out_context": lay_out, "chunk_attention": attend}

    def count_largest(self) -> Any:
        def run(
            grid: Any,
            codes: Tensor,
            chunk_stride: int,
            token_stride: int,
            features: int,
            slots_T: Tensor,
            is_image_T: Tensor,
            counts_22: Tensor,
        ) -> None:
            f, count = torch.arange(features), grid[1]
            at_TF = torch.arange(count)[:, None] * token_stride + (f >> 4) * chunk_stride + (f & 15)
            is_largest_TF = codes.view(-1).view(torch.uint8)[at_TF] & 0x7F == 0x7E
            for row in range(count):
                if slots_T[row] >= 0:
                    counts_22[int(is_image_T[row])] += torch.stack(
                        (is_largest_TF[row].sum(), torch.tensor(features))
                    )

        return run

    def gather(self) -> Any:
        def run(grid: Any, y: LinearResult, features: int, dense: Tensor, stride: int) -> None:
            assert stride == dense.stride(0)
            dense[: grid[1], :features] = _result(y, grid[1], features)

        return run

    def layout(self) -> dict[str, Any]:
        def untile(grid: Any, data: Tensor, target: Tensor, k_blocks: int, row_bytes: int) -> None:
            # As bytes: whether rows are e4m3 or bf16 is the caller's to know.
            weight = TiledWeight("fp8", data, torch.empty(0), 0, 0)
            _put(untile_rows(weight).view(torch.uint8), target, row_bytes)

        def exact(
            grid: Any, data: Tensor, target: Tensor, k_blocks: int, row_bytes: int, gain: float
        ) -> None:
            values = values_of(TiledWeight("nvfp4", data, torch.empty(0), 0, 0)) * gain
            _put(values.to(torch.bfloat16).view(torch.uint8), target, row_bytes)

        def fast(grid: Any, data: Tensor, target: Tensor, k_blocks: int, row_bytes: int) -> None:
            values = values_of(TiledWeight("nvfp4_fast", data, torch.empty(0), 0, 0))
            _put(values.to(torch.float8_e4m3fn).view(torch.uint8), target, row_bytes)

        return {"untile_8bit": untile, "decode_nvfp4_bf16": exact, "decode_nvfp4_e4m3": fast}


class _Elementwise(dict[str, Any]):
    """Kernels of elementwise.cu by name, for widths."""

    def __init__(self, width: int, mlp_width: int, heads: HeadShape) -> None:
        self._width, self._mlp_width, self._heads = width, mlp_width, heads

    def __missing__(self, name: str) -> Any:
        for prefix in ("add_norm_", "norm_", "silu_mul_", "quantize_"):
            if name.startswith(prefix):
                kind = name.removeprefix(prefix)
                return lambda *rest: getattr(self, "_" + prefix.rstrip("_"))(kind, *rest)
        return getattr(self, "_" + name)

    def _embed(self, grid: Any, table: Tensor, ids_T: Tensor, residual_TD: Tensor) -> None:
        residual_TD.copy_(table[ids_T])

    def _add_norm(
        self, kind: str, grid: Any, y: LinearResult, residual_TD: Tensor, *rest: Any
    ) -> None:
        delta_TD = _result(y, grid[1], self._width).bfloat16().float()
        residual_TD.copy_(residual_TD.float() + delta_TD)
        self._norm(kind, grid, y, residual_TD, *rest)

    def _norm(
        self,
        kind: str,
        grid: Any,
        y: LinearResult,
        residual_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        target: Tensor,
        chunk_stride: int,
        token_stride: int,
        scale: float,
        token_scale_T: Tensor | None,
    ) -> None:
        x_TD = residual_TD.float()
        inverse_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
        normed_TD = (x_TD * inverse_T1 * weight_D.float()).bfloat16().float()
        _store(kind, normed_TD, target, chunk_stride, token_stride, scale, token_scale_T)

    def _silu_mul(
        self,
        kind: str,
        grid: Any,
        y: LinearResult,
        width: int,
        target: Tensor,
        chunk_stride: int,
        token_stride: int,
        scale: float,
        last: Any,
    ) -> None:
        assert width == self._mlp_width
        per_token = isinstance(last, Tensor)
        count = grid[1] if per_token else last
        gate_TF, up_TF = _result(y, count, 2 * width).bfloat16().float().chunk(2, -1)
        hidden_TF = (torch.nn.functional.silu(gate_TF) * up_TF).bfloat16().float()
        token_scale_T = last if per_token else None
        _store(kind, hidden_TF, target, chunk_stride, token_stride, scale, token_scale_T)

    def _quantize(self, kind: str, grid: Any, x: Tensor, *rest: Any) -> None:
        width = self._heads.num_heads * self._heads.head_dim
        if kind in ("e4m3_token", "e4m3_paired"):
            gain, *place = rest
        else:
            stated, gain, *place = rest
            assert stated == width
        count = grid[1]
        x_TF = x.view(-1)[: count * width].view(count, width).float()
        _store(kind, (x_TF * gain).bfloat16().float(), *place)

    def _rotate_and_store(
        self,
        grid: Any,
        y: LinearResult,
        cosines: Tensor,
        sines: Tensor,
        query_scale_T: Tensor | None,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        slots_T: Tensor,
        k_scale: float,
        v_scale: float,
    ) -> None:
        count, heads = grid[0], self._heads
        num_q, num_kv, size = heads.num_heads, heads.num_kv_heads, heads.head_dim
        x_TMH = _result(y, count, (num_q + 2 * num_kv) * size).bfloat16().float()
        q, k, v = torch.split(x_TMH.view(count, -1, size), [num_q, num_kv, num_kv], dim=1)
        cos, sin = cosines[:count, None], sines[:count, None]

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        gain = 1.0 if query_scale_T is None else query_scale_T[:count, None, None]
        queries.view(-1)[: q.numel()] = (turned(q) * gain).bfloat16().flatten()
        kept = slots_T[:count] >= 0
        for x, cache, scale in ((turned(k), keys, k_scale), (v, values, v_scale)):
            codes = (x.bfloat16().float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            cache.view(-1, *cache.shape[2:])[slots_T[:count][kept]] = codes[kept].view(torch.uint8)


def _at(pointer: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements in memory, from an address on."""
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(raw, dtype=dtype)


def _result(y: LinearResult, num_tokens: int, num_features: int) -> Tensor:
    """A product's result, f32 (T, F), as `Pending` of primitives.cu reads it."""
    size = num_tokens * y.stride
    if y.slot_counts is None:
        dtype = torch.float32 if y.out is None else torch.bfloat16
        y_TF = _at(y.partial if y.out is None else y.out, size, dtype).view(num_tokens, -1).float()
    else:
        num_tiles = y.stride >> y.tile_shift
        counts = _at(y.slot_counts, num_tiles, torch.uint8).long()
        counts_F = counts.repeat_interleave(1 << y.tile_shift)
        slots = _at(y.partial, int(counts.max()) * y.slot_stride, torch.float32)
        slots = slots.view(-1, num_tokens, y.stride)
        y_TF = torch.zeros(num_tokens, y.stride)
        for slot, part_TF in enumerate(slots):
            y_TF += torch.where(counts_F > slot, part_TF, 0.0)
        if y.out is not None:
            whole_TF = _at(y.out, size, torch.bfloat16).view(num_tokens, -1).float()
            y_TF = torch.where(counts_F == 1, whole_TF, y_TF)
    y_TF = y_TF[:, :num_features]
    if y.row_scale is not None:
        y_TF = y_TF * _at(y.row_scale, num_features, torch.float32)
    if y.token_scale is not None:
        y_TF = y_TF * _at(y.token_scale, num_tokens, torch.float32)[:, None]
    assert bool(torch.isfinite(y_TF).all())
    return y_TF


def _store(
    kind: str,
    x_TF: Tensor,
    target: Tensor,
    chunk_stride: int,
    token_stride: int,
    scale: float,
    token_scale_T: Tensor | None = None,
) -> None:
    """`store_activation` of primitives.cu for whole rows, made with the scale of each token."""
    f = torch.arange(x_TF.shape[1])
    if kind in ("e4m3_token", "e4m3_paired"):
        assert token_scale_T is not None
        scale_T = x_TF.abs().amax(-1).clamp(min=1e-12) / 448.0
        token_scale_T[: len(scale_T)] = scale_T
        x_TF = x_TF / scale_T[:, None]
    elif kind == "e4m3":
        x_TF = x_TF / scale
    if kind == "e4m3_paired":
        chunk_F = (f >> 6 << 2) + ((f & 8) >> 2) + ((f & 7) >> 2)
        at_F = chunk_F * chunk_stride + (f >> 4 & 3) * 4 + (f & 3)
    elif kind.startswith("e4m3"):
        at_F = (f >> 4) * chunk_stride + (f & 15)
    else:
        at_F = (f >> 3) * chunk_stride + (f & 7) * 2
    at_TF = torch.arange(len(x_TF))[:, None] * token_stride + at_F
    if kind.startswith("e4m3"):
        codes = x_TF.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        target.view(-1).view(torch.uint8)[at_TF] = codes.view(torch.uint8)
        return
    stored = x_TF.bfloat16()
    if kind == "f16":
        stored = (x_TF * scale).clamp(-65504.0, 65504.0).half()
    target.view(-1).view(torch.int16)[at_TF // 2] = stored.view(torch.int16)


def _chunks(
    x: Tensor, chunk_stride: int, num_tokens: int, k_blocks: int, format_: TileFormat
) -> Tensor:
    """Rows of a product's input from 16-byte chunks: (T, I) in the product's dtype."""
    dtype = _DTYPES.get(format_, torch.float8_e4m3fn)
    num_chunks = k_blocks * K_BLOCK[format_] * dtype.itemsize // 16
    # The last chunk may end before its stride does.
    flat = x.view(-1).view(torch.uint8)
    shape, strides = (num_tokens, num_chunks, 16), (16, chunk_stride, 1)
    rows = torch.as_strided(flat, shape, strides, flat.storage_offset())
    x_TI = rows.reshape(num_tokens, num_chunks * 16).view(dtype)
    return pair_activations(x_TI) if format_ == "nvfp4_fast" else x_TI


def _stored(cache: Tensor, pages: Tensor) -> Tensor:
    """Keys or values of one sequence, (C, K, H) as stored."""
    return cache[pages].view(torch.float8_e4m3fn).flatten(0, 1).double()


def _attended(q_1NH: Tensor, k_CKH: Tensor, v_CKH: Tensor, scale: float, last: int) -> Tensor:
    """One query over keys 0 to `last`; `scale` has log2(e) in it."""
    assert len(k_CKH) == last + 1
    group = q_1NH.shape[1] // k_CKH.shape[1]
    k_CNH, v_CNH = (x.repeat_interleave(group, 1) for x in (k_CKH, v_CKH))
    scores_N1C = torch.einsum("inh,jnh->nij", q_1NH, k_CNH) * (scale * math.log(2.0))
    return torch.einsum("nij,jnh->inh", scores_N1C.softmax(-1), v_CNH)


def _put(rows: Tensor, target: Tensor, row_bytes: int) -> None:
    assert rows.shape[1] == row_bytes
    target.view(-1)[: rows.numel()] = rows.flatten()


def _scaled_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, **rest: Any) -> Tensor:
    assert bool(torch.isfinite(a.float()).all())
    return (a.double() @ b.double()).to(out_dtype)
