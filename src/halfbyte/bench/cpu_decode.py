"""Decode and prefill on this machine's processors, against transformers on the same weights.

Question: how many tokens a second does the engine decode at batch 1 and with 16 requests at
    once, and how fast does it take a prompt, compared with transformers (bf16) and, if installed,
    llama.cpp?
Method: prompts of 512 random tokens, 128 new tokens, greedy, ends ignored. One warm-up of each,
    then `repeats` rounds, each running every contestant in turn, so that drift meets all alike.
    Prefill is the time from the prompt to the first token; decode is (new tokens - 1) over the
    time from the first to the last. 16 at once: tokens a second from when all have their first
    token until the first is done, and over everything. Medians. What else ran on the machine is
    measured and recorded; a disturbed run is refused.
Cost model: a token reads every weight once (269 MB in bf16, 134 MB mixed) and takes 0.27 GFLOP; at
    10 GB/s of memory rate that is 27 and 13 ms, at the caches' rate less. Around it run some 240
    operations, which cost as much in plain torch as the products.
Reading the result: ratios of one run mean something, tokens a second only on this machine. The
    bars are 1.5x transformers at batch 1, 6x its single stream with 16, 1.0x in prefill.
Last record: benchmarks/records/cpu_decode.json
"""

import importlib.util
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from halfbyte.bench import record as records
from halfbyte.bench.idle import MachineUse, Watch, wait_until_quiet
from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.engine.generate import steps
from halfbyte.engine.request import GenerationRequest, SamplingParams, TokensEvent
from halfbyte.errors import CapacityError, UnsupportedError
from halfbyte.figures import Against, Figure
from halfbyte.log import logger

PROMPT_TOKENS = 512
NEW_TOKENS = 128
CONCURRENT = 16
PEER = "transformers"
# What is timed with many at once -> the name of its figure.
_NAMES = {f"{CONCURRENT} with prompts": "decode, prompts included"}
Prompt = tuple[int, ...]


class Timing(NamedTuple):
    """One answer: seconds to its first token, and from there to its last."""

    prefill_s: float
    decode_s: float


class Contestant(Protocol):
    """A program that generates tokens greedily, so that its speed can be compared."""

    def answer(self, prompt: Prompt, new_tokens: int) -> Timing:
        """Generate exactly so many tokens and time them."""
        ...


class Ours:
    """The engine, without a prefix cache, which would make repeats free."""

    def __init__(
        self,
        directory: Path,
        *,
        prompt_tokens: int = PROMPT_TOKENS,
        new_tokens: int = NEW_TOKENS,
        concurrent: int = CONCURRENT,
    ) -> None:
        """Load a checkpoint, with room for so many answers of such sizes at once."""
        length = prompt_tokens + new_tokens
        config = EngineConfig(
            max_model_len=length,
            max_sequences=concurrent,
            kv_cache_tokens=(length + 16) * concurrent,
            prefix_cache=False,
            # Throughput: a batch of prompts is worked in before anyone's answer goes on.
            target_gap_ms="none",
        )
        self.engine = Engine.load(directory, config)

    def answer(self, prompt: Prompt, new_tokens: int) -> Timing:
        """Generate one answer with nothing else running; returns its times."""
        start = time.perf_counter()
        self.engine.add(_request("0", prompt, new_tokens))
        first = 0.0
        for events in steps(self.engine):
            if events and not first:
                first = time.perf_counter()
        return Timing(first - start, time.perf_counter() - first)

    def answer_together(self, prompts: Sequence[Prompt], new_tokens: int) -> tuple[float, float]:
        """Tokens a second while all generate, and over everything, prompts included."""
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self.engine.add(_request(str(index), prompt, new_tokens))
        started: set[str] = set()
        num_steady, steady_from, steady_to = 0, 0.0, 0.0
        for events in steps(self.engine):
            tokens = [event for event in events if isinstance(event, TokensEvent)]
            if len(started) < len(prompts):
                started.update(event.request_id for event in tokens)
                steady_from = time.perf_counter()
            elif self.engine.stats().running == len(prompts):
                num_steady += sum(len(event.token_ids) for event in tokens)
                steady_to = time.perf_counter()
        if not num_steady:
            raise CapacityError(f"{len(prompts)} answers never ran at the same time")
        total = len(prompts) * new_tokens / (time.perf_counter() - start)
        return num_steady / (steady_to - steady_from), total


