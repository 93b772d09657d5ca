"""IFBench: 300 prompts with 344 verifiable constraints of 58 kinds; prompt-level loose accuracy.

Set: allenai/IFBench_test (ODC-BY-1.0) as of commit db69a6f of allenai/IFBench; the set grew from
294 to 300 prompts on 2026-04-11, so scores of older copies differ. It is pinned by a hash of its
items, whichever copy they are read from. Null arguments are dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading.constraints import VERB_KIND, grade_constraints, missing_resources
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.data import HubSet, load_rows, rows_sha256
from halfbyte.evals.types import Prompt, Sample, Score, Text

# `rows_sha256` of the 300 items of data/IFBench_test.jsonl at db69a6f, without null arguments.
ITEMS_SHA256 = "fa5c78675d6046dcd407b7055ad744eb8c3a56c4237c236b41de82291d644005"
OTHER_ITEMS = "not the 300 prompts of allenai/IFBench db69a6f"

_HUB = HubSet("allenai/IFBench_test", "train", revision=None)


def load(options: Options) -> LoadedItems:
    rows = load_rows(
        "IFBench",
        options.data,
        patterns=("ifbench/IFBench_test*.jsonl", "ifbench/prompts*.jsonl", "ifbench/*.parquet"),
        hub=_HUB,
        columns=("key", "prompt", "instruction_id_list", "kwargs"),
        how="Open set: put data/IFBench_test.jsonl of allenai/IFBench (commit db69a6f) as "
        "ifbench/IFBench_test.jsonl below --data, or have a network and `datasets`.",
    )
    everything = [_plain(row) for row in rows.rows]
    provenance = rows.provenance
    if rows_sha256(everything) != ITEMS_SHA256:
        notes = filter(None, (provenance.note, OTHER_ITEMS))
        provenance = replace(provenance, note="; ".join(notes))
    else:
        provenance = replace(provenance, checked="all 300")
    chosen = [_sample(everything[i]) for i in spread_indices(len(rows.rows), options.limit)]
    kinds = {kind for sample in chosen for kind in sample.fields["kinds"]}
    left_out: dict[str, str] = {}
    if reason := missing_resources(sorted(kinds)):
        if not options.skip_unscorable or missing_resources(sorted(kinds - {VERB_KIND})):
            raise UnsupportedError(f"IFBench cannot be scored here: {reason}")
        left_out = {s.item_id: reason for s in chosen if VERB_KIND in s.fields["kinds"]}
    kept = tuple(sample for sample in chosen if sample.item_id not in left_out)
    return LoadedItems(kept, provenance, left_out)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as every copy has it: four columns, no null arguments, whole numbers as integers."""
    return {
        "key": str(row["key"]),
        "prompt": row["prompt"],
        "instruction_id_list": list(row["instruction_id_list"]),
        "kwargs": [
            {n: _whole(v) for n, v in (given or {}).items() if v is not None}
            for given in row["kwargs"]
        ],
    }


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sample(row: Mapping[str, Any]) -> Sample:
    kinds, arguments, key = tuple(row["instruction_id_list"]), tuple(row["kwargs"]), row["key"]
    stratum = kinds[0].partition(":")[0]
    return Sample(
        key, key, stratum, " ".join(kinds),
        {"prompt": row["prompt"], "kinds": kinds, "arguments": arguments},
    )  # fmt: skip


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    return (Text(sample.fields["prompt"]),)


def grade(sample: Sample, text: str) -> Score:
    f = sample.fields
    return grade_constraints(f["kinds"], f["arguments"], f["prompt"], text)


BENCHMARK = Benchmark(
    name="ifbench",
    title="IFBench",
    kind="answer",
    load=load,
    prompt=prompt,
    grade=grade,
    prompt_id="ifbench/1",
    scorer="prompt-level loose accuracy of 58 verifiers",
    source="allenai/IFBench_test",
    licence="ODC-BY-1.0",
    full_items=300,
    repeats=8,
    margin=0.010,
    plan_variance=0.0994,
    plan_prompt_tokens=100,
    plan_output_tokens=4_000,
)
