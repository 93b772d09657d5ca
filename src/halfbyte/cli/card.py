"""`halfbyte card`: a model card from a checkpoint and the records about it."""

import argparse
from pathlib import Path

from halfbyte.cli.compare_evals import add_verdict_arguments, verdict_options

EXAMPLE = """\
  halfbyte card mixed/ --runs evals/fp8 evals/mixed --base-model mistralai/Some-Model
  halfbyte card out/ --checkpoint mixed/ --runs evals/fp8 evals/mixed --records speed.json
OUT/README.md is the card; the records that it links to are copied to OUT/evaluation/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, help="folder of the card; the checkpoint's own makes it its README.md")
    add("--checkpoint", type=Path, help="checkpoint folder (default: OUT)")
    add("--runs", type=Path, nargs="+", default=[], help="one run, or baseline and candidate")
    add(
        "--records", type=Path, nargs="+", default=[],
        help="records of halfbyte bench, and of halfbyte compare --json",
    )  # fmt: skip
    add("--repository", metavar="ORG/NAME", help="where it will stand on the hub, for links")
    add("--base-model", help="hub id of the base model")
    add("--title", help="name of the model (default: the checkpoint folder's)")
    add("--licence", default="other", help="licence identifier of the hub (%(default)s)")
    add("--licence-link", help="where the licence stands, for 'other'")
    add("--release-date", help="as it should be printed")
    add_verdict_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.card.facts import compare_arms, read_arm, read_checkpoint, read_figures
    from halfbyte.card.render import CardInput, write_card

    arms = [read_arm(folder) for folder in args.runs]
    card = write_card(
        args.out,
        CardInput(
            checkpoint=read_checkpoint(args.checkpoint or args.out),
            arms=arms,
            comparison=compare_arms(arms, **verdict_options(args)) if arms else None,
            base_model=args.base_model,
            title=args.title,
            licence=args.licence,
            licence_link=args.licence_link,
            release_date=args.release_date,
            repository=args.repository,
            figures=read_figures(args.records),
        ),
    )
    print(f"{card}: {card.stat().st_size:,} bytes")
    return 0
