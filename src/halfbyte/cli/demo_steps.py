"""The newcomer's demo: one real model through every room, in plain sentences.

Import SmolLM2-135M-Instruct, make the FP8 source, quantize it to the mixed recipe, compare the
four, serve the result and ask it three questions through the official client. In a checkout a
second half follows, on a model that sees and thinks (`demo_pocket`). Called by `halfbyte demo`; the
single steps are the single commands.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench import record as records
from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.cli.demo_pocket import (
    Pocket,
    ask_pocket,
    compare_arms,
    find_pocket,
    pocket_summary,
    quantize_arms,
)
from halfbyte.cli.demo_tools import (
    CALIBRATION,
    Narrator,
    quantized,
    serving,
    size_of,
)
from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.fidelity.comparison import FidelityComparison
from halfbyte.fidelity.models import compare_models
from halfbyte.figures import Against, Figure
from halfbyte.log import logger
from halfbyte.quantize.fp8_source import make_fp8_source

MARKER = ".halfbyte-demo"
HELD_OUT = Path(str(resources.files("halfbyte.fidelity"))) / "data" / "held_out.txt"
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three primary colors.",
)
# The names of summary.json, in the order of the table.
VARIANTS = ("bf16", "fp8", "mixed", "mixed_declared")


def run_demo(out: Path, *, record: Path | None = None, threads: int | None = None) -> None:
    """Run the steps; leaves checkpoints, `summary.json` and `comparison.png` under `out`.

    Raises UsageError if `out` holds anything that no demo made.
    """
    set_threads(threads)
    empty_directory(out)
    # The story is told on stdout; details of each hall would interrupt it.
    logger.setLevel("ERROR")
    pocket = find_pocket()
    narrator = Narrator(num_steps=5 if pocket is None else 8)
    started = time.perf_counter()
    narrator.say("halfbyte demo: a real model from its weights to served answers, on this CPU.")
    make_checkpoints(out, narrator)
    with narrator.step(4, "Comparing all of them on held-out text."):
        comparison = compare(out, narrator)
    with narrator.step(5, "Serving the mixed model and asking three questions."):
        answers = ask_questions(out / "mixed", narrator)
    summary = summarize(comparison, answers)
    if pocket is None:
        narrator.say(
            "\nThe second half shows pictures, thoughts and tools on a model of halfbyte's "
            "repository, in its folder pocket/; it is left out here, outside a checkout."
        )
    else:
        summary["pocket"] = second_half(pocket, out / "pocket", narrator)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    plot(summary, out / "comparison.png")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    narrator.say(
        f"\nAll of it took {summary['seconds']:.0f} s. Numbers: {out / 'summary.json'}, "
        f"plot: {out / 'comparison.png'}"
    )
    narrator.say(f"Talk to it: halfbyte chat {out / 'mixed'}")
    if pocket is not None:
        narrator.say(f"Show it a picture: halfbyte serve {out / 'pocket' / 'mixed'}")
    if record is not None:
        records.write(
            record,
            name="demo",
            question="What does a newcomer see, and what do the formats cost a small real model?",
            command="halfbyte demo",
            figures=demo_figures(summary),
            results={"summary": summary, "transcript": narrator.lines},
        )


def second_half(pocket: Pocket, out: Path, narrator: Narrator) -> dict[str, Any]:
    """Steps 6 to 8, on Pocket; leaves its arms and a picture under `out`."""
    out.mkdir()
    with narrator.step(6, "Quantizing Pocket, a small model that sees, thinks and calls tools."):
        arms = quantize_arms(pocket, out, narrator)
    with narrator.step(7, "Comparing its arms on answers that it has learnt, pictures included."):
        divergence = compare_arms(pocket, arms, narrator)
    with narrator.step(8, "Serving the mixed one: a picture, a thought, a tool, a schema."):
        answers = ask_pocket(pocket, arms["mixed"], out, narrator)
    return pocket_summary(arms, divergence, answers)


def demo_figures(summary: Mapping[str, Any]) -> list[Figure]:
    """What the formats cost the small model in bytes and in likeness, and how fast it answers."""
    found = []
    model = {"model": summary["model"]}
    for arm, num_bytes in summary["bytes"].items():
        name, _, arithmetic = arm.partition("_")
        conditions = {
            **model,
            "weights": name,
            **({"arithmetic": arithmetic} if arithmetic else {}),
        }
        if not arithmetic:  # the same files
            against = () if name == "bf16" else (Against("bf16", summary["bytes"]["bf16"] / 1e6),)
            found.append(
                Figure("weights on disk", num_bytes / 1e6, "MB", "fidelity", conditions, against)
            )
        perplexity = summary["perplexity"][arm]
        found.append(Figure("perplexity", perplexity, "perplexity", "fidelity", conditions))
        if arm in summary["kl_mean"]:
            fp8 = () if name == "fp8" else (Against("fp8", summary["kl_mean"]["fp8"]),)
            found.append(
                Figure("KL divergence from bf16", summary["kl_mean"][arm], "nats/token",
                       "fidelity", conditions, fp8, is_headline=arm == "mixed")
            )  # fmt: skip
            agreed = 100 * summary["top1_agreement"][arm]
            found.append(Figure("same top token as bf16", agreed, "%", "fidelity", conditions))
    speed = summary["decode_tokens_per_s"]
    served = {**model, "weights": "mixed", "users": 1}
    return [*found, Figure("served answers", speed, "tokens/s", "peer", served)]


def set_threads(threads: int | None) -> None:
    """Fix the number of CPU threads for this process and its server."""
    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def empty_directory(out: Path) -> None:
    """Make `out` empty, but only if it is new, empty or a demo's."""
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists()):
            raise UsageError(
                f"{out} holds something that no demo made; name another directory with --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).write_text("This directory is the demo's; the next demo empties it.\n")


@dataclass(frozen=True)
class TimedAnswer:
    """One streamed answer of the server; `decode_tokens_per_s` counts tokens after the first."""

    question: str
    text: str
    num_tokens: int
    first_token_s: float
    decode_tokens_per_s: float


def make_checkpoints(out: Path, narrator: Narrator) -> None:
    """Steps 1 to 3: the bf16 checkpoint, the FP8 source, the mixed one."""
    with narrator.step(1, "Writing SmolLM2-135M-Instruct from its package as a bf16 checkpoint."):
        config = import_gguf(packaged_file("smollm2"), out / "bf16")
        text = config.text
        narrator.say(
            f"      {text.num_layers} layers of width {text.width}, {size_of(out / 'bf16')}, "
            "tokenizer and chat template included"
        )
    with narrator.step(2, "Making the FP8 source that the real job starts from."):
        make_fp8_source(out / "bf16", out / "fp8")
        narrator.say(f"      per-tensor static FP8, {size_of(out / 'fp8')}")
    with narrator.step(3, "Quantizing FP8 to the mixed recipe, one layer in memory at a time."):
        tokens = quantized(out / "fp8", out / "mixed", "medium-3.5", CALIBRATION, narrator)
        narrator.say(
            f"      interior MLPs NVFP4, the rest FP8, max calibration on "
            f"{tokens:,} tokens: {size_of(out / 'mixed')}"
        )


def compare(out: Path, narrator: Narrator) -> FidelityComparison:
    """Step 4: all variants over the held-out text, through the engine's own path."""
    comparison = compare_models(
        out / "bf16",
        [
            ("fp8", out / "fp8", "weight_only"),
            ("mixed", out / "mixed", "weight_only"),
            ("mixed", out / "mixed", "declared"),
        ],
        HELD_OUT,
        progress=narrator.progress("window"),
    )
    for line in comparison.table().splitlines():
        narrator.say(f"      {line}")
    return comparison


def summarize(comparison: FidelityComparison, answers: list[TimedAnswer]) -> dict[str, Any]:
    """The content of summary.json: each figure by variant, where it applies."""
    rows = dict(zip(VARIANTS, comparison.rows, strict=True))
    against_base = {name: row for name, row in rows.items() if name != "bf16"}
    rates = [answer.decode_tokens_per_s for answer in answers if answer.decode_tokens_per_s > 0]
    return {
        "model": "SmolLM2-135M-Instruct",
        "recipe": "medium-3.5",
        "held_out_tokens": comparison.num_tokens,
        "bytes": {name: row.bytes for name, row in rows.items()},
        "perplexity": {name: row.perplexity for name, row in rows.items()},
        "kl_mean": {name: row.kl_mean for name, row in against_base.items()},
        "kl_p99": {name: row.kl_p99 for name, row in against_base.items()},
        "top1_agreement": {name: row.top1_agreement for name, row in against_base.items()},
        "decode_tokens_per_s": statistics.median(rates) if rates else 0.0,
        "answers": [asdict(answer) for answer in answers],
    }


def ask_questions(directory: Path, narrator: Narrator) -> list[TimedAnswer]:
    """Serve `directory` on a free port, ask, print, and stop the server cleanly."""
    try:
        from openai import OpenAI  # optional: the extra `demo`
    except ImportError as error:
        message = "the demo asks through the openai client; install halfbyte[demo]"
        raise UnsupportedError(message) from error
    with serving(directory, narrator) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60.0, max_retries=0)
        model = client.models.list().data[0].id
        answers = []
        for question in QUESTIONS:
            narrator.say(f"      > {question}")
            answers.append(ask(client, model, question))
            narrator.say(
                f"        {answers[-1].text}\n"
                f"        ({answers[-1].num_tokens} tokens, the first after "
                f"{answers[-1].first_token_s * 1000:.0f} ms, then "
                f"{answers[-1].decode_tokens_per_s:.0f} tokens/s)"
            )
    return answers


