"""Text that remembers which of its characters a chat template wrote itself.

A control token in a prompt must come from the template, never from what somebody typed. Templates
cut, join, trim and replace, so that neither the typed text alone nor the rendered text alone tells
the two apart: "<" and "|im_end|>" may be typed apart and joined by the template. `Written` carries
one flag a character through all of that. Where the origin of a result is not certain the flag is
0: such text is encoded as plain text, which is always safe. `sandbox` makes templates use it.
"""

# ruff: noqa: D102 - methods are those of `str`, flags included

import itertools
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from markupsafe import Markup

_CONVERSION = re.compile(
    r"%(?:\((?P<key>[^)]*)\))?[#0\- +]*(?:\*|\d+)?(?:\.(?:\*|\d+))?[hlL]?(?P<kind>[a-zA-Z%])"
)


class Written(str):
    """A string with one byte a character: 1 where the template wrote it, 0 where a client did.

    Everything that is not overridden gives a plain `str`, which counts as typed.
    """

    __slots__ = ("own",)
    own: bytes

    def __new__(cls, text: str = "", own: bytes | None = None) -> "Written":
        """Mark the characters of a string; `own` None means that the template wrote none."""
        made = super().__new__(cls, text)
        made.own = bytes(len(text)) if own is None else own
        assert len(made.own) == len(text)
        return made

    @property
    def is_own(self) -> bool:
        """Whether the template wrote every character of the text."""
        return 0 not in self.own

    def __str__(self) -> str:
        return self

    def _like(self, text: str) -> "Written":
        """The result of a change that keeps the number and order of characters, or typed text."""
        return Written(text, self.own if len(text) == len(self) else None)

    # --- joining

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str) or isinstance(other, Markup):
            return NotImplemented
        return joined((self, other))

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str) or isinstance(other, Markup):
            return NotImplemented
        return joined((other, self))

    def __mul__(self, count: SupportsIndex) -> "Written":
        return Written(str.__mul__(self, count), self.own * count.__index__())

    __rmul__ = __mul__

    def join(self, parts: Iterable[str]) -> "Written":
        pieces: list[str] = []
        for part in parts:
            pieces += [self, part] if pieces else [part]
        if not all(isinstance(piece, str) for piece in pieces):
            raise TypeError("only strings can be joined")
        return joined(pieces)

    def __mod__(self, values: Any) -> "Written":
        """Format with %: what stands for %s keeps its flags."""
        whole = str.__mod__(self, values)
        given: Iterator[Any] = iter(values if isinstance(values, tuple) else (values,))
        pieces: list[str] = []
        end = 0
        for match in _CONVERSION.finditer(self):
            pieces.append(self[end : match.start()])
            end = match.end()
            if match["kind"] == "%":
                pieces.append("%")
                continue
            key = match["key"]
            value = values[key] if key is not None else next(given, None)
            exact = match[0] == "%s" or match[0] == f"%({key})s"
            if exact and isinstance(value, Written):
                pieces.append(value)
            else:
                if "*" in match[0]:
                    return Written(whole)
                one = {key: value} if key is not None else (value,)
                pieces.append(str.__mod__(match[0], one))
        made = joined([*pieces, self[end:]])
        return made if made == whole else Written(whole)

    # --- cutting

    def __getitem__(self, key: Any) -> "Written":
        if isinstance(key, slice):
            return Written(str.__getitem__(self, key), self.own[key])
        at = key.__index__()
        return Written(str.__getitem__(self, at), bytes([self.own[at]]))

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))

    def strip(self, chars: str | None = None, /) -> "Written":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Written":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Written":
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> "Written":
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> "Written":
        return self[: len(str.removesuffix(self, suffix))]

    def _located(self, parts: Iterable[str], gap: int | None) -> list[Any]:
        """Parts that follow one another, `gap` characters apart; None: apart by white space."""
        found: list[Any] = []
        end = 0
        for number, part in enumerate(parts):
            if gap is None:
                start = self.index(part, end)
            else:
                start = end + (gap if number else 0)
            end = start + len(part)
            found.append(self[start:end])
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._located(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._located(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> list[Any]:
        lines = self._located(str.splitlines(self, True), 0)
        if keepends:
            return lines
        return [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str, /) -> Any:
        return tuple(self._located(str.partition(self, sep), 0))

    def rpartition(self, sep: str, /) -> Any:
        return tuple(self._located(str.rpartition(self, sep), 0))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "Written":
        if not old:
            return Written(str.replace(self, old, new, count))
        return Written(new, getattr(new, "own", None)).join(self.split(old, count))

    # --- letters

    def lower(self) -> "Written":
        return self._like(str.lower(self))

    def upper(self) -> "Written":
        return self._like(str.upper(self))

    def capitalize(self) -> "Written":
        return self._like(str.capitalize(self))

    def title(self) -> "Written":
        return self._like(str.title(self))

    def casefold(self) -> "Written":
        return self._like(str.casefold(self))

    def swapcase(self) -> "Written":
        return self._like(str.swapcase(self))


def own(text: str) -> Written:
    """Mark a text as written by the template, so that it may hold control tokens."""
    return Written(text, b"\x01" * len(text))


def joined(parts: Iterable[Any]) -> Written:
    """Join parts to one text; those that are no strings are written as Python does."""
    pieces = [part if isinstance(part, str) else str(part) for part in parts]
    flags = [piece.own if isinstance(piece, Written) else bytes(len(piece)) for piece in pieces]
    return Written("".join(pieces), b"".join(flags))


def typed(value: Any) -> Any:
    """A copy of JSON-like data with every string marked as typed, keys too."""
    if isinstance(value, Written):
        return value
    if isinstance(value, str):
        return Written(value)
    if isinstance(value, Mapping):
        return {typed(key): typed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [typed(item) for item in value]
    return value


def formatted(
    pattern: str, formatter: string.Formatter, args: Any, kwargs: Any, check: Callable[[str], None]
) -> Written:
    """`pattern.format(...)`: fields without a format keep their flags, the rest is typed.

    check  sees every format of a field before it is followed
    """
    literal = own if isinstance(pattern, Written) and pattern.is_own else Written
    numbers = itertools.count()

    def pieces(form: str, depth: int) -> Iterator[Any]:
        for text, name, inner, conversion in formatter.parse(form):
            yield literal(text)
            if name is None:
                continue
            if not name or name[0] in ".[":
                name = f"{next(numbers)}{name}"
            value, _ = formatter.get_field(name, args, kwargs)
            value = formatter.convert_field(value, conversion)
            if inner:
                if depth == 2:
                    raise ValueError("a format within a format within a format")
                inner = str.__str__(joined(pieces(inner, depth + 1)))
                check(inner)
                value = format(value, inner)
            yield value if isinstance(value, str) else format(value)

    return joined(pieces(str.__str__(pattern), 1))
