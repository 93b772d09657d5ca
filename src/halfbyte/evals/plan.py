"""Before a run: which difference it could show, and what it would cost.

Uses planning values, or those that a pilot run measured. Source of the formulas:
../shared/reference/evaluations.md section 8, E. Miller arXiv 2411.00640.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.evals.records import read_run
from halfbyte.evals.render import percent, table
from halfbyte.evals.stats import detectable_drop, repeats_to_see
from halfbyte.evals.tasks.benchmark import Benchmark


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One benchmark of a planned comparison; drops in scores (0.01 = one point), costs per arm."""

    title: str
    items: int
    repeats: int
    is_measured: bool
    standard_error: float
    detectable: float
    margin: float
    repeats_for_margin: int
    prompt_tokens: float
    output_tokens: float
    hours: float


def plan_run(
    benchmarks: Sequence[Benchmark],
    repeats: int | None,
    limit: int | None,
    throughput: float,
    pilot: Path | None,
    prompt_throughput: float | None = None,
) -> list[PlanLine]:
    """A line per benchmark.

    throughput         output tokens per second, all requests together
    prompt_throughput  prompt tokens per second; None: prompts take no time
    pilot              folder of a run whose variances and lengths are used instead

    Raises UsageError for a rate that is not positive.
    """
    for rate in (throughput, prompt_throughput):
        if rate is not None and rate <= 0:
            raise UsageError(
                f"a throughput of {rate:g} tokens/s plans nothing; give a positive one"
            )
    measured = read_run(pilot).benchmarks if pilot is not None else {}
    lines = []
    for benchmark in benchmarks:
        items = min(benchmark.full_items, limit or benchmark.full_items)
        count = repeats or benchmark.repeats
        variance, prompt, output = (
            benchmark.plan_variance, benchmark.plan_prompt_tokens, benchmark.plan_output_tokens
        )  # fmt: skip
        result = measured.get(benchmark.name)
        attempts = result.items * result.repeats if result else 0
        is_measured = bool(result and attempts and "item_variance" in result.metrics)
        if result and is_measured:
            variance = result.metrics["item_variance"]
            prompt, output = result.prompt_tokens // attempts, result.completion_tokens // attempts
        requests = items * count
        lines.append(
            PlanLine(
                title=benchmark.title,
                items=items,
                repeats=count,
                is_measured=is_measured,
                standard_error=math.sqrt(2 * variance / requests),
                detectable=detectable_drop(items, count, variance),
                margin=benchmark.margin,
                repeats_for_margin=repeats_to_see(benchmark.margin, items, variance),
                prompt_tokens=prompt * requests,
                output_tokens=output * requests,
                hours=(
                    output / throughput + (prompt / prompt_throughput if prompt_throughput else 0.0)
                )
                * requests
                / 3600,
            )
        )
    return lines


def format_plan(lines: Sequence[PlanLine], *, with_prompts: bool = False) -> str:
    """The plan as a table, points and hours per arm; `with_prompts`: hours count those too."""
    head = [
        "benchmark", "items", "repeats", "SE of D", "drop seen", "margin", "repeats for it",
        "prompt Mtok", "output Mtok", "hours", "values",
    ]  # fmt: skip
    rows = [head]
    for line in lines:
        rows.append(
            [
                line.title, str(line.items), str(line.repeats), percent(line.standard_error),
                percent(line.detectable), percent(line.margin, 1), str(line.repeats_for_margin),
                f"{line.prompt_tokens / 1e6:.1f}", f"{line.output_tokens / 1e6:.1f}",
                f"{line.hours:.2f}", "pilot" if line.is_measured else "planning",
            ]
        )  # fmt: skip
    output = sum(line.output_tokens for line in lines) / 1e6
    hours = sum(line.hours for line in lines)
    macro = math.sqrt(sum(line.standard_error**2 for line in lines)) / len(lines)
    return "\n".join(
        [
            table(rows),
            f"all: {output:.1f} M output tokens and {hours:.2f} hours per arm; "
            f"SE of the macro difference {percent(macro)} points",
            "drop seen: the smallest true loss, in points, that a comparison shows four times out "
            "of five; groups (documents, problems) make it larger",
            "hours: output tokens at the given throughput"
            + (
                ", and prompts at theirs"
                if with_prompts
                else "; reading prompts comes on top (--prompt-throughput counts it)"
            ),
        ]
    )
