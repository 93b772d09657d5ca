"""The formats of least estimated loss within a number of bytes: a multiple-choice knapsack.

Every group takes one of its formats. Losses add up, bytes add up. A table over bytes is filled in
units that divide the differences between formats where they have a common divisor worth the name;
then its best is the best there is. Otherwise bytes are rounded up to the unit, and a bound from the
convex hulls (the value of the problem's Lagrangian) says how far the best can be. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import UsageError

# Units that the bytes between the least and the most are cut into, at most.
_MOST_UNITS = 100_000


@dataclass(frozen=True, slots=True)
class Item:
    """What must be chosen once: option -> bytes, and option -> loss."""

    name: str
    sizes: Mapping[str, int]
    losses: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """The options that were chosen, one for every item, and their sums.

    options      item -> option
    num_bytes    of all items
    loss         sum of the losses chosen
    lower_bound  no choice within the bytes has less
    """

    options: Mapping[str, str]
    num_bytes: int
    loss: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How much more than the bound the choice loses; 0 where it is known to be the best."""
        return max(self.loss - self.lower_bound, 0.0)


def least_bytes(items: Sequence[Item]) -> int:
    """Bytes if every item takes its smallest option."""
    return sum(min(item.sizes.values()) for item in items)


def most_bytes(items: Sequence[Item]) -> int:
    """Bytes if every item takes its largest option."""
    return sum(max(item.sizes.values()) for item in items)


def choose(items: Sequence[Item], budget_bytes: int) -> Choice:
    """Choose an option for every item; more bytes never give more loss.

    Raises UsageError if the smallest options take more than the budget.
    """
    least = least_bytes(items)
    if least > budget_bytes:
        raise UsageError(f"{budget_bytes:,} bytes: the smallest formats take {least:,}")
    room = min(budget_bytes, most_bytes(items)) - least
    extra = [
        {option: size - min(item.sizes.values()) for option, size in item.sizes.items()}
        for item in items
    ]
    unit = _unit(extra, most_bytes(items) - least)
    is_exact = all(size % unit == 0 for sizes in extra for size in sizes.values())
    options = _fill(items, extra, unit, room // unit)
    loss = sum(item.losses[options[item.name]] for item in items)
    bound = loss if is_exact else min(_bound(items, extra, room), loss)
    return Choice(options, sum(item.sizes[options[item.name]] for item in items), loss, bound)


def _unit(extra: Sequence[Mapping[str, int]], span: int) -> int:
    """The common divisor of all differences, or what gives no more units than allowed."""
    divisor = math.gcd(*(size for sizes in extra for size in sizes.values())) or 1
    return divisor if span // divisor <= _MOST_UNITS else max(span // _MOST_UNITS, 1)


def _fill(
    items: Sequence[Item], extra: Sequence[Mapping[str, int]], unit: int, capacity: int
) -> dict[str, str]:
    """Fill the table item by item; entry u is the least loss of those so far within u units."""
    best: NDArray[np.float64] = np.zeros(capacity + 1)
    picks: list[NDArray[np.int8]] = []
    for item, sizes in zip(items, extra, strict=True):
        found = np.full(capacity + 1, np.inf)
        pick = np.zeros(capacity + 1, dtype=np.int8)
        # The smaller of two equal losses' sizes is kept: options go from small to large.
        for number, option in enumerate(_ordered(item)):
            units = -(-sizes[option] // unit)
            if units > capacity:
                continue
            tried = best[: capacity + 1 - units] + item.losses[option]
            is_better = tried < found[units:]
            found[units:][is_better] = tried[is_better]
            pick[units:][is_better] = number
        best = found
        picks.append(pick)
    # The least loss may need fewer units than there are.
    left = int(np.argmin(best))
    options: dict[str, str] = {}
    for item, sizes, pick in zip(reversed(items), reversed(extra), reversed(picks), strict=True):
        option = _ordered(item)[int(pick[left])]
        options[item.name] = option
        left -= -(-sizes[option] // unit)
    return {item.name: options[item.name] for item in items}


def _ordered(item: Item) -> list[str]:
    return sorted(item.sizes, key=lambda option: item.sizes[option])


def _bound(items: Sequence[Item], extra: Sequence[Mapping[str, int]], room: int) -> float:
    """The largest value of the Lagrangian over prices a byte: no choice within `room` has less.

    As a function of the price it is concave and piecewise linear; it is largest where the bytes of
    the options that a price makes cheapest step over the room.
    """
    low, high = 0.0, 1.0
    while _spent(items, extra, high)[1] > room and high < 1e30:
        high *= 4
    for _ in range(200):
        middle = (low + high) / 2
        if _spent(items, extra, middle)[1] > room:
            low = middle
        else:
            high = middle
    return max(_spent(items, extra, price)[0] - price * room for price in (low, high))


def _spent(
    items: Sequence[Item], extra: Sequence[Mapping[str, int]], price: float
) -> tuple[float, int]:
    """Loss and price of the options that are cheapest together, and their bytes."""
    value, spent = 0.0, 0
    for item, sizes in zip(items, extra, strict=True):
        option = min(sizes, key=lambda o: (item.losses[o] + price * sizes[o], sizes[o]))
        value += item.losses[option] + price * sizes[option]
        spent += sizes[option]
    return value, spent
