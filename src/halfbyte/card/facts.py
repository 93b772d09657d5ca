"""Collects what report and card say: runs, their comparison, the checkpoint, speed records.

Every figure leaves here with the file it came from (`Source`); what is absent stays None, and the
page says "not measured". No figure is computed here that is not in a record.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.chat.tokens import load_chat
from halfbyte.chat.vocabulary import read_text
from halfbyte.checkpoint.fp8_source import NOTE_FILE
from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.checkpoint.metadata import Quantization, read_config, unquantized
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError, UsageError, in_words
from halfbyte.evals.judging.compare import compare_runs
from halfbyte.evals.judging.comparison import Comparison
from halfbyte.evals.records import BenchmarkResult, RunRecord, newest, read_records, read_run
from halfbyte.evals.tasks.suite import BENCHMARKS, SUITES
from halfbyte.fidelity.comparison import comparison_of
from halfbyte.figures import CARD_TOPICS, Figure, Record, parse_record
from halfbyte.files import is_there, parse_json_text, read_bounded
from halfbyte.modules import decoder_linears
from halfbyte.server.defaults import SamplingDefaults, read_sampling
from halfbyte.server.vllm.command import VllmOptions, VllmPlan, plan_vllm

# Items whose authors ask that they never stand in plain text online.
PRIVATE = ("gpqa_diamond",)
_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")
# What the command of the card asks for: more costs memory that few have beside the weights.
MAX_MODEL_LEN = 196_608


@dataclass(frozen=True, slots=True)
class UseFacts:
    """Tokens and time of one arm on one benchmark; latencies in seconds, medians over attempts."""

    attempts: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    mean_completion_tokens: float
    wall_s: float
    tokens_per_s: float
    median_latency_s: float
    p90_latency_s: float


@dataclass(frozen=True, slots=True)
class Arm:
    """One run: its record, where it lies, and the use of each benchmark."""

    run: RunRecord
    folder: Path
    usage: Mapping[str, UseFacts]


@dataclass(frozen=True, slots=True)
class ChatFacts:
    """What the tokenizer files say the model can do beside answering."""

    has_tools: bool
    has_thinking: bool
    efforts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a checkpoint folder says of itself; `formats` counts linears by format and group.

    identity   what records of it carry (`checkpoint.identity`)
    sampling   what its generation_config.json recommends, under the names of the API
    chat       None where it has no tokenizer
    vllm       the command for vLLM under the name NAME; None without a tokenizer
    licence_file  its LICENSE, "" without one
    note       what its NOTE.txt says, "" without one; it belongs beside every figure
    """

    folder: str
    config: ModelConfig
    quantization: Quantization
    formats: Mapping[str, Mapping[str, int]]
    layers_by_format: Mapping[str, str]
    weight_bytes: int
    made_of: Mapping[str, Any]
    note: str = ""
    identity: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    chat: ChatFacts | None = None
    vllm: VllmPlan | None = None
    licence_file: str = ""


def read_arm(folder: Path) -> Arm:
    """A run folder with its use of tokens and time."""
    run = read_run(folder)
    usage = {name: _usage(folder / name, result) for name, result in run.benchmarks.items()}
    return Arm(run, folder, {name: found for name, found in usage.items() if found is not None})


def _usage(folder: Path, result: BenchmarkResult) -> UseFacts | None:
    file = newest(folder, "samples", "jsonl")
    if file is None:
        return None
    records = [r for r in read_records(file) if r.error is None]
    if not records:
        return None
    latencies = sorted(r.latency_s for r in records)
    return UseFacts(
        attempts=len(records),
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.completion_tokens,
        reasoning_tokens=result.reasoning_tokens,
        mean_completion_tokens=result.completion_tokens / len(records),
        wall_s=result.wall_s,
        tokens_per_s=result.completion_tokens / result.wall_s if result.wall_s else 0.0,
        median_latency_s=statistics.median(latencies),
        p90_latency_s=latencies[min(len(latencies) - 1, int(0.9 * len(latencies)))],
    )


def compare_arms(arms: Sequence[Arm], **options: Any) -> Comparison | None:
    """The comparison of two arms, baseline first; None for a single run.

    options  margins, looks and after, as for `compare_runs`
    """
    if len(arms) == 1:
        return None
    if len(arms) != 2:
        raise UsageError(f"{len(arms)} runs given; a report has one, or a baseline and a candidate")
    return compare_runs(arms[0].folder, arms[1].folder, **options)


def columns(arms: Sequence[Arm]) -> list[str]:
    """Benchmarks to show, in the published order first; the seven stay even if not run.

    Runs of Pocket's suite alone are shown by its own seven kinds, which stand for those.
    """
    ran = list(dict.fromkeys(name for arm in arms for name in arm.run.benchmarks))
    is_pocket = bool(ran) and set(ran) <= set(SUITES["pocket"])
    first = SUITES["pocket" if is_pocket else "seed"]
    return list(dict.fromkeys([*first, *ran]))


