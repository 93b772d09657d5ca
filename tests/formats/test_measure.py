"""Measures of error on cases with a known answer."""

import math

import pytest
import torch

from halfbyte.formats.measure import (
    clip_rate,
    largest_magnitude,
    relative_error,
    sqnr_db,
    zero_rate,
)


def test_error_of_a_tenth_is_20_db() -> None:
    x = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    assert relative_error(x, x * 1.1) == pytest.approx(0.1, rel=1e-5)
    assert sqnr_db(x, x * 1.1) == pytest.approx(20, abs=1e-3)


def test_equal_tensors_and_zero_tensors_have_defined_answers() -> None:
    x, zero = torch.ones(3), torch.zeros(3)
    assert relative_error(x, x) == 0
    assert sqnr_db(x, x) == math.inf
    assert relative_error(zero, zero) == 0
    assert sqnr_db(zero, x) == -math.inf


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    b = a + 0.125
    whole = sqnr_db(a, b), float(largest_magnitude(a))
    monkeypatch.setattr("halfbyte.formats.measure.CHUNK_VALUES", 64)
    assert (sqnr_db(a, b), float(largest_magnitude(a))) == pytest.approx(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_largest_magnitude_sees_negatives_nan_and_infinity(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.0], [2.0, 0.5]], dtype=dtype)
    assert largest_magnitude(x) == 3
    assert largest_magnitude(x).dtype == dtype
    assert largest_magnitude(torch.tensor([-math.inf, 1], dtype=dtype)) == math.inf
    assert largest_magnitude(torch.tensor([math.nan, math.inf], dtype=dtype)).isnan()
    assert largest_magnitude(torch.empty(0, dtype=dtype)) == 0


def test_rates_count_what_they_say() -> None:
    x = torch.tensor([0.0, 0.1, -5.0, 7.0])
    assert clip_rate(x, 4.9) == 0.5
    assert zero_rate(x, torch.tensor([0.0, 0.0, -5.0, 7.0])) == 0.25
