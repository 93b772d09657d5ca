"""`python -m pocket.speed`: how fast Pocket loads and answers on this machine's processors.

Question: does it load within 2 s, answer with 60 tokens a second alone and with 500 in batches of
32? Method: the engine without a server, prompts of 128 random tokens, answers of 128, greedy, ends
ignored, no prefix cache; medians of several rounds after a warm-up. Beside the wall's tokens a
second stand those of a processor's second, all threads together: what others do to the machine
changes these little, and with one thread they are what an idle processor would give.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from random import Random

import torch

from halfbyte.bench.cpu_decode import Ours, Prompt
from halfbyte.bench.idle import Watch
from halfbyte.bench.record import machine

PROMPT_TOKENS = NEW_TOKENS = 128
CONCURRENT = 32


def prompts_of(count: int, vocab_size: int) -> list[Prompt]:
    """Random tokens, none of them a control token."""
    rng = Random(0)
    ids = range(64, vocab_size)
    return [tuple(rng.choices(ids, k=PROMPT_TOKENS)) for _ in range(count)]


def measure(
    directory: Path, rounds: int, new_tokens: int = NEW_TOKENS, concurrent: int = CONCURRENT
) -> dict[str, float]:
    """Medians by name: seconds to load, tokens a second."""
    started = time.perf_counter()
    ours = Ours(
        directory, prompt_tokens=PROMPT_TOKENS, new_tokens=new_tokens, concurrent=concurrent
    )
    samples: dict[str, list[float]] = {"load_s": [time.perf_counter() - started]}
    prompts = prompts_of(concurrent, ours.engine.vocab_size)
    ours.answer(prompts[0], 4)
    for number in range(rounds):
        prompt = prompts[number % concurrent]
        used = time.process_time()
        timing = ours.answer(prompt, new_tokens)
        used = time.process_time() - used
        noted = {
            "prefill": PROMPT_TOKENS / timing.prefill_s,
            "decode": (new_tokens - 1) / timing.decode_s,
            "alone_per_processor_s": new_tokens / used,
        }
        used = time.process_time()
        steady, total = ours.answer_together(prompts, new_tokens)
        used = time.process_time() - used
        noted[f"decode_of_{concurrent}"] = steady
        noted[f"{concurrent}_with_prompts"] = total
        noted[f"{concurrent}_per_processor_s"] = concurrent * new_tokens / used
        for name, value in noted.items():
            samples.setdefault(name, []).append(value)
    ours.engine.close()
    return {name: round(statistics.median(values), 3) for name, values in samples.items()}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pocket.speed", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the record to write (JSON)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--users", type=int, default=CONCURRENT, help="at once (%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    watch = Watch()
    found = measure(args.checkpoint, args.rounds, args.answer_tokens, args.users)
    usage = watch.usage()
    record = {
        "checkpoint": args.checkpoint.name,
        "threads": args.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": args.answer_tokens,
        "others_share": round(usage.foreign + usage.steal, 3),
        "machine": machine(),
        "medians": found,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name}: {value:g}")
    print(f"others took {record['others_share']:.0%} of the machine")


if __name__ == "__main__":
    main()
