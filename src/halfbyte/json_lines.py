"""A file of JSON lines that grows only, and that a kill or a crash can tear only at its end.

A line counts when it ends in a newline. What a death left of a last line is no line: readers pass
over it, and the next writer cuts it off.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.files import is_there, open_regular


class JsonLines:
    """Appends to such a file, one write a line; opening it cuts off a torn last line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        whole = _whole_bytes(self._file)
        if whole < os.fstat(self._file).st_size:
            os.ftruncate(self._file, whole)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line; after this returns, a kill of the process does not lose it."""
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        written = os.write(self._file, data)
        while written < len(data):
            written += os.write(self._file, data[written:])

    def sync(self) -> None:
        """Make what was appended durable; after this a crash of the machine keeps it, too."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file, whose lines are only durable if `sync` was called before."""
        os.close(self._file)


def _whole_bytes(file: int) -> int:
    """Bytes of an open file up to the end of its last whole line."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def whole_lines(path: Path) -> Iterator[bytes]:
    """Lines of such a file without their ends, oldest first; none if there is no file.

    Raises OddFileError if something other than a file lies there.
    """
    if not is_there(path):
        return
    with open_regular(path) as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line[:-1]


def parse_line(line: bytes) -> Any:
    """The value of a line that `JsonLines` wrote; ValueError or RecursionError if it is not one."""
    return json.loads(line.decode("utf-8", "surrogatepass"))
