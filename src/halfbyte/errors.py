"""The exception family: one class per kind of culprit.

Everything that a user, a file, a client or a machine can get wrong raises one of these, with a
message that says what, where and what to do. Broken invariants of our own are assertions.
"""

import reprlib


class HalfbyteError(Exception):
    """Base of every error with a message meant for people; the CLI prints it without a trace."""


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


def reason(error: BaseException) -> str:
    """Why a file or a text could not be read: what a parser or the system says, in one plain line.

    What Python says of its own limits is put into words of the file.
    """
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = (str(said).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it is not {error.encoding.upper()} text: byte 0x{byte:02x} at {error.start}"
    if isinstance(error, OSError):
        return error.strerror or text
    return "a number has too many digits" if "set_int_max_str_digits" in text else text


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
