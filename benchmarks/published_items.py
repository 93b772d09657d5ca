"""Hashes of published benchmark items, for telling whose items somebody's files hold.

Question: none; a data file is made.
Method: the tasks' own readers and `content_hash` over real copies: all items of AIME 2025, AA-LCR
    and SciCode, a part of MMLU-Pro and MMMU-Pro. GPQA's authors ask that items stay unread by
    machines that collect, IFBench is pinned as a whole (tasks/ifbench.py).
Cost model: none.
Reading the result: one list of hashes a set beside the number of its items; no item can be read
    back from it.
Run: PYTHONPATH=src python benchmarks/published_items.py FOLDER with aime2025/problems.jsonl,
    aa_lcr/aa_lcr.csv, scicode/problems_*.jsonl, mmlu_pro/items.jsonl, mmmu_pro/*outputs.jsonl and,
    where you have one, gpqa_diamond/gpqa_diamond.csv
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from halfbyte.evals.tasks import aa_lcr, aime, gpqa, mmlu_pro, mmmu_pro, scicode
from halfbyte.evals.tasks.data import load_rows

OUT = Path(__file__).parents[1] / "src/halfbyte/evals/tasks/published_items.json"


def main() -> None:
    folder = Path(sys.argv[1])
    made = {
        "aime2025": (30, map(aime.content, rows(folder, "aime2025/problems.jsonl"))),
        "aa_lcr": (100, map(aa_lcr.content, rows(folder, "aa_lcr/aa_lcr*.csv"))),
        "scicode": (80, map(scicode.content, rows(folder, "scicode/problems_*.jsonl"))),
        "mmlu_pro": (12_032, map(mmlu_pro.content, rows(folder, "mmlu_pro/items.jsonl"))),
        "mmmu_pro": (1_730, map(mmmu_pro.content, rows(folder, "mmmu_pro/*outputs.jsonl"))),
    }
    if (folder / "gpqa_diamond").is_dir():
        items = rows(folder, "gpqa_diamond/gpqa_diamond.csv")
        made["gpqa_diamond"] = (198, map(gpqa.content, items))
    text = json.dumps({name: listed(of, found) for name, (of, found) in made.items()}, indent=0)
    OUT.write_text(text + "\n", encoding="utf-8")


def rows(folder: Path, pattern: str) -> Iterable[dict]:
    return load_rows(pattern, folder, patterns=(pattern,)).rows


def listed(of: int, hashes: Iterable[str]) -> dict[str, object]:
    items = sorted(set(hashes))
    print(len(items), "of", of)
    return {"of": of, "items": items}


if __name__ == "__main__":
    main()
