"""`halfbyte report`: one HTML page from records, of evaluations or of `halfbyte compare`."""

import argparse
from pathlib import Path

from halfbyte.cli.compare_evals import add_verdict_arguments, verdict_options
from halfbyte.cli.outputs import output_file

EXAMPLE = """\
  halfbyte report evals/mixed
  halfbyte report evals/fp8 evals/mixed --out report.html
  halfbyte report near.json --out near.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="one run, or baseline and candidate; or a file of halfbyte compare --json",
    )
    parser.add_argument(
        "--out", type=output_file, default=Path("report.html"), help="(%(default)s)"
    )
    add_verdict_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.card.facts import compare_arms, read_arm, read_figures
    from halfbyte.card.fidelity import render_fidelity
    from halfbyte.card.report import render_report

    if len(args.runs) == 1 and args.runs[0].is_file():
        ((name, record),) = read_figures(args.runs).items()
        return _write(args.out, render_fidelity(record, name))
    arms = [read_arm(folder) for folder in args.runs]
    return _write(args.out, render_report(arms, compare_arms(arms, **verdict_options(args))))


def _write(path: Path, page: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0
