"""MMLU-Pro: 12,032 questions of up to ten options in 14 categories; zero-shot, letter equality.

Set: TIGER-Lab/MMLU-Pro, split test (MIT). 2,051 items have fewer than ten options: only the
options that exist are shown, where a public harness pads with "None". The paper's own protocol is
5-shot with a random letter for unparsable answers; not used here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.evals.grading.letters import grade_letter
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.choices import LETTERS, choice_prompt
from halfbyte.evals.tasks.data import HubSet, load_rows
from halfbyte.evals.tasks.published import compared, content_hash
from halfbyte.evals.types import Prompt, Sample, Score, Text

_HUB = HubSet("TIGER-Lab/MMLU-Pro", "test", revision="527feea0afed1de15a8c115abf7be4c912123315")


def load(options: Options) -> LoadedItems:
    rows = load_rows(
        "MMLU-Pro",
        options.data,
        patterns=("mmlu_pro/*.jsonl", "mmlu_pro/*.parquet", "MMLU-Pro/data/test*.parquet"),
        hub=_HUB,
        columns=("question_id", "question", "options", "answer", "category"),
        how="Open set: `pip install datasets` and a network, or save TIGER-Lab/MMLU-Pro's test "
        "split as mmlu_pro/test.jsonl below --data.",
    )
    chosen = [rows.rows[i] for i in spread_indices(len(rows.rows), options.limit)]
    samples = tuple(
        Sample(
            item_id=str(row["question_id"]),
            group=str(row["question_id"]),
            stratum=row["category"],
            gold=row["answer"],
            fields={"question": row["question"], "options": tuple(row["options"])},
        )
        for row in chosen
    )
    hashes = [content(row) for row in rows.rows]
    return LoadedItems(samples, compared(rows.provenance, BENCHMARK.name, hashes))


def content(row: Mapping[str, Any]) -> str:
    """A hash by which an item is recognised, whoever published it."""
    return content_hash(row["question"], *row["options"], row["answer"])


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    shape = options.mmlu_prompt
    return (Text(choice_prompt(sample.fields["question"], sample.fields["options"], shape)),)


def grade(sample: Sample, text: str) -> Score:
    return grade_letter(sample.gold, LETTERS[: len(sample.fields["options"])], text)


BENCHMARK = Benchmark(
    name="mmlu_pro",
    title="MMLU Pro",
    kind="answer",
    load=load,
    prompt=prompt,
    grade=grade,
    prompt_id="mmlu-pro/{mmlu_prompt}/1",
    scorer="letter equality",
    source="TIGER-Lab/MMLU-Pro, test",
    licence="MIT",
    full_items=12_032,
    repeats=1,
    margin=0.010,
    plan_variance=0.054,
    plan_prompt_tokens=250,
    plan_output_tokens=3_000,
)
