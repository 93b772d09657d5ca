"""Is this machine quiet enough to time anything on its processors?

Other processes, and other guests of the same host (steal), make CPU timings two times too long
without a trace in them. `Watch` compares what the whole machine did with what this process did.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import UnsupportedError

_STAT = Path("/proc/stat")
# Share of all processors that others may use or that may be stolen.
FOREIGN_LIMIT = 0.05


@dataclass(frozen=True, slots=True)
class MachineUse:
    """Shares of all processors over a time: others' work, and what the host withheld."""

    foreign: float
    steal: float

    @property
    def is_quiet(self) -> bool:
        """Whether so little was taken that timings count."""
        return self.foreign + self.steal <= FOREIGN_LIMIT

    @property
    def fields(self) -> dict[str, float]:
        """The shares of the machine that others took, as a record states them."""
        return {
            "others_share": round(self.foreign, 4),
            "steal_share": round(self.steal, 4),
        }

    def __str__(self) -> str:
        return (
            f"other processes used {self.foreign:.1%} of the processors, "
            f"{self.steal:.1%} were stolen"
        )

    def require_quiet(self, problem: str, advice: str, *, force: bool) -> None:
        """Raise UnsupportedError that says so if timings do not count, unless forced."""
        if not self.is_quiet and not force:
            raise UnsupportedError(
                f"{problem} (others use {self.foreign:.0%} and the host withholds "
                f"{self.steal:.0%} of the processors; {FOREIGN_LIMIT:.0%} together is the limit); "
                f"{advice}, or say --force"
            )


class Watch:
    """What this machine does from the moment on at which the watch is made."""

    def __init__(self) -> None:
        self._start = _read()

    def usage(self, helpers_s: float = 0.0) -> MachineUse:
        """What others and the host took since the start. Raises UnsupportedError off Linux.

        helpers_s  processor seconds of processes that belong to the measurement
        """
        total, busy, steal, own = (b - a for a, b in zip(self._start, _read(), strict=True))
        own += helpers_s
        if total <= 0:
            return MachineUse(0.0, 0.0)
        return MachineUse(max(busy - own, 0.0) / total, steal / total)


def wait_until_quiet(limit_s: float, look_s: float = 3.0) -> MachineUse:
    """Watch the machine for `look_s` at a time until it is quiet or `limit_s` have passed."""
    deadline = time.monotonic() + limit_s
    while True:
        watch = Watch()
        time.sleep(look_s)
        usage = watch.usage()
        if usage.is_quiet or time.monotonic() >= deadline:
            return usage


def _read() -> tuple[float, float, float, float]:
    """Seconds so far: of all processors, of work, stolen, and of this process and its threads."""
    if not _STAT.exists():
        raise UnsupportedError("CPU timings need /proc/stat to see whether the machine is idle")
    fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, iowait, interrupt, soft_interrupt, steal = (
        field / ticks for field in fields
    )
    busy = user + nice + system + interrupt + soft_interrupt
    own = time.process_time()
    return busy + idle + iowait + steal, busy, steal, own
