"""The page that shows a card: Pocket's, made by the commands that anybody has.

Pocket is quantized without data (which gives the same bytes on every machine), and its card is
written from two kept runs in tests/data/card/pocket. `python -m tools.card_of_pocket` writes the
page; a test holds it to what the commands make. With `--measure` the runs are made anew first,
which a new model needs: minutes on two cores. Three arms are asked, and what NVFP4 everywhere and
the mixed recipe lose against FP8, kind by kind, is kept in pocket/records.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.cli.main import main as halfbyte
from halfbyte.evals.judging.compare import compare_runs
from halfbyte.evals.records import read_records, record_row, without_texts
from halfbyte.evals.tasks.suite import SUITES

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "pocket" / "model"
PAGE = ROOT / "docs" / "guide" / "card-of-pocket.md"
RUNS = ROOT / "tests" / "data" / "card" / "pocket"
RECORD = ROOT / "pocket" / "records" / "suite.json"
ITEMS = 200
# Flags of each arm: no data in either (decision 0167).
RECIPES = {
    "mixed": ("--recipe", str(ROOT / "pocket" / "mixed.yaml")),
    "nvfp4": ("--recipe", "nvfp4-everywhere", "--method", "none"),
}
_INTRO = """\
# A card: Pocket's

Made by these commands, and held to them by a test. Pocket is the small model of this repository;
its seven kinds of items stand for the seven benchmarks of a large model's card.

```sh
halfbyte quantize pocket/model mixed/ --recipe pocket/mixed.yaml
halfbyte evaluate pocket/model --suite pocket --out evals/fp8
halfbyte evaluate mixed/ --suite pocket --out evals/mixed
halfbyte card mixed/ --runs evals/fp8 evals/mixed --title Pocket-NVFP4 --licence apache-2.0
```
"""
_QUIET = ("--log-level", "error")


def run(command: Sequence[str]) -> None:
    """One command of the program; SystemExit if it fails."""
    if halfbyte(list(command)):
        raise SystemExit(f"failed: {' '.join(command)}")


def quantize(arm: str, target: Path) -> None:
    """An arm's checkpoint, made without data."""
    run(["quantize", str(MODEL), str(target), *RECIPES[arm], *_QUIET])


def page() -> str:
    """The page's text; versions of torch are left out, since they are the machine's."""
    with tempfile.TemporaryDirectory() as scratch:
        mixed = Path(scratch) / "mixed"
        quantize("mixed", mixed)
        runs = [str(RUNS / arm) for arm in ("fp8", "mixed")]
        about = ["--title", "Pocket-NVFP4", "--licence", "apache-2.0"]
        run(["card", str(mixed), "--runs", *runs, *about])
        card = (mixed / "README.md").read_text(encoding="utf-8")
    card = re.sub(r"torch \d[\w.+]*", "torch", card)
    return f"{_INTRO}\n````markdown\n{card.rstrip()}\n````\n"


def measure(items: int) -> None:
    """Ask all three arms; keep two runs without their texts, and the comparisons."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "fp8").symlink_to(MODEL)
        runs = Path(scratch) / "evals"
        for arm in ("fp8", *RECIPES):
            if arm in RECIPES:
                quantize(arm, Path(scratch) / arm)
            asked = ["--suite", "pocket", "--items", str(items), "--out", f"evals/{arm}"]
            # A process of its own, in that folder: the record keeps its command.
            command = [sys.executable, "-m", "halfbyte", "evaluate", arm, *asked]
            path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
            subprocess.run(command, cwd=scratch, env={**os.environ, "PYTHONPATH": path}, check=True)
        compared = {arm: differences(runs / "fp8", runs / arm) for arm in RECIPES}
        for arm in ("fp8", "mixed"):
            keep(runs / arm, RUNS / arm)
    model = json.loads((MODEL / "SHA256.json").read_text())["model.safetensors"]
    record = {"model.safetensors": model, "items": items, "against fp8": compared}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def differences(baseline: Path, candidate: Path) -> dict[str, Any]:
    """Right answers of both, and the paired difference in points with its 90 % interval."""
    found: dict[str, Any] = {}
    for name, row in compare_runs(baseline, candidate).benchmarks.items():
        d = row.difference
        found[name] = {
            "items": row.items,
            "fp8": round(100 * row.baseline, 2),
            "arm": round(100 * row.candidate, 2),
            "difference": [round(100 * value, 2) for value in (d.mean, d.low, d.high)],
            "lost": row.lost,
            "won": row.won,
            "verdict": row.verdict,
        }
    return found


def keep(source: Path, target: Path) -> None:
    """Copy a run's record and its samples, whose texts a card does not show."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(source / "run.json", target / "run.json")
    for name in SUITES["pocket"]:
        (target / name).mkdir()
        with (target / name / "samples.jsonl").open("w", encoding="utf-8") as file:
            for record in sorted(read_records(source / name / "samples.jsonl"), key=_by_number):
                file.write(json.dumps(record_row(without_texts(record))) + "\n")


def _by_number(record: Any) -> int:
    return int(record.item_id.rpartition("-")[2])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.card_of_pocket", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="make the runs anew first")
    parser.add_argument("--items", type=int, default=ITEMS, help="of each kind (%(default)s)")
    args = parser.parse_args()
    if args.measure:
        measure(args.items)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.exit(0)
