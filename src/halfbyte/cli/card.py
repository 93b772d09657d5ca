"""`halfbyte card`: a model card from a checkpoint and the records about it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.compare_evals import add_verdict_arguments, verdict_options
from halfbyte.errors import UsageError

if TYPE_CHECKING:  # names only: the hall is imported when the command runs
    from halfbyte.card.given import CardInput

EXAMPLE = """\
  halfbyte card mixed/ --runs evals/fp8 evals/mixed --base-model mistralai/Some-Model
  halfbyte card out/ --checkpoint mixed/ --runs evals/fp8 evals/mixed --records speed.json
OUT/README.md is the card; the records that it links to are copied to OUT/evaluation/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, help="folder of the card; the checkpoint's own makes it its README.md")
    add("--checkpoint", type=Path, help="checkpoint folder (default: OUT)")
    add("--repository", metavar="ORG/NAME", help="where it will stand on the hub, for links")
    add_card_arguments(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say what a card is made of; `publish` has them, too."""
    add = parser.add_argument
    add("--runs", type=Path, nargs="+", default=[], help="one run, or baseline and candidate")
    add(
        "--records", type=Path, nargs="+", default=[],
        help="records of halfbyte bench, and of halfbyte compare --json",
    )  # fmt: skip
    add("--base-model", help="hub id of the base model (default: the manifest's, if it knows one)")
    add(
        "--base-checkpoint",
        type=Path,
        metavar="DIR",
        help="a copy of the base model: its configuration must be the one that was quantized",
    )
    add("--title", help="name of the model (default: the checkpoint folder's)")
    add("--licence", default="other", help="licence identifier of the hub (%(default)s)")
    add("--licence-name", help="its name, for 'other', such as modified-mit")
    add("--licence-link", help="where the licence stands, for 'other' (default: its LICENSE file)")
    add("--languages", nargs="+", default=[], metavar="CODE", help="of the base model: en fr de")
    add("--contact", help="an address for questions and concerns")
    add("--release-date", help="as it should be printed")
    add_verdict_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.card.render import write_card

    card = write_card(args.out, card_input(args, args.checkpoint or args.out))
    print(f"{card}: {card.stat().st_size:,} bytes")
    return 0


def card_input(args: argparse.Namespace, checkpoint: Path) -> "CardInput":
    """What the flags say; `publish` has the same."""
    from halfbyte.card.base import HUB_ID, find_base
    from halfbyte.card.facts import compare_arms, read_arm, read_checkpoint, read_figures
    from halfbyte.card.given import CardInput
    from halfbyte.card.languages import is_language

    if args.repository is not None and not HUB_ID.fullmatch(args.repository):
        raise UsageError(f"--repository {args.repository!r}: owner/name was expected")
    for code in args.languages:
        if not is_language(code):
            raise UsageError(
                f"--languages {code}: no language has this code of ISO 639; English has en"
            )
    arms = [read_arm(folder) for folder in args.runs]
    facts = read_checkpoint(checkpoint)
    return CardInput(
        checkpoint=facts,
        arms=arms,
        comparison=compare_arms(arms, **verdict_options(args)) if arms else None,
        base=find_base(facts, args.base_model, args.base_checkpoint),
        title=args.title,
        licence=args.licence,
        licence_name=args.licence_name,
        licence_link=args.licence_link,
        languages=args.languages,
        contact=args.contact,
        release_date=args.release_date,
        repository=args.repository,
        figures=read_figures(args.records),
    )
