"""What every benchmark asks, and how often: a change of either is a change of the benchmark."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UsageError
from halfbyte.evals.tasks import aa_lcr, aime, gpqa, ifbench, mmlu_pro, mmmu_pro, scicode
from halfbyte.evals.tasks.benchmark import Benchmark, Options
from halfbyte.evals.tasks.choices import LETTERS, choice_prompt
from halfbyte.evals.tasks.data import Provenance, load_rows, rows_sha256
from halfbyte.evals.tasks.published import published
from halfbyte.evals.tasks.suite import BENCHMARKS, REPEATS, SUITES
from halfbyte.evals.types import Conversation, Image

DATA = Path(__file__).parents[1] / "data" / "evals"

# Items, repeats, margin in points, connections; then for the planner the variance of an item's
# answers, prompt and output tokens, groups, and how much groups widen the error.
SETTINGS = {
    "mmlu_pro": (12_032, 1, 1.0, 64, 0.054, 250, 3_000, None, 1.0),
    "gpqa_diamond": (198, 16, 1.0, 64, 0.0776, 350, 9_000, None, 1.0),
    "aa_lcr": (100, 16, 1.5, 16, 0.1095, 108_000, 4_000, 30, 1.12),
    "scicode": (338, 8, 1.5, 32, 0.0931, 2_200, 7_000, 80, 1.15),
    "aime2025": (30, 32, 1.5, 64, 0.047, 200, 18_000, None, 1.0),
    "ifbench": (300, 8, 1.0, 64, 0.0994, 100, 4_000, None, 1.0),
    "mmmu_pro": (1_730, 1, 1.5, 32, 0.1028, 2_900, 5_000, None, 1.0),
    "mmmu_pro_vision": (1_730, 1, 1.5, 32, 0.1028, 2_900, 5_000, None, 1.0),
    "mmmu_pro_standard": (1_730, 1, 1.5, 32, 0.1028, 2_900, 5_000, None, 1.0),
    "bfcl": (4_291, 1, 1.0, 32, 0.05, 10_000, 900, 2_276, 1.2),
    "bfcl_non_live": (1_240, 1, 1.5, 32, 0.05, 320, 400, None, 1.0),
    "bfcl_live": (2_251, 1, 1.5, 32, 0.05, 870, 400, 836, 1.2),
    "bfcl_multi_turn": (800, 1, 1.5, 32, 0.05, 52_000, 3_000, 200, 1.2),
    "quick": (40, 1, 5.0, 64, 0.1, 80, 100, None, 1.0),
    "pocket_knowledge": (200, 1, 1.5, 32, 0.01, 150, 20, None, 1.0),
    "pocket_hard": (200, 1, 1.5, 32, 0.01, 100, 40, None, 1.0),
    "pocket_recall": (200, 1, 1.5, 32, 0.01, 1_100, 40, None, 1.0),
    "pocket_programs": (200, 1, 1.5, 32, 0.01, 80, 50, None, 1.0),
    "pocket_integers": (200, 1, 1.5, 32, 0.01, 80, 100, None, 1.0),
    "pocket_instructions": (200, 1, 1.5, 32, 0.01, 40, 50, None, 1.0),
    "pocket_images": (200, 1, 1.5, 32, 0.01, 250, 20, None, 1.0),
}

# Number of samples, and a digest of all that is asked of them (`asked_digest`).
ASKED = {
    "mmlu_pro": (28, "c4770a9192c5a7f0"),
    "gpqa_diamond": (10, "8cc6a867a8b1e6f4"),
    "aa_lcr": (10, "4653fe152b36f5e2"),
    "scicode": (12, "6d7e00261a6170eb"),
    "aime2025": (10, "addc5f3113044fb2"),
    "ifbench": (10, "6ad01ca1afbc58c4"),
    "mmmu_pro": (10, "f9254a3a2240afea"),
    "mmmu_pro_vision": (10, "98b6f5bf4f38c59e"),
    "mmmu_pro_standard": (10, "b62803bc19eb2722"),
    "bfcl": (19, "ccfed40245686c0a"),
    "bfcl_non_live": (7, "ac0b6b16cfbe5c19"),
    "bfcl_live": (8, "1e59e67d6fc2df5b"),
    "bfcl_multi_turn": (4, "1eb8e7d067e0c339"),
    "quick": (40, "d26bf103df0c9b72"),
}


def folder_of(name: str) -> Path:
    return DATA if name in ("mmlu_pro", "scicode") else DATA / "made_up"


def asked_digest(benchmark: Benchmark, options: Options) -> tuple[int, str]:
    """Items with their prompts; of pictures only the place, as encoders differ in their bytes."""
    digest = hashlib.sha256()
    samples = benchmark.load(options).samples
    for sample in samples:
        earlier = [f"```python\nstep = {i}\n```" for i in range(sample.fields.get("index", 0))]
        asked = benchmark.prompt(sample, earlier, options)
        parts: list[Any] = (
            [*asked.messages, *asked.tools]
            if isinstance(asked, Conversation)
            else ["picture" if isinstance(part, Image) else part.text for part in asked]
        )
        row = [sample.item_id, sample.group, sample.stratum, sample.gold, parts]
        digest.update(json.dumps(row).encode())
    return len(samples), digest.hexdigest()[:16]


def test_settings_are_those_that_the_plan_was_made_with() -> None:
    found = {
        name: (
            b.full_items, b.repeats, round(100 * b.margin, 9), b.concurrency, b.plan_variance,
            b.plan_prompt_tokens, b.plan_output_tokens, b.plan_groups, b.plan_design,
        )
        for name, b in BENCHMARKS.items()
    }  # fmt: skip
    assert found == SETTINGS
    grouped = {name for name, b in BENCHMARKS.items() if b.has_groups}
    by_documents = {"bfcl", "bfcl_live", "bfcl_multi_turn"}
    assert grouped == {"aa_lcr", "scicode"} | by_documents
    assert grouped == {n for n, s in SETTINGS.items() if s[7]}
    assert {name for name, b in BENCHMARKS.items() if b.is_trajectory} == {"scicode"}
    assert {n for n, b in BENCHMARKS.items() if b.is_generated} == set(SUITES["pocket"])
    only_one_effort = {n: b.effort for n, b in BENCHMARKS.items() if b.effort is not None}
    assert only_one_effort == {"pocket_programs": "none", "pocket_instructions": "none"}
    assert {n for n, b in BENCHMARKS.items() if b.needs_algebra} == {"aime2025", "quick"}
    decide = (2, 96, 160, 44, 192, 80, 8)
    assert {"decide": dict(zip(SUITES["decide"], decide, strict=True))} == REPEATS


# Generated items follow from a seed and a generator, and are told by their hash in the record.
@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if not b.is_generated])
def test_items_and_prompts_stay_as_their_prompt_id_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of one prompt id are compared: who changes a prompt gives it a new one."""
    monkeypatch.setattr(ifbench, "missing_resources", lambda kinds: None)
    assert asked_digest(BENCHMARKS[name], Options(data=folder_of(name))) == ASKED[name]


