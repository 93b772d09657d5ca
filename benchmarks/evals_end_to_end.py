"""The whole suite on a small model served by us: two arms, comparison, report, card.

Question: does the path from two checkpoints to a model card work, and how long does it take on a
CPU?
Method: `halfbyte evaluate` for the baseline and the candidate (the server is started by it), all
seven benchmarks at ten items, then `compare-evals`, `report`, `card`. Items: those of --data where
it has them, otherwise made-up ones from tests/data/evals (which measure nothing). AA-LCR's judge is
a stand-in that looks for the official answer in the candidate's, named so in the record.
Cost model: 7 benchmarks x 10 items x at most --max-tokens output tokens per arm.
Reading the result: at most 20 minutes; the scores of a 135M model are near chance, intervals of ten
items are tens of points wide, and the verdict can only be INCONCLUSIVE (or NO-GO), never GO.
Last record: benchmarks/records/evals_end_to_end.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from halfbyte.bench import record

REPOSITORY = Path(__file__).parents[1]
MADE_UP = REPOSITORY / "tests" / "data" / "evals"
FOLDERS = ("mmlu_pro", "gpqa_diamond", "aa_lcr", "scicode", "aime2025", "ifbench", "mmmu_pro")
# Kept data has no GPQA, of AA-LCR no documents, of MMMU-Pro three items.
MADE_UP_FOR = ("gpqa_diamond", "aa_lcr", "mmmu_pro")
JUDGE = "stand-in-substring-judge"


class Judge(BaseHTTPRequestHandler):
    """Answers CORRECT if the official answer occurs in the candidate's."""

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": JUDGE, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        official = text.split("OFFICIAL ANSWER: ")[1].split("\n")[0].strip().lower()
        candidate = text.split("CANDIDATE ANSWER to assess: ")[1].lower()
        verdict = "CORRECT" if official in candidate else "INCORRECT"
        message = {"role": "assistant", "content": verdict}
        self._send(
            {"id": "j", "object": "chat.completion", "created": 1, "model": JUDGE,
             "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
             "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        )  # fmt: skip

    def _send(self, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def gather_items(target: Path, data: Path | None) -> None:
    for name in FOLDERS:
        own = data / name if data is not None and name not in MADE_UP_FOR else None
        choices = [own, MADE_UP / name, MADE_UP / "made_up" / name]
        source = next(p for p in choices if p is not None and p.is_dir())
        (target / name).symlink_to(source.resolve())


def run(*arguments: str) -> int:
    print("+ halfbyte", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", "halfbyte", *arguments], check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", default="10")
    parser.add_argument("--max-tokens", default="160")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    judge = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=judge.serve_forever, daemon=True).start()
    steps: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as items:
        gather_items(Path(items), args.data)
        arms = {args.baseline.name: args.baseline, args.candidate.name: args.candidate}
        for arm, folder in arms.items():
            begun = time.monotonic()
            arguments = {
                "--suite": "seed",
                "--limit": args.limit,
                "--repeats": "1",
                "--max-tokens": args.max_tokens,
                # The demo model has none, and our server refuses what a model does not know.
                "--reasoning-effort": "",
                "--data": items,
                "--out": str(args.out / arm),
                "--arm": arm,
                "--judge": f"http://127.0.0.1:{judge.server_port}",
                "--judge-revision": "benchmarks/evals_end_to_end.py",
                "--code-python": sys.executable,
                "--code-wall-s": "60",
                "--concurrency": "16",
            }
            flat = [word for pair in arguments.items() for word in pair]
            status = run("evaluate", str(folder), *flat, "--skip-unscorable")
            assert status == 0, status
            steps[f"evaluate {arm}"] = round(time.monotonic() - begun, 1)
    runs = [str(args.out / arm) for arm in arms]
    run("compare-evals", *runs, "--out", str(args.out / "comparison.json"))
    assert run("report", *runs, "--out", str(args.out / "report.html")) == 0
    card = ["card", str(args.out / "card"), "--checkpoint", str(args.candidate)]
    assert run(*card, "--runs", *runs, "--base-model", "HuggingFaceTB/SmolLM2-135M-Instruct") == 0
    wall_s = round(time.monotonic() - started, 1)
    comparison = json.loads((args.out / "comparison.json").read_text())
    results = {
        "wall_s": wall_s,
        **{f"{step}_s": seconds for step, seconds in steps.items()},
        "verdict": comparison["verdict"],
        "benchmarks_compared": len(comparison["benchmarks"]),
        "macro_difference": comparison["macro"]["mean"],
        "macro_low": comparison["macro"]["low"],
        "macro_high": comparison["macro"]["high"],
    }
    if args.record:
        question = "do two checkpoints become a report and a card, and how long does it take?"
        command = "python benchmarks/evals_end_to_end.py FP8 MIXED OUT --data ITEMS"
        record.write(args.record, name="evals_end_to_end", question=question, command=command,
                     results=results)  # fmt: skip
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
