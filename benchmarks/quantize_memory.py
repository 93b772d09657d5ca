"""Peak memory of quantizing at full width, 3 and 6 layers, within --memory 12GiB.

Question: does the peak stay within the budget, and does it not depend on the number of layers?

Method: a synthetic FP8 source with the widths and vocabulary of Mistral Medium 3.5 is written for
each depth; `halfbyte quantize` runs on it, calibrating, in a process of its own, whose VmHWM is
read at its end. Nothing else counts: the source was written by another process, and pages of files
in the system's cache belong to nobody.

Cost model: the decoded layer has 2.77 GB; loading its gate-up group on top takes 1.4 GB twice; a
prefetched layer as much again; embedding and head pass through one at a time, 3.2 GB each.

Reading the result: both peaks below 12 GiB, within 3 % of each other, and not above the plan.

Last record: benchmarks/records/quantize_memory.json.

Run: PYTHONPATH=src python benchmarks/quantize_memory.py   (needs 30 GB of disk, minutes)
"""

# Heavy imports stand in the functions of the child processes: what the parent holds would count.
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.figures import Against, Figure

RECORD = Path(__file__).parent / "records" / "quantize_memory.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[3, 6])
    parser.add_argument("--memory", default="12GiB")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--child", choices=["make", "run"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make(args: argparse.Namespace) -> None:
    """Write a source of the first depth and its tokens."""
    from wide_model import Widths, text_config, write_source, write_tokens

    widths = Widths(256, 512, 8, 2, 32) if args.small else Widths()
    text = text_config(widths, layers=args.layers[0], vocab_size=args.vocab)
    write_source(args.work / "source", text)
    tokens = args.work / "tokens.safetensors"
    write_tokens(tokens, rows=args.rows, tokens=args.tokens, vocab_size=args.vocab)


def run(args: argparse.Namespace) -> None:
    """Quantize that source; print what it took as JSON."""
    from wide_model import mixed_recipe

    from halfbyte.cli.quantize import parse_bytes
    from halfbyte.quantize.job import QuantizeConfig
    from halfbyte.quantize.pipeline import quantize

    result = quantize(
        QuantizeConfig(
            args.work / "source",
            args.work / "out",
            mixed_recipe(layers=args.layers[0]),
            calibration_tokens=args.work / "tokens.safetensors",
            memory_bytes=parse_bytes(args.memory),
        ),
        owns_process=True,
    )
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    layers = [layer["peak_memory_bytes"]["host"] for layer in result.record["layers"]]
    planned = result.record["planned_memory_bytes"]["host"]
    print(json.dumps({"peak": peak, "planned": planned, "after_layers": layers}))


def measure(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Both children for one depth."""
    args.work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="memory-", dir=args.work))
    common = [sys.executable, str(Path(__file__).resolve()), "--work", str(folder.resolve())]
    common += ["--layers", str(layers), str(layers), "--memory", args.memory]
    common += ["--rows", str(args.rows), "--tokens", str(args.tokens), "--vocab", str(args.vocab)]
    common += ["--small"] * args.small
    try:
        subprocess.run([*common, "--child", "make"], check=True)
        done = subprocess.run([*common, "--child", "run"], check=True, stdout=subprocess.PIPE)
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def memory_figures(
    results: dict[str, Any], layers: Sequence[int], budget_gib: float
) -> list[Figure]:
    """Peak memory for each number of layers, against what was allowed."""
    bound = (Against("--memory at most", budget_gib, is_bound=True),)
    return [
        Figure("peak memory of quantizing", results[f"peak_gib_{count}_layers"], "GiB", "quantize",
               {"width": "full", "layers": count}, bound, is_headline=count == max(layers))
        for count in layers
    ]  # fmt: skip


def main() -> None:
    args = parse()
    if args.child is not None:
        {"make": make, "run": run}[args.child](args)
        return
    peaks = {layers: measure(args, layers) for layers in args.layers}
    from halfbyte.bench import record
    from halfbyte.cli.quantize import parse_bytes

    budget = parse_bytes(args.memory)
    values = [peaks[layers]["peak"] for layers in args.layers]
    apart = max(values) / min(values) - 1
    results: dict[str, Any] = {
        "memory": args.memory,
        "planned_gib": round(peaks[args.layers[0]]["planned"] / 2**30, 3),
        **{f"peak_gib_{n}_layers": round(peaks[n]["peak"] / 2**30, 3) for n in args.layers},
        "apart": round(apart, 4),
        "is_within_budget": max(values) <= budget,
        "is_within_plan": max(values) <= peaks[args.layers[0]]["planned"],
        "is_within_3_percent": apart <= 0.03,
        "after_layers_gib": {
            str(n): [round(v / 2**30, 3) for v in peaks[n]["after_layers"]] for n in args.layers
        },
    }
    for name, value in results.items():
        print(f"{name:<22} {value}")
    record.write(
        args.out,
        name="quantize_memory",
        question="Quantizing at full width: is --memory kept, whatever the number of layers?",
        command="PYTHONPATH=src python benchmarks/quantize_memory.py " + " ".join(sys.argv[1:]),
        figures=memory_figures(results, args.layers, budget / 2**30),
        results=results,
    )
    if not (results["is_within_budget"] and results["is_within_3_percent"]):
        raise SystemExit("NOT kept")


if __name__ == "__main__":
    main()
