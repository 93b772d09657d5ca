"""guidellm: a short benchmark over made-up prompts, its statistics complete."""

import json
import os
import subprocess
from pathlib import Path

from cases import BASE, MODEL, case, main

TOKENIZER = os.environ.get("HALFBYTE_TOKENIZER", "")


def bench(kind):
    done = subprocess.run(
        ["guidellm", "benchmark", "run", "--target", BASE, "--model", MODEL, "--request-type",
         kind, "--profile", "synchronous", "--max-requests", "4", "--data",
         json.dumps([{"prompt": "@say One, two, three."}] * 6), "--output-path", "out.json"],
        stdin=subprocess.DEVNULL, text=True, capture_output=True, timeout=250,
    )
    assert done.returncode == 0, done.stderr[-800:] + done.stdout[-800:]
    report = json.loads(Path("out.json").read_text())
    made = report["benchmarks"][0]["metrics"]["request_totals"]
    assert made["successful"] >= 3 and not made["errored"], made


@case("chat")
def chat():
    bench("chat_completions")


@case("text")
def text():
    bench("text_completions")


main()
