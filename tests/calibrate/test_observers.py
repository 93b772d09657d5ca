"""The observer: any order and grouping gives the same result, and nothing broken is hidden."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.calibrate.observers import AmaxObserver


@given(st.integers(0, 1000), st.lists(st.integers(0, 36), max_size=5), st.integers(0, 1000))
def test_order_and_grouping_never_matter(seed: int, cuts: list[int], shuffle: int) -> None:
    x = torch.randn(37, 11, generator=torch.Generator().manual_seed(seed)).bfloat16()
    parts = list(x.tensor_split(sorted(cuts)))
    random.Random(shuffle).shuffle(parts)
    observer = AmaxObserver()
    for part in parts:
        observer.update(part)
    assert observer.result() == x.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_activations_stay_visible(bad: float) -> None:
    observer = AmaxObserver()
    observer.update(torch.tensor([1.0, bad, 2.0]).bfloat16())
    observer.update(torch.ones(5).bfloat16())
    assert not bool(torch.isfinite(observer.result()))


def test_nothing_seen_is_zero() -> None:
    assert AmaxObserver().result() == 0
