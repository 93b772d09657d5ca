"""Quick: 40 small questions of our own, shipped with the package; works without any download.

For trying the tools and for a first look at a tiny model. It is no benchmark: nobody else uses it
and its items are easy.
"""

import json
from collections.abc import Sequence
from importlib import resources

from halfbyte.evals.grading.letters import grade_letter
from halfbyte.evals.grading.numbers import grade_number
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.choices import LETTERS, choice_prompt
from halfbyte.evals.tasks.data import Provenance, rows_sha256
from halfbyte.evals.types import Prompt, Sample, Score, Text


def load(options: Options) -> LoadedItems:
    text = resources.files("halfbyte.evals.tasks").joinpath("quick.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    samples = tuple(
        Sample(row["id"], row["id"], row["topic"], str(row["answer"]), row)
        for row in (rows[i] for i in spread_indices(len(rows), options.limit))
    )
    return LoadedItems(samples, Provenance("halfbyte quick", "1", {"rows": rows_sha256(rows)}))


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    choices = sample.fields.get("options")
    if choices:
        return (Text(choice_prompt(sample.fields["question"], choices, "aa")),)
    question = sample.fields["question"]
    return (Text(f"{question}\n\nGive only the final number, as \\boxed{{number}}."),)


def grade(sample: Sample, text: str) -> Score:
    choices = sample.fields.get("options")
    if choices:
        return grade_letter(sample.gold, LETTERS[: len(choices)], text)
    return grade_number(int(sample.gold), text)


BENCHMARK = Benchmark(
    name="quick",
    title="Quick",
    kind="answer",
    load=load,
    prompt=prompt,
    grade=grade,
    prompt_id="quick/1",
    scorer="letter or integer equality",
    source="shipped with halfbyte",
    licence="Apache-2.0",
    full_items=40,
    repeats=1,
    margin=0.05,
    plan_variance=0.1,
    plan_prompt_tokens=80,
    plan_output_tokens=100,
    needs_algebra=True,
)
