"""GPQA Diamond: 198 graduate questions of four options; zero-shot, letter equality.

Set: Idavidrein/gpqa, config gpqa_diamond (CC BY 4.0, gated). The published table says 448
questions, which is the size of the main set; Diamond has 198, and 198 are scored here. The
authors ask that items never stand in plain text online: load them from your own authorised copy,
and keep run folders (their logs hold the prompts) to yourself.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.evals.grading.letters import grade_letter
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.choices import choice_prompt
from halfbyte.evals.tasks.data import HubSet, load_rows
from halfbyte.evals.tasks.published import compared, content_hash
from halfbyte.evals.types import Prompt, Sample, Score, Text

_HUB = HubSet(
    "Idavidrein/gpqa",
    "train",
    revision="5233cd1db58884ed0bf678c7c6be731722a23f84",
    config="gpqa_diamond",
)
_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def load(options: Options) -> LoadedItems:
    rows = load_rows(
        "GPQA Diamond",
        options.data,
        patterns=("gpqa_diamond/*.csv", "gpqa_diamond*.csv", "gpqa_diamond/*.jsonl"),
        hub=_HUB,
        columns=(
            "Record ID",
            "Question",
            "Correct Answer",
            "Incorrect Answer 1",
            "Incorrect Answer 2",
            "Incorrect Answer 3",
        ),
        how="Gated set: accept the terms of Idavidrein/gpqa on the hub, log in with "
        "`huggingface-cli login`, or put your authorised gpqa_diamond.csv below --data.",
    )
    chosen = [rows.rows[i] for i in spread_indices(len(rows.rows), options.limit)]
    samples = tuple(_sample(row, options.gpqa_seed) for row in chosen)
    # The authors ask that items stay private, and this project has no copy to hash: the file that
    # they publish is known by its own hash, any other is counted and said to be no more.
    hashes = [content(row) for row in rows.rows]
    return LoadedItems(samples, compared(rows.provenance, BENCHMARK.name, hashes))


def content(row: Mapping[str, Any]) -> str:
    """A hash by which an item is recognised; its record id is left out, as it is a salt."""
    texts = (_clean(row[name]) for name in ("Question", "Correct Answer", *_WRONG))
    return content_hash(row["Record ID"], *texts)


def _sample(row: Mapping[str, Any], seed: int) -> Sample:
    """One item with its options in an order fixed by seed and record id, the same in every arm."""
    texts = [*(_clean(row[name]) for name in _WRONG), _clean(row["Correct Answer"])]
    order = random.Random(f"{seed}/{row['Record ID']}").sample(range(4), 4)
    return Sample(
        item_id=str(row["Record ID"]),
        group=str(row["Record ID"]),
        stratum=str(row.get("High-level domain") or ""),
        gold="ABCD"[order.index(3)],
        fields={
            "question": _clean(row["Question"]),
            "options": tuple(texts[i] for i in order),
        },
    )


def _clean(text: str) -> str:
    """The preprocessing that is common for this set: titles, double spaces, ends."""
    return re.sub(r" {2,}", " ", text.strip().replace(" [title]", ". "))


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    return (Text(choice_prompt(sample.fields["question"], sample.fields["options"], "aa")),)


def grade(sample: Sample, text: str) -> Score:
    return grade_letter(sample.gold, "ABCD", text)


BENCHMARK = Benchmark(
    name="gpqa_diamond",
    title="GPQA Diamond",
    kind="answer",
    load=load,
    prompt=prompt,
    grade=grade,
    prompt_id="gpqa/aa/seed-{gpqa_seed}/1",
    scorer="letter equality",
    source="Idavidrein/gpqa, gpqa_diamond, train",
    licence="CC BY 4.0, gated",
    full_items=198,
    repeats=16,
    margin=0.010,
    plan_variance=0.0776,
    plan_prompt_tokens=350,
    plan_output_tokens=9_000,
    notes=("the 198 items of Diamond; GPQA's main set, which has 448, is another one",),
)
