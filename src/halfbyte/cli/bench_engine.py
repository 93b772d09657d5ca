"""`halfbyte bench engine`: the whole decoder on one GPU, synthetic weights, one record."""

import argparse

from halfbyte.cli.outputs import output_file
from halfbyte.errors import UsageError

EXAMPLE = """  halfbyte bench engine --geometry medium-3.5 --layers 88 --weights synthetic
  halfbyte bench engine --recipe nvfp4-everywhere --head nvfp4 --products exact"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", choices=["medium-3.5"], default="medium-3.5")
    parser.add_argument("--layers", type=int, default=88, help="decoder layers to build")
    parser.add_argument("--weights", choices=["synthetic"], default="synthetic")
    parser.add_argument(
        "--recipe",
        default="medium-3.5",
        help="formats of the linears: a recipe of the library or a YAML file (%(default)s)",
    )
    parser.add_argument(
        "--head",
        choices=["bf16", "fp8", "nvfp4"],
        help="format of the output head (as the recipe says)",
    )
    parser.add_argument(
        "--fp8-activations",
        choices=["static", "per-token"],
        default="static",
        help="by what FP8 linears round activations (%(default)s)",
    )
    parser.add_argument(
        "--products",
        choices=["exact", "fast", "both"],
        default="both",
        help="how NVFP4 linears multiply (%(default)s, one after the other)",
    )
    parser.add_argument("--record", type=output_file, help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    from halfbyte.bench.engine_bench import PRODUCTS, Build, run_engine
    from halfbyte.bench.gpu import engine_figures, results_and_samples
    from halfbyte.bench.record import own_command, write

    if args.layers < 6:
        raise UsageError(f"--layers {args.layers}: the mixed format needs at least 6")
    is_per_token = args.fp8_activations == "per-token"
    build = Build(args.layers, args.recipe, args.head, is_per_token)
    ceilings, rows = run_engine(build, PRODUCTS[args.products])
    if args.record is not None:
        config = {"geometry": args.geometry, "layers": args.layers, "weights": args.weights}
        asked = {
            "recipe": (args.recipe, "medium-3.5"),
            "head": (args.head, None),
            "FP8 activations": (args.fp8_activations, "static"),
        }
        config |= {key: said for key, (said, usual) in asked.items() if said != usual}
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
