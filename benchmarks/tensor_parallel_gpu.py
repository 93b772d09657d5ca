"""One rank against several on one machine: same tokens, time of a decode step, time of a prompt.

Question: what does spreading a model over N GPUs bring to a decode step at several batch sizes and
to a long prompt, and are the answers the same?

Method: the engine as `halfbyte serve` runs it, N = 1 and N = --size after one another in one
process (two sets of weights may not fit), --rounds times in turn. Greedy, prompts of --prompt
random ids. Per batch size: one warm-up, then 64 tokens for each sequence; timed is each engine step
after the prompts are in, and the step that takes a prompt of --long ids alone. Answers of the last
round are compared and the equal ones counted.

Cost model: a rank streams 1/N of the weights a step; 2 sums a layer of batch x width x 4 bytes,
one of batch x width x 2 for the embedding, and batch x vocabulary x 4 x (N - 1) / N to rank 0. At
batch 1 a sum's latency decides.

Reading the result: t(1) / t(N) near N for large models means that sums and messages hide; host time
that grows with N shows as a floor that no batch size changes. Answers part where two tokens are
nearly tied, more often after more tokens; equal beginnings tell more than the count. With
`--device cpu` the ranks are processes of one CPU, for a look at the script alone.

Last record: benchmarks/records/tensor_parallel_gpu.json, 16 layers of the big geometry
(`tests/cuda_checks.py` writes them: codes of random bytes, whose answers are easy to agree on).

Run on a machine with N GPUs, with any checkpoint that fits one of them:
    PYTHONPATH=src python benchmarks/tensor_parallel_gpu.py DIR --size 2 --out record.json
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.bench import record
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.generate import generate
from halfbyte.engine.request import GenerationRequest, SamplingParams, TokensEvent
from halfbyte.figures import Against, Figure

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass
class Measured:
    """What one load of the engine gave."""

    load_s: float = 0.0
    decode_ms: dict[int, list[float]] = field(default_factory=dict)
    prompt_ms: list[float] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)


def random_ids(engine: Engine, count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, engine.vocab_size, (count,), generator=generator).tolist())


def run(engine: Engine, prompts: list[tuple[int, ...]]) -> tuple[list[float], list[list[int]]]:
    """Milliseconds of the steps that only decode, and the answers."""
    found: list[list[int]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.add(GenerationRequest(str(index), prompt, GREEDY))
    steps = []
    while engine.has_work():
        is_decoding = all(found)
        started = time.perf_counter()
        events = engine.step()
        if is_decoding:
            steps.append((time.perf_counter() - started) * 1e3)
        for event in events:
            if isinstance(event, TokensEvent):
                found[int(event.request_id)] += event.token_ids
    return steps, found


def measure(args: argparse.Namespace, size: int) -> Measured:
    started = time.perf_counter()
    config = EngineConfig(
        device=args.device,
        kv_cache="fp8",
        max_model_len=max(args.long, args.prompt + NUM_TOKENS) + 1,
        max_sequences=max(args.batches),
        max_batch_tokens=max(2048, *args.batches),
        kv_cache_tokens=args.cache_tokens,
        prefix_cache=False,
        target_gap_ms="none",
        tensor_parallel_size=size,
    )
    engine = Engine.load(args.directory, config)
    measured = Measured(load_s=time.perf_counter() - started)
    try:
        for batch in args.batches:
            prompts = [random_ids(engine, args.prompt, seed) for seed in range(batch)]
            run(engine, prompts)
            steps, answers = run(engine, prompts)
            measured.decode_ms[batch] = steps
            measured.answers |= {f"{batch}/{i}": ids for i, ids in enumerate(answers)}
        long = random_ids(engine, args.long, 999)
        for _ in range(3):
            params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
            started = time.perf_counter()
            generate(engine, [GenerationRequest("long", long, params)])
            measured.prompt_ms.append((time.perf_counter() - started) * 1e3)
    finally:
        engine.close()
    return measured


def rank_figures(results: dict[str, Any], batches: Sequence[int], size: int) -> list[Figure]:
    """A decode step of each batch and a prompt, against one GPU."""
    medians, layers = results["medians"], results["config"]["layers"]
    conditions = {"GPUs": size, "layers": layers}

    def figure(name: str, what: str, topic: Literal["decode", "prefill"], **more: int) -> Figure:
        one, many = (medians[f"{what}, {n} ranks, ms"] for n in (1, size))
        return Figure(name, many, "ms", topic, {**conditions, **more}, (Against("1 GPU", one),))

    steps = [figure("decode step", f"decode {b}", "decode", batch=b) for b in batches]
    return [*steps, figure("a long prompt", "prompt", "prefill")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="a checkpoint")
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--cache-tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write a record")
    args = parser.parse_args()
    samples: dict[str, list[float]] = {}
    answers: dict[int, dict[str, list[int]]] = {}
    for _ in range(args.rounds):
        for size in (1, args.size):
            found = measure(args, size)
            answers[size] = found.answers
            samples.setdefault(f"load, {size} ranks, s", []).append(found.load_s)
            samples.setdefault(f"prompt, {size} ranks, ms", []).extend(found.prompt_ms)
            for batch, steps in found.decode_ms.items():
                samples.setdefault(f"decode {batch}, {size} ranks, ms", []).extend(steps)
    medians = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    one, many = answers[1], answers[args.size]
    num_same = sum(one[name] == many[name] for name in one)
    for name, value in medians.items():
        print(f"{name}: {value}")
    for batch in args.batches:
        ratio = medians[f"decode {batch}, 1 ranks, ms"]
        ratio /= medians[f"decode {batch}, {args.size} ranks, ms"]
        print(f"decode {batch}: {ratio:.2f}x with {args.size} ranks")
    print(f"{num_same} of {len(one)} answers equal in all {NUM_TOKENS} tokens")
    if args.out is not None:
        results = {
            "config": {"layers": Checkpoint.open(args.directory).config.text.num_layers},
            "medians": medians,
            "equal_answers": num_same,
            "answers": len(one),
        }
        record.write(
            args.out,
            name="tensor_parallel_gpu",
            question="a decode step and a prompt on several GPUs against one",
            command="PYTHONPATH=src python benchmarks/tensor_parallel_gpu.py "
            f"{args.directory.name} --size {args.size} --rounds {args.rounds}",
            figures=rank_figures(results, args.batches, args.size),
            results=results,
            samples=samples,
        )


if __name__ == "__main__":
    main()
