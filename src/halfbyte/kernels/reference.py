"""Every operation in plain torch: the definition that the other implementations are tested against.

Contracts stand in `dispatch`. Weights are decoded once, at preparation, to bf16 as the format
reference says (one rounding); products then run in torch. Slow where slow is obvious.

Shapes: T tokens, S sequences, D model width, F MLP width, N query heads, K key/value heads,
H head size, H2 = H / 2, O, I features, B 16-blocks along I, P pages, Z slots in a page, C stored
tokens of one sequence, J its queries, G query heads that share a key/value head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.formats import measure
from halfbyte.formats.fp8 import decode_fp8, round_tokens_to_fp8
from halfbyte.formats.layout import unpack_nibbles
from halfbyte.formats.minifloat import E4M3_MAX, decode_e2m1, decode_e4m3
from halfbyte.formats.nvfp4 import BLOCK, EncodedNVFP4, encode_nvfp4
from halfbyte.kernels.paged import PagedContext

# Tokens of the context that attention in parts takes at once, from position 0 on.
SPAN_TOKENS = 1024

# Rows of a weight that `_product_f32` widens at a time: bounds its scratch memory to
# 4096 x I x 4 bytes.
_WIDENED_ROWS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class DecodedWeight:
    """A weight as this file's linears read it: decoded, in the dtype it was rounded to."""

    w_OI: Tensor
    implementation: str = "reference"

    @property
    def out_features(self) -> int:
        """Number of output features: rows of the weight."""
        return self.w_OI.shape[0]

    @property
    def in_features(self) -> int:
        """Number of input features: columns of the weight."""
        return self.w_OI.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes that the decoded weight holds in memory."""
        return self.w_OI.numel() * self.w_OI.element_size()


def unavailable(device_type: str) -> str | None:
    """Why this implementation cannot run there: it always can."""
    del device_type
    return None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition of `dispatch.rms_norm`: f32 inside, rounded once to x's dtype."""
    wide_TD = x_TD.float()
    inverse_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * inverse_T1 * weight_D.float()).to(x_TD.dtype)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition of `dispatch.add_rms_norm`: (normalised sum, sum), each (T, D)."""
    sum_TD = x_TD + residual_TD
    return rms_norm(sum_TD, weight_D, eps), sum_TD


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """The definition of `dispatch.silu_mul`: f32 inside, rounded once to the input's dtype."""
    gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF).to(gate_up_T2F.dtype)


def prepare_bf16(w_OI: Tensor) -> DecodedWeight:
    """See `dispatch.prepare_bf16`; any float dtype is kept as it is."""
    return DecodedWeight(w_OI)


def prepare_fp8(codes_OI: Tensor, scale_O: Tensor) -> DecodedWeight:
    """`dispatch.prepare_fp8` by decoding: code times scale in f32, rounded once to bf16."""
    wide_OI = decode_e4m3(codes_OI, torch.float32)
    return DecodedWeight((wide_OI * scale_O.float()[:, None]).to(torch.bfloat16))


def prepare_nvfp4(codes_OI2: Tensor, scale_OB: Tensor, tensor_scale_O: Tensor) -> DecodedWeight:
    """`dispatch.prepare_nvfp4` by decoding: code times both scales in f32, rounded to bf16."""
    values_OI = decode_e2m1(unpack_nibbles(codes_OI2))
    scale_OB = decode_e4m3(scale_OB, torch.float32) * tensor_scale_O.float()[:, None]
    wide_OI = values_OI * scale_OB.repeat_interleave(BLOCK, dim=1)
    return DecodedWeight(wide_OI.to(torch.bfloat16))


