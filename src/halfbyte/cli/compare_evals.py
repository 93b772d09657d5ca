"""`halfbyte compare-evals`: paired comparison of two evaluation runs."""

import argparse
from pathlib import Path

from halfbyte.errors import UsageError

EXAMPLE = """\
  halfbyte compare-evals evals/fp8 evals/mixed --out evals/fp8-mixed.json
  halfbyte compare-evals evals/fp8 evals/mixed --margin gpqa_diamond=1.0
The exit code is 0 for GO, 1 for NO-GO, 3 for INCONCLUSIVE."""

_EXIT = {"GO": 0, "NO-GO": 1, "INCONCLUSIVE": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", type=Path, help="run folder of the baseline, such as FP8")
    parser.add_argument("candidate", type=Path, help="run folder of the candidate")
    parser.add_argument("--out", type=Path, help="write the comparison as JSON")
    parser.add_argument(
        "--margin", action="append", default=[], metavar="NAME=POINTS",
        help="largest loss, in points, that is still no regression; fix it before running",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.evals.compare import compare_runs, write_comparison
    from halfbyte.evals.render import format_comparison

    comparison = compare_runs(args.baseline, args.candidate, dict(map(_margin, args.margin)))
    if args.out is not None:
        write_comparison(args.out, comparison)
    print(format_comparison(comparison))
    return _EXIT[comparison.verdict]


def _margin(text: str) -> tuple[str, float]:
    name, _, points = text.partition("=")
    try:
        return name, float(points) / 100
    except ValueError:
        raise UsageError(f"--margin {text}: expected NAME=POINTS, such as ifbench=1.0") from None
