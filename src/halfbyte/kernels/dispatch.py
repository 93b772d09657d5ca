"""The public operations, their contracts, and the choice of implementation.

An implementation is a module with functions named as the ops below: `reference` (plain torch, the
definition, complete, on any device) and `native` (C for CPUs, compiled at first use). An op that a
module lacks runs in `reference`. The model and the engine call the functions of this file; tests
walk `implementations(op)`. The kernels of `kernels/cuda` serve whole steps, not single ops, and are
called by `model.cuda`. Beside the model's ops stand the two hot loops of `quantize`.

Shapes: T tokens (flat over sequences), S sequences, D model width, F MLP width, N query heads,
K key/value heads, H head size (H2 = H / 2), O, I out and in features, B 16-blocks along I,
P pages, Z slots in a page, S1 = S + 1.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats.nvfp4 import EncodedNVFP4
from halfbyte.kernels.paged import PagedContext
from halfbyte.kernels.reference import SPAN_TOKENS as SPAN_TOKENS
from halfbyte.log import logger

P = ParamSpec("P")
R = TypeVar("R")

OPS = (
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "prepare_bf16",
    "prepare_fp8",
    "prepare_nvfp4",
    "linear_bf16",
    "linear_fp8",
    "linear_nvfp4",
    "round_tokens",
    "rotate",
    "store_kv",
    "paged_attention",
    "attend_spans",
    "mask_logits",
    "largest_fp8_code",
    "fp8_to_nvfp4",
)

# Fastest first, by device; each module states in `unavailable(device)` why it cannot run, or None.
_CANDIDATES = {
    "cpu": ("native", "reference"),
}
_MODULES = {
    "reference": "halfbyte.kernels.reference",
    "native": "halfbyte.kernels.native",
}


class Rotation(NamedTuple):
    """Cosines and sines by which the rotary embedding turns a step's tokens.

    cos_TH2, sin_TH2  f32, the attention factor of YaRN folded in
    query_scale_T     f32, multiplies rotated queries by position; None means 1
    """

    cos_TH2: Tensor
    sin_TH2: Tensor
    query_scale_T: Tensor | None

    def rows(self, rows: slice) -> "Rotation":
        """The rotation of neighbouring tokens alone: views of the same tables."""
        scale_T = None if self.query_scale_T is None else self.query_scale_T[rows]
        return Rotation(self.cos_TH2[rows], self.sin_TH2[rows], scale_T)


class PreparedWeight(Protocol):
    """A weight in the layout that one implementation's linear reads; made by `prepare_*`."""

    @property
    def implementation(self) -> str:
        """Name of the one implementation that made the weight and can read it."""

    @property
    def out_features(self) -> int:
        """Rows of the weight, all members of a fused group together."""

    @property
    def in_features(self) -> int:
        """Number of input features: columns of the weight."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the weight's codes and scales hold in memory."""


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def _reason_against(name: str, device_type: str) -> str | None:
    """Why implementation `name` cannot serve tensors on this device; None when it can."""
    reason: str | None = _module(name).unavailable(device_type)
    return reason


@cache
def _chosen(device_type: str) -> str:
    wanted = os.environ.get("HALFBYTE_KERNELS")
    if wanted is not None and wanted not in _MODULES:
        raise UsageError(f"HALFBYTE_KERNELS={wanted} must be one of {', '.join(_MODULES)}")
    candidates = _CANDIDATES.get(device_type, ("reference",)) if wanted is None else (wanted,)
    for name in candidates:
        reason = _reason_against(name, device_type)
        if reason is None:
            logger.info("kernels on %s: %s", device_type, name)
            return name
        logger.warning("kernels %s not used on %s: %s", name, device_type, reason)
    return "reference"


def chosen(device: torch.device) -> str:
    """Name of the implementation that serves the ops of `device`: reference or native.

    Decided once per process and device, logged with the reason where a faster one is passed over.
    The environment variable HALFBYTE_KERNELS (an implementation's name) overrides the choice.
    """
    return _chosen(device.type)


