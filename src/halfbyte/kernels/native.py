"""CPU kernels: the C of `kernels/cpu`, called through ctypes with plain pointers.

`native_build` compiles and caches the library, `native_library` loads it. What the C does not take
(f32 activations, odd widths, huge heads) goes to `reference`, so every op here has the contract of
`dispatch` in full. The number of threads is torch's, asked at every call.

Shapes: as in `dispatch`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from halfbyte.errors import FormatError, UnsupportedError
from halfbyte.formats.nvfp4 import EncodedNVFP4
from halfbyte.kernels import reference
from halfbyte.kernels.native_library import native_library, pointer
from halfbyte.kernels.paged import PagedContext
from halfbyte.kernels.reference import DecodedWeight
from halfbyte.kernels.requantize import requantizing_table

_FORMATS: dict[str, int] = {"bf16": 0, "fp8": 1, "nvfp4": 2}
_PANEL = 32  # output features of a panel
_BLOCK = 16  # input features of a block
_BLOCK_BYTES = {"bf16": 1024, "fp8": 512, "nvfp4": 256}  # of a panel, without scales
_MAX_HEAD = 256
_MAX_GROUP = 32
_NAN_SCALE = 0x7F
_NAN_CODE = 0x7F
_ALL_SPANS = 2**30
_ITEM_CODES = 65536  # of which `cpu/requantize.c` tells the largest


@dataclass(frozen=True, slots=True, eq=False)
class PanelWeight:
    """A weight in panels of 32 output features; the layout is described in `cpu/linear.c`."""

    format: Literal["bf16", "fp8", "nvfp4"]
    out_features: int
    in_features: int
    codes: Tensor
    scales: Tensor | None
    row_scale: Tensor | None
    implementation: str = "native"

    @property
    def num_bytes(self) -> int:
        """Bytes that the weight's codes and scales hold in memory."""
        held = (self.codes, self.scales, self.row_scale)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


@cache
def unavailable(device_type: str) -> str | None:
    """Why this implementation cannot serve a device; compiles the library on the first call."""
    if device_type != "cpu":
        return "runs on CPUs only"
    try:
        native_library()
    except (UnsupportedError, OSError) as error:
        return str(error)
    return None


# ---- linears -----------------------------------------------------------------------------------


def _pack(
    format: Literal["bf16", "fp8", "nvfp4"],
    weight: Tensor,
    in_features: int,
    scale_OB: Tensor | None = None,
    row_scale_O: Tensor | None = None,
) -> PanelWeight:
    rows = weight.shape[0]
    panels, blocks = -(-rows // _PANEL), in_features // _BLOCK
    codes = torch.empty(panels * blocks * _BLOCK_BYTES[format], dtype=torch.uint8)
    scales = None
    if scale_OB is not None:
        scale_OB = scale_OB.contiguous()
        scales = torch.empty(panels * blocks * _PANEL, dtype=torch.uint8)
    weight = weight.contiguous()
    native_library().hb_pack(
        _FORMATS[format],
        weight.data_ptr(),
        pointer(scale_OB),
        codes.data_ptr(),
        pointer(scales),
        in_features,
        rows,
        torch.get_num_threads(),
    )
    row_scale = None
    if row_scale_O is not None:
        row_scale = torch.zeros(panels * _PANEL)
        row_scale[:rows] = row_scale_O
    return PanelWeight(format, rows, in_features, codes, scales, row_scale)


def prepare_bf16(w_OI: Tensor) -> PanelWeight | DecodedWeight:
    """See `dispatch.prepare_bf16`; weights of another dtype or an odd width stay in torch."""
    if w_OI.dtype != torch.bfloat16 or w_OI.shape[1] % _BLOCK:
        return reference.prepare_bf16(w_OI)
    return _pack("bf16", w_OI, w_OI.shape[1])


def prepare_fp8(codes_OI: Tensor, scale_O: Tensor) -> PanelWeight | DecodedWeight:
    """See `dispatch.prepare_fp8`; an odd width stays in torch."""
    if codes_OI.shape[1] % _BLOCK:
        return reference.prepare_fp8(codes_OI, scale_O)
    return _pack("fp8", codes_OI, codes_OI.shape[1], row_scale_O=scale_O)


def prepare_nvfp4(codes_OI2: Tensor, scale_OB: Tensor, tensor_scale_O: Tensor) -> PanelWeight:
    """See `dispatch.prepare_nvfp4`; FormatError for a block scale that is negative or NaN."""
    if bool((scale_OB.view(torch.uint8) >= _NAN_SCALE).any()):
        raise FormatError("an NVFP4 block scale is negative or NaN")
    return _pack("nvfp4", codes_OI2, 2 * codes_OI2.shape[1], scale_OB, tensor_scale_O)


def _linear(
    x_TI: Tensor,
    weight: PanelWeight | DecodedWeight,
    out_dtype: torch.dtype | None,
    token_scale_T: Tensor | None = None,
) -> Tensor:
    if isinstance(weight, DecodedWeight):
        return reference.linear_fp8(x_TI, weight, out_dtype, token_scale_T)
    if x_TI.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"native linears take bf16 activations, not {x_TI.dtype}; decode the weights first"
        )
    rows, width = x_TI.shape
    assert width == weight.in_features, f"{width} inputs for a weight of {weight.in_features}"
    x_TI = x_TI.contiguous()
    y_TO = torch.empty((rows, weight.out_features), dtype=out_dtype or torch.bfloat16)
    scratch = torch.empty_like(x_TI) if rows > 1 else x_TI
    native_library().hb_linear(
        _FORMATS[weight.format],
        x_TI.data_ptr(),
        scratch.data_ptr(),
        weight.codes.data_ptr(),
        pointer(weight.scales),
        pointer(weight.row_scale),
        pointer(token_scale_T),
        y_TO.data_ptr(),
        y_TO.dtype == torch.float32,
        rows,
        width,
        weight.out_features,
        torch.get_num_threads(),
    )
    return y_TO


