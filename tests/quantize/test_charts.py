"""Axes of the charts of a quantization's page."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from halfbyte.quantize.charts import log_ticks, ticks


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_an_axis_has_few_round_steps_around_its_ends(one: float, two: float) -> None:
    low, high = sorted((one, two))
    assume(high - low > 1e-6)
    found = ticks(low, high)
    step = found[1] - found[0]
    digits = step / 10 ** math.floor(math.log10(step * 1.0001))
    assert min(abs(digits - round_one) for round_one in (1, 2, 5)) < 1e-3
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert found[1] > low and found[-2] < high
    assert len(found) <= 7


@pytest.mark.parametrize(
    "low, high, found",
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (0.0, 5.0, [0, 1, 2, 3, 4, 5]),
        (3.0, 22.0, [0, 5, 10, 15, 20, 25]),
        (7.0, 7.0, [6, 8]),
        (0.0, 0.0, [0]),
    ],
)
def test_axes_one_knows(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == found


def test_powers_of_ten_hold_their_ends() -> None:
    assert log_ticks(0.002, 30.0) == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100])
    assert log_ticks(1.0, 1.0) == [1.0, 10.0]
