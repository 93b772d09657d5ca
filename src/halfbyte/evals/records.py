"""Files of a run: attempts and graded samples as JSON lines, the run as one JSON object.

    RUN/run.json                   what was run, how, and the numbers
    RUN/run.lock                   held by whoever writes here
    RUN/<benchmark>/attempts.jsonl raw answers, one line each, written when they arrive
    RUN/<benchmark>/samples.jsonl  the same joined with gold and score
    RUN/<benchmark>/sessions.jsonl when asking began, one line for every start or resumption
    RUN/<benchmark>/request.json   the rendered request of the first item
    RUN/<benchmark>/inspect/       inspect-ai's own logs, for its viewer

Grading again writes `samples.regrade-N.jsonl` and `run.regrade-N.json`; nothing is overwritten.
Reading never needs the network. Fields: docs/reference/scoring.md#records.
"""

import bisect
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from halfbyte.errors import UsageError, in_words
from halfbyte.evals.types import Attempt, Cause, Sample, Score
from halfbyte.files import is_there, parse_json_text, read_bounded, write_json
from halfbyte.json_lines import JsonLines, parse_line, whole_lines

FORMAT = 1
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class GradedAttempt:
    """One graded attempt: a line of `samples.jsonl`. `score` is None when missing, never 0."""

    run_id: str
    arm: str
    benchmark: str
    prompt_id: str
    prompt_sha256: str
    item_id: str
    group: str
    stratum: str
    repeat: int
    seed: int
    answer: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    latency_s: float
    extracted: str | None
    gold: str
    score: float | None
    cause: Cause
    details: Mapping[str, Any]
    error: str | None
    retries: int
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The numbers of one benchmark in a run; scores in [0, 1].

    status  complete; partial (asked for although attempts are missing); incomplete (attempts are
            missing and no score is printed); not measured (nothing could be, `reason` says why)
    score, standard_error, low, high   over items; low and high are the 95 % interval
    causes  attempts by cause; `missing` lists (item, repeat, why) of unscored ones
    """

    name: str
    title: str
    status: str
    reason: str
    items: int
    full_items: int
    repeats: int
    score: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    groups: int
    causes: Mapping[str, int]
    missing: Sequence[Sequence[Any]]
    by_stratum: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, float]
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    wall_s: float
    prompt_id: str
    prompts_sha256: str
    scorer: str
    source: str
    licence: str
    notes: Sequence[str]
    provenance: Mapping[str, Any]
    max_tokens: int
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run of a suite against one endpoint; everything needed to judge or repeat it."""

    format: int
    run_id: str
    arm: str
    model: str
    endpoint: str
    server: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    settings: Mapping[str, Any]
    judge: Mapping[str, Any] | None
    sandbox: Mapping[str, Any] | None
    packages: Mapping[str, str]
    machine: str
    command: str
    started: str
    finished: str
    benchmarks: Mapping[str, BenchmarkResult]


