"""Four commands on a small FP8 checkpoint and what they print, for README.

Question: what does somebody see who quantizes a checkpoint of their own?
Method: `plan`, `quantize` (data-free, so that it takes seconds), `verify` and `chat` are run as a
    user would run them, in a folder that holds `fp8/`; their standard output is the record.
Cost model: none; nothing is timed.
Reading the result: sizes belong to SmolLM2-135M-Instruct. An answer of the mixed model without
    calibration is no measure of anything.
Last record: benchmarks/records/quickstart.json
Run: python benchmarks/quickstart.py FOLDER, after `halfbyte import smollm2 FOLDER/bf16` and
    `halfbyte import FOLDER/bf16 FOLDER/fp8 --to mistral-fp8`
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from halfbyte.bench import record

RECORD = Path(__file__).parent / "records" / "quickstart.json"
COMMANDS = (
    "halfbyte plan fp8 --recipe medium-3.5 --gpu h200 --no-timing",
    "halfbyte quantize fp8 mixed --recipe medium-3.5 --method none",
    "halfbyte verify mixed --against fp8",
    "halfbyte chat mixed --once 'What is the capital of France?' --temperature 0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    lines = []
    for command in COMMANDS:
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=args.folder, stdout=subprocess.PIPE, text=True, check=True)
        lines += [f"$ {command}", *done.stdout.rstrip().splitlines(), ""]
    print("\n".join(lines))
    record.write(
        args.out,
        name="quickstart",
        question="What do the first commands on a checkpoint of one's own print?",
        command="PYTHONPATH=src python benchmarks/quickstart.py FOLDER",
        results={"transcript": lines[:-1]},
    )


if __name__ == "__main__":
    main()
