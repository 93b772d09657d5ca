"""The budget: what is given up, what is refused, and that nothing stays behind."""

import resource
import threading
import time
from collections.abc import Callable

import pytest
import torch

from halfbyte.calibrate.budget import (
    FRESH_BYTES,
    MemoryBudget,
    OverBudgetError,
    is_refusal,
)
from halfbyte.machine import Held, held

GIB = 1 << 30
MIB = 1 << 20


class Gauge:
    """Stands for the system: says that as much is held as it was told to."""

    def __init__(self, resident: int) -> None:
        self.resident = resident
        self.asked = 0

    def __call__(self) -> Held:
        self.asked += 1
        return Held(self.resident, self.resident, self.resident, self.resident, 1)


def budget_of(gauge: Callable[[], Held | None], num_bytes: int | None = GIB) -> MemoryBudget:
    return MemoryBudget(num_bytes, limit_data=False, measure=gauge)


def test_without_a_budget_there_is_always_room() -> None:
    budget = budget_of(Gauge(1 << 50), None)
    with budget:
        budget.check(1 << 50)
        assert budget.has_room(1 << 50)


def test_a_system_that_does_not_say_is_not_held_to_anything() -> None:
    with MemoryBudget(1, measure=lambda: None) as budget:
        budget.check(GIB)
        assert budget.has_room(GIB) and budget.budget_bytes is None


def test_what_comes_next_is_refused_before_it_is_taken() -> None:
    budget = budget_of(Gauge(600 * MIB))
    budget.check(400 * MIB)
    with pytest.raises(OverBudgetError, match=r"1\.00 GiB: .* holds 0\.59 GiB and needs 0\.42 GiB"):
        budget.check(430 * MIB)


def test_speed_has_less_room_than_work() -> None:
    budget = budget_of(Gauge(600 * MIB))
    assert budget.has_room(340 * MIB) and not budget.has_room(345 * MIB)
    budget.check(345 * MIB)
    assert budget.has_given_up and not budget.has_room(0)


def test_giving_up_makes_room_for_the_work() -> None:
    gauge = Gauge(900 * MIB)
    budget = budget_of(gauge)
    budget.held_for_speed(lambda: setattr(gauge, "resident", 500 * MIB))
    budget.check(200 * MIB)
    assert gauge.resident == 500 * MIB


def test_the_watcher_gives_up_once_and_latecomers_at_once() -> None:
    gauge, dropped = Gauge(100 * MIB), []
    with budget_of(gauge) as budget:
        budget.held_for_speed(lambda: dropped.append("early"))
        asked = gauge.asked
        while gauge.asked < asked + 3:
            time.sleep(0.01)
        assert not dropped
        gauge.resident = 960 * MIB
        while not budget.has_given_up:
            time.sleep(0.01)
        budget.give_up()
        budget.held_for_speed(lambda: dropped.append("late"))
    assert dropped == ["early", "late"]
    assert budget.peak_bytes >= 960 * MIB
    assert not any(thread.name == "memory" for thread in threading.enumerate())


def test_what_others_in_the_process_hold_is_left_out() -> None:
    gauge = Gauge(FRESH_BYTES + 8 * GIB)
    shared = MemoryBudget(GIB, owns_process=False, limit_data=False, measure=gauge)
    shared.check()
    assert shared.has_room(100 * MIB)
    gauge.resident += GIB
    with pytest.raises(OverBudgetError):
        shared.check()
    with pytest.raises(OverBudgetError):
        budget_of(gauge).check()


def test_the_system_refuses_what_goes_beyond_and_is_told_so_only_meanwhile() -> None:
    before = held()
    if before is None:
        pytest.skip("this system does not say what is held")
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    budget = MemoryBudget(before.resident + 256 * MIB)
    with budget:
        assert torch.empty(192 * MIB, dtype=torch.uint8).numel() == 192 * MIB
        with pytest.raises(RuntimeError) as of_torch:
            torch.empty(320 * MIB, dtype=torch.uint8)
        with pytest.raises(MemoryError) as of_python:
            bytearray(320 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    assert torch.empty(320 * MIB, dtype=torch.uint8).numel() == 320 * MIB
    assert is_refusal(of_torch.value) and is_refusal(of_python.value)


def test_the_limit_is_lifted_when_the_work_fails() -> None:
    limits = resource.getrlimit(resource.RLIMIT_DATA)

    def fail() -> None:
        assert held() is None or resource.getrlimit(resource.RLIMIT_DATA) != limits
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), MemoryBudget(64 * GIB):
        fail()
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


@pytest.mark.parametrize(
    "error, expected",
    [
        (MemoryError(), True),
        (OverBudgetError("x"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("bad_alloc"), False),
    ],
)
def test_refusals_are_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_refusal(error) == expected
