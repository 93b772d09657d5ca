"""`halfbyte bench serve DIR`."""

import argparse
import tempfile
from pathlib import Path

from halfbyte.cli.outputs import add_benchmark_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="the checkpoint to serve")
    add_benchmark_options(parser, "serving")


def run(args: argparse.Namespace) -> int:
    # Imported here so that --help needs no torch.
    from halfbyte.bench.record import own_command
    from halfbyte.bench.serving import ServingSizes, measure, write_record

    with tempfile.TemporaryDirectory() as scratch:
        report = measure(
            args.directory,
            Path(scratch),
            sizes=ServingSizes(repeats=args.repeats),
            threads=args.threads,
            wait_s=args.wait,
            force=args.force,
        )
    print(report.table())
    write_record(report, args.record, own_command(), args.directory)
    print(f"recorded in {args.record}")
    return 0
