"""Sums over inputs: what they are, and that smoothing them is smoothing the inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.calibrate import moments
from halfbyte.calibrate.moments import InputSums, Want


def sums_of(x_TI: torch.Tensor, cuts: list[int], want: Want) -> InputSums:
    found = InputSums(x_TI.shape[1], want, torch.device("cpu"))
    for start, stop in zip([0, *cuts], [*cuts, len(x_TI)], strict=True):
        if stop > start:
            found.update(x_TI[start:stop])
    return found


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 40), max_size=3),
    st.booleans(),
    st.sampled_from([1, 7, 8, 24, 2048]),
)
def test_sums_are_those_of_all_tokens_however_they_come(
    seed: int, cuts: list[int], has_products: bool, block_rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(40, 24, generator=generator).to(torch.bfloat16)
    kept = x_TI.clone()
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(moments, "_BLOCK_ROWS", block_rows)
        found = sums_of(x_TI, sorted(cuts), "products" if has_products else "squares")
        products_II = found.take_products() if has_products else None
    wide_TI = x_TI.double()
    assert torch.equal(x_TI, kept)
    assert torch.equal(found.maxima_I.double(), wide_TI.abs().amax(0))
    torch.testing.assert_close(found.squares_I, wide_TI.square().sum(0), rtol=1e-6, atol=0)
    assert found.products_II is None
    if products_II is not None:
        assert torch.equal(products_II, products_II.T)
        wanted_II = wide_TI.T @ wide_TI
        torch.testing.assert_close(products_II.double(), wanted_II, rtol=1e-5, atol=1e-5)


def test_divided_sums_are_those_of_divided_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(30, 16, generator=generator).to(torch.bfloat16)
    factors_I = torch.ldexp(torch.ones(16), torch.arange(-8, 8))
    found = sums_of(x_TI, [11], "products")
    found.divide(factors_I)
    wanted = sums_of((x_TI.float() / factors_I).to(torch.bfloat16), [11], "products")
    assert torch.equal(found.maxima_I, wanted.maxima_I)
    assert torch.equal(found.squares_I, wanted.squares_I)
    torch.testing.assert_close(found.take_products(), wanted.take_products(), rtol=1e-5, atol=0)
