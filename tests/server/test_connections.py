"""What arrives at once is read in turns: in order, few at a time, and nothing is lost."""

import asyncio
import random
from typing import Any

import pytest

from halfbyte.server.http.connections import _Turns


class Transport:
    """A transport that gives its pieces to a connection while reading is on."""

    def __init__(self) -> None:
        self.is_reading, self.is_gone = True, False

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def is_closing(self) -> bool:
        return self.is_gone


class Connection:
    def __init__(self, loop: asyncio.AbstractEventLoop, seen: list[tuple[Any, bytes]]) -> None:
        self.loop, self.transport, self.seen = loop, Transport(), seen

    def read(self, data: bytes) -> None:
        assert self.transport.is_reading
        self.seen.append((self, data))


@pytest.mark.parametrize("seed", range(20))
async def test_pieces_come_in_order_and_one_in_a_turn(seed: int) -> None:
    dice = random.Random(seed)
    loop, turns = asyncio.get_running_loop(), _Turns()
    seen: list[tuple[Any, bytes]] = []
    crowd = [Connection(loop, seen) for _ in range(dice.randrange(1, 40))]
    left = {one: [b"%d" % number for number in range(dice.randrange(1, 5))] for one in crowd}
    sent = {one: list(pieces) for one, pieces in left.items()}
    leaves = dice.choice(crowd)
    while any(left.values()) or any(not one.transport.is_reading for one in crowd):
        before = len(seen)
        for one in dice.sample(crowd, len(crowd)):
            if left[one] and one.transport.is_reading:
                turns.take(one, left[one].pop(0))  # type: ignore[arg-type]
        assert len(seen) - before <= 1
        if dice.random() < 0.1 and not leaves.transport.is_gone:
            leaves.transport.is_gone, leaves.transport.is_reading = True, True
            left[leaves] = []
        before = len(seen)
        await asyncio.sleep(0)
        assert len(seen) - before <= 1
    await asyncio.sleep(0.01)
    for one in crowd:
        got = [data for who, data in seen if who is one]
        assert got == sent[one] or (one is leaves and got == sent[one][: len(got)])


async def test_whoever_watches_goes_before_a_crowd() -> None:
    loop, turns = asyncio.get_running_loop(), _Turns()
    seen: list[tuple[Any, bytes]] = []
    crowd = [Connection(loop, seen) for _ in range(100)]
    for one in crowd:
        turns.take(one, b"POST /tokenize")  # type: ignore[arg-type]
    watcher = Connection(loop, seen)
    turns.take(watcher, b"GET /health/ready")  # type: ignore[arg-type]
    while not any(who is watcher for who, _ in seen):
        await asyncio.sleep(0)
    assert len(seen) == 2
