"""What serving costs over the model's step, what the prefix cache saves, what a prompt disturbs.

Question: how much does a token cost at 32 streams over HTTP beyond the model's step; how much
    sooner does a fully cached 4k prompt have its first token; how long does a running stream wait
    for a token while a 32k prompt arrives?
Method: `halfbyte serve` in a process of its own, asked over sockets with a reader that only counts
    events. Overhead: 32 greedy streams at once, ends ignored, prompts found in the cache; a step is
    what answers of 160 tokens take longer than answers of 40, a token, against the time of the
    model's own call with the same 32 sequences at the same lengths in this process, in turns
    (A B A B). Cached: a prompt of 4,096 tokens of text never seen before, then again. Stall: one
    stream; gaps between its tokens alone, then while a prompt of 32k tokens is taken in, then alone
    again, on a model of the same widths with fewer layers and random weights, so that it ends in
    minutes.
Cost model: what is not the model is some 40 us a token here: scheduling, sampling, detokenizing,
    one frame of JSON and a socket write. Both sides share the processors.
Reading the result: overhead under 15 %, cached under 1/10, the longest gap under twice the usual
    99th percentile. Other programs spoil the gaps first; a disturbed run is refused. What a virtual
    machine takes for itself shows in the gaps of the stream alone, too: they are counted likewise.
Last record: benchmarks/records/serving.json
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from halfbyte.bench import record as records
from halfbyte.bench.idle import MachineUse, Watch, wait_until_quiet
from halfbyte.bench.record import percentile
from halfbyte.checkpoint.metadata import read_config
from halfbyte.child import Child, served
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.load import load_runner
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.errors import CapacityError
from halfbyte.figures import Against, Figure
from halfbyte.log import logger
from halfbyte.machine import settle_heap
from halfbyte.model.tiny import write_tiny_checkpoint

STREAMS = 32
STREAM_TOKENS = 160
# Four blocks and a token: found in the cache, such prompts all begin in one step.
PROMPT_TOKENS = 65
CACHED_TOKENS = 4096
STALL_TOKENS = 32_000
# Widths are the model's; these layers of them.
STALL_LAYERS = 4


@dataclass(frozen=True, slots=True)
class ServingSizes:
    """How large the run is; tests make it small."""

    streams: int = STREAMS
    stream_tokens: int = STREAM_TOKENS
    cached_tokens: int = CACHED_TOKENS
    stall_tokens: int = STALL_TOKENS
    stall_layers: int = STALL_LAYERS
    # Gaps of the stream that runs alone.
    usual_tokens: int = 5000
    repeats: int = 5

    @property
    def short_tokens(self) -> int:
        """Tokens of the shorter answers, by which all streams have long been generating."""
        return self.stream_tokens // 4


@dataclass(slots=True)
class ServingMeasurement:
    """Every sample, and how quiet the machine was."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    usage: MachineUse = field(default_factory=lambda: MachineUse(0.0, 0.0))

    def note(self, name: str, values: Sequence[float]) -> None:
        """Add more samples under a name that ends with their unit."""
        self.samples.setdefault(name, []).extend(values)

    def figures(self) -> dict[str, float]:
        """The three answers and what they are made of."""
        middle = {name: statistics.median(values) for name, values in self.samples.items()}
        alone = self.samples["gap alone, ms"]
        usual = percentile(alone, 0.99)
        beside = self.samples["gap beside a prompt, ms"]
        longest = max(beside)
        return {
            "model_step_ms": middle["model step, ms"],
            "engine_step_ms": middle["engine step, ms"],
            "served_step_ms": middle["served step, ms"],
            "overhead_share": middle["served step, ms"] / middle["model step, ms"] - 1,
            "uncached_first_token_ms": middle["first token uncached, ms"],
            "cached_first_token_ms": middle["first token cached, ms"],
            "cached_share": middle["first token cached, ms"] / middle["first token uncached, ms"],
            "usual_gap_p99_ms": usual,
            "usual_gap_longest_ms": max(alone),
            "gap_p99_beside_a_prompt_ms": percentile(beside, 0.99),
            "longest_gap_beside_a_prompt_ms": longest,
            "gap_p99_ratio": percentile(beside, 0.99) / usual,
            "gap_ratio": longest / usual,
            "gaps_over_the_bar": sum(gap >= 2 * usual for gap in beside),
            "gaps_beside_a_prompt": len(beside),
            "usual_gaps_over_the_bar": sum(gap >= 2 * usual for gap in alone),
            "usual_gaps": len(alone),
            "prompt_s": middle["prompt beside a stream, s"],
        }

    def table(self) -> str:
        """The measurements as a table for a terminal."""
        found = self.figures()
        return "\n".join(
            [
                f"a step of {STREAMS} streams: model {found['model_step_ms']:.1f} ms, engine "
                f"{found['engine_step_ms']:.1f} ms, served {found['served_step_ms']:.1f} ms: "
                f"{found['overhead_share']:.1%} over the model (bar: 15 %)",
                f"first token of a 4k prompt: {found['uncached_first_token_ms']:.0f} ms, cached "
                f"{found['cached_first_token_ms']:.0f} ms: {found['cached_share']:.1%} (bar: 10 %)",
                f"gap of a running stream: p99 {found['usual_gap_p99_ms']:.1f} ms alone (longest "
                f"{found['usual_gap_longest_ms']:.1f}); while a 32k prompt arrives p99 "
                f"{found['gap_p99_beside_a_prompt_ms']:.1f} ms: {found['gap_p99_ratio']:.2f}x "
                f"(bar: 2x), longest {found['longest_gap_beside_a_prompt_ms']:.1f} ms, "
                f"{found['gaps_over_the_bar']:.0f} of {found['gaps_beside_a_prompt']:.0f} over "
                f"it (alone {found['usual_gaps_over_the_bar']:.0f} of "
                f"{found['usual_gaps']:.0f}); the prompt took {found['prompt_s']:.0f} s",
                str(self.usage),
            ]
        )


