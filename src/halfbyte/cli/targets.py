"""What a command works on: a checkpoint folder, or a server at an address."""

from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.files import is_there, require_directory


def is_folder(target: str) -> bool:
    """Whether a target is a folder; if not, it is an address. UsageError for what is neither.

    A bare word is no address: it is far more often a folder's name with a mistake in it.
    """
    if Path(target).is_dir():
        return True
    host = target.partition("/")[0]
    if "://" in target or ":" in host or host == "localhost":
        return False
    if is_there(target):
        require_directory(target)
    raise UsageError(f"{target} is neither a folder nor the address of a server (http://HOST:PORT)")
