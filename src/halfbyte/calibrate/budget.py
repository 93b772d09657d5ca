"""Keeps a process within the host memory that it was promised to stay within.

Counted is what is resident, mapped libraries included: the figure that the system calls VmHWM and
that anyone can look up. Three lines of defence (decision 0025): `has_room` and `check` are asked
before anything large is taken; a thread looks every 20 ms and has given up what is held for speed
alone when memory gets tight; and on a CPU the system refuses what would go beyond the budget
(RLIMIT_DATA), as an error that the run can end with properly.
"""

import errno
import threading
from collections.abc import Callable
from typing import Self

import torch

from halfbyte.errors import CapacityError
from halfbyte.machine import Held, held, trim_heap

try:
    import resource
except ImportError:  # no such thing on Windows; then nothing states what is held either
    resource = None  # type: ignore[assignment]

# Shares of the budget: what is held for speed goes at the first, the run stops at the second.
GIVE_UP_AT = 0.92
STOP_AT = 0.99
SAMPLE_S = 0.02
# What an interpreter with torch and this package holds before it does anything (measured: 0.26 GB,
# and libraries that are loaded on the way). A process that holds more does something else too.
FRESH_BYTES = 500 << 20
# RLIMIT_DATA is set anew when it is this far from what it should be.
_LIMIT_STEP_BYTES = 1 << 20


class OverBudgetError(CapacityError):
    """What comes next would take more memory than the budget has left."""


class MemoryBudget:
    """A budget of host memory, kept while its `with` block lasts.

    budget_bytes  None promises nothing: there is always room
    owns_process  the process does nothing else: all it holds counts. Otherwise what it held when
                  the block began, beyond a fresh interpreter, is left out
    limit_data    let the system refuse more: for a process that is ours, and uses no GPU, whose
                  driver asks for far more than it touches
    measure       says what the process holds; where that is None nothing can be kept

    `held_for_speed` names functions that drop what the work can do without. They are called once,
    from any thread. Methods may be called from any thread.
    """

    def __init__(
        self,
        budget_bytes: int | None,
        *,
        owns_process: bool = True,
        limit_data: bool = True,
        measure: Callable[[], Held | None] = held,
    ) -> None:
        self._measure = measure
        self._before = measure()
        self.budget_bytes = None if self._before is None else budget_bytes
        self._left_out = 0
        if self._before is not None and not owns_process:
            self._left_out = max(0, self._before.resident - FRESH_BYTES)
        self._owns_process = owns_process
        self._limit_data = limit_data and resource is not None
        self._limits: tuple[int, int] | None = None
        self._giving_up = threading.Lock()
        self._droppers: list[Callable[[], object]] = []
        self.has_given_up = False
        self._most = 0
        self._most_threads = 0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Self:
        if self.budget_bytes is not None:
            if self._limit_data:
                self._limits = resource.getrlimit(resource.RLIMIT_DATA)
            self._look()
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._watcher.ident is not None:
            self._watcher.join()
        if self._limits is not None:
            limits, self._limits = self._limits, None
            resource.setrlimit(resource.RLIMIT_DATA, limits)

    def held_for_speed(self, drop: Callable[[], object]) -> None:
        """`drop()` is called when memory gets tight; at once if it already has."""
        with self._giving_up:
            if not self.has_given_up:
                self._droppers.append(drop)
                return
        drop()

    def has_room(self, num_bytes: int = 0) -> bool:
        """Whether so much more may be taken for the sake of speed."""
        if self.budget_bytes is None:
            return True
        return not self.has_given_up and self._look() + num_bytes <= GIVE_UP_AT * self.budget_bytes

    def check(self, num_bytes: int = 0) -> None:
        """Make sure that so much more may be taken, giving up what is held for speed if need be.

        Raises OverBudgetError if there is no room even so. Not to be called by what `give_up`
        waits for.
        """
        if self.budget_bytes is None:
            return
        if self._look() + num_bytes > GIVE_UP_AT * self.budget_bytes:
            self.give_up()
        counted = self._look()
        if counted + num_bytes > STOP_AT * self.budget_bytes:
            more = f" and needs {_gib(num_bytes)} more" if num_bytes else ""
            raise OverBudgetError(
                f"--memory {_gib(self.budget_bytes)}: this process holds {_gib(counted)}{more}"
            )

    def give_up(self) -> None:
        """Drop what is held for speed; returns when it is dropped, whoever began."""
        with self._giving_up:
            if not self.has_given_up:
                self.has_given_up = True
                for drop in self._droppers:
                    drop()
                self._droppers.clear()
                trim_heap()

    @property
    def peak_bytes(self) -> int:
        """The most that was resident and counts; exact where the process is ours."""
        now = self._measure()
        if now is not None and (self._owns_process or self.budget_bytes is None):
            return now.peak
        return self._most

    def _look(self) -> int:
        """What counts of what is held now."""
        now = self._measure()
        if now is None or self._before is None:
            return 0
        limits = self._limits
        if limits is not None:
            self._refuse_beyond(now, self._before, limits)
        counted = max(0, now.resident - self._left_out)
        self._most = max(self._most, counted)
        return counted

    def _refuse_beyond(self, now: Held, before: Held, limits: tuple[int, int]) -> None:
        """Tell the system how much private memory is left when mapped files are taken off.

        What was asked for and never touched is not resident, so it comes on top: that was so when
        we began, and stacks of threads that came since, of which a few pages are used and which
        the C library keeps for the next thread.
        """
        assert self.budget_bytes is not None
        soft, hard = limits
        stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
        stack = 8 << 20 if stack == resource.RLIM_INFINITY else stack
        idle = max(0, before.data - before.anonymous)
        self._most_threads = max(self._most_threads, now.threads)
        idle += max(0, self._most_threads - before.threads) * stack
        files = now.resident - now.anonymous
        limit = self.budget_bytes + self._left_out - files + idle
        for least in (soft, hard):
            limit = limit if least == resource.RLIM_INFINITY else min(limit, least)
        limit = max(limit, 1)
        current, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if current == resource.RLIM_INFINITY or abs(current - limit) > _LIMIT_STEP_BYTES:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))

    def _watch(self) -> None:
        assert self.budget_bytes is not None
        while not self._ended.wait(SAMPLE_S):
            if self._look() > GIVE_UP_AT * self.budget_bytes:
                self.give_up()


def is_refusal(error: BaseException) -> bool:
    """Whether this is how Python, torch or a library say that the system gives no more memory."""
    if isinstance(error, OverBudgetError | MemoryError):
        return True
    if isinstance(error, torch.OutOfMemoryError):  # of a GPU
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("can't allocate memory", "bad_alloc", "can't start new thread")
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
