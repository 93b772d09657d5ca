"""What a token mask adds to a decode step of the demo model on two cores.

Question: which share of a decode step does holding answers to a schema cost, alone and in a batch?

Method: the real engine, prompts of 64 tokens, 160 tokens a request, none of which may end it,
greedy and drawn with top-p. Held requests follow a nested schema with enums, numbers, bounded
strings and a pattern inside an array that cannot end before; the others run free. Both kinds take
turns (A B A B ...) in one process over the same engine; every step in which all requests decode is
timed. What the step waits for (asking, filling, applying, accepting) is timed inside the held
steps, too. The first round of each kind is a warm-up. The record says what others took of the
processors meanwhile; a run in which that is more than 5 % writes none.

Cost model: filling is 15 us at the median and 0.3 ms at the 99th percentile a sequence for 131k
tokens (chat-format notes); applying it reads V bits and V logits: 49,152 x 4 bytes, 10 us. Only
tokens that the mask refuses cost that; to ask for one is 1 us. A step of the demo model reads
100 MB of weights, about 10 ms.

With `OMP_WAIT_POLICY` as `halfbyte serve` sets it (decision 0028).

Reading the result: `share_of_step` is what the paired medians differ by, which also holds the
slower path through the sampler; `mask_share` only what was timed inside. The aim is 0.05 for
both; the figure is the larger.

Last record: benchmarks/records/mask_cost.json.

Run: OMP_WAIT_POLICY=PASSIVE PYTHONPATH=src
    python benchmarks/mask_cost.py build/demo/mixed --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.bench import record
from halfbyte.bench.idle import Watch, wait_until_quiet
from halfbyte.chat.grammar import GrammarCompiler
from halfbyte.chat.grammar_follow import GrammarMasks
from halfbyte.chat.grammar_masks import Mask
from halfbyte.chat.grammar_texts import json_schema_grammar
from halfbyte.chat.tokens import ChatFormat, load_chat
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.request import GenerationRequest, SamplingParams, TokensEvent
from halfbyte.engine.sampler import Sampler
from halfbyte.figures import Figure

RECORD = Path(__file__).parent / "records" / "mask_cost.json"
PROMPT_TOKENS, ANSWER_TOKENS = 64, 160
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 24},
        "kind": {"enum": ["customer", "supplier", "employee"]},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "score": {"type": "number", "minimum": 0, "maximum": 100},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "kind", "code", "score", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 100}


class TimedMask:
    """A mask that adds up what it takes."""

    def __init__(self, inner: Mask, clock: "Clock") -> None:
        self._inner, self._clock = inner, clock

    def allows(self, token_id: int) -> bool:
        started = time.perf_counter()
        allowed = self._inner.allows(token_id)
        self._clock.mask_s += time.perf_counter() - started
        return allowed

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        self._inner.fill(bitmask)

    def accept(self, token_id: int) -> None:
        started = time.perf_counter()
        self._inner.accept(token_id)
        self._clock.mask_s += time.perf_counter() - started

    def is_finished(self) -> bool:
        return self._inner.is_finished()


class Clock:
    """Seconds of masks in the step that runs."""

    def __init__(self) -> None:
        self.mask_s = 0.0
        self.num_fills = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time `Sampler._mask` - filling, and applying to the logits - while the body runs."""
        original = Sampler._mask

        def timed(sampler: Sampler, logits_V: torch.Tensor, request: GenerationRequest) -> None:
            started = time.perf_counter()
            original(sampler, logits_V, request)
            self.num_fills += 1
            self.mask_s += time.perf_counter() - started

        Sampler._mask = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            Sampler._mask = original  # type: ignore[method-assign]


def prompts(chat: ChatFormat, batch: int) -> list[tuple[int, ...]]:
    text = "List the people in our address book as JSON, one after the other, with all fields. "
    ids = chat.vocabulary.encode_text(text * 8)
    return [tuple(ids[number : number + PROMPT_TOKENS]) for number in range(batch)]


def decode(engine: Engine, requests: list[GenerationRequest], clock: Clock) -> list[list[float]]:
    """[seconds, seconds of masks] of each step in which every request decodes."""
    for request in requests:
        engine.add(request)
    steps = []
    while engine.has_work():
        clock.mask_s = 0.0
        started = time.perf_counter()
        events = engine.step()
        seconds = time.perf_counter() - started
        if sum(isinstance(event, TokensEvent) for event in events) == len(requests):
            steps.append([seconds, clock.mask_s])
    # The step that ends the prompts also gives a token to each.
    return steps[1:]


