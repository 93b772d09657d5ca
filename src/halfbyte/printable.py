"""Text from outside, fit for a terminal: it can say anything and command nothing.

Models, servers, records and files may hold escape sequences, which a terminal obeys: they set its
title, fill its clipboard, move its cursor over what was printed before, answer in the user's name.
Commands print through `printable_output`; log lines are filtered where they are formatted.
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

# C0 controls but line feed and tab, DEL, C1 controls; what embeds, overrides or isolates the
# direction of text and so shows a line in another order than it has; separators of lines that are
# none on a terminal; halves of surrogate pairs, which no stream can encode. The two marks of
# direction and the joiners stay: written Arabic, Persian and Hebrew need them, emoji too.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Text with everything that a terminal would obey made visible: ESC becomes \x1b.

    A carriage return vanishes: beside a line feed it says nothing, alone it would let a line be
    written over. Character by character, so that a stream may be cut anywhere: the pieces joined
    are what the whole becomes.
    """
    return _COMMANDS.sub(_visible, text)


def _visible(found: re.Match[str]) -> str:
    character = found.group()
    if character == "\r":
        return ""
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def columns(rows: Sequence[Sequence[str]], *, ends_left: bool = False) -> list[str]:
    """Rows of a table as lines, each cell as wide as the widest of its column.

    The first column stands to the left, the others to the right, with `ends_left` but for the last.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1 if ends_left else len(widths)
    return [
        "  ".join(
            cell.rjust(width) if 0 < number < last else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class _PrintableStream:
    """A text stream behind `printable`. What it does not have itself is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """While it lasts, what is printed to stdout and stderr is `printable`."""
    out = cast("TextIO", _PrintableStream(own_stream(sys.stdout)))
    err = cast("TextIO", _PrintableStream(own_stream(sys.stderr)))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def own_stream(stream: TextIO) -> TextIO:
    """The stream itself, for control sequences of ours; what others say goes to `printable`."""
    return stream.stream if isinstance(stream, _PrintableStream) else stream
