"""Run one benchmark against an endpoint; inspect-ai carries the requests, this file its load.

One inspect sample is one trajectory (an item, or a SciCode problem) in one repeat. The solver asks
for what the journal does not hold and writes each raw answer the moment it arrives; the scorer
grades and writes the record. So a kill costs the attempts in flight, and a resumed run asks for
nothing twice. inspect-ai's logs hold the same records (`records_of_log`), for its viewer.

Files of this folder alone import inspect-ai (decision 0013).
"""

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.log import read_eval_log_samples
from inspect_ai.model import (
    ChatMessageUser,
    GenerateConfig,
    Model,
    get_model,
)
from inspect_ai.scorer import Score as InspectScore
from inspect_ai.scorer import mean, scorer
from inspect_ai.solver import solver

from halfbyte.errors import UsageError
from halfbyte.evals.config import JudgeConfig, RunConfig, seed_for
from halfbyte.evals.grading.judge import judge_prompt, read_verdict
from halfbyte.evals.reasoning import split_reasoning
from halfbyte.evals.records import (
    GradedAttempt,
    latest,
    make_record,
    mark_session,
    read_attempts,
    read_records,
    record_row,
    without_texts,
)
from halfbyte.evals.running.ask import (
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    Key,
    Room,
    ask_until_answered,
    explain,
    may_pass,
    prompt_sha256,
    refusal_of,
    tool_fault_of,
)
from halfbyte.evals.running.endpoint import Endpoint
from halfbyte.evals.running.progress import RunProgress
from halfbyte.evals.running.provider import PROVIDER
from halfbyte.evals.score import CodeRunner, Graders, Judge, score_attempt
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems
from halfbyte.evals.types import MISSING_CAUSES, Attempt, Conversation, Prompt, Sample
from halfbyte.json_lines import JsonLines
from halfbyte.log import logger