def _product_f32(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """X @ w^T of bf16 operands without rounding the sums to bf16: (T, O) f32."""
    wide_TI = x_TI.float()
    parts = [F.linear(wide_TI, part_QI.float()) for part_QI in torch.split(w_OI, _WIDENED_ROWS)]
    return torch.cat(parts, dim=-1)


def _linear(x_TI: Tensor, weight: DecodedWeight, out_dtype: torch.dtype | None) -> Tensor:
    out_dtype = out_dtype or x_TI.dtype
    if out_dtype == torch.float32 and x_TI.dtype != torch.float32:
        return _product_f32(x_TI, weight.w_OI)
    return F.linear(x_TI, weight.w_OI.to(x_TI.dtype)).to(out_dtype)


def linear_bf16(
    x_TI: Tensor, weight: DecodedWeight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The definition of `dispatch.linear_bf16`: a torch product, (T, O)."""
    return _linear(x_TI, weight, out_dtype)


def linear_fp8(
    x_TI: Tensor,
    weight: DecodedWeight,
    out_dtype: torch.dtype | None = None,
    token_scale_T: Tensor | None = None,
) -> Tensor:
    """The definition of `dispatch.linear_fp8`, over the weight as bf16 values."""
    if token_scale_T is None:
        return _linear(x_TI, weight, out_dtype)
    sums_TO = _linear(x_TI, weight, torch.float32)
    return (sums_TO * token_scale_T[:, None]).to(out_dtype or x_TI.dtype)


def linear_nvfp4(
    x_TI: Tensor, weight: DecodedWeight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The definition of `dispatch.linear_nvfp4`, over the weight as bf16 values."""
    return _linear(x_TI, weight, out_dtype)


def round_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `dispatch.round_tokens`: codes' values in x's dtype, scales f32."""
    codes_TI, scale_T = round_tokens_to_fp8(x_TI)
    return decode_e4m3(codes_TI, x_TI.dtype), scale_T


def _rotate_halves(x_TNH: Tensor, cos_TH2: Tensor, sin_TH2: Tensor) -> Tensor:
    first, second = x_TNH.float().chunk(2, dim=-1)
    cos, sin = cos_TH2[:, None], sin_TH2[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate(q_TNH: Tensor, k_TKH: Tensor, rotation: Any) -> tuple[Tensor, Tensor]:
    """The definition of `dispatch.rotate`, in f32; `rotation` is a `dispatch.Rotation`."""
    cos_TH2, sin_TH2, query_scale_T = rotation
    q_wide = _rotate_halves(q_TNH, cos_TH2, sin_TH2)
    if query_scale_T is not None:
        q_wide = q_wide * query_scale_T[:, None, None]
    k_wide = _rotate_halves(k_TKH, cos_TH2, sin_TH2)
    return q_wide.to(q_TNH.dtype), k_wide.to(k_TKH.dtype)


def _stored(x_TKH: Tensor, cache_PZKH: Tensor, scale: float) -> Tensor:
    """The bits that a cache of this dtype keeps of x."""
    if cache_PZKH.dtype != torch.float8_e4m3fn:
        return x_TKH.to(cache_PZKH.dtype)
    scaled = x_TKH.float() / scale
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_PZKH: Tensor,
    v_cache_PZKH: Tensor,
    slots_T: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    """The definition of `dispatch.store_kv`; a slot of -1 is not written."""
    kept = slots_T >= 0
    for x_TKH, cache_PZKH, scale in (
        (k_TKH, k_cache_PZKH, k_scale),
        (v_TKH, v_cache_PZKH, v_scale),
    ):
        bits = _stored(x_TKH[kept], cache_PZKH, scale)
        # index_put on e4m3 is not everywhere implemented; bytes are.
        flat = cache_PZKH.view(-1, *cache_PZKH.shape[2:])
        if cache_PZKH.dtype == torch.float8_e4m3fn:
            flat.view(torch.uint8)[slots_T[kept]] = bits.view(torch.uint8)
        else:
            flat[slots_T[kept]] = bits


def _gathered(cache_PZKH: Tensor, pages: Tensor, length: int, scale: float) -> Tensor:
    """The first `length` stored keys or values of one sequence, decoded: (C, K, H) f32."""
    if cache_PZKH.dtype == torch.float8_e4m3fn:
        stored = cache_PZKH.view(torch.uint8)[pages].view(torch.float8_e4m3fn)
    else:
        stored = cache_PZKH[pages]
    return stored.flatten(0, 1)[:length].float() * scale


def paged_attention(q_TNH: Tensor, context: PagedContext) -> Tensor:
    """The definition of `dispatch.paged_attention`: f32 inside, one sequence at a time."""
    page_tokens, num_kv_heads = context.k_cache_PZKH.shape[1:3]
    out_TNH = torch.empty_like(q_TNH)
    starts, lengths = context.query_starts_S1.tolist(), context.context_lengths_S.tolist()
    for s, length in enumerate(lengths):
        first, last = starts[s], starts[s + 1]
        if first == last:
            continue
        pages = context.block_table_SP[s, : -(-length // page_tokens)].long()
        k_CKH = _gathered(context.k_cache_PZKH, pages, length, context.k_scale)
        v_CKH = _gathered(context.v_cache_PZKH, pages, length, context.v_scale)
        q_JKGH = q_TNH[first:last].float().reshape(last - first, num_kv_heads, -1, q_TNH.shape[-1])
        scores_KGJC = torch.einsum("jkgh,ckh->kgjc", q_JKGH, k_CKH) * context.softmax_scale
        positions_J = torch.arange(length - (last - first), length, device=q_TNH.device)
        hidden_JC = torch.arange(length, device=q_TNH.device) > positions_J[:, None]
        weights_KGJC = scores_KGJC.masked_fill(hidden_JC, float("-inf")).softmax(-1)
        out_JKGH = torch.einsum("kgjc,ckh->jkgh", weights_KGJC, v_CKH)
        out_TNH[first:last] = out_JKGH.flatten(1, 2).to(q_TNH.dtype)
    return out_TNH


def attend_spans(q_TNH: Tensor, context: PagedContext, spans: range, totals: Tensor) -> Tensor:
    """See `dispatch.attend_spans`; nothing is done before the last span, then all of it."""
    if spans.stop * SPAN_TOKENS < int(context.context_lengths_S.max()):
        return torch.empty_like(q_TNH)
    return paged_attention(q_TNH, context)


def mask_logits(logits_V: Tensor, allowed_W: Tensor) -> None:
    """The definition of `dispatch.mask_logits`, on the device of the logits."""
    # V / 8 bytes travel to a device, not V.
    octets = allowed_W.view(torch.uint8).to(logits_V.device)
    bits_O8 = octets[:, None] >> torch.arange(8, dtype=torch.uint8, device=octets.device) & 1
    logits_V.masked_fill_(bits_O8.view(-1)[: len(logits_V)] == 0, -torch.inf)


def largest_fp8_code(codes: Tensor) -> Tensor:
    """The definition of `dispatch.largest_fp8_code`, over any shape; 0 for no codes."""
    return measure.largest_fp8_code(codes)


def fp8_to_nvfp4(codes_OI: Tensor, scale: Tensor, tensor_scale: Tensor) -> EncodedNVFP4:
    """The definition of `dispatch.fp8_to_nvfp4`: decode to f32, then encode."""
    return encode_nvfp4(decode_fp8(codes_OI, scale), tensor_scale)
