"""Norms, gated activation, rotation and KV store: every CPU implementation, by exactness class."""

import pytest
import torch
from torch import Tensor

from bounded import assert_bounded
from halfbyte.kernels.dispatch import Rotation, implementations

ROWS = (1, 15, 16, 17, 70)
WIDTHS = (16, 24, 304, 576)
EPS = 1e-5
E4M3 = torch.float8_e4m3fn


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(torch.bfloat16)


def norm_in(dtype: torch.dtype, x_TD: Tensor, weight_D: Tensor) -> Tensor:
    x = x_TD.to(dtype)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight_D.to(dtype)


@pytest.mark.parametrize("rms_norm", implementations("rms_norm").values())
def test_norm_against_float64(rms_norm) -> None:  # type: ignore[no-untyped-def]
    for rows in ROWS:
        for width in WIDTHS:
            x_TD, weight_D = random(rows, width, scale=3), random(width)
            plain = norm_in(torch.bfloat16, x_TD, weight_D)
            exact = norm_in(torch.float64, x_TD, weight_D)
            assert_bounded(rms_norm(x_TD, weight_D, EPS), plain, exact)


@pytest.mark.parametrize("add_rms_norm", implementations("add_rms_norm").values())
def test_residual_is_added_exactly_and_normalised_as_rounded(add_rms_norm) -> None:  # type: ignore[no-untyped-def]
    for rows in ROWS:
        for width in WIDTHS:
            x_TD, residual_TD, weight_D = random(rows, width), random(rows, width), random(width)
            before = residual_TD.clone()
            normed, total = add_rms_norm(x_TD, residual_TD, weight_D, EPS)
            assert torch.equal(total, x_TD + residual_TD)
            assert torch.equal(residual_TD, before)
            plain = norm_in(torch.bfloat16, total, weight_D)
            assert_bounded(normed, plain, norm_in(torch.float64, total, weight_D))


@pytest.mark.parametrize("silu_mul", implementations("silu_mul").values())
def test_gate_over_the_whole_range(silu_mul) -> None:  # type: ignore[no-untyped-def]
    for rows in ROWS:
        for width in WIDTHS:
            gate_up = random(rows, 2 * width, scale=8)
            gate, up = gate_up.chunk(2, -1)
            plain = torch.nn.functional.silu(gate) * up
            exact = torch.nn.functional.silu(gate.double()) * up.double()
            assert_bounded(silu_mul(gate_up), plain, exact)
    extremes = torch.tensor([[-3e38, -100.0, -0.0, 0.0, 100.0, 3e38] + [1.0] * 6])
    result = silu_mul(extremes.to(torch.bfloat16))
    assert result.isfinite().all()
    assert result[0, [0, 1]].abs().max() < 1e-30
    assert result[0, [2, 3]].eq(0).all()


def rotated(x_TNH: Tensor, cos_TH2: Tensor, sin_TH2: Tensor) -> Tensor:
    """The definition, one complex product a pair."""
    first, second = x_TNH.double().chunk(2, -1)
    angle = torch.complex(cos_TH2.double(), sin_TH2.double())
    turned = torch.complex(first, second) * angle[:, None]
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("rotate", implementations("rotate").values())
@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
def test_rotation_of_a_fused_product(rotate, head_dim: int) -> None:  # type: ignore[no-untyped-def]
    for rows in ROWS:
        fused = random(rows, 6 * head_dim).view(rows, 6, head_dim)
        q, k, _ = torch.split(fused, [3, 2, 1], dim=1)
        angles = torch.rand(rows, head_dim // 2) * 6
        scale_T = torch.rand(rows) + 0.5
        for query_scale in (None, scale_T):
            rotation = Rotation(angles.cos(), angles.sin(), query_scale)
            q_out, k_out = rotate(q, k, rotation)
            exact_k = rotated(k, angles.cos(), angles.sin())
            exact_q = rotated(q, angles.cos(), angles.sin())
            if query_scale is not None:
                exact_q = exact_q * query_scale.double()[:, None, None]
            assert_bounded(q_out, exact_q.to(torch.bfloat16), exact_q)
            assert_bounded(k_out, exact_k.to(torch.bfloat16), exact_k)


@pytest.mark.parametrize("store_kv", implementations("store_kv").values())
@pytest.mark.parametrize("scale", [1.0, 0.013, 3e-5])
def test_stored_bits_are_torch_s_for_every_bf16_value(store_kv, scale: float) -> None:  # type: ignore[no-untyped-def]
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x_TKH = every.view(-1, 2, 16)
    k_cache = torch.zeros(x_TKH.shape[0] // 16, 16, 2, 16).to(E4M3)
    v_cache = torch.zeros_like(k_cache)
    slots = torch.arange(x_TKH.shape[0])
    store_kv(x_TKH, x_TKH, k_cache, v_cache, slots, scale, 1.0)
    expected = (every.float() / scale).clamp(-448, 448).to(E4M3)
    assert torch.equal(k_cache.view(torch.uint8).flatten(), expected.view(torch.uint8))
    expected = every.float().clamp(-448, 448).to(E4M3)
    assert torch.equal(v_cache.view(torch.uint8).flatten(), expected.view(torch.uint8))


@pytest.mark.parametrize("store_kv", implementations("store_kv").values())
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
def test_only_the_named_slots_are_touched(store_kv, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    k_cache = torch.zeros(3, 4, 2, 16).to(dtype)
    v_cache = torch.zeros(3, 4, 2, 16).to(dtype)
    k, v = random(3, 2, 16), random(3, 2, 16)
    store_kv(k, v, k_cache, v_cache, torch.tensor([11, -1, 5]), 1.0, 1.0)
    for cache, x in ((k_cache, k), (v_cache, v)):
        flat = cache.float().view(12, 2, 16)
        written = [slot for slot in range(12) if flat[slot].any()]
        assert written == [5, 11]
        assert torch.equal(flat[11], x[0].to(dtype).float())
        assert torch.equal(flat[5], x[2].to(dtype).float())


@pytest.mark.parametrize("mask_logits", implementations("mask_logits").values())
@pytest.mark.parametrize("size", (1, 31, 32, 33, 64, 1000, 4096))
def test_masks_close_what_they_do_not_allow(mask_logits, size) -> None:  # type: ignore[no-untyped-def]
    words = torch.randint(-(2**31), 2**31, (-(-size // 32),), dtype=torch.int32)
    words[::3] = -1
    words[1::5] = 0
    logits = torch.randn(size + 8)
    before = logits.clone()
    mask_logits(logits[:size], words)
    for token in range(size):
        is_allowed = int(words[token // 32]) >> (token % 32) & 1
        assert float(logits[token]) == (float(before[token]) if is_allowed else -torch.inf)
    # Nothing behind the vocabulary is touched.
    assert torch.equal(logits[size:], before[size:])
