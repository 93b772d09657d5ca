"""`python -m pocket.arms`: what quantized arms lose against the source, item by item, in minutes.

The suite's items of seed 0 are asked of one engine after another in this process, greedily, without
a server: quicker than `halfbyte evaluate --suite pocket`, for who chooses a recipe, a method or a
mode. The record holds the right answers of each arm and the paired difference from the first one,
in points, with its 90 % interval.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.chat.mistral_format import load_mistral_format
from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.engine.generate import generate
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.evals.judging.stats import paired_difference
from pocket import suite
from pocket.evaluate import (
    MAX_ANSWER_TOKENS,
    add_engine_flags,
    answer_of,
    config_of,
    prompt_of,
)
from pocket.export import sha256

# Kinds that have no thought, as the suite asks them.
_PLAIN = ("programs", "instructions")


def scores(
    checkpoint: Path, config: EngineConfig, kinds: Mapping[str, int]
) -> dict[str, list[int]]:
    """By kind: 1 for each item that is answered right, otherwise 0."""
    chat = load_mistral_format(checkpoint / "tekken.json")
    engine = Engine.load(checkpoint, config)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    found: dict[str, list[int]] = {}
    for kind, count in kinds.items():
        samples = suite.samples(kind, count, 0)
        effort = "none" if kind in _PLAIN else "high"
        items = [replace(sample.fields["item"], effort=effort) for sample in samples]
        prompts = [prompt_of(one, chat) for one in items]
        answers = generate(
            engine,
            (
                GenerationRequest(str(number), prompt, params, images=images)
                for number, (prompt, images) in enumerate(prompts)
            ),
        )
        texts = [
            answer_of(answer.token_ids, one, chat).content
            for answer, one in zip(answers.values(), items, strict=True)
        ]
        found[kind] = [
            int(suite.grade(sample, text).value == 1.0)
            for sample, text in zip(samples, texts, strict=True)
        ]
    engine.close()
    return found


def against(
    baseline: Mapping[str, Sequence[int]], arm: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """By kind: right answers, and the paired difference from the baseline with its interval."""
    rows = {}
    for kind, right in arm.items():
        first = baseline[kind]
        found = paired_difference([float(x) for x in first], [float(x) for x in right])
        rows[kind] = {
            "items": len(right),
            "right": sum(right),
            "difference": [round(100 * value, 2) for value in (found.mean, found.low, found.high)],
            "lost": sum(x > y for x, y in zip(first, right, strict=True)),
            "won": sum(x < y for x, y in zip(first, right, strict=True)),
        }
    return rows


def _kind(text: str) -> tuple[str, int]:
    kind, _, count = text.partition("=")
    if kind not in suite.KINDS or not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no KIND=ITEMS of {', '.join(suite.KINDS)}")
    return kind, int(count)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pocket.arms", description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="the source first, then arms")
    parser.add_argument("--items", type=_kind, nargs="+", required=True, metavar="KIND=ITEMS")
    parser.add_argument("--out", type=Path, required=True, help="the record to write (JSON)")
    add_engine_flags(parser)
    args = parser.parse_args(arguments)
    config = config_of(args, max_model_len=16384, kv_cache_tokens=65536)
    record: dict[str, Any] = {
        "model.safetensors": sha256(args.checkpoints[0] / "model.safetensors"),
        "mode": args.mode,
        "device": args.device,
        "products": args.products,
        "arms": {},
    }
    baseline: dict[str, list[int]] = {}
    for checkpoint in args.checkpoints:
        found = scores(checkpoint, config, dict(args.items))
        baseline = baseline or found
        record["arms"][checkpoint.name] = rows = against(baseline, found)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        for kind, row in rows.items():
            mean, low, high = row["difference"]
            print(
                f"{checkpoint.name}, {kind}: {row['right']} of {row['items']} right, "
                f"{mean:+.2f} points ({low:+.2f} to {high:+.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
