"""What a run has finished, one line a step, so that the next run can go on after it.

The first line says what the run was made of; a run made of anything else is refused with the
difference named. A line counts when it ends in a newline: a torn last line is an unfinished step.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from halfbyte.errors import UsageError


class Journal:
    """An append-only file of JSON lines; each is durable before `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Begin a new journal for a run that is made of `fingerprint`."""
        self._file = self._path.open("wb")
        self.append(fingerprint)

    def resume(self, fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Entries of the earlier run, oldest first; appending goes on after them.

        Raises UsageError naming what differs if that run was made of something else.
        """
        lines = self._path.read_bytes().split(b"\n")[:-1]
        entries = [json.loads(line) for line in lines]
        changes = list(differences(entries[0], json.loads(json.dumps(fingerprint))))
        if changes:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise UsageError(
                f"an unfinished run in {self._path.parent} was made otherwise: {changes[0]}{more}. "
                "Go back to what it was, or drop it with --restart"
            )
        self._file = self._path.open("rb+")
        self._file.seek(sum(len(line) + 1 for line in lines))
        self._file.truncate()
        return entries[1:]

    def exists(self) -> bool:
        """Whether a run has got as far as saying what it is made of."""
        return self._path.exists() and b"\n" in self._path.read_bytes()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one finished step."""
        assert self._file is not None, "neither started nor resumed"
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Sentences that say where two JSON values differ: `source.model.safetensors.bytes was 3`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in now:
                yield f"{inner} is gone"
            elif key not in before:
                yield f"{inner} is new"
            else:
                yield from differences(before[key], now[key], inner)
    elif before != now:
        yield f"{path} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
