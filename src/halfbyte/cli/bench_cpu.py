"""`halfbyte bench cpu DIR --base BF16DIR`."""

import argparse
from pathlib import Path

from halfbyte.cli.outputs import add_benchmark_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="the checkpoint to measure")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="the bf16 one, for transformers too"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="measure llama.cpp on this file")
    add_benchmark_options(parser, "cpu_decode")


def run(args: argparse.Namespace) -> int:
    # Imported here so that --help needs no torch.
    from halfbyte.bench.cpu_decode import measure, write_record
    from halfbyte.bench.record import own_command

    report = measure(
        args.directory,
        args.base,
        gguf=args.gguf,
        threads=args.threads,
        repeats=args.repeats,
        wait_s=args.wait,
        force=args.force,
    )
    print(report.table())
    write_record(report, args.record, own_command(), args.directory)
    print(f"recorded in {args.record}")
    return 0
