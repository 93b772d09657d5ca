"""Scales: shared in NVFP4 groups only, never zero, never worse when searched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import FormatError
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.nvfp4 import (
    block_errors,
    block_maxima,
    block_scales,
    decode_nvfp4,
    encode_nvfp4,
    nvfp4_tensor_scale,
)
from halfbyte.modules import WeightFormat
from halfbyte.quantize.scales import (
    cache_scale,
    encode_weight_nvfp4,
    input_scale,
    least_squares_scales,
    pinned_input_scale,
    shared_maxima,
    smoothing_factors,
)


def test_only_nvfp4_groups_share_their_maximum() -> None:
    formats: dict[str, WeightFormat] = {
        "decoder.0.attention.q": "fp8",
        "decoder.0.attention.k": "fp8",
        "decoder.0.mlp.gate": "nvfp4",
        "decoder.0.mlp.up": "nvfp4",
        "decoder.0.mlp.down": "nvfp4",
    }
    maxima = {name: torch.tensor(float(n + 1)) for n, name in enumerate(formats)}
    shared = {name: float(amax) for name, amax in shared_maxima(maxima, formats).items()}
    assert list(shared.values()) == [1, 2, 4, 4, 5]


@pytest.mark.parametrize("chosen, constant", [("fp8", 448), ("nvfp4", 2688)])
def test_input_scale_is_amax_over_the_largest_value(chosen: WeightFormat, constant: int) -> None:
    scale = input_scale("x", chosen, torch.tensor(3.5).bfloat16(), "ieee")
    assert scale.dtype == torch.float32 and scale.shape == ()
    assert float(scale) == float(torch.tensor(3.5) / constant)
    doubled = input_scale("x", chosen, torch.tensor(3.5).bfloat16(), "ieee", "headroom")
    assert float(doubled) == 2 * float(scale)


@pytest.mark.parametrize("chosen, expected", [("fp8", 1.0), ("nvfp4", 1 / 448)])
def test_unreached_input_gets_the_reference_stand_in(chosen: WeightFormat, expected: float) -> None:
    scale = input_scale("nobody", chosen, torch.tensor(0.0).bfloat16(), "ieee")
    assert float(scale) == pytest.approx(expected)


def test_declared_scales_keep_their_meaning_without_data() -> None:
    declared = torch.tensor(0.03).bfloat16()
    assert float(pinned_input_scale("fp8", declared, "ieee")) == float(declared)
    assert float(pinned_input_scale("nvfp4", declared, "ieee")) == pytest.approx(
        float(declared) / 6
    )
    assert float(pinned_input_scale("fp8", None, "ieee")) == 1.0


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_cache_scale_of_nothing_is_refused_by_name(bad: float) -> None:
    with pytest.raises(FormatError, match=r"decoder\.3\.attention\.k_scale"):
        cache_scale("decoder.3.attention.k_scale", torch.tensor(bad), "ieee")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float32]))
def test_searched_scales_are_never_worse_on_any_block(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(6, 64, generator=generator) ** 3).to(dtype)
    w[2, 16:32] = 0
    scale = nvfp4_tensor_scale(largest_magnitude(w))
    plain = block_scales(block_maxima(w), scale)
    searched = least_squares_scales(w, scale)
    assert bool((block_errors(w, searched, scale) <= block_errors(w, plain, scale)).all())
    assert float(searched[2, 1].float()) == 1.0


def test_block_errors_are_those_of_the_decoded_weight() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(largest_magnitude(w)))
    lost = (w.double() - decode_nvfp4(encoded, torch.float32).double()).square()
    expected = lost.view(8, 4, 16).sum(dim=2)
    errors = block_errors(w, encoded.scale_OB, encoded.tensor_scale).double()
    assert torch.allclose(errors, expected, rtol=1e-5, atol=0)


def test_searched_weights_lose_less_and_amax_is_the_plain_encoder() -> None:
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    scale = nvfp4_tensor_scale(largest_magnitude(w))
    plain = encode_weight_nvfp4(w, scale, "amax")
    assert torch.equal(plain.codes_OI2, encode_nvfp4(w, scale).codes_OI2)
    searched = encode_weight_nvfp4(w, scale, "mse")
    lost = [
        float((w.float() - decode_nvfp4(e, torch.float32)).square().sum())
        for e in (plain, searched)
    ]
    assert lost[1] < 0.85 * lost[0]


def test_errors_of_a_weight_larger_than_a_chunk_are_those_of_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every real weight is worked through in pieces."""
    w = torch.randn(8, 80, generator=torch.Generator().manual_seed(3)).bfloat16()
    scale = nvfp4_tensor_scale(largest_magnitude(w))
    # Importances of 80 columns: chunks of 48 and 112 values begin in the middle of a row.
    energy_I = torch.exp2(torch.arange(80.0) / 8)
    whole = (
        least_squares_scales(w, scale),
        block_errors(w, block_scales(block_maxima(w), scale), scale),
        block_errors(w, block_scales(block_maxima(w), scale), scale, energy_I),
    )
    encoded = encode_weight_nvfp4(w, scale, "mse")
    for chunk in (16, 48, 112, 640):
        monkeypatch.setattr("halfbyte.formats.nvfp4.chunk_values", lambda _, n=chunk: n)
        assert torch.equal(least_squares_scales(w, scale).float(), whole[0].float())
        errors = block_errors(w, block_scales(block_maxima(w), scale), scale)
        assert torch.equal(errors, whole[1])
        errors = block_errors(w, block_scales(block_maxima(w), scale), scale, energy_I)
        assert torch.equal(errors, whole[2])
        again = encode_weight_nvfp4(w, scale, "mse")
        assert torch.equal(again.codes_OI2, encoded.codes_OI2)
        decoded = decode_nvfp4(again, torch.float32)
        assert torch.equal(decoded, decode_nvfp4(encoded, torch.float32))


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def nearest_errors(w: torch.Tensor, scale_bits: torch.Tensor, tensor_scale: float) -> torch.Tensor:
    """Squared error of every block in float64, each value at the nearest e2m1 of all."""
    step = scale_bits.view(torch.float8_e4m3fn).double() * tensor_scale
    quotient = (w.double().view(-1, 16) / step.view(-1, 1)).abs()
    distance = (quotient[..., None] - E2M1).abs().amin(dim=-1)
    return (distance * step.view(-1, 1)).square().sum(dim=1)


