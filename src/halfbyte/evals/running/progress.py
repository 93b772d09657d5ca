"""What a person sees while a run goes on: how far it is, how well the model does, how long yet."""

import time
from collections import defaultdict
from typing import TextIO

from halfbyte.evals.judging.stats import accuracy_interval
from halfbyte.evals.records import GradedAttempt
from halfbyte.progress import ProgressLine, clock


class RunProgress:
    """Counts of one benchmark; prints to a stream no more often than `every_s`."""

    def __init__(
        self, title: str, total: int, stream: TextIO | None = None, *, later: int = 0
    ) -> None:
        """Count `total` attempts and print to `stream`, stderr unless another is given.

        later  attempts of the benchmarks that follow, for the time that the whole run still takes
        """
        self._title = title
        self._total = total
        self._later = later
        self._line = ProgressLine(stream)
        self._started = time.monotonic()
        self._shown_done = -1
        self._resumed = 0
        self._done = 0
        self._tokens = 0
        self._troubles: dict[str, int] = defaultdict(int)
        self._sums: dict[str, tuple[float, int, str]] = {}

    def resume(self, records: list[GradedAttempt]) -> None:
        """Take in what an earlier run left; not counted as speed."""
        for record in records:
            self._count(record)
        self._resumed = self._done
        self._tokens = 0

    def add(self, record: GradedAttempt) -> None:
        """Count one more graded attempt, and print the line if it is due."""
        self._count(record)
        self._tokens += record.prompt_tokens + record.completion_tokens
        if self._line.is_due():
            self.show()

    def _count(self, record: GradedAttempt) -> None:
        self._done += 1
        if record.cause not in ("ok", "wrong"):
            self._troubles[record.cause] += 1
        if record.score is not None:
            total, count, _ = self._sums.get(record.item_id, (0.0, 0, ""))
            self._sums[record.item_id] = (total + record.score, count + 1, record.group)

    def show(self, *, last: bool = False) -> None:
        """Print the state now; in a log not twice the same."""
        if last and not self._line.is_terminal and self._shown_done == self._done:
            return
        self._shown_done = self._done
        self._line.show(self.line(time.monotonic() - self._started), last=last)

    def line(self, elapsed_s: float) -> str:
        """The text of the line that shows how far the run is."""
        fresh = self._done - self._resumed
        parts = [f"{self._title}  {self._done}/{self._total}"]
        means = [total / count for total, count, _ in self._sums.values()]
        if means:
            groups = [group for _, _, group in self._sums.values()]
            e = accuracy_interval(means, groups)
            low, high = (100 * v if v == v else float("nan") for v in (e.low, e.high))
            parts.append(f"{100 * e.mean:.1f} % [{low:.1f}, {high:.1f}]")
        if elapsed_s > 0 and fresh > 0:
            rate = fresh / elapsed_s
            parts.append(f"{_speed(rate)}  {self._tokens / elapsed_s:,.0f} tokens/s")
            parts.append(f"{self._tokens:,} tokens")
            left = self._total - self._done
            if left:
                parts.append(f"ETA {clock(left / rate)}")
            if self._later:
                # At this benchmark's rate: others have longer or shorter answers.
                parts.append(f"whole run about {clock((left + self._later) / rate)}")
        if self._troubles:
            parts.append(", ".join(f"{n} {cause}" for cause, n in sorted(self._troubles.items())))
        return "  ".join(parts)


def _speed(rate: float) -> str:
    return f"{rate:.1f} items/s" if rate >= 1 else f"{60 * rate:.1f} items/min"