@cache
def _function(op: str, implementation: str) -> Callable[..., Any]:
    reference = getattr(_module("reference"), op)
    function: Callable[..., Any] = getattr(_module(implementation), op, reference)
    return function


def implementations(op: str, device_type: str = "cpu") -> dict[str, Callable[..., Any]]:
    """Every implementation of `op` that runs on this device now, by name; for tests."""
    if op not in OPS:
        raise KeyError(f"{op} is not one of {', '.join(OPS)}")
    return {
        name: getattr(_module(name), op)
        for name in _CANDIDATES.get(device_type, ("reference",))
        if _reason_against(name, device_type) is None and hasattr(_module(name), op)
    }


@cache
def _on(op: str, device_type: str) -> Callable[..., Any]:
    return _function(op, _chosen(device_type))


def _for(op: Callable[P, R], x: Tensor) -> Callable[P, R]:
    """The implementation of an op of this file that serves the device of `x`."""
    function: Callable[P, R] = _on(op.__name__, x.device.type)
    return function


def _of(op: Callable[P, R], weight: PreparedWeight) -> Callable[P, R]:
    """The implementation of an op that can read `weight`."""
    function: Callable[P, R] = _function(op.__name__, weight.implementation)
    return function


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Scale rows to unit RMS, times weight; in f32, rounded once to x's dtype. Bounded.

    y = x / sqrt(mean(x^2) + eps) * weight
    """
    return _for(rms_norm, x_TD)(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum.

    returns  normed_TD, residual_TD: the sum rounded to x's dtype, and the norm of that rounded
             sum. Neither input is modified. The sum is exact class, the norm bounded.
    """
    return _for(add_rms_norm, x_TD)(x_TD, residual_TD, weight_D, eps)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up of a fused product [gate | up], in f32, rounded once: (T, F). Bounded."""
    return _for(silu_mul, gate_up_T2F)(gate_up_T2F)


def prepare_bf16(w_OI: Tensor) -> PreparedWeight:
    """Lay out a bf16 (or f32) weight for `linear_bf16` on the device it lies on."""
    return _for(prepare_bf16, w_OI)(w_OI)


def prepare_fp8(codes_OI: Tensor, scale_O: Tensor) -> PreparedWeight:
    """Lay out e4m3 codes with one f32 scale a row (fused linears carry several scales)."""
    return _for(prepare_fp8, codes_OI)(codes_OI, scale_O)


def prepare_nvfp4(codes_OI2: Tensor, scale_OB: Tensor, tensor_scale_O: Tensor) -> PreparedWeight:
    """Lay out packed e2m1 codes (even column low), e4m3 block scales, one f32 scale a row."""
    prepare = _for(prepare_nvfp4, codes_OI2)
    return prepare(codes_OI2, scale_OB, tensor_scale_O)


def linear_bf16(
    x_TI: Tensor, weight: PreparedWeight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Product x @ w^T, sums in f32, rounded once to `out_dtype` (None: as x): (T, O). Bounded.

    A row's result does not depend on the other rows in `native`; in `reference` it may.
    """
    linear = _of(linear_bf16, weight)
    return linear(x_TI, weight, out_dtype)


def linear_fp8(
    x_TI: Tensor,
    weight: PreparedWeight,
    out_dtype: torch.dtype | None = None,
    token_scale_T: Tensor | None = None,
) -> Tensor:
    """Product x @ (code * scale)^T, weight decoded exactly; else as `linear_bf16`. Bounded.

    token_scale_T  f32, multiplies the sums of a row before they are rounded: of `round_tokens`
    """
    linear = _of(linear_fp8, weight)
    return linear(x_TI, weight, out_dtype, token_scale_T)


