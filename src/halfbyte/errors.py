"""The exception family: one class per kind of culprit.

Everything that a user, a file, a client or a machine can get wrong raises one of these, with a
message that says what, where and what to do. Broken invariants of our own are assertions.
"""


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