def make_record(
    run_id: str, arm: str, prompt_id: str, sample: Sample, attempt: Attempt, score: Score
) -> GradedAttempt:
    """Join a sample, its attempt and its score."""
    kept = {one.name for one in fields(GradedAttempt)} & {one.name for one in fields(Attempt)}
    return GradedAttempt(
        run_id=run_id,
        arm=arm,
        prompt_id=prompt_id,
        group=sample.group,
        stratum=sample.stratum,
        extracted=score.extracted,
        gold=sample.gold,
        score=score.value,
        cause=score.cause,
        details=dict(score.details),
        **{name: getattr(attempt, name) for name in kept},
    )


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a journal; a torn last line is left out.

    Raises UsageError with the line if another one is damaged.
    """
    return (row for _, row in _numbered_rows(path))


def _numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(whole_lines(path), 1):
        try:
            row = parse_line(line)
        except (ValueError, RecursionError) as failure:
            raise _damaged(path, number, f"it is not JSON ({in_words(failure)})") from failure
        if not isinstance(row, dict):
            raise _damaged(path, number, f"it is not an object but {line[:40]!r}")
        yield number, row


def _damaged(path: Path, number: int, why: str) -> UsageError:
    return UsageError(
        f"{path}, line {number} is damaged: {why}. Restore the file, or remove the line: "
        "what it held is then asked or graded again"
    )


def _typed(path: Path, kind: type[_Row]) -> Iterator[_Row]:
    for number, row in _numbered_rows(path):
        try:
            yield kind(**row)
        except TypeError as failure:  # a field too many or too few
            raise _damaged(
                path, number, f"it does not read as {kind.__name__} ({in_words(failure)})"
            ) from failure


def read_attempts(path: Path) -> Iterator[Attempt]:
    """Raw attempts of one benchmark. Raises UsageError if a line is damaged."""
    return _typed(path, Attempt)


def read_records(path: Path) -> Iterator[GradedAttempt]:
    """Graded samples of one benchmark, in the order in which they finished.

    Raises UsageError if a line is damaged.
    """
    return _typed(path, GradedAttempt)


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder for one writer; the lock ends with the process, however that ends.

    Raises UsageError if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as held:
            who = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "another one"
            raise UsageError(
                f"{folder} is in use: process {who} runs or grades there. Wait for it, end it, or "
                "choose another --out"
            ) from held
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(file, 0)
    finally:
        os.close(file)


def latest(records: Iterator[GradedAttempt]) -> dict[tuple[str, int], GradedAttempt]:
    """Keep the last attempt of each (item, repeat): a resumed one replaces the failed one."""
    return {(record.item_id, record.repeat): record for record in records}


def mark_session(folder: Path, prompts_sha256: str) -> None:
    """Note that asking begins now, and what is asked; `time_spent` needs the one."""
    journal = JsonLines(folder / "sessions.jsonl")
    journal.append({"started": time.time(), "prompts_sha256": prompts_sha256})
    journal.sync()
    journal.close()


def time_spent(folder: Path) -> float:
    """Seconds from the start of every session to its last answer, killed sessions included.

    Example: started at 0 and 100, answers at 10, 20 and 130: 20 + 30 = 50.
    """
    starts = sorted(row["started"] for row in read_journal(folder / "sessions.jsonl"))
    last = dict.fromkeys(starts, 0.0)
    for row in read_journal(folder / "attempts.jsonl"):
        began = bisect.bisect_right(starts, row.get("ended", 0.0))
        if began:
            start = starts[began - 1]
            last[start] = max(last[start], row["ended"] - start)
    return sum(last.values())


def without_texts(record: GradedAttempt) -> GradedAttempt:
    """A record for counting only: a run's worth of answers need not be held at once."""
    return replace(record, answer="", reasoning="", extracted=None)


def record_row(record: GradedAttempt) -> dict[str, Any]:
    """Turn a record into a JSON object, for `samples.jsonl`."""
    return asdict(record)


def write_run(path: Path, run: RunRecord) -> None:
    """Write a run's JSON, whole or not at all."""
    write_json(path, asdict(run))


def read_run(path: Path) -> RunRecord:
    """Read a run from its folder or its JSON file; the newest grading unless a file is named.

    Raises UsageError if there is none or it is of another format.
    """
    file = newest(path, "run", "json") if path.is_dir() else path
    if file is None or not is_there(file):
        raise UsageError(f"{path} has no run.json; a run folder is what `halfbyte evaluate` writes")
    try:
        row = parse_json_text(read_bounded(file))
        found = row.get("format")
    except (ValueError, RecursionError, AttributeError) as failure:
        raise UsageError(f"{file} is not a run record: {in_words(failure)}") from failure
    if found != FORMAT:
        raise UsageError(f"{file}: format {found!r}, this version reads {FORMAT}")
    try:
        results = {k: BenchmarkResult(**v) for k, v in row.pop("benchmarks").items()}
        for name in results:
            if not is_name(name):
                raise UsageError(
                    f"{file}: benchmark {name!r} must name a folder of the run, not a path"
                )
        return RunRecord(**row, benchmarks=results)
    except (TypeError, KeyError, AttributeError) as failure:
        raise UsageError(
            f"{file} is not a run record of this version: {in_words(failure)}"
        ) from failure


def is_name(text: str) -> bool:
    """Whether text can name an arm or a benchmark: up to 100 printable characters, no path."""
    is_path = "/" in text or "\\" in text or text in (".", "..")
    return 0 < len(text) <= 100 and text.isprintable() and not is_path


def newest(folder: Path, stem: str, suffix: str) -> Path | None:
    """The latest grading's file: `stem.regrade-N.suffix` with the highest N, else `stem.suffix`."""
    numbered = {
        int(path.name.split(".")[1].removeprefix("regrade-")): path
        for path in folder.glob(f"{stem}.regrade-*.{suffix}")
    }
    plain = folder / f"{stem}.{suffix}"
    return numbered[max(numbered)] if numbered else (plain if is_there(plain) else None)


def with_results(
    run: RunRecord, results: Mapping[str, BenchmarkResult], finished: str
) -> RunRecord:
    """Return the same run with other results and another end."""
    return replace(run, benchmarks=dict(results), finished=finished)
