"""A load run's record: written, read again, said in a terminal, set beside another run's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.bench import record as records
from halfbyte.bench.load.client import Manner
from halfbyte.bench.load.results import (
    Failure,
    LevelResult,
    Spread,
    first_tokens_ms,
    gaps_ms,
    load_figures,
    saturation,
    summarise_level,
)
from halfbyte.bench.load.run import Measured
from halfbyte.bench.load.traffic import PROFILES, Profile, Trace
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.figures import Figure, Record, number, read_record
from halfbyte.printable import columns

NAME = "load"
SATURATING: tuple[tuple[Profile, str], ...] = (("fixed", "Fixed lengths"), ("agents", "Agents"))
QUESTION = (
    "How fast does a server answer users at once, agents' sessions and a long prompt beside "
    "running answers?"
)
# What a server says of itself that its speed depends on; its folders and hosts are not asked for.
_SERVER_FACTS = (
    "version", "max_model_len", "engine_name", "engine_device", "engine_mode", "engine_decoder",
    "engine_kv_cache", "engine_max_sequences", "engine_tensor_parallel_size", "engine_products",
    "engine_speculative", "engine_deterministic",
)  # fmt: skip
_WORDS_FOR_END = {
    "interrupted": "was interrupted",
    "time": "was cut when its time was up",
    "failed": "did not come about",
}


class Asked(NamedTuple):
    """What was measured: which model, with which traffic.

    model       its name as served
    checkpoint  its identity, if that is known
    context     tokens of prompt and answer, if the server says it
    health      what the server says of itself
    machine     where it runs, in the form of `bench.record.machine`; None if it is not known
    """

    model: str
    checkpoint: str | None
    context: int | None
    health: Mapping[str, Any]
    machine: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """A record of a load run as it is read back from its file."""

    record: Record
    levels: tuple[LevelResult, ...]
    model: str
    facts: tuple[tuple[str, str], ...]
    cut: tuple[str, ...]
    notes: tuple[str, ...]
    trace: str
    planned_levels: int

    @property
    def title(self) -> str:
        """The name of the model and the day of the run."""
        return f"{self.model}, {self.record.date}"

    @property
    def checkpoint_text(self) -> str:
        """Which checkpoint, or that it is not known."""
        said = self.record.checkpoint
        return "checkpoint not known" if said is None else f"checkpoint {said[:20]}..."

    def samples(self, level: LevelResult, name: str) -> Sequence[float]:
        """Every sample of one level under a name that ends with its unit."""
        return self.record.samples.get(f"{level.title}: {name}", ())


def write_load(
    path: Path,
    measured: Sequence[Measured],
    trace: Trace,
    asked: Asked,
    manner: Manner,
    *,
    command: str,
) -> LoadRecord:
    """Write the record of a run, and read it."""
    results = [summarise_level(one) for one in measured]
    samples: dict[str, list[float]] = {}
    for one in measured:
        ordinary = one.whole
        tokens = [s.exchange.prompt_tokens for s in ordinary]
        for name, values in (
            ("first token, ms", first_tokens_ms(ordinary)),
            ("gap, ms", gaps_ms(ordinary)),
            ("prompt, tokens", [t for t in tokens if t is not None]),
        ):
            # To the microsecond: tens of thousands of gaps are most of the file.
            samples[f"{one.level.title}: {name}"] = [round(value, 3) for value in values]
    records.write(
        path,
        name=NAME,
        question=QUESTION,
        command=command,
        figures=load_figures(results),
        results={
            "model": asked.model,
            "levels": [_rounded(one.fields) for one in results],
            "planned_levels": len(trace.levels),
            "trace": {"seed": trace.seed, "sha256": trace.digest, "cut": list(trace.cut)},
            "server": {k: asked.health[k] for k in _SERVER_FACTS if k in asked.health},
            "context_tokens": asked.context,
            "tokens_per_word": manner.tokens_per_word,
            "notes": list(manner.notes),
            "client": records.machine(),
        },
        samples=samples,
        checkpoint=asked.checkpoint,
        measured_on=asked.machine or {},
    )
    return read_load(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def read_load(path: Path) -> LoadRecord:
    """A record of `halfbyte bench load`; raises UsageError for any other file."""
    try:
        record = read_record(path)
        if record.name != NAME:
            raise UsageError(f"{path} is a record of {record.name!r}, not of halfbyte bench load")
        results = record.results
        trace = results["trace"]
        return LoadRecord(
            record=record,
            levels=tuple(_level(one) for one in results["levels"]),
            model=str(results["model"]),
            facts=_facts(record),
            cut=tuple(map(str, trace["cut"])),
            notes=tuple(map(str, results["notes"])),
            trace=str(trace["sha256"]),
            planned_levels=int(results["planned_levels"]),
        )
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a whole record of halfbyte bench load: {error!r}"
        ) from error


def _level(found: Mapping[str, Any]) -> LevelResult:
    """A level as `LevelResult.fields` wrote it; ValueError for what is none."""
    plain = dict(found)
    if plain["profile"] not in PROFILES:
        raise ValueError(f"profile {plain['profile']!r}")
    for name in ("first_token", "gaps", "per_token", "alone", "beside"):
        if plain[name] is not None:
            spread = plain[name]
            p50, p99, most = (float(spread[key]) for key in ("p50", "p99", "most"))
            plain[name] = Spread(p50, p99, most, int(spread["count"]))
    for name in ("wall_s", "asked_prompt", "asked_answer", "late_ms"):
        plain[name] = float(plain[name])
    for name in (
        "output_rate", "prompt_rate", "request_rate", "found_share", "prompt_per_answer",
        "prompt_tokens", "answer_tokens",
    ):  # fmt: skip
        plain[name] = None if plain[name] is None else float(plain[name])
    for name in ("users", "planned", "answered"):
        plain[name] = int(plain[name])
    plain["title"], plain["end"] = str(plain["title"]), str(plain["end"])
    plain["timeline"] = tuple((float(x), float(y)) for x, y in plain["timeline"])
    plain["failures"] = tuple(
        Failure(str(one["kind"]), int(one["count"]), str(one["example"]))
        for one in plain["failures"]
    )
    plain["skipped"] = {str(k): int(v) for k, v in plain["skipped"].items()}
    return LevelResult(**plain)


def _facts(record: Record) -> tuple[tuple[str, str], ...]:
    results, machine = record.results, record.machine
    server = ", ".join(f"{k.removeprefix('engine_')} {v}" for k, v in results["server"].items())
    context = results["context_tokens"]
    trace = results["trace"]
    versions = ", ".join(f"{name} {found}" for name, found in machine.versions.items())
    return (
        ("model", str(results["model"])),
        ("checkpoint", record.checkpoint or "not known"),
        ("server", server or "it says nothing of itself"),
        ("context", "not told" if context is None else f"of {context:,} tokens"),
        ("machine", machine.text + (f"; {versions}" if versions else "")),
        ("traffic", f"seed {trace['seed']}, sha256 {str(trace['sha256'])[:16]}..."),
        ("command", record.command),
    )


# --- in words -------------------------------------------------------------------------------


def format_load(run: LoadRecord) -> str:
    """The levels as a table, what they come to, what failed and what was cut."""
    head = ("", "answers", "first token p50/p99", "gap p50/p99/longest", "per token", "written",
            "taken in", "found", "failed")  # fmt: skip
    units = ("", "", "ms", "ms", "ms", "tokens/s", "tokens/s", "%", "")
    rows: list[tuple[str, ...]] = [head, units]
    for one in run.levels:
        gaps = one.beside or one.gaps
        rows.append(
            (
                one.title,
                f"{one.answered} of {one.planned}",
                " / ".join(told(one.first_token, "p50", "p99")),
                " / ".join(told(gaps, "p50", "p99", "most")),
                *told(one.per_token, "p50"),
                "–" if one.output_rate is None else number(one.output_rate),
                "–" if one.prompt_rate is None else number(one.prompt_rate),
                "–" if one.found_share is None else f"{100 * one.found_share:.1f}",
                str(one.failed) if one.failed else "",
            )
        )
    lines = columns(rows)
    for profile, name in SATURATING:
        words = saturation(run.levels, profile)
        lines += [f"{name}: {words}"] if words else []
    return "\n".join([*lines, *failure_lines(run.levels), *notes(run)])


def told(spread: Spread | None, *names: str) -> tuple[str, ...]:
    """Numbers of a spread by their names, as text; dashes where there is no spread."""
    if spread is None:
        return tuple("–" for _ in names)
    return tuple(number(getattr(spread, name)) for name in names)


def failure_lines(levels: Sequence[LevelResult]) -> list[str]:
    """One line for each kind of failure of each level."""
    lines = []
    for one in levels:
        for failure in one.failures:
            example = f": {failure.example}" if failure.example else ""
            lines.append(f"{one.title}: {failure.count} failed, {failure.kind}{example}")
    return lines


def notes(run: LoadRecord) -> list[str]:
    """What was cut, ended early or could not be had."""
    lines = [*run.notes, *(f"made smaller: {words}" for words in run.cut)]
    for one in run.levels:
        if one.end:
            lines.append(f"{one.title}: {_WORDS_FOR_END.get(one.end, one.end)}")
        lines += [f"{one.title}: {count} not asked, {why}" for why, count in one.skipped.items()]
    left = run.planned_levels - len(run.levels)
    if left > 0:
        lines.append(f"{left} of {run.planned_levels} levels were not begun")
    return lines


# --- beside another run ---------------------------------------------------------------------


class ComparedFigure(NamedTuple):
    """One figure of two runs side by side."""

    figure: Figure
    other: Figure

    @property
    def cells(self) -> tuple[str, ...]:
        """The figure's name, its conditions, both values and their ratio."""
        mine, theirs = self.figure, self.other
        ratio = f"{mine.value / theirs.value:.2f}x" if theirs.value else "–"
        return mine.name, mine.conditions_text, mine.value_text, theirs.value_text, ratio


