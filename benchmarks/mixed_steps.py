"""What a step costs by the number of prompt tokens it carries beside running answers.

Question: how long is a step of some answers and a chunk of a prompt, by their numbers and by how
    deep in its context the chunk lies, and how many prompt tokens a second is that?
Method: random weights of the geometry on the device under the engine's own runner, paged FP8 cache
    with random content. Sequences stand as if so many tokens had been computed; steps are launched
    as the engine launches them, the next one before the tokens of the last are read; 2 warm-up
    steps, then the median of `--repeats` steps, from one reading to the next.
Cost model: a row's products at the rates of their formats, but never less than the weights' bytes
    at the copy rate; a chunk's attention at 4 * rows * context * heads * head size FLOP a layer.
Reading the result: `ms_per_row` should fall with the rows and never jump. `--profile` prints what
    the kernels of a few steps take.
Last record: benchmarks/records/mixed-steps-h200.json

    PYTHONPATH=src python benchmarks/mixed_steps.py --layers 88 --record RECORD.json
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench import engine_bench, record
from halfbyte.bench.gpu import watch_board
from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.figures import Figure
from halfbyte.kernels.cuda.library import KernelLibrary

PROMPT_ROWS = (0, 8, 32, 64, 96, 120, 128, 192, 248, 256, 320, 384, 448, 504, 512, 760, 1016, 2040)


@dataclass(frozen=True, slots=True)
class Point:
    """A step: answers with their context, and a chunk of a prompt that begins at `depth`."""

    answers: int
    prompt_rows: int
    depth: int
    context: int = 1024


def points() -> list[Point]:
    """The steps of the table: few and many answers beside shallow chunks, deep chunks, chunks."""
    found = [Point(64, rows, 512, 1024) for rows in PROMPT_ROWS]
    found += [Point(8, rows, 512, 1024) for rows in PROMPT_ROWS]
    for depth in (16384, 61440):
        found += [Point(8, rows, depth) for rows in (16, 64, 120, 248, 504, 1016, 2040)]
    found += [Point(0, rows, 0) for rows in (128, 256, 384, 512, 1024, 2048)]
    found += [Point(0, 64, depth) for depth in (8192, 65536)]
    return found


def sequences_of(served: engine_bench.Served, point: Point) -> tuple[list[Sequence], Sequence]:
    """Running answers and the sequence of the prompt, which has enough tokens and pages."""
    vocab, pages = served.weights.config.vocab_size, served.device.cache.num_pages
    answers: list[Sequence] = []
    if point.answers:
        answers = engine_bench.sequences_of(
            engine_bench.Point(point.answers, point.context), vocab, pages
        )
    (prompt,) = engine_bench.sequences_of(
        engine_bench.Point(1, point.depth + 2 * point.prompt_rows), vocab, pages
    )
    prompt.slot = point.answers
    return answers, prompt


def step_ms(served: engine_bench.Served, point: Point, repeats: int) -> list[float]:
    """Milliseconds of each step, from one reading of its tokens to the next."""
    runner = served.runner
    answers, prompt = sequences_of(served, point)
    chunk = [Work(prompt, point.depth, point.prompt_rows)] if point.prompt_rows else []

    def launch() -> Any:
        works = [Work(one, len(one.token_ids) - 1, 1) for one in answers]
        tokens = runner.launch([*works, *chunk])
        for row, one in enumerate(answers):
            one.reserve(row)
        return tokens

    samples: list[float] = []
    flight = launch()
    last = time.perf_counter()
    for _ in range(repeats + 2):
        ahead = launch()
        token_ids = runner.wait(flight)
        if not token_ids:
            torch.cuda.current_stream().synchronize()
        now = time.perf_counter()
        samples.append((now - last) * 1e3)
        flight, last = ahead, now
        for one, token_id in zip(answers, token_ids, strict=True):
            one.settle(token_id)
    for one, token_id in zip(answers, runner.wait(flight), strict=True):
        one.settle(token_id)
    torch.cuda.synchronize()
    return samples[2:]


def profile(served: engine_bench.Served, point: Point) -> None:
    """Print the kernels of a step by the time they take."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        step_ms(served, point, 1)
    rows = sorted(seen.key_averages(), key=lambda one: -one.self_device_time_total)
    total = sum(one.self_device_time_total for one in rows)
    print(f"{point}: {total / 4e3:.1f} ms a step")
    for one in rows[:14]:
        milliseconds, count = one.self_device_time_total / 4e3, one.count / 4
        print(f"  {milliseconds:9.3f} ms {count:7.0f} times  {one.key[:100]}")
    sys.stdout.flush()


def run(num_layers: int, mode: str, repeats: int, profiled: list[Point]) -> list[dict[str, Any]]:
    """Every row of the table, printed as it comes."""
    torch.manual_seed(0)
    library = KernelLibrary(torch.device("cuda", 0))
    config = replace(engine_bench.CONFIG, max_model_len=65536 + 8192, kv_cache_tokens=2**17 + 2**14)
    with torch.inference_mode():
        weights = engine_bench.make_weights(library, num_layers, mode)  # type: ignore[arg-type]
    served = engine_bench.load_served(library, weights, config)
    rows = []
    for point in points():
        with watch_board(torch.device("cuda")) as board:
            samples = step_ms(served, point, repeats)
        median = statistics.median(samples)
        num_rows = point.answers + point.prompt_rows
        row = {
            "mode": mode,
            "answers": point.answers,
            "prompt_rows": point.prompt_rows,
            "depth": point.depth,
            "median_ms": median,
            "samples_ms": samples,
            "ms_per_row": median / num_rows,
            "prompt_tokens_per_s": point.prompt_rows / median * 1e3,
            **board.facts(),
        }
        rows.append(row)
        print(
            f"{mode} answers {point.answers:3} prompt {point.prompt_rows:5} at {point.depth:6}: "
            f"{median:8.2f} ms {row['ms_per_row']:7.3f} a row "
            f"{row['prompt_tokens_per_s']:7.0f} prompt tok/s",
            flush=True,
        )
    for point in profiled:
        profile(served, point)
    return rows


def figures_of(rows: list[dict[str, Any]]) -> list[Figure]:
    """Each row's time, with the numbers that it was measured at."""
    return [
        Figure(
            name="mixed step",
            value=row["median_ms"],
            unit="ms",
            topic="serving",
            conditions={name: row[name] for name in ("mode", "answers", "prompt_rows", "depth")},
        )
        for row in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=88)
    parser.add_argument("--mode", choices=("exact", "fast"), default="exact")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    profiled = []
    if arguments.profile:
        profiled = [Point(64, 448, 512), Point(8, 504, 16384), Point(8, 1016, 61440)]
    rows = run(arguments.layers, arguments.mode, arguments.repeats, profiled)
    if arguments.record is not None:
        record.write(
            arguments.record,
            name="mixed-steps",
            question="What does a step cost that carries prompt tokens beside running answers?",
            command=f"PYTHONPATH=src python benchmarks/mixed_steps.py --layers {arguments.layers}",
            figures=figures_of(rows),
            results={"config": {"layers": arguments.layers, "mode": arguments.mode}, "rows": rows},
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
