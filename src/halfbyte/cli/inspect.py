"""`halfbyte inspect DIR` and `halfbyte inspect plan SRC [--recipe R]`."""

import argparse
from pathlib import Path

from halfbyte.errors import UsageError

EXAMPLE = """  halfbyte inspect build/demo/mixed
  halfbyte inspect plan build/demo/fp8 --recipe medium-3.5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="+", metavar="DIR | plan SRC", help="a checkpoint, or `plan` and a source"
    )
    parser.add_argument(
        "--recipe",
        help="plan: a recipe of the library (medium-3.5, fp8, …) or a .yaml file; left out, the "
        "one fitted to the model's depth",
    )
    parser.add_argument(
        "--every-layer", action="store_true", help="plan: one row for every linear of every layer"
    )


def run(args: argparse.Namespace) -> int:
    if args.what[0] == "plan" and len(args.what) == 2:
        return _plan(Path(args.what[1]), args.recipe, args.every_layer)
    if len(args.what) != 1 or args.what == ["plan"]:
        raise UsageError("say `inspect DIR` or `inspect plan SRC [--recipe R]`")
    if args.recipe is not None or args.every_layer:
        raise UsageError("--recipe and --every-layer belong to `inspect plan`")
    return _checkpoint(Path(args.what[0]))


def _plan(source: Path, recipe: str | None, every_layer: bool) -> int:
    from halfbyte.checkpoint.metadata import read_config
    from halfbyte.recipe.fitted import named_or_fitted
    from halfbyte.recipe.plan import format_plan, make_plan

    config, _, _ = read_config(source)
    chosen, said = named_or_fitted(recipe, lambda: config)
    plan = make_plan(chosen, config)
    if said is not None:
        print(f"{said}\n")
    print(format_plan(plan, config, every_layer=every_layer))
    return 0


def _checkpoint(directory: Path) -> int:
    from halfbyte.checkpoint.overview import overview
    from halfbyte.checkpoint.reader import Checkpoint

    print(overview(Checkpoint.open(directory)))
    return 0