def measure(
    directory: Path,
    scratch: Path,
    *,
    sizes: ServingSizes = ServingSizes(),
    threads: int = 2,
    wait_s: float = 0.0,
    force: bool = False,
) -> ServingMeasurement:
    """Measure a checkpoint; `scratch` takes the model of the third question.

    Raises UnsupportedError if the machine is not idle within `wait_s`, or was disturbed during the
    run, unless forced.
    """
    wait_until_quiet(wait_s).require_quiet("the machine is busy", "wait", force=force)
    torch.set_num_threads(threads)
    report = ServingMeasurement()
    watch = Watch()
    helpers = 0.0
    # First, as long as this process holds no model: what it does then cannot delay a reading.
    logger.info(f"a prompt of {sizes.stall_tokens} tokens beside a stream")
    shallow = write_shallow(directory, scratch, sizes)
    room = 3 * sizes.stall_tokens + 8192
    # Keys and values as the quantized model keeps them.
    with bench_server(shallow, threads, "--kv-cache-tokens", room, "--kv-cache", "fp8") as server:
        asyncio.run(_gaps(server.url, sizes, report))
        helpers += server.cpu_s()
    tokens = sizes.streams * (PROMPT_TOKENS + sizes.stream_tokens + 32)
    room = max(tokens, 8 * sizes.cached_tokens)
    flags = ("--kv-cache-tokens", room, "--max-sequences", sizes.streams)
    with bench_server(directory, threads, *flags) as server:
        logger.info("first tokens, cached and not")
        asyncio.run(_first_tokens(server.url, sizes, report))
        logger.info(f"{sizes.streams} streams")
        solo = _Solo(directory, sizes)
        solo.steps()
        asyncio.run(_served_s(server.url, sizes, sizes.short_tokens))
        for _ in range(sizes.repeats):
            model, engine = solo.steps()
            report.note("model step, ms", model)
            report.note("engine step, ms", engine)
            report.note("served step, ms", [asyncio.run(_served_step(server.url, sizes))])
        helpers += server.cpu_s()
    report.usage = watch.usage(helpers)
    report.usage.require_quiet("the run was disturbed", "repeat it", force=force)
    return report


