import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import UsageError
from halfbyte.quantize import knapsack
from halfbyte.quantize.knapsack import Item, choose, least_bytes, most_bytes

FORMATS = ("nvfp4", "fp8", "bf16")


@st.composite
def problems(draw: st.DrawFn) -> list[Item]:
    unit = draw(st.sampled_from([1, 7, 48384]))
    items = []
    for number in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 40))
        formats = FORMATS[: draw(st.integers(1, 3))]
        sizes = {f: unit * count * (place + 1) for place, f in enumerate(formats)}
        if draw(st.booleans()):
            # As in a checkpoint: bf16 has no scalars, so that divisors are small.
            sizes = {f: size + (8 if f != "bf16" else 0) for f, size in sizes.items()}
        losses = {f: draw(st.floats(0, 1, allow_nan=False)) for f in formats}
        items.append(Item(str(number), sizes, losses))
    return items


def best_of_all(items: list[Item], budget: int) -> float:
    found = [
        sum(item.losses[option] for item, option in zip(items, picked, strict=True))
        for picked in itertools.product(*(item.sizes for item in items))
        if sum(i.sizes[o] for i, o in zip(items, picked, strict=True)) <= budget
    ]
    return min(found)


@given(problems(), st.floats(0, 1.2))
def test_the_budget_is_kept_and_the_best_lies_between_bound_and_choice(
    items: list[Item], share: float
) -> None:
    least = least_bytes(items)
    budget = least + int(share * (most_bytes(items) - least))
    made = choose(items, budget)
    assert made.num_bytes <= budget
    assert made.num_bytes == sum(item.sizes[made.options[item.name]] for item in items)
    assert made.gap >= 0
    best = best_of_all(items, budget)
    assert made.lower_bound <= best + 1e-9
    assert best <= made.loss + 1e-12
    assert made.loss - best <= made.gap + 1e-9, "the gap says at least how far the choice is off"


@given(problems(), st.data())
def test_more_bytes_never_give_more_loss(items: list[Item], data: st.DataObject) -> None:
    least, most = least_bytes(items), most_bytes(items)
    first, second = sorted(data.draw(st.integers(least, most + 3)) for _ in range(2))
    assert choose(items, second).loss <= choose(items, first).loss


@given(problems())
def test_with_a_coarse_unit_the_bound_still_holds(items: list[Item]) -> None:
    before, knapsack._MOST_UNITS = knapsack._MOST_UNITS, 5
    try:
        budget = (least_bytes(items) + most_bytes(items)) // 2
        made = choose(items, budget)
        assert made.num_bytes <= budget
        assert made.lower_bound <= best_of_all(items, budget) + 1e-9 <= made.loss + 2e-9
    finally:
        knapsack._MOST_UNITS = before


def test_equal_losses_take_the_fewer_bytes() -> None:
    items = [Item("a", {"nvfp4": 5, "fp8": 9}, {"nvfp4": 0.5, "fp8": 0.5})]
    assert choose(items, 100).options == {"a": "nvfp4"}


def test_too_few_bytes_say_how_many_it_takes() -> None:
    items = [Item("a", {"nvfp4": 5000, "fp8": 9000}, {"nvfp4": 1.0, "fp8": 0.5})]
    with pytest.raises(UsageError, match="4,999 bytes: the smallest formats take 5,000"):
        choose(items, 4999)
