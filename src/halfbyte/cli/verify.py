"""`halfbyte verify OUT [--against SRC]`: exit code 0 if sound, 1 if not."""

import argparse
import shlex
from pathlib import Path

from halfbyte.files import require_directory
from halfbyte.progress import TimeLeft, say_next

EXAMPLE = "  halfbyte verify build/demo/mixed --against build/demo/fp8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="the directory to verify")
    parser.add_argument(
        "--against", type=Path, metavar="SRC", help="its source: compare every tensor with it"
    )


def run(args: argparse.Namespace) -> int:
    from halfbyte.checkpoint.verify import format_report, verify

    require_directory(args.checkpoint)
    report = verify(args.checkpoint, args.against, progress=TimeLeft("tensors"))
    print(format_report(report))
    if not report.is_sound:
        return 1
    say_next(f"halfbyte serve {shlex.quote(str(args.checkpoint))}")
    return 0
