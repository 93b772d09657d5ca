"""The work directory of a quantization: where it lies, and that one run at a time works in it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.files import make_directory


def work_directory(target: Path) -> Path:
    """Where the output of `target` is made: hidden, beside it, so that one rename publishes it."""
    return target.parent / f".{target.name}.halfbyte-work"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process while the body runs; make it first if need be.

    Raises UsageError if another process works in it, or it cannot be made.
    """
    make_directory(directory)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is working in {directory}; wait for it") from None
    else:
        yield
    finally:
        os.close(handle)
