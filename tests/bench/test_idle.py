import os
import threading
import time

import pytest

from halfbyte.bench import idle
from halfbyte.bench.idle import MachineUse, Watch, wait_until_quiet


def test_own_work_is_not_foreign() -> None:
    watch = Watch()
    stop = threading.Event()
    spinner = threading.Thread(target=lambda: [0 for _ in iter(stop.is_set, True)])
    started, started_own = time.perf_counter(), time.process_time()
    spinner.start()
    stop.wait(0.5)
    stop.set()
    spinner.join()
    own_share = (time.process_time() - started_own) / (time.perf_counter() - started)
    usage = watch.usage()
    # What is foreign and what is ours together cannot exceed all processors (a tick or two off).
    assert 0.0 <= usage.foreign <= 1.0 - own_share / (os.cpu_count() or 1) + 0.1
    assert 0.0 <= usage.steal <= 1.0


def test_readings_are_divided_between_us_others_and_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = iter([(100.0, 50.0, 1.0, 10.0), (110.0, 56.0, 2.0, 14.0)])
    monkeypatch.setattr(idle, "_read", lambda: next(readings))
    usage = Watch().usage()
    # Ten processor seconds: six of work, four of them ours, one stolen.
    assert usage.foreign == pytest.approx(0.2)
    assert usage.steal == pytest.approx(0.1)
    assert not usage.is_quiet


def test_waiting_ends_when_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(
        [(0.0, 0.0, 0.0, 0.0), (1.0, 0.9, 0.0, 0.0), (1.0, 0.9, 0.0, 0.0), (2.0, 0.9, 0.0, 0.0)]
    )
    monkeypatch.setattr(idle, "_read", lambda: next(readings))
    assert wait_until_quiet(60.0, look_s=0.001) == MachineUse(0.0, 0.0)


def test_waiting_gives_up_with_what_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(0.0, 0.0, 0.0, 0.0), (1.0, 0.9, 0.0, 0.0)])
    monkeypatch.setattr(idle, "_read", lambda: next(readings))
    assert wait_until_quiet(0.0, look_s=0.001).foreign == pytest.approx(0.9)