class LoadComparison(NamedTuple):
    """Figures that two runs both have, and what makes them less than comparable."""

    rows: list[ComparedFigure]
    warnings: list[str]


def comparison(run: LoadRecord, other: LoadRecord) -> LoadComparison:
    """Set two runs side by side, figure by figure of the same name, conditions and unit."""

    def key(figure: Figure) -> tuple[Any, ...]:
        return figure.name, figure.unit, tuple(figure.conditions.items())

    theirs = {key(figure): figure for figure in other.record.figures}
    rows = [
        ComparedFigure(mine, theirs[key(mine)])
        for mine in run.record.figures
        if key(mine) in theirs
    ]
    warnings = []
    if run.trace != other.trace:
        warnings.append(
            "The two runs did not send the same traffic; only levels of the same sizes are "
            "compared. Replay one trace in both: --write-trace, then --trace."
        )
    if run.record.machine.text != other.record.machine.text:
        warnings.append(
            f"The machines differ: {run.record.machine.text} here, "
            f"{other.record.machine.text} there."
        )
    if not rows:
        warnings.append("No figure was measured under the same conditions in both runs.")
    return LoadComparison(rows, warnings)


def format_load_comparison(run: LoadRecord, other: LoadRecord) -> str:
    """Format the comparison of two runs for a terminal."""
    found = comparison(run, other)
    lines = [f"against {other.title} ({other.checkpoint_text}):"]
    cells = [row.cells for row in found.rows]
    if cells:
        cells.insert(0, ("", "", "this run", "the other", "this over the other"))
    widths = [max((len(row[n]) for row in cells), default=0) for n in range(5)]
    for row in cells:
        lines.append(
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        )
    return "\n".join([*lines, *found.warnings])
