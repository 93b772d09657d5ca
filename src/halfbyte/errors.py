"""The exception family: one class per kind of culprit.

Everything that a user, a file, a client or a machine can get wrong raises one of these, with a
message that says what, where and what to do. Broken invariants of our own are assertions.
"""

import errno
import json
import re
import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever has such an error has imported it
    from pydantic import ValidationError

# What a page of the terminal holds; names and texts out of files have any length.
_MOST_SAID, _SAID_FIRST, _SAID_LAST = 1000, 700, 250


def cut_middle(text: str) -> str:
    """A message with no line longer than a few of a terminal, whatever it quotes.

    What is quoted stands on one line; several are our own: a list of reasons, the end of a log.
    """
    return "\n".join(map(_cut_line, text.split("\n"))) if len(text) > _MOST_SAID else text


def _cut_line(line: str) -> str:
    if len(line) <= _MOST_SAID:
        return line
    return f"{line[:_SAID_FIRST]} … {line[-_SAID_LAST:]}"


class HalfbyteError(Exception):
    """Base of every error with a message meant for people; the CLI prints it without a trace.

    A line of it that quotes too much is cut in its middle.
    """

    def __str__(self) -> str:
        return cut_middle(super().__str__())


class UsageError(HalfbyteError):
    """The person at the keyboard asked for something that cannot be: flags, recipes, paths."""


class CheckpointError(HalfbyteError):
    """A file is missing, damaged or says something we do not understand."""


class FormatError(HalfbyteError):
    """A tensor cannot be represented: wrong width, NaN, zero scale."""


class RequestError(HalfbyteError):
    """A client's request is invalid; carries what the OpenAI error body needs.

    param   path of the offending field, as the client wrote it, or None
    code    short machine-readable reason, such as ``context_length_exceeded``
    status  HTTP status, 400 unless the reason has one of its own
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class CapacityError(HalfbyteError):
    """The machine is too small or too full: memory, disk, KV cache, queue."""


class UnsupportedError(HalfbyteError):
    """The environment lacks something: a device capability, an optional package."""


class WorkerError(HalfbyteError):
    """A process of a tensor-parallel group has died or does not answer."""


def how_to_get(extra: str) -> str:
    """How an extra of pyproject.toml is installed: from the clone, for no index has us."""
    return f"install halfbyte with its extra {extra}: pip install '.[{extra}]' in its folder"


_MOST_CHARACTERS = 100
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 4, 4, 4
_SHORT.maxstring, _SHORT.maxother = 60, 60


def shown(value: object) -> str:
    """A value of outside input for a message: its `repr`, or as much as a line holds.

    A list from a file may name itself a billion times over, a number have more digits than Python
    agrees to print.
    """
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "…"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def first_finding(error: "ValidationError") -> str:
    """The first thing that pydantic found wrong, in one line with its place and value."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:60] for part in first["loc"])
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {first['msg'][:200]} (it is {shown(first['input'])})"


# Words of Python's JSON reader -> ours.
_JSON_WORDS = {
    "Expecting value": "a value is missing",
    "Expecting property name enclosed in double quotes": "a name in double quotes is missing",
    "Expecting ':' delimiter": "a colon is missing",
    "Expecting ',' delimiter": "a comma is missing",
    "Illegal trailing comma before end of object": "nothing follows a comma",
    "Illegal trailing comma before end of array": "nothing follows a comma",
    "Extra data": "something follows the end",
    "Unterminated string starting at": "a text does not end",
    "Unexpected UTF-8 BOM (decode using utf-8-sig)": "it begins with a byte order mark",
}
# What a library raises that goes into a file's values without looking.
_UNLOOKED = (TypeError, AttributeError, LookupError, AssertionError)


def in_words(error: BaseException) -> str:
    """Half a sentence on why a file could not be read, from what was raised over it.

    Python speaks of its own types and limits, which say nothing to whoever has the file.
    """
    if isinstance(error, OSError):
        circle = "its links lead in a circle" if error.errno == errno.ELOOP else None
        return circle or error.strerror or _first_line(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"byte {error.start + 1} (0x{byte:02x}) is not UTF-8 text"
    if isinstance(error, UnicodeEncodeError):
        return f"it holds half a surrogate pair ({error.object[error.start]!r}), which is no text"
    if isinstance(error, json.JSONDecodeError):
        said = _JSON_WORDS.get(error.msg, error.msg)
        return f"line {error.lineno}, column {error.colno}: {said}"
    if isinstance(error, _UNLOOKED):
        return "a value in it is missing or of another kind than was expected"
    text = _first_line(error)
    if isinstance(error, ValueError) and text.startswith("Exceeds the limit"):
        return "a number in it has thousands of digits"
    return text


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    line = re.sub(r"^\[Errno \d+\] ", "", line)
    return line if len(line) <= _MOST_QUOTED else f"{line[: _MOST_QUOTED - 1]}…"


_MOST_QUOTED = 200  # of what a library says