class Transformers:
    """transformers' own model class and dynamic cache, in bf16."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM  # an oracle, never a dependency

        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        self._model.eval()

    @torch.inference_mode()
    def answer(self, prompt: Prompt, new_tokens: int) -> Timing:
        """Generate one answer; a token is read back each step, as generation has to."""
        start = time.perf_counter()
        found = self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        token = found.logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            found = self._model(token, past_key_values=found.past_key_values, use_cache=True)
            token = found.logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
        return Timing(first - start, time.perf_counter() - first)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file of the same model."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp  # optional: an oracle, never a dependency

        self._model: Any = llama_cpp.Llama(
            str(file),
            n_ctx=PROMPT_TOKENS + NEW_TOKENS + 8,
            n_batch=PROMPT_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def answer(self, prompt: Prompt, new_tokens: int) -> Timing:
        """Generate one answer by low-level calls, so that the prompt is timed apart."""
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(list(prompt))
        token = self._model.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            self._model.eval([token])
            token = self._model.sample(temp=0.0)
        return Timing(first - start, time.perf_counter() - first)


@dataclass(frozen=True, slots=True)
class CpuMeasurement:
    """Medians by contestant, every sample, and how quiet the machine was.

    tokens_per_s  contestant -> figure -> tokens a second
    """

    tokens_per_s: dict[str, dict[str, float]]
    samples: dict[str, list[float]]
    usage: MachineUse

    def table(self) -> str:
        """The figures and their ratio to transformers, for people."""
        peer = self.tokens_per_s["transformers"]
        lines = [f"{'tokens per second':<28}{'':>10}  against transformers"]
        for name, figures in self.tokens_per_s.items():
            for figure, value in figures.items():
                base = peer["prefill" if figure == "prefill" else "decode"]
                lines.append(f"{name + ', ' + figure:<28}{value:>10.1f}  {value / base:.2f}x")
        return "\n".join([*lines, str(self.usage)])


def measure(
    directory: Path,
    base: Path,
    *,
    gguf: Path | None = None,
    threads: int = 2,
    repeats: int = 5,
    wait_s: float = 0.0,
    force: bool = False,
) -> CpuMeasurement:
    """Measure `directory` and `base` with the engine, and `base` with transformers.

    Raises UnsupportedError if the machine is not idle within `wait_s`, or was disturbed during
    the run, unless forced.
    """
    wait_until_quiet(wait_s).require_quiet("the machine is busy", "wait", force=force)
    torch.set_num_threads(threads)
    contestants = _contestants(directory, base, gguf, threads)
    vocab_size = next(c for c in contestants.values() if isinstance(c, Ours)).engine.vocab_size
    prompts = _prompts(CONCURRENT, vocab_size)
    for name, contestant in contestants.items():
        logger.info(f"warming up: {name}")
        contestant.answer(prompts[0], 4)
    watch = Watch()
    samples: dict[str, list[float]] = {}
    for number in range(repeats):
        logger.info(f"round {number + 1} of {repeats}")
        for name, contestant in contestants.items():
            timing = contestant.answer(prompts[number % CONCURRENT], NEW_TOKENS)
            _note(samples, f"{name}.prefill", PROMPT_TOKENS / timing.prefill_s)
            _note(samples, f"{name}.decode", (NEW_TOKENS - 1) / timing.decode_s)
            if isinstance(contestant, Ours):
                steady, total = contestant.answer_together(prompts, NEW_TOKENS)
                _note(samples, f"{name}.decode of {CONCURRENT}", steady)
                _note(samples, f"{name}.{CONCURRENT} with prompts", total)
    usage = watch.usage()
    usage.require_quiet("the run was disturbed", "repeat it", force=force)
    medians: dict[str, dict[str, float]] = {}
    for key, values in samples.items():
        name, figure = key.rsplit(".", 1)
        medians.setdefault(name, {})[figure] = statistics.median(values)
    return CpuMeasurement(medians, samples, usage)


def write_record(report: CpuMeasurement, path: Path, command: str, checkpoint: Path) -> None:
    """Write what was measured to `path`, as a benchmark record."""
    records.write(
        path,
        name="cpu_decode",
        question="tokens a second on CPU against transformers in bf16 with the same weights",
        command=command,
        checkpoint=checkpoint,
        figures=cpu_figures(report.tokens_per_s, f"halfbyte {checkpoint.name}"),
        results={
            "tokens_per_s": report.tokens_per_s,
            **report.usage.fields,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "concurrent": CONCURRENT,
        },
        samples={f"{key}, tokens/s": values for key, values in report.samples.items()},
    )


def cpu_figures(medians: Mapping[str, Mapping[str, float]], measured: str) -> list[Figure]:
    """Every contestant's tokens a second against transformers, one stream, in the same run.

    medians   contestant -> what was timed -> tokens a second
    measured  the contestant whose checkpoint the record is about; the others are its peers
    """
    peer, found = medians[PEER], []
    for name, timed in medians.items():
        for what, value in timed.items():
            base: Literal["prefill", "decode"] = "prefill" if what == "prefill" else "decode"
            users = CONCURRENT if str(CONCURRENT) in what else 1
            is_measured = name == measured
            conditions: dict[str, str | int | float] = {
                "by": name,
                "users": users,
                "prompt tokens": PROMPT_TOKENS,
                **({} if base == "prefill" else {"answer tokens": NEW_TOKENS}),
            }
            found.append(
                Figure(
                    _NAMES.get(what, base),
                    value,
                    "tokens/s",
                    base if is_measured else "peer",
                    conditions,
                    () if name == PEER else (Against(f"{PEER} bf16, 1 user", peer[base]),),
                    is_headline=is_measured and what == "decode",
                )
            )
    return found


def _contestants(
    directory: Path, base: Path, gguf: Path | None, threads: int
) -> dict[str, Contestant]:
    contestants: dict[str, Contestant] = {"transformers": Transformers(base)}
    if gguf is not None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise UnsupportedError("--gguf needs llama-cpp-python")
        contestants["llama.cpp"] = LlamaCpp(gguf, threads)
    for path in dict.fromkeys((base.resolve(), directory.resolve())):
        contestants[f"halfbyte {path.name}"] = Ours(path)
    return contestants


def _prompts(count: int, vocab_size: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (count, PROMPT_TOKENS), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def _request(name: str, prompt: Prompt, new_tokens: int) -> GenerationRequest:
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(name, prompt, params)


def _note(samples: dict[str, list[float]], key: str, value: float) -> None:
    samples.setdefault(key, []).append(value)
