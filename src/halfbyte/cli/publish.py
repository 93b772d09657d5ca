"""`halfbyte publish DIR owner/name`: verify, make the card, show what would go; send it if told."""

import argparse
import tempfile
from pathlib import Path

from halfbyte.cli.card import add_card_arguments, card_input
from halfbyte.errors import UsageError
from halfbyte.files import require_directory

EXAMPLE = """\
  halfbyte publish mixed/ me/Model-NVFP4 --runs evals/fp8 evals/mixed --base-model maker/Model
  halfbyte publish mixed/ me/Model-NVFP4 --upload
Without --upload nothing is sent and no file is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="DIR", help="the checkpoint folder")
    add("repository", metavar="OWNER/NAME", help="where it goes on the hub")
    add("--upload", action="store_true", help="send it, to a repository that begins private")
    add("--public", action="store_true", help="with --upload: public once everything has arrived")
    add(
        "--accept", nargs="+", default=[], metavar="FILE",
        help="files that may go although they hold what looks like a path, a host or a key",
    )  # fmt: skip
    add("--endpoint", metavar="URL", help="another hub than the public one")
    add_card_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.card.publish import pack, send
    from halfbyte.card.render import write_card
    from halfbyte.checkpoint.verify import format_report, verify

    if args.public and not args.upload:
        raise UsageError("--public belongs to --upload: without it nothing is sent")
    require_directory(args.checkpoint)
    report = verify(args.checkpoint)
    if not report.is_sound:
        print(format_report(report))
        return 1
    keeps_card = (args.checkpoint / "README.md").is_file() and not (args.runs or args.records)
    given = card_input(args, args.checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        card = None if keeps_card else Path(scratch)
        if card is not None:
            write_card(card, given)
        parcel = pack(args.checkpoint, card)
        print(f"{args.repository}: {len(parcel.files)} files, {parcel.num_bytes / 1e9:.3f} GB")
        for name, path in parcel.files.items():
            print(f"  {path.stat().st_size:>15,}  {name}")
        print(f"licence: {args.licence}{f' ({args.licence_name})' if args.licence_name else ''}")
        print(f"card: {'README.md as it is' if keeps_card else 'made now'}")
        for name, why in parcel.left_out.items():
            print(f"stays here: {name} ({why})")
        for warning in _warnings(args, given.base is None):
            print(f"warning: {warning}")
        refused = {n: said for n, said in parcel.private.items() if n not in args.accept}
        for name, said in refused.items():
            print(f"not to be published: {name} holds {'; '.join(said[:3])}")
        if not args.upload:
            print("nothing was sent; --upload sends it")
            return 1 if refused else 0
        if refused:
            raise UsageError(
                f"{', '.join(refused)}: nothing was sent; mend them, or say --accept FILE"
            )
        place = send(
            parcel, args.repository, public=args.public, endpoint=args.endpoint,
            say=lambda text: print(text, flush=True),
        )  # fmt: skip
    seen = "public" if args.public else "private; --public makes it public"
    print(f"{place}: all {len(parcel.files)} files arrived, hashes equal ({seen})")
    return 0


def _warnings(args: argparse.Namespace, has_no_base: bool) -> list[str]:
    found = []
    if has_no_base:
        found.append("the base model is not named; --base-model OWNER/NAME")
    if args.licence == "other" and args.licence_name is None:
        found.append("the licence is not named; --licence, or --licence-name and --licence-link")
    if args.contact is None:
        found.append("no contact is given; --contact ADDRESS")
    if not args.runs:
        found.append("no evaluation is given to the card; --runs BASELINE CANDIDATE")
    return found


def kept(args: argparse.Namespace) -> str:
    """A sentence about what publishing leaves when Ctrl-C ends it."""
    if not args.upload:
        return "nothing was sent; give the same command again"
    return f"files that arrived stay in {args.repository}; the same command goes on with the others"
