"""What a person sees while something long goes on: one line that is rewritten, or one now and then.

The words are the caller's. Here is when they are shown: on a terminal twice a second over each
other, in a log every ten seconds.
"""

import sys
import time
from typing import TextIO

from halfbyte.printable import own_stream, printable


class ProgressLine:
    """A line on a stream, by default stderr."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = own_stream(sys.stderr) if stream is None else stream
        self.is_terminal = self._stream.isatty()
        self._every_s = 0.5 if self.is_terminal else 10.0
        self._shown_at = time.monotonic()
        self._shown = ""

    def is_due(self) -> bool:
        """Whether enough time has passed since the line was shown."""
        return time.monotonic() - self._shown_at >= self._every_s

    def show(self, text: str, *, last: bool = False) -> None:
        """Show the line; the last one stays. A log does not get the same line twice."""
        self._shown_at = time.monotonic()
        line = printable(text)
        if self.is_terminal:
            self._stream.write(f"\r\x1b[2K{line}" + ("\n" if last else ""))
        elif line != self._shown:
            self._stream.write(line + "\n")
        self._shown = line
        self._stream.flush()

    def clear(self) -> None:
        """Take the line off a terminal, before something else is printed."""
        if self.is_terminal and self._shown:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._shown = ""


class TimeLeft:
    """Called with what is done and all there is: shows the share done and the time left.

    The first call is the measure's beginning, since the work before it (loading, layers of an
    earlier run) is of another pace.
    """

    def __init__(self, unit: str, stream: TextIO | None = None) -> None:
        self._unit = unit
        self._line = ProgressLine(stream)
        self._began: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Note how much is done, and show it if a line is due."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, done
        if done >= total:
            self._line.clear()
        elif self._line.is_due():
            self._line.show(self._text(done, total, now, *self._began))

    def _text(self, done: int, total: int, now: float, began_at: float, began: int) -> str:
        text = f"{done} of {total} {self._unit}, {100 * done // total} %"
        if done > began:
            text += f", about {clock((now - began_at) / (done - began) * (total - done))} left"
        return text


def say_next(*commands: str) -> None:
    """Commands that go on from here, each to be copied; beside what was asked for, on stderr."""
    print("next: " + "\n      ".join(commands), file=sys.stderr)


def clock(seconds: float) -> str:
    """A time as hours, minutes and seconds, such as 0:02:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
