"""AIME 2025: 30 contest problems, integer answers 0..999; zero-shot, boxed answer.

Set: math-ai/aime25 (mirrors are marked MIT or Apache; the text is (c) Mathematical Association of
America, so no item is part of this repository). Compared as integers, the rest by math-verify; no
judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evals.grading.numbers import grade_number, read_integer
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.data import HubSet, load_rows
from halfbyte.evals.tasks.published import compared, content_hash
from halfbyte.evals.types import Prompt, Sample, Score, Text

_HUB = HubSet("math-ai/aime25", "test", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b")

# Mirrors differ in column names.
_NAMES = (("problem", "question"), ("answer", "expected_answer"))

PROMPT = """\
Solve the following math problem step by step. Put your final answer inside \\boxed{{}}.

{problem}

Remember to put your final answer inside \\boxed{{}}."""


def load(options: Options) -> LoadedItems:
    rows = load_rows(
        "AIME 2025",
        options.data,
        patterns=("aime2025/*.jsonl", "aime25/*.jsonl", "aime25/*.parquet"),
        hub=_HUB,
        how="The text is copyrighted: fetch math-ai/aime25 from the hub, or put a copy as "
        "aime2025/problems.jsonl (problem, answer) below --data.",
    )
    for number, row in enumerate(rows.rows, 1):
        for names in _NAMES:
            if not any(name in row for name in names):
                raise UsageError(f"AIME 2025: item {number} has no {' or '.join(names)} column")
    chosen = spread_indices(len(rows.rows), options.limit)
    samples = tuple(_sample(i, rows.rows[i]) for i in chosen)
    hashes = [content(row) for row in rows.rows]
    return LoadedItems(samples, compared(rows.provenance, BENCHMARK.name, hashes))


def content(row: Mapping[str, Any]) -> str:
    """A hash by which an item is recognised, whoever published it."""
    problem, answer = _columns(row)
    return content_hash(problem, _gold("", answer))


def _columns(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Problem and answer. Mirrors also differ in whether the answer is text."""
    answer = row["answer"] if "answer" in row else row["expected_answer"]
    return row["problem"] if "problem" in row else row["question"], answer


def _sample(index: int, row: Mapping[str, Any]) -> Sample:
    problem, answer = _columns(row)
    item_id = str(row.get("id", index))
    half = "AIME I" if index < 15 else "AIME II"
    return Sample(item_id, item_id, half, str(_gold(item_id, answer)), {"problem": problem})


def _gold(item_id: str, answer: object) -> int:
    """The right integer; mirrors write it as a number, as text, in dollars, with a degree sign."""
    is_written = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    gold = read_integer(str(answer)) if is_written else None
    if gold is None:
        raise UsageError(
            f"AIME 2025: the answer of item {item_id} is {str(answer)[:60]!r}, which is "
            "not an integer; every answer of the contest is one from 0 to 999"
        )
    return gold


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    return (Text(PROMPT.format(problem=sample.fields["problem"])),)


def grade(sample: Sample, text: str) -> Score:
    return grade_number(int(sample.gold), text)


BENCHMARK = Benchmark(
    name="aime2025",
    title="AIME 2025",
    kind="answer",
    load=load,
    prompt=prompt,
    grade=grade,
    prompt_id="aime/aa/1",
    scorer="integer equality, else math-verify",
    source="math-ai/aime25, test",
    licence="text (c) Mathematical Association of America",
    full_items=30,
    repeats=32,
    margin=0.015,
    plan_variance=0.047,
    plan_prompt_tokens=200,
    plan_output_tokens=18_000,
    needs_algebra=True,
)
