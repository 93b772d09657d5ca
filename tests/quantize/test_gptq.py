"""GPTQ over NVFP4 blocks: a slow twin, what it never does worse than, and awkward moments."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.minifloat import E2M1_VALUES
from halfbyte.formats.nvfp4 import (
    SEARCHED_STEPS,
    EncodedNVFP4,
    decode_nvfp4,
    encode_nvfp4,
    nvfp4_tensor_scale,
)
from halfbyte.quantize.gptq import encode_gptq, make_metric
from halfbyte.quantize.scales import encode_weight_nvfp4
from halfbyte.recipe.schema import BlockOrder, GptqOptions

PLAIN = GptqOptions(damping=0.01, order="columns", sweeps=0)


def case(seed: int, rows: int, width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the products of correlated inputs of unlike sizes, and a tensor scale."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    sizes = torch.exp2(torch.randn(width, generator=generator) * 2)
    x_TI = torch.randn(tokens, width, generator=generator) @ mixing * sizes
    w_OI = (torch.randn(rows, width, generator=generator) * 0.02).to(torch.bfloat16)
    return w_OI, x_TI.T @ x_TI, nvfp4_tensor_scale(w_OI.abs().amax())


def row_losses(w_OI: Tensor, encoded: EncodedNVFP4, products_II: Tensor) -> Tensor:
    errors_OI = (w_OI.double() - decode_nvfp4(encoded, torch.float32).double()) @ torch.eye(
        w_OI.shape[1], dtype=torch.float64
    )
    return ((errors_OI @ products_II.double()) * errors_OI).sum(1)


def damped(products_II: Tensor, damping: float) -> Tensor:
    diagonal_I = products_II.diagonal()
    live_I = diagonal_I > 0
    mean = diagonal_I[live_I].mean() if bool(live_I.any()) else torch.tensor(1.0)
    made_II = products_II / mean
    made_II = made_II + torch.diag((~live_I).float())
    return made_II + damping * torch.eye(len(diagonal_I))


def same(a: EncodedNVFP4, b: EncodedNVFP4) -> bool:
    return a.codes_OI2.equal(b.codes_OI2) and a.scale_OB.view(torch.uint8).equal(
        b.scale_OB.view(torch.uint8)
    )


def encode_slowly(
    w_OI: Tensor, products_II: Tensor, tensor_scale: Tensor, options: GptqOptions
) -> Tensor:
    """The decoded weight, by the textbook's way: one column at a time, the rest updated with the
    inverse of what is left, all in float64 and plain loops. No sweeps.
    """
    width = w_OI.shape[1]
    moments_II = damped(products_II, options.damping).double()
    blocks = list(range(width // 16))
    if options.order == "energy":
        energy = products_II.diagonal().view(-1, 16).sum(1)
        blocks.sort(key=lambda b: -float(energy[b]))
    order = [16 * b + j for b in blocks for j in range(16)]
    inverse_II = torch.linalg.inv(moments_II[order][:, order])
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    grid = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)
    values_OI = torch.zeros(w_OI.shape, dtype=torch.float64)
    scale = float(tensor_scale)
    for row in range(w_OI.shape[0]):
        left = w_OI[row, order].double()
        for start in range(0, width, 16):
            amax = float(left[start : start + 16].abs().amax())
            wanted = torch.tensor(amax / (6 * scale) or 1.0).clamp(2**-9, 448)
            first = int(wanted.to(torch.float8_e4m3fn).view(torch.uint8))
            best: tuple[float, Tensor, Tensor] | None = None
            for step in SEARCHED_STEPS:
                code = torch.tensor(min(max(first + step, 1), 0x7E), dtype=torch.uint8)
                unit = float(code.view(torch.float8_e4m3fn)) * scale
                trial, chosen, lost = left.clone(), torch.zeros(16, dtype=torch.float64), 0.0
                for j in range(16):
                    column = start + j
                    t = float(trial[column]) / unit
                    nearest = float(grid[int((grid - abs(t)).abs().argmin())])
                    q = (nearest if t >= 0 else -nearest) * unit
                    error = (float(trial[column]) - q) / float(upper_II[column, column])
                    trial[column:] -= error * upper_II[column, column:]
                    chosen[j], lost = q, lost + error * error
                if best is None or lost < best[0]:
                    best = lost, chosen, trial
            assert best is not None
            values_OI[row, order[start : start + 16]] = best[1]
            left = best[2]
    return values_OI


@pytest.mark.parametrize("order", ["columns", "energy"])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_the_textbooks_gptq(seed: int, order: BlockOrder) -> None:
    w_OI, products_II, scale = case(seed, rows=4, width=48, tokens=400)
    options = replace(PLAIN, order=order)
    slow_OI = encode_slowly(w_OI, products_II, scale, options)
    encoded = encode_gptq(w_OI, make_metric(products_II, options), scale)
    fast_OI = decode_nvfp4(encoded, torch.float32).double()
    # A tie in one of them may fall the other way in f32, and all that follows in its row with it.
    alike = ((fast_OI - slow_OI).abs() < 1e-6).all(1)
    assert int(alike.sum()) >= 3
    moments_II = damped(products_II, options.damping).double()
    for found, twin in zip(fast_OI, slow_OI, strict=True):
        lost, wanted = (
            (w - w0) @ moments_II @ (w - w0)
            for w, w0 in ((found, w_OI[0].double()), (twin, w_OI[0].double()))
        )
        assert float(lost) == pytest.approx(float(wanted), rel=0.05)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 7, 33]),
    width=st.sampled_from([16, 48, 144]),
    tokens=st.sampled_from([1, 20, 500]),
    damping=st.sampled_from([0.0, 0.01, 0.2]),
    order=st.sampled_from(["columns", "energy"]),
    sweeps=st.integers(0, 2),
)
def test_no_row_is_worse_than_rounding_to_nearest(
    seed: int, rows: int, width: int, tokens: int, damping: float, order: BlockOrder, sweeps: int
) -> None:
    w_OI, products_II, scale = case(seed, rows, width, tokens)
    metric = make_metric(products_II, GptqOptions(damping, order, 128, sweeps))
    place_I = metric.order_I.argsort()
    moments_II = metric.moments_II[place_I][:, place_I]
    ours = row_losses(w_OI, encode_gptq(w_OI, metric, scale), moments_II)
    plain = row_losses(w_OI, encode_nvfp4(w_OI, scale), moments_II)
    assert bool((ours <= plain * (1 + 1e-4)).all())


def test_it_gains_what_it_is_for() -> None:
    w_OI, products_II, scale = case(0, rows=64, width=256, tokens=2000)
    plain = row_losses(w_OI, encode_nvfp4(w_OI, scale), products_II).sum()
    once = encode_gptq(w_OI, make_metric(products_II, PLAIN), scale)
    swept = encode_gptq(w_OI, make_metric(products_II, replace(PLAIN, sweeps=2)), scale)
    assert row_losses(w_OI, once, products_II).sum() < 0.5 * plain
    assert row_losses(w_OI, swept, products_II).sum() < row_losses(w_OI, once, products_II).sum()


@pytest.mark.parametrize("order", ["columns", "energy"])
def test_independent_inputs_give_the_weighted_search(order: BlockOrder) -> None:
    w_OI, products_II, scale = case(1, rows=40, width=96, tokens=300)
    energy_I = products_II.diagonal()
    options = GptqOptions(0.0, order, 128, 0)
    encoded = encode_gptq(w_OI, make_metric(torch.diag(energy_I), options), scale)
    searched = encode_weight_nvfp4(w_OI, scale, "weighted", energy_I / energy_I.mean())
    codes = decode_nvfp4(encoded, torch.float32), decode_nvfp4(searched, torch.float32)
    # Two scales that lose the same may be chosen between by the last bit of a sum.
    differ_OB = (codes[0] != codes[1]).view(40, -1, 16).any(2)
    assert float(differ_OB.float().mean()) < 0.02
    losses = [row_losses(w_OI, e, torch.diag(energy_I)) for e in (encoded, searched)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_dead_inputs_keep_the_nearest_values_and_disturb_nobody() -> None:
    w_OI, products_II, scale = case(2, rows=24, width=96, tokens=300)
    dead = torch.zeros(96, dtype=torch.bool)
    dead[[3, 40, 41]] = True
    dead[64:80] = True
    products_II[dead], products_II[:, dead] = 0, 0
    options = replace(PLAIN, sweeps=1)
    encoded = encode_gptq(w_OI, make_metric(products_II, options), scale)
    # A block without any live input is what a search for the least squared error makes of it.
    searched = encode_weight_nvfp4(w_OI, scale, "mse")
    codes = slice(32, 40)
    assert encoded.codes_OI2[:, codes].equal(searched.codes_OI2[:, codes])
    other = w_OI.clone()
    other[:, 64:80] *= 0.5
    changed = encode_gptq(other, make_metric(products_II, options), scale)
    live = [b for b in range(6) if b != 4]
    assert changed.scale_OB.view(torch.uint8)[:, live].equal(
        encoded.scale_OB.view(torch.uint8)[:, live]
    )


@pytest.mark.parametrize("tokens", [0, 1, 15])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_singular_products_are_damped_until_they_serve(tokens: int, damping: float) -> None:
    w_OI, products_II, scale = case(3, rows=8, width=64, tokens=max(tokens, 1))
    if tokens == 0:
        products_II.zero_()
    encoded = encode_gptq(w_OI, make_metric(products_II, GptqOptions(damping=damping)), scale)
    assert bool(torch.isfinite(decode_nvfp4(encoded, torch.float32)).all())
    if tokens == 0:
        assert same(encoded, encode_weight_nvfp4(w_OI, scale, "mse"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_weighed_or_encoded_is_refused(bad: float) -> None:
    w_OI, products_II, scale = case(4, rows=2, width=32, tokens=50)
    metric = make_metric(products_II, PLAIN)
    broken_OI = w_OI.clone()
    broken_OI[1, 5] = bad
    with pytest.raises(FormatError, match="NaN or infinity"):
        encode_gptq(broken_OI, metric, scale)
    products_II[3, 3] = bad
    with pytest.raises(FormatError, match="second moments"):
        make_metric(products_II, PLAIN)


def test_it_is_deterministic_and_rows_do_not_mix() -> None:
    w_OI, products_II, scale = case(5, rows=20, width=160, tokens=400)
    metric = make_metric(products_II, GptqOptions())
    whole = encode_gptq(w_OI, metric, scale)
    assert same(whole, encode_gptq(w_OI, metric, scale))
    scaled = make_metric(products_II * 4.0, GptqOptions())
    assert same(whole, encode_gptq(w_OI, scaled, scale))
    # Panels change the order of sums only.
    panels = make_metric(products_II, GptqOptions(block=16))
    lost = [
        row_losses(w_OI, encode_gptq(w_OI, m, scale), products_II).sum() for m in (metric, panels)
    ]
    assert float(lost[0]) == pytest.approx(float(lost[1]), rel=0.02)
