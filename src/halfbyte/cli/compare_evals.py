"""`halfbyte compare-evals`: paired comparison of two evaluation runs."""

import argparse
from pathlib import Path
from typing import Any

from halfbyte.cli.outputs import output_file

EXAMPLE = """\
  halfbyte compare-evals evals/fp8 evals/mixed --out evals/fp8-mixed.json
  halfbyte compare-evals evals/fp8 evals/mixed --margins margins.yaml
  halfbyte compare-evals evals/fp8-more evals/mixed-more --after evals/fp8-mixed.json
The exit code is 0 for GO, 1 for NO-GO, 3 for INCONCLUSIVE."""

_EXIT = {"GO": 0, "NO-GO": 1, "INCONCLUSIVE": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", type=Path, help="run folder of the baseline, such as FP8")
    parser.add_argument("candidate", type=Path, help="run folder of the candidate")
    parser.add_argument("--out", type=output_file, help="write the comparison as JSON")
    add_verdict_arguments(parser)


def add_verdict_arguments(parser: argparse.ArgumentParser) -> None:
    """What a verdict depends on besides the runs; report and card take the same."""
    parser.add_argument(
        "--margins", type=Path, metavar="FILE",
        help="YAML of NAME: POINTS, the largest loss that is still no regression; write it before "
        "running ('macro' is the mean's)",
    )  # fmt: skip
    parser.add_argument(
        "--margin", action="append", default=[], metavar="NAME=POINTS",
        help="one margin; the record says that it came with the comparison",
    )  # fmt: skip
    parser.add_argument(
        "--looks", type=int, default=1, metavar="N",
        help="looks at these arms that are planned in all; they share the 5 %% (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--after", type=Path, metavar="FILE",
        help="this is a further look: JSON of the comparison before it",
    )  # fmt: skip


def verdict_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of a verdict as arguments that `compare_runs` takes."""
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.evals.judging.looks import parse_margins

    margins = parse_margins(args.margin, args.margins)
    return {"margins": margins, "looks": args.looks, "after": args.after}


def run(args: argparse.Namespace) -> int:
    from halfbyte.evals.judging.compare import compare_runs
    from halfbyte.evals.judging.comparison import write_comparison
    from halfbyte.evals.judging.render import format_comparison

    comparison = compare_runs(args.baseline, args.candidate, **verdict_options(args))
    if args.out is not None:
        write_comparison(args.out, comparison)
    print(format_comparison(comparison))
    return _EXIT[comparison.verdict]