def linear_nvfp4(
    x_TI: Tensor, weight: PreparedWeight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Product x @ (code * block scale * tensor scale)^T; else as `linear_bf16`. Bounded."""
    linear = _of(linear_nvfp4, weight)
    return linear(x_TI, weight, out_dtype)


def round_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to e4m3 by its own largest value. Exact.

    returns  the values of `formats.fp8.round_tokens_to_fp8`'s codes in x's dtype, which holds
             them, and scale_T f32, which they are still to be multiplied by
    """
    return _for(round_tokens, x_TI)(x_TI)


def rotate(q_TNH: Tensor, k_TKH: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by halves: (a, b) -> (a cos - b sin, b cos + a sin), in f32.

    Queries are also multiplied by `query_scale_T`. Rounded once to the input's dtype; the inputs
    are not modified and may be strided views of one fused product (last dimension dense).
    Bounded.
    """
    return _for(rotate, q_TNH)(q_TNH, k_TKH, rotation)


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_PZKH: Tensor,
    v_cache_PZKH: Tensor,
    slots_T: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """Write keys and values into their pages, in place; `slots_T` int64 = page * Z + offset.

    An e4m3 cache receives e4m3(clamp(k / k_scale, +-448)), a bf16 cache a copy (scales unused).
    A token whose slot is negative is not stored. Exact.
    """
    store = _for(store_kv, k_TKH)
    store(k_TKH, v_TKH, k_cache_PZKH, v_cache_PZKH, slots_T, k_scale, v_scale)


def paged_attention(q_TNH: Tensor, context: PagedContext) -> Tensor:
    """Causal attention of a ragged batch over paged keys and values, read as stored: (T, N, H).

    Query j of sequence s sits at position context_lengths[s] - num_queries[s] + j and sees every
    position up to its own. Scores and sums in f32. N is a multiple of K. Bounded.

    Example: Z=4, two sequences; the first prefills 3 tokens, the second decodes its sixth token:
      block_table [[7, 0], [2, 5]], context_lengths [3, 6], query_starts [0, 3, 4]
      q row 1 reads slots 7*4+0, 7*4+1; q row 3 reads 2*4+0..3, 5*4+0, 5*4+1.
    """
    return _for(paged_attention, q_TNH)(q_TNH, context)


def attend_spans(q_TNH: Tensor, context: PagedContext, spans: range, totals: Tensor) -> Tensor:
    """`paged_attention` in parts, so that other work can come between: the same bits at the end.

    spans   of SPAN_TOKENS of the context, for this call; call after call goes on where the last one
            stopped, from 0 until the longest sequence's context is covered
    totals  f32 (T, N, 2 + H), changed: what one call leaves to the next; callers do not read
            its content
    returns  as `paged_attention`; from any call but the last, nothing that means anything

    Example: contexts [3000, 40]: spans range(0, 2), then range(2, 3), which writes both results.
    """
    return _for(attend_spans, q_TNH)(q_TNH, context, spans, totals)


def mask_logits(logits_V: Tensor, allowed_W: Tensor) -> None:
    """Set the logits of tokens that a mask does not allow to -inf, in place. Exact.

    logits_V   f32, on any device
    allowed_W  int32 on the CPU, W = ceil(V / 32): bit b of word w, 1 is allowed, is token 32 w + b
    """
    _for(mask_logits, logits_V)(logits_V, allowed_W)


def largest_fp8_code(codes: Tensor) -> Tensor:
    """The largest magnitude among e4m3 codes, as a code without sign: e4m3, 0-d. Exact.

    NaN's code is above all others, so it comes through.
    """
    return _for(largest_fp8_code, codes)(codes)


def fp8_to_nvfp4(codes_OI: Tensor, scale: Tensor, tensor_scale: Tensor) -> EncodedNVFP4:
    """Encode an FP8 weight to NVFP4 with amax block scales. Exact.

    codes_OI       e4m3, I % 16 == 0; not modified
    scale          f32, one value: what the codes are multiplied by, rounded once to bf16
    tensor_scale   f32 scalar > 0, shared by a fused group

    The bytes of `encode_nvfp4(decode_fp8(codes, scale), tensor_scale)`, and its errors.
    """
    return _for(fp8_to_nvfp4, codes_OI)(codes_OI, scale, tensor_scale)
