"""A suite against an endpoint, start to end: load, check, run each benchmark, write the record.

Calls `run` (which needs the `eval` extra) only when there is something to run.
"""

import asyncio
import datetime
import importlib.util
import os
import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import UnsupportedError, UsageError, how_to_get
from halfbyte.evals import sandbox
from halfbyte.evals.config import RunConfig, differing, differing_judges
from halfbyte.evals.grading import scripts
from halfbyte.evals.grading.numbers import check_algebra
from halfbyte.evals.judging.summary import summarise
from halfbyte.evals.records import (
    FORMAT,
    BenchmarkResult,
    RunRecord,
    read_journal,
    read_run,
    time_spent,
    write_run,
)
from halfbyte.evals.running.endpoint import Endpoint
from halfbyte.evals.score import CodeRunner
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems
from halfbyte.log import logger

_PACKAGES = (
    "halfbyte", "inspect-ai", "openai", "math-verify", "if-verifiable", "nltk", "scipy", "numpy",
)  # fmt: skip


class Prepared(NamedTuple):
    """What a run needs and has: samples by benchmark, and why some benchmarks have none."""

    loaded: Mapping[str, LoadedItems]
    absent: Mapping[str, str]


def require_extra() -> None:
    """Raise UnsupportedError unless what carries runs is installed; nothing is loaded for it."""
    for package in ("inspect_ai", "openai"):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(f"running benchmarks needs {package}; {how_to_get('eval')}")


def prepare(config: RunConfig) -> Prepared:
    """Load every item and check what needs no server, so that none is started in vain.

    Raises UsageError (data missing, settings differ from the folder's run), UnsupportedError if a
    grader's needs are not met.
    """
    if (config.out / "run.json").exists():
        run = read_run(config.out / "run.json")
        _refuse_if(config, differing(run.settings, config.settings()))
    loaded, absent = _load_all(config)
    _check_graders(config, loaded)
    return Prepared(loaded, absent)


def evaluate(
    config: RunConfig,
    endpoint: Endpoint,
    checkpoint: Mapping[str, Any],
    command: str,
    prepared: Prepared,
) -> RunRecord:
    """Run, or resume, and return the record that stands in ``config.out / "run.json"``.

    checkpoint  what is known of the weights behind the endpoint; {} if nothing
    prepared    what `prepare` made of the same config
    Raises UsageError (what is asked differs from the folder's run) before anything is asked.
    """
    require_extra()
    loaded, absent = prepared
    _try_out(config, endpoint, loaded)
    run = _begin(config, endpoint, checkpoint, command)
    # The record names every benchmark from the start, so that a run that ends early lacks none.
    to_ask = {b.name: _unfinished(b, config, loaded[b.name]) for b in config.benchmarks
              if b.name in loaded}  # fmt: skip
    results: dict[str, BenchmarkResult] = {**to_ask, **run.benchmarks}
    write_run(config.out / "run.json", replace(run, benchmarks=results))
    asked = [one for one in config.benchmarks if one.name in loaded]
    later = sum(len(loaded[one.name].samples) * _repeats(one, config) for one in asked)
    for benchmark in config.benchmarks:
        if benchmark.name in absent:
            results[benchmark.name] = _not_measured(benchmark, config, absent[benchmark.name])
            continue
        data = loaded[benchmark.name]
        later -= len(data.samples) * _repeats(benchmark, config)
        results[benchmark.name] = _measured(benchmark, data, config, endpoint, run.run_id, later)
        run = _finished(run, results)
        write_run(config.out / "run.json", run)
    run = _finished(run, results)
    write_run(config.out / "run.json", run)
    return run


def _measured(
    benchmark: Benchmark,
    data: LoadedItems,
    config: RunConfig,
    endpoint: Endpoint,
    run_id: str,
    later: int,
) -> BenchmarkResult:
    """Ask and grade one benchmark; `later` attempts of others follow."""
    from halfbyte.evals.running import run as runner

    repeats = _repeats(benchmark, config)
    prompt_id = _prompt_id(benchmark, config)
    prompts = runner.all_prompts_sha256(benchmark, config, data.samples)
    _check_same_prompts(config.out / benchmark.name, prompts)
    records = runner.run_benchmark(
        benchmark,
        data,
        config,
        endpoint,
        runner.Session(run_id, prompt_id, prompts),
        repeats=repeats,
        code=_code_runner(benchmark, config),
        later=later,
    )
    return summarise(
        _identity(benchmark, config, data, prompt_id, prompts),
        records,
        expected=[(s.item_id, r) for s in data.samples for r in range(repeats)],
        partial=config.partial,
        has_groups=benchmark.has_groups,
        wall_s=time_spent(config.out / benchmark.name),
    )