def title_of(name: str) -> str:
    """The name under which a benchmark is printed, as "GPQA Diamond"."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def read_checkpoint(folder: Path) -> CheckpointFacts:
    """What the card says of the weights, from the folder's own metadata."""
    config, quantization, _ = read_config(folder)
    counts: dict[str, dict[str, int]] = {}
    layers: dict[str, set[int]] = {}
    for linear in decoder_linears(config):
        chosen = quantization.formats[linear.name]
        group = linear.name.split(".")[2]
        row = counts.setdefault(group, {})
        row[chosen] = row.get(chosen, 0) + 1
        layers.setdefault(f"{group} {chosen}", set()).add(int(linear.name.split(".")[1]))
    layers_by_format = {name: spans(sorted(found)) for name, found in layers.items()}
    if "head" in quantization.formats:
        chosen = quantization.formats["head"]
        counts["head"], layers_by_format[f"head {chosen}"] = {chosen: 1}, "-"
    manifest = read_manifest(folder)
    note = folder / NOTE_FILE
    chat, vllm = _read_chat(folder, config)
    return CheckpointFacts(
        folder=folder.resolve().name,
        config=config,
        quantization=quantization,
        formats=counts,
        layers_by_format=layers_by_format,
        weight_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        made_of=manifest.made_of if manifest is not None else {},
        note=" ".join(read_text(note).split()) if is_there(note) else "",
        identity=checkpoint_identity(folder),
        sampling=_recommended(folder),
        chat=chat,
        vllm=vllm,
        licence_file=next((n for n in _LICENCES if (folder / n).is_file()), ""),
    )


def _read_chat(folder: Path, config: ModelConfig) -> tuple[ChatFacts | None, VllmPlan | None]:
    if not any(is_there(folder / name) for name in ("tekken.json", "tokenizer.json")):
        return None, None
    chat = load_chat(folder)
    facts = ChatFacts(
        chat.control.has_tools, chat.control.has_thinking, tuple(chat.reasoning_efforts)
    )
    longest = min(MAX_MODEL_LEN, config.text.max_positions)
    return facts, plan_vllm(folder, chat, VllmOptions("NAME", 8000, max_model_len=longest))


def _recommended(folder: Path) -> dict[str, float]:
    """Only what the file says: a default of ours is no recommendation of the model's makers."""
    found, silent = asdict(read_sampling(folder)), asdict(SamplingDefaults())
    return {name: value for name, value in found.items() if value != silent[name]}


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, vision tower included, as its makers count them: before packing."""
    tensors = expected_tensors(config, unquantized(config))
    return sum(math.prod(expected.shape) for expected in tensors.values())


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: 0, 1, 2, 7 -> "0-2, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def read_figures(files: Sequence[Path]) -> dict[str, Any]:
    """Records (speed, fidelity) by file name. Raises UsageError for what is no record."""
    found: dict[str, Any] = {}
    for file in files:
        try:
            record = parse_json_text(read_bounded(file).decode("utf-8"))
        except (OSError, ValueError, RecursionError) as failure:
            raise UsageError(f"{file} is not a record: {in_words(failure)}") from failure
        if not isinstance(record, dict) or not ("results" in record or is_fidelity(record)):
            raise UsageError(
                f"{file} is neither a benchmark record (with 'results') nor what "
                "`halfbyte compare --json` writes (with 'base' and 'candidates')"
            )
        found[file.name] = record
    return found


def is_fidelity(record: Mapping[str, Any]) -> bool:
    """Whether a record is a comparison by `halfbyte compare --json`."""
    return "base" in record and "candidates" in record


def require_own_records(
    c: CheckpointFacts, arms: Sequence[Arm], figures: Mapping[str, Any]
) -> None:
    """Raise UsageError unless every record measured this very checkpoint.

    Of two arms the last is this checkpoint's, the first its baseline; of a comparison of
    distributions at least one candidate.
    """
    if arms:
        run = arms[-1].run
        hint = (
            "evaluate the folder, or name it beside an address: halfbyte evaluate URL --checkpoint"
        )
        _require_own(c, f"run {run.arm}", run.checkpoint.get("identity"), hint)
    for name, record in figures.items():
        if is_fidelity(record):
            rows = [row for row in record["candidates"] if isinstance(row, Mapping)]
            own = [row.get("checkpoint") for row in rows]
            said = c.identity if c.identity in own else next(iter(own), None)
            _require_own(c, f"record {name}", said, "run halfbyte compare --json again")
            comparison_of(record, name)
            continue
        _require_own(c, f"record {name}", record.get("checkpoint"), "measure this checkpoint")
        if not speed_figures(name, record)[1]:
            topics = ", ".join(CARD_TOPICS)
            raise UsageError(
                f"record {name} holds no speed of a model, only figures of its own question; a "
                f"card takes records with figures of {topics}, as halfbyte bench cpu writes"
            )


def _require_own(c: CheckpointFacts, what: str, said: object, hint: str) -> None:
    if not isinstance(said, str):
        raise UsageError(
            f"{what} does not say which checkpoint it measured, so it cannot stand on the card of "
            f"{c.folder}; {hint}"
        )
    if said != c.identity:
        raise UsageError(
            f"{what} measured another checkpoint ({said[:20]}...) than {c.folder} "
            f"({c.identity[:20]}...); {hint}"
        )


def speed_figures(name: str, record: Mapping[str, Any]) -> tuple[Record, list[Figure]]:
    """A benchmark's record, and those of its figures that a card's speed section shows.

    Raises UsageError, naming the record's file, where its figures are not figures.
    """
    try:
        found = parse_record(record)
    except CheckpointError as error:
        raise UsageError(f"record {name}: {error}") from error
    return found, [figure for figure in found.figures if figure.topic in CARD_TOPICS]
