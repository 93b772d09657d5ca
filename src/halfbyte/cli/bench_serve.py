"""`halfbyte bench serve DIR`."""

import argparse
import tempfile
from pathlib import Path

from halfbyte.cli.outputs import output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="the checkpoint to serve")
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
        default=Path("benchmarks/records/serving.json"),
    )


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
