"""guidellm: a short benchmark over made-up prompts, its statistics complete."""

import json
import subprocess
from pathlib import Path

from cases import BASE, MODEL, case, main

NUM_REQUESTS = 4


def bench(route):
    prompts = Path("prompts.jsonl")
    prompts.write_text(6 * (json.dumps({"prompt": "@say One, two, three."}) + "\n"))
    done = subprocess.run(
        ["guidellm", "run", "--disable-console",
         "--backend", f"kind=openai_http,target={BASE},model={MODEL},request_format={route}",
         "--profile", "kind=synchronous",
         "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
         "--data", f"kind=json_file,path={prompts}", "--output", "kind=json,path=out.json"],
        stdin=subprocess.DEVNULL, text=True, capture_output=True, timeout=250,
    )
    assert done.returncode == 0, done.stderr[-800:] + done.stdout[-800:]
    (made,) = json.loads(Path("out.json").read_text())["benchmarks"]
    totals = made["metrics"]["request_totals"]
    assert totals["successful"] == NUM_REQUESTS and not totals["errored"], totals
    told = made["metrics"]["output_token_count"]["successful"]
    # The shortest answer of the scripted model: "Hello." and the token that ends it.
    assert told["min"] >= 3, told
    return f"{totals['successful']} requests, {told['mean']:g} tokens each"


@case("chat")
def chat():
    return bench("/v1/chat/completions")


@case("text")
def text():
    return bench("/v1/completions")


main()
