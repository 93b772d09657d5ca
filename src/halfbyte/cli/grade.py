"""`halfbyte grade`: grade recorded attempts again, without asking the model."""

import argparse
import contextlib
from pathlib import Path

EXAMPLE = """\
  halfbyte grade evals/mixed
  halfbyte grade evals/mixed --data items/ --code-python code/bin/python"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder that `halfbyte evaluate` wrote")
    parser.add_argument("--data", type=Path, help="the --data of the run")
    parser.add_argument("--code-python", metavar="PATH", help="interpreter for generated code")
    parser.add_argument("--code-wall-s", type=float, default=1800.0)


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    import asyncio
    import datetime
    import os

    from halfbyte.evals.judging.render import format_run
    from halfbyte.evals.records import lock_run
    from halfbyte.evals.running.regrade import changed_grades, regrade
    from halfbyte.evals.sandbox import SandboxLimits, interpreter
    from halfbyte.evals.score import CodeRunner

    code = None
    if args.code_python is not None:
        slots = asyncio.Semaphore(os.cpu_count() or 1)
        limits = SandboxLimits(wall_s=args.code_wall_s)
        code = CodeRunner(interpreter(args.code_python), limits, slots)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with lock_run(args.run) if args.run.is_dir() else contextlib.nullcontext():
        result, file = regrade(args.run, data=args.data, code=code, judge=None, finished=now)
    print(format_run(result, file))
    suffix = file.name.removeprefix("run.").removesuffix(".json")
    for name in result.benchmarks:
        graded = args.run / name / f"samples.{suffix}.jsonl"
        if graded.exists():
            changed = changed_grades(args.run, name, graded)
            print(f"{name}: {len(changed)} grades changed", *changed[:20], sep="\n  ")
    return 0


def kept(args: argparse.Namespace) -> str:
    """A sentence about what grading leaves when Ctrl-C ends it."""
    return f"the answers in {args.run} are as they were; give the same command to grade them again"