def write_record(report: ServingMeasurement, path: Path, command: str, checkpoint: Path) -> None:
    """Write what was measured to `path`, as a benchmark record."""
    # Rounded first: what a page shows must follow from what stands in the record.
    found = {name: round(value, 4) for name, value in report.figures().items()}
    records.write(
        path,
        name="serving",
        question="what HTTP adds to a step, a cached prompt saves and a long one disturbs",
        command=command,
        checkpoint=checkpoint,
        figures=serving_figures(found, STREAMS),
        results={
            **found,
            "streams": STREAMS,
            "stall_layers": STALL_LAYERS,
            **report.usage.fields,
        },
        # To the microsecond: tens of thousands of gaps are most of the file.
        samples={
            name: [round(value, 3) for value in values] for name, values in report.samples.items()
        },
    )


def serving_figures(found: Mapping[str, float], streams: int) -> list[Figure]:
    """What serving adds, what a cached prompt saves and what a long one disturbs."""
    usual = found["usual_gap_p99_ms"]
    bar = Against("at most", 2 * usual, is_bound=True)
    beside: dict[str, str | int | float] = {"beside": "a 32k prompt"}
    return [
        Figure("what HTTP and engine add to the model's step", 100 * found["overhead_share"], "%",
               "serving", {"streams": streams}, (Against("at most", 15, is_bound=True),),
               is_headline=True),
        Figure("time to the first token of a cached prompt", found["cached_first_token_ms"], "ms",
               "serving", {"prompt": "4k tokens"},
               (Against("not cached", found["uncached_first_token_ms"]),
                Against("at most", 0.1 * found["uncached_first_token_ms"], is_bound=True))),
        Figure("time between tokens, 99th percentile", found["gap_p99_beside_a_prompt_ms"], "ms",
               "serving", beside, (Against("alone", usual), bar)),
        Figure("time between tokens, longest", found["longest_gap_beside_a_prompt_ms"], "ms",
               "serving", beside, (Against("alone, 99th percentile", usual), bar)),
        Figure("times between tokens over that bound",
               100 * found["gaps_over_the_bar"] / found["gaps_beside_a_prompt"], "%", "serving",
               {**beside, "of": int(found["gaps_beside_a_prompt"])},
               (Against("alone", 100 * found["usual_gaps_over_the_bar"] / found["usual_gaps"]),)),
    ]  # fmt: skip


# --- the server -----------------------------------------------------------------------------


@contextlib.contextmanager
def bench_server(directory: Path, threads: int, *flags: object) -> Iterator[Child]:
    """A server under the name `bench` while the body runs; nobody reads its log."""
    flags += ("--served-model-name", "bench", "--access-log", os.devnull)
    with tempfile.TemporaryDirectory() as folder:
        log, environment = Path(folder) / "server.log", {"OMP_NUM_THREADS": str(threads)}
        with served(directory, *flags, log=log, environment=environment) as server:
            yield server


class Stream:
    """One streamed completion, read from its socket with as little work as can be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.times: list[float] = []

    async def follow(self) -> None:
        """Note when each event came, to the end."""
        last = b""
        try:
            while chunk := await self._reader.read(65536):
                now = time.perf_counter()
                # An event may come in two reads; its beginning is what counts.
                self.times += [now] * (last[-6:] + chunk).count(b"data: {")
                last = chunk
                if chunk.endswith(b"0\r\n\r\n"):
                    break
        finally:
            self._writer.close()
            await self._writer.wait_closed()


async def open_stream(url: str, path: str, body: dict[str, Any]) -> Stream:
    """Send a request and return its stream, of which nothing is read yet."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps({**body, "model": "bench", "stream": True, "temperature": 0}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return Stream(reader, writer)