def measure(
    engine: Engine, chat: ChatFormat, batch: int, rounds: int, params: SamplingParams
) -> tuple[dict[str, list[float]], float]:
    """Samples, and which share of the held tokens needed a whole mask."""
    compiler, masks = GrammarCompiler(chat.vocabulary), GrammarMasks(chat.vocabulary)
    grammar = compiler.compile(json_schema_grammar(SCHEMA, lenient=False), "schema")
    ends = chat.vocabulary.eos_token_ids
    params = replace(
        params, max_tokens=ANSWER_TOKENS, ignore_eos=True, banned_token_ids=ends, seed=1
    )
    clock = Clock()
    samples: dict[str, list[float]] = {"free_ms": [], "held_ms": [], "mask_ms": []}
    with clock.watching():
        for number in range(rounds + 1):
            for kind in ("free", "held"):
                requests = [
                    GenerationRequest(
                        f"{kind}-{index}",
                        prompt,
                        params,
                        TimedMask(masks.mask(grammar, ends), clock) if kind == "held" else None,
                    )
                    for index, prompt in enumerate(prompts(chat, batch))
                ]
                steps = decode(engine, requests, clock)
                assert len(steps) == ANSWER_TOKENS - 1, f"{len(steps)} steps, an answer ended early"
                if number == 0:
                    continue
                samples[f"{kind}_ms"] += [seconds * 1e3 for seconds, _ in steps]
                if kind == "held":
                    samples["mask_ms"] += [seconds * 1e3 for _, seconds in steps]
    return samples, clock.num_fills / ((rounds + 1) * batch * ANSWER_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chat = load_chat(args.directory)
    config = EngineConfig(
        max_model_len=512,
        kv_cache_tokens=512 * max(args.batches),
        prefix_cache=False,
        target_gap_ms="none",
    )
    engine = Engine.load(args.directory, config)
    wait_until_quiet(300)
    watch = Watch()
    samples = {}
    results: dict[str, Any] = {"threads": args.threads, "vocabulary": engine.vocab_size}
    cases = [(batch, "greedy", SamplingParams(temperature=0.0)) for batch in args.batches]
    cases.append((args.batches[-1], "top-p", SamplingParams(temperature=0.7, top_p=0.9)))
    for batch, kind, params in cases:
        found, filled = measure(engine, chat, batch, args.rounds, params)
        free, held = statistics.median(found["free_ms"]), statistics.median(found["held_ms"])
        mask = statistics.mean(found["mask_ms"])
        share = held / free - 1
        name = f"batch_{batch}" + ("" if kind == "greedy" else "_top_p")
        results[name] = {
            "free_step_ms": round(free, 3),
            "held_step_ms": round(held, 3),
            "mask_ms_mean": round(mask, 4),
            "mask_ms_p99": round(sorted(found["mask_ms"])[int(0.99 * len(found["mask_ms"]))], 4),
            "share_of_step": round(share, 4),
            "mask_share": round(mask / free, 4),
            "tokens_with_a_whole_mask": round(filled, 4),
        }
        samples |= {f"{name}_{short}": values for short, values in found.items()}
        print(
            f"batch {batch}, {kind}: step {free:.2f} ms free, {held:.2f} ms held to a schema "
            f"({share:+.1%}); masks {mask * 1e3:.0f} us a step ({mask / free:.1%}), "
            f"{filled:.0%} of them whole"
        )
    usage = watch.usage()
    results["others_share"] = round(usage.foreign + usage.steal, 3)
    if not usage.is_quiet:
        raise SystemExit(f"no record: others took {usage.foreign + usage.steal:.0%} of the machine")
    record.write(
        args.out,
        name="mask_cost",
        question="Which share of a decode step does holding answers to a JSON schema cost?",
        command="OMP_WAIT_POLICY=PASSIVE PYTHONPATH=src python benchmarks/mask_cost.py "
        "build/demo/mixed "
        f"--threads {args.threads} --rounds {args.rounds}",
        figures=mask_figures(results),
        results=results,
        samples=samples,
    )


def mask_figures(results: dict[str, Any]) -> list[Figure]:
    """The larger of the two ways to see it, for each batch and way of choosing."""
    figures = []
    for name, found in results.items():
        if not name.startswith("batch_"):
            continue
        batch, _, kind = name.removeprefix("batch_").partition("_")
        conditions: dict[str, str | int | float] = {
            "users": int(batch),
            "sampling": "top-p" if kind else "greedy",
            "step without": f"{found['free_step_ms']:.1f} ms",
        }
        share = 100 * max(found["share_of_step"], found["mask_share"])
        figures.append(Figure("a schema's masks in a decode step", share, "%", "serving",
                              conditions))  # fmt: skip
    return figures


if __name__ == "__main__":
    main()
