"""What the harness costs: items per second and memory against an endpoint that answers at once.

Question: can `halfbyte evaluate` keep a fast server busy, and does a run of MMLU-Pro's size fit in
constant memory?
Method: 12,000 made-up questions in MMLU-Pro's columns, one answer each, against a stub on this
machine that replies without thinking, with texts as long as a reasoning model's (2 kB of answer,
10 kB of reasoning), so that whatever keeps answers in memory shows. One run, no warm-up (start-up
is part of the time). Memory is the resident set of the evaluating process, sampled every second;
flat means that the median of the last third exceeds that of the middle third by less than 5 %.
Cost model: per item one HTTP exchange, one grading, two journal lines, one sample in inspect-ai's
log; nothing is kept per item but its score and what inspect-ai lists at the end, no texts.
Reading the result: at least 40 items/s on two cores (the stub takes part of one). A server of 128B
parameters ends a few items per second, so 40 leaves the harness idle most of the time.
Last record: benchmarks/records/evals_overhead.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.bench import record
from halfbyte.figures import Figure

STUB = """
import asyncio, json
answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "stub",
          "choices": [{"index": 0, "finish_reason": "stop", "message": {
              "role": "assistant", "content": "Because it is so. " * 100 + "\\nAnswer: A",
              "reasoning_content": "Hm, let me see. " * 600}}],
          "usage": {"prompt_tokens": 200, "completion_tokens": 3000, "total_tokens": 3200}}
models = {"object": "list", "data": [{"id": "stub", "object": "model"}]}
def packed(body):
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: {len(data)}"
    return head.encode() + b"\\r\\n\\r\\n" + data
ANSWER, MODELS = packed(answer), packed(models)
async def handle(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            size = [int(l.split(b":")[1]) for l in head.lower().split(b"\\r\\n")
                    if l.startswith(b"content-length:")]
            if size:
                await reader.readexactly(size[0])
            writer.write(MODELS if b"/models " in head else ANSWER)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def write_items(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    topics = ["math", "physics", "law", "history"]
    with (folder / "made_up.jsonl").open("w") as file:
        for index in range(count):
            row = {
                "question_id": index,
                "question": f"Made-up question {index}: " + "which of these holds? " * 20,
                "options": [f"option {index}.{k}" for k in range(10)],
                "answer": "ABCDEFGHIJ"[index % 10],
                "category": topics[index % 4],
            }
            file.write(json.dumps(row) + "\n")


def watch_memory(pid: int, samples: list[tuple[float, int]], stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(1.0):
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            return
        samples.append((round(time.monotonic() - started, 1), pages * os.sysconf("SC_PAGE_SIZE")))


def measure(count: int, concurrency: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        data, out = Path(place, "data"), Path(place, "run")
        write_items(data / "mmlu_pro", count)
        stub = subprocess.Popen([sys.executable, "-c", STUB], stdout=subprocess.PIPE, text=True)
        assert stub.stdout is not None
        url = f"http://127.0.0.1:{stub.stdout.readline().strip()}"
        command = [
            sys.executable, "-m", "halfbyte", "evaluate", url, "--suite", "mmlu_pro",
            "--data", str(data), "--out", str(out), "--concurrency", str(concurrency),
        ]  # fmt: skip
        samples: list[tuple[float, int]] = []
        stop = threading.Event()
        started = time.monotonic()
        try:
            child = subprocess.Popen(command)
            watcher = threading.Thread(target=watch_memory, args=(child.pid, samples, stop))
            watcher.start()
            status = child.wait()
            wall_s = time.monotonic() - started
        finally:
            stop.set()
            watcher.join()
            stub.terminate()
            stub.wait()
        assert status == 0, status
        result = json.loads((out / "run.json").read_text())["benchmarks"]["mmlu_pro"]
        assert result["items"] == count and not result["missing"], result
    third = len(samples) // 3
    middle = statistics.median(rss for _, rss in samples[third : 2 * third])
    last = statistics.median(rss for _, rss in samples[2 * third :])
    return {
        "items": count,
        "concurrency": concurrency,
        "wall_s": round(wall_s, 2),
        "items_per_s": round(count / wall_s, 1),
        "resident_bytes_middle_third": middle,
        "resident_bytes_last_third": last,
        "memory_growth": round(last / middle - 1, 4),
        "samples_s_bytes": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--record", type=Path, help="write the record here")
    args = parser.parse_args()
    results = measure(args.items, args.concurrency)
    samples = {"resident_bytes": [size for _, size in results.pop("samples_s_bytes")]}
    question = "what does the evaluation harness cost: items/s and memory over 12,000 items?"
    command = " ".join(["python", *sys.argv])
    if args.record:
        record.write(args.record, name="evals_overhead", question=question, command=command,
                     figures=harness_figures(results), results={**results, **versions()},
                     samples=samples)  # fmt: skip
    print(json.dumps(results, indent=1))


def harness_figures(results: dict[str, Any]) -> list[Figure]:
    conditions = {"items": results["items"], "concurrency": results["concurrency"]}
    growth = 100 * results["memory_growth"]
    return [
        Figure("evaluation against a stub", results["items_per_s"], "items/s", "evaluation",
               conditions),
        Figure("growth of resident memory", growth, "%", "evaluation", conditions),
    ]  # fmt: skip


def versions() -> dict[str, str]:
    return {f"{name} version": version(name) for name in ("inspect-ai", "openai")}


if __name__ == "__main__":
    main()
