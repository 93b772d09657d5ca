"""Volume from few rows: seeded recombination, for tests of throughput, memory and resume.

Made rows keep the shape of a real one and take sentences from others that stood in the same place.
They are for tests only: their text means nothing.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any, BinaryIO

from halfbyte.calibrate.rows import BadRowError, parse_line, parse_row
from halfbyte.calibrate.sources import Split, SplitFile
from halfbyte.errors import UsageError

_SENTENCE = re.compile(r".+?(?:[.!?。！？]\s+|\n+|$)", re.DOTALL)
_MAX_PARTS = 5_000  # rows that are taken apart; more add nothing to the variety
_SWAP_SHARE = 0.5

_Place = tuple[str, str]  # role and field


def recombined_rows(
    rows: Sequence[Mapping[str, Any]], count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """`count` rows with `messages` or `text`, made of pieces; row n depends on n and seed only.

    rows  as `rows.parse_row` takes them; those that it refuses are not used
    """
    parts = []
    for row in rows:
        try:
            parts.append(parse_row(row))
        except BadRowError:
            continue
    shapes = [_shape(part.messages, part.tools, part.text) for part in parts]
    pool: dict[_Place, list[str]] = {}
    for shape in shapes:
        for place, text in _texts(shape):
            pool.setdefault(place, []).extend(_SENTENCE.findall(text))
    if not shapes:
        raise UsageError("there is no usable row to take pieces from")
    for number in range(count):
        random = Random(f"{seed}:{number}")
        row = _remade(random.choice(shapes), pool, random)
        yield {"uuid": f"recombined-{seed}-{number}", **row}


def _shape(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], text: str
) -> dict[str, Any]:
    if text:
        return {"text": text}
    return {"messages": [dict(message) for message in messages], "tools": list(tools)}


def _texts(shape: Mapping[str, Any]) -> Iterator[tuple[_Place, str]]:
    if "text" in shape:
        yield ("", "text"), shape["text"]
    for message in shape.get("messages", ()):
        for name in ("content", "reasoning_content"):
            if isinstance(message.get(name), str) and message[name]:
                yield (message["role"], name), message[name]


def _remade(
    shape: Mapping[str, Any], pool: Mapping[_Place, list[str]], random: Random
) -> dict[str, Any]:
    if "text" in shape:
        return {"text": _swapped(shape["text"], pool["", "text"], random)}
    messages = []
    for message in shape["messages"]:
        made = dict(message)
        for name in ("content", "reasoning_content"):
            if isinstance(made.get(name), str) and made[name]:
                made[name] = _swapped(made[name], pool[made["role"], name], random)
        messages.append(made)
    return {"messages": messages, "tools": shape["tools"]}


def _swapped(text: str, pool: Sequence[str], random: Random) -> str:
    """The text with about half of its sentences exchanged for others."""
    sentences = _SENTENCE.findall(text)
    return "".join(
        random.choice(pool) if random.random() < _SWAP_SHARE else sentence for sentence in sentences
    )


class _Generated(io.RawIOBase):
    """Rows as a file of JSON lines that is made while it is read."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows = rows
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            row = next(self._rows, None)
            if row is None:
                return 0
            self._rest = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def recombined_split(splits: Sequence[Split], count: int, seed: int) -> Split:
    """A split of `count` rows made from pieces of these."""

    def parts() -> Iterator[dict[str, Any]]:
        for split in splits:
            for _, line in split.lines():
                try:
                    yield parse_line(line)
                except BadRowError:
                    continue

    def open_generated() -> BinaryIO:
        rows = [row for _, row in zip(range(_MAX_PARTS), parts(), strict=False)]
        return io.BufferedReader(_Generated(recombined_rows(rows, count, seed)))

    name = "+".join(split.name for split in splits)
    return Split("recombined", (SplitFile(f"recombined from {name}", None, None, open_generated),))
