"""`halfbyte evaluate`: run benchmarks against an endpoint or a checkpoint folder."""

import argparse
import contextlib
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.outputs import add_served_checkpoint
from halfbyte.cli.plan import parse_count, parse_price
from halfbyte.cli.targets import is_folder
from halfbyte.errors import UsageError

if TYPE_CHECKING:  # names only: the hall is imported when the command runs
    from halfbyte.evals.config import RunConfig
    from halfbyte.evals.tasks.benchmark import Benchmark

EXAMPLE = """\
  halfbyte evaluate http://127.0.0.1:8000 --suite quick
  halfbyte evaluate pocket/model --suite pocket --items 1000 --seed 7
  halfbyte evaluate mixed/ --suite seed --data items/ --judge http://judge:8000 --judge-model qwen
  halfbyte evaluate plan --suite seed --throughput 8000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", nargs="?", help="address of an OpenAI-compatible server, or a checkpoint folder")
    add(
        "--suite",
        nargs="+",
        default=["quick"],
        metavar="NAME",
        help="'seed', 'decide' (the same, asked often enough to end GO), 'pocket' (seven kinds of "
        "generated items for the repository's own small model), or benchmarks such as bfcl, tool "
        "calls (default: quick, 40 small questions)",
    )
    add("--out", type=Path, help="run folder (default: evals/ARM); an existing run is resumed")
    add("--arm", help="name of this side of a comparison (default: that of --out)")
    add_served_checkpoint(parser)
    _add_items(parser)
    _add_requests(parser)
    _add_grading(parser)
    _add_plan(parser)


def _add_items(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--repeats", type=parse_count, help="answers per item (default: each benchmark's own)")
    add(
        "--seed-shift",
        type=int,
        default=0,
        metavar="N",
        help="draw other seeds: for a baseline against itself, or fresh repeats (%(default)s)",
    )
    add("--limit", type=parse_count, help="at most so many items of each benchmark, evenly spread")
    add(
        "--items",
        type=parse_count,
        metavar="N",
        help="items that are made of each generated benchmark (default: 200)",
    )
    add(
        "--seed",
        type=parse_seed,
        default=0,
        metavar="N",
        help="from which generated items are made: another number, other items (%(default)s)",
    )
    add("--data", type=Path, help="folder with benchmark items; see docs/evaluations.md")


def _add_requests(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--temperature", type=float, help="(default: 0.7; of the suite pocket 0)")
    add("--top-p", type=float, help="(default: 0.95; of the suite pocket 1)")
    add("--reasoning-effort", default="high", help="(%(default)s); '' sends none")
    add(
        "--max-tokens",
        type=parse_count,
        help="output limit of one answer (default: 65536; of the suite pocket 512)",
    )
    add(
        "--concurrency", type=parse_count, help="requests in flight (default: each benchmark's own)"
    )
    add("--retries", type=int, default=6, help="after a fault of the server (%(default)s)")


def _add_grading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--judge", metavar="ENDPOINT", help="server of the judge (AA-LCR)")
    add("--judge-model", help="the judge's name as served; pin its revision with --judge-revision")
    add("--judge-revision", default="not stated", help="which weights it has, for the record")
    add("--code-python", metavar="PATH", help="interpreter for generated code (SciCode)")
    add("--code-wall-s", type=float, default=1800.0, help="limit of one step's tests (%(default)s)")
    add("--skip-unscorable", action="store_true", help="leave out items no grader here can score")
    add("--allow-missing", action="store_true", help="record absent benchmarks as not measured")
    add("--partial", action="store_true", help="print scores although attempts are missing")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plan", action="store_true", help="say what a run can detect and costs; run nothing")
    add(
        "--throughput",
        type=float,
        default=5_000.0,
        help="output tokens/s, for --plan (%(default)s)",
    )
    add(
        "--price-per-hour",
        type=parse_price,
        metavar="PRICE",
        help="of all GPUs that make --throughput; --plan then tells what an arm costs",
    )
    add("--prompt-throughput", type=float, help="prompt tokens/s, for --plan (default: no time)")
    add(
        "--loss",
        type=float,
        nargs="+",
        metavar="POINTS",
        help="true losses whose verdicts --plan foretells (default: 0 0.5 1 2)",
    )
    add("--pilot", type=Path, help="a run whose measured variances and lengths --plan uses")


def parse_seed(text: str) -> int:
    """A whole number from 0 on; argparse shows the error."""
    if not text.isascii() or not text.isdigit() or int(text) >= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999999999")
    return int(text)


def run(args: argparse.Namespace) -> int:
    # The hall is imported when the command runs, so that --help is quick.
    from halfbyte.evals.judging.render import format_run
    from halfbyte.evals.records import is_name, lock_run
    from halfbyte.evals.running.endpoint import (
        connect,
        describe_checkpoint,
        describe_served,
        read_key,
        serve,
    )
    from halfbyte.evals.running.evaluate import default_arm, evaluate, prepare, require_extra
    from halfbyte.evals.tasks.suite import find_benchmarks

    benchmarks = find_benchmarks(args.suite, args.items)
    # `evaluate plan` reads as what it does; a server of that name can be given as http://plan.
    if args.plan or args.target == "plan":
        return _print_plan(args, benchmarks)
    if args.target is None:
        raise UsageError(
            "there is nothing to evaluate; give an endpoint or a checkpoint folder (or --plan)"
        )
    folder = Path(args.target)
    has_server = not is_folder(args.target)
    require_extra()
    named_by = args.out.resolve().name if args.out else default_arm(args.target)
    arm = named_by if args.arm is None else args.arm
    if not is_name(arm):
        raise UsageError(
            f"--arm {arm!r}: an arm is named by 1 to 100 printable characters without / and \\; "
            "the run's folder is what --out says"
        )
    out = args.out or Path("evals") / arm
    key = read_key(args.api_key_env)
    endpoint = connect(args.target, args.model, key) if has_server else None
    config = _config(args, arm, out, benchmarks, key)
    prepared = prepare(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_run(out))  # before a server is started
        if endpoint is None:
            checkpoint = describe_checkpoint(folder)
            url = stack.enter_context(serve(folder, out / "server.log"))
            endpoint = connect(url, args.model, key, take_first=True)
        else:
            checkpoint = describe_served(endpoint, args.checkpoint)
        command = shlex.join(["halfbyte", *sys.argv[1:]])
        result = evaluate(config, endpoint, checkpoint, command, prepared)
    print(format_run(result, out / "run.json"))
    return 0 if all(b.status != "incomplete" for b in result.benchmarks.values()) else 1


def _print_plan(args: argparse.Namespace, benchmarks: "tuple[Benchmark, ...]") -> int:
    from halfbyte.evals.judging.plan import LOSSES, format_eval_plan, plan_run

    plan = plan_run(
        benchmarks,
        args.repeats,
        args.limit,
        args.throughput,
        args.pilot,
        prompt_throughput=args.prompt_throughput,
    )
    losses = LOSSES if args.loss is None else [points / 100 for points in args.loss]
    with_prompts = args.prompt_throughput is not None
    print(
        format_eval_plan(
            plan, with_prompts=with_prompts, losses=losses, price_per_hour=args.price_per_hour
        )
    )
    return 0


def _config(
    args: argparse.Namespace,
    arm: str,
    out: Path,
    benchmarks: "tuple[Benchmark, ...]",
    key: str,
) -> "RunConfig":
    from halfbyte.evals.config import JudgeConfig, RunConfig, sampling_of
    from halfbyte.evals.running.endpoint import connect
    from halfbyte.evals.sandbox import SandboxLimits
    from halfbyte.evals.tasks.benchmark import Options

    judge = None
    if args.judge is not None:
        served = connect(args.judge, args.judge_model, key)
        judge = JudgeConfig(served.url, served.model, args.judge_revision, key)
    given = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
    }
    named = {name: value for name, value in given.items() if value is not None}
    sampling = replace(
        sampling_of(benchmarks), reasoning_effort=args.reasoning_effort or None, **named
    )
    return RunConfig(
        out=out,
        arm=arm,
        benchmarks=benchmarks,
        sampling=sampling,
        options=Options(
            args.data, args.limit, args.skip_unscorable, items=args.items, item_seed=args.seed
        ),
        repeats=args.repeats,
        concurrency=args.concurrency,
        retries=args.retries,
        judge=judge,
        code_python=args.code_python,
        code_limits=SandboxLimits(wall_s=args.code_wall_s),
        partial=args.partial,
        allow_missing=args.allow_missing,
        api_key=key,
        seed_shift=args.seed_shift,
    )


def kept(args: argparse.Namespace) -> str:
    """A sentence about what an evaluation leaves when Ctrl-C ends it."""
    from halfbyte.evals.running.evaluate import default_arm

    if args.plan or args.target in (None, "plan"):
        return "nothing is kept of a plan; give the same command again"
    out = args.out or Path("evals") / (args.arm or default_arm(args.target))
    if not (out / "run.json").exists():
        return "no answer had arrived and nothing is kept; give the same command again"
    return f"answers that arrived are kept in {out}; the same command goes on with the others"
