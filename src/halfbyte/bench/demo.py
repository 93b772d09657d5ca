"""The newcomer's demo: one real model through every room, in plain sentences.

Import SmolLM2-135M-Instruct, make the FP8 source, quantize it to the mixed recipe, compare the
four, serve the result and ask it three questions through the official client. Called by
`halfbyte demo`; the single steps are the single commands.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from halfbyte.bench import record as records
from halfbyte.bench.fidelity import Comparison
from halfbyte.errors import CapacityError, UnsupportedError, UsageError

MARKER = ".halfbyte-demo"
CALIBRATION_TOKENS = 4096
HELD_OUT = Path(__file__).parent / "data" / "held_out.txt"
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three primary colors.",
)
# The names of summary.json, in the order of the table.
VARIANTS = ("bf16", "fp8", "mixed", "mixed_declared")


@dataclass
class Narrator:
    """Says what happens on stdout and keeps it, so that the README can show a real run."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.extend(text.splitlines() or [""])

    @contextmanager
    def step(self, number: int, what: str) -> Iterator[None]:
        self.say(f"\n[{number}/5] {what}")
        started = time.perf_counter()
        yield
        self.say(f"      done in {time.perf_counter() - started:.1f} s")


def run_demo(out: Path, *, record: Path | None = None, threads: int | None = None) -> None:
    """Run the five steps; leaves checkpoints, `summary.json` and `comparison.png` under `out`.

    Raises UsageError if `out` holds anything that no demo made.
    """
    set_threads(threads)
    prepare(out)
    narrator = Narrator()
    started = time.perf_counter()
    narrator.say("halfbyte demo: a real model from its weights to served answers, on this CPU.")
    make_checkpoints(out, narrator)
    with narrator.step(4, "Comparing all of them on held-out text."):
        comparison = compare(out, narrator)
    with narrator.step(5, "Serving the mixed model and asking three questions."):
        answers = ask_questions(out / "mixed", narrator)
    summary = summarize(out, comparison, answers)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    narrator.say(
        f"\nAll of it took {summary['seconds']:.0f} s. Numbers: {out / 'summary.json'}, "
        f"plot: {out / 'comparison.png'}"
    )
    narrator.say(f"Talk to it: halfbyte chat {out / 'mixed'}")
    if record is not None:
        records.write(
            record,
            name="demo",
            command="halfbyte demo",
            results={"summary": summary, "transcript": narrator.lines},
        )


def set_threads(threads: int | None) -> None:
    """Fix the number of CPU threads for this process and its server."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def prepare(out: Path) -> None:
    """Make `out` empty, but only if it is new, empty or a demo's."""
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists()):
            raise UsageError(
                f"{out} holds something that no demo made; name another directory with --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("This directory is the demo's; the next demo empties it.\n")
