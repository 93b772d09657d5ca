"""What a run has finished, one line a step, so that the next run can go on after it.

The first line says what the run was made of; a run made of anything else is refused with the
difference named. A torn last line is an unfinished step. Each line carries a hash of what it says,
since disks lose more than ends of lines.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.json_lines import JsonLines, parse_line, whole_lines


class Journal:
    """The finished steps of a run; each is durable before `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: JsonLines | None = None

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Begin a new journal for a run that is made of `fingerprint`."""
        self._path.unlink(missing_ok=True)
        self._file = JsonLines(self._path)
        self.append(fingerprint)

    def resume(self, fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Entries of the earlier run, oldest first; new ones are appended behind them.

        Raises UsageError naming what differs if that run was made of something else, and if a line
        is not as it was written.
        """
        lines = enumerate(whole_lines(self._path), start=1)
        entries = [self._entry(line, number) for number, line in lines]
        changes = list(differences(entries[0], json.loads(json.dumps(fingerprint))))
        if changes:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise UsageError(
                f"an unfinished run in {self._path.parent} was made otherwise: {changes[0]}{more}. "
                "Go back to what it was, or drop it with --restart"
            )
        self._file = JsonLines(self._path)
        return entries[1:]

    def exists(self) -> bool:
        """Whether a run has got as far as saying what it is made of."""
        return next(whole_lines(self._path), None) is not None

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one finished step to the journal, durably."""
        assert self._file is not None, "neither started nor resumed"
        self._file.append({"entry": entry, "sha256": _digest(entry)})
        self._file.sync()

    def _entry(self, line: bytes, number: int) -> Any:
        try:
            value = parse_line(line)
            if _digest(value["entry"]) == value["sha256"]:
                return value["entry"]
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise UsageError(
            f"{self._path}: line {number} is not as an unfinished run wrote it; drop that run with "
            "--restart"
        )

    def close(self) -> None:
        """Close the journal's file; what was appended stays."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _digest(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


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
