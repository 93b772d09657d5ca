"""The type of arguments that name a file to write: refused before hours of work, not after."""

import argparse
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.files import check_place


def output_file(text: str) -> Path:
    """A path at which a file can be written; folders that are missing before it may be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    try:
        check_place(path)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path
