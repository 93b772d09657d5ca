"""`halfbyte demo`: the whole story on a small real model."""

import argparse
from pathlib import Path

from halfbyte.cli.outputs import output_file

EXAMPLE = "  halfbyte demo --out build/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="where everything goes (%(default)s)"
    )
    parser.add_argument(
        "--record", type=output_file, help="also write the run as a benchmark record to this file"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (all cores, 2 at least)")


def run(args: argparse.Namespace) -> int:
    from halfbyte.cli.demo_steps import run_demo

    run_demo(args.out, record=args.record, threads=args.threads)
    return 0


def kept(args: argparse.Namespace) -> str:
    """A sentence about what a demo leaves when Ctrl-C ends it."""
    return f"{args.out} holds an unfinished demo; the same command replaces it"
