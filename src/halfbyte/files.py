"""Reading what a path names, without waiting or filling memory; folders; sizes in messages.

A path is outside input. What lies there may be a FIFO that nobody writes to, a device that never
ends, or a file of any size: each is an OSError here whose words say so, like one of the system's
own, so that whoever reports those reports these.
"""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from halfbyte.errors import CheckpointError, UsageError

# Configs, indexes, records: the largest known index (100,000 tensors) has 10 MB. JSON of this size
# can become 600 MB of objects, which is what bounds it.
MAX_TEXT_BYTES = 16 << 20
# Four times the tokenizer.json of a vocabulary of 131,072 pieces with its merges.
MAX_TOKENIZER_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class OddFileError(OSError):
    """What lies at a path cannot be read as a file; `strerror` says why, as a half sentence."""

    def __init__(self, why: str, path: str | Path) -> None:
        super().__init__(errno.EINVAL, why, str(path))


def open_regular(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading, as `open(path, "rb")` does.

    Raises OddFileError at once for a FIFO, a device, a socket, a directory and a link that leads
    to no file; OSError as `open`.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a zero byte
        raise OddFileError("is no name of a file", path) from error
    except OSError as error:
        if (why := _why_no_end(path, error)) is not None:
            raise OddFileError(why, path) from error
        raise
    _refuse_others(mode, path)
    # It may have become another thing since; opening must not wait even then.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        found = os.fstat(handle)
        _refuse_others(found.st_mode, path)
        if found.st_size == 0 and _must_wait(handle):
            raise OddFileError("has nothing to read until the system writes it", path)
        return os.fdopen(handle, "rb", buffering)
    except BaseException:
        os.close(handle)
        raise


def _refuse_others(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "of a kind of its own")
        raise OddFileError(f"is {kind}, not a regular file", path)


def _must_wait(handle: int) -> bool:
    """Whether reading would wait, as in some files of /proc, which count as regular ones."""
    try:
        os.pread(handle, 1, 0)
    except BlockingIOError:
        return True
    except OSError:  # whoever reads is told
        return False
    return False


def is_there(path: str | Path) -> bool:
    """Whether something lies at a path, be it a link that leads nowhere.

    A file that may be left out is left out only then: whoever opens the link is told of it.
    """
    return os.path.lexists(path)


def _why_no_end(path: str | Path, error: OSError) -> str | None:
    """What is wrong with the links at a path; None where they are not what is wrong."""
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself, in a circle"
    if error.errno == errno.ENOENT and os.path.islink(path):
        return f"is a link to {os.readlink(path)!r}, where nothing is"
    return None


def require_directory(path: str | Path) -> None:
    """Raise CheckpointError that says what lies at a path in place of a checkpoint's directory."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is no name of a directory") from error
    except FileNotFoundError as error:
        why = _why_no_end(path, error)
        raise CheckpointError(f"{path} {why}" if why else f"{path}: no such directory") from error
    except OSError as error:
        why = _why_no_end(path, error) or f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path} {why}") from error
    if not stat.S_ISDIR(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "a file")
        raise CheckpointError(f"{path} is {kind}, not a directory")
    # Otherwise it would seem to be empty.
    if not os.access(path, os.R_OK | os.X_OK):
        raise CheckpointError(f"{path}: you may not read this directory (Permission denied)")


def read_bounded(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a file of at most `max_bytes`.

    Raises OddFileError for a larger one, for what is no regular file, and for the pointer that Git
    LFS leaves in place of a file it has not fetched.
    """
    with open_regular(path) as file:
        is_larger = os.fstat(file.fileno()).st_size > max_bytes
        content = b"" if is_larger else file.read(max_bytes + 1)
    if is_larger or len(content) > max_bytes:
        raise OddFileError(f"has more than the {format_bytes(max_bytes)} we read of such", path)
    refuse_pointer(content, path)
    return content


# Lists and objects of one JSON text; a header of 300,000 tensors has as many. They become several
# hundred bytes each, in a file of three.
MAX_JSON_PARTS = 1_000_000


def parse_json_text(content: bytes | str, **options: Any) -> Any:
    """The value of a JSON text, with `options` of json.loads, if it can become no memory-eater.

    Raises ValueError for what is no JSON or has more lists and objects than any file of ours,
    RecursionError for what is nested too deeply; `errors.in_words` says either.
    """
    if isinstance(content, bytes):
        content = content.decode(json.detect_encoding(content))
    if content.count("[") + content.count("{") > MAX_JSON_PARTS:
        raise ValueError(f"it has more than {MAX_JSON_PARTS:,} lists and objects")
    return json.loads(content, **options)


def require_regular(path: str | Path) -> None:
    """For a file that a library will open: OddFileError for what it would wait for or misread."""
    with open_regular(path) as file:
        refuse_pointer(file.read(64), path)


def refuse_pointer(content: bytes, path: str | Path) -> None:
    """Raise OddFileError if a file that begins with `content` is a pointer of Git LFS."""
    if content.startswith(_LFS_POINTER):
        raise OddFileError(
            "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`", path
        )


def hash_regular(path: str | Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal; OddFileError for another kind."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people, whole or not at all; what JSON lacks is written as text."""
    draft = path.with_suffix(".tmp")
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, path)


def make_directory(path: Path) -> None:
    """Make a directory and those above it; UsageError that says why that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be made ({error.strerror})") from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, after files were made or renamed."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def format_bytes(num_bytes: int) -> str:
    """`12.30 GB`, `4.5 MB`, `1.2 kB`, `17 bytes`: decimal, never rounded to nothing."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 1e9:.2f} GB"
    if num_bytes >= 10**6:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e3:.1f} kB" if num_bytes >= 1000 else f"{num_bytes} bytes"


def format_gib(num_bytes: int) -> str:
    """`12.30 GiB`, `4.5 MiB`, `1.2 KiB`, `17 bytes`: memory, as the flags take it."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 1 << 20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.1f} KiB" if num_bytes >= 1024 else f"{num_bytes} bytes"


def check_place(path: str | Path) -> None:
    """Raise UsageError if nothing can be written at `path`, before work that would end there.

    Folders that are missing on the way count as ones that can be made.
    """
    for parent in Path(path).absolute().parents:
        if not (parent.exists() or parent.is_symlink()):
            continue
        if not parent.is_dir():
            raise UsageError(f"{path}: {parent} is not a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{path}: nothing may be written in {parent}")
        return
