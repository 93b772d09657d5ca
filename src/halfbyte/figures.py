"""Measured figures and the records they stand in, from the measurement to every page that shows it.

A `Figure` keeps its number and unit; text is made of it only where a page is rendered: the table of
README, benchmarks/README.md and the Speed section of a model card are three renderings of the same
figures. `bench.record` writes records; `tools/docs.py` and `card` read them through `parse_record`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from halfbyte.errors import CheckpointError, in_words
from halfbyte.files import parse_json_text, read_bounded

Unit = Literal[
    "tokens/s", "items/s", "ms", "s", "min", "ns/weight", "GiB", "MB", "%", "nats/token", "TB/s",
    "perplexity",
]  # fmt: skip
Topic = Literal[
    "decode", "prefill", "serving", "speculation", "start", "kernels", "quantize", "fidelity",
    "evaluation", "tests", "peer",
]  # fmt: skip
# What a model card shows of the checkpoint that was measured; "peer" are figures of other programs
# and other checkpoints in the same run.
CARD_TOPICS: tuple[Topic, ...] = ("decode", "prefill", "serving", "speculation", "start")
_UNITS: tuple[str, ...] = get_args(Unit)
_TOPICS: tuple[str, ...] = get_args(Topic)


@dataclass(frozen=True, slots=True)
class Against:
    """What a figure is compared with, in the figure's own unit.

    what      whose number it is ("transformers bf16"), or the sense of a bound ("at most")
    is_bound  it was fixed beforehand; otherwise it was measured or computed in the same run
    """

    what: str
    value: float
    is_bound: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number with its unit, conditions and comparisons.

    name         what was measured, without its conditions: "decode step"
    conditions   name -> value, what it was measured under: {"batch": 16, "context": 128}
    is_headline  whether README shows it
    """

    name: str
    value: float
    unit: Unit
    topic: Topic
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)
    against: tuple[Against, ...] = ()
    is_headline: bool = False

    @property
    def value_text(self) -> str:
        """The number with its unit, as a page shows it: "21.6 ms"."""
        return with_unit(self.value, self.unit)

    @property
    def conditions_text(self) -> str:
        """The conditions in their order: "batch 16, context 128"."""
        return ", ".join(f"{name} {plain_value(value)}" for name, value in self.conditions.items())

    @property
    def against_text(self) -> str:
        """Every comparison, with the figure as a multiple of it unless it is a bound."""
        return "; ".join(
            f"{one.what} {with_unit(one.value, self.unit)}"
            if one.is_bound or not one.value
            else f"{one.what}: {with_unit(one.value, self.unit)} ({self.value / one.value:.2f}x)"
            for one in self.against
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a record was measured. What a record does not say is None or empty."""

    processor: str | None = None
    cores: int | None = None
    threads: int | None = None
    memory_gib: float | None = None
    system: str | None = None
    python: str | None = None
    gpu: str | None = None
    cuda: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The machine in a few words: its GPU, or its processor with the threads used."""
        if self.gpu is not None:
            return self.gpu
        processor = self.processor or "processor not recorded"
        number, of = (self.cores, "cores") if self.threads is None else (self.threads, "threads")
        return processor if number is None else f"{processor}, {number} {of}"


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement as its JSON file holds it.

    results     what the benchmark found, in a form of its own; no page shows it
    samples     every timed sample, by a name that ends with its unit
    checkpoint  identity of the checkpoint that was measured, if it was one
    """

    name: str
    question: str
    command: str
    date: str
    machine: Machine
    figures: tuple[Figure, ...]
    results: Mapping[str, Any]
    samples: Mapping[str, Sequence[float]]
    checkpoint: str | None = None
    commit: str | None = None
    dirty: bool | None = None

    @property
    def headlines(self) -> list[Figure]:
        """The record's figures that README shows, in their order."""
        return [figure for figure in self.figures if figure.is_headline]


def plain_value(value: str | float) -> str:
    """A condition's value: text as it is, whole numbers whole, others to three digits."""
    return value if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """Three significant digits, or all of a whole number: 20.95 -> 20.9, 4336.2 -> 4,336."""
    if value == round(value):
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def with_unit(value: float, unit: Unit) -> str:
    """A number and its unit; perplexity has none."""
    return number(value) if unit == "perplexity" else f"{number(value)} {unit}"


def read_record(path: Path) -> Record:
    """The record in a file; raises CheckpointError if it is none."""
    try:
        found = parse_json_text(read_bounded(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a benchmark record: {in_words(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a benchmark record: it is not a JSON object")
    missing = {"name", "command", "date", "machine", "results"} - set(found)
    if missing:
        raise CheckpointError(f"{path}: a record lacks {', '.join(sorted(missing))}")
    try:
        return parse_record(found)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse_record(found: Mapping[str, Any]) -> Record:
    """A record from the object of its file; what is absent stays empty.

    Raises CheckpointError for figures that are not `Figure`s. A record written before figures were
    typed may hold rows of a card under results.speed; they become figures of serving.
    """
    results = found.get("results")
    results = results if isinstance(results, Mapping) else {}
    if "figures" in found:
        rows = found["figures"]
        if not isinstance(rows, list):
            raise CheckpointError(f"figures is {_shown(rows)}; it must be a list")
        figures = tuple(_figure(row, f"figures[{at}]") for at, row in enumerate(rows))
    else:
        figures = _figures_of_rows(results.get("speed"))
    dirty = found.get("dirty")
    return Record(
        name=str(found.get("name", "")),
        question=str(found.get("question", "")),
        command=str(found.get("command", "not recorded")),
        date=str(found.get("date", "")),
        machine=_machine(found.get("machine")),
        figures=figures,
        results=results,
        samples=found.get("samples") or {},
        checkpoint=_text(found.get("checkpoint")),
        commit=_text(found.get("commit")),
        dirty=dirty if isinstance(dirty, bool) else None,
    )


def figure_fields(figure: Figure) -> dict[str, Any]:
    """A figure as its record holds it; what is empty or false is left out."""
    fields = {name: value for name, value in asdict(figure).items() if value not in ({}, (), False)}
    fields["value"] = figure.value  # a value of 0 is a value
    if figure.against:
        fields["against"] = [
            {name: v for name, v in asdict(one).items() if v is not False} for one in figure.against
        ]
    return fields


def _figure(row: object, where: str) -> Figure:
    fields = _fields(row, where, ("name", "value", "unit", "topic"),
                     ("conditions", "against", "is_headline"))  # fmt: skip
    unit, topic = fields["unit"], fields["topic"]
    for name, value, known in (("unit", unit, _UNITS), ("topic", topic, _TOPICS)):
        if value not in known:
            listed = ", ".join(known)
            raise CheckpointError(f"{where}.{name} is {_shown(value)}; it must be one of {listed}")
    conditions = fields.get("conditions", {})
    if not isinstance(conditions, Mapping) or not all(
        isinstance(value, str) or _is_number(value) for value in conditions.values()
    ):
        raise CheckpointError(
            f"{where}.conditions is {_shown(conditions)}; it must be an object of texts and numbers"
        )
    against = fields.get("against", [])
    if not isinstance(against, list):
        raise CheckpointError(f"{where}.against is {_shown(against)}; it must be a list")
    return Figure(
        name=str(fields["name"]),
        value=_number(fields["value"], f"{where}.value"),
        unit=unit,
        topic=topic,
        conditions=dict(conditions),
        against=tuple(_against(one, f"{where}.against[{n}]") for n, one in enumerate(against)),
        is_headline=fields.get("is_headline") is True,
    )


def _against(row: object, where: str) -> Against:
    fields = _fields(row, where, ("what", "value"), ("is_bound",))
    value = _number(fields["value"], f"{where}.value")
    return Against(str(fields["what"]), value, fields.get("is_bound") is True)


def _fields(
    row: object, where: str, needed: tuple[str, ...], known: tuple[str, ...]
) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise CheckpointError(f"{where} is {_shown(row)}; it must be an object")
    if missing := [name for name in needed if name not in row]:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    if unknown := [str(name) for name in row if name not in (*needed, *known)]:
        raise CheckpointError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    return row


def _number(value: object, where: str) -> float:
    if not _is_number(value):
        raise CheckpointError(f"{where} is {_shown(value)}; it must be a finite number")
    return value


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Field of an old row -> name, unit and topic of the figure it becomes.
_ROW_FIGURES: dict[str, tuple[str, Unit, Topic]] = {
    "first_token_s": ("time to the first token", "s", "serving"),
    "between_tokens_ms": ("time between tokens", "ms", "serving"),
    "output_tokens_per_s": ("output", "tokens/s", "serving"),
    "prompt_tokens_per_s": ("prompt", "tokens/s", "serving"),
}
_ROW_CONDITIONS = {
    "users": "users", "prompt_tokens": "prompt tokens", "answer_tokens": "answer tokens"
}  # fmt: skip


def _figures_of_rows(rows: object) -> tuple[Figure, ...]:
    found = []
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, Mapping):
            continue
        conditions = {name: row[key] for key, name in _ROW_CONDITIONS.items()
                      if _is_number(row.get(key))}  # fmt: skip
        found += [
            Figure(name, row[key], unit, topic, conditions)
            for key, (name, unit, topic) in _ROW_FIGURES.items()
            if _is_number(row.get(key))
        ]
    return tuple(found)


def _machine(found: object) -> Machine:
    if not isinstance(found, Mapping):
        return Machine()
    versions = found.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    memory = found.get("memory_gib")
    return Machine(
        processor=_text(found.get("processor")),
        cores=_count(found.get("cores")),
        threads=_count(found.get("threads")),
        memory_gib=float(memory) if _is_number(memory) else None,
        system=_text(found.get("system")),
        python=_text(found.get("python")),
        gpu=_text(found.get("gpu")),
        cuda=_text(found.get("cuda")),
        versions={str(name): str(version) for name, version in versions.items()},
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