def trajectories(benchmark: Benchmark, samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples that must be asked in order by one asker: a problem's steps, else one item each."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        key = sample.group if benchmark.is_trajectory else sample.item_id
        found.setdefault(key, []).append(sample)
    return found


def all_prompts_sha256(benchmark: Benchmark, config: RunConfig, samples: Sequence[Sample]) -> str:
    """Hash over all rendered requests; of a trajectory the first, which needs no answers."""
    digest = hashlib.sha256(benchmark.prompt_id.encode())
    for name, members in sorted(trajectories(benchmark, samples).items()):
        rendered = prompt_sha256(benchmark.prompt(members[0], (), config.options))
        digest.update(f"{name} {rendered} {len(members)}\n".encode())
    return digest.hexdigest()


def refusals(
    loaded: Mapping[Benchmark, Sequence[Sample]], config: RunConfig, endpoint: Endpoint
) -> dict[str, str]:
    """What will fail as it is to be asked, with the words of the server that says so.

    These are benchmarks whose items the model's server refuses, and a judge that gives no verdict
    where one is plain.
    """

    async def ask() -> dict[str, str]:
        model = _model(endpoint.url, endpoint.model, config.api_key, 1, config)
        try:
            found = {
                # Later steps of a trajectory cannot be asked without the answers before them.
                one.title: await refusal_of(
                    one, [unit[0] for unit in trajectories(one, items).values()], config, model
                )
                for one, items in loaded.items()
            }
            for one in loaded:
                if one.kind == "tools" and found[one.title] is None:
                    found[one.title] = await tool_fault_of(one, config, model)
        finally:
            await model.api.aclose()
        if config.judge is not None and any(one.kind == "judged" for one in loaded):
            found[f"the judge at {config.judge.url}"] = await _judges_fault(config.judge, config)
        return {title: said for title, said in found.items() if said is not None}

    return asyncio.run(ask())


class Session(NamedTuple):
    """By what a benchmark's records are known: the run, the prompt, the rendered requests."""

    run_id: str
    prompt_id: str
    prompts_sha256: str


def run_benchmark(
    benchmark: Benchmark,
    loaded: LoadedItems,
    config: RunConfig,
    endpoint: Endpoint,
    session: Session,
    *,
    repeats: int,
    code: CodeRunner | None,
    later: int = 0,
) -> list[GradedAttempt]:
    """Ask and grade everything that is not yet in the run's folder; returns all records.

    later  attempts of the benchmarks that follow

    The records come without their texts, which stay in the folder.

    Raises UsageError if the endpoint rejects the run as such (key, model name).
    """
    folder = config.out / benchmark.name
    units = trajectories(benchmark, loaded.samples)
    total = len(loaded.samples) * repeats
    room = Room(
        benchmark=benchmark,
        config=config,
        endpoint=endpoint,
        prompt_id=session.prompt_id,
        run_id=session.run_id,
        max_tokens=config.sampling.max_tokens,
        attempts=JsonLines(folder / "attempts.jsonl"),
        samples=JsonLines(folder / "samples.jsonl"),
        progress=RunProgress(benchmark.title, total, later=later),
        graders=Graders(None, code),
    )
    if config.judge is not None:
        room.graders = Graders(_judge(config.judge, config, room), code)
    try:
        _take_up(room, folder)
        open_units = [
            (name, repeat)
            for repeat in range(repeats)
            for name, members in units.items()
            if any((s.item_id, repeat) not in room.graded for s in members)
        ]
        if open_units:
            mark_session(folder, session.prompts_sha256)
            _carry(room, units, open_units, folder)
        room.progress.show(last=True)
    finally:
        for file in (room.attempts, room.samples):
            file.sync()
            file.close()
        room.graders.worker.shutdown()
    if room.fault is not None:
        raise UsageError(f"{endpoint.url}: {room.fault}; nothing more was asked")
    wanted = {(s.item_id, r) for s in loaded.samples for r in range(repeats)}
    records = latest(map(without_texts, read_records(folder / "samples.jsonl")))
    return [record for key, record in records.items() if key in wanted]


def _take_up(room: Room, folder: Path) -> None:
    """Read what an earlier run left: items that were asked, answers that were graded."""
    done = {
        key: record
        for key, record in latest(
            map(without_texts, read_records(folder / "samples.jsonl"))
        ).items()
        if record.cause not in MISSING_CAUSES
    }
    room.graded = set(done)
    room.progress.resume(list(done.values()))
    # A later step of a trajectory needs the earlier answers, graded or not.
    for attempt in read_attempts(folder / "attempts.jsonl"):
        key = (attempt.item_id, attempt.repeat)
        is_needed = room.benchmark.is_trajectory or key not in room.graded
        if is_needed and (attempt.error is None or attempt.refused):
            room.answered[key] = attempt


def _carry(
    room: Room, units: dict[str, list[Sample]], open_units: Sequence[Key], folder: Path
) -> None:
    config = room.config
    concurrency = config.concurrency or room.benchmark.concurrency
    model = _model(room.endpoint.url, room.endpoint.model, config.api_key, concurrency, config)
    room.clients.append(model)
    room.open_units = len(open_units)
    _write_first_request(room, units, folder)
    dataset = MemoryDataset(
        [
            InspectSample(
                input=name, id=f"{name}#{repeat}", metadata={"unit": name, "repeat": repeat}
            )
            for name, repeat in open_units
        ],
        name=room.benchmark.name,
    )
    task = Task(
        name=room.benchmark.name,
        dataset=dataset,
        solver=_solver(room, units, model),
        scorer=_scorer(room, units),
    )
    logs = inspect_eval(
        task,
        model=model,
        display="none",
        log_dir=str(folder / "inspect"),
        log_realtime=False,
        log_images=False,
        max_samples=concurrency,
        fail_on_error=False,
        score_display=False,
        ctl_server=False,  # no listening socket, and a second less to start
        acp_server=False,
    )
    if not logs:  # what inspect-ai returns when it was interrupted
        raise KeyboardInterrupt
    error = logs[0].error
    if logs[0].status != "success" and error is not None and room.fault is None:
        room.fault = f"the run stopped: {error.message}"


def _model(url: str, name: str, api_key: str, concurrency: int, config: RunConfig) -> Model:
    return get_model(
        f"{PROVIDER}/{name}",
        base_url=url,
        api_key=api_key,
        memoize=False,
        config=GenerateConfig(max_connections=concurrency, max_retries=0),
        client_timeout=config.timeout_s,
        max_retries=0,  # of the client library; `_try` counts and bounds the retries
    )


def _write_first_request(room: Room, units: dict[str, list[Sample]], folder: Path) -> None:
    sample = next(iter(units.values()))[0]
    prompt = room.benchmark.prompt(sample, (), room.config.options)
    request = {
        "item_id": sample.item_id,
        "prompt_id": room.prompt_id,
        "prompt_sha256": prompt_sha256(prompt),
        **_as_sent(prompt),
        "sampling": asdict(room.config.sampling_for(room.benchmark)),
        "seed": seed_for(room.benchmark.name, sample.item_id, 0, room.config.seed_shift),
    }
    (folder / "request.json").write_text(json.dumps(request, indent=1, ensure_ascii=False) + "\n")


def _as_sent(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Conversation):
        return {"messages": list(prompt.messages), "tools": list(prompt.tools)}
    return {"messages": [{"role": "user", "content": [asdict(part) for part in prompt]}]}


def _solver(room: Room, units: dict[str, list[Sample]], model: Model) -> Any:
    """Answer every sample of a trajectory in order, from the journal where it can.

    Built as a closure: inspect-ai writes the arguments of a solver into its log with every sample.
    """

    async def answer(name: str, repeat: int) -> None:
        earlier: list[str] = []
        for sample in units[name]:
            key = (sample.item_id, repeat)
            attempt = room.answered.get(key)
            if attempt is None:
                if room.fault is not None:
                    break
                try:
                    attempt = await ask_until_answered(room, sample, repeat, earlier, model)
                    room.attempts.append(asdict(attempt))
                # inspect-ai hides what a solver raises; here it ends the run and is reported.
                except Exception as failure:
                    room.fault = _own_fault("asking", sample.item_id, failure)
                    break
                room.answered[key] = attempt
            earlier.append(attempt.answer)

    @solver
    def answer_trajectory() -> Any:
        async def solve(state: Any, generate: Any) -> Any:
            await answer(state.metadata["unit"], state.metadata["repeat"])
            return state

        return solve

    return answer_trajectory()


def _own_fault(doing: str, item_id: str, failure: Exception) -> str:
    logger.error("%s item %s failed", doing, item_id, exc_info=failure)
    return f"{doing} item {item_id} failed: {type(failure).__name__}: {failure}"


def _scorer(room: Room, units: dict[str, list[Sample]]) -> Any:
    """Grade a trajectory, write its records, forget its answers."""

    async def grade(name: str, repeat: int) -> list[dict[str, Any]]:
        members = units[name]
        rows: list[dict[str, Any]] = []
        earlier: list[Attempt] = []
        for sample in members:
            attempt = room.answered.get((sample.item_id, repeat))
            if attempt is None:
                break
            if (sample.item_id, repeat) not in room.graded:
                try:
                    record = await _grade(room, sample, attempt, earlier)
                except Exception as failure:
                    room.fault = _own_fault("recording", sample.item_id, failure)
                    break
                rows.append(record_row(record))
            earlier.append(attempt)
        for sample in members:
            room.answered.pop((sample.item_id, repeat), None)
        return rows

    @scorer(metrics=[mean()])
    def records_of_trajectory() -> Any:
        async def score(state: Any, target: Any) -> InspectScore:
            rows = await grade(state.metadata["unit"], state.metadata["repeat"])
            room.open_units -= 1
            if room.open_units == 0:
                # Connections belong to this loop and must be closed in it.
                for client in room.clients:
                    await client.api.aclose()
            scored = [row["score"] for row in rows if row["score"] is not None]
            value = sum(scored) / len(scored) if scored else float("nan")
            # The store of a sample goes into the log; its score would stay in memory to the end.
            state.store.set("records", rows)
            return InspectScore(value=value)

        return score

    return records_of_trajectory()


async def _grade(
    room: Room, sample: Sample, attempt: Attempt, earlier: Sequence[Attempt]
) -> GradedAttempt:
    result = await score_attempt(room.benchmark, sample, attempt, earlier, room.graders)
    record = make_record(room.run_id, room.config.arm, room.prompt_id, sample, attempt, result)
    room.samples.append(record_row(record))
    room.progress.add(record)
    return record


async def _judges_fault(judge: JudgeConfig, config: RunConfig) -> str | None:
    """Why a judge cannot judge, by an answer that equals the official one; None if it can.

    A busy judge is left to the attempts and their retries; one that cannot be reached is not.
    """
    model = _model(judge.url, judge.model, judge.api_key, 1, config)
    message = ChatMessageUser(content=judge_prompt("What is two plus two?", "four", "four"))
    try:
        output = await model.generate([message], config=_judges_settings(judge))
    except Exception as failure:
        return None if may_pass(failure) else explain(failure)
    finally:
        await model.api.aclose()
    reply = split_reasoning(output.completion).text
    if read_verdict(reply) is None:
        return f"there is no verdict, CORRECT or INCORRECT, in its reply {reply[:200]!r}"
    return None


def _judges_settings(judge: JudgeConfig) -> GenerateConfig:
    return GenerateConfig(temperature=0.0, max_tokens=judge.max_tokens, seed=0)


def _judge(judge: JudgeConfig, config: RunConfig, room: Room) -> Judge:
    """A function that asks the judge, through the same client and retries as the model."""
    model = _model(judge.url, judge.model, judge.api_key, config.concurrency or 16, config)
    room.clients.append(model)
    settings = _judges_settings(judge)

    async def ask(prompt: str) -> str:
        wait_s = FIRST_WAIT_S
        for retry in range(config.retries + 1):
            try:
                output = await model.generate([ChatMessageUser(content=prompt)], config=settings)
                return split_reasoning(output.completion).text
            except Exception as failure:
                if retry == config.retries:
                    # Ungraded, which is missing: the run is resumable and prints no score.
                    return f"(judge failed: {failure})"[:300]
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("the loop returns")

    return ask


def records_of_log(log_file: Path) -> list[GradedAttempt]:
    """The records inside one of inspect-ai's logs; equal to what the journal holds."""
    found = []
    for sample in read_eval_log_samples(str(log_file), all_samples_required=False):
        found += [GradedAttempt(**row) for row in sample.store.get("records", ())]
    return found