# --- first tokens ---------------------------------------------------------------------------


async def _first_tokens(url: str, sizes: ServingSizes, report: ServingMeasurement) -> None:
    async def first_token_ms(content: str) -> float:
        started = time.perf_counter()
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
        stream = await open_stream(url, "/v1/chat/completions", body)
        await stream.follow()
        return (stream.times[0] - started) * 1000

    await first_token_ms("Hello")
    for number in range(sizes.repeats):
        content = text_of(url, sizes.cached_tokens, seed=number)
        report.note("first token uncached, ms", [await first_token_ms(content)])
        report.note("first token cached, ms", [await first_token_ms(content)])


def text_of(url: str, num_tokens: int, seed: int) -> str:
    """Words that are about so many tokens of the server's model."""
    dice = random.Random(seed)

    def word() -> str:
        return f"{dice.choice(('river', 'stone', 'cloud', 'light'))} {dice.randrange(100)}"

    words = [word()]
    with httpx.Client(base_url=url, timeout=120) as client:

        def count() -> int:
            body = {"messages": [{"role": "user", "content": " ".join(words)}]}
            return int(client.post("/tokenize", json=body).json()["count"])

        while (have := count()) < num_tokens:
            per_word = have / len(words)
            for _ in range(max(int((num_tokens - have) / per_word), 1)):
                words.append(word())
    return " ".join(words)


# --- overhead -------------------------------------------------------------------------------


def _prompts(sizes: ServingSizes) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.streams, PROMPT_TOKENS)
    ids: list[list[int]] = torch.randint(100, 400, shape, generator=generator).tolist()
    return ids


class _Timed:
    """A runner whose calls are timed; all else is the runner's."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.seconds = 0.0

    def run(self, works: Any) -> Any:
        started = time.perf_counter()
        computed = self._runner.run(works)
        self.seconds = time.perf_counter() - started
        return computed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class _Solo:
    """The engine without a server, in this process."""

    def __init__(self, directory: Path, sizes: ServingSizes) -> None:
        longest = PROMPT_TOKENS + sizes.stream_tokens + 32
        config = EngineConfig(
            kv_cache_tokens=sizes.streams * longest,
            max_model_len=longest,
            max_sequences=sizes.streams,
        )
        runner, resolved = load_runner(directory, config)
        timed: Any = _Timed(runner)
        self._timed = timed
        self._engine = Engine(timed, resolved)
        self._sizes = sizes
        self._number = 0

    def steps(self) -> tuple[list[float], list[float]]:
        """Milliseconds of the model's call and of the whole step, while all are generating."""
        sizes, engine = self._sizes, self._engine
        params = SamplingParams(max_tokens=sizes.stream_tokens, temperature=0.0, ignore_eos=True)
        for prompt in _prompts(sizes):
            self._number += 1
            engine.add(GenerationRequest(f"r{self._number}", tuple(prompt), params))
        model: list[float] = []
        whole: list[float] = []
        while engine.has_work():
            started = time.perf_counter()
            events = engine.step()
            seconds = time.perf_counter() - started
            if len(events) == sizes.streams and engine.stats().running == sizes.streams:
                model.append(self._timed.seconds * 1000)
                whole.append(seconds * 1000)
        count = sizes.stream_tokens - sizes.short_tokens
        return model[-count:], whole[-count:]


async def _served_step(url: str, sizes: ServingSizes) -> float:
    """Milliseconds in which each of the streams gets a token, over HTTP.

    From what longer answers take longer: the beginning is the same in both, and nothing is read
    off events, which tokens without text of their own do not make.
    """
    short_s = await _served_s(url, sizes, sizes.short_tokens)
    long_s = await _served_s(url, sizes, sizes.stream_tokens)
    return (long_s - short_s) / (sizes.stream_tokens - sizes.short_tokens) * 1000


