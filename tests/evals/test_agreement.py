"""Item by item against the official graders, on recorded responses kept beside the repository.

Each disagreement is listed with the defect of the official grader that explains it.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.evals.grading.constraints import VERB_KIND, grade_constraints, missing_resources
from halfbyte.evals.grading.letters import extract_letter
from halfbyte.evals.grading.numbers import grade_number

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "evals"
LETTERS = "ABCDEFGHIJKL"

pytestmark = pytest.mark.shared
if not SHARED.is_dir():
    pytest.skip(
        f"{SHARED} is absent: these items may not be part of the repository",
        allow_module_level=True,
    )

EXPLAINED = {
    "10576": "the text answers twice; the script takes the first, we the last (wrong either way)",
    "2648": "'The answer is (B) and (D)': the script takes the first of two letters, we neither",
    "test_Chemistry_362": "'Answer: A. (D)': option A reads '(D)'; the parser takes that text",
    "test_Music_134": "'None of the options match': the parser draws a random option",
}


def _rows(path: str) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (SHARED / path).read_text().splitlines())


def test_mmlu_pro_letters() -> None:
    different = {
        str(row["question_id"])
        for row in _rows("mmlu_pro/items.jsonl")
        if extract_letter(row["sample_output"], LETTERS[: len(row["options"])])
        != row["upstream_pred"]
    }
    assert different == {"10576", "2648"} <= set(EXPLAINED)


@pytest.mark.parametrize(
    "setting, expected", [("standard10", {"test_Chemistry_362"}), ("vision", {"test_Music_134"})]
)
def test_mmmu_pro_letters(setting: str, expected: set[str]) -> None:
    different = set()
    for row in _rows(f"mmmu_pro/{setting}_gpt4o_outputs.jsonl"):
        letters = LETTERS[: len(ast.literal_eval(row["options"]))]
        if extract_letter(row["response"], letters) != row["pred_indexs"]:
            different.add(row["id"])
    assert different == expected <= set(EXPLAINED)


def test_ifbench_verdicts_constraint_by_constraint() -> None:
    pytest.importorskip("if_verifiable", reason="extra 'eval' is not installed")
    if reason := missing_resources([]):
        pytest.skip(reason)
    prompts = {row["key"]: row["prompt"] for row in _rows("ifbench/prompts_half.jsonl")}
    compared = 0
    for row in _rows("ifbench/responses_with_verdicts.jsonl"):
        kinds = row["instruction_id_list"]
        assert VERB_KIND not in kinds
        score = grade_constraints(kinds, row["kwargs"], prompts[row["key"]], row["response"])
        assert (score.details["strict"], score.details["loose"]) == (row["strict"], row["loose"])
        compared += len(kinds)
    assert compared == 178


def test_aime_gold_is_recognised_in_every_usual_form() -> None:
    rows = list(_rows("aime2025/problems.jsonl"))
    assert len(rows) == 30
    for row in rows:
        gold = int(row["answer"])
        for text in (rf"\boxed{{{gold:03d}}}", f"Answer: {gold}", rf"$\boxed{{\text{{{gold}}}}}$."):
            assert grade_number(gold, text).value == 1.0
        assert grade_number(gold, rf"\boxed{{{gold + 1}}}").value == 0.0


def test_no_item_that_may_not_be_published_is_in_the_repository() -> None:
    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text).lower()

    root = Path(__file__).parents[2]
    folders = ("src", "tests", "docs", "benchmarks")
    files = [*root.glob("*.md"), *(f for folder in folders for f in (root / folder).rglob("*"))]
    texts = {}
    for file in files:
        if file.is_file() and file.stat().st_size < 4 << 20:
            texts[file] = plain(file.read_bytes().decode("utf-8", "replace"))
    assert len(texts) > 300
    sources = {
        "aime2025/problems.jsonl": "problem",
        "aa_lcr/questions_half.jsonl": "question",
        "ifbench/responses_with_verdicts.jsonl": "response",
        "mmmu_pro/standard10_gpt4o_outputs.jsonl": "response",
    }
    for path, column in sources.items():
        for row in _rows(path):
            for start in (0, len(row[column]) // 2):
                piece = plain(row[column][start : start + 90]).strip()
                if len(piece) >= 40:
                    assert [f for f, text in texts.items() if piece in text] == [], piece[:20]
