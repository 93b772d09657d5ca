"""Hashes of published benchmark items, for telling whose items somebody's files hold.

Question: none; a data file is made.
Method: the tasks' own readers and `content_hash` over real copies of whole sets: AIME 2025, AA-LCR,
    SciCode, and MMLU-Pro and MMMU-Pro as their authors' repositories hold them beside models'
    answers (eval_results/model_outputs_jamba-1.5-large_5shots.zip of TIGER-AI-Lab/MMLU-Pro,
    f418b11; mmmu-pro/output/gpt-4o_standard(10 options)_cot.jsonl of MMMU-Benchmark/MMMU, bb0b95a).
    GPQA's authors ask that items stay unread by machines that collect: the gpqa_diamond.csv of
    their archive and of its mirrors is known by its hash alone (inspect_evals 0.28.0 states it).
    IFBench is pinned as a whole (tasks/ifbench.py).
Cost model: none.
Reading the result: for each set a list of hashes beside the number of its items; no item can be
    read back from it. `changing` is how many items may read otherwise: of MMLU-Pro 42 did between
    the authors' outputs of 2024, and corrections went on; of MMMU-Pro none did between two outputs,
    and as small a share is allowed for.
Run: PYTHONPATH=src python benchmarks/published_items.py FOLDER with any of aime2025/problems.jsonl,
    aa_lcr/aa_lcr.csv, scicode/problems_*.jsonl, mmlu_pro/items.jsonl, mmmu_pro/items.jsonl, the
    wheel bfcl/bfcl_eval-2026.3.23-py3-none-any.whl (of which the questions are hashed as well, so
    that calibration draws none of them) and, for who has accepted the authors' terms,
    gpqa_diamond/gpqa_diamond.csv, whose items are hashed with their record ids. Sets that are not
    in FOLDER keep what is known of them. Then pytest tests/evals/test_published.py
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte import bfcl as leaderboard
from halfbyte.evals.tasks import aa_lcr, aime, bfcl, gpqa, mmlu_pro, mmmu_pro, scicode
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.tasks.data import load_rows

GRADED = Path(__file__).parents[1] / "src/halfbyte/bfcl_graded.json"
OUT = Path(__file__).parents[1] / "src/halfbyte/evals/tasks/published_items.json"


class Set(NamedTuple):
    """Where a set lies below the folder, how many items it has, and what makes an item."""

    pattern: str
    of: int
    content: Callable[[Mapping[str, Any]], str]
    changing: int = 0
    files: tuple[str, ...] = ()


SETS = {
    "aime2025": Set("aime2025/problems.jsonl", 30, aime.content),
    "aa_lcr": Set("aa_lcr/aa_lcr*.csv", 100, aa_lcr.content),
    "scicode": Set("scicode/problems_*.jsonl", 80, scicode.content),
    "mmlu_pro": Set("mmlu_pro/items.jsonl", 12_032, mmlu_pro.content, changing=60),
    "mmmu_pro": Set("mmmu_pro/items.jsonl", 1_730, mmmu_pro.content, changing=20),
    "gpqa_diamond": Set(
        "gpqa_diamond/gpqa_diamond.csv",
        198,
        gpqa.content,
        files=("41d1213cd7a4998605a26c2798500652572007161b3a92817ba46b35befcd305",),
    ),
}


def main() -> None:
    folder = Path(sys.argv[1])
    known = json.loads(OUT.read_text(encoding="utf-8"))
    made = {name: made_of(folder, one, known.get(name, {})) for name, one in SETS.items()}
    made |= tool_calls(folder / "bfcl", known)
    OUT.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")


def made_of(folder: Path, one: Set, known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a set, from the folder or as it was."""
    items, distinct = known.get("items", []), known.get("distinct", one.of)
    if any(folder.glob(one.pattern)):
        found = load_rows(one.pattern, folder, patterns=(one.pattern,))
        files = set(found.provenance.sha256.values())
        if len(found.rows) != one.of or (one.files and not files.issubset(one.files)):
            sys.exit(f"{one.pattern}: not the published {one.of} items ({len(found.rows)} rows)")
        items = sorted({one.content(row) for row in found.rows})
        distinct = len(items)
    print(f"{one.pattern}: {len(items)} hashes of {one.of} items")
    return {
        "of": one.of, "distinct": distinct, "changing": one.changing,
        "files": list(one.files), "items": items,
    }  # fmt: skip


def tool_calls(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the parts of the leaderboard of tool calls, and of what they ask."""
    if not folder.is_dir():
        return {name: known[name] for name in bfcl.PARTS if name in known}
    made, asked = {}, set()
    data = leaderboard.find_leaderboard(folder)
    for one in bfcl.BENCHMARKS:
        if one.name not in bfcl.PARTS:
            continue
        loaded = one.load(Options(data=folder))
        if len(loaded.samples) != one.full_items:
            sys.exit(f"{one.name}: {len(loaded.samples)} items, not {one.full_items}")
        items = sorted({bfcl.content(sample) for sample in loaded.samples})
        made[one.name] = {
            "of": one.full_items, "distinct": len(items), "changing": 0,
            "files": sorted(set(loaded.provenance.sha256.values())), "items": items,
        }  # fmt: skip
        print(f"{one.name}: {len(items)} hashes of {one.full_items} items")
    for category in (*leaderboard.GRADED, *leaderboard.GRADED_ELSEWHERE):
        for row in data.questions(category):
            asked |= leaderboard.question_hashes(row)
    GRADED.write_text(json.dumps({"questions": sorted(asked)}, indent=0) + "\n", encoding="utf-8")
    return made


if __name__ == "__main__":
    main()