@pytest.mark.parametrize("task", [aa_lcr, aime, gpqa, mmlu_pro, mmmu_pro, scicode])
def test_a_set_is_compared_with_as_many_items_as_were_published(
    task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def spy(provenance: Provenance, name: str, hashes: Sequence[str]) -> Provenance:
        told.append((name, len(hashes)))
        return provenance

    monkeypatch.setattr(task, "compared", spy)
    benchmark = task.BENCHMARKS[0] if task is mmmu_pro else task.BENCHMARK
    loaded = benchmark.load(Options(data=folder_of(benchmark.name)))
    # SciCode's items are problems, its samples the steps of these that are generated.
    groups = {sample.group for sample in loaded.samples}
    num_items = len(groups) if task is scicode else len(loaded.samples)
    assert told == [(benchmark.name, num_items)]
    assert published(benchmark.name).of == (80 if task is scicode else benchmark.full_items)


def test_options_that_are_part_of_a_prompts_name_change_what_is_asked() -> None:
    for name, changed in (
        ("mmlu_pro", {"mmlu_prompt": "aa"}),
        ("gpqa_diamond", {"gpqa_seed": 43}),
        ("scicode", {"code_background": False}),
        ("mmmu_pro_standard", {"image_placement": "append"}),
    ):
        options = replace(Options(data=folder_of(name)), **changed)
        assert asked_digest(BENCHMARKS[name], options)[1] != ASKED[name][1]
        assert next(iter(changed)) in BENCHMARKS[name].prompt_id


@pytest.mark.parametrize(
    "task, row, parts",
    [
        (
            mmlu_pro,
            {"question": "q", "options": ["a", "b"], "answer": "A"},
            {"question": "p", "options": ["b", "a"], "answer": "B"},
        ),
        (
            aa_lcr,
            {"question": "q", "answer": "a", "context": "c"},
            {"question": "p", "answer": "b", "context": "d"},
        ),
        (aime, {"problem": "q", "answer": "7"}, {"problem": "p", "answer": "8"}),
        (
            mmmu_pro,
            {"id": "1", "options": "['a', 'b']", "answer": "A"},
            {"id": "2", "options": "['a', 'c']", "answer": "B"},
        ),
        (
            scicode,
            {
                "problem_id": "1",
                "sub_steps": [
                    {"step_number": "1.1", "step_description_prompt": "d", "test_cases": ["t"]}
                ],
            },
            {"problem_id": "2", "sub_steps": []},
        ),
    ],
)
def test_every_part_of_an_item_makes_it_another(
    task: Any, row: dict[str, Any], parts: dict[str, Any]
) -> None:
    found = {task.content({**row, name: other}) for name, other in parts.items()}
    assert len(found | {task.content(row)}) == len(parts) + 1
    assert task.content(dict(row)) == task.content(row)
    assert all(isinstance(text, str) and text for text in found)


def test_no_item_has_more_options_than_there_are_letters() -> None:
    assert choice_prompt("q", [""] * len(LETTERS), "aa").count(") ") == len(LETTERS)
    with pytest.raises(ValueError, match="zip"):
        choice_prompt("q", [""] * (len(LETTERS) + 1), "aa")


def test_an_item_without_a_domain_has_an_empty_one() -> None:
    row = dict.fromkeys(("Record ID", "Question", "Correct Answer", *gpqa._WRONG), "x")
    assert gpqa._sample(row, 1).stratum == ""
    assert gpqa._sample({**row, "High-level domain": "Physics"}, 1).stratum == "Physics"


def test_bytes_in_rows_count_by_their_content() -> None:
    assert rows_sha256([{"raw": b"x"}]) != rows_sha256([{"raw": b"y"}])
    assert rows_sha256([{"raw": b"x"}]) == rows_sha256([{"raw": b"x"}])


def test_files_may_start_with_a_byte_order_mark_and_say_the_line_of_what_is_no_utf8(
    tmp_path: Path,
) -> None:
    file = tmp_path / "items.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 1}\n{"id": 2}\n')
    assert load_rows("x", tmp_path, patterns=("*.jsonl",)).rows == ({"id": 1}, {"id": 2})
    file.write_bytes(b'{"id": 1}\n{"\xff": 2}\n')
    with pytest.raises(UsageError, match=r"line 2, byte 3: not UTF-8"):
        load_rows("x", tmp_path, patterns=("*.jsonl",))
    file.write_bytes('{"id": 1}\n'.encode("utf-16"))
    with pytest.raises(UsageError, match="is in UTF-16"):
        load_rows("x", tmp_path, patterns=("*.jsonl",))
