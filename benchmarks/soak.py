"""Question: does a server that thousands of clients use and leave stay whole and answer the same?

Method: a small random model with images, thoughts and tools behind `halfbyte serve`, a cache too
small for all, 2,000 requests of ten kinds (lengths, choices, pictures, tools, schemas, stop
strings, completions, responses), 64 at once; 30 % leave at random moments. Every request was asked
alone before.
Cost model: none; this is no timing, a busy machine does not matter.
Reading the result: `different` and `leaks` must be empty, `resident_growth` under 5 %.
Last record: records/soak.json.
"""

import argparse
import asyncio
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from soak_clients import made_up, soak

from halfbyte.bench import record as records
from halfbyte.child import free_port, served
from halfbyte.figures import Against, Figure
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=200)
    parser.add_argument(
        "--record", type=Path, default=ROOT / "benchmarks" / "records" / "soak.json"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "tiny"
        config = tiny_config(layers=2, vision=True)
        # Heads as wide as real models have them, so that the same kernels run.
        text = dataclasses.replace(config.text, vocab_size=800, head_dim=64)
        write_tiny_checkpoint(directory, config=dataclasses.replace(config, text=text))
        shutil.copy(ROOT / "tests" / "data" / "chat" / "tekken" / "tekken.json", directory)
        admin_port = free_port()
        flags = ("--admin-port", admin_port, "--max-model-len", 1024, "--kv-cache-tokens", 3072,
                 "--max-sequences", 32, "--access-log", Path(folder) / "access.jsonl")  # fmt: skip
        with served(directory, *flags, log=Path(folder) / "server.log") as server:
            asked = made_up(args.distinct, 0, "tiny")
            admin = f"http://127.0.0.1:{admin_port}"
            report = asyncio.run(soak(server.url, admin, asked, count=args.requests))
            status = server.end()
    for line in report.different[:5]:
        print(line)
    results = {
        "requests": args.requests,
        "distinct": args.distinct,
        "concurrent": 64,
        "outcomes": dict(report.outcomes),
        "kinds": dict(report.kinds),
        "different": len(report.different),
        "leaks": {name: list(pair) for name, pair in report.leaks().items()},
        "resident_growth": round(report.growth, 4),
        "before": report.before,
        "after": report.after,
        "preemptions": report.after["engine"]["preemptions"],
        "exit_status": status,
        "seconds": round(report.seconds, 1),
    }
    print(results)
    records.write(
        args.record,
        name="soak",
        question="64 clients at once, 30 % of whom leave: the same answers, nothing left over",
        command="python benchmarks/soak.py",
        figures=soak_figures(results),
        results=results,
        samples={"resident memory, bytes": report.resident_bytes},
    )
    is_whole = not report.different and not report.leaks() and report.growth < 0.05 and not status
    return 0 if is_whole else 1


def soak_figures(results: dict[str, Any]) -> list[Figure]:
    conditions = {"clients": results["concurrent"], "requests": results["requests"]}
    changed = 100 * results["different"] / results["requests"]
    bound = (Against("at most", 5, is_bound=True),)
    growth = 100 * results["resident_growth"]
    return [
        Figure("answers that changed under load", changed, "%", "tests", conditions),
        Figure("growth of resident memory", growth, "%", "tests", conditions, bound),
    ]


if __name__ == "__main__":
    sys.exit(main())