def _repeats(benchmark: Benchmark, config: RunConfig) -> int:
    return config.repeats or benchmark.repeats


def _try_out(config: RunConfig, endpoint: Endpoint, loaded: Mapping[str, LoadedItems]) -> None:
    """Ask the server for one token of each benchmark that has not begun, as attempts will ask.

    Raises UsageError with all that it refuses: nothing is in the run's folder yet, so that it can
    be used with other settings.
    """
    # Optional dependency, extra `eval`: what needs inspect-ai is loaded when it is used.
    from halfbyte.evals.running import run as runner

    fresh = {
        one: loaded[one.name].samples
        for one in config.benchmarks
        if one.name in loaded and not (config.out / one.name / "attempts.jsonl").exists()
    }
    refused = runner.refusals(fresh, config, endpoint) if fresh else {}
    if refused:
        said = "; ".join(f"{title}: {words}" for title, words in refused.items())
        raise UsageError(f"{endpoint.url} refuses what is to be asked ({said}); nothing was asked")


def _code_runner(benchmark: Benchmark, config: RunConfig) -> CodeRunner | None:
    if benchmark.kind != "code":
        return None
    python = sandbox.interpreter(_code_python(config))
    return CodeRunner(python, config.code_limits, asyncio.Semaphore(os.cpu_count() or 1))


def _load_all(config: RunConfig) -> tuple[dict[str, LoadedItems], dict[str, str]]:
    """Load every benchmark's samples; reasons of those without are raised all at once."""
    loaded: dict[str, LoadedItems] = {}
    absent: dict[str, str] = {}
    for benchmark in config.benchmarks:
        try:
            loaded[benchmark.name] = benchmark.load(config.options)
        except (UsageError, UnsupportedError) as reason:
            absent[benchmark.name] = str(reason)
    if absent and not config.allow_missing:
        reasons = "\n  ".join(absent.values())
        raise UsageError(
            f"{len(absent)} of {len(config.benchmarks)} benchmarks cannot be run:\n  {reasons}\n"
            "With --allow-missing they are recorded as not measured."
        )
    for name, why in absent.items():
        logger.warning("%s is not measured: %s", name, why)
    return loaded, absent


def _check_graders(config: RunConfig, loaded: Mapping[str, LoadedItems]) -> None:
    kinds = {b.kind for b in config.benchmarks if b.name in loaded}
    if "judged" in kinds and config.judge is None:
        raise UsageError("AA-LCR needs a judge: --judge ENDPOINT --judge-model NAME")
    if "code" in kinds:
        python = sandbox.interpreter(_code_python(config))
        active = sandbox.isolation()
        scripts.check_interpreter(python)
        logger.info("generated code runs under %s: %s", python.path, ", ".join(active))
        _warn_about_versions(python)
    if any(
        b.kind == "tools" and any(one.fields.get("services") for one in loaded[b.name].samples)
        for b in config.benchmarks
        if b.name in loaded
    ):
        active = sandbox.isolation()
        logger.info("simulated services run under %s: %s", sys.executable, ", ".join(active))
    if any(b.needs_algebra for b in config.benchmarks if b.name in loaded):
        check_algebra()


def _code_python(config: RunConfig) -> str:
    if config.code_python is None:
        raise UsageError(
            "SciCode needs an interpreter of its own for generated code: --code-python PATH, made "
            "with `python3.11 -m venv code && code/bin/pip install 'numpy<2' 'scipy>=1.10,<1.14' "
            "sympy matplotlib h5py`"
        )
    return config.code_python


def _warn_about_versions(python: sandbox.Interpreter) -> None:
    numpy, scipy = python.versions.get("numpy", "none"), python.versions.get("scipy", "none")
    if not numpy.startswith("1.") or scipy.split(".")[:2] not in (
        ["1", "10"], ["1", "11"], ["1", "12"], ["1", "13"],
    ):  # fmt: skip
        logger.warning(
            "generated code gets NumPy %s and SciPy %s; SciCode's tests want NumPy < 2 and "
            "SciPy 1.10 to 1.13 (scipy.integrate.simps is gone since 1.14)", numpy, scipy,
        )  # fmt: skip