def test_the_search_finds_the_best_of_its_neighbours() -> None:
    """From two e4m3 steps below the scale of the maximum to six above: each is tried."""
    generator = torch.Generator().manual_seed(4)
    w = (
        torch.randn(400, 64, generator=generator) * torch.rand(400, 1, generator=generator)
    ).bfloat16()
    tensor_scale = nvfp4_tensor_scale(largest_magnitude(w))
    first = block_scales(block_maxima(w), tensor_scale).view(torch.uint8).view(-1)
    found = least_squares_scales(w, tensor_scale).view(torch.uint8).view(-1)
    tried = {
        step: nearest_errors(
            w, (first.short() + step).clamp(1, 0x7E).to(torch.uint8), float(tensor_scale)
        )
        for step in range(-2, 7)
    }
    best = torch.stack(list(tried.values())).amin(dim=0)
    errors = nearest_errors(w, found, float(tensor_scale))
    assert torch.allclose(errors, best, rtol=1e-5, atol=0)
    # Each of them is the best of some block: leaving one out would be seen.
    chosen = found.short() - first.short()
    assert set(chosen.tolist()) == set(range(-2, 7))


def test_the_weighted_search_loses_least_where_inputs_are_large() -> None:
    generator = torch.Generator().manual_seed(0)
    w_OI = (torch.randn(32, 64, generator=generator) * 0.02).to(torch.bfloat16)
    energy_I = torch.exp2(torch.randn(64, generator=generator) * 3)
    scale = nvfp4_tensor_scale(w_OI.abs().amax())
    lost = {}
    for rule in ("amax", "mse", "weighted"):
        decoded = decode_nvfp4(encode_weight_nvfp4(w_OI, scale, rule, energy_I), torch.float32)
        squares_OI = (w_OI.float() - decoded).square() * energy_I
        lost[rule] = squares_OI.view(32, 4, 16).sum(2)
    # A block of nine candidates each: never worse than either of the others.
    assert bool((lost["weighted"] <= lost["mse"] * (1 + 1e-6)).all())
    assert bool((lost["weighted"] <= lost["amax"] * (1 + 1e-6)).all())
    assert float(lost["weighted"].sum()) < 0.97 * float(lost["mse"].sum())
    same = encode_weight_nvfp4(w_OI, scale, "weighted", torch.ones(64))
    assert torch.equal(same.codes_OI2, encode_weight_nvfp4(w_OI, scale, "mse").codes_OI2)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_smoothing_factors_are_powers_of_two_around_one(exponent: float) -> None:
    energy_I = torch.tensor([0.0, 1e-300, 1.0, 1.0, 4.0, 1e6, 1e300], dtype=torch.float64)
    factors_I = smoothing_factors(energy_I, exponent)
    assert bool((torch.frexp(factors_I).mantissa == 0.5).all())
    assert factors_I[0] == 1 and factors_I[2] == 1
    assert bool((factors_I[1:].diff() >= 0).all()) and float(factors_I.amax()) <= 256
    assert torch.equal(smoothing_factors(energy_I * 0, exponent), torch.ones(7))
    # Inputs in another unit are smoothed alike.
    assert torch.equal(
        smoothing_factors(energy_I[2:6] * 3.7, exponent), smoothing_factors(energy_I[2:6], exponent)
    )
