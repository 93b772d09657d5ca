"""Arguments that several commands have; files to write are refused before hours of work."""

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


def add_served_checkpoint(parser: argparse._ActionsContainer) -> None:
    """Add what tells a server at an address apart: its folder, its model, its key."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="the folder that a server at an address serves, where it does not say: a card takes "
        "only records of its own checkpoint",
    )
    parser.add_argument("--model", help="model name, where the server has several")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the API key"
    )


def add_benchmark_options(parser: argparse.ArgumentParser, record: str) -> None:
    """Add what benchmarks of this machine share; `record` names the record of a measurement."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="wait so long for an idle machine"
    )
    parser.add_argument("--force", action="store_true", help="measure on a busy machine, too")
    parser.add_argument(
        "--record",
        type=output_file,
        metavar="FILE",
        default=Path(f"benchmarks/records/{record}.json"),
    )
