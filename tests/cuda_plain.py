"""The decoder's arithmetic on the CUDA kernels, in plain torch on any device: tiled weights in,
logits out. What decode steps and prefills are compared with, on a GPU and emulated.

Shapes: T tokens, O, I features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.formats.minifloat import decode_e2m1
from halfbyte.kernels.repack import TiledWeight, fast_values, untile_nvfp4, untile_rows
from halfbyte.model.cuda.weights import CudaLinear, CudaWeights

Rotary = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


def values_of(weight: TiledWeight) -> Tensor:
    """What a product multiplies, without scales of rows: f64 (O, I), padding included."""
    if weight.format == "nvfp4_fast":
        return fast_values(weight).double()
    if weight.format == "nvfp4":
        codes, scales = untile_nvfp4(weight)
        return decode_e2m1(codes).double() * scales.double().repeat_interleave(16, 1) / 256.0
    return untile_rows(weight).double()


def decoded(weight: TiledWeight) -> Tensor:
    """The numbers of a tiled weight: f64 (O, I), padding included."""
    return values_of(weight) * weight.row_scale_O.double()[:, None]


def rounded(x_TI: Tensor, linear: CudaLinear) -> Tensor:
    """Activations as a product of this format sees them, f64."""
    format_, scale = linear.weight.format, linear.input_scale
    if format_ == "nvfp4_fast" or (format_ == "fp8" and scale is None):
        scale_T1 = x_TI.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
        return (x_TI.float() / scale_T1).to(torch.float8_e4m3fn).double() * scale_T1
    if format_ == "fp8":
        assert scale is not None
        return (x_TI.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
    return x_TI.double()


def plain_linear(x_TI: Tensor, linear: CudaLinear) -> Tensor:
    """A product, f64 (T, O), padding included."""
    return rounded(x_TI, linear) @ decoded(linear.weight)[:, : x_TI.shape[1]].t()


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm in f32, rounded to bf16."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * w.float()).bfloat16()


def plain_hidden(weights: CudaWeights, rotary: Rotary, token_ids: Tensor) -> Tensor:
    """What the head reads at every position of one sequence, keys and values as stored: bf16."""
    c = weights.config
    x = weights.embedding_VD[token_ids]
    t = token_ids.shape[0]
    cos, sin, query_scale_T = rotary(torch.arange(t, device=x.device))
    n, k, h = c.num_heads, c.num_kv_heads, c.head_dim

    def rotate(v: Tensor, scale_T: Tensor | None = None) -> Tensor:
        a, b = v.float().chunk(2, -1)
        co, si = cos[:, None], sin[:, None]
        turned = torch.cat((a * co - b * si, b * co + a * si), -1)
        return (turned if scale_T is None else turned * scale_T[:, None, None]).bfloat16()

    def stored(v: Tensor, scale: float) -> Tensor:
        return (v.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale

    for layer in weights.layers:
        y = plain_linear(norm(x, layer.attention_norm_D, c.norm_eps), layer.qkv).bfloat16()
        q = rotate(y[:, : n * h].view(t, n, h), query_scale_T).double()
        keys = stored(rotate(y[:, n * h : (n + k) * h].view(t, k, h)), layer.k_scale)
        values = stored(y[:, (n + k) * h : (n + 2 * k) * h].reshape(t, k, h), layer.v_scale)
        keys = keys.repeat_interleave(n // k, 1)
        values = values.repeat_interleave(n // k, 1)
        scores = torch.einsum("inh,jnh->nij", q, keys) / math.sqrt(h)
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        p = scores.masked_fill(mask, -torch.inf).softmax(-1)
        out = torch.einsum("nij,jnh->inh", p, values).reshape(t, n * h).bfloat16()
        x = x + plain_linear(out, layer.o)[:, : c.width].bfloat16()
        y = plain_linear(norm(x, layer.mlp_norm_D, c.norm_eps), layer.gate_up).bfloat16()
        gate, up = y[:, : c.mlp_width].float(), y[:, c.mlp_width : 2 * c.mlp_width].float()
        z = (torch.nn.functional.silu(gate) * up).bfloat16()
        x = x + plain_linear(z, layer.down)[:, : c.width].bfloat16()
    return norm(x, weights.norm_D, c.norm_eps)


def plain_logits(weights: CudaWeights, rotary: Rotary, token_ids: Tensor) -> Tensor:
    """Logits of every position of one sequence."""
    hidden_TD = plain_hidden(weights, rotary, token_ids)
    return plain_linear(hidden_TD, weights.head)[:, : weights.config.vocab_size].float()
