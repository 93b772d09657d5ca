"""`halfbyte bench engine`: the whole decoder on one GPU, synthetic weights, one record."""

import argparse

from halfbyte.cli.outputs import output_file
from halfbyte.errors import UsageError

EXAMPLE = "  halfbyte bench engine --geometry medium-3.5 --layers 88 --weights synthetic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", choices=["medium-3.5"], default="medium-3.5")
    parser.add_argument("--layers", type=int, default=88, help="decoder layers to build")
    parser.add_argument("--weights", choices=["synthetic"], default="synthetic")
    parser.add_argument("--record", type=output_file, help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    from halfbyte.bench.engine_bench import run_engine
    from halfbyte.bench.gpu import engine_figures, results_and_samples
    from halfbyte.bench.record import own_command, write

    if args.layers < 6:
        raise UsageError(f"--layers {args.layers}: the mixed format needs at least 6")
    ceilings, rows = run_engine(args.layers)
    if args.record is not None:
        config = {"geometry": args.geometry, "layers": args.layers, "weights": args.weights}
        results, samples = results_and_samples(ceilings, config, rows)
        write(
            args.record,
            name=args.record.stem,
            question="How fast does the whole decoder run on one GPU, "
            "and what share of its floor is that?",
            command=own_command(),
            figures=engine_figures(results),
            results=results,
            samples=samples,
        )
    return 0