def linear_bf16(
    x_TI: Tensor, weight: PanelWeight | DecodedWeight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See `dispatch.linear_bf16`; a row's result is the same bits whatever runs beside it."""
    return _linear(x_TI, weight, out_dtype)


def linear_fp8(
    x_TI: Tensor,
    weight: PanelWeight | DecodedWeight,
    out_dtype: torch.dtype | None = None,
    token_scale_T: Tensor | None = None,
) -> Tensor:
    """See `dispatch.linear_fp8`; a row's result is the same bits whatever runs beside it."""
    return _linear(x_TI, weight, out_dtype, token_scale_T)


def linear_nvfp4(
    x_TI: Tensor, weight: PanelWeight | DecodedWeight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See `dispatch.linear_nvfp4`; a row's result is the same bits whatever runs beside it."""
    return _linear(x_TI, weight, out_dtype)


def round_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """`dispatch.round_tokens` in C for bf16 rows; other dtypes go to torch."""
    if x_TI.dtype != torch.bfloat16:
        return reference.round_tokens(x_TI)
    x_TI = x_TI.contiguous()
    rounded_TI, scale_T = torch.empty_like(x_TI), torch.empty(x_TI.shape[0])
    native_library().hb_round_tokens(
        x_TI.data_ptr(),
        rounded_TI.data_ptr(),
        scale_T.data_ptr(),
        *x_TI.shape,
        torch.get_num_threads(),
    )
    return rounded_TI, scale_T


# ---- elementwise -------------------------------------------------------------------------------


def _all_bf16(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`dispatch.rms_norm` in C for bf16 rows; other dtypes go to torch."""
    if not _all_bf16(x_TD, weight_D):
        return reference.rms_norm(x_TD, weight_D, eps)
    x_TD = x_TD.contiguous()
    normed_TD = torch.empty_like(x_TD)
    native_library().hb_rms_norm(
        x_TD.data_ptr(),
        None,
        weight_D.data_ptr(),
        normed_TD.data_ptr(),
        None,
        *x_TD.shape,
        eps,
        torch.get_num_threads(),
    )
    return normed_TD


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`dispatch.add_rms_norm` in C for bf16 rows; other dtypes go to torch."""
    if not _all_bf16(x_TD, residual_TD, weight_D):
        return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    normed_TD, sum_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    native_library().hb_rms_norm(
        x_TD.data_ptr(),
        residual_TD.data_ptr(),
        weight_D.data_ptr(),
        normed_TD.data_ptr(),
        sum_TD.data_ptr(),
        *x_TD.shape,
        eps,
        torch.get_num_threads(),
    )
    return normed_TD, sum_TD


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """`dispatch.silu_mul` in C for bf16 rows; other dtypes go to torch."""
    if gate_up_T2F.dtype != torch.bfloat16:
        return reference.silu_mul(gate_up_T2F)
    gate_up_T2F = gate_up_T2F.contiguous()
    rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    y_TF = torch.empty((rows, width), dtype=torch.bfloat16)
    native_library().hb_silu_mul(
        gate_up_T2F.data_ptr(), y_TF.data_ptr(), rows, width, torch.get_num_threads()
    )
    return y_TF


def _dense_heads(x_TNH: Tensor) -> Tensor:
    """The tensor if a token's heads lie side by side (tokens may be strided), else a copy."""
    head_dim = x_TNH.shape[2]
    return x_TNH if x_TNH.stride()[1:] == (head_dim, 1) else x_TNH.contiguous()


def rotate(q_TNH: Tensor, k_TKH: Tensor, rotation: Any) -> tuple[Tensor, Tensor]:
    """`dispatch.rotate` in C for bf16 heads; `rotation` is a `dispatch.Rotation`."""
    if not _all_bf16(q_TNH, k_TKH):
        return reference.rotate(q_TNH, k_TKH, rotation)
    q_TNH, k_TKH = _dense_heads(q_TNH), _dense_heads(k_TKH)
    tokens, heads, head_dim = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    q_out = torch.empty((tokens, heads, head_dim), dtype=torch.bfloat16)
    k_out = torch.empty((tokens, kv_heads, head_dim), dtype=torch.bfloat16)
    cos_TH2, sin_TH2, query_scale_T = rotation
    native_library().hb_rotate(
        *(q_TNH.data_ptr(), q_TNH.stride(0), heads),
        *(k_TKH.data_ptr(), k_TKH.stride(0), kv_heads),
        q_out.data_ptr(),
        k_out.data_ptr(),
        cos_TH2.data_ptr(),
        sin_TH2.data_ptr(),
        pointer(query_scale_T),
        tokens,
        head_dim,
        torch.get_num_threads(),
    )
    return q_out, k_out


# ---- cache and attention -----------------------------------------------------------------------


def _is_cache_readable(k_cache_PZKH: Tensor, v_cache_PZKH: Tensor) -> bool:
    return (
        k_cache_PZKH.dtype in (torch.float8_e4m3fn, torch.bfloat16)
        and k_cache_PZKH.dtype == v_cache_PZKH.dtype
        and k_cache_PZKH.stride() == v_cache_PZKH.stride()
        and k_cache_PZKH.stride(3) == 1
    )


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_PZKH: Tensor,
    v_cache_PZKH: Tensor,
    slots_T: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """`dispatch.store_kv` in C for bf16 rows and readable caches; others go to torch."""
    if not (_all_bf16(k_TKH, v_TKH) and _is_cache_readable(k_cache_PZKH, v_cache_PZKH)):
        reference.store_kv(k_TKH, v_TKH, k_cache_PZKH, v_cache_PZKH, slots_T, k_scale, v_scale)
        return
    k_TKH, v_TKH = _dense_heads(k_TKH), _dense_heads(v_TKH)
    slots_T = slots_T.to(torch.int64).contiguous()
    _, page_tokens, kv_heads, head_dim = k_cache_PZKH.shape
    native_library().hb_store_kv(
        *(k_TKH.data_ptr(), k_TKH.stride(0)),
        *(v_TKH.data_ptr(), v_TKH.stride(0)),
        k_cache_PZKH.data_ptr(),
        v_cache_PZKH.data_ptr(),
        slots_T.data_ptr(),
        k_scale,
        v_scale,
        k_TKH.shape[0],
        *k_cache_PZKH.stride()[:3],
        page_tokens,
        kv_heads,
        head_dim,
        k_cache_PZKH.dtype == torch.float8_e4m3fn,
        torch.get_num_threads(),
    )


def _can_attend(q_TNH: Tensor, k_cache_PZKH: Tensor, v_cache_PZKH: Tensor) -> bool:
    heads, head_dim = q_TNH.shape[1:]
    return (
        q_TNH.dtype == torch.bfloat16
        and _is_cache_readable(k_cache_PZKH, v_cache_PZKH)
        and head_dim % 4 == 0
        and head_dim <= _MAX_HEAD
        and heads // k_cache_PZKH.shape[2] <= _MAX_GROUP
    )


def paged_attention(q_TNH: Tensor, context: PagedContext) -> Tensor:
    """See `dispatch.paged_attention`; a query's result is the same bits in any batch or chunk."""
    if not _can_attend(q_TNH, context.k_cache_PZKH, context.v_cache_PZKH):
        return reference.paged_attention(q_TNH, context)
    return _attend(q_TNH, context, range(_ALL_SPANS), None)


def attend_spans(q_TNH: Tensor, context: PagedContext, spans: range, totals: Tensor) -> Tensor:
    """`dispatch.attend_spans` in C; the result has the bits of `paged_attention`."""
    if not _can_attend(q_TNH, context.k_cache_PZKH, context.v_cache_PZKH):
        return reference.attend_spans(q_TNH, context, spans, totals)
    return _attend(q_TNH, context, spans, totals)


def _attend(q_TNH: Tensor, context: PagedContext, spans: range, totals: Tensor | None) -> Tensor:
    k_cache_PZKH = context.k_cache_PZKH
    q_TNH = q_TNH.contiguous()
    out_TNH = torch.empty_like(q_TNH)
    # Kept in names until the call returns: a temporary's memory would be gone.
    table = context.block_table_SP.to(torch.int32).contiguous()
    lengths = context.context_lengths_S.to(torch.int32).contiguous()
    starts = context.query_starts_S1.to(torch.int32).contiguous()
    _, page_tokens, kv_heads, head_dim = k_cache_PZKH.shape
    failed = native_library().hb_paged_attention(
        q_TNH.data_ptr(),
        out_TNH.data_ptr(),
        k_cache_PZKH.data_ptr(),
        context.v_cache_PZKH.data_ptr(),
        table.data_ptr(),
        lengths.data_ptr(),
        starts.data_ptr(),
        *k_cache_PZKH.stride()[:3],
        table.stride(0),
        lengths.shape[0],
        page_tokens,
        q_TNH.shape[1],
        kv_heads,
        head_dim,
        k_cache_PZKH.dtype == torch.float8_e4m3fn,
        context.softmax_scale * context.k_scale,
        context.v_scale,
        spans.start,
        spans.stop,
        pointer(totals),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("paged attention could not allocate its scratch memory")
    return out_TNH


def allow_tiles(allowed: bool) -> bool:
    """Allow or forbid the processor's matrix unit (AMX) in later calls of `paged_attention`.

    For tests and comparisons. Returns what held before.
    """
    return bool(native_library().hb_allow_tiles(allowed))


def mask_logits(logits_V: Tensor, allowed_W: Tensor) -> None:
    """`dispatch.mask_logits` in C; logits with gaps between them go to torch."""
    if not logits_V.is_contiguous():
        reference.mask_logits(logits_V, allowed_W)
        return
    assert 32 * len(allowed_W) >= len(logits_V), f"{len(allowed_W)} words, {len(logits_V)} logits"
    native_library().hb_mask_logits(logits_V.data_ptr(), allowed_W.data_ptr(), len(logits_V))


# ---- e4m3 codes to NVFP4 -----------------------------------------------------------------------


def largest_fp8_code(codes: Tensor) -> Tensor:
    """`dispatch.largest_fp8_code` in C over any shape; 0 for no codes."""
    codes = codes.contiguous()
    # One more, so that no code at all is a zero.
    largest = torch.zeros(-(-codes.numel() // _ITEM_CODES) + 1, dtype=torch.uint8)
    native_library().hb_largest_code(
        codes.data_ptr(), largest.data_ptr(), codes.numel(), torch.get_num_threads()
    )
    return largest.amax().view(torch.float8_e4m3fn)


def fp8_to_nvfp4(codes_OI: Tensor, scale: Tensor, tensor_scale: Tensor) -> EncodedNVFP4:
    """See `dispatch.fp8_to_nvfp4`; an odd width or scale goes to torch, which refuses most."""
    rows, columns = codes_OI.shape
    factor = float(scale)
    if columns % _BLOCK or columns == 0 or rows == 0 or not 0 < factor < math.inf:
        return reference.fp8_to_nvfp4(codes_OI, scale, tensor_scale)
    codes_OI = codes_OI.contiguous()
    tensor_scale = tensor_scale.to(torch.float32)
    table = requantizing_table(scale, tensor_scale)
    codes_OI2 = torch.empty((rows, columns // 2), dtype=torch.uint8)
    scale_OB = torch.empty((rows, columns // _BLOCK), dtype=torch.float8_e4m3fn)
    largest = torch.empty(-(-codes_OI.numel() // _ITEM_CODES), dtype=torch.uint8)
    native_library().hb_fp8_to_nvfp4(
        codes_OI.data_ptr(),
        table.limits_MKB.data_ptr(),
        table.block_scale_M.data_ptr(),
        codes_OI2.data_ptr(),
        scale_OB.data_ptr(),
        largest.data_ptr(),
        scale_OB.numel(),
        torch.get_num_threads(),
    )
    code = int(largest.amax())
    if code == _NAN_CODE or not bool(torch.isfinite(table.decoded_M[code])):
        raise FormatError("the weight holds NaN or infinity; NVFP4 has neither")
    return EncodedNVFP4(codes_OI2, scale_OB, tensor_scale)
