"""Observers: any order and grouping gives the same result; what they refuse to hide."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.calibrate.observers import AmaxObserver, MakeObserver, PercentileObserver

MAKERS: list[MakeObserver] = [AmaxObserver, lambda: PercentileObserver(0.9)]


def some_activations(seed: int) -> torch.Tensor:
    return torch.randn(37, 11, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("make", MAKERS)
@given(st.integers(0, 1000), st.lists(st.integers(0, 36), max_size=5), st.integers(0, 1000))
def test_order_and_grouping_never_matter(
    make: MakeObserver, seed: int, cuts: list[int], shuffle: int
) -> None:
    x = some_activations(seed)
    whole = make()
    whole.update(x)
    parts = list(x.tensor_split(sorted(cuts)))
    random.Random(shuffle).shuffle(parts)
    first, second = make(), make()
    for number, part in enumerate(parts):
        (first if number % 2 else second).update(part)
    first.merge(second)
    assert torch.equal(first.result(), whole.result())


def test_percentile_of_everything_is_the_maximum() -> None:
    x = some_activations(3)
    amax, percentile = AmaxObserver(), PercentileObserver(1.0)
    amax.update(x)
    percentile.update(x)
    assert torch.equal(amax.result(), percentile.result())
    assert amax.result() == x.abs().max()


def test_percentile_is_exact() -> None:
    observer = PercentileObserver(0.75)
    observer.update(torch.tensor([1.0, -2.0, 3.0, -4.0]).bfloat16())
    assert observer.result() == 3.0
    observer.update(torch.zeros(4).bfloat16())
    assert observer.result() == 2.0


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_activations_stay_visible(make: MakeObserver, bad: float) -> None:
    observer = make()
    observer.update(torch.tensor([1.0, bad, 2.0]).bfloat16())
    observer.update(torch.ones(5).bfloat16())
    assert not bool(torch.isfinite(observer.result()))


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_seen_is_zero(make: MakeObserver) -> None:
    observer = make()
    observer.merge(make())
    assert observer.result() == 0