def _begin(
    config: RunConfig, endpoint: Endpoint, checkpoint: Mapping[str, Any], command: str
) -> RunRecord:
    """A new run, or the folder's own if its settings are the same."""
    settings = config.settings()
    path = config.out / "run.json"
    if path.exists():
        run = read_run(path)
        changed = differing(run.settings, settings)
        for name, was, now in (("arm", run.arm, config.arm), ("model", run.model, endpoint.model)):
            if was != now:
                changed.append(f"{name}: {was!r} and {now!r}")
        if run.checkpoint.get("headers sha256") != checkpoint.get("headers sha256"):
            changed.append("the checkpoint's tensors")
        elif run.checkpoint.get("identity", now_is := checkpoint.get("identity")) != now_is:
            changed.append("the checkpoint's weights")
        judge, limits = _judge_of(config), _sandbox_of(config)
        if run.judge and judge:
            changed += [f"judge {text}" for text in differing_judges(run.judge, judge)]
        if run.sandbox and limits and run.sandbox.get("limits") != limits.get("limits"):
            changed.append("limits of generated code")
        _refuse_if(config, changed)
        # Benchmarks that need a judge or a sandbox may come later than the others.
        return replace(run, judge=run.judge or judge, sandbox=run.sandbox or limits)
    run = RunRecord(
        format=FORMAT,
        run_id=f"{config.arm}-{uuid.uuid4().hex[:12]}",
        arm=config.arm,
        model=endpoint.model,
        endpoint=endpoint.url,
        server=endpoint.server,
        checkpoint=checkpoint,
        settings=settings,
        judge=_judge_of(config),
        sandbox=_sandbox_of(config),
        packages=_versions(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        command=command,
        started=_now(),
        finished="",
        benchmarks={},
    )
    config.out.mkdir(parents=True, exist_ok=True)
    write_run(path, run)
    return run


def _refuse_if(config: RunConfig, changed: Sequence[str]) -> None:
    if changed:
        raise UsageError(
            f"{config.out} holds a run with other settings ({'; '.join(changed)}); "
            "resume with the same ones, or choose another --out"
        )


def _judge_of(config: RunConfig) -> dict[str, Any] | None:
    is_needed = any(b.kind == "judged" for b in config.benchmarks)
    return config.judge.public() if config.judge and is_needed else None


def _sandbox_of(config: RunConfig) -> dict[str, Any] | None:
    has_code = any(b.kind == "code" for b in config.benchmarks)
    if not has_code or config.code_python is None:
        return None
    try:
        active = sandbox.isolation()
    except UnsupportedError as reason:
        return {"unavailable": str(reason)}
    python = sandbox.interpreter(_code_python(config))
    return {
        "isolation": active, "limits": asdict(config.code_limits), "versions": dict(python.versions)
    }  # fmt: skip


def _check_same_prompts(folder: Path, prompts: str) -> None:
    for session in read_journal(folder / "sessions.jsonl"):
        if session["prompts_sha256"] != prompts:
            raise UsageError(
                f"{folder.name}: the rendered requests differ from those this folder's run began "
                "with (other items or another prompt); choose another --out"
            )


def _prompt_id(benchmark: Benchmark, config: RunConfig) -> str:
    return benchmark.prompt_id.format_map(asdict(config.options))


def _identity(
    benchmark: Benchmark, config: RunConfig, data: LoadedItems | None, prompt_id: str, prompts: str
) -> dict[str, Any]:
    notes = list(benchmark.notes)
    if data is not None and data.provenance.note:
        notes.append(data.provenance.note)
    effort = config.sampling_for(benchmark).reasoning_effort
    if effort != config.sampling.reasoning_effort:
        notes.append(f"asked with reasoning effort {effort}, the only one of its items")
    if data is not None and len(data.samples) < benchmark.full_items:
        notes.append(f"{len(data.samples)} of {benchmark.full_items} items")
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "full_items": benchmark.full_items,
        "prompt_id": prompt_id,
        "prompts_sha256": prompts,
        "scorer": benchmark.scorer,
        "source": benchmark.source,
        "licence": benchmark.licence,
        "notes": notes,
        "provenance": asdict(data.provenance) if data else {},
        "max_tokens": config.sampling.max_tokens,
        "left_out": dict(data.left_out) if data else {},
    }


def _unfinished(benchmark: Benchmark, config: RunConfig, data: LoadedItems) -> BenchmarkResult:
    """The result that stands for a benchmark until all of it is asked and graded."""
    return replace(
        _not_measured(benchmark, config, "the run ended before it did; say the same command again"),
        status="incomplete",
        items=len(data.samples),
        repeats=_repeats(benchmark, config),
    )


def _not_measured(benchmark: Benchmark, config: RunConfig, reason: str) -> BenchmarkResult:
    identity = _identity(benchmark, config, None, _prompt_id(benchmark, config), "")
    empty = summarise(
        identity, [], expected=[], partial=False, has_groups=benchmark.has_groups, wall_s=0.0
    )
    return replace(empty, status="not measured", reason=reason)


def _finished(run: RunRecord, results: Mapping[str, BenchmarkResult]) -> RunRecord:
    return replace(run, benchmarks=dict(results), finished=_now())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def default_arm(target: str) -> str:
    """A name for an arm: the folder's, or the host's."""
    path = Path(target)
    return path.resolve().name if path.is_dir() else target.split("//")[-1].split("/")[0]
