"""Grade recorded attempts again: no model is asked, the old grades stay beside the new ones."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evals.judging.summary import summarise
from halfbyte.evals.records import (
    BenchmarkResult,
    GradedAttempt,
    RunRecord,
    latest,
    make_record,
    read_attempts,
    read_records,
    read_run,
    record_row,
    with_results,
    write_run,
)
from halfbyte.evals.score import CodeRunner, Graders, Judge, score_attempt
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options
from halfbyte.evals.tasks.suite import BENCHMARKS, RENAMED
from halfbyte.evals.types import Attempt
from halfbyte.json_lines import JsonLines


def regrade(
    folder: Path,
    *,
    data: Path | None,
    code: CodeRunner | None,
    judge: Judge | None,
    finished: str,
) -> tuple[RunRecord, Path]:
    """Grade a run folder again; returns the new run record and its file.

    data   folder with the items, if the run had one
    judge  None: the judgements stored in the records are read again
    Raises UsageError if an item of the run is no longer in the data.
    """
    run = read_run(folder / "run.json")
    number = 1 + len(list(folder.glob("run.regrade-*.json")))
    options = _options(run, data)
    results: dict[str, BenchmarkResult] = {}
    for name, result in run.benchmarks.items():
        if not (folder / name / "attempts.jsonl").exists():
            results[name] = result
            continue
        if name not in BENCHMARKS:
            why = RENAMED.get(name, f"there are {', '.join(BENCHMARKS)}")
            raise UsageError(f"{folder}: no benchmark is called {name!r} ({why}); measure it again")
        benchmark = BENCHMARKS[name]
        loaded = benchmark.load(options)
        graders = Graders(judge, code)
        records = asyncio.run(_regrade(folder / name, benchmark, loaded, run, result, graders))
        graders.worker.shutdown()
        _write(folder / name / f"samples.regrade-{number}.jsonl", records)
        results[name] = summarise(
            _identity(result),
            records,
            expected=[(s.item_id, r) for s in loaded.samples for r in range(result.repeats)],
            partial=result.status == "partial",
            has_groups=benchmark.has_groups,
            wall_s=result.wall_s,
        )
    regraded = with_results(run, results, finished)
    file = folder / f"run.regrade-{number}.json"
    write_run(file, regraded)
    return regraded, file


def _options(run: RunRecord, data: Path | None) -> Options:
    names = {field.name for field in fields(Options)} - {"data"}
    return Options(data=data, **{k: v for k, v in run.settings.items() if k in names})


def _identity(result: BenchmarkResult) -> Mapping[str, Any]:
    names = (
        "name", "title", "full_items", "prompt_id", "prompts_sha256", "scorer", "source",
        "licence", "notes", "provenance", "max_tokens", "left_out",
    )  # fmt: skip
    return {name: getattr(result, name) for name in names}


async def _regrade(
    folder: Path,
    benchmark: Benchmark,
    loaded: LoadedItems,
    run: RunRecord,
    result: BenchmarkResult,
    graders: Graders,
) -> list[GradedAttempt]:
    attempts = {(a.item_id, a.repeat): a for a in read_attempts(folder / "attempts.jsonl")}
    stored = latest(read_records(folder / "samples.jsonl"))
    known = {sample.item_id for sample in loaded.samples}
    if gone := {item for item, _ in attempts} - known:
        raise UsageError(
            f"{benchmark.title}: {len(gone)} recorded items are not in the data (such as "
            f"{min(gone)}); give the --data of the run"
        )
    records = []
    for repeat in sorted({r for _, r in attempts}):
        earlier: list[Attempt] = []
        group = ""
        for sample in loaded.samples:
            if sample.group != group:
                earlier, group = [], sample.group
            attempt = attempts.get((sample.item_id, repeat))
            if attempt is None:
                continue
            before = stored.get((sample.item_id, repeat))
            judgement = before.details.get("judgement") if before else None
            score = await score_attempt(benchmark, sample, attempt, earlier, graders, judgement)
            prompt_id = result.prompt_id
            records.append(make_record(run.run_id, run.arm, prompt_id, sample, attempt, score))
            if benchmark.is_trajectory:
                earlier.append(attempt)
    return records


def _write(path: Path, records: list[GradedAttempt]) -> None:
    journal = JsonLines(path)
    for record in records:
        journal.append(record_row(record))
    journal.sync()
    journal.close()


def changed_grades(folder: Path, name: str, records: Path) -> list[str]:
    """Items and repeats whose score is not what it was, as text."""
    old = latest(read_records(folder / name / "samples.jsonl"))
    new = latest(read_records(records))
    return [
        f"{item}#{repeat}: {_shown(old.get((item, repeat)))} -> {_shown(record)}"
        for (item, repeat), record in sorted(new.items())
        if _shown(old.get((item, repeat))) != _shown(record)
    ]


def _shown(record: GradedAttempt | None) -> str:
    return "none" if record is None else str(asdict(record)["cause"])
