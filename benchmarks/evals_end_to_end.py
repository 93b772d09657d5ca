"""The whole suite on a small model served by us: two arms, comparison, report, card.

Question: does the path from two checkpoints to a model card work, and how long does it take on a
CPU?
Method: `halfbyte evaluate` for the baseline and the candidate (the server is started by it), all
seven benchmarks at ten items, then `compare-evals`, `report`, `card`. Items: those of --data where
it has them, otherwise made-up ones from tests/data/evals (which measure nothing). MMMU Pro's are
pages drawn here in the size and shape of the set's vision setting, after those of --data that have
one. AA-LCR's judge is a stand-in that looks for the official answer in the candidate's, named so in
the record.
The demo's model takes text only; with an untrained tower it takes images, so that they go through
encoder, merger, projector and prefill. Its answers about them are chance, as its NOTE.txt says, and
with it report, card and record. The two checkpoints are made by
    halfbyte import smollm2 build/images/bf16-text
    halfbyte import build/images/bf16-text build/images/bf16 --untrained-tower
    halfbyte import build/images/bf16 build/images/fp8 --to mistral-fp8
    halfbyte quantize build/images/fp8 build/images/mixed --recipe medium-3.5
Cost model: 7 benchmarks x 10 items x at most --max-tokens output tokens per arm; an image is 272
tokens at most, whatever its size.
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
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from halfbyte.bench import record
from halfbyte.figures import Against, Figure

REPOSITORY = Path(__file__).parents[1]
MADE_UP = REPOSITORY / "tests" / "data" / "evals"
FOLDERS = ("mmlu_pro", "gpqa_diamond", "aa_lcr", "scicode", "aime2025", "ifbench")
# Kept data has no GPQA and of AA-LCR no documents.
MADE_UP_FOR = ("gpqa_diamond", "aa_lcr")
# What a page of MMMU-Pro's vision setting typically is; the one kept is exactly this.
PAGE_PIXELS = (1856, 1620)
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
    make_pages(target / "mmmu_pro" / "images", data)


def make_pages(folder: Path, data: Path | None) -> None:
    """Ten items of MMMU-Pro's vision setting: kept ones that have a page, else drawn ones."""
    folder.mkdir(parents=True)
    kept: list[dict[str, Any]] = []
    if data is not None and (data / "mmmu_pro" / "images").is_dir():
        images = data / "mmmu_pro" / "images"
        lines = (images / "items.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [row for line in lines if "vision_image" in (row := json.loads(line))]
        for row in kept:
            page = row["vision_image"]
            (folder / page).symlink_to((images / page).resolve())
    drawn = [draw_page(folder, number) for number in range(len(kept), 10)]
    rows = [{"id": str(i), **row} for i, row in enumerate([*kept, *drawn])]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "items.jsonl").write_text(text, encoding="utf-8")
    note = (
        f"{len(kept)} of the set's items and {len(drawn)} made-up pages: the score measures nothing"
    )
    (folder.parent / "NOTE.txt").write_text(note + "\n")


def draw_page(folder: Path, number: int) -> dict[str, Any]:
    """A made-up question as a page with a figure and ten options, as a row of the set."""
    sides = 3 + number
    options = [str(value) for value in range(3, 13)]
    page = Image.new("RGB", PAGE_PIXELS, "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=40)
    draw.text((80, 60), "How many corners has the figure?", fill="black", font=font)
    draw.regular_polygon((928, 560, 380), sides, outline="black", width=6)
    for index, option in enumerate(options):
        line = f"({'ABCDEFGHIJ'[index]}) {option}"
        draw.text(
            (80 + 850 * (index % 2), 1020 + 110 * (index // 2)), line, fill="black", font=font
        )
    name = f"page_{number}.png"
    page.save(folder / name)
    answer = "ABCDEFGHIJ"[options.index(str(sides))]
    return {"vision_image": name, "options": options, "answer": answer, "subject": "Made up"}


def run(*arguments: str) -> int:
    print("+ halfbyte", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", "halfbyte", *arguments], check=False).returncode


def scores(benchmarks: dict[str, Any]) -> dict[str, Any]:
    """Beside the time: whether each of the seven was measured, and with what interval."""
    keys = ("status", "items", "score", "low", "high", "causes", "prompt_tokens", "wall_s")
    return {name: {key: row[key] for key in keys} for name, row in benchmarks.items()}


def run_figures(results: dict[str, Any]) -> list[Figure]:
    conditions = {"benchmarks": results["benchmarks_compared"], "arms": "2 small ones"}
    goal = (Against("at most", 20, is_bound=True),)
    name = "evaluation, report and card"
    return [Figure(name, results["wall_s"] / 60, "min", "evaluation", conditions, goal)]


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
    records = {arm: json.loads((args.out / arm / "run.json").read_text()) for arm in arms}
    results: dict[str, Any] = {
        "wall_s": wall_s,
        **{f"{step}_s": seconds for step, seconds in steps.items()},
        "verdict": comparison["verdict"],
        "benchmarks_compared": len(comparison["benchmarks"]),
        "macro_difference": comparison["macro"]["mean"],
        "macro_low": comparison["macro"]["low"],
        "macro_high": comparison["macro"]["high"],
        "notes_of_checkpoints": {arm: r["checkpoint"].get("note") for arm, r in records.items()},
        "scores": {arm: scores(r["benchmarks"]) for arm, r in records.items()},
    }
    if args.record:
        question = "do two checkpoints become a report and a card, and how long does it take?"
        command = (
            "python benchmarks/evals_end_to_end.py build/images/fp8 build/images/mixed OUT "
            "--data ITEMS --record benchmarks/records/evals_end_to_end.json"
        )
        record.write(args.record, name="evals_end_to_end", question=question, command=command,
                     figures=run_figures(results), results=results)  # fmt: skip
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