def ask(client: Any, model: str, question: str) -> TimedAnswer:
    """Stream one greedy answer through the official client."""
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0.0,
        max_tokens=64,
    )
    pieces: list[str] = []
    first = last = started
    num_tokens = 0
    for chunk in stream:
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.perf_counter()
            first = last if not pieces else first
            pieces.append(chunk.choices[0].delta.content)
    rate = (num_tokens - 1) / (last - first) if num_tokens > 1 and last > first else 0.0
    return TimedAnswer(
        question, " ".join("".join(pieces).split()), num_tokens, first - started, rate
    )


LABELS = {
    "bf16": "bf16",
    "fp8": "FP8",
    "mixed": "mixed, weights only",
    "mixed_declared": "mixed, as declared",
}


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Bytes, perplexity and divergence of the variants, side by side, as a PNG."""
    try:
        import matplotlib as mpl  # optional: the extra `demo`
    except ImportError as error:
        message = "the demo's plot needs matplotlib; install halfbyte[demo]"
        raise UnsupportedError(message) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("bytes", "checkpoint, MB", 1e-6, "{:.0f}"),
        ("perplexity", "perplexity on held-out text", 1.0, "{:.1f}"),
        ("kl_mean", "mean KL to bf16 per token, nats", 1.0, "{:.3f}"),
    )
    colors = {"bf16": "#7f7f7f", "fp8": "#4c78a8", "mixed": "#59a14f", "mixed_declared": "#e0862f"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 3.2), layout="constrained")
    for axis, (key, title, factor, form) in zip(axes, panels, strict=True):
        names = [name for name in VARIANTS if name in summary[key]][::-1]
        bars = axis.barh(
            [LABELS[name] for name in names],
            [summary[key][name] * factor for name in names],
            color=[colors[name] for name in names],
        )
        axis.bar_label(bars, fmt=form, padding=3)
        axis.margins(x=0.2)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M-Instruct: what quantization costs and saves", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
