"""What `halfbyte plan` foretells against what `halfbyte quantize` then takes, run by run.

Question: how often is a run within 1.5 times of what was planned just before it?
Method: `plan --json` and `quantize` by turns, each as a process of its own as a user runs them. The
    whole command is timed, loading of libraries included. Nothing is warmed up.
Cost model: none.
Reading the result: ratios of planned to taken. A load that changes between a plan and its run shows
    here as an error of the plan; the share of the processors that others took during each plan
    stands beside it.
    Where others come and go, give the session priority (`echo -12 > /proc/self/autogroup`).
Last record: records/plan_accuracy.json, ten of ten
Run: python benchmarks/plan_accuracy.py NAME=FOLDER[=TOKENS.safetensors] ... --runs 10
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from halfbyte.bench import record
from halfbyte.figures import Against, Figure

RECORD = Path(__file__).parent / "records" / "plan_accuracy.json"
WITHIN = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=FOLDER[=TOKENS]")
    parser.add_argument("--recipe", default="medium-3.5")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    for stated in args.sources:
        name, folder, *tokens = stated.split("=")
        given = ["--recipe", args.recipe, "--log-level", "error"]
        given += ["--calibration-tokens", tokens[0]] if tokens else []
        rows = [one_run(folder, given) for _ in range(args.runs)]
        results[name] = {key: [row[key] for row in rows] for key in rows[0]}
        write(results, args.out)


def write(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The record; by source, the lists that `one_run` gives."""
    ratios = [
        planned / taken
        for one in results.values()
        for planned, taken in zip(one["planned_s"], one["taken_s"], strict=True)
    ]
    share = sum(1 / WITHIN <= ratio <= WITHIN for ratio in ratios) / len(ratios)
    record.write(
        path,
        name="plan_accuracy",
        question="How often is a quantization within 1.5 times of what was planned just before it?",
        command="PYTHONPATH=src python benchmarks/plan_accuracy.py demo=FP8 wide=FP8=TOKENS",
        figures=[
            Figure(
                "quantizations within 1.5 times of their plan",
                100 * share,
                "%",
                "quantize",
                {"runs": len(ratios)},
                (Against("at least", 90.0, is_bound=True),),
            )
        ],
        results={
            "median_ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        },
        samples={
            f"{name}: {key}": values for name, one in results.items() for key, values in one.items()
        },
    )


def one_run(folder: str, given: list[str]) -> dict[str, float]:
    """Plan, then quantize."""
    halfbyte = [sys.executable, "-m", "halfbyte"]
    planned = subprocess.run(
        [*halfbyte, "plan", folder, *given, "--json"], stdout=subprocess.PIPE, check=True
    )
    made = json.loads(planned.stdout)
    work = Path(tempfile.mkdtemp(dir=Path(folder).resolve().parent))
    try:
        started = time.perf_counter()
        command = [*halfbyte, "quantize", folder, str(work / "mixed"), *given]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        taken = time.perf_counter() - started
    finally:
        shutil.rmtree(work)
    found = {
        "planned_s": round(made["time"]["likely"], 2),
        "taken_s": round(taken, 2),
        "others": round(made["busy"] or 0.0, 3),
    }
    print(folder, found, flush=True)
    return found


if __name__ == "__main__":
    main()
