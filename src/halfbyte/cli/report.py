"""`halfbyte report`: one HTML page from evaluation records."""

import argparse
from pathlib import Path

from halfbyte.cli.compare_evals import add_verdict_arguments, verdict_options
from halfbyte.cli.outputs import output_file

EXAMPLE = """\
  halfbyte report evals/mixed
  halfbyte report evals/fp8 evals/mixed --out report.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="one run, or baseline and candidate"
    )
    parser.add_argument(
        "--out", type=output_file, default=Path("report.html"), help="(%(default)s)"
    )
    add_verdict_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.card.facts import compare_arms, read_arm
    from halfbyte.card.report import render_report

    arms = [read_arm(folder) for folder in args.runs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    comparison = compare_arms(arms, **verdict_options(args))
    args.out.write_text(render_report(arms, comparison), encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    return 0