async def _served_s(url: str, sizes: ServingSizes, num_tokens: int) -> float:
    """Seconds until all streams have got so many tokens."""
    body = {"max_tokens": num_tokens, "ignore_eos": True}
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(
            open_stream(url, "/v1/completions", {**body, "prompt": prompt})
            for prompt in _prompts(sizes)
        )
    )
    await asyncio.gather(*(stream.follow() for stream in streams))
    # The event that says why a stream ended comes in any case.
    return max(stream.times[-1] for stream in streams) - started


# --- stall ----------------------------------------------------------------------------------


def write_shallow(directory: Path, scratch: Path, sizes: ServingSizes) -> Path:
    """A model of the same widths and tokenizer, few layers, random weights, room for the prompt."""
    target = scratch / "shallow"
    config, _, _ = read_config(directory)
    text = dataclasses.replace(
        config.text, num_layers=sizes.stall_layers, max_positions=2 * sizes.stall_tokens + 4096
    )
    write_tiny_checkpoint(target, config=dataclasses.replace(config, text=text, vision=None))
    for name in ("tekken.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (directory / name).exists():
            shutil.copy(directory / name, target)
    return target


async def _gaps(url: str, sizes: ServingSizes, report: ServingMeasurement) -> None:
    """Gaps of one stream alone, while a long prompt is taken in, and alone again behind it: by
    then its own context is longer, as it was beside the prompt.
    """
    content = text_of(url, sizes.stall_tokens, seed=99)
    settle_heap()  # a collection here would look like a gap there
    # One letter for ever: every token has text, so every step makes an event.
    body = {"prompt": "Hello", "ignore_eos": True, "logit_bias": {_letter(url): 100}}
    usual = await open_stream(url, "/v1/completions", {**body, "max_tokens": sizes.usual_tokens})
    await usual.follow()
    report.note("gap alone, ms", _gaps_ms(usual.times, usual.times[0], usual.times[-1]))
    # A step takes one token of the prompt at least, save the few that measure the stream alone.
    runs_on = {**body, "max_tokens": sizes.stall_tokens * 11 // 10 + sizes.usual_tokens}
    running = await open_stream(url, "/v1/completions", runs_on)
    follow = asyncio.create_task(running.follow())
    while len(running.times) < 20:
        await asyncio.sleep(0.01)
    started = time.perf_counter()
    question = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    prompt = await open_stream(url, "/v1/chat/completions", question)
    await prompt.follow()
    ended = prompt.times[0]
    while running.times[-1] < ended and not follow.done():
        await asyncio.sleep(0.01)
    behind = len(running.times)
    while len(running.times) < behind + sizes.usual_tokens and not follow.done():
        await asyncio.sleep(0.01)
    follow.cancel()
    await asyncio.gather(follow, return_exceptions=True)
    # The first of them may have begun beside the prompt.
    later = running.times[behind + 1 : behind + sizes.usual_tokens]
    if len(later) < 2:
        raise CapacityError("the stream ended before the prompt was taken in; make it longer")
    report.note("gap alone, ms", _gaps_ms(later, later[0], later[-1]))
    report.note("gap beside a prompt, ms", _gaps_ms(running.times, started, ended))
    report.note("prompt beside a stream, s", [ended - started])


def _letter(url: str) -> str:
    """The id of the token "a"."""
    body = {"prompt": "a", "add_special_tokens": False}
    return str(httpx.post(f"{url}/tokenize", json=body).json()["tokens"][-1])


def _gaps_ms(times: Sequence[float], begin: float, end: float) -> list[float]:
    return [
        (later - earlier) * 1000
        for earlier, later in itertools.pairwise(times)
        if begin <= later and earlier <= end
    ]
